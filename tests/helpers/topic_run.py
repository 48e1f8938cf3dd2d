"""A run folder whose labels depend on the history (a word is relevant when it is of the history's topic), and reward
models that know the rule: their weights are written by hand, since learning to compare takes a tiny encoder minutes.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers.encoders import make_tiny_encoder
from tests.helpers.labelled_run import finish_until_labels
from tppo.core.config import Recipe
from tppo.core.tables import Example
from tppo.core.text import Event, render_response
from tppo.judge.verdict import Verdict, WordVerdict, split_response, verdict_to_row
from tppo.reward.models import RewardModel, TokenRewardModel

TOPICS = {
    "food": ["pizza", "pasta", "cheese", "oven", "bread", "soup"],
    "cars": ["car", "tyre", "engine", "road", "truck", "brake"],
}


def make_topic_run(root: Path, rows: int = 8, held_out: int = 60) -> Recipe:
    generator = np.random.default_rng(0)
    examples, labels = [], []
    for i in range(rows + held_out):
        topic = str(generator.choice(list(TOPICS)))
        example = _example(i, "train" if i < rows else "reward_eval", TOPICS[topic], generator)
        share = 0.85 if generator.random() < 0.5 else 0.15
        words = [
            str(generator.choice(TOPICS[topic if generator.random() < share else _other(topic)]))
            for _ in range(generator.integers(4, 8))
        ]
        response = render_response([" ".join(words[:2]), " ".join(words[2:])])
        examples.append(asdict(example))
        for rubric in ("targets", "history"):
            labels.append(verdict_to_row(example, 0, rubric, "rule", response, judge(example, response)))
    recipe = Recipe(run_dir=str(root / "run"))
    recipe.prepare.source = ["log.tsv"]
    recipe.reward.rubric = "history"
    recipe.task.max_prompt_tokens, recipe.task.max_response_tokens = 400, 12
    finish_until_labels(recipe, examples, labels)
    return recipe


def judge(example: Example, response: str) -> Verdict:
    """Words of the topic are relevant; a response is when most of its words are."""
    topic = next(words for words in TOPICS.values() if example.history[0].text.split()[0] in words)
    words = [WordVerdict(float(w.text in topic), w.text in topic) for w in split_response(response).words]
    share = sum(word.relevant for word in words) / len(words)
    return Verdict(words, share, share > 0.5, "ok", None)


def _other(topic: str) -> str:
    return next(name for name in TOPICS if name != topic)


def _example(number: int, split: str, words: list[str], generator: np.random.Generator) -> Example:
    pairs = [" ".join(map(str, generator.choice(words, 2, replace=False))) for _ in range(6)]
    history: list[Any] = [Event("search", pairs[0]), Event("click", pairs[1]), Event("search", pairs[2])]
    return Example(f"e{number}", f"u{number // 2}", split, history, pairs[3:], datetime(2026, 3, 1))


def oracle(kind: type[RewardModel], folder: Path) -> RewardModel:
    """A reward model that compares each word's topic with the history's; made from an encoder written to `folder`.

    Each quantity x sits in a pair of dimensions as (x, -x), which LayerNorm scales and does not shift:
    0 topic of the token (+1 food, -1 cars, 0 else), 2 segment (+1 history, -1 response), 4 topic of the history, put
    there by attention to the history, 6 whether 0 and 4 agree (the feed-forward layer's exclusive or), 8 a constant.
    """
    model = kind.start(str(make_tiny_encoder(folder, num_hidden_layers=1, num_attention_heads=1)), 64)
    bert = model.model.bert
    attention, layer = bert.encoder.layer[0].attention, bert.encoder.layer[0]
    with torch.no_grad():
        for parameter in [p for p in model.model.parameters() if p.dim() == 2 or p is model.model.classifier.bias]:
            parameter.zero_()
        for sign, words in zip((1.0, -1.0), TOPICS.values(), strict=True):
            for word in words:
                ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
                bert.embeddings.word_embeddings.weight[ids, :2] = torch.tensor([sign, -sign])
        bert.embeddings.token_type_embeddings.weight[:, 2:4] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        bert.embeddings.position_embeddings.weight[:, 8:10] = torch.tensor([1.0, -1.0])
        attention.self.query.bias[0] = 8.0
        attention.self.key.weight[0, 2] = 1.0
        attention.self.value.weight[4:6, 0] = torch.tensor([5.0, -5.0])
        attention.output.dense.weight.copy_(torch.eye(32))
        for unit, (own, other) in enumerate([(4.0, 4.0), (-4.0, -4.0), (4.0, -4.0), (-4.0, 4.0)]):
            layer.intermediate.dense.weight[unit, [0, 4]] = torch.tensor([own, other])
            layer.intermediate.dense.bias[unit] = -10.0
            agree = 1.0 if unit < 2 else -1.0
            layer.output.dense.weight[6:8, unit] = torch.tensor([agree, -agree])
        if kind is TokenRewardModel:
            model.model.classifier.weight[1:, 6] = torch.tensor([-1.0, 1.0])
            model.model.classifier.bias[0] = 1.0
        else:
            model.model.classifier.weight[0, 6] = 2.0
    return model
