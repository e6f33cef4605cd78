"""The state of a prompt, in memory and in a file."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.decoder import Decoder

_FORMAT = "spiketrain-generation-state-1"


@dataclass(frozen=True)
class Snapshot:
    """What a model carries after a prompt. It belongs to the weights that computed it.

    Under tensor parallelism, each rank has the snapshot of its own part of the model, and saves it to its own file.

    Attributes:
        tokens: The prompt.
        tensors: States by layer and name, as models.generation.states.State.export gives them.
        model: What `fingerprint` gives of the model.
    """

    tokens: tuple[int, ...]
    tensors: dict[str, Tensor]
    model: str

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {name: x.contiguous() for name, x in self.tensors.items()}
        facts = {"format": _FORMAT, "tokens": json.dumps(self.tokens), "model": self.model}
        save_file(tensors, str(path), facts)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "Snapshot":
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file holds no snapshot.
        """
        with safe_open(str(path), "pt", device=device) as file:
            facts = file.metadata() or {}
            if facts.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no generation state: save one with Snapshot.save")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            return cls(tuple(json.loads(facts["tokens"])), tensors, facts["model"])


def fingerprint(model: Decoder) -> str:
    """A digest of what determines the states' shapes and meaning, other than the weights' values."""
    rank = (dist.get_rank(group), dist.get_world_size(group)) if (group := model.groups.tensor) else (0, 1)
    facts = repr((model.model_config, model.head_weight.shape, model.head_weight.dtype, rank))
    return hashlib.sha256(facts.encode()).hexdigest()
