"""Memory and time of a reward model on histories of 2,048 tokens: Longformers against the encoder they are made of.

    python benchmarks/longformer.py --output longformer.json
    python benchmarks/longformer.py --encoder <folder> --lengths 128 --long 256 --windows 16 --batch_size 2 --repeats 2

Contestants, all with the weights of one encoder (by default the bundled MiniLM) and the same made-up inputs of the long
length or more:

    short 256, short 512     the encoder as it is; it must leave the oldest history out (how much is in the table)
    window 64 cls, ...       a Longformer with that window and global attention (`reward.attention_window`,
                             `reward.global_attention`)
    full 2048                the encoder with tiled positions and full attention, as a reference

Each contestant does each kind of work in a process of its own: `score` (no gradients) and `train` (forward, the local
loss, backward; no optimiser step). Its first batch is a warm-up: seconds are those of the others, median and range.
Memory is the process's peak (VmHWM, so Linux only) and what of it the batches added to the loaded model. A contestant
that the kernel kills for want of memory is listed as such.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tppo.core.show import Table

if TYPE_CHECKING:
    from tppo.reward.models import TokenRewardModel

WORDS = (
    *("cheap", "flights", "garden", "chairs", "pizza", "recipe", "guitar", "chords", "weather", "hotel", "news"),
    *("repair", "used", "cars", "train", "tickets", "school", "holiday", "running", "shoes"),
)
QUERIES, WORDS_PER_QUERY = 3, 4
WORK = ("score", "train")


@dataclass(frozen=True)
class Contestant:
    """One way to read the inputs."""

    name: str
    max_length: int
    window: int = 0
    """Attention window of a Longformer; 0 leaves the encoder as it is."""
    global_attention: str = "history"
    tiled: bool = False
    """Full attention with tiled positions, up to `max_length`."""


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    long = arguments.long
    found = [Contestant(f"short {length}", length) for length in arguments.lengths]
    found += [
        Contestant(f"window {window} {where}", long, window, where)
        for window in arguments.windows
        for where in arguments.global_attention
    ]
    return found + ([] if arguments.no_full else [Contestant(f"full {long}", long, tiled=True)])


def make_model(contestant: Contestant, encoder: str, seed: int) -> TokenRewardModel:
    import torch

    from tppo.core.models import load_encoder_path
    from tppo.reward.models import TokenRewardModel

    torch.manual_seed(seed)
    path = load_encoder_path(encoder)
    if contestant.tiled:
        model = TokenRewardModel.start(path, 16)
        tile(model, contestant.max_length)
        return model
    window = contestant.window or None
    where: Any = contestant.global_attention
    return TokenRewardModel.start(path, contestant.max_length, longformer_window=window, global_attention=where)


def tile(model: TokenRewardModel, max_length: int) -> None:
    """Let a BERT kind read `max_length` tokens with full attention, in place."""
    import torch

    from tppo.reward.longformer import tile_positions

    embeddings = model.model.base_model.embeddings
    if embeddings.position_embeddings.padding_idx is not None:
        raise SystemExit("the reference with full attention is for BERT kinds: give --no_full with this encoder")
    tiled = tile_positions(embeddings.position_embeddings.weight.detach(), max_length)
    embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(tiled, freeze=False)
    embeddings.position_ids = torch.arange(max_length)[None]
    embeddings.token_type_ids = torch.zeros(1, max_length, dtype=torch.long)
    model.model.config.max_position_embeddings = max_length
    model.tokenizer.model_max_length = model.max_length = max_length


def run_work(contestant: Contestant, work: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Batches of one contestant in this process: seconds of each, and memory in MiB."""
    import torch

    from tppo.core.text import Event
    from tppo.reward.data import collate
    from tppo.reward.losses import local_loss

    model = make_model(contestant, arguments.encoder, arguments.seed)
    model.model.train(work == "train")
    generator = random.Random(arguments.seed)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=WORDS_PER_QUERY))

    seconds, loaded = [], memory_mib("VmRSS")
    tokens, dropped = [], []
    for _ in range(arguments.repeats + 1):
        # A word is a token or more, so these are the long length and more; the same for every contestant.
        events = arguments.long // WORDS_PER_QUERY
        histories = [[Event("search", text()) for _ in range(events)] for _ in range(arguments.batch_size)]
        responses = ["\n".join(text() for _ in range(QUERIES)) for _ in range(arguments.batch_size)]
        pairs = model.encode(histories, responses)
        batch = collate(pairs, model.tokenizer.pad_token_id, torch.device("cpu"))
        tokens += [len(pair) for pair in pairs]
        dropped += [pair.dropped / (len(pair) + pair.dropped) for pair in pairs]
        start = time.perf_counter()
        if work == "score":
            with torch.inference_mode():
                model.logits(batch)
        else:
            mask_BT = batch.response_mask_BT
            local_loss(model.logits(batch), mask_BT.long(), mask_BT, torch.ones(3), mask_BT).backward()
            model.model.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = memory_mib("VmHWM")
    return {
        "seconds": seconds[1:],
        "peak_mib": peak,
        "added_mib": peak - loaded,
        "tokens": statistics.fmean(tokens),
        "dropped_share": statistics.fmean(dropped),
        "threads": torch.get_num_threads(),
    }


def memory_mib(name: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process. Unlike getrusage's, this peak starts anew with the program."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contestant at every kind of work, each in a process of its own."""
    rows = []
    for contestant in contestants(arguments):
        for work in WORK:
            command = [sys.executable, __file__, "--job", json.dumps([asdict(contestant), work])]
            for name in ("encoder", "long", "batch_size", "repeats", "seed"):
                command += [f"--{name}", str(getattr(arguments, name))]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
            )
            # The kernel kills a process that memory does not suffice for: a result, too.
            if done.returncode not in (0, -signal.SIGKILL):
                raise SystemExit(f"{contestant.name}, {work}: exit code {done.returncode}")
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"seconds": None}
            rows.append({**asdict(contestant), "work": work, **found})
            print(f"{contestant.name}, {work}: {found}", file=sys.stderr, flush=True)
    return rows


def show(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    threads = next((row["threads"] for row in rows if row["seconds"]), None)
    title = f"{arguments.encoder}, batches of {arguments.batch_size}, {threads or '?'} threads"
    heads = ["", "work", "tokens", "input dropped %", "s / batch", "peak MiB", "added MiB"]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        if seconds is None:
            lines.append([row["name"], row["work"], "", "", "out of memory", "", ""])
            continue
        lines.append(
            [
                *(row["name"], row["work"], f"{row['tokens']:.0f}", f"{100 * row['dropped_share']:.0f}"),
                f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})",
                *(f"{row[name]:.0f}" for name in ("peak_mib", "added_mib")),
            ]
        )
    print(Table(heads, lines, title).markdown())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="minilm", help="a BERT kind (with --no_full also a RoBERTa kind)")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512], help="of the encoder as it is")
    parser.add_argument("--long", type=int, default=2048)
    parser.add_argument("--windows", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--global_attention", nargs="*", default=["history", "response", "cls", "none"])
    parser.add_argument("--no_full", action="store_true", help="leave the reference with full attention out")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="measured batches, beside the warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write every measured second as JSON")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.job:
        contestant, work = arguments.job
        print(json.dumps(run_work(Contestant(**contestant), work, arguments)))
        return
    rows = measure(arguments)
    show(rows, arguments)
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "job")}
        arguments.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
