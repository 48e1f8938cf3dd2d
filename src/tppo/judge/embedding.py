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
- An empty response is irrelevant with score 0. A word of which the encoder's tokenizer keeps nothing (a broken byte,
  U+FFFD), or that holds a character unknown to it (an emoji), scores 0: to the encoder it is no word.
- What the encoder cannot read (`tppo.judge.legible`: another script than it was made for) is not guessed at. A response
  with an unreadable word in a new query is abstained on (problem `unreadable`); of the reference texts those with an
  unreadable word are left out, and with none left the judge abstains (`unreadable_reference`). A log of which more than
  a fifth of the words is unreadable is refused when the judge is calibrated.

Limits: it knows similarity, not usefulness; a paraphrase of the history scores high under `history`; function
words can be relevant when their context is similar. It is the judge that needs no network and no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer

from tppo.core.common import UserError, track
from tppo.core.config import Rubric
from tppo.core.encode import encode_padded
from tppo.core.encoders import check_encoder
from tppo.core.files import sha256_file, write_json
from tppo.core.models import load_encoder_path
from tppo.core.tables import Example
from tppo.core.text import ParsedResponse, repeated_queries
from tppo.core.words import Span, one_spaced, word_spans
from tppo.judge.legible import Legibility
from tppo.judge.probes import log_texts, noise_items
from tppo.judge.verdict import CHUNK, JUDGE_FILE, JudgeItem, Verdict, WordVerdict, other_user_items, split_response

RULE_VERSION = 2
_OTHER_ENCODER = (
    "give label.encoder a sentence encoder for the log's languages, or let a language model judge (label.judge: llm)"
)


@dataclass(frozen=True)
class Thresholds:
    """Scores above which a word, or a whole response, is relevant."""

    word: float
    sentence: float


@dataclass(frozen=True)
class TextEmbedding:
    """Unit vectors of a text: `sentence` (D,) and `words` (W, D); a word without word pieces, or with an unknown one,
    is all zeros. `is_read`: the encoder can read the script of all of its words."""

    sentence: np.ndarray
    words: np.ndarray
    is_read: bool


class Encoder:
    """Embeds texts. `setting` is what error messages call the encoder's name by."""

    def __init__(self, name_or_path: str, batch_size: int = 64, setting: str = "label.encoder") -> None:
        self.folder = Path(load_encoder_path(name_or_path))
        self.batch_size = batch_size
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            self.model, found = AutoModel.from_pretrained(
                self.folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{setting} '{name_or_path}' does not load as an encoder: {error}") from None
        if not self.tokenizer.is_fast:
            raise UserError(f"{setting} '{name_or_path}' has no fast tokenizer, which word offsets need")
        check_encoder(self.model.eval(), self.tokenizer, found["missing_keys"], f"{setting} '{name_or_path}'")
        self.legibility = Legibility(self.tokenizer)
        self.max_length = min(self.model.config.max_position_embeddings, 512)

    @torch.inference_mode()
    def encode(self, texts: Iterable[str]) -> dict[str, TextEmbedding]:
        """Embeddings of the distinct texts, by text; batched by length."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        embeddings: dict[str, TextEmbedding] = {}
        for start in range(0, len(distinct), self.batch_size):
            batch = distinct[start : start + self.batch_size]
            # Not by calling the tokenizer: a word that spells "[SEP]" or "</s>" would be a control token.
            encoding, offsets_BT2 = encode_padded(self.tokenizer, batch, self.max_length)
            hidden_BTD = self.model(**encoding).last_hidden_state.numpy()
            mask_BT = encoding["attention_mask"].numpy().astype(bool)
            ids_BT = encoding["input_ids"]
            rows = zip(batch, ids_BT, offsets_BT2, hidden_BTD, mask_BT, strict=True)
            for text, ids_T, offsets_T2, hidden_TD, mask_T in rows:
                tokens = text, ids_T.tolist(), offsets_T2.tolist()
                words_WD = _word_vectors(word_spans(text), offsets_T2, hidden_TD)
                words_WD[self.legibility.lost_words(*tokens)] = 0
                is_read = not any(self.legibility.unread_words(*tokens))
                embeddings[text] = TextEmbedding(_unit(hidden_TD[mask_T].mean(0)), words_WD, is_read)
        return embeddings


def _word_vectors(spans: Sequence[Span], offsets_T2: np.ndarray, hidden_TD: np.ndarray) -> np.ndarray:
    """Unit mean (W, D) of the hidden states of the tokens whose characters overlap each word."""
    starts_W, ends_W = np.array(spans, dtype=np.int64).reshape(len(spans), 2).T
    starts_T, ends_T = offsets_T2.T
    # Special and padding tokens have the empty span (0, 0) and overlap nothing.
    overlap_WT = (np.minimum(ends_W[:, None], ends_T) > np.maximum(starts_W[:, None], starts_T)).astype(np.float32)
    return _unit(overlap_WT @ hidden_TD)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)


@dataclass(frozen=True)
class Scores:
    """Scores of a response before thresholds. `fresh[i]` is False for a word of a repeated query. With a `problem` the
    judge cannot say, and there are no scores."""

    words: np.ndarray
    fresh: np.ndarray
    sentence: float
    problem: str | None = None


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
            if scores.problem:
                verdicts.append(Verdict(None, 0.0, False, "abstained", scores.problem))
                continue
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
            responses = [split_response(item.response) for item in chunk]
            references = [_reference_texts(item, rubric) for item in chunk]
            texts = chain(chain.from_iterable(parsed.lines for parsed in responses), chain.from_iterable(references))
            embeddings = self.encoder.encode(texts)
            scores += [
                self._score(item, parsed, [embeddings[text] for text in against], embeddings)
                for item, parsed, against in zip(chunk, responses, references, strict=True)
            ]
        return scores

    def _score(
        self,
        item: JudgeItem,
        parsed: ParsedResponse,
        references: list[TextEmbedding],
        embeddings: dict[str, TextEmbedding],
    ) -> Scores:
        old = repeated_queries(item.history, parsed.queries) if self.repeats_irrelevant else set()
        queries = [embeddings[line] for line in parsed.lines]
        fresh = np.array([word.query not in old for word in parsed.words], dtype=bool)
        nothing = np.zeros(len(parsed.words))
        if not references or len(old) == len(queries):
            return Scores(nothing, np.zeros_like(fresh), 0.0)
        if not all(query.is_read for number, query in enumerate(queries) if number not in old):
            return Scores(nothing, fresh, 0.0, "unreadable")
        read = [reference for reference in references if reference.is_read]
        if not read:
            return Scores(nothing, fresh, 0.0, "unreadable_reference")
        reference_sentences_RD = np.stack([reference.sentence for reference in read])
        reference_words_RD = np.concatenate([reference.words for reference in read])
        word_scores, query_scores = [], []
        for number, query in enumerate(queries):
            if number in old or not query.words.any():  # not new, or nothing in it is a word to the encoder
                word_scores.append(np.zeros(len(query.words)))
                query_scores.append(0.0)
            else:
                word_scores.append((query.words @ reference_words_RD.T).max(-1))
                query_scores.append((reference_sentences_RD @ query.sentence).max())
        return Scores(np.concatenate(word_scores), fresh, float(np.mean(query_scores)))

    def calibrate(
        self, examples: Sequence[Example], null_quantile: float, seed: int, description: str | None = None
    ) -> dict[str, Any]:
        """Set the thresholds from two kinds of unrelated text; returns them and the quantiles of both kinds.

        UserError for fewer than two users, a quantile outside (0, 1), or texts that the encoder cannot read.
        """
        if not 0 < null_quantile < 1:
            raise UserError(f"label.null_quantile={null_quantile} has to lie between 0 and 1")
        self.encoder.legibility.check(
            log_texts(examples),
            f"label.encoder={self.encoder_name}",
            _OTHER_ENCODER,
        )
        nulls = {
            "other_users": other_user_items(examples, seed),
            "random_words": noise_items(examples, seed, "calibrate"),
        }
        facts: dict[str, Any] = {}
        for rubric in get_args(Rubric):
            found: dict[str, dict[str, float]] = {}
            for null, items in nulls.items():
                found_scores = self.scores(items, rubric, description and f"{description}: {rubric}, {null}")
                scores = [score for score in found_scores if score.problem is None]
                if not scores:
                    raise UserError(
                        f"label.encoder={self.encoder_name} can read none of the log's answers: {_OTHER_ENCODER}"
                    )
                words = np.concatenate([s.words for s in scores])
                found[null] = {
                    "word": float(np.quantile(words, null_quantile)),
                    "sentence": float(np.quantile([s.sentence for s in scores], null_quantile)),
                    "words": len(words),
                    "responses": len(scores),
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


def _reference_texts(item: JudgeItem, rubric: Rubric) -> list[str]:
    texts = item.targets if rubric == "targets" else [event.text for event in item.history]
    return [text for text in map(one_spaced, texts) if text]
