"""The model card of a reward-model folder: its code runs, its numbers are those of reward.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tppo.core.config import Recipe
from tppo.core.run import RunFolder
from tppo.core.text import Event, parse_response
from tppo.reward.data import LabelledResponse, make_items, suggested_length
from tppo.reward.models import FIELDS, SentenceRewardModel, TokenRewardModel, model_card
from tppo.reward.train import label_facts

FACTS: dict[str, Any] = {
    "rubric": "history",
    "judge": "embedding-v2/minilm",
    "template": None,
    "repeats_irrelevant": True,
    "sl": 12.0,
    "train": {"responses": 1000, "responses_relevant": 247, "words": 9305, "words_relevant": 1585},
    "constructed": {"responses": 40, "responses_relevant": 9, "words": 320, "words_relevant": 60},
    "reward_eval": {"responses": 200, "responses_relevant": 39, "words": 1821, "words_relevant": 273},
    "metrics": {"step": 12, "token_auc": 0.91424, "sentence_auc": None},
}
HISTORY = [Event("search", "cheap flights"), Event("click", "flights to rome")]
RESPONSE = "rome hotels\nvatican tickets"


@pytest.mark.parametrize("kind", [TokenRewardModel, SentenceRewardModel])
def test_the_code_of_the_card_runs_and_gives_the_models_scores(
    tiny_encoder: Path, tmp_path: Path, kind: type, monkeypatch: pytest.MonkeyPatch
):
    kind.start(str(tiny_encoder), 64).save(tmp_path / "model", **FACTS)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path / "model")
    names: dict[str, Any] = {}
    for block in blocks:
        names = {}
        exec(compile(block, "README.md", "exec"), names)
        if block is blocks[0]:
            plain = names
    model = kind.load(tmp_path / "model")
    (logits,) = model.response_logits(model.encode([HISTORY], [RESPONSE]))
    np.testing.assert_allclose(plain["logits_TC"].numpy(), logits, atol=1e-5)
    if kind is TokenRewardModel:
        np.testing.assert_allclose(plain["probabilities_TC"].sum(-1).numpy(), 1, atol=1e-5)
        (expected,) = model.score([HISTORY], [RESPONSE], [[(0, 4), (5, 11)]])
        np.testing.assert_allclose(names["class_probs_T3"], expected, atol=1e-6)
    else:
        (expected,) = model.score([HISTORY], [RESPONSE])
        assert plain["relevance"] == pytest.approx(expected, abs=1e-5)
        assert names["relevance"] == pytest.approx(expected, abs=1e-6)


def test_the_card_shows_reward_json_and_nothing_else(tiny_encoder: Path, tmp_path: Path):
    TokenRewardModel.start(str(tiny_encoder), 64).save(tmp_path / "model", **FACTS)
    info = json.loads((tmp_path / "model" / "reward.json").read_text(encoding="utf-8"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert card == model_card(info)
    assert set(info) == set(FIELDS), "every field is documented"
    for text in (
        "| responses | 1000 | 200 |",
        "| constructed responses beside them | 40 | 0 |",
        "| token AUC, relevant against irrelevant | 0.914 |",
        "| AUC of whole responses | not measured |",
        "| `values` | separator: null, irrelevant: 0.0, relevant: 1.0 |",
        "| `repeats_irrelevant` | true |",
        "| `template` | null |",
        "| `sl` | 12.0 |",
        "complete responses only",
        "licence",
    ):
        assert text in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "None" not in card


def test_a_card_without_facts_says_nothing_of_numbers(tiny_encoder: Path, tmp_path: Path):
    SentenceRewardModel.start(str(tiny_encoder), 64).save(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "## Data" not in card
    assert "held-out users" not in card
    assert "## Limits" in card


def test_suggested_length_is_in_the_reward_models_own_tokens(tiny_encoder: Path):
    """Queries of 2, 1 and 3 word pieces, each with its separator: median 3, times the number of queries."""
    response = "new york\npizza\ncheap flights tokyo"
    words = parse_response(response, True, 3).words
    rows = [LabelledResponse("a", "u", HISTORY, response, words, [1] * len(words), 1)]
    model = TokenRewardModel.start(str(tiny_encoder), 64)
    assert suggested_length(rows, make_items(model.tokenizer, rows, 64), num_queries=4) == 12.0
    empty = [LabelledResponse("a", "u", HISTORY, "", [], [], 0)]
    assert suggested_length(empty, make_items(model.tokenizer, empty, 64), num_queries=4) is None


@pytest.mark.parametrize("judge", ["embedding", "llm"])
def test_label_facts_say_who_labelled_and_how(tmp_path: Path, judge: Any):
    recipe = Recipe(run_dir=str(tmp_path / "run"))
    recipe.prepare.source = ["log.tsv"]
    recipe.label.judge = judge
    recipe.label.repeats_irrelevant = False
    recipe.judge.template = "token"
    run = RunFolder(recipe)
    for stage in ("prepare", "sft", "sample", "label"):
        with run.stage(stage) as (_, facts):
            facts["judge"] = "J"
    expected = {"template": "token", "repeats_irrelevant": None}
    if judge == "embedding":
        expected = {"template": None, "repeats_irrelevant": False}
    assert label_facts(run) == {"judge": "J", **expected}
