"""The two reward models: class probabilities per token, and the rival with one number per response.

Both are the same encoder with a linear layer on each token and read the same pairs; they differ in what they
are told. The token model has 3 outputs and learns a class per token. The sentence model has 1 output, and the
response's logit is pooled from its tokens' (`pool_sentence`).

A reward model reads the whole response in both directions: score complete responses only.

Folder: an ordinary Hugging Face token-classification folder (safetensors, tokenizer, config) with `reward.json`
(`FIELDS`) and a model card. The card is a pure function of reward.json, so the two cannot disagree; it holds counts
and rates only, never rows of a log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jinja2
import numpy as np
import torch
from scipy.special import expit, softmax
from torch import Tensor
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
from transformers.utils import logging

from tppo.core.common import UserError, track
from tppo.core.config import GlobalAttention, Pooling
from tppo.core.encoders import check_encoder
from tppo.core.models import save_model
from tppo.core.text import Event
from tppo.reward.align import Span, pool_probabilities
from tppo.reward.data import RESERVED_TOKENS, Batch, Pair, collate, encode_pairs
from tppo.reward.longformer import check_global_attention, first_position, global_attention_mask, to_longformer

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


class RewardModel:
    """What both kinds share: loading, saving, encoding, logits. Use one of the two subclasses."""

    kind: ClassVar[str]
    values: ClassVar[dict[str, float | None]]
    """What each output stands for, in order, and its relevance."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int, info: dict[str, Any]) -> None:
        if getattr(model.config, "type_vocab_size", 0) < 2:
            # RoBERTa and DistilBERT kinds know no two types of tokens, and ids of another tokenizer's would crash
            # them. Not every tokenizer class saves this list, so it is set whenever a model is made.
            tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.info = info
        self.truncated = 0
        """Inputs so far whose oldest history did not fit."""

    @classmethod
    def start(
        cls,
        encoder: str,
        max_length: int,
        *,
        longformer_window: int | None = None,
        global_attention: GlobalAttention = "history",
        dropout: float | None = None,
        layers: int = 0,
    ) -> Self:
        """A model to be trained: the encoder at this path or name with a fresh head.

        Args:
            longformer_window: make a Longformer with this attention window and `max_length` positions of it.
            global_attention: which tokens of a Longformer have it; other encoders have no use for it.
            dropout: every rate of dropout in the encoder's config; None leaves them as they are.
            layers: keep the first so many of the encoder; 0: all.

        Raises:
            UserError: no model of tokens or no fast tokenizer, `max_length` beyond what the encoder can read, or an
                encoder that cannot be made a Longformer.
        """
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the report on missing head weights: a fresh head is what we want
        try:
            config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
            model, found = AutoModelForTokenClassification.from_pretrained(
                encoder,
                **({} if dropout is None else _dropout_rates(config, dropout)),
                **first_layers(config, encoder, layers),
                num_labels=len(cls.values),
                id2label=dict(enumerate(cls.values)),
                label2id={name: i for i, name in enumerate(cls.values)},
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"reward.encoder={encoder} holds no encoder and tokenizer that load: {error}") from None
        finally:
            logging.set_verbosity(verbosity)
        # Not those of the head, which is a fresh one.
        missing = [key for key in found["missing_keys"] if key.startswith(f"{model.base_model_prefix}.")]
        info: dict[str, Any] = {"encoder": encoder}
        if longformer_window is not None:
            model = to_longformer(model, max_length, longformer_window)
            tokenizer.model_max_length = max_length
        if model.config.model_type == "longformer":
            check_global_attention(global_attention, "reward.global_attention")
            info["global_attention"] = global_attention
        tokenizer = _checked(tokenizer, model, encoder, max_length)
        check_encoder(model, tokenizer, missing, f"reward.encoder={encoder}")
        return cls(model, tokenizer, max_length, info)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """A trained model, in evaluation mode.

        Raises:
            UserError: the folder is none of this kind.
        """
        path = Path(folder) / REWARD_JSON
        if not path.exists():
            raise UserError(f"{path} does not exist: give the folder of a reward model (`tppo reward` makes one)")
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            kind, max_length = info["kind"], info["max_length"]
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error!r}): make the model anew with `tppo reward`") from None
        if kind != cls.kind:
            raise UserError(f"{path} describes a reward model of kind {kind!r}, not {cls.kind!r}")
        try:
            model, found = AutoModelForTokenClassification.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no model or tokenizer that loads: {error}") from None
        if model.config.model_type == "longformer":
            check_global_attention(info.get("global_attention"), f"{path}: global_attention")
        check_encoder(model.eval(), tokenizer, found["missing_keys"], str(folder))
        reward_model = cls(model, tokenizer, max_length, info)
        if torch.cuda.is_available():
            reward_model.model.cuda()
        return reward_model

    def save(self, folder: Path, **facts: Any) -> None:
        """Write the folder, whole or not at all; `facts` go into reward.json and the model card."""
        self.info = {
            "kind": self.kind,
            "classes": list(self.values),
            "values": self.values,
            "max_length": self.max_length,
            **self.info,
            **facts,
        }
        save_model(self.model, self.tokenizer, Path(folder), model_card(self.info), {REWARD_JSON: self.info})

    def encode(self, histories: Sequence[Sequence[Event]], responses: Sequence[str]) -> list[Pair]:
        pairs = encode_pairs(self.tokenizer, histories, responses, self.max_length)
        self.truncated += sum(pair.dropped > 0 for pair in pairs)
        return pairs

    def logits(self, batch: Batch) -> Tensor:
        """(B,T,C) for a batch, padding included."""
        inputs = dict(batch.inputs)
        if self.model.config.model_type == "longformer":
            inputs["global_attention_mask"] = global_attention_mask(batch, self.info["global_attention"])
        return self.model(**inputs).logits

    def response_logits(
        self, pairs: Sequence[Pair], description: str | None = None, batch_size: int = 64
    ) -> list[np.ndarray]:
        """Logits (T_i, C) of each pair's response tokens, in the order given."""
        logits = self._outputs(self.logits, pairs, description, batch_size)
        return [
            logits_TC[pair.start : pair.start + len(pair.spans)] for pair, logits_TC in zip(pairs, logits, strict=True)
        ]

    @torch.inference_mode()
    def _outputs(
        self, outputs: Callable[[Batch], Tensor], pairs: Sequence[Pair], description: str | None, batch_size: int = 64
    ) -> list[np.ndarray]:
        """The row of `outputs` (B,...) that belongs to each pair, in the order given.

        Batches hold pairs of like length; a pair's result does not depend on its batch (up to rounding).
        """
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]), reverse=True)
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        results: dict[int, np.ndarray] = {}
        for chunk in track(chunks, description) if description else chunks:
            batch = collate([pairs[i] for i in chunk], self.tokenizer.pad_token_id, self.model.device)
            results.update(zip(chunk, outputs(batch).float().cpu().numpy(), strict=True))
        self.model.train(was_training)
        return [results[i] for i in range(len(pairs))]


class TokenRewardModel(RewardModel):
    """Class probabilities (separator, irrelevant, relevant) for every token of a response.

    >>> from tppo.core.models import load_encoder_path
    >>> model = TokenRewardModel.start(load_encoder_path("minilm"), 64)  # a fresh head; a trained one: `load`
    >>> words = [(0, 3), (4, 9), (9, 9)]  # of the policy's tokens: red, shoes, end-of-sequence
    >>> [probs_T3] = model.score([[Event("search", "blue shoes")]], ["red shoes"], [words])
    >>> probs_T3.shape, probs_T3[-1].tolist()
    ((3, 3), [1.0, 0.0, 0.0])
    """

    kind = "token"
    values: ClassVar = {"separator": None, "irrelevant": 0.0, "relevant": 1.0}

    def score(
        self,
        histories: Sequence[Sequence[Event]],
        responses: Sequence[str],
        spans: Sequence[Sequence[Span]],
        description: str | None = None,
    ) -> list[np.ndarray]:
        """Class probabilities per policy token.

        Args:
            responses: decoded texts of complete responses.
            spans: for each response, the character span of each policy token (`align.token_spans`).

        Returns:
            One (T_i, 3) float32 array per response, rows in the order of its spans, each summing to 1. Tokens
            that show nothing but white space, special tokens among them, are [1, 0, 0].
        """
        pairs = self.encode(histories, responses)
        logits = self.response_logits(pairs, description)
        return [
            pool_probabilities(pair.spans, softmax(logits_TC, axis=-1), target, response)
            for pair, logits_TC, target, response in zip(pairs, logits, spans, responses, strict=True)
        ]


class SentenceRewardModel(RewardModel):
    """The chance that a response as a whole is relevant.

    >>> from tppo.core.models import load_encoder_path
    >>> model = SentenceRewardModel.start(load_encoder_path("minilm"), 64)
    >>> [score] = model.score([[Event("search", "blue shoes")]], ["red shoes"])
    >>> 0 < score < 1
    True
    """

    kind = "sentence"
    values: ClassVar = {"relevant": 1.0}

    @property
    def pooling(self) -> Pooling:
        return self.info.get("pooling", "mean")  # folders from before there was a choice

    def use_pooling(self, pooling: Pooling) -> None:
        """Choose the pooling of a model that is to be trained; the folder remembers it.

        Raises a UserError for `cls` with a tokenizer that does not begin an input with a [CLS] token.
        """
        first = self.tokenizer("a", "a")["input_ids"][0]
        if pooling == "cls" and first != self.tokenizer.cls_token_id:
            raise UserError(
                f"reward.sentence_pooling=cls: inputs of {self.info['encoder']} do not begin with a [CLS] token; "
                "use mean or max"
            )
        self.info["pooling"] = pooling

    def pooled_logits(self, batch: Batch) -> Tensor:
        """(B,) for a batch."""
        return pool_sentence(self.logits(batch), batch.response_mask_BT, self.pooling)

    def sentence_logits(self, pairs: Sequence[Pair], description: str | None = None) -> np.ndarray:
        """(N,) float32, in the order given; 0 for a response without tokens."""
        return np.array(self._outputs(self.pooled_logits, pairs, description), np.float32)

    def score(
        self, histories: Sequence[Sequence[Event]], responses: Sequence[str], description: str | None = None
    ) -> list[float]:
        """One number in [0, 1] per response; 0 for a response without tokens, as the judge has it."""
        pairs = self.encode(histories, responses)
        return sentence_probabilities(pairs, self.sentence_logits(pairs, description)).tolist()


def pool_sentence(logits_BT1: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """One logit per response from its tokens': (B,). 0 for a response without tokens.

    The three poolings of Sentence-BERT (Reimers and Gurevych 2019), after the linear head: `mean` over the response
    (it commutes with the head), `max` over the response, `cls`, the first token of the input.

    Args:
        mask_BT: True on response tokens.
    """
    logits_BT = logits_BT1[..., 0]
    if pooling == "max":
        pooled_B = logits_BT.masked_fill(~mask_BT, -torch.inf).amax(dim=1)
    elif pooling == "cls":
        pooled_B = logits_BT[:, 0]
    else:
        pooled_B = (logits_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
    return torch.where(mask_BT.any(dim=1), pooled_B, 0.0)


def sentence_probabilities(pairs: Sequence[Pair], logits_N: np.ndarray) -> np.ndarray:
    """(N,) chances that the responses are relevant; 0 for one without tokens."""
    return np.where([len(pair.spans) > 0 for pair in pairs], expit(logits_N.astype(float)), 0.0)


def first_layers(config: Any, encoder: str, layers: int) -> dict[str, int]:
    """The entry of a config that keeps the first `layers` layers; nothing for 0.

    Raises:
        UserError: more than there are, or a family whose config says more of each layer than their number.
    """
    if not layers:
        return {}
    if config.model_type == "longformer" or not 1 <= layers <= config.num_hidden_layers:
        raise UserError(
            f"reward.encoder_layers={layers}: {encoder} has {config.num_hidden_layers} layers"
            f"{', and a Longformer keeps them all' if config.model_type == 'longformer' else ''}; 0 keeps all"
        )
    return {"num_hidden_layers": layers}


def _dropout_rates(config: Any, rate: float) -> dict[str, float]:
    """Every rate of dropout that the config has, whatever its model family calls it."""
    settings = config.to_dict().items()
    return {name: rate for name, value in settings if "dropout" in name and isinstance(value, float | int)}


def _checked(tokenizer: Any, model: Any, encoder: str, max_length: int) -> Any:
    """The tokenizer, if it and the encoder can do what is asked of them."""
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"reward.encoder={encoder}: its tokenizer needs a tokenizer.json and a padding token")
    config = model.config
    first = first_position(getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None))
    if first and tokenizer.pad_token_id != config.pad_token_id:
        raise UserError(
            f"reward.encoder={encoder}: its tokenizer pads with token {tokenizer.pad_token_id}, but the model counts "
            f"positions of tokens other than {config.pad_token_id}; they do not belong together"
        )
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", max_length) - first)
    if not 2 * RESERVED_TOKENS <= max_length <= longest:
        raise UserError(
            f"reward.max_length={max_length} must be between {2 * RESERVED_TOKENS} and {longest}, "
            f"what reward.encoder={encoder} can read"
        )
    return tokenizer


def model_card(info: dict[str, Any]) -> str:
    """README.md of a reward-model folder, in the hub's form; `info` is the content of reward.json."""
    text = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    template = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    sections = ("train", "constructed", "reward_eval", "metrics")  # they have a place of their own in the card
    fields = [(name, _plain(info[name]), FIELDS[name]) for name in FIELDS if name in info and name not in sections]
    return template.render(token=info["kind"] == "token", info=info, fields=fields)


def _plain(value: Any) -> str:
    """A value of reward.json in a table."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value)
