"""Time and peak memory of the ways from examples.parquet to `sft` and `sample`, with a million examples.

    nice python benchmarks/tables.py --examples 1000000 --output tables.json

Made-up examples (10 events, 3 next queries) are written in pieces. Each way is then gone in a process of its own, so
that its peak is its own, libraries (torch, transformers, pyarrow) included:

- import: nothing but the libraries
- draw 4000 / draw all: the examples that a stage draws, in Arrow's columns
- tokenizer: `sft.model: scratch` trains its tokenizer on the texts of all
- sft 4000 / sft all: drawn, encoded, and in a trainer that has been asked for its first batches
- sample 1000 / sample all: drawn, encoded, batched, responses written. The model's part is left out: every response is
  one and the same
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PIECE = 50_000
WAYS = ("import", "draw 4000", "draw all", "tokenizer", "sft 4000", "sft all", "sample 1000", "sample all")


def write_examples(path: Path, count: int) -> None:
    """Examples of users with eight each; every tenth user is held out."""
    from tppo.core.tables import EXAMPLES

    generator = np.random.default_rng(0)
    syllables = ["ra", "ne", "lo", "ti", "mu", "ke", "sha", "por", "vin", "da", "gel", "so", "bri", "qua", "fen", "ox"]
    words = np.array([a + b + c for a in syllables for b in syllables for c in syllables])
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, EXAMPLES) as writer:
        for start in range(0, count, PIECE):
            size = min(PIECE, count - start)
            # Squared: a few words are frequent, as in a log.
            chosen = words[(generator.random((size, 13, 3)) ** 2 * len(words)).astype(int)]
            texts = [[" ".join(text) for text in row] for row in chosen.tolist()]
            users = [(start + i) // 8 for i in range(size)]
            rows = {
                "example_id": [f"{user:012x}-{start + i}" for i, user in enumerate(users)],
                "user_id": [f"{user:012x}" for user in users],
                "split": ["reward_eval" if user % 10 == 9 else "train" for user in users],
                "history": [[{"kind": "search", "text": text} for text in row[:10]] for row in texts],
                "targets": [row[10:] for row in texts],
                "target_time": [datetime(2026, 1, 1)] * size,
            }
            writer.write_table(pa.Table.from_pydict(rows, schema=EXAMPLES))


def go(way: str, folder: Path) -> dict[str, Any]:
    """Go one way; returns seconds (imports not counted) and what was made."""
    import torch

    from tppo.core.config import SFT, Recipe, Sampling, Scratch
    from tppo.core.tables import drawn_examples
    from tppo.generate import engine, respond
    from tppo.generate.sample import draw_prompts, write_responses
    from tppo.tune.scratch import start_from_scratch
    from tppo.tune.sft import encode_to_file, make_trainer

    torch.set_num_threads(1)
    start, recipe = time.monotonic(), Recipe()
    kind, _, number = way.partition(" ")
    count = int(number) if number.isdigit() else None
    made = 0
    if kind in ("draw", "sft", "tokenizer"):
        examples = drawn_examples(folder, "train", count, 0, "sft", "train")
        made = len(examples)
    if kind in ("tokenizer", "sft", "sample"):
        texts = examples if kind == "tokenizer" else drawn_examples(folder, "train", 2000, 0, "tokenizer")
        model, tokenizer = start_from_scratch(Scratch(), texts, recipe.task, 0)
    if kind == "sft":
        encoded = encode_to_file(tokenizer, examples, recipe.task, folder / "rows.arrow")
        trainer = make_trainer(model, tokenizer, encoded.rows, [], SFT(precision="fp32"), 0, folder / "checkpoints")
        batches = iter(trainer.get_train_dataloader())
        for _ in range(10):
            next(batches)
        made = len(encoded.rows)
    if kind == "sample":
        settings = Sampling(train_examples=count or 10**9, reward_eval_examples=count or 10**9)
        examples = draw_prompts(folder, settings, 0)
        ids = tokenizer("one answer\nfor everybody")["input_ids"]

        def one_answer(model: Any, tokenizer: Any, prompts: Any, **arguments: Any) -> list[engine.Generation]:
            return [engine.Generation(prompt, ids, "", False) for prompt in prompts]

        respond.generate = one_answer  # type: ignore[assignment]
        path = folder / "responses.parquet"
        made = write_responses(model, tokenizer, examples, settings, recipe.task, 0, path)["responses"]
    return {"rows": made, "seconds": round(time.monotonic() - start, 1)}


def measure(way: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"way": way, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--output", type=Path, help="write the measures as JSON")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        found = go(arguments.way, arguments.folder)
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**found, "peak_mib": peak >> 10}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_examples(folder / "examples.parquet", arguments.examples)
        print(
            f"{arguments.examples:,} examples, {(folder / 'examples.parquet').stat().st_size / 1e6:.0f} MB", flush=True
        )
        measures = []
        for way in arguments.ways:
            measures.append(measure(way, folder))
            print(json.dumps(measures[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
