"""What an encoder cannot read is said, never guessed at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.encoder_kinds import write_encoder
from tests.helpers.tokenizer_kinds import get_tokenizer
from tppo.core.common import UserError
from tppo.core.config import Evaluate, Recipe, Reward
from tppo.core.tables import Example
from tppo.core.text import Event
from tppo.evaluate.answers import answer_rows, from_queries, readable_encoder
from tppo.evaluate.readings import judge_readings, text_readings
from tppo.judge.embedding import EmbeddingJudge, Encoder, Thresholds
from tppo.judge.legible import Legibility
from tppo.judge.verdict import JudgeItem, verdict_to_row
from tppo.reward.data import LabelledResponse
from tppo.reward.models import TokenRewardModel
from tppo.reward.train import Labels, train_model

LATIN = [
    "cheap flights to new york",
    "hà nội thời tiết",
    "café müller",
    "α-carotene 5 µg",
    "x9k7 100% C++",
    "\ufffd ok",
]
FOREIGN = {
    "zh": "北京天气预报",
    "zh-Hant": "機票價格",
    "ja": "東京旅行",
    "ja kana": "ホテルをよやくする",
    "th": "ราคาตั๋วเครื่องบิน",
    "ko": "한국어 날씨",
    "hi": "मौसम दिल्ली",
    "ar": "طقس اليوم",
    "he": "מזג אוויר",
    "ru": "погода москва",
    "el": "καιρός σήμερα",
    "ka": "ამინდი თბილისი",
}


@pytest.fixture(scope="module")
def judge():
    return EmbeddingJudge("minilm", dict.fromkeys(("targets", "history"), Thresholds(0.5, 0.5)))


@pytest.fixture(scope="module")
def minilm():
    return Legibility(get_tokenizer("minilm"))


def examples_in(text: str, count: int = 8) -> list[Example]:
    return [
        Example(f"e{i}", f"u{i}", "eval1", [Event("search", f"{text} {i}")], [f"{text} {i + 1}", text], "2024-01-01")
        for i in range(count)
    ]


def test_minilm_reads_latin_script(minilm):
    assert minilm.scripts == {"LATIN"}
    assert not any(mark for marks in minilm.unread(LATIN) for mark in marks)


@pytest.mark.parametrize("language", FOREIGN)
def test_minilm_does_not_read_another_script(minilm, language):
    """Whether its letters are unknown (Chinese, Thai) or all there and spelled one by one (Russian, Greek, kana)."""
    share, _ = minilm.share_unread([FOREIGN[language]])
    assert share > 0.5
    (marks,) = minilm.unread([f"hotel {FOREIGN[language]}"])
    assert not marks[0]
    assert any(marks[1:])


def test_an_encoder_reads_what_it_was_made_for():
    unigram = Legibility(get_tokenizer("unigram"))
    assert unigram.scripts >= {"LATIN", "HAN"}
    assert unigram.unread(["東京 tokyo погода"]) == [[False, False, True]]
    byte_level = Legibility(get_tokenizer("byte_level_bpe"))
    assert byte_level.unread(["new york погода"]) == [[False, False, True]], "no <unk>, and still no Russian"
    assert Legibility(get_tokenizer("byte_level_bpe"), spelling=False).unread(["погода"]) == [[False]]


def test_an_unreadable_response_is_abstained_on(judge):
    """The offline judge called an unrelated Chinese query relevant at 0.91."""
    history, targets = [Event("search", "rose pruning")], ["rose fertilizer"]
    responses = ["北京天气预报", "rose soil\n北京天气预报", "rose soil", "погода в москве", "", "rose pruning"]
    emoji, alone = judge.judge([JudgeItem(history, targets, text) for text in ("rose soil 🍕", "rose soil")], "history")
    assert (emoji.status, emoji.words[2].score) == ("ok", 0.0), "what is unknown is no word"
    assert len(alone.words) == 2
    (pictures,) = judge.judge([JudgeItem(history, ["🍕"], "🍕 🍣")], "targets")
    assert (pictures.status, pictures.sentence_score, pictures.sentence_relevant) == ("ok", 0.0, False)
    for rubric in ("targets", "history"):
        verdicts = judge.judge([JudgeItem(history, targets, response) for response in responses], rubric)
        assert [v.status for v in verdicts] == ["abstained", "abstained", "ok", "abstained", "ok", "ok"]
        assert [v.problem for v in verdicts if v.status == "abstained"] == ["unreadable"] * 3
        assert verdicts[2].sentence_relevant
        row = verdict_to_row(examples_in("a")[0], 0, rubric, judge.name, responses[0], verdicts[0])
        assert (row["words"], row["sentence_label"], row["status"]) == ([], None, "abstained")


def test_unreadable_references_are_left_out_and_without_any_the_judge_abstains(judge):
    chinese, rose = Event("search", "北京天气预报"), Event("search", "rose pruning")
    items = [JudgeItem(history, ["x"], "pruning of roses") for history in ([chinese], [chinese, rose], [rose])]
    nothing, both, alone = judge.judge(items, "history")
    assert (nothing.status, nothing.problem) == ("abstained", "unreadable_reference")
    assert both == alone
    assert alone.sentence_relevant
    (copied,) = judge.judge([JudgeItem([chinese], ["x"], "北京天气预报")], "history")
    assert (copied.status, copied.sentence_relevant) == ("ok", False), "a repeated query need not be read"


@pytest.mark.parametrize("language", ["zh", "ru", "th"])
def test_a_log_in_another_script_is_refused_before_anything_is_judged(language):
    with pytest.raises(
        UserError, match=r"label.encoder=minilm cannot read \d+% of the words .*label.judge: llm"
    ) as error:
        EmbeddingJudge("minilm", {}).calibrate(examples_in(FOREIGN[language]), 0.95, 0)
    assert FOREIGN[language].split()[0] not in str(error.value)


def test_a_few_unreadable_words_are_said_and_the_rest_is_calibrated(capsys):
    examples = examples_in("rose pruning in spring", 30)
    examples[0] = replace(examples[0], targets=["北京天气预报"])
    facts = EmbeddingJudge("minilm", {}).calibrate(examples, 0.95, 0)
    assert "label.encoder=minilm cannot read" in " ".join(capsys.readouterr().err.split())
    assert facts["history"]["nulls"]["other_users"]["responses"] < 30


def test_words_of_a_script_without_spaces_are_judged_one_by_one(tmp_path):
    """An encoder for Chinese sees the query as it is written, without spaces between its words."""
    encoder = Encoder(write_encoder("xlm_roberta", tmp_path))
    text = "東京日本旅行"
    (embedding,) = encoder.encode([text]).values()
    assert embedding.words.shape[0] == 3
    ids = encoder.tokenizer(text)["input_ids"]
    assert encoder.tokenizer.unk_token_id not in ids
    assert np.linalg.norm(embedding.words, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_text_that_spells_a_special_token_is_a_text():
    encoder = Encoder("minilm")
    found = encoder.encode(["[SEP]", "hotel [SEP]"])
    assert all(np.linalg.norm(embedding.words, axis=1) == pytest.approx(1, abs=1e-5) for embedding in found.values())
    assert found["[SEP]"].is_read


def test_verdicts_and_similarities_are_not_guessed_in_an_evaluation(judge):
    examples = examples_in("rose pruning", 3)
    answers = answer_rows(
        from_queries([["rose soil"], ["погода в москве"], ["rose"]]), examples, model="sft", seed=0, num_queries=2
    )
    known = {e.example_id: e for e in examples}
    judged = [row for row in judge_readings(judge, known, answers, "x", 2) if row["measure"] == "relevant_history"]
    assert [row["value"] is None for row in judged] == [False, True, False], "an abstention, no 0"
    rows = text_readings(known, answers, Encoder("minilm"))
    assert [row["example_id"] for row in rows if row["measure"] == "similarity_written"] == ["e0", "e2"]


def test_evaluation_goes_on_without_similarities_unless_nearest_needs_them(capsys):
    recipe = Recipe(evaluate=Evaluate(baselines=["repeat_last"]))
    assert readable_encoder(recipe, examples_in("погода в москве")) is None
    assert "evaluate.encoder=minilm cannot read" in " ".join(capsys.readouterr().err.split())
    assert readable_encoder(recipe, examples_in("rose pruning")) is not None
    with pytest.raises(UserError, match=r"evaluate.encoder=minilm .* take nearest out of evaluate.baselines"):
        readable_encoder(Recipe(evaluate=Evaluate(baselines=["nearest"])), examples_in("погода в москве"))


def test_a_reward_model_may_spell_but_not_lose_words():
    def labels(text):
        rows = [LabelledResponse(f"e{i}", f"u{i}", [Event("search", text)], text, [], [], i % 2) for i in range(4)]
        return Labels(rows, rows, {}, [])

    with pytest.raises(UserError, match=r"reward.encoder=minilm cannot read 100% of the words"):
        train_model(TokenRewardModel, labels("ราคาตั๋วเครื่องบิน"), Reward(), 0, lambda row: None)
    assert Legibility(get_tokenizer("minilm"), spelling=False).share_unread(["погода в москве"])[0] == 0
