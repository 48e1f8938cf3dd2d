"""Labelled responses as reward-model inputs: rows of labels.parquet -> encoded pairs -> batches.

An input is the pair (history, response). Line breaks are shown to the encoder as `|`: most encoders take
white space for nothing and could not see where a query ends. One character for one character, so that every
character span stays true; and those tokens are the separators, class 0, that the paper has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tppo.core.common import UserError
from tppo.core.config import Rubric
from tppo.core.encode import encode_batch
from tppo.core.tables import LABELS, Example, load_examples, read_table
from tppo.core.text import QUERY_SEPARATOR, Event, Word, render_history
from tppo.judge.verdict import split_response
from tppo.reward.align import IRRELEVANT, RELEVANT, Span, classes_from_words, encoder_spans, query_lengths

VISIBLE_SEPARATOR = "|"
RESERVED_TOKENS = 8  # of max_length: the special tokens of a pair, and a little history


@dataclass(frozen=True)
class LabelledResponse:
    """A judged response to a history: `classes[i]` (1 or 2) for `words[i]`, and one label for the whole."""

    example_id: str
    user_id: str
    history: list[Event]
    response: str
    words: list[Word]
    classes: list[int]
    sentence_label: int


@dataclass(frozen=True)
class Pair:
    """An encoded (history, response). Its tokens start, start + 1, ... are the response's, one per span."""

    inputs: dict[str, list[int]]
    start: int
    spans: list[Span]
    dropped: int
    """Oldest history tokens left out to fit."""

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Item(Pair):
    """A pair with what is to be learnt from it: a gold class per response token, a label for the response."""

    classes: list[int]
    label: int


class Batch(NamedTuple):
    """Right-padded pairs. B pairs, T tokens."""

    inputs: dict[str, Tensor]
    response_mask_BT: Tensor


def load_labelled(
    label_folder: Path, prepare_folder: Path, rubric: Rubric, split: str, file: str = "labels.parquet"
) -> tuple[list[LabelledResponse], int]:
    """Judged responses of one split and rubric, in file order, and how many the judge abstained on.

    Raises:
        UserError: a row contradicts itself (naming file, row and how) or its example is unknown.
    """
    path = label_folder / file
    table = read_table(path, LABELS)
    asked = pc.and_(pc.equal(table["split"], split), pc.equal(table["rubric"], rubric))
    numbers, table = np.flatnonzero(asked.to_numpy()), table.filter(asked)
    known = load_examples(prepare_folder, split).with_ids(set(table["example_id"].to_pylist()))
    examples = {example.example_id: example for example in known}
    labelled, abstained = [], 0
    for number, row in zip(numbers, table.to_pylist(), strict=True):
        if row["status"] != "ok":
            abstained += 1
            continue
        example_id = row["example_id"]
        if problem := _problem(row, examples):
            raise UserError(
                f"{path}, row {number} (example {example_id}): {problem}; run `tppo label` again, "
                "or mend the file that you brought"
            )
        labelled.append(
            LabelledResponse(
                example_id,
                examples[example_id].user_id,
                examples[example_id].history,
                row["response"],
                [Word(word["word"], word["start"], word["end"], word["query"]) for word in row["words"]],
                [word["label"] for word in row["words"]],
                row["sentence_label"],
            )
        )
    return labelled, abstained


def _problem(row: dict[str, Any], examples: dict[str, Example]) -> str | None:
    """What is wrong with a row of labels, if anything."""
    if row["example_id"] not in examples:
        return f"no example of split {row['split']} has this id"
    if row["sentence_label"] not in (0, 1):
        return f"sentence_label is {row['sentence_label']!r}, neither 0 nor 1"
    if not row["words"] and split_response(row["response"]).words:
        return "it has no word labels (judge.template: sentence?), which the token-level reward model learns from"
    end = 0
    for word in row["words"]:
        if word["label"] not in (IRRELEVANT, RELEVANT):
            return f"word {word['i']} has label {word['label']!r}, neither 1 nor 2"
        if word["start"] < end or row["response"][word["start"] : word["end"]] != word["word"]:
            return f"word {word['i']} is not at characters {word['start']} to {word['end']} of the response"
        end = word["end"]
    return None


def encode_pairs(
    tokenizer: Any, histories: Sequence[Sequence[Event]], responses: Sequence[str], max_length: int
) -> list[Pair]:
    """Encode (history, response) pairs. What exceeds `max_length` goes from the history's old end.

    Raises:
        UserError: a response alone leaves no room (it is never cut: each of its tokens needs a reward).
    """
    if not histories:
        return []
    encodings = encode_batch(
        tokenizer,
        [_visible(render_history(history)) for history in histories],
        [_visible(response) for response in responses],
    )
    typed = "token_type_ids" in tokenizer.model_input_names
    pairs = []
    for i, (encoding, response) in enumerate(zip(encodings, responses, strict=True)):
        start, spans = encoder_spans(tokenizer, encoding, _visible(response))
        if len(spans) > max_length - RESERVED_TOKENS:
            raise UserError(
                f"response {i} of {len(responses)} has {len(spans)} reward-model tokens, more than "
                f"reward.max_length={max_length} minus {RESERVED_TOKENS}: raise reward.max_length or lower "
                "task.max_response_tokens"
            )
        inputs = {"input_ids": encoding.ids} | ({"token_type_ids": encoding.type_ids} if typed else {})
        dropped = max(0, len(inputs["input_ids"]) - max_length)
        if dropped:
            oldest = encoding.sequence_ids.index(0)
            assert oldest + dropped <= start, "special tokens fit into the reserve"
            for values in inputs.values():
                del values[oldest : oldest + dropped]
        pairs.append(Pair(inputs, start - dropped, spans, dropped))
    return pairs


def _visible(text: str) -> str:
    """The text as the encoder is shown it; white space alone is empty: separators are no answer."""
    return text.replace(QUERY_SEPARATOR, VISIBLE_SEPARATOR) if text.strip() else ""


def make_items(tokenizer: Any, labelled: Sequence[LabelledResponse], max_length: int) -> list[Item]:
    """Training items: words' labels become classes of the reward model's own tokens."""
    pairs = encode_pairs(tokenizer, [row.history for row in labelled], [row.response for row in labelled], max_length)
    return [
        Item(**vars(pair), classes=classes_from_words(row.words, row.classes, pair.spans), label=row.sentence_label)
        for row, pair in zip(labelled, pairs, strict=True)
    ]


def suggested_length(rows: Sequence[LabelledResponse], items: Sequence[Item], num_queries: int) -> float | None:
    """sl of Eq. 4 in reward-model tokens; None when no row holds a query."""
    lengths: list[int] = []
    for row, item in zip(rows, items, strict=True):
        lengths += query_lengths(split_response(row.response), item.spans)
    return float(np.median(lengths)) * num_queries if lengths else None


def collate(pairs: Sequence[Pair], pad_token_id: int, device: torch.device) -> Batch:
    """Pad pairs on the right to the longest of them."""

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    inputs = {
        key: padded([pair.inputs[key] for pair in pairs], pad_token_id if key == "input_ids" else 0)
        for key in pairs[0].inputs
    }
    inputs["attention_mask"] = padded([[1] * len(pair) for pair in pairs], 0)
    mask_BT = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, pair in zip(mask_BT, pairs, strict=True):
        row[pair.start : pair.start + len(pair.spans)] = True
    return Batch({key: value.to(device) for key, value in inputs.items()}, mask_BT.to(device))


def targets(items: Sequence[Item], batch: Batch) -> tuple[Tensor, Tensor]:
    """Gold classes (B,T), 0 outside the response, and labels (B,) of a batch made from these items."""
    classes_BT = torch.zeros_like(batch.inputs["input_ids"])
    classes_BT[batch.response_mask_BT] = torch.tensor([c for item in items for c in item.classes]).to(classes_BT)
    return classes_BT, torch.tensor([item.label for item in items], device=classes_BT.device)
