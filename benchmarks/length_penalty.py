"""The length-weighted penalty (Eq. 4-5) against response length, as in the paper's Figure 12, with a known true reward.

    python benchmarks/length_penalty.py --seeds 3 --updates 60 --output length_penalty.json

TPPO with several alpha (0 is off) from one SFT policy, paid with the true relevance of each word (see
true_reward.py); the suggested length is the package's own: median tokens of a query of the SFT policy x queries.
With --reward_values paper every word pays, relevant or not, so that length itself is what pays most.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from true_reward import (
    Base,
    Runs,
    add_arguments,
    curves,
    final,
    make_base,
    mean_std,
    plot,
    rl_config,
    run_variants,
)

PANELS = {"response_length": "response length, tokens", "queries": "queries", "words_relevant": "true relevance: words"}


def table(runs: Runs, base: Base) -> Table:
    suggested = base.scale.suggested_length
    limit = base.recipe.task.max_response_tokens
    found = Table(
        title=f"mean ± std over the seeds; suggested length {suggested:g} tokens, limit {limit}", title_justify="left"
    )
    found.add_column("alpha")
    heads = ("first length", "final length", "longest mean", "queries", "words relevant, %", "unparseable, %", "KL")
    for head in heads:
        found.add_column(head, justify="right")
    for name, seeds in runs.items():
        lengths_SU = curves(seeds, "response_length")
        found.add_row(
            name,
            mean_std(lengths_SU[:, 0]),
            mean_std(final(seeds, "response_length")),
            f"{np.max(lengths_SU.mean(0)):.2f}",
            mean_std(final(seeds, "queries")),
            mean_std(final(seeds, "words_relevant"), percent=True),
            mean_std(final(seeds, "unparseable"), percent=True),
            mean_std(final(seeds, "kl")),
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, seeds=3, updates=60)
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--reward_values", choices=["base_rate", "centered", "paper"], default="base_rate")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with ExitStack() as stack:
        base = make_base(arguments, stack)
        print(f"SFT: {base.sft}; {base.scale}", flush=True)
        limit = base.recipe.task.max_response_tokens
        if base.scale.suggested_length >= limit:
            print(
                f"the suggested length is not below the limit of {limit} tokens, so no alpha is felt: train SFT longer"
            )
        variants = {
            f"alpha {alpha:g}": rl_config(
                arguments, algorithm="tppo", length_penalty_alpha=alpha, reward_values=arguments.reward_values
            )
            for alpha in arguments.alphas
        }
        runs = run_variants(arguments, base, variants)
        Console(width=160).print(table(runs, base))
    if arguments.output:
        plot(runs, PANELS, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
