"""`tppo study` through the command line: killed, taken up again, with a cell that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tppo.core.config import Prepare, Recipe, Synthetic
from tppo.study.grid import Job
from tppo.study.run import locked, run_jobs

RECIPE = {
    "algorithms": ["tppo", "ppo"],
    "task": {"history_events": 3, "max_prompt_tokens": 320, "max_response_tokens": 96},
    "synthetic": {"users": 150},
    "sft": {"max_examples": 32, "max_eval_examples": 8, "micro_batch_size": 16},
    "sample": {"train_examples": 48, "reward_eval_examples": 16},
    "label": {"calibration_examples": 60, "null_quantile": 0.3},
    "reward": {"epochs": 1, "evals_per_epoch": 1},
    "check_reward": {"allow_failed": True},  # trained on next to nothing
    "rl": {"updates": 3, "batch_size": 8, "minibatch_size": 8, "micro_batch_size": 8, "save_every": 1},
    "evaluate": {"splits": ["eval1"], "max_examples": 8},
    "study": {
        "seeds": [0, 1],
        # A rollout of 8 has no minibatches of 3: the rl stage refuses, in these cells only.
        "settings": [{"name": "broken", "overrides": {"rl.minibatch_size": 3}, "algorithms": ["tppo"]}],
    },
}


def start(path: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tppo", "study", str(path), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_study_goes_on_and_names_the_cells_that_fail(tmp_path: Path, tiny_policy: Path):
    root = tmp_path / "study"
    path = tmp_path / "recipe.yaml"
    recipe = {"run_dir": str(root), **RECIPE, "sft": {**RECIPE["sft"], "model": str(tiny_policy)}}
    path.write_text(yaml.safe_dump(recipe))

    first = start(path)
    # The third cell of the first seed is at work: one tuned cell is finished, another one is not.
    under_way = root / "cells/base-ppo-s0/rl_ppo/started.json"
    while not under_way.exists():
        assert first.poll() is None, first.communicate()[1][-3000:]
        time.sleep(0.02)
    (stage,) = children(first.pid)
    os.kill(stage, signal.SIGSTOP)  # so that it is sure to be at work when the next study starts
    first.send_signal(signal.SIGKILL)  # the study only: the stage it had started lives on
    first.communicate()
    assert not (root / "cells/base-ppo-s0/evaluate").exists()
    finished = {manifest: manifest.stat().st_mtime_ns for manifest in root.glob("*/*/*/manifest.json")}
    assert root / "cells/base-tppo-s0/evaluate/manifest.json" in finished

    second = start(path)
    assert second.stderr is not None
    said = ""
    while "waiting for it" not in said:
        line = second.stderr.readline()
        assert line, f"the second study did not wait for the stage at work: {said[-3000:]}"
        said += line
    os.kill(stage, signal.SIGCONT)
    said += second.communicate()[1]
    assert second.returncode == 2, said[-3000:]
    assert {manifest: manifest.stat().st_mtime_ns for manifest in finished} == finished, (
        "a finished stage was made anew"
    )
    for seed in (0, 1):
        assert f"cells/broken-tppo-s{seed}: rl stopped (exit status 2)" in said
        for name in (f"base-sft-s{seed}", f"base-tppo-s{seed}", f"base-ppo-s{seed}"):
            assert (root / "cells" / name / "evaluate/manifest.json").exists()
        assert not (root / f"cells/broken-tppo-s{seed}/evaluate").exists()
    assert "2 of 9 run folders failed" in said
    check_results(root)

    listed = start(path, "--study.action", "plan").communicate()[0]
    assert "cells/base-tppo-s1: rl_tppo, evaluate (finished)" in listed
    assert "cells/broken-tppo-s0: rl_tppo, evaluate\n" in listed
    assert "8 cells; stages: 1 synthetic (0 to make)" in listed
    assert "4 rl_tppo (2 to make)" in listed


def check_results(root: Path) -> None:
    """Every finished cell is in the tables; examples are the same in all, answers differ between the seeds."""
    cells: dict[tuple[str, int], dict[str, dict]] = {}
    for row in pq.read_table(root / "study/results.parquet").to_pylist():
        answer = cells.setdefault((row["model"], row["seed"]), {}).setdefault(row["example_id"], {})
        answer[row["measure"]] = row["value"]
    models = ("sft", "tppo", "ppo", "targets", "other_user", *Recipe().evaluate.baselines)
    assert set(cells) == {(model, seed) for model in models for seed in (0, 1)}
    examples = list(cells["sft", 0])
    assert len(examples) == 8
    assert all(list(found) == examples for found in cells.values())
    for model in ("sft", "tppo"):
        lengths = [[answer["response_tokens"] for answer in cells[model, seed].values()] for seed in (0, 1)]
        assert lengths[0] != lengths[1]
    for reference in ("targets", "other_user"):
        assert [answer["relevant_history"] for answer in cells[reference, 0].values()] == [
            answer["relevant_history"] for answer in cells[reference, 1].values()
        ]
    curves = pq.read_table(root / "study/curves.parquet").to_pylist()
    kl = {(row["model"], row["seed"], row["update"]): row["value"] for row in curves if row["metric"] == "kl"}
    assert set(kl) == {(model, seed, update) for model in ("tppo", "ppo") for seed in (0, 1) for update in (1, 2, 3)}
    metrics = json.loads((root / "study/metrics.json").read_text())
    assert metrics["seeds"] == 2
    assert (root / "study/figures/token_relevance-kl.png").read_bytes().startswith(b"\x89PNG")
    page = (root / "study/report.html").read_text()
    assert "TPPO minus PPO" in page
    assert "2 of 8 cells failed" in page


def test_two_workers_and_a_job_that_needs_another(tmp_path: Path):
    """Real stages: `prepare` must wait for the `synthetic` of another job, and fails where that failed."""

    def job(name: str, stage: str, users: int, **stage_dirs: str) -> Job:
        recipe = Recipe(
            run_dir=str(tmp_path / name), synthetic=Synthetic(users=users), prepare=Prepare(), stage_dirs=stage_dirs
        )
        return Job(name, "base", recipe, [stage])

    jobs = [
        job("good", "synthetic", 120),
        job("taker", "prepare", 120, synthetic=str(tmp_path / "good/synthetic")),
        job("bad", "synthetic", -1),
        job("orphan", "prepare", -1, synthetic=str(tmp_path / "bad/synthetic")),
    ]
    with locked(tmp_path) as lock:
        failed = run_jobs(jobs, [{"OMP_NUM_THREADS": "1"}] * 2, lock)
    assert list(failed) == ["bad", "orphan"]
    assert "synthetic stopped" in failed["bad"]
    assert "is taken from" in failed["orphan"]
    assert (tmp_path / "taker/prepare/manifest.json").exists()
    assert (tmp_path / "taker/prepare.log").exists()
