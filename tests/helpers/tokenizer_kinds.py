"""Real tokenizers of seven kinds: six trained here in a second, one from the bundled encoder."""

from __future__ import annotations

import io
import json

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tppo.core.models import load_encoder_path

CORPUS = [
    "search: cheap flights to new york",
    "click: hotels in tokyo near shinjuku station",
    "best pizza restaurants in town for kids",
    "naïve café menu, œuvre complète",
    "東京 日本 旅行 ホテル",
    "weather new york tomorrow 😀 emoji",
    "how to fix a flat tyre | don't panic!",
] * 5
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Add the special tokens, the template of a pair, and the transformers front."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """GPT-2, SmolLM2, RoBERTa: any text in bytes; a token may be part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT, uncased: lower case, no accents, unknown characters become <unk>; decoding tidies punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """T5, XLM-R: Unigram over text with ▁ for space; NFKC; unknown characters are lost."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s{2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer)


def llama_bpe() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral: BPE with ▁ for space, one leading ▁, and <0xNN> tokens for unknown characters."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=150, limit_alphabet=40, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    bytes_first = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*bytes_first, *(piece for piece in model["vocab"] if piece not in SPECIALS)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(tokenizer)


def characters() -> PreTrainedTokenizerFast:
    """One token per character; unknown characters become <unk>."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "\n"], trainer)
    return _wrap(tokenizer)


def sentence_piece() -> PreTrainedTokenizerFast:
    """A model trained by the sentencepiece library itself, its pieces and scores carried over."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        vocab_size=120,
        character_coverage=0.99,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=pieces.unk_id()))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer)


def minilm() -> PreTrainedTokenizerFast:
    """The real WordPiece tokenizer of all-MiniLM-L6-v2, the offline encoder."""
    return AutoTokenizer.from_pretrained(load_encoder_path("minilm"))


KINDS = {
    make.__name__: make for make in (byte_level_bpe, word_piece, unigram, llama_bpe, characters, sentence_piece, minilm)
}
_made: dict[str, PreTrainedTokenizerFast] = {}


def get_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Made once per test run. A plain function: Hypothesis tests cannot take function-scoped fixtures."""
    if kind not in _made:
        _made[kind] = KINDS[kind]()
    return _made[kind]
