"""What transformers reads beside the tensors: which tokens end and begin a text, and how text becomes tokens."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.tokenizer import Tokenizer, named_token, token_config
from trainer.json_files import parse_object

_GENERATION, _TOKENS = "generation_config.json", "tokenizer_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Has AutoTokenizer take tokenizer.json as it is, where the type of the model would choose a class that does not.
_PLAIN_CLASS = "PreTrainedTokenizerFast"
# What transformers' Qwen2Tokenizer puts in place of the same parts of tokenizer.json (tokenization_qwen2.py, 5.x).
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class HubFiles(NamedTuple):
    """What an export to Hugging Face's layout has beside tensors and the shape of the model.

    Attributes:
        ids: The keys of config.json, bos_token_id and so on.
        files: What to write in place of the tokenizer's files of these names.
        notes: What to know of them.
    """

    ids: dict[str, Any]
    files: dict[str, bytes]
    notes: list[str]


def hub_files(folder: Path | None, kind: str, rows: int) -> HubFiles:
    """The files for a model of a type, llama, qwen2 or qwen3, with the tokenizer in a folder, if it has one.

    Args:
        folder: With the tokenizer that the model was trained with.
        kind: The model's type.
        rows: Of its embedding.

    Raises:
        ConfigError: a file of the tokenizer cannot be read.
    """
    if folder is None:
        note = "the model has no tokenizer: nothing in config.json says which token ends a text"
        return HubFiles(dict.fromkeys(_IDS), {}, [note])
    tokenizer = Tokenizer.load(folder)
    files, notes = {}, _notes(tokenizer, folder, kind, rows)
    generation = _read(tokenizer, folder / _GENERATION)
    ids = {key: generation.get(key, _id_of(tokenizer, key.removesuffix("_id"))) for key in _IDS}
    ends = ids["eos_token_id"]
    # A model stops at what ended documents in training, whatever else ends the turns of a chat.
    ids["eos_token_id"] = _with(ends, tokenizer.eod_id)
    if generation.get("eos_token_id") is None or ids["eos_token_id"] != ends:
        if generation:
            notes.append(f"{_GENERATION}: eos_token_id {ends} becomes {ids['eos_token_id']}, which ended documents")
        known = {key: value for key, value in ids.items() if value is not None}
        files[_GENERATION] = _json(generation | known)
    tokens = _read(tokenizer, folder / _TOKENS)
    added = {} if "tokenizer_class" in tokens else {"tokenizer_class": _PLAIN_CLASS}
    if named_token(token_config(tokenizer.files), "eos_token") is None:
        # Of a tokenizer.json alone transformers knows no end.
        added["eos_token"] = tokenizer.eod
    if added:
        files[_TOKENS] = _json(tokens | added)
    return HubFiles(ids, files, notes)


def imported_files(source: Path, config: dict[str, Any]) -> dict[str, bytes]:
    """The generation_config.json of a model that says in config.json alone which tokens end and begin a text."""
    known = {key: config[key] for key in _IDS if config.get(key) is not None}
    return {_GENERATION: _json(known)} if known and not (source / _GENERATION).is_file() else {}


def _read(tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """What a JSON file of a tokenizer holds; nothing where there is no such file.

    Raises:
        ConfigError: it is not a JSON object.
    """
    content = tokenizer.model if tokenizer.model_name == path.name else tokenizer.files.get(path.name, b"{}")
    return parse_object(content, path, "copy the tokenizer again")


def _id_of(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of a special token that the tokenizer's files name; of a SentencePiece model alone, of its own `<s>`."""
    config = token_config(tokenizer.files)
    default = "<s>" if name == "bos_token" and not config else None
    token = named_token(config, name) or default
    return None if token is None else tokenizer.token_id(token)


def _with(ends: int | list[int] | None, eod_id: int) -> int | list[int]:
    """The tokens that end a text with one more among them; one alone is no list."""
    if ends is None:
        return eod_id
    known = ends if isinstance(ends, list) else [ends]
    return ends if eod_id in known else [*known, eod_id]


def _notes(tokenizer: Tokenizer, folder: Path, kind: str, rows: int) -> list[str]:
    """Where transformers makes other tokens of a text than training did, or may draw what is none."""
    notes = []
    tokens = token_config(tokenizer.files)
    json_file = _read(tokenizer, folder / "tokenizer.json")
    rebuilt = kind == "qwen2" or str(tokens.get("tokenizer_class")).removesuffix("Fast") == "Qwen2Tokenizer"
    if rebuilt and not _is_qwen2(json_file):
        notes.append(
            "transformers' AutoTokenizer splits text by Qwen2's own rules for this model, which are not this "
            "tokenizer's: load it with PreTrainedTokenizerFast.from_pretrained"
        )
    if not json_file:
        notes.append(
            "transformers converts tokenizer.model, and may give a few texts other tokens, such as those with U+2581; "
            "SentencePiece gives those of training"
        )
    if rows > tokenizer.vocab_size:
        notes.append(
            f"rows {tokenizer.vocab_size} to {rows - 1} of the embedding stand for no token; transformers may draw them"
        )
    return notes


def _is_qwen2(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json splits text as Qwen2Tokenizer does."""
    split = tokenizer.get("pre_tokenizer") or {}
    steps = [dict(step) for step in split.get("pretokenizers", [])]
    wanted = [
        {"type": "Split", "pattern": {"Regex": _QWEN2_PATTERN}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    # What ByteLevel trims are offsets.
    for step in steps:
        step.pop("trim_offsets", None)
    return tokenizer.get("normalizer") == {"type": "NFC"} and steps == wanted


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
