"""The tokenizer of a GGUF file, as files that Hugging Face's libraries and SentencePiece read.

A byte-level BPE becomes tokenizer.json. The file names its way of splitting text by a word (tokenizer.ggml.pre), of
which those below are known. A SentencePiece model's pieces, scores and types become tokenizer.model. Special tokens and
chat template become tokenizer_config.json.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

_PREFIX = "tokenizer.ggml."
# Kinds of tokens, SentencePiece's and GGUF's alike.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
# How text is split before BPE. Llama 3's and Qwen2's patterns are those of their tokenizer.json.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same but for digits, up to three of which stay together.
_LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_SPLITS = {
    "default": "bytes",
    "gpt-2": "bytes",
    "smollm": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
}
_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files by name; none if the file has no tokenizer.

    Args:
        fields: The GGUF file's fields, by name.

    Raises:
        ValueError: its kind, or its way of splitting text, is not known.
    """
    kind = fields.get(f"{_PREFIX}model")
    if kind is None or kind in ("none", "no_vocab"):
        return {}
    if kind == "gpt2":
        return {"tokenizer.json": _byte_level(fields), "tokenizer_config.json": _settings(fields)}
    if kind == "llama":
        return {"tokenizer.model": _sentencepiece(fields), "tokenizer_config.json": _settings(fields, fast=False)}
    raise ValueError(f"{_PREFIX}model={kind!r} is not supported; gpt2 (byte-level BPE) and llama (SentencePiece) are")


def _settings(fields: Mapping[str, Any], fast: bool = True) -> bytes:
    tokens = fields[f"{_PREFIX}tokens"]
    named = {key: fields.get(f"{_PREFIX}{name}_token_id") for key, name in _TOKENS.items()}
    settings: dict[str, Any] = {key: tokens[int(index)] for key, index in named.items() if index is not None}
    # For AutoTokenizer to use tokenizer.json as it is; a SentencePiece model's class follows from the model's.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"} if fast else {}
    for name in ("add_bos_token", "add_eos_token"):
        if (value := fields.get(f"{_PREFIX}{name}")) is not None:
            settings[name] = bool(value)
    if (template := fields.get("tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def _byte_level(fields: Mapping[str, Any]) -> bytes:
    """The content of tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, types = fields[f"{_PREFIX}tokens"], fields[f"{_PREFIX}token_type"]
    named = fields.get(f"{_PREFIX}pre", "default")
    if named not in _SPLITS:
        raise ValueError(f"{_PREFIX}pre={named!r} is not supported; {', '.join(_SPLITS)} are")
    split = _SPLITS[named]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get(f"{_PREFIX}merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3's takes a word that is a token without merging its parts.
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama3"))
    prefix = bool(fields.get(f"{_PREFIX}add_space_prefix", False))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split in ("bytes", "digits"))
    steps: list[Any] = []
    if split == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    elif split in ("llama3", "qwen2"):
        steps = [_split(_LLAMA3 if split == "llama3" else QWEN2)]
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_alone])
    if split == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            made.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    _add_beginning(made, fields)
    return (made.to_str(pretty=True) + "\n").encode()


def _split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _add_beginning(made: Any, fields: Mapping[str, Any]) -> None:
    """Begin every text with the bos token, if the file says so."""
    from tokenizers import processors

    bos = fields.get(f"{_PREFIX}bos_token_id")
    if bos is not None and fields.get(f"{_PREFIX}add_bos_token"):
        token = fields[f"{_PREFIX}tokens"][int(bos)]
        single, pair = f"{token}:0 $A:0", f"{token}:0 $A:0 {token}:1 $B:1"
        made.post_processor = processors.TemplateProcessing(single, pair, [(token, int(bos))])


def _sentencepiece(fields: Mapping[str, Any]) -> bytes:
    """The content of tokenizer.model: SentencePiece's ModelProto (sentencepiece_model.proto) of a BPE."""
    tokens, scores = fields[f"{_PREFIX}tokens"], fields[f"{_PREFIX}scores"]
    types = fields.get(f"{_PREFIX}token_type", [_NORMAL] * len(tokens))
    pieces = b"".join(
        _message(1, _message(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, int(kind)))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    # TrainerSpec: model_type BPE, byte_fallback, and the special tokens by id and by piece (unk_id 40, unk_piece 45 …).
    trainer = _number(3, 2) + _number(4, len(tokens)) + _number(35, 1)
    for place, (name, default) in enumerate((("unknown", 0), ("bos", 1), ("eos", 2), ("padding", -1))):
        index = int(fields.get(f"{_PREFIX}{name}_token_id", default))
        trainer += _number(40 + place, index)
        trainer += b"" if index < 0 else _message(45 + place, tokens[index].encode())
    # NormalizerSpec: add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces.
    prefix = int(fields.get(f"{_PREFIX}add_space_prefix", True))
    squeeze = int(fields.get(f"{_PREFIX}remove_extra_whitespaces", False))
    normalizer = _message(1, b"identity") + _number(3, prefix) + _number(4, squeeze) + _number(5, 1)
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    # Negative numbers are 64-bit two's complement.
    value &= (1 << 64) - 1
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _number(field: int, value: int) -> bytes:
    """A field of protocol buffers with a whole number."""
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    """A field of protocol buffers with bytes, text or a message."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content
