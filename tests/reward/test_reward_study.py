"""The studies of benchmarks/reward_study.py at tiny size: resumed after a kill, the same for a seed, summed up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reward_study
import torch
from reward_trials import Trial, as_flags, finished_trials, load_data, own_settings

from tests.helpers.labelled_run import make_run
from tppo.core.common import UserError
from tppo.core.config import Recipe, Reward

SCRIPT = Path(reward_study.__file__)


def flags(recipe: Recipe, output: Path, study: str, *more: str) -> list[str]:
    reward = recipe.reward
    return [study, "--output", str(output), "--run_dir", recipe.run_dir, "--reward.encoder", reward.encoder,
            "--reward.max_length", "64", "--reward.batch_size", "16", "--reward.epochs", "1",
            "--reward.learning_rate", "3e-3", *more]  # fmt: skip


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "trials.jsonl").read_text().splitlines()]


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{**row, "facts": {**row["facts"], "seconds": None}} for row in rows]


@pytest.fixture
def small_run(tiny_encoder, tmp_path):
    torch.set_num_threads(1)
    return make_run(tmp_path, tiny_encoder, rows=48, held_out=24)


def test_a_killed_study_goes_on_where_it_was(small_run, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = flags(small_run, killed, "curves", "--seeds", "2", "--evals_per_epoch", "3")
    script = [sys.executable, str(SCRIPT), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(script, env=environment)
    trials = killed / "trials.jsonl"
    while process.poll() is None and not (trials.exists() and trials.read_text().count("\n") >= 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = trials.read_text()
    finished = before.count("\n")
    assert 1 <= finished < 4, "it was killed between the first trial and the last"
    trials.write_text(before[: before.rindex("\n") + 1] + '{"key": "half a li')  # killed while it wrote
    reward_study.main(command)
    reward_study.main(flags(small_run, whole, "curves", "--seeds", "2", "--evals_per_epoch", "3"))
    assert trials.read_text().startswith(before[: before.rindex("\n") + 1]), "finished trials are kept as they are"
    assert len({row["key"] for row in rows_of(killed)}) == len(rows_of(killed)) == 4
    assert without_seconds(rows_of(killed)) == without_seconds(rows_of(whole)), "same seed, same curve"
    first, second = rows_of(whole)[:2]
    assert first["curve"] != second["curve"], "seeds differ"
    assert [point["step"] for point in first["curve"]] == [0, 1, 2, 3]
    for name in ("auc", "sentence_auc", "weighted_auc", "macro_auc", "loss", "token_ece", "sentence_f1"):
        assert (whole / f"curves_{name}.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((whole / "curves.json").read_text())["points"]
    assert {(point["model"], point["seed"]) for point in points} == {
        (kind, seed) for kind in ("token", "sentence") for seed in (0, 1)
    }


def test_search_gives_both_models_the_same_budget(small_run, tmp_path, capsys):
    output = tmp_path / "study"
    command = flags(small_run, output, "search", "--seeds", "2", "--learning_rates", "3e-3", "1e-3", "--epochs", "1",
                    "--finalists", "1")  # fmt: skip
    reward_study.main(command)
    rows = rows_of(output)
    for kind in ("token", "sentence"):
        found = [row for row in rows if row["kind"] == kind]
        assert len(found) == 2 + 4 + 1, "two rates, four variants of the better, one of the six with the second seed"
        rates = [row["settings"]["learning_rate"] for row in found if row["seed"] == 0]
        better = max(found[:2], key=lambda row: row["facts"]["best"]["auc"])
        assert rates == [3e-3, 1e-3, *[better["settings"]["learning_rate"]] * 4]
        assert [row["seed"] for row in found].count(1) == 1
        finalist = next(row for row in found if row["seed"] == 1)
        best = max(row["facts"]["best"]["auc"] for row in found if row["seed"] == 0)
        (same,) = [row for row in found if row["seed"] == 0 and row["settings"] == finalist["settings"]]
        assert same["facts"]["best"]["auc"] == best
    settings = json.loads((output / "search.json").read_text())["settings"]
    assert [row["seeds"] for row in settings] == [2, *[1] * 5] * 2
    for kind in ("token", "sentence"):
        found = [json.dumps(row["changes"]) for row in settings if row["kind"] == kind]
        assert len(set(found)) == len(found) == 6
    printed = capsys.readouterr().out
    assert "best for the sentence model: `--reward.sentence_learning_rate" in printed
    assert "best for the sentence model" in (output / "search.md").read_text()
    before = (output / "trials.jsonl").read_bytes()
    reward_study.main(command)
    assert (output / "trials.jsonl").read_bytes() == before, "nothing is trained twice"


def test_ablation_shares_its_trials_with_the_curves(small_run, tmp_path):
    output = tmp_path / "study"
    common = ("--seeds", "1", "--evals_per_epoch", "2")
    reward_study.main(flags(small_run, output, "ablation", *common, "--weights", "0", "0.4", "1"))
    rows = rows_of(output)
    assert [(row["settings"]["local_weight"], row["settings"]["global_weight"]) for row in rows] == [
        (0, 1), (0.4, 0.6), (1, 0)
    ]  # fmt: skip
    curves = [[point["token_auc"] for point in row["curve"]] for row in rows]
    assert len({curve[0] for curve in curves}) == 1, "the same start"
    assert len({tuple(curve) for curve in curves}) == 3
    table = (output / "ablation.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:5]] == ["| 0", "| 0.4", "| 1"]
    assert "highest token AUC: w = " in table
    assert {path.name for path in output.glob("*.png")} == {
        "ablation_token_auc.png", "ablation_sentence_auc.png", "ablation_weight.png"
    }  # fmt: skip
    reward_study.main(flags(small_run, output, "curves", *common))
    assert [row["kind"] for row in rows_of(output)] == ["token"] * 3 + ["sentence"], "w = 0.4 is the recipe's model"


def test_trials_side_by_side_are_the_same_trials(small_run, tmp_path):
    torch.set_num_threads(1)  # as each of the workers has, so that sums round alike
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    for output, more in ((alone, ()), (beside, ("--workers", "2"))):
        reward_study.main(flags(small_run, output, "curves", "--seeds", "1", "--evals_per_epoch", "1", *more))
    rows = {row["key"]: row for row in without_seconds(rows_of(alone))}
    assert {row["key"]: row for row in without_seconds(rows_of(beside))} == rows
    assert len(rows) == 2


def test_other_labels_and_settings_are_other_trials(small_run):
    data, fewer = load_data(small_run, None), load_data(small_run, 16)
    assert (len(data.labels.train), len(fewer.labels.train), len(fewer.labels.held_out)) == (48, 16, 16)
    trial = Trial("token", own_settings("token", small_run.reward), 0)
    keys = {trial.key(data), trial.key(fewer)}
    keys |= {Trial("token", own_settings("token", small_run.reward, local_weight=0.5), 0).key(data)}
    keys |= {Trial("sentence", trial.settings, 0).key(data), Trial("token", trial.settings, 1).key(data)}
    assert len(keys) == 5
    other = own_settings("token", small_run.reward, sentence_pooling="max", sentence_loss="mse")
    assert Trial("token", other, 0).key(data) == trial.key(data), "the rival's settings are nothing to the token model"
    with pytest.raises(UserError, match="labels of both classes are needed"):
        load_data(small_run, 1)


def test_own_settings_of_the_rival():
    settings = Reward(sentence_learning_rate=2e-5, sentence_epochs=7, sentence_class_ratio=0.0)
    own = own_settings("sentence", settings)
    assert (own.learning_rate, own.epochs, own.class_ratio) == (2e-5, 7, 0.0)
    assert own_settings("sentence", own) == own
    assert own_settings("token", settings).learning_rate == Reward().learning_rate
    assert as_flags("sentence", {"epochs": 7, "sentence_loss": "mse"}) == (
        "--reward.sentence_epochs 7 --reward.sentence_loss mse"
    )
    assert as_flags("token", {"epochs": 7}) == "--reward.epochs 7"


def test_damage_in_the_middle_is_not_mended(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"key": "a"}\nhalf\n{"key": "b"}\n')
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        finished_trials(path)


def made_up(kind: str, seed: int, aucs: list[float]) -> dict:
    curve = [{"step": 10 * i, "sentence_auc": auc} for i, auc in enumerate(aucs)]
    best = max(curve[1:], key=lambda point: point["sentence_auc"])
    return {"kind": kind, "seed": seed, "curve": curve, "facts": {"best": {"auc": 0.9, **best}, "collapsed": False}}


def test_comparison_of_curves():
    rows = [
        made_up("token", 0, [0.5, 0.8, 0.9, 0.9]),
        made_up("token", 1, [0.5, 0.6, 0.9, 0.9]),
        made_up("sentence", 0, [0.5, 0.5, 0.6, 0.7]),
        made_up("sentence", 1, [0.5, 0.7, 0.6, 0.8]),
    ]
    compared = reward_study.compare_curves(rows)
    assert compared["rival_best"] == pytest.approx(0.75), "the top of the mean curve, not of the best seed"
    token, rival = compared["models"]["token"], compared["models"]["sentence"]
    assert (token["reach_steps"], rival["reach_steps"]) == ([10, 20], [None, 30])
    assert (token["seed_std"], token["wobble"]) == (0, 0)
    assert rival["wobble"] == pytest.approx((0.1 + 0.2) / 2)
    assert rival["seed_std"] == pytest.approx((0 + 0.1 / 2**0.5) / 2)
    assert [line.split(" (")[0] for line in reward_study.claims(compared)] == [
        "higher: yes, 2 of 2 seeds",
        "faster: yes, 2 of 2 seeds",
        "steadier: yes, 2 of 2 measures",
    ]


def test_claims_that_do_not_hold():
    rows = [
        made_up("token", 0, [0.5, 0.6, 0.7, 0.6]),
        made_up("token", 1, [0.5, 0.9, 0.7, 0.9]),
        made_up("sentence", 0, [0.5, 0.8, 0.8, 0.8]),
        made_up("sentence", 1, [0.5, 0.8, 0.8, 0.8]),
    ]
    rows[2]["facts"]["collapsed"] = True
    lines = reward_study.claims(reward_study.compare_curves(rows))
    assert [line.split(" (")[0] for line in lines] == [
        "higher: mixed, 1 of 2 seeds",
        "faster: no, 0 of 2 seeds",
        "steadier: no, 0 of 2 measures",
        "the rival collapsed with 1 of 2 seeds: no fair comparison",
    ]
    rows[0]["curve"][1]["sentence_auc"] = None
    with pytest.raises(UserError, match="one class only"):
        reward_study.compare_curves(rows)
