"""What a reward-model folder says of itself: reward.json's facts, and the model card made of them.

The card is a pure function of reward.json, so the two cannot disagree. Counts and rates only, never rows of a log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tppo.judge.record import split_response
from tppo.reward.align import query_lengths
from tppo.reward.data import Item, LabelledResponse
from tppo.run import RunFolder

REWARD_JSON = "reward.json"
FIELDS = {
    "kind": "`token` (a class per token) or `sentence` (one number per response)",
    "classes": "what the outputs stand for, in order",
    "values": "relevance of each class in [0, 1], as the losses have it; null: no word, left out of every mean. What "
    "RL pays for a class is its own setting, `rl.reward_values`",
    "max_length": "longest input in tokens; the oldest history is cut off, the response never",
    "encoder": "what training started from",
    "rubric": "what the labels judge relevance against: the true next queries (`targets`) or the history",
    "judge": "who labelled",
    "template": "prompt template of an LLM judge (word and response scores, or the response's only); null: a judge "
    "without a prompt",
    "repeats_irrelevant": "the judge calls queries that repeat the history or the response irrelevant; null: up to "
    "the LLM judge",
    "sl": "suggested length of Eq. 4 in tokens of *this* tokenizer: median length of a labelled query, separator "
    "included, times the number of queries. RL pays policy tokens and measures its own (`rl.suggested_length`)",
    "train": "training rows",
    "constructed": "constructed responses among the training rows (`label.constructed`), not counted in `train`",
    "reward_eval": "held-out rows",
    "metrics": "of the kept checkpoint, on the held-out rows",
}
VALUES: dict[str, dict[str, float | None]] = {
    "token": {"separator": None, "irrelevant": 0.0, "relevant": 1.0},
    "sentence": {"relevant": 1.0},
}
_METRICS = {
    "token_auc": "token AUC, relevant against irrelevant",
    "weighted_auc": "weighted AUC, three classes",
    "token_f1": "F1 of relevant words' tokens",
    "token_ece": "calibration error of words' tokens",
    "sentence_auc": "AUC of whole responses",
    "sentence_f1": "F1 of relevant responses",
    "sentence_ece": "calibration error of whole responses",
}
_COUNTS = (
    ("responses", "responses"),
    ("responses_relevant", "of them relevant"),
    ("words", "words"),
    ("words_relevant", "of them relevant"),
)


def label_facts(run: RunFolder) -> dict[str, Any]:
    """Who labelled, and how: {judge, template, repeats_irrelevant} of the run's label stage."""
    config = (run.manifest("label") or {})["config"]
    by_llm = config["label"]["judge"] == "llm"
    return {
        "judge": run.facts("label")["judge"],
        "template": config["judge"]["template"] if by_llm else None,
        "repeats_irrelevant": None if by_llm else config["label"]["repeats_irrelevant"],
    }


def suggested_length(rows: Sequence[LabelledResponse], items: Sequence[Item], num_queries: int) -> float | None:
    """sl of Eq. 4 in reward-model tokens; None when no row holds a query."""
    lengths: list[int] = []
    for row, item in zip(rows, items, strict=True):
        lengths += query_lengths(split_response(row.response), item.pair.spans)
    return float(np.median(lengths)) * num_queries if lengths else None


def model_card(info: dict[str, Any]) -> str:
    """README.md of a reward-model folder, in the hub's form; `info` is the content of reward.json."""
    token = info["kind"] == "token"
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: token-classification", "tags: [reward-model, tppo]"),
        *("---", ""),
        f"# Reward model for query suggestions: {'one class per token' if token else 'one number per response'}",
        "",
        _what_it_is(token),
        "",
        "## Load it",
        *("", "With transformers alone:", "", "```python", *_snippet(token), "```", ""),
        "With tppo, which does the rest (longest input, a Longformer's global attention, another tokenizer's tokens):",
        *("", "```python", *_tppo_snippet(token), "```", ""),
    ]
    lines += [*_described(info), *_numbers(info), *_limits(info)]
    return "\n".join(lines)


def _what_it_is(token: bool) -> str:
    task = (
        "Says of every token of a response whether it belongs to a relevant word: class 0 separator, 1 irrelevant, "
        "2 relevant. The response's score is the mean chance of class 2 among classes 1 and 2."
        if token
        else "Says how likely a response as a whole is relevant: the sigmoid of the mean logit over its tokens."
    )
    return (
        f"{task} Input is a pair: a user's history (`kind: text`, one event per line, oldest first; kinds are search, "
        "click, purchase, visit) and a complete response (one query per line). Line breaks are shown to the model "
        "as `|`."
    )


def _snippet(token: bool) -> list[str]:
    """Code of the card that needs nothing but torch and transformers, run in the model's folder."""
    result = (
        "probabilities_TC = logits_TC.softmax(-1)  # separator, irrelevant, relevant"
        if token
        else "relevance = logits_TC.mean().sigmoid().item()"
    )
    return [
        "import torch",
        "from transformers import AutoModelForTokenClassification, AutoTokenizer",
        "",
        'folder = "."',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForTokenClassification.from_pretrained(folder).eval()",
        'history = "search: cheap flights\\nclick: flights to rome"',
        'response = "rome hotels\\nvatican tickets"',
        'encoded = tokenizer(history.replace("\\n", "|"), response.replace("\\n", "|"), return_tensors="pt")',
        "in_response = [part == 1 for part in encoded.sequence_ids(0)]",
        "with torch.inference_mode():",
        "    logits_TC = model(**encoded).logits[0][in_response]",
        result,
    ]


def _tppo_snippet(token: bool) -> list[str]:
    events = 'history = [Event("search", "cheap flights"), Event("click", "flights to rome")]'
    if not token:
        return [
            "from tppo.reward.models import SentenceRewardModel",
            "from tppo.text import Event",
            "",
            events,
            'relevance = SentenceRewardModel.load(".").score([history], ["rome hotels\\nvatican tickets"])[0]',
        ]
    return [
        "from tppo.reward.models import TokenRewardModel",
        "from tppo.text import Event",
        "",
        events,
        "# Characters of the tokens to be scored: here two words; tppo.reward.align.token_spans gives a policy's.",
        "spans = [(0, 4), (5, 11)]",
        'class_probs_T3 = TokenRewardModel.load(".").score([history], ["rome hotels\\nvatican tickets"], [spans])[0]',
    ]


def _described(info: dict[str, Any]) -> list[str]:
    """Fields of reward.json that are plain values, with their meaning."""
    plain = [name for name in FIELDS if name in info and name not in ("train", "constructed", "reward_eval", "metrics")]
    rows = [f"| `{name}` | {_plain(info[name])} | {FIELDS[name]} |" for name in plain]
    return ["## reward.json", "", "| field | here | meaning |", "|---|---|---|", *rows, ""]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _numbers(info: dict[str, Any]) -> list[str]:
    """Counts of the rows and metrics of the kept checkpoint, as far as they are known."""
    lines = []
    if "train" in info and "reward_eval" in info:
        lines += ["## Data", "", "| | training | held-out users |", "|---|---|---|"]
        lines += [f"| {label} | {info['train'][name]} | {info['reward_eval'][name]} |" for name, label in _COUNTS]
        if constructed := info.get("constructed", {}).get("responses"):
            lines.append(f"| constructed responses beside them | {constructed} | 0 |")
        lines += ["", "Responses were sampled from the supervised policy and labelled word by word. Users are in one "
                  "split only.", ""]  # fmt: skip
    found = {label: info["metrics"].get(name) for name, label in _METRICS.items() if name in info.get("metrics", {})}
    if found:
        lines += ["## On the held-out users", "", "| measure | value |", "|---|---|"]
        lines += [f"| {label} | {'not measured' if v is None else f'{v:.3f}'} |" for label, v in found.items()]
        lines += ["", "The checkpoint was chosen by AUC on these rows. `tppo check-reward` probes it further.", ""]
    return lines


def _limits(info: dict[str, Any]) -> list[str]:
    return [
        "## Limits",
        "",
        "- It reads the response in both directions: score complete responses only, never a prefix.",
        "- It imitates one judge under one rubric, on responses of one policy. Far from those (after long RL, in "
        "another log) its scores are guesses, and a policy trained long enough against it finds its mistakes.",
        "- Sampled responses rarely repeat a query or copy the history. Without constructed rows that do "
        "(`label.constructed`) it may prefer those that do.",
        "",
        "## Licence",
        "",
        f"The weights derive from the encoder `{info.get('encoder', 'not recorded')}`, whose licence holds. They "
        "learnt from a log: whether they may be shared depends on the log's licence and its users' privacy.",
        "",
    ]
