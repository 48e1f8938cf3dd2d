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

from true_reward import Runs, add_arguments, curves, final, mean_std, measure, rl_config, step_std, updates_to_reach

from tppo.core.config import RL
from tppo.core.show import Table

SCORES = {"words_relevant": "true relevance: words", "responses_relevant": "true relevance: responses"}
PANELS = {"reward_mean": "reward paid", **SCORES}
RIVAL = "ppo"
# A policy that writes next to nothing has little that is irrelevant: how much it writes stands beside the shares.
FINAL_HEADS = (
    *("algorithm", "reward paid", "words", "over steps", "responses", "over steps"),
    *("relevant words", "KL", "tokens", "queries", "unparseable"),
)
REACH_HEADS = ("algorithm", "score", "target, %", "mean curve", "by seed", "final above the same seed's")


def final_table(runs: Runs) -> Table:
    rows = []
    for name, seeds in runs.items():
        cells = [name, mean_std(final(seeds, "reward_mean"))]
        for key in SCORES:
            cells += [mean_std(final(seeds, key), percent=True), f"± {100 * step_std(seeds, key):.1f}"]
        cells += [mean_std(final(seeds, key)) for key in ("relevant_words", "kl", "response_length", "queries")]
        rows.append([*cells, mean_std(final(seeds, "unparseable"), percent=True)])
    return Table(FINAL_HEADS, rows, title="final, mean ± std over the seeds; shares in %")


def reach_table(runs: Runs) -> Table:
    """Updates until the final score of RIVAL: on the mean curves, and seed by seed against the same seed's."""
    rows = []
    for key, title in SCORES.items():
        target_S = final(runs[RIVAL], key)
        for name, seeds in runs.items():
            values_SU = curves(seeds, key)
            on_mean = updates_to_reach(values_SU.mean(0), float(target_S.mean()))
            by_seed = [updates_to_reach(*pair) for pair in zip(values_SU, target_S, strict=True)]
            above = int((final(seeds, key) > target_S).sum())
            compared = "" if name == RIVAL else f"{above} of {len(seeds)}"
            cells = [_said(on_mean), ", ".join(map(_said, by_seed)), compared]
            rows.append([name, title, mean_std(target_S, percent=True), *cells])
    updates = len(runs[RIVAL][0])
    return Table(REACH_HEADS, rows, title=f"updates (of {updates}) to reach the final score of {RIVAL}")


def _said(updates: int | None) -> str:
    return "never" if updates is None else str(updates)


def variants(arguments: argparse.Namespace) -> dict[str, RL]:
    return {name: rl_config(arguments, algorithm=name) for name in arguments.algorithms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, seeds=5, updates=60)
    parser.add_argument("--algorithms", nargs="+", default=["tppo", "ppo_sum", "ppo"])
    _, runs = measure(parser, variants, PANELS)
    print(final_table(runs).markdown())
    if RIVAL in runs:
        print(reach_table(runs).markdown())


if __name__ == "__main__":
    main()
