"""Does a reward on every token teach faster? TPPO and PPO on the synthetic log, whose true reward is known.

    python benchmarks/learning.py --seeds 5 --updates 60 --output learning.json

Three algorithms start from one SFT policy and see the same prompts in the same order: `tppo` is paid the true
relevance of each word where it stands, `ppo_sum` the sum of the same rewards at the last token, `ppo` the true
relevance of the response (0 or 1, on the scale of `rl.returns=matched`) at the last token. A seed decides prompts and
sampling. See true_reward.py for the truth. Printed: final scores (mean of the last 5 updates), their standard
deviation over the seeds, that over the updates of the second half, and the updates until a mean of 5 updates
reaches the final score of `ppo`.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import torch
from rich.console import Console
from rich.table import Table
from true_reward import (
    Runs,
    add_arguments,
    curves,
    final,
    make_base,
    mean_std,
    plot,
    rl_config,
    run_variants,
    step_std,
    updates_to_reach,
)

SCORES = {"words_relevant": "true relevance: words", "responses_relevant": "true relevance: responses"}
PANELS = {"reward_mean": "reward paid", **SCORES}
RIVAL = "ppo"


def final_table(runs: Runs) -> Table:
    table = Table(title="final, mean ± std over the seeds; shares in %", title_justify="left")
    # A policy that writes next to nothing has little that is irrelevant: how much it writes stands beside the shares.
    heads = (
        "reward paid",
        "words",
        "over steps",
        "responses",
        "over steps",
        "relevant words",
        "KL",
        "tokens",
        "queries",
    )
    table.add_column("algorithm")
    for head in (*heads, "unparseable"):
        table.add_column(head, justify="right")
    for name, seeds in runs.items():
        cells = [mean_std(final(seeds, "reward_mean"))]
        for key in SCORES:
            cells += [mean_std(final(seeds, key), percent=True), f"± {100 * step_std(seeds, key):.1f}"]
        cells += [mean_std(final(seeds, key)) for key in ("relevant_words", "kl", "response_length", "queries")]
        table.add_row(name, *cells, mean_std(final(seeds, "unparseable"), percent=True))
    return table


def reach_table(runs: Runs) -> Table:
    """Updates until the final score of RIVAL: on the mean curves, and seed by seed against the same seed's."""
    updates = len(runs[RIVAL][0])
    table = Table(title=f"updates (of {updates}) to reach the final score of {RIVAL}", title_justify="left")
    for head in ("algorithm", "score", "target, %", "mean curve", "by seed", "final above the same seed's"):
        table.add_column(head)
    for key, title in SCORES.items():
        target_S = final(runs[RIVAL], key)
        for name, seeds in runs.items():
            values_SU = curves(seeds, key)
            by_seed = [updates_to_reach(*pair) for pair in zip(values_SU, target_S, strict=True)]
            above = int((final(seeds, key) > target_S).sum())
            table.add_row(
                name,
                title,
                mean_std(target_S, percent=True),
                _said(updates_to_reach(values_SU.mean(0), float(target_S.mean()))),
                ", ".join(map(_said, by_seed)),
                "" if name == RIVAL else f"{above} of {len(seeds)}",
            )
    return table


def _said(updates: int | None) -> str:
    return "never" if updates is None else str(updates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, seeds=5, updates=60)
    parser.add_argument("--algorithms", nargs="+", default=["tppo", "ppo_sum", "ppo"])
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with ExitStack() as stack:
        base = make_base(arguments, stack)
        print(f"SFT: {base.sft}; {base.scale}", flush=True)
        variants = {name: rl_config(arguments, algorithm=name) for name in arguments.algorithms}
        runs = run_variants(arguments, base, variants)
    console = Console(width=180)
    console.print(final_table(runs))
    if RIVAL in runs:
        console.print(reach_table(runs))
    if arguments.output:
        plot(runs, PANELS, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
