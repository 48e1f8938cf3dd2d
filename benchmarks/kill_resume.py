"""Kill `tppo rl` (or `tppo sft`) with kill -9 at random moments and compare its end with an uninterrupted run's.

    python benchmarks/kill_resume.py --kills 100
    python benchmarks/kill_resume.py --kills 100 --stage sft

A tiny random policy and encoder are made, and every stage before the one under test is run once. Each trial starts
the stage, kills it at a seeded random moment between its first file and the end, starts it again with the same
command and lets it finish. Model files and samples.jsonl must then be equal byte by byte, and so must every column of
metrics.jsonl but those that measure time. Stages run in forks of
this process, which has imported everything. No CUDA, no downloads. Exit status 1 when a trial differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertModel

from tppo import cli
from tppo.core.config import Scratch
from tppo.core.files import read_jsonl
from tppo.core.models import load_encoder_path
from tppo.core.stages import MODULES
from tppo.rl.loop import TIME_COLUMNS
from tppo.tune.scratch import llama_config, make_policy, train_tokenizer

STAGE_FOLDER = {"rl": "rl_tppo", "sft": "sft"}
BEFORE = {
    "rl": ("synthetic", "prepare", "sft", "sample", "label", "reward", "check-reward"),
    "sft": ("synthetic", "prepare"),
}
CORPUS = ["search: garden chairs", "click: cheap flights rome", "next searches:", "how to fix a flat tire"] * 5
VOCABULARY = 330


def make_models(folder: Path) -> tuple[Path, Path]:
    """Folders of a random policy (two Llama layers) and a random encoder (two BERT layers)."""
    policy, encoder = folder / "policy", folder / "encoder"
    tokenizer = train_tokenizer(CORPUS, VOCABULARY)
    sizes = Scratch(hidden_size=48, intermediate_size=96, layers=2, heads=4)
    make_policy(llama_config(sizes, len(tokenizer), positions=512), seed=0).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    tokenizer = AutoTokenizer.from_pretrained(load_encoder_path("minilm"))
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    return policy, encoder


def write_recipe(path: Path, updates: int) -> None:
    folder = path.parent
    policy, encoder = make_models(folder)
    recipe = {
        "run_dir": str(folder / "base"),
        "algorithms": ["tppo"],
        "task": {"history_events": 3, "max_prompt_tokens": 320, "max_response_tokens": 48},
        "synthetic": {"users": 100},
        "sft": {
            "model": str(policy),
            "max_examples": 16 * updates,
            "max_eval_examples": 8,
            "micro_batch_size": 8,
            "learning_rate": 3e-3,
            "save_steps": 1,
        },
        "sample": {"train_examples": 48, "reward_eval_examples": 16},
        # A random policy and encoder say nothing relevant: a low threshold gives both classes.
        "label": {"encoder": str(encoder), "calibration_examples": 60, "null_quantile": 0.05},
        "reward": {"encoder": str(encoder), "rubric": "history", "max_length": 384, "epochs": 1, "evals_per_epoch": 1},
        "check_reward": {"allow_failed": True},  # random weights know nothing
        "rl": {
            "updates": updates,
            "batch_size": 8,
            "minibatch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "save_every": 1,
            "keep_checkpoints": 2,
            "kl_target": 1.0,
            "kl_horizon": 100,
            "max_kl": 100.0,
            "best_metric": "reward_mean",
        },
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def start(command: str, recipe: Path, run_dir: Path) -> BaseProcess:
    """The command in a forked process. A fresh interpreter would spend most of a trial on its imports."""
    process = multiprocessing.get_context("fork").Process(target=run_command, args=(command, recipe, run_dir))
    process.start()
    return process


def run_command(command: str, recipe: Path, run_dir: Path) -> None:
    """`tppo COMMAND` in this process, which ends with it."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(run_dir / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    cli.main([command, "--config", str(recipe), "--run_dir", str(run_dir)])


def finish(process: BaseProcess, run_dir: Path) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"the stage failed:\n{(run_dir / 'stderr.txt').read_text(encoding='utf-8')[-3000:]}")


def copy_base(base: Path, run_dir: Path) -> Path:
    shutil.copytree(base, run_dir)
    return run_dir


def wait_for(path: Path, process: BaseProcess) -> None:
    while not path.exists() and process.is_alive():
        time.sleep(0.005)


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same: model files, samples, and metrics without the columns of time."""
    result: dict[str, Any] = {path.name: path.read_bytes() for path in sorted((folder / "model").iterdir())}
    rows = read_jsonl(folder / "metrics.jsonl")
    result["metrics"] = json.dumps([{k: v for k, v in row.items() if k not in TIME_COLUMNS} for row in rows])
    if (folder / "samples.jsonl").exists():
        result["samples"] = (folder / "samples.jsonl").read_bytes()
    return result


def trial(stage: str, recipe: Path, run_dir: Path, delay: float) -> str | None:
    """Kill once, resume, finish; says where the kill came. None when the stage ended before it."""
    process = start(stage, recipe, run_dir)
    wait_for(run_dir / STAGE_FOLDER[stage] / "started.json", process)
    time.sleep(delay)
    if not process.is_alive():
        finish(process, run_dir)
        return None
    process.kill()
    process.join()
    metrics = run_dir / STAGE_FOLDER[stage] / "metrics.jsonl"
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    finish(start(stage, recipe, run_dir), run_dir)
    return f"killed after {delay:.2f} s, {lines} rows of metrics"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=["rl", "sft"], default="rl")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--updates", type=int, default=6, help="updates of rl, optimizer steps of sft")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TPPO_HASH_KEY": "kill-resume"}
    for module in MODULES.values():
        importlib.import_module(module)
    moments = np.random.default_rng(arguments.seed).uniform(size=arguments.kills)
    stage = arguments.stage
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe, base = folder / "recipe.yaml", folder / "base"
        # This process does no work with torch: a fork takes none of torch's threads along.
        made = multiprocessing.get_context("fork").Process(target=write_recipe, args=(recipe, arguments.updates))
        made.start()
        finish(made, folder)
        base.mkdir()
        for earlier in BEFORE[stage]:
            finish(start(earlier, recipe, base), base)
        straight = copy_base(base, folder / "straight")
        process = start(stage, recipe, straight)
        wait_for(straight / STAGE_FOLDER[stage] / "started.json", process)
        began = time.monotonic()
        finish(process, straight)
        duration = time.monotonic() - began
        expected = outcome(straight / STAGE_FOLDER[stage])
        same = 0
        for number, moment in enumerate(moments, start=1):
            run_dir, told, delay = folder / f"trial-{number}", None, float(moment) * duration
            while told is None:  # a run that was faster than the first one is not counted, but tried again earlier
                shutil.rmtree(run_dir, ignore_errors=True)
                told = trial(stage, recipe, copy_base(base, run_dir), delay)
                delay *= 0.7
            found = outcome(run_dir / STAGE_FOLDER[stage])
            different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            same += not different
            print(f"{number}: {told}: {'different: ' + ', '.join(different) if different else 'identical'}", flush=True)
            shutil.rmtree(run_dir)
    print(f"{stage}: {same}/{arguments.kills} identical to the uninterrupted run")
    raise SystemExit(same != arguments.kills)


if __name__ == "__main__":
    main()
