from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig

from tppo.core.common import UserError
from tppo.core.config import JudgeSettings
from tppo.core.models import load_encoder_path
from tppo.core.text import Event
from tppo.judge.embedding import EmbeddingJudge, Encoder, Thresholds
from tppo.judge.label import saved_judge
from tppo.judge.probes import log_words, noise_items
from tppo.judge.verdict import JudgeItem, other_user_items, split_response
from tppo.reward.models import SentenceRewardModel

HISTORY = [
    Event("search", "rose pruning"),
    Event("click", "garden shed plans"),
    Event("search", "compost bin"),
]
TARGETS = ["how to prune roses in spring", "rose fertilizer"]


@pytest.fixture(scope="module")
def encoder():
    return Encoder("minilm")


@pytest.fixture(scope="module")
def judge():
    """Thresholds as a log of many topics gives them (the made-up users share four)."""
    return EmbeddingJudge("minilm", dict.fromkeys(("targets", "history"), Thresholds(0.5, 0.5)))


def verdict(judge, response, rubric="targets", history=HISTORY, targets=TARGETS):
    return judge.judge([JudgeItem(history, targets, response)], rubric)[0]


def test_word_vectors_are_the_mean_of_their_pieces(encoder):
    text = "unbelievably cheap flights"
    [embedding] = encoder.encode([text]).values()
    encoding = encoder.tokenizer(text, return_tensors="pt")
    hidden = encoder.model(**encoding).last_hidden_state[0].detach().numpy()
    owners = encoding.word_ids()
    assert owners.count(0) > 1, "the first word has to have several pieces"
    for i in range(3):
        mean = hidden[[position for position, owner in enumerate(owners) if owner == i]].mean(0)
        np.testing.assert_allclose(embedding.words[i], mean / np.linalg.norm(mean), atol=1e-5)
    mean = hidden.mean(0)
    np.testing.assert_allclose(embedding.sentence, mean / np.linalg.norm(mean), atol=1e-5)


def test_embeddings_do_not_depend_on_the_batch(encoder):
    texts = ["roses", "how to prune roses in late spring", "rose bed"]
    together = encoder.encode([*texts, *texts])
    assert set(together) == set(texts)
    for text in texts:
        alone = encoder.encode([text])[text]
        np.testing.assert_allclose(together[text].words, alone.words, atol=1e-5)
        np.testing.assert_allclose(together[text].sentence, alone.sentence, atol=1e-5)


def test_a_word_of_which_nothing_is_left_scores_zero(judge):
    result = verdict(judge, "\ufffd roses")  # a broken byte: BERT leaves it out
    assert result.words[0].score == 0.0
    assert not result.words[0].relevant
    assert result.words[1].relevant


def test_related_is_relevant_and_unrelated_is_not(judge):
    related = verdict(judge, "pruning roses in spring\nbest rose fertilizer")
    unrelated = verdict(judge, "used pickup trucks\nnfl scores")
    assert related.sentence_relevant
    assert not unrelated.sentence_relevant
    assert related.sentence_score > unrelated.sentence_score + 0.2
    assert np.mean([w.relevant for w in related.words]) > 0.5 > np.mean([w.relevant for w in unrelated.words])


def test_one_verdict_per_word_of_the_parse_in_order(judge):
    response = "  Roses roses \n\nNEW\u00a0shed\n"
    result = verdict(judge, response)
    assert len(result.words) == len(split_response(response).words) == 4
    items = [JudgeItem(HISTORY, TARGETS, text) for text in ("roses", response, "", "compost")]
    assert [len(v.words) for v in judge.judge(items, "history")] == [1, 4, 0, 1]


def test_the_rubric_says_what_the_references_are(judge):
    items = [JudgeItem(HISTORY, ["cheap flights rome"], "flights to rome")]
    [by_targets], [by_history] = judge.judge(items, "targets"), judge.judge(items, "history")
    assert by_targets.sentence_relevant
    assert not by_history.sentence_relevant


def test_empty_response_is_irrelevant_not_abstained(judge):
    for response in ("", " \n "):
        result = verdict(judge, response)
        assert (result.words, result.sentence_score, result.sentence_relevant) == ([], 0.0, False)
        assert result.status == "ok"


def test_repeats_are_not_new(judge):
    copied = verdict(judge, "Rose  Pruning\nrose fertilizer tips", "history")
    assert [w.score for w in copied.words[:2]] == [0.0, 0.0]
    assert not any(w.relevant for w in copied.words[:2])
    fresh = verdict(judge, "rose fertilizer tips", "history")
    assert copied.sentence_score == pytest.approx(fresh.sentence_score / 2, abs=1e-6)
    twice = verdict(judge, "rose fertilizer\nrose fertilizer")
    assert [w.relevant for w in twice.words] == [True, True, False, False]
    assert all(w.score > 0.99 for w in verdict(judge, "garden shed plans", "history").words), "clicks may be searched"


def test_repeats_can_be_let_pass(judge):
    lenient = EmbeddingJudge("minilm", judge.thresholds, repeats_irrelevant=False)
    copied = verdict(lenient, "rose pruning", "history")
    assert copied.sentence_relevant
    assert copied.sentence_score == pytest.approx(1, abs=1e-5)


def test_thresholds_are_the_higher_quantile_of_two_kinds_of_unrelated_text(example_factory):
    examples = example_factory(24)
    judge = EmbeddingJudge("minilm", {})
    facts = judge.calibrate(examples, 0.95, seed=0)
    nulls = {"other_users": other_user_items(examples, 0), "random_words": noise_items(examples, 0, "calibrate")}
    for rubric in ("targets", "history"):
        quantiles = []
        for null, items in nulls.items():
            scores = judge.scores(items, rubric)
            words = np.concatenate([s.words for s in scores])
            quantiles.append((np.quantile(words, 0.95), np.quantile([s.sentence for s in scores], 0.95)))
            assert facts[rubric]["nulls"][null]["responses"] == 24
            assert facts[rubric]["nulls"][null]["word"] == pytest.approx(quantiles[-1][0])
            verdicts = judge.judge(items, rubric)
            assert np.mean([w.relevant for v in verdicts for w in v.words]) <= 0.05 + 1 / len(words)
            assert np.mean([v.sentence_relevant for v in verdicts]) <= 0.05 + 1 / len(items)
        word, sentence = map(max, zip(*quantiles, strict=True))
        assert judge.thresholds[rubric] == Thresholds(pytest.approx(word), pytest.approx(sentence))


def test_noise_has_the_form_of_the_true_queries_and_a_stream_of_its_own(example_factory):
    examples = example_factory(9)
    items = noise_items(examples, 0, "a")
    vocabulary = set(log_words(examples))
    for example, item in zip(examples, items, strict=True):
        assert item.history == example.history
        queries = split_response(item.response).query_words
        assert [len(words) for words in queries] == [len(target.split()) for target in example.targets]
        assert {word for words in queries for word in words} <= vocabulary
    assert items == noise_items(examples, 0, "a")
    assert items != noise_items(examples, 0, "b")


def test_other_users_are_other(example_factory):
    examples = example_factory(9)
    for example, item in zip(examples, other_user_items(examples, 3), strict=True):
        assert item.history == example.history
    with pytest.raises(UserError, match="at least two users"):
        other_user_items([examples[0], examples[0]], 0)


def test_saved_and_loaded_judge_judges_the_same(judge, tmp_path):
    judge.save(tmp_path)
    loaded = saved_judge(tmp_path, JudgeSettings())
    assert loaded.thresholds == judge.thresholds
    assert loaded.name == judge.name
    items = [JudgeItem(HISTORY, TARGETS, "rose fertilizer\nnfl scores"), JudgeItem(HISTORY, TARGETS, "")]
    for rubric in ("targets", "history"):
        assert loaded.judge(items, rubric) == judge.judge(items, rubric)


def test_broken_or_foreign_judge_files(judge, tmp_path):
    with pytest.raises(UserError, match="run `tppo label` first"):
        saved_judge(tmp_path, JudgeSettings())
    judge.save(tmp_path)
    path = tmp_path / "judge.json"
    saved = json.loads(path.read_text())
    for change, message in (
        ({"rule_version": 99}, "rule version 99"),
        ({"encoder_sha256": "0"}, "not those"),
        ({"thresholds": {"targets": {"word": 1}}}, "no saved judge"),
    ):
        path.write_text(json.dumps({**saved, **change}))
        with pytest.raises(UserError, match=message):
            saved_judge(tmp_path, JudgeSettings())
    path.write_text("{")
    with pytest.raises(UserError, match="no saved judge"):
        saved_judge(tmp_path, JudgeSettings())


def test_user_mistakes(judge, example_factory, tiny_policy):
    with pytest.raises(UserError, match="no thresholds for rubric 'history'"):
        EmbeddingJudge("minilm", {"targets": Thresholds(0.5, 0.5)}).judge([], "history")
    with pytest.raises(UserError, match=r"null_quantile=1\.5"):
        judge.calibrate(example_factory(4), 1.5, 0)
    with pytest.raises(UserError, match="neither bundled"):
        EmbeddingJudge("maxilm", {})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lacking", r"lacks weights of an encoder \(1, first: .*layer\.0\.output\.dense\.bias"),
        ("nan", "NaN or infinite"),
        ("short", r"has 30522 tokens but the model only 500"),
    ],
)
def test_an_encoder_that_answers_with_random_or_no_numbers_is_refused(tmp_path, fault, message):
    tokenizer = AutoTokenizer.from_pretrained(load_encoder_path("minilm"))
    model = AutoModel.from_config(BertConfig(
        vocab_size=500 if fault == "short" else len(tokenizer), hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8,
    ))  # fmt: skip
    weights = model.state_dict()
    if fault == "lacking":
        del weights["encoder.layer.0.output.dense.bias"]
    if fault == "nan":
        weights["embeddings.word_embeddings.weight"][7] = torch.nan
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"label.encoder .*{message}"):
        Encoder(str(tmp_path))
    with pytest.raises(UserError, match=f"reward.encoder.*{message}"):
        SentenceRewardModel.start(str(tmp_path), 64)


def test_a_reward_model_without_its_head_is_refused(tmp_path):
    SentenceRewardModel.start(load_encoder_path("minilm"), 64).save(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    headless = {name: weight for name, weight in load_file(file).items() if "classifier" not in name}
    save_file(headless, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of an encoder \(2, first: classifier\.bias"):
        SentenceRewardModel.load(tmp_path / "m")
