"""What the benchmarks with a known true reward share: a policy on the synthetic log, the truth about it, RL, curves.

The policy is a small Llama made from scratch and trained by the package's own stages (synthetic, prepare, sft,
sample). The reward is not learnt: which words a user could have searched is known from how the log is made
(`tppo.logs.synthetic`), and takes the place of the reward models in `tppo.rl.stage`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from tppo.core.config import RL, SFT, Parts, Recipe, Sampling, Synthetic, Task
from tppo.core.files import write_json
from tppo.core.models import SCRATCH, load_policy
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import RESPONSES, Example, load_examples, read_table
from tppo.generate import sample
from tppo.generate.engine import encode_examples
from tppo.logs import prepare, synthetic, truth
from tppo.reward.align import IRRELEVANT, RELEVANT, classes_from_words
from tppo.rl.reward_function import Sample as Response
from tppo.rl.rewards import RewardScale
from tppo.rl.stage import QueryReward, Relevance, median_suggested_length
from tppo.rl.trainer import TokenPPOTrainer
from tppo.tune import sft

Row = dict[str, float]
Runs = dict[str, list[list[Row]]]
"""Name of a variant -> its seeds -> rows of metrics, one per update."""
WINDOW = 5
"""Updates averaged for a final score, and before a score counts as reached: one rollout is a small sample."""


class Truth(truth.Truth):
    """The true relevance of words and responses, as a scorer for `QueryReward`.

    A response is relevant when at least `response_share` of its words are.
    """

    def __init__(self, config: Synthetic, seed: int, response_share: float = 1.0) -> None:
        super().__init__(config, seed)
        self.response_share = response_share

    def __call__(self, examples: list[Example], samples: list[Response]) -> Relevance:
        found = [self.words(example, sample.response) for example, sample in zip(examples, samples, strict=True)]
        classes = [
            classes_from_words(words, [RELEVANT if mark else IRRELEVANT for mark in marks], sample.spans)
            for (words, marks), sample in zip(found, samples, strict=True)
        ]
        return Relevance(
            [np.eye(3, dtype=np.float32)[np.array(row, dtype=np.int64)] for row in classes],
            [float(self.is_relevant(marks)) for _, marks in found],
            self._mean_shares([marks for _, marks in found]),
        )

    def mean_shares(self, examples: Sequence[Example], responses: Sequence[str]) -> dict[str, float]:
        """Share of the words, and share of the responses, that are relevant; relevant words per response."""
        return self._mean_shares([self.words(*pair)[1] for pair in zip(examples, responses, strict=True)])

    def _mean_shares(self, marks: Sequence[Sequence[bool]]) -> dict[str, float]:
        return {
            "words_relevant": sum(map(sum, marks)) / max(1, sum(map(len, marks))),
            "responses_relevant": sum(map(self.is_relevant, marks)) / len(marks),
            "relevant_words": sum(map(sum, marks)) / len(marks),
        }

    def is_relevant(self, marks: Sequence[bool]) -> bool:
        """Whether a response with these words is relevant."""
        return bool(marks) and sum(marks) >= self.response_share * len(marks)


@dataclass(frozen=True)
class Base:
    """The SFT policy all runs start from, and what they are trained on."""

    recipe: Recipe
    sft_model: Path
    examples: list[Example]
    truth: Truth
    scale: RewardScale
    sft: dict[str, Any]
    """What is known of the SFT policy's samples."""


def add_arguments(parser: argparse.ArgumentParser, seeds: int, updates: int) -> None:
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds of RL, 0 to n-1")
    parser.add_argument("--updates", type=int, default=updates)
    parser.add_argument("--batch_size", type=int, default=32, help="prompts of a rollout")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--kl_coef", type=float, default=0.05)
    parser.add_argument("--users", type=int, default=1000, help="users of the synthetic log")
    parser.add_argument("--sft_epochs", type=float, default=6.0)
    parser.add_argument(
        "--response_share",
        type=float,
        default=1.0,
        help="share of relevant words that makes a response relevant; choose it on what the SFT policy reaches, not RL",
    )
    parser.add_argument("--base", type=Path, help="keep the SFT policy here, and use the one that is here")
    parser.add_argument("--output", type=Path, help="write every seed and update as JSON, and curves as .png beside it")


def measure(
    parser: argparse.ArgumentParser, variants_of: Callable[[argparse.Namespace], dict[str, RL]], panels: dict[str, str]
) -> tuple[Base, Runs]:
    """The base, and every variant that the arguments ask for; with --output, JSON and curves as well."""
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as temporary:
        base = make_base(arguments, arguments.base or Path(temporary))
        print(f"SFT: {base.sft}; {base.scale}", flush=True)
        if base.scale.suggested_length >= (limit := base.recipe.task.max_response_tokens):
            print(f"the suggested length is not below the limit of {limit} tokens, so no length penalty is felt")
        runs = run_variants(arguments, base, variants_of(arguments))
    if arguments.output:
        plot(runs, panels, arguments.output.with_suffix(".png"))
    return base, runs


def make_base(arguments: argparse.Namespace, root: Path) -> Base:
    """Log, SFT policy and its samples, made in `root` or found there."""
    recipe = Recipe(
        run_dir=str(root / "run"),
        task=Task(num_queries=3, history_events=6, max_prompt_tokens=160, max_response_tokens=40),
        parts=Parts(disjoint=False),  # a known truth pays, so no label is learnt from what SFT has seen
        synthetic=Synthetic(users=arguments.users),
        sft=SFT(
            model=SCRATCH,
            max_examples=0,
            max_eval_examples=100,
            learning_rate=2e-3,
            epochs=arguments.sft_epochs,
            batch_size=32,
            micro_batch_size=32,
            precision="fp32",
            save_steps=500,
        ),
        sample=Sampling(train_examples=400, reward_eval_examples=32, seen_examples=0),
    )
    run = RunFolder(recipe)
    run_stage(recipe, "synthetic", synthetic.run)
    run_stage(recipe, "prepare", prepare.run)
    examples = load_examples(run.require("prepare"), "train")
    run_stage(recipe, "sft", sft.run)
    run_stage(recipe, "sample", sample.run)
    known = Truth(recipe.synthetic, recipe.seed, arguments.response_share)
    shares = _sample_shares(run, known, examples)
    if not shares["responses_relevant"]:
        print("the SFT policy writes no relevant response, so ppo has nothing to learn from: lower --response_share")
    model = run.require("sft") / "model"
    length = median_suggested_length(run.require("sample"), load_policy(model)[1], recipe.task)
    scale = RewardScale(length, shares["words_relevant"], shares["responses_relevant"])
    return Base(recipe, model, examples, known, scale, shares | {"sft_eval_loss": run.facts("sft")["eval_loss"]})


def _sample_shares(run: RunFolder, known: Truth, examples: Sequence[Example]) -> dict[str, float]:
    by_id = {example.example_id: example for example in examples}
    table = read_table(run.require("sample") / "responses.parquet", RESPONSES).to_pylist()
    rows = [row for row in table if row["example_id"] in by_id]
    shares = known.mean_shares([by_id[row["example_id"]] for row in rows], [row["response"] for row in rows])
    return shares | {"unparseable": sum(row["problem"] is not None for row in rows) / len(rows)}


def rl_config(arguments: argparse.Namespace, **settings: Any) -> RL:
    """The settings every variant of a benchmark has, and its own."""
    size = arguments.batch_size
    sizes = {"batch_size": size, "minibatch_size": size, "micro_batch_size": size}
    rates = {"learning_rate": arguments.learning_rate, "kl_coef": arguments.kl_coef}
    return RL(**{"updates": arguments.updates, "precision": "fp32", **sizes, **rates, **settings})


def train(base: Base, config: RL, seed: int) -> list[Row]:
    """One RL run from the SFT policy; metrics of every update, true shares among them."""
    task = base.recipe.task
    model, tokenizer = load_policy(base.sft_model)
    prompts, _ = encode_examples(tokenizer, base.examples, task)
    reward = QueryReward(base.truth, base.examples, config, task, base.scale)
    limit = task.max_response_tokens
    trainer = TokenPPOTrainer(model, reward, prompts, config, tokenizer=tokenizer, max_response_tokens=limit, seed=seed)
    return [trainer.step().metrics for _ in range(config.updates)]


def run_variants(arguments: argparse.Namespace, base: Base, variants: dict[str, RL]) -> Runs:
    """Every variant with every seed; with --output, what is done so far is in the file after each run."""
    runs: Runs = {name: [] for name in variants}
    for seed in range(arguments.seeds):
        for name, config in variants.items():
            start = time.monotonic()
            runs[name].append(train(base, config, seed))
            print(f"{name}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
            if arguments.output:
                made = {"task": asdict(base.recipe.task), "sft": base.sft, "scale": base.scale._asdict()}
                made |= {"response_share": arguments.response_share}
                made |= {"configs": {name: asdict(config) for name, config in variants.items()}, "runs": runs}
                write_json(arguments.output, made)
    return runs


def curves(seeds: Sequence[Sequence[Row]], key: str) -> np.ndarray:
    """(S, U): a column of S seeds over U updates."""
    return np.array([[row[key] for row in rows] for rows in seeds])


def final(seeds: Sequence[Sequence[Row]], key: str) -> np.ndarray:
    """(S,): mean of the last WINDOW updates of each seed."""
    return curves(seeds, key)[:, -WINDOW:].mean(1)


def step_std(seeds: Sequence[Sequence[Row]], key: str) -> float:
    """Standard deviation over the updates of the second half of training, mean over the seeds."""
    values_SU = curves(seeds, key)
    return float(values_SU[:, values_SU.shape[1] // 2 :].std(1).mean())


def updates_to_reach(curve_U: np.ndarray, score: float) -> int | None:
    """The first update at which the mean of the last WINDOW updates is at least `score`; None: never."""
    means = np.convolve(curve_U, np.full(WINDOW, 1 / WINDOW), mode="valid")
    reached = np.flatnonzero(means >= score - 1e-9)
    return int(reached[0]) + WINDOW if len(reached) else None


def mean_std(values: np.ndarray, percent: bool = False) -> str:
    times, digits = (100, 1) if percent else (1, 2)
    return f"{times * values.mean():.{digits}f} ± {times * values.std():.{digits}f}"


def plot(runs: Runs, panels: dict[str, str], path: Path) -> None:
    """A PNG: mean over the seeds as a line, one standard deviation to either side as a band."""
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, (key, title) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for name, seeds in runs.items():
            values_SU = curves(seeds, key)
            mean_U, std_U = values_SU.mean(0), values_SU.std(0)
            updates = np.arange(1, len(mean_U) + 1)
            axes.plot(updates, mean_U, label=name)
            axes.fill_between(updates, mean_U - std_U, mean_U + std_U, alpha=0.2, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)
