"""The RL stage: SFT model + reward models + training prompts -> a tuned policy, with curves and samples.

Its reward scores words and responses for relevance; one of the two pays (`tppo.rl.rewards`). Scoring both costs little
and puts the curves of every algorithm on the same two scales. The scores come from the two reward models
(`score_with_models`), or from any other callable of their kind, such as a known truth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import unpad_sequence

from tppo.core.common import UserError
from tppo.core.config import RL, Algorithm, Recipe, Task
from tppo.core.files import read_jsonl
from tppo.core.models import load_policy, save_model
from tppo.core.parts import require_unseen, train_examples
from tppo.core.run import RunFolder
from tppo.core.stages import split_stage
from tppo.core.tables import RESPONSES, Example, read_table
from tppo.core.text import ParsedResponse, parse_response, repeated_queries
from tppo.generate.engine import encode_examples
from tppo.logs.truth import Truth, known_truth
from tppo.reward.align import query_lengths, response_spans
from tppo.reward.gate import require_passed
from tppo.reward.metrics import response_relevance
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.rl.checkpoint import remove_checkpoints
from tppo.rl.guards import check_config
from tppo.rl.loop import train
from tppo.rl.reward_function import Sample, Scores
from tppo.rl.rewards import FormatReward, RewardScale, masked_mean, token_level_rewards
from tppo.rl.trainer import TokenPPOTrainer


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Train `folder.name` = rl_<algorithm>; resumes from the newest checkpoint in `folder`."""
    config = replace(recipe.rl, algorithm=cast(Algorithm, split_stage(folder.name)[1]))
    reward_check = require_passed(recipe, run, config)
    examples = train_examples(run.require("prepare"), "rl", recipe.parts, recipe.data_seed)
    if not examples:
        raise UserError(f"{run.path('prepare')}/examples.parquet has no training example to roll out from")
    require_unseen(examples, run.require("sft"), recipe.parts, "prompts of RL")
    policy, tokenizer = load_policy(run.require("sft") / "model", task=recipe.task)
    prompts, dropped_events = encode_examples(tokenizer, examples, recipe.task)
    reward_fn = query_reward(run, config, recipe.task, examples, tokenizer)
    trainer = TokenPPOTrainer(
        policy,
        reward_fn,
        prompts,
        config,
        tokenizer=tokenizer,
        max_response_tokens=recipe.task.max_response_tokens,
        seed=recipe.seed,
    )
    halted = train(trainer, folder, [example.example_id for example in examples])
    model, saved_update = trainer.policy_to_save(halted is not None)
    card = (
        f"# Query suggestions: {config.algorithm}\n\nTuned from the run's SFT model by {saved_update} updates of "
        f"{config.batch_size} prompts with tppo's `rl` stage. Writes a user's next searches, one per line, after "
        "the prompt of `tppo.core.text.encode_prompt`.\n"
    )
    save_model(model, tokenizer, folder / "model", card)
    remove_checkpoints(folder)
    rows = read_jsonl(folder / "metrics.jsonl")
    return {
        "algorithm": config.algorithm,
        "reward_check": reward_check,
        "reward_scale": reward_fn.scale._asdict(),
        "prompts": len(examples),
        "prompts_with_dropped_events": dropped_events,
        "updates": len(rows),
        "halted": halted,
        "saved_update": saved_update,
        "first": rows[0],
        "last": rows[-1],
        "seconds_per_update": sum(row["seconds"] for row in rows) / len(rows),
    }


def check(recipe: Recipe) -> None:
    """Every check of the stage's settings that needs no data."""
    check_config(recipe.rl, recipe.task.max_response_tokens)


def query_reward(run: RunFolder, config: RL, task: Task, examples: Sequence[Example], tokenizer: Any) -> QueryReward:
    """The reward of responses to `examples` by the run's reward models; `prompt_index` counts these examples."""
    sl = config.suggested_length or median_suggested_length(run.require("sample"), tokenizer, task)
    reward_folder, labelled = run.require("reward"), run.facts("reward")["train"]
    word_share = labelled["words_relevant"] / labelled["words"]
    scale = RewardScale(sl, word_share, labelled["responses_relevant"] / labelled["responses"])
    scorer = score_with_models(
        TokenRewardModel.load(reward_folder / "token"), SentenceRewardModel.load(reward_folder / "sentence")
    )
    return QueryReward(scorer, examples, config, task, scale, known_truth(run))


class Relevance(NamedTuple):
    """How relevant responses and their tokens are."""

    class_probs: Sequence[np.ndarray]
    """(T_i, 3) for each response: class probabilities of its tokens, rows sum to 1."""
    sentence_scores: Sequence[float]
    """One number in [0, 1] per response."""
    metrics: Mapping[str, float] = MappingProxyType({})
    """What else is to stand in metrics.jsonl."""


RelevanceScorer = Callable[[list[Example], list[Sample]], Relevance]
"""Scores responses to examples; entry i of both lists belongs together."""


def score_with_models(token_model: TokenRewardModel, sentence_model: SentenceRewardModel) -> RelevanceScorer:
    """The two reward models as one scorer."""

    def score(examples: list[Example], samples: list[Sample]) -> Relevance:
        histories = [example.history for example in examples]
        responses = [sample.response for sample in samples]
        start, truncated = time.perf_counter(), token_model.truncated
        class_probs = token_model.score(histories, responses, [sample.spans for sample in samples])
        metrics = {
            "seconds_token_reward": time.perf_counter() - start,
            "histories_truncated": (token_model.truncated - truncated) / len(samples),
        }
        return Relevance(class_probs, sentence_model.score(histories, responses), metrics)

    return score


@dataclass
class QueryReward:
    """Reward function of the RL stage (see `tppo.rl.reward_function`)."""

    scorer: RelevanceScorer
    examples: Sequence[Example]
    """What `prompt_index` counts."""
    config: RL
    task: Task
    scale: RewardScale
    truth: Truth | None = None
    """Of a synthetic log: it pays nothing, what it says of a rollout stands in the metrics."""

    def __call__(self, samples: list[Sample]) -> Scores:
        examples = [self.examples[sample.prompt_index] for sample in samples]
        relevance = self.scorer(examples, samples)
        length_B = torch.tensor([len(sample.response_ids) for sample in samples])
        mask_BT = torch.arange(int(length_B.max())) < length_B[:, None]
        parsed = [parse_response(sample.response, sample.finished, self.task.num_queries) for sample in samples]
        if self.config.repeats_irrelevant:
            relevance = without_repeats(relevance, examples, samples, parsed)
        class_probs_BT3 = pad_class_probs(relevance.class_probs, mask_BT)
        sentence_score_B = paid_score_B = torch.tensor(relevance.sentence_scores, dtype=torch.float32)
        if self.config.sentence_reward == "token_mean":
            paid_score_B = torch.tensor([response_relevance(probs_T3) for probs_T3 in relevance.class_probs])
        form = format_reward(parsed, self.config, self.task)
        rewards_BT = token_level_rewards(self.config, class_probs_BT3, paid_score_B, form, mask_BT, self.scale)
        classes_BT = class_probs_BT3.argmax(-1)
        # Class 0 tokens carry no judgement; a response of class 0 tokens only has none to average.
        judged_BT = (classes_BT > 0) & mask_BT
        relevance_BT = class_probs_BT3[..., 2] / class_probs_BT3[..., 1:].sum(-1).clamp(min=1e-6)
        metrics = {
            "token_relevance": masked_mean(relevance_BT, judged_BT).item() if judged_BT.any() else float("nan"),
            "sentence_reward_mean": sentence_score_B.mean().item(),
            "queries": float(np.mean([len(response.queries) for response in parsed])),
            "unparseable": float(np.mean([response.problem is not None for response in parsed])),
            **relevance.metrics,
        }
        if self.truth:
            # Shares truly relevant: of the queries asked for, and of the words. What cannot be read counts as none.
            shares = [
                self.truth.shares(example, sample.response, self.task.num_queries)
                for example, sample, response in zip(examples, samples, parsed, strict=True)
                if response.problem is None
            ]
            metrics["known_queries"] = sum(queries for queries, _ in shares) / len(samples)
            metrics["known_words"] = sum(words for _, words in shares) / len(samples)
        rewards, classes = (unpad_sequence(rows, length_B, batch_first=True) for rows in (rewards_BT, classes_BT))
        return Scores([row.tolist() for row in rewards], metrics, [row.tolist() for row in classes])


def without_repeats(
    relevance: Relevance, examples: Sequence[Example], samples: Sequence[Sample], parsed: Sequence[ParsedResponse]
) -> Relevance:
    """Every query that is not new as irrelevant (`rl.repeats_irrelevant`), by the judge's own rule and not by the
    reward model's guess: it sees too few repeats to learn what they are worth."""
    class_probs, sentence_scores = [], []
    rows = zip(relevance.class_probs, relevance.sentence_scores, examples, samples, parsed, strict=True)
    for probs_T3, score, example, sample, response in rows:
        old = repeated_queries(example.history, response.queries)
        places = [(word.start, word.end) for word in response.words if word.query in old]
        hit_T = np.array([any(a < end and start < b for start, end in places) for a, b in sample.spans], dtype=bool)
        # What a token shows of separators stays class 0.
        irrelevant_T3 = np.stack([probs_T3[:, 0], 1 - probs_T3[:, 0], np.zeros(len(probs_T3))], axis=1)
        class_probs.append(np.where(hit_T[:, None], irrelevant_T3, probs_T3).astype(np.float32))
        sentence_scores.append(score * (1 - len(old) / max(1, len(response.queries))))
    return relevance._replace(class_probs=class_probs, sentence_scores=sentence_scores)


def pad_class_probs(class_probs: Sequence[np.ndarray], response_mask_BT: Tensor) -> Tensor:
    """Per-response (T_i, 3) arrays -> (B, T, 3); padding is class 0 with certainty."""
    lengths = [len(probs) for probs in class_probs]
    assert lengths == response_mask_BT.sum(-1).tolist(), "one class distribution per response token"
    padded_BT3 = torch.zeros(*response_mask_BT.shape, 3)
    padded_BT3[..., 0] = 1.0
    padded_BT3[response_mask_BT] = torch.from_numpy(np.concatenate(class_probs))
    return padded_BT3


def format_reward(parsed: Sequence[ParsedResponse], config: RL, task: Task) -> FormatReward:
    """Weight and reward for keeping to the task: a readable response with as many queries as asked."""
    readable_B = torch.tensor([response.problem is None for response in parsed])
    missing_B = torch.tensor([max(0, task.num_queries - len(response.queries)) for response in parsed])
    return FormatReward(
        weight=readable_B * (1 - missing_B / task.num_queries) if config.format_weight else torch.ones(len(parsed)),
        reward=~readable_B * config.bad_format_reward + missing_B * config.missing_query_reward,
    )


def median_suggested_length(sample_folder: Path, tokenizer: Any, task: Task) -> float:
    """sl of Eq. 4: median length of a sampled query (`align.query_lengths`) in policy tokens x number of queries."""
    lengths: list[int] = []
    for row in read_table(sample_folder / "responses.parquet", RESPONSES).to_pylist():
        spans = response_spans(tokenizer, row["response_ids"], row["finished"])
        lengths += query_lengths(parse_response(row["response"], row["finished"], task.num_queries), spans)
    if not lengths:
        raise UserError(f"{sample_folder}/responses.parquet holds no query: set rl.suggested_length yourself")
    return float(np.median(lengths)) * task.num_queries
