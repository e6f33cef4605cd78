"""GGUF files of Llama, Qwen2 and Qwen3 models: what llama.cpp reads, often quantised.

A file is read as the Hugging Face directory that it was made from: its numbers become keys of config.json, its tensors
get the names of transformers, and its tokenizer becomes files. Tensors are dequantised to float32 when they are read,
only the rows that are asked for. llama.cpp pairs neighbouring channels in its rotation where transformers pairs the
halves of a head, so that the rows of Llama's queries and keys are stored in another order; they are put back.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from models.hub.registry import from_hub
from models.hub.tensors import Index
from trainer.errors import ConfigError
from trainer.stored.gguf_tokenizer import tokenizer_files
from trainer.stored.on_disk import Weights, hub_weights
from trainer.stored.tensor_files import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# By transformers' key: GGUF's, after the architecture's name.
_NUMBERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    # Refused where they ask for something.
    "sliding_window": "attention.sliding_window",
    "num_local_experts": "expert_count",
    "logit_scale": "logit_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
}
# Follow from others, or describe how the file was made.
_REDUNDANT = ("vocab_size", "attention.value_length", "rope.dimension_count", "expert_used_count", "tensor_data_layout")
_SCALING = "rope.scaling."
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"
# Parameters of Llama 3's rule besides its factor, which the file does not name.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GgufTensor(StoredTensor):
    """A tensor in a GGUF file; its dtype is GGUF's, such as Q4_K.

    Attributes:
        stored: The reader's tensor; its data are mapped from the file.
        heads: Heads whose rows are in llama.cpp's order; 0 for rows in their own.
    """

    stored: Any
    heads: int = 0

    def read(self, index: Index = ()) -> "Tensor":
        """Dequantise a block to float32; without an index the whole tensor."""
        import torch
        from gguf.quants import dequantize

        first, rest = (index[0], index[1:]) if index else (slice(0, self.shape[0]), ())
        assert isinstance(first, slice), "rows are read as ranges"
        rows = np.arange(first.start, first.stop)
        if self.heads:
            size = self.shape[0] // self.heads
            # Row (head, half, pair) of transformers is row (head, pair, half) of llama.cpp.
            head, row = np.divmod(rows, size)
            half, pair = np.divmod(row, size // 2)
            rows = head * size + pair * 2 + half
        # A copy: dequantize may return a view of the file.
        numbers = np.array(dequantize(self.stored.data[rows], self.stored.tensor_type), np.float32)
        tensor: Tensor = torch.from_numpy(numbers)[(slice(None), *rest)]
        return tensor


def open_gguf(path: Path) -> Weights:
    """Open a GGUF file. Its tokenizer lies in a directory that exists until the process ends.

    Raises:
        ConfigError: it is none, or holds a model of another kind.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; name a GGUF file")
    facts = path.stat()
    return _open(path, facts.st_mtime_ns, facts.st_size)


# A run asks for its weights several times, and parsing a vocabulary takes seconds.
@lru_cache(maxsize=2)
def _open(path: Path, time: int, size: int) -> Weights:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path, "r")
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ConfigError(f"{path} is not a whole GGUF file ({error}); get it again") from error
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(fields, stored)
        model = from_hub(config)
    except KeyError as error:
        raise ConfigError(f"{path} has no {error.args[0]}; give a whole model") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    heads = _permuted_heads(config)
    tensors = {
        (name := _hub_name(own)): GgufTensor(
            path,
            tuple(int(length) for length in reversed(tensor.shape)),
            tensor.tensor_type.name,
            0,
            tensor,
            heads.get(name.partition("self_attn.")[2], 0),
        )
        for own, tensor in stored.items()
        if own != _FREQUENCIES
    }
    return hub_weights(path, config, model, dict(tensors), _tokenizer(path, fields))


def _config(fields: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model that the file was made from.

    Raises:
        ValueError: it is of another architecture, or its rotation cannot be told.
        KeyError: a field is missing.
    """
    kind = fields["general.architecture"]
    if kind not in _ARCHITECTURES:
        raise ValueError(f"general.architecture={kind!r} is not supported; {', '.join(_ARCHITECTURES)} are")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items() if name.startswith(f"{kind}.")}
    config = {key: own.pop(name) for key, name in _NUMBERS.items() if name in own}
    # Written as 0 where there is none.
    config = {key: value for key, value in config.items() if value != 0}
    size = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if own.get("rope.dimension_count", size) != size:
        config["partial_rotary_factor"] = own["rope.dimension_count"] / size
    config |= {"model_type": kind, "vocab_size": int(stored["token_embd.weight"].shape[1])}
    config["tie_word_embeddings"] = "output.weight" not in stored
    config["rope_scaling"] = _scaling(own, config, stored)
    for name in ("bos", "eos", "padding"):
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name.removesuffix('ding')}_token_id"] = int(token)
    # The rest is unknown, and reported as such.
    return config | {
        f"{kind}.{name}": value
        for name, value in own.items()
        if name not in _REDUNDANT and not name.startswith(_SCALING)
    }


def _scaling(own: Mapping[str, Any], config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling`: of the file's fields, or Llama 3's rule if the file's factors are those that it gives.

    Raises:
        ValueError: the factors are others.
    """
    values = {name.removeprefix(_SCALING): value for name, value in own.items() if name.startswith(_SCALING)}
    kind = values.pop("type", "none")
    if _FREQUENCIES in stored:
        return _llama3(np.array(stored[_FREQUENCIES].data, np.float64), config)
    if kind == "none":
        return None
    spelled = {"original_context_length": "original_max_position_embeddings", "attn_factor": "attention_factor"}
    spelled |= {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    known = {spelled.get(name, name): value for name, value in values.items() if name != "finetuned"}
    return {"rope_type": kind, **known}


def _llama3(factors: "np.ndarray[Any, Any]", config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of Llama 3's rule, of which the file stores only the factor of each pair's wavelength."""
    import torch

    from kernels.rotary import frequencies
    from models.config import RopeScalingConfig

    rule = RopeScalingConfig("llama3", float(factors.max()), 8192, 1.0, 4.0)
    size, theta = config["head_dim"], config.get("rope_theta", 10000.0)
    given = frequencies(size, theta) / frequencies(size, theta, rule.rotary())
    if factors.shape != (size // 2,) or not torch.allclose(given.double(), torch.from_numpy(factors), rtol=1e-4):
        raise ValueError(f"{_FREQUENCIES} scales the rotation in another way than Llama 3's rule, which is supported")
    return {"rope_type": "llama3", "factor": rule.factor, **_LLAMA3}


def _hub_name(name: str) -> str:
    """The name that transformers gives a tensor; GGUF's own if there is none."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, module, kind = match.groups()
        return f"model.layers.{layer}.{_INNER[module]}.{kind}" if module in _INNER else name
    module, _, kind = name.partition(".")
    return f"{_OUTER[module]}.{kind}" if module in _OUTER else name


def _permuted_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Heads of the projections whose rows are in llama.cpp's order: those of Llama alone."""
    if config["model_type"] != "llama":
        return {}
    heads = config["num_attention_heads"]
    return {"q_proj.weight": heads, "k_proj.weight": config.get("num_key_value_heads") or heads}


_FOLDERS: dict[Path, "TemporaryDirectory[str]"] = {}


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> Path | None:
    """Write the file's tokenizer to a directory; None if it has none that can be written."""
    try:
        files = tokenizer_files(fields)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not files:
        return None
    # Kept: the directory goes when its object does.
    _FOLDERS[path] = TemporaryDirectory(prefix="spiketrain_gguf_")
    folder = Path(_FOLDERS[path].name)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
