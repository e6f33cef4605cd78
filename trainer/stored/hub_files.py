"""Files that transformers reads beside the tensors: ids of special tokens, and tokenizer settings."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.tokenizer import Tokenizer, named_token, token_config
from trainer.json_files import parse_object
from trainer.stored.gguf_tokenizer import QWEN2

_GENERATION, _TOKENS = "generation_config.json", "tokenizer_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Makes AutoTokenizer use tokenizer.json as it is. Otherwise the model type may select a class that rewrites it.
_PLAIN_CLASS = "PreTrainedTokenizerFast"


class HubFiles(NamedTuple):
    """Additions of an export to the Hugging Face layout, besides tensors and model shape.

    Attributes:
        ids: Keys of config.json such as bos_token_id.
        files: Files to write, by name; they replace the tokenizer's files of the same names.
        notes: Caveats to report.
    """

    ids: dict[str, Any]
    files: dict[str, bytes]
    notes: list[str]


def hub_files(folder: Path | None, kind: str, rows: int) -> HubFiles:
    """Build the files for a model of type llama, qwen2 or qwen3, with the tokenizer in `folder` if there is one.

    Args:
        folder: Directory of the tokenizer that the model was trained with.
        kind: The model type.
        rows: Rows of the embedding.

    Raises:
        ConfigError: a tokenizer file cannot be read.
    """
    if folder is None:
        note = "the model has no tokenizer: nothing in config.json says which token ends a text"
        return HubFiles(dict.fromkeys(_IDS), {}, [note])
    tokenizer = Tokenizer.load(folder)
    files, notes = {}, _notes(tokenizer, folder, kind, rows)
    generation = _read(tokenizer, folder / _GENERATION)
    ids = {key: generation.get(key, _id_of(tokenizer, key.removesuffix("_id"))) for key in _IDS}
    ends = ids["eos_token_id"]
    # Generation stops at the token that ended documents in training, in addition to any end-of-turn tokens.
    ids["eos_token_id"] = _with(ends, tokenizer.eod_id)
    if generation.get("eos_token_id") is None or ids["eos_token_id"] != ends:
        if generation:
            notes.append(f"{_GENERATION}: eos_token_id {ends} becomes {ids['eos_token_id']}, which ended documents")
        known = {key: value for key, value in ids.items() if value is not None}
        files[_GENERATION] = _json(generation | known)
    tokens = _read(tokenizer, folder / _TOKENS)
    added = {} if "tokenizer_class" in tokens else {"tokenizer_class": _PLAIN_CLASS}
    if named_token(token_config(tokenizer.files), "eos_token") is None:
        # From tokenizer.json alone transformers does not know the end-of-text token.
        added["eos_token"] = tokenizer.eod
    if added:
        files[_TOKENS] = _json(tokens | added)
    return HubFiles(ids, files, notes)


def imported_files(source: Path, config: dict[str, Any]) -> dict[str, bytes]:
    """A generation_config.json for a model whose special token ids are only in config.json."""
    known = {key: config[key] for key in _IDS if config.get(key) is not None}
    return {_GENERATION: _json(known)} if known and not (source / _GENERATION).is_file() else {}


def _read(tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """Read a JSON file of the tokenizer; empty if there is no such file.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    content = tokenizer.model if tokenizer.model_name == path.name else tokenizer.files.get(path.name, b"{}")
    return parse_object(content, path, "copy the tokenizer again")


def _id_of(tokenizer: Tokenizer, name: str) -> int | None:
    """Id of a special token named by the tokenizer's files. A bare SentencePiece model has its own `<s>` as bos."""
    config = token_config(tokenizer.files)
    default = "<s>" if name == "bos_token" and not config else None
    token = named_token(config, name) or default
    return None if token is None else tokenizer.token_id(token)


def _with(ends: int | list[int] | None, eod_id: int) -> int | list[int]:
    """Add a token to those that end a text; a single token is not wrapped in a list."""
    if ends is None:
        return eod_id
    known = ends if isinstance(ends, list) else [ends]
    return ends if eod_id in known else [*known, eod_id]


def _notes(tokenizer: Tokenizer, folder: Path, kind: str, rows: int) -> list[str]:
    """Report where transformers tokenises differently from training, or may sample ids that are no tokens."""
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
    """Whether tokenizer.json splits text exactly as Qwen2Tokenizer does."""
    split = tokenizer.get("pre_tokenizer") or {}
    steps = [dict(step) for step in split.get("pretokenizers", [])]
    wanted = [
        {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    # ByteLevel's trim_offsets affects only character offsets, not tokens.
    for step in steps:
        step.pop("trim_offsets", None)
    return tokenizer.get("normalizer") == {"type": "NFC"} and steps == wanted


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
