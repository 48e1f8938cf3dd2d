"""A run folder whose sample stage holds N distinct made-up responses of 3 queries x 2 words, without any model.

    python -m tests.helpers.many_items --run_dir /tmp/many --items 10000

Writes run_dir/recipe.yaml for `tppo label --config`. prepare, sft and sample are finished stages, with manifests
written by the run folder itself; the sft stage is empty. `first` numbers the items: runs with disjoint numbers
hold disjoint items, whose requests then differ too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tppo.core.config import Recipe
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import EXAMPLES, RESPONSES, Example, write_table
from tppo.core.text import Event, render_response

# 64 x 64 two-word queries: an item's number, written in base 4,096, is one query and so makes the item distinct.
_ADJECTIVES = (
    "amber ancient arctic basic blue brisk broad calm cheap clean clever coastal compact copper cotton crisp "
    "daily dark deep digital double dusty early electric fancy fast fine flat folding fresh gentle giant glass "
    "golden green heavy hidden hollow honest indoor iron jolly large late light linen little local long loud "
    "lucky magnetic maple marble mild modern narrow native new noisy nordic oak old olive"
)
_NOUNS = (
    "anchor apron atlas badge banjo barrel basket bench bicycle blanket boat bottle bridge bucket button cabin "
    "camera candle canoe carpet castle chair clock coat compass cradle curtain desk drum engine fence ferry "
    "flute forest garden gate glove hammer harbour harp helmet kettle kite ladder lamp lantern lens locket "
    "mirror needle oven paddle pencil piano pillow pocket rocket saddle sofa tent ticket train violin wagon"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
_PAIRS = len(ADJECTIVES) * len(NOUNS)


def item(number: int) -> tuple[Example, str]:
    """Item `number` (0-based): an example of a user of its own, and the response to be judged."""
    texts = [_query(number * 9 + k) for k in range(8)]
    history = [Event("search", texts[0]), Event("click", f"{texts[0]} {texts[1]}"), Event("search", texts[2])]
    # The last query alone tells the first 4,096 items apart, the one before it the rest.
    response = render_response([texts[6], _query(number // _PAIRS), _query(number)])
    split = "reward_eval" if number % 6 == 5 else "train"
    time = datetime(2026, 1, 1 + number % 28)
    return Example(f"many-{number}", f"many-u{number}", split, history, texts[3:6], time), response


def _query(number: int) -> str:
    pair = number % _PAIRS
    return f"{ADJECTIVES[pair // len(NOUNS)]} {NOUNS[pair % len(NOUNS)]}"


def make_run(root: Path, count: int, first: int = 0) -> Recipe:
    """Recipe of a run folder with items `first` to `first + count - 1`, ready for the label stage."""
    recipe = Recipe(run_dir=str(root))
    recipe.parts.disjoint = False  # a few items are too few users for parts
    recipe.prepare.source = ["made-up.tsv"]
    items = [item(number) for number in range(first, first + count)]

    def prepare(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
        write_table(folder / "examples.parquet", [asdict(example) for example, _ in items], EXAMPLES)
        return {"made_up": len(items)}

    def sample(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
        write_table(folder / "responses.parquet", list(_response_rows(items)), RESPONSES)
        return {"responses": len(items)}

    run_stage(recipe, "prepare", prepare)
    run_stage(recipe, "sft", lambda recipe, run, folder: {"made_up": True})
    run_stage(recipe, "sample", sample)
    (root / "recipe.yaml").write_text(yaml.safe_dump(asdict(recipe), sort_keys=False), encoding="utf-8")
    return recipe


def _response_rows(items: list[tuple[Example, str]]) -> Iterator[dict[str, Any]]:
    for example, response in items:
        yield {
            "example_id": example.example_id,
            "split": example.split,
            "sample": 0,
            "response_ids": [1, 0],
            "response": response,
            "finished": True,
            "problem": None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first item")
    arguments = parser.parse_args()
    make_run(arguments.run_dir, arguments.items, arguments.first)
    print(arguments.run_dir / "recipe.yaml")


if __name__ == "__main__":
    main()
