"""The reward stage end to end on a log small enough to learn in seconds."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tppo.config import Recipe
from tppo.errors import UserError
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.reward.train import run as run_reward
from tppo.run import RunFolder, write_json
from tppo.tables import EXAMPLES, LABELS, write_table
from tppo.text import Event, parse_response

GOOD = ["pizza", "pasta", "cheese", "oven"]
BAD = ["car", "tyre", "engine", "road"]


def make_run(root: Path, encoder: Path, rows: int = 160, held_out: int = 40, relevant_share: float = 0.5) -> Recipe:
    """Labels with a rule: food words are relevant; a response is when most of its words are."""
    generator = np.random.default_rng(0)
    examples, labels = [], []
    for i in range(rows + held_out):
        split = "train" if i < rows else "reward_eval"
        good = generator.random() < relevant_share
        chosen = [
            str(generator.choice(GOOD if (generator.random() < 0.85) == good else BAD))
            for _ in range(generator.integers(3, 6))
        ]
        response = " ".join(chosen[:2]) + "\n" + " ".join(chosen[2:])
        words = [
            {
                "i": k,
                "word": word.text,
                "start": word.start,
                "end": word.end,
                "query": word.query,
                "score": 0.0,
                "label": 2 if word.text in GOOD else 1,
            }
            for k, word in enumerate(parse_response(response, True, 3).words)
        ]
        examples.append(
            {
                "example_id": str(i),
                "user_id": str(i),
                "split": split,
                "history": [{"kind": "search", "text": f"thing {i}"}],
                "targets": ["a", "b", "c"],
                "target_time": datetime(2006, 3, 1),
            }
        )
        for rubric, flip in (("targets", 0), ("history", 1)):
            labels.append(
                {
                    "example_id": str(i),
                    "split": split,
                    "sample": 0,
                    "rubric": rubric,
                    "judge": "rule",
                    "response": response,
                    "words": words,
                    "sentence_score": 0.0,
                    "sentence_label": int(sum(w["label"] == 2 for w in words) * 2 > len(words)) ^ flip,
                    "status": "ok",
                    "problem": None,
                }
            )
    recipe = Recipe(run_dir=str(root / "run"))
    recipe.reward.encoder = str(encoder)
    recipe.reward.max_length = 64
    recipe.reward.learning_rate = 3e-3
    recipe.reward.epochs = 3
    recipe.reward.batch_size = 16
    for stage in ("prepare", "label"):
        (root / "run" / stage).mkdir(parents=True)
        write_json(root / "run" / stage / "manifest.json", {})
    write_table(root / "run" / "prepare" / "examples.parquet", examples, EXAMPLES)
    write_table(root / "run" / "label" / "labels.parquet", labels, LABELS)
    return recipe


def train(recipe: Recipe, name: str = "reward") -> tuple[Path, dict, list[dict]]:
    folder = Path(recipe.run_dir) / name
    folder.mkdir(exist_ok=True)
    facts = run_reward(recipe, RunFolder(recipe), folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, facts, rows


def test_both_models_learn(tiny_encoder, tmp_path):
    torch.set_num_threads(1)
    recipe = make_run(tmp_path, tiny_encoder)
    folder, facts, rows = train(recipe)
    steps = 3 * 10
    for kind in ("token", "sentence"):
        curve = [row for row in rows if row["model"] == kind and row["split"] == "reward_eval"]
        assert [row["step"] for row in curve] == [0, 5, 10, 15, 20, 25, 30]
        assert facts[kind]["best"]["auc"] == max(row["auc"] for row in curve[1:])
        assert facts[kind]["best"]["auc"] > max(0.9, curve[0]["auc"])
        assert curve[-1]["loss"] < curve[0]["loss"]
        steps_logged = [row for row in rows if row["model"] == kind and row["split"] == "train"]
        assert [row["step"] for row in steps_logged] == list(range(1, steps + 1))
        assert steps_logged[-1]["epoch"] == 3
    token_row = next(row for row in rows if row["model"] == "token" and row["split"] == "train")
    expected = 0.4 * token_row["local_loss"] + 0.6 * token_row["global_loss"]
    assert token_row["loss"] == pytest.approx(expected, abs=1e-6)
    assert facts["train"]["responses"] == 160
    assert facts["reward_eval"]["responses"] == 40

    token, sentence = TokenRewardModel.load(folder / "token"), SentenceRewardModel.load(folder / "sentence")
    history = [[Event("search", "thing 1")]] * 2
    good, bad = sentence.score(history, ["pizza oven\ncheese", "car engine\nroad"])
    assert good > 0.5 > bad
    (probs,) = token.score(history[:1], ["pizza\ncar"], [[(0, 5), (5, 6), (6, 9), (9, 9)]])
    assert probs.argmax(axis=1).tolist() == [2, 0, 1, 0]
    assert token.info["metrics"] == facts["token"]["best"]
    assert token.info["rubric"] == "targets"
    assert token.info["encoder"] == str(tiny_encoder)


def test_same_seed_same_numbers_and_leftovers_are_overwritten(tiny_encoder, tmp_path):
    torch.set_num_threads(1)
    recipe = make_run(tmp_path, tiny_encoder, rows=48, held_out=16)
    recipe.reward.epochs = 1
    (Path(recipe.run_dir) / "reward" / "token").mkdir(parents=True)
    (Path(recipe.run_dir) / "reward" / "token" / "stale.safetensors").write_bytes(b"half")
    (Path(recipe.run_dir) / "reward" / "metrics.jsonl").write_text("{half")
    folder, _, first = train(recipe)
    assert not (folder / "token" / "stale.safetensors").exists()
    _, _, second = train(recipe, "again")
    assert first == second
    recipe.seed = 1
    _, _, third = train(recipe, "other")
    assert first != third


def test_both_models_as_longformers(tiny_encoder, tmp_path):
    """The encoder reads 128 tokens; histories here are longer, and each model says how many it had to cut."""
    torch.set_num_threads(1)
    recipe = make_run(tmp_path, tiny_encoder, rows=32, held_out=16)
    path = Path(recipe.run_dir) / "prepare" / "examples.parquet"
    examples = pq.read_table(path).to_pylist()
    for i, example in enumerate(examples):
        events = 30 if i % 2 else 60
        example["history"] = [{"kind": "search", "text": "new york pizza"}] * events
    write_table(path, examples, EXAMPLES)
    recipe.reward.epochs = 1
    recipe.reward.to_longformer, recipe.reward.max_length, recipe.reward.attention_window = True, 256, 16
    recipe.reward.global_attention = "cls"
    folder, facts, _ = train(recipe)
    for kind, model in (("token", TokenRewardModel), ("sentence", SentenceRewardModel)):
        loaded = model.load(folder / kind)
        assert loaded.model.config.model_type == "longformer"
        assert loaded.model.config.attention_window == [16, 16]
        assert loaded.info["global_attention"] == "cls"
        assert loaded.max_length == 256
        assert facts[kind]["histories_truncated"] == 24, "the half with 360 tokens"


def test_one_class_held_out_has_no_auc(tiny_encoder, tmp_path):
    recipe = make_run(tmp_path, tiny_encoder, rows=48, held_out=1)
    recipe.reward.epochs = 1
    _, facts, _ = train(recipe)
    assert facts["sentence"]["best"]["auc"] is None
    assert facts["sentence"]["best"]["loss"] > 0


def test_labels_of_one_class_are_refused(tiny_encoder, tmp_path):
    recipe = make_run(tmp_path, tiny_encoder, rows=8, held_out=4)
    path = Path(recipe.run_dir) / "label" / "labels.parquet"
    table = pq.read_table(path).to_pylist()
    write_table(path, [{**row, "sentence_label": 0} for row in table], LABELS)
    with pytest.raises(UserError, match="response labels of both classes are needed and there are only irrelevant"):
        train(recipe)
    for row in table:
        for word in row["words"]:
            word["label"] = 2
    write_table(path, table, LABELS)
    with pytest.raises(UserError, match="word labels of both classes are needed and there are only relevant"):
        train(recipe)
    write_table(path, [row for row in table if row["split"] == "train"], LABELS)
    with pytest.raises(UserError, match="no judged response of split reward_eval"):
        train(recipe)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("evals_per_epoch", 0),
        ("class_ratio", 0.5),
        ("class_weights", [1.0, 1.0]),
        ("local_weight", -0.1),
    ],
)
def test_settings_are_checked(tiny_encoder, tmp_path, name, value):
    recipe = make_run(tmp_path, tiny_encoder, rows=8, held_out=4)
    setattr(recipe.reward, name, value)
    with pytest.raises(UserError, match=f"reward.{name}"):
        train(recipe)
