"""What the token-level reward model costs in RL: against a whole update, and against the policy's forward pass.

    python benchmarks/scoring_cost.py --run_dir runs/demo --algorithm tppo --output scoring_cost.json

Reads a finished RL stage: every update in its metrics.jsonl says how long it took, and how much of that was the
token-level reward model (`seconds_token_reward`) and the whole reward function (`seconds_reward`: both reward models
and the making of rewards from them). The first update is a warm-up and is left out.

Then, unless `--repeats 0`, batches of the run's own sampled responses: the token-level and the sentence-level reward
model score them, and the SFT policy runs forward over them as an update does for the old log-probabilities (same
micro-batches and precision, values and entropy included), in turns. The first turn is a warm-up and is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tppo.core.config import RL, Recipe, Task
from tppo.core.files import read_jsonl
from tppo.core.models import load_policy
from tppo.core.run import RunFolder
from tppo.core.show import Table
from tppo.core.stages import rl_stage
from tppo.core.tables import RESPONSES, load_examples, read_table
from tppo.generate.engine import Generation, encode_examples
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.rl.policy import PolicyWithValue, pad_batch
from tppo.rl.reward_function import make_sample

PARTS = ("seconds_rollout", "seconds_score", "seconds_reward", "seconds_token_reward", "seconds_update")


def update_shares(folder: Path) -> dict[str, Any]:
    """Seconds of the updates after the first, and each part's share of its update."""
    path = folder / "metrics.jsonl"
    rows = read_jsonl(path)[1:]
    if not rows or PARTS[3] not in rows[0]:
        raise SystemExit(f"{path} holds no second update with {PARTS[3]}: make the stage anew with this version")
    return {
        "updates": len(rows),
        "seconds": [row["seconds"] for row in rows],
        "shares": {name: [row[name] / row["seconds"] for row in rows] for name in PARTS},
    }


def race(run: RunFolder, config: RL, task: Task, repeats: int) -> dict[str, list[float]]:
    """Seconds of each contestant on batches of sampled responses, the warm-up turn left out."""
    model, tokenizer = load_policy(run.require("sft") / "model")
    policy = PolicyWithValue(model, config.value_function).eval()
    examples = {example.example_id: example for example in load_examples(run.require("prepare"), "train")}
    responses_path = run.require("sample") / "responses.parquet"
    rows = [row for row in read_table(responses_path, RESPONSES).to_pylist() if row["split"] == "train"]
    token = TokenRewardModel.load(run.require("reward") / "token")
    sentence = SentenceRewardModel.load(run.require("reward") / "sentence")
    seconds: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        # Fewer responses than asked for are taken again from the first.
        batch = [rows[(turn * config.batch_size + i) % len(rows)] for i in range(config.batch_size)]
        chosen = [examples[row["example_id"]] for row in batch]
        prompts, _ = encode_examples(tokenizer, chosen, task)
        samples = [
            make_sample(tokenizer, Generation(prompt, row["response_ids"], row["response"], row["finished"]), i)
            for i, (prompt, row) in enumerate(zip(prompts, batch, strict=True))
        ]
        histories, responses = [example.history for example in chosen], [sample.response for sample in samples]
        spans = [sample.spans for sample in samples]
        tokens = pad_batch(sorted(samples, key=lambda sample: len(sample.prompt_ids)), tokenizer.eos_token_id)

        def forward(tokens: Any = tokens) -> None:
            for start in range(0, config.batch_size, config.micro_batch_size):
                part = tokens.rows(slice(start, start + config.micro_batch_size))
                policy(part, config.temperature, config.precision, scoring=True)

        work: dict[str, Callable[[], Any]] = {
            "policy forward": forward,
            "token reward model": lambda h=histories, r=responses, s=spans: token.score(h, r, s),
            "sentence reward model": lambda h=histories, r=responses: sentence.score(h, r),
        }
        for name, do in work.items():
            start = time.perf_counter()
            with torch.no_grad():
                do()
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def show(measured: dict[str, Any]) -> None:
    """Medians and ranges."""
    updates = measured["updates"]
    rows: list[tuple[str, ...]] = [
        (name.removeprefix("seconds_"), spread([100 * share for share in shares], 1))
        for name, shares in updates["shares"].items()
    ]
    title = f"{measured['stage']}: shares of an update, {updates['updates']} updates"
    print(Table(("", "%"), rows, title=title).markdown())
    print(f"seconds of an update: {spread(updates['seconds'], 2)}")
    if measured["race"]:
        forward = statistics.median(measured["race"]["policy forward"])
        rows = [
            (name, spread(seconds, 3), f"{statistics.median(seconds) / forward:.2f}")
            for name, seconds in measured["race"].items()
        ]
        title = f"a batch of {measured['batch_size']}, {measured['threads']} threads"
        print(Table(("", "seconds", "of policy forward"), rows, title=title).markdown())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default="runs/demo", help="a run whose RL stage is finished")
    parser.add_argument("--algorithm", choices=["tppo", "ppo", "ppo_sum"], default="tppo")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns beside the warm-up; 0: metrics only")
    parser.add_argument("--output", type=Path, help="write every measured second as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    run, stage = RunFolder(Recipe(run_dir=arguments.run_dir)), rl_stage(arguments.algorithm)
    measured: dict[str, Any] = {"stage": stage, "updates": update_shares(run.require(stage))}
    manifest = run.manifest(stage)
    assert manifest is not None
    config, task = RL(**manifest["config"]["rl"]), Task(**manifest["config"]["task"])
    measured |= {"batch_size": config.batch_size, "threads": torch.get_num_threads(), "race": {}}
    if arguments.repeats:
        measured["race"] = race(run, config, task, arguments.repeats)
    show(measured)
    if arguments.output:
        arguments.output.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
