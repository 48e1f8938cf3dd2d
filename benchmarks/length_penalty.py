"""The length-weighted penalty (Eq. 4-5) against response length, as in the paper's Figure 12, with a known true reward.

    python benchmarks/length_penalty.py --seeds 3 --updates 60 --output length_penalty.json

TPPO with several alpha (0 is off) from one SFT policy, paid with the true relevance of each word (see
true_reward.py); the suggested length is the package's own: median tokens of a query of the SFT policy x queries.
With --reward_values paper every word pays, relevant or not, so that length itself is what pays most.
"""

from __future__ import annotations

import argparse

import numpy as np
from true_reward import Base, Runs, add_arguments, curves, final, mean_std, measure, rl_config

from tppo.core.config import RL
from tppo.core.show import Table

PANELS = {"response_length": "response length, tokens", "queries": "queries", "words_relevant": "true relevance: words"}
HEADS = (
    *("alpha", "first length", "final length", "longest mean", "queries"),
    *("words relevant, %", "unparseable, %", "KL"),
)


def table(runs: Runs, base: Base) -> Table:
    rows = []
    for name, seeds in runs.items():
        lengths_SU = curves(seeds, "response_length")
        rows.append(
            [
                name,
                mean_std(lengths_SU[:, 0]),
                mean_std(final(seeds, "response_length")),
                f"{np.max(lengths_SU.mean(0)):.2f}",
                mean_std(final(seeds, "queries")),
                mean_std(final(seeds, "words_relevant"), percent=True),
                mean_std(final(seeds, "unparseable"), percent=True),
                mean_std(final(seeds, "kl")),
            ]
        )
    suggested, limit = base.scale.suggested_length, base.recipe.task.max_response_tokens
    title = f"mean ± std over the seeds; suggested length {suggested:g} tokens, limit {limit}"
    return Table(HEADS, rows, title=title)


def variants(arguments: argparse.Namespace) -> dict[str, RL]:
    fixed = {"algorithm": "tppo", "reward_values": arguments.reward_values}
    return {f"alpha {alpha:g}": rl_config(arguments, length_penalty_alpha=alpha, **fixed) for alpha in arguments.alphas}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, seeds=3, updates=60)
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--reward_values", choices=["base_rate", "centered", "paper"], default="base_rate")
    base, runs = measure(parser, variants, PANELS)
    print(table(runs, base).markdown())


if __name__ == "__main__":
    main()
