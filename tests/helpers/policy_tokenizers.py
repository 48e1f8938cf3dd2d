"""Tokenizers of policies, tiny ones of eight families: their models, conventions, control tokens and chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers.tokenizer_kinds import CORPUS

TEXTS = [
    *CORPUS,
    "A person's search history, oldest first. Write their next 3 searches, one per line.\nsearch: x\nnext searches:\n",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + "
    "'<|eot_id|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + "
    "('model' if message['role'] == 'assistant' else 'user') + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_LLAMA3_WORDS = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


def _special(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def _begun_with(tokenizer: Tokenizer, start: str = "", end: str = "") -> None:
    """The post-processor of a tokenizer that puts tokens around a text."""
    used = [token for token in (start, end) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (start, "$A", end) if part),
        pair=" ".join(part for part in (start, "$A", "$B", end) if part),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in used],
    )


def _byte_level(ignore_merges: bool = False, words: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if words is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _byte_fallback(first_pieces: list[str]) -> Tokenizer:
    """Characters and their merges, ▁ for a space, and bytes for all the rest."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    vocab = trained.get_vocab()
    pieces = [
        *first_pieces,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(vocab, key=lambda piece: vocab[piece]),
    ]
    merges = json.loads(trained.to_str())["model"]["merges"]
    return Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in merges],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )


def gpt2() -> PreTrainedTokenizerFast:
    """GPT-2, SmolLM2: bytes, no beginning; one token begins, ends and is unknown."""
    tokenizer = _byte_level()
    end = "<|endoftext|>"
    tokenizer.add_special_tokens(_special(end))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


def llama2() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral: a space before the first word only, BOS, a chat template of plain words."""
    tokenizer = _byte_fallback(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_special("<unk>", "<s>", "</s>"))
    _begun_with(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=LLAMA2_CHAT
    )


def llama3() -> PreTrainedTokenizerFast:
    """Llama 3: bytes, whole words of the vocabulary before merges, BOS; a turn ends otherwise than a text."""
    tokenizer = _byte_level(ignore_merges=True, words=_LLAMA3_WORDS)
    tokens = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(_special(*tokens))
    _begun_with(tokenizer, tokens[0])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tokens[0], eos_token=tokens[1], chat_template=LLAMA3_CHAT
    )


def gemma() -> PreTrainedTokenizerFast:
    """Gemma: no space before the first word, BOS; turns, markup and white space are added, not special."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<h1>", "\n", "\n\n", "▁▁"]
    tokenizer = _byte_fallback(pieces)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(_special(*pieces[:4]))
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces[4:]])
    _begun_with(tokenizer, "<bos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=GEMMA_CHAT,
    )


def qwen() -> PreTrainedTokenizerFast:
    """Qwen: bytes, no beginning, ChatML; some added tokens are not special."""
    tokenizer = _byte_level(words=_LLAMA3_WORDS)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<tool_call>", "<think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def _unigram(normalizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    return tokenizer


def t5() -> PreTrainedTokenizerFast:
    """T5: Unigram, ends a text with end-of-sequence; a line break is a space."""
    tokenizer = _unigram(normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]))
    tokenizer.add_special_tokens(_special("<s>", "<pad>", "</s>", "<unk>", "<extra_id_0>"))
    _begun_with(tokenizer, end="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def xglm() -> PreTrainedTokenizerFast:
    """XGLM: Unigram, begins a text with end-of-sequence; a line break is unknown."""
    tokenizer = _unigram(normalizers.NFKC())
    tokenizer.add_special_tokens(_special("<s>", "<pad>", "</s>", "<unk>"))
    _begun_with(tokenizer, "</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def bert() -> PreTrainedTokenizerFast:
    """BERT, uncased: WordPiece; white space is lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=specials, show_progress=False)
    )
    _begun_with(tokenizer, "[CLS]", "[SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        eos_token="[SEP]",
    )


READABLE: tuple[Callable[[], Any], ...] = (gpt2, llama2, llama3, gemma, qwen)
"""Bring back what they are given."""
LOSSY: tuple[Callable[[], Any], ...] = (t5, xglm, bert)
"""Do not: line breaks are lost."""
_made: dict[str, Any] = {}


def get_policy_tokenizer(name: str) -> Any:
    """Made once per test run; do not change it."""
    if name not in _made:
        _made[name] = {make.__name__: make for make in (*READABLE, *LOSSY)}[name]()
    return _made[name]
