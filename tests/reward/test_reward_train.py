"""The reward stage end to end on a log small enough to learn in seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.labelled_run import make_run
from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.run import RunFolder
from tppo.core.tables import CONSTRUCTED, EXAMPLES, LABELS, read_table, write_table
from tppo.core.text import Event
from tppo.judge.verdict import CONSTRUCTED_FILE
from tppo.reward.data import collate, load_labelled
from tppo.reward.metrics import sentence_check
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.reward.train import run as run_reward
from tppo.reward.train import settings_for


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
    columns = {"loss", "auc", "sentence_auc", "sentence_f1", "sentence_ece", "sentence_std"}
    assert columns <= curve[-1].keys()
    assert facts["token"]["best"].keys() >= columns | {
        "macro_auc",
        "weighted_auc",
        "token_auc",
        "token_f1",
        "token_ece",
    }
    for kind in ("token", "sentence"):
        assert facts[kind]["collapsed"] is False
        assert facts[kind]["sentence_auc"]["value"] == pytest.approx(facts[kind]["best"]["sentence_auc"])
        assert facts[kind]["score_std"] == pytest.approx(facts[kind]["best"]["sentence_std"])
        assert facts[kind]["steps"] == facts[kind]["planned_steps"] == steps
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
    assert token.info["train"] == facts["train"]
    assert token.info["judge"] == "rule"
    labelled, _ = load_labelled(Path(recipe.run_dir) / "label", Path(recipe.run_dir) / "prepare", "targets", "train")
    # Every word here is one token, and each query has one separator.
    lengths = [len(query.split()) + 1 for row in labelled for query in row.response.split("\n")]
    assert token.info["sl"] == sentence.info["sl"] == 3 * np.median(lengths)


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
    assert facts["sentence"]["collapsed"] is None or "constant" in facts["sentence"]["why"]


def test_a_rival_that_learns_nothing_is_called_collapsed(tiny_encoder, tmp_path, capsys):
    recipe = make_run(tmp_path, tiny_encoder, rows=48, held_out=24)
    recipe.reward.epochs = 1
    recipe.reward.sentence_learning_rate = 1e-9
    _, facts, _ = train(recipe)
    assert facts["sentence"]["collapsed"] is True
    assert "nearly constant" in facts["sentence"]["why"]
    assert "WARNING: the sentence reward model has collapsed" in " ".join(capsys.readouterr().err.split())


def test_sentence_check():
    labels, users = np.array([0, 1] * 20), [f"u{i // 2}" for i in range(40)]
    good = sentence_check(0.2 + 0.6 * labels, labels, users)
    assert (good["collapsed"], good["sentence_auc"]["value"], good["why"]) == (False, 1.0, "")
    constant = sentence_check(0.5 + 0.001 * labels, labels, users)
    assert constant["collapsed"] is True, "it ranks, but pays all the same"
    assert "nearly constant" in constant["why"]
    chance = sentence_check(np.tile([0.9, 0.9, 0.1, 0.1], 10), labels, users)
    assert chance["collapsed"] is True
    assert "not above chance" in chance["why"]
    one_class = sentence_check(np.linspace(0, 1, 40), np.ones(40), users)
    assert one_class["collapsed"] is None
    assert "one class or one user" in one_class["why"]


def test_patience_stops_both_models_early(tiny_encoder, tmp_path):
    recipe = make_run(tmp_path, tiny_encoder, rows=48, held_out=24)
    recipe.reward.epochs = 6
    recipe.reward.patience = 2
    recipe.reward.learning_rate = 1e-9  # the AUC does not move, so no evaluation is better than the first
    _, facts, rows = train(recipe)
    for kind in ("token", "sentence"):
        curve = [row for row in rows if row["model"] == kind and row["split"] == "reward_eval"]
        best = facts[kind]["best"]
        after = [row for row in curve[1:] if row["step"] > best["step"]]
        assert len(after) == 2
        assert max(row["auc"] for row in after) <= best["auc"]
        assert facts[kind]["steps"] == curve[-1]["step"] < facts[kind]["planned_steps"] == 18


def test_settings_of_the_rival(tiny_encoder, tmp_path):
    recipe = make_run(tmp_path, tiny_encoder, rows=48, held_out=24)
    recipe.reward.epochs, recipe.reward.sentence_epochs = 1, 2
    recipe.reward.sentence_learning_rate = 1e-3
    recipe.reward.sentence_pooling, recipe.reward.sentence_loss = "max", "mse"
    folder, facts, rows = train(recipe)
    peak = {}
    for row in rows:
        if row["split"] == "train":
            peak[row["model"]] = max(peak.get(row["model"], 0), row["learning_rate"])
    assert peak == {"token": pytest.approx(3e-3), "sentence": pytest.approx(1e-3)}
    assert (facts["token"]["steps"], facts["sentence"]["steps"]) == (3, 6)
    assert SentenceRewardModel.load(folder / "sentence").pooling == "max"
    assert facts["sentence"]["best"]["loss"] < 0.5, "a squared error of probabilities, at most 1"
    own = settings_for(SentenceRewardModel, recipe.reward)
    assert (own.epochs, own.learning_rate, own.class_ratio) == (2, 1e-3, 3.0)
    assert settings_for(TokenRewardModel, recipe.reward) == recipe.reward


@pytest.mark.parametrize("local_weight", [0.0, 1.0])
def test_the_ends_of_the_ablation_train(tiny_encoder, tmp_path, local_weight):
    """Without the local loss class 0 is untrained, without the global one Eq. 2 is: all metrics exist all the same."""
    recipe = make_run(tmp_path, tiny_encoder, rows=48, held_out=24)
    recipe.reward.epochs = 1
    recipe.reward.local_weight, recipe.reward.global_weight = local_weight, 1 - local_weight
    _, facts, _ = train(recipe)
    best = facts["token"]["best"]
    assert all(math.isfinite(value) for value in best.values())
    used = best["local_loss"] if local_weight else best["global_loss"]
    assert best["loss"] == pytest.approx(used)


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
        ("sentence_class_ratio", 0.5),
        ("sentence_epochs", 0),
        ("sentence_learning_rate", 0.0),
        ("patience", -1),
        ("class_weights", [1.0, 1.0]),
        ("local_weight", -0.1),
    ],
)
def test_settings_are_checked(tiny_encoder, tmp_path, name, value):
    recipe = make_run(tmp_path, tiny_encoder, rows=8, held_out=4)
    setattr(recipe.reward, name, value)
    with pytest.raises(UserError, match=f"reward.{name}"):
        train(recipe)


def test_bf16_and_dropout_are_settings_of_training_only(tiny_encoder, tmp_path):
    torch.set_num_threads(1)
    recipe = make_run(tmp_path, tiny_encoder)
    recipe.reward.precision, recipe.reward.dropout = "bf16", 0.0
    folder, facts, rows = train(recipe)
    assert min(facts[kind]["best"]["auc"] for kind in ("token", "sentence")) > 0.9
    token = TokenRewardModel.load(folder / "token")
    assert {parameter.dtype for parameter in token.model.parameters()} == {torch.float32}
    assert token.model.config.hidden_dropout_prob == token.model.config.attention_probs_dropout_prob == 0
    recipe.reward.precision = "fp32"
    _, _, exact = train(recipe, "fp32")
    first, same = rows[1], exact[1]
    assert first["step"] == same["step"] == 1
    assert first["loss"] != same["loss"]
    assert first["loss"] == pytest.approx(same["loss"], rel=0.05)


def test_without_dropout_training_and_evaluation_agree(tiny_encoder):
    start = TokenRewardModel.start(str(tiny_encoder), 64, dropout=0.0)
    pairs = start.encode([[Event("search", "thing 1")]], ["pizza\ncar"])
    batch = collate(pairs, start.tokenizer.pad_token_id, torch.device("cpu"))
    start.model.train()
    trained = start.logits(batch)
    start.model.eval()
    assert torch.equal(trained, start.logits(batch))
    own = TokenRewardModel.start(str(tiny_encoder), 64)
    assert own.model.config.hidden_dropout_prob > 0


def test_constructed_responses_are_learnt_from_but_held_out_rows_are_sampled(tiny_encoder, tmp_path):
    torch.set_num_threads(1)
    recipe = make_run(tmp_path, tiny_encoder)
    path = Path(recipe.run_dir) / "label"
    rows = read_table(path / "labels.parquet", LABELS).to_pylist()
    made = [{**row, "kind": "copied"} for row in rows if row["split"] == "train" and row["rubric"] == "targets"][:32]
    write_table(path / CONSTRUCTED_FILE, made, CONSTRUCTED)
    recipe.reward.epochs = 1
    folder, facts, _ = train(recipe)
    assert facts["train"]["responses"] == 160
    assert facts["constructed"]["responses"] == 32
    assert facts["reward_eval"]["responses"] == 40
    assert facts["token"]["steps"] == (160 + 32) // recipe.reward.batch_size
    assert "| constructed responses beside them | 32 | 0 |" in (folder / "token" / "README.md").read_text()
