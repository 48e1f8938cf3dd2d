"""The offline judge: relevance by cosine similarity of sentence-encoder embeddings (all-MiniLM-L6-v2).

The rule, version 2. The reference texts of an item are its targets (rubric `targets`) or the texts of its
history's events (rubric `history`).

- Word: the largest cosine between the embedding of the word *in its query* (mean of the last hidden states of
  its word pieces) and that of any word of any reference text *in that text*. Contextual embeddings, because
  "new" in "new york" should not match "new" in "new recipes", nor every "the" every other.
- Response: the mean over its queries of the largest cosine between the query's sentence embedding (mean of
  all last hidden states) and that of any reference text.
- A query that repeats a search of the history or an earlier query of the response is not new: its words and
  its part of the mean are 0 and irrelevant (`repeats_irrelevant`).
- Relevant means: the score is above a threshold, for each rubric one for words and one for responses: a quantile
  (`null_quantile`) of the scores of two kinds of unrelated text, *another user's* true next queries and *random words*
  of the log in the form of queries; the higher of the two counts. With 0.95, five in a hundred unrelated words are
  called relevant, at most: the false-alarm rate is fixed, and nothing is tuned on the models under comparison. Popular
  queries shared by two users stay in the first null: they are part of what an unrelated user looks like. Version 1 had
  that null only and called 64% of random-word responses relevant to the history, and reward models that had learnt
  from its labels scored random words above real queries (docs/results/reward.md).
- An empty response is irrelevant with score 0. A word of which the encoder's tokenizer keeps nothing (a
  zero-width character) scores 0. The judge never abstains.

Limits: it knows similarity, not usefulness; a paraphrase of the history scores high under `history`; function
words can be relevant when their context is similar. It is the judge that needs no network and no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer

from tppo.core.common import UserError, track
from tppo.core.config import Rubric
from tppo.core.files import sha256_file, write_json
from tppo.core.models import load_encoder_path
from tppo.core.tables import Example
from tppo.core.text import normalise_query, repeated_queries
from tppo.judge.probes import noise_items
from tppo.judge.verdict import CHUNK, JUDGE_FILE, JudgeItem, Verdict, WordVerdict, other_user_items, split_response

RULE_VERSION = 2
Text = tuple[str, ...]
"""A text as its words; they are joined by one space for the encoder."""


@dataclass(frozen=True)
class Thresholds:
    """Scores above which a word, or a whole response, is relevant."""

    word: float
    sentence: float


@dataclass(frozen=True)
class TextEmbedding:
    """Unit vectors of a text: `sentence` (D,) and `words` (W, D); a word without word pieces is all zeros."""

    sentence: np.ndarray
    words: np.ndarray


class Encoder:
    """Embeds texts. `setting` is what error messages call the encoder's name by."""

    def __init__(self, name_or_path: str, batch_size: int = 64, setting: str = "label.encoder") -> None:
        self.folder = Path(load_encoder_path(name_or_path))
        self.batch_size = batch_size
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            self.model = AutoModel.from_pretrained(
                self.folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            ).eval()
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{setting} '{name_or_path}' does not load as an encoder: {error}") from None
        if not self.tokenizer.is_fast:
            raise UserError(f"{setting} '{name_or_path}' has no fast tokenizer, which word offsets need")
        self.max_length = min(self.model.config.max_position_embeddings, 512)

    @torch.inference_mode()
    def encode(self, texts: Iterable[Text]) -> dict[Text, TextEmbedding]:
        """Embeddings of the distinct texts, by text; batched by length."""
        distinct = sorted(set(texts), key=lambda words: (len(" ".join(words)), words))
        embeddings: dict[Text, TextEmbedding] = {}
        for start in range(0, len(distinct), self.batch_size):
            batch = distinct[start : start + self.batch_size]
            encoding = self.tokenizer(
                [" ".join(words) for words in batch],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_offsets_mapping=True,
                return_tensors="pt",
            )
            offsets_BT2 = encoding.pop("offset_mapping").numpy()
            hidden_BTD = self.model(**encoding).last_hidden_state.numpy()
            mask_BT = encoding["attention_mask"].numpy().astype(bool)
            for words, offsets_T2, hidden_TD, mask_T in zip(batch, offsets_BT2, hidden_BTD, mask_BT, strict=True):
                embeddings[words] = TextEmbedding(
                    _unit(hidden_TD[mask_T].mean(0)), _word_vectors(words, offsets_T2, hidden_TD)
                )
        return embeddings


def _word_vectors(words: Text, offsets_T2: np.ndarray, hidden_TD: np.ndarray) -> np.ndarray:
    """Unit mean (W, D) of the hidden states of the tokens whose characters overlap each word."""
    ends_W = np.cumsum([len(word) + 1 for word in words]) - 1
    starts_W = ends_W - [len(word) for word in words]
    starts_T, ends_T = offsets_T2.T
    # Special and padding tokens have the empty span (0, 0) and overlap nothing.
    overlap_WT = (np.minimum(ends_W[:, None], ends_T) > np.maximum(starts_W[:, None], starts_T)).astype(np.float32)
    return _unit(overlap_WT @ hidden_TD)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)


@dataclass(frozen=True)
class Scores:
    """Scores of a response before thresholds. `fresh[i]` is False for a word of a repeated query."""

    words: np.ndarray
    fresh: np.ndarray
    sentence: float


class EmbeddingJudge:
    """The judge of the module's docstring; implements `tppo.judge.verdict.Judge`."""

    rubrics: tuple[Rubric, ...] = get_args(Rubric)

    def __init__(
        self,
        encoder: str,
        thresholds: dict[Rubric, Thresholds],
        *,
        repeats_irrelevant: bool = True,
        batch_size: int = 64,
    ) -> None:
        self.encoder_name = encoder
        self.encoder = Encoder(encoder, batch_size)
        self.thresholds = thresholds
        self.repeats_irrelevant = repeats_irrelevant
        self.name = f"embedding-v{RULE_VERSION}/{Path(encoder).name}"

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric, description: str | None = None) -> list[Verdict]:
        """One verdict per item, in order; UserError when the judge has not been calibrated for this rubric."""
        if rubric not in self.thresholds:
            raise UserError(f"the judge has no thresholds for rubric '{rubric}': run the label stage first")
        limits = self.thresholds[rubric]
        verdicts = []
        for scores in self.scores(items, rubric, description):
            words = [
                WordVerdict(float(score), bool(fresh and score > limits.word))
                for score, fresh in zip(scores.words, scores.fresh, strict=True)
            ]
            relevant = bool(scores.fresh.any()) and scores.sentence > limits.sentence
            verdicts.append(Verdict(words, scores.sentence, relevant, "ok", None))
        return verdicts

    def scores(self, items: Sequence[JudgeItem], rubric: Rubric, description: str | None = None) -> list[Scores]:
        """Cosine scores of each item's words and response, before any threshold."""
        scores: list[Scores] = []
        chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
        for chunk in track(chunks, description) if description and chunks else chunks:
            responses = [[tuple(words) for words in split_response(item.response).query_words] for item in chunk]
            references = [_reference_texts(item, rubric) for item in chunk]
            embeddings = self.encoder.encode(text for texts in responses + references for text in texts)
            scores += [
                self._score(item, queries, texts, embeddings)
                for item, queries, texts in zip(chunk, responses, references, strict=True)
            ]
        return scores

    def _score(
        self, item: JudgeItem, queries: list[Text], references: list[Text], embeddings: dict[Text, TextEmbedding]
    ) -> Scores:
        if not queries or not references:
            count = sum(map(len, queries))
            return Scores(np.zeros(count), np.zeros(count, dtype=bool), 0.0)
        reference_sentences_RD = np.stack([embeddings[text].sentence for text in references])
        reference_words_RD = np.concatenate([embeddings[text].words for text in references])
        texts = [normalise_query(" ".join(query)) for query in queries]
        old = repeated_queries(item.history, texts) if self.repeats_irrelevant else set()
        word_scores, query_scores = [], []
        for number, query in enumerate(queries):
            if number in old:
                word_scores.append(np.zeros(len(query)))
                query_scores.append(0.0)
            else:
                word_scores.append((embeddings[query].words @ reference_words_RD.T).max(-1))
                query_scores.append((reference_sentences_RD @ embeddings[query].sentence).max())
        fresh = [number not in old for number, query in enumerate(queries) for _ in query]
        return Scores(np.concatenate(word_scores), np.array(fresh), float(np.mean(query_scores)))

    def calibrate(
        self, examples: Sequence[Example], null_quantile: float, seed: int, description: str | None = None
    ) -> dict[str, Any]:
        """Set the thresholds from two kinds of unrelated text; returns them and the quantiles of both kinds.

        UserError for fewer than two users, or a quantile outside (0, 1).
        """
        if not 0 < null_quantile < 1:
            raise UserError(f"label.null_quantile={null_quantile} has to lie between 0 and 1")
        nulls = {
            "other_users": other_user_items(examples, seed),
            "random_words": noise_items(examples, seed, "calibrate"),
        }
        facts: dict[str, Any] = {}
        for rubric in get_args(Rubric):
            found: dict[str, dict[str, float]] = {}
            for null, items in nulls.items():
                scores = self.scores(items, rubric, description and f"{description}: {rubric}, {null}")
                words = np.concatenate([s.words for s in scores])
                found[null] = {
                    "word": float(np.quantile(words, null_quantile)),
                    "sentence": float(np.quantile([s.sentence for s in scores], null_quantile)),
                    "words": len(words),
                    "responses": len(items),
                }
            self.thresholds[rubric] = Thresholds(
                max(null["word"] for null in found.values()), max(null["sentence"] for null in found.values())
            )
            facts[rubric] = {**asdict(self.thresholds[rubric]), "nulls": found}
        return facts

    def save(self, folder: Path) -> None:
        """Write judge.json, from which `load` makes the same judge."""
        write_json(
            folder / JUDGE_FILE,
            {
                "kind": "embedding",
                "judge": self.name,
                "rule_version": RULE_VERSION,
                "encoder": self.encoder_name,
                "encoder_sha256": self._weights_hash(),
                "repeats_irrelevant": self.repeats_irrelevant,
                "batch_size": self.encoder.batch_size,
                "thresholds": {rubric: asdict(limits) for rubric, limits in self.thresholds.items()},
            },
        )

    @classmethod
    def load(cls, saved: dict[str, Any], path: Path) -> EmbeddingJudge:
        """The judge that `path` describes; `saved` is its content (KeyError or TypeError: it is not).

        UserError for another version of the rule, or other encoder weights than then.
        """
        if saved["rule_version"] != RULE_VERSION:
            raise UserError(
                f"{path} holds rule version {saved['rule_version']}, this is version {RULE_VERSION}: "
                "its scores would not compare; give `--redo label`"
            )
        judge = cls(
            saved["encoder"],
            {rubric: Thresholds(**limits) for rubric, limits in saved["thresholds"].items()},
            repeats_irrelevant=saved["repeats_irrelevant"],
            batch_size=saved["batch_size"],
        )
        if judge._weights_hash() != saved["encoder_sha256"]:
            raise UserError(
                f"the weights of encoder '{saved['encoder']}' are not those {path} was calibrated with: "
                "give `--redo label`"
            )
        return judge

    def _weights_hash(self) -> str:
        return "+".join(sha256_file(path) for path in sorted(self.encoder.folder.glob("*.safetensors")))


def _reference_texts(item: JudgeItem, rubric: Rubric) -> list[Text]:
    texts = item.targets if rubric == "targets" else [event.text for event in item.history]
    return [words for words in (tuple(text.split()) for text in texts) if words]
