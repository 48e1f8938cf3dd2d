"""What the rules of the headline (`tppo.core.asked`) cost the true next queries when every word of theirs is relevant.

    tppo prepare recipes/demo.yaml && python benchmarks/asked_ceiling.py runs/demo/prepare

Prints the mean over the examples of the value by the headline's rule, and by the stricter one that counts a word once
in the whole answer. Seconds; no model, no judge, no randomness.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tppo.core.asked import asked_share
from tppo.core.tables import Example, load_examples
from tppo.core.text import parse_response, render_response


def ceilings(example: Example) -> tuple[float, float]:
    """By the headline's rule, and with each word counted once in the answer."""
    count = len(example.targets)
    parsed = parse_response(render_response(example.targets), finished=True, num_queries=count)
    words = [word.text.lower() for word in parsed.words]
    first = [word not in words[:place] for place, word in enumerate(words)]
    own, strict = ([True] * len(words), first)
    return tuple(asked_share(parsed, relevant, example.history, count) for relevant in (own, strict))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepare", type=Path, nargs="+", help="folders of finished prepare stages")
    for folder in parser.parse_args().prepare:
        found = np.array([ceilings(example) for example in load_examples(folder)])
        own, strict = found.mean(axis=0)
        print(f"{folder}: {len(found)} examples; headline's rule {own:.4f}, a word once in an answer {strict:.4f}")


if __name__ == "__main__":
    main()
