"""The whole road through the command line: tiny random weights, then the real SmolLM2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tppo import cli
from tppo.core.config import Recipe
from tppo.core.parts import read_trained_on
from tppo.core.run import RunFolder
from tppo.core.stages import all_stages, stage_command
from tppo.core.tables import LABELS, load_examples, read_table

STAGES = [
    "synthetic",
    "prepare",
    "sft",
    "sample",
    "label",
    "reward",
    "check_reward",
    "rl_tppo",
    "rl_ppo",
    "rl_ppo_sum",
    "rl_dpo",
    "evaluate",
    "report",
]


def write_recipe(folder: Path, model: str, **sections) -> Path:
    recipe = {
        "run_dir": str(folder / "run"),
        "algorithms": ["tppo", "ppo", "ppo_sum", "dpo"],
        "task": {"history_events": 4, "max_prompt_tokens": 128, "max_response_tokens": 32},
        "synthetic": {"users": 150},
        "sft": {"model": model, "max_examples": 32, "max_eval_examples": 8, "micro_batch_size": 16},
        "sample": {"train_examples": 48, "reward_eval_examples": 16},
        "label": {"calibration_examples": 60},
        "reward": {"epochs": 1, "evals_per_epoch": 1},
        # Few rows and few steps: the gate cannot tell, or fails; the road goes on.
        "check_reward": {"allow_failed": True},
        "rl": {"updates": 2, "batch_size": 8, "minibatch_size": 8, "micro_batch_size": 8, "save_every": 1},
        "dpo": {"batch_size": 16, "micro_batch_size": 8, "epochs": 1, "save_steps": 1},
        "evaluate": {"splits": ["eval1"], "max_examples": 8},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def tppo(*arguments: str, timeout: int = 560) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tppo", *arguments], capture_output=True, text=True, timeout=timeout, env=environment
    )


def check_run(folder: Path) -> None:
    for stage in STAGES:
        manifest = json.loads((folder / stage / "manifest.json").read_text())
        assert manifest["stage"] == stage
        assert manifest["versions"]["torch"]
        assert manifest["peak_memory_mib"] > 0
    for algorithm in ("tppo", "ppo", "ppo_sum"):
        rows = [json.loads(line) for line in (folder / f"rl_{algorithm}" / "metrics.jsonl").read_text().splitlines()]
        assert [row["update"] for row in rows] == [1, 2]
        assert rows[0]["kl"] == 0
        assert not list((folder / f"rl_{algorithm}").glob("*checkpoint*"))
    assert "reward_margin" in (folder / "rl_dpo" / "metrics.jsonl").read_text().splitlines()[0]
    html = (folder / "report" / "report.html").read_text()
    assert "TPPO" in html
    assert "DPO minus SFT" in html
    assert "does it know its job?" in html
    assert "<script src" not in html


def check_parts(folder: Path) -> None:
    """SFT, the labels and the prompts of RL are of different users, and the gap stands in the report."""
    users = {example.example_id: example.user_id for example in load_examples(folder / "prepare", "train")}
    trained = read_trained_on(folder / "sft").user_ids
    labels = read_table(folder / "label" / "labels.parquet", LABELS).to_pylist()
    labelled = {users[row["example_id"]] for row in labels if row["split"] == "train"}
    rolled_out = {
        users[json.loads(line)["example_id"]]
        for line in (folder / "rl_tppo" / "samples.jsonl").read_text().splitlines()
    }
    parts = (trained, labelled, rolled_out)
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)), "some user is in two"
    for name in ("summary.md", "report.html"):
        said = (folder / "report" / name).read_text()
        assert "On examples that SFT was trained on, minus people it never saw: words relevant to" in said
        assert "of people it never saw." in said


def test_tiny_road_stage_by_stage(tmp_path, tiny_policy, capsys):
    """Every stage by its own command, in this process; then nothing is left to do."""
    # Random weights say nothing relevant by themselves: a low threshold gives both classes.
    path = write_recipe(
        tmp_path,
        str(tiny_policy),
        task={"history_events": 3, "max_prompt_tokens": 320, "max_response_tokens": 96},
        label={"null_quantile": 0.3},
    )
    for stage in STAGES:
        command, flags = stage_command(stage, Recipe())
        cli.main([command, "--config", str(path), *flags])
    check_run(tmp_path / "run")
    check_parts(tmp_path / "run")
    # Somebody reads the finished answers; the report then has it, too.
    readings = ["--evaluate.readings", "[{reader: distance, examples: 2}]"]
    cli.main(["read", "--config", str(path), *readings])
    cli.main(["report", "--config", str(path), *readings])  # made anew: it has one more stage to read
    found = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    measured = {row["model"] for row in found["rows"] if row["metric"] == "kl_from_sft" and row["value"] is not None}
    assert measured == {"tppo", "ppo", "ppo_sum", "dpo"}
    for name in ("summary.md", "report.html"):
        assert "Distance from SFT on the evaluation users" in (tmp_path / "run" / "report" / name).read_text()
    capsys.readouterr()
    cli.main(["sft", "--config", str(path)])
    assert "finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_real_weights_with_one_command_and_resume(tmp_path):
    """`tppo run` with SmolLM2-135M; a run killed in RL goes on where it stopped, a finished one does nothing."""
    # As little of everything as still goes down the whole road: without bf16 a pass of these weights takes seconds.
    path = write_recipe(
        tmp_path,
        "smollm2",
        task={"history_events": 3, "max_prompt_tokens": 96, "max_response_tokens": 24},
        sft={"max_examples": 16, "max_eval_examples": 2, "batch_size": 8, "micro_batch_size": 8},
        sample={"train_examples": 20, "reward_eval_examples": 12},
        check_reward={"allow_failed": True, "max_examples": 12},
        reward={"epochs": 1, "evals_per_epoch": 1, "encoder_layers": 2},
        rl={"batch_size": 4, "minibatch_size": 4, "micro_batch_size": 4},
        dpo={"batch_size": 8, "micro_batch_size": 4},
        evaluate={"max_examples": 4},
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "tppo", "run", str(path)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "run" / "rl_tppo" / "checkpoint-1"
    while not checkpoint.exists():
        assert process.poll() is None, "the run ended before its first RL checkpoint"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    second = tppo("run", str(path), timeout=1800)
    assert second.returncode == 0, second.stderr[-3000:]
    assert second.stderr.count("done before, skipped") == STAGES.index("rl_tppo")
    assert "resuming rl_tppo after update 1" in second.stderr
    check_run(tmp_path / "run")
    assert "report.html" in second.stderr
    evaluation = json.loads((tmp_path / "run" / "evaluate" / "metrics.json").read_text())
    assert {row["model"] for row in evaluation["rows"]} >= {"sft", "tppo", "ppo", "ppo_sum", "dpo"}
    again = tppo("run", str(path))
    assert again.returncode == 0
    assert again.stderr.count("done before, skipped") == len(STAGES)


class TestMistakes:
    def test_unknown_setting_is_named_with_the_nearest(self, tmp_path, capsys):
        path = tmp_path / "recipe.yaml"
        path.write_text("rl:\n  learning_rte: 1\n")
        with pytest.raises(SystemExit) as stopped:
            cli.main(["rl", "--config", str(path)])
        assert stopped.value.code == 2
        assert "Did you mean rl.learning_rate?" in capsys.readouterr().err

    def test_unknown_flag_and_command(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["rl", "--rl.updatse", "3"])
        assert "Did you mean rl.updates?" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            cli.main(["sfft"])
        assert "did you mean `tppo sft`?" in capsys.readouterr().err

    def test_missing_recipe(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            cli.main(["run", str(tmp_path / "none.yaml")])
        assert "none.yaml" in capsys.readouterr().err

    def test_stage_before_its_input(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["rl", "--run_dir", str(tmp_path)])
        assert stopped.value.code == 2
        assert "stage 'prepare' is not finished" in capsys.readouterr().err

    def test_changed_settings_are_refused_until_redo(self, tmp_path, capsys):
        arguments = ["synthetic", "--run_dir", str(tmp_path / "run"), "--synthetic.users", "20"]
        cli.main(arguments)
        with pytest.raises(SystemExit):
            cli.main([*arguments, "--seed", "1"])
        message = capsys.readouterr().err
        assert "seed: 0 -> 1" in message
        assert "--redo synthetic" in message
        cli.main([*arguments, "--seed", "1", "--redo", "synthetic"])
        assert RunFolder(Recipe(run_dir=str(tmp_path / "run"))).manifest("synthetic")["config"]["seed"] == 1

    def test_full_disk_leaves_finished_work_valid(self, tmp_path, capsys, monkeypatch):
        run = str(tmp_path / "run")
        cli.main(["synthetic", "--run_dir", run, "--synthetic.users", "120"])

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device", str(tmp_path / "run/prepare/examples.parquet"))

        with monkeypatch.context() as patch:
            patch.setattr("tppo.logs.examples.write_examples", full)
            with pytest.raises(SystemExit) as stopped:
                cli.main(["prepare", "--run_dir", run, "--synthetic.users", "120"])
        assert stopped.value.code == 3
        assert "No space left on device" in capsys.readouterr().err
        cli.main(["prepare", "--run_dir", run, "--synthetic.users", "120"])
        assert RunFolder(Recipe(run_dir=run)).manifest("prepare") is not None


def test_help_and_print_config(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert cli.COMMANDS[command].help.split(":")[0].split("(")[0][:20] in text
        assert "example:" in text
    with pytest.raises(SystemExit):
        cli.main(["run", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["rl"]["algorithm"] == "tppo"
    assert printed["task"]["num_queries"] == 3


def test_stage_order():
    recipe = Recipe(algorithms=["tppo", "ppo", "ppo_sum", "dpo"])
    assert all_stages(recipe) == STAGES
    recipe.prepare.source = ["log.tsv"]
    assert all_stages(recipe) == STAGES[1:]


@pytest.mark.parametrize("name", sorted(path.name for path in Path("recipes").glob("*.yaml")))
def test_recipes_are_valid(name):
    recipe, redo = cli.parse_recipe("run", [str(Path("recipes") / name)])
    assert recipe.run_dir == f"runs/{name.removesuffix('.yaml')}"
    assert redo == []
