"""A short training of a hybrid mixture of experts on the device: with Triton's kernels, and on the torch path.

In plain PyTorch, which needs no engine and none of its packages; and by the Megatron engine, where it can be imported.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kernels.backend import ENVIRONMENT_VARIABLE

_OPERATIONS = (
    "gla",
    "retention",
    "gated_delta_rule",
    "hgrn",
    "causal_conv1d",
    "rms_norm",
    "gated_rms_norm",
    "l2_norm",
    "swiglu",
    "swiglu_packed",
    "apply_rotary",
    "linear_cross_entropy",
    "top_k_gate",
    "dense_to_sparse_gate",
    "permute",
    "unpermute",
)
# Of bfloat16 activations on the two paths, after some steps: far below what a wrong gradient makes.
_LARGEST_DIFFERENCE = 0.03
_LEARNING_RATE = 3e-3


@contextmanager
def _backends(choice: str) -> Iterator[None]:
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def _choices(backend: str) -> str:
    # On a GPU the experts' products have no other path in every dtype than the plain one.
    grouped = "triton" if backend == "triton" else "reference"
    return ",".join([*(f"{op}={backend}" for op in _OPERATIONS), f"grouped_linear={grouped}"])


def _model_config(small: bool) -> Any:
    from models.config import (
        AttentionConfig,
        GatedDeltaNetConfig,
        GatedLinearAttentionConfig,
        MixerLayoutConfig,
        ModelConfig,
        MoEConfig,
    )

    head = 16 if small else 64
    return ModelConfig(
        num_layers=3,
        hidden_size=4 * head,
        ffn_hidden_size=8 * head,
        vocab_size=64,
        mixers=MixerLayoutConfig(pattern="gated_delta_net, gated_linear_attention, full_attention"),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1),
        gated_delta_net=GatedDeltaNetConfig(num_heads=2, head_dim=head),
        gated_linear_attention=GatedLinearAttentionConfig(num_heads=2),
        moe=MoEConfig(num_experts=4, expert_hidden_size=2 * head, dense_layers=[0]),
    )


def _sizes(device: torch.device) -> tuple[int, int, int]:
    """Rows, tokens and steps: real ones on a GPU."""
    return (8, 512, 30) if device.type == "cuda" else (1, 6, 2)


def _plain_losses(device: torch.device, backend: str) -> list[float]:
    from models.decoder import Decoder, initialize

    small = device.type != "cuda"
    batch, time, steps = _sizes(device)
    with torch.device(device):
        model = Decoder(_model_config(small), 64)
    initialize(model, 1)
    model = model.to(device, torch.float32 if small else torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    tokens = _repeating(batch, time + 1).to(device)
    losses = []
    with _backends(_choices(backend)):
        for _ in range(steps):
            loss = _loss(model, tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
    return losses


def _engine_losses(device: torch.device, backend: str) -> list[float]:
    """Mcore's schedule, DDP and distributed optimizer on one rank."""
    from trainer.data.batch import Batch
    from trainer.engines.megatron import MegatronEngine
    from trainer.engines.spec import EngineSpec
    from trainer.objectives.language_model import LanguageModel

    small = device.type != "cuda"
    rows, time, steps = _sizes(device)
    tokens = _repeating(rows, time + 1)
    batch = Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.ones(rows, time),
        torch.arange(time).repeat(rows, 1),
        None,
    )
    spec = EngineSpec(
        _model_config(small),
        64,
        precision="fp32" if small else "bf16",
        micro_batch_size=rows,
        global_batch_size=rows,
    )
    engine = MegatronEngine(spec, device)
    try:
        with _backends(_choices(backend)):
            return [engine.train_step([batch], LanguageModel(), _LEARNING_RATE, step).loss for step in range(steps)]
    finally:
        engine.close()


def _repeating(batch: int, time: int) -> Tensor:
    """Token ids `[B, T]`: eight at random, again and again.

    The same ones in every step: what is learned is them, which a right gradient does in any few steps.
    """
    period = torch.randint(64, (batch, 8), generator=torch.Generator().manual_seed(0))
    return period.repeat(1, -(-time // 8))[:, :time]


def _loss(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
    total, _ = model(inputs.contiguous(), positions, labels=labels.contiguous())
    mean: Tensor = total / labels.numel()
    return mean


def train(device: torch.device, *, by_engine: bool) -> dict[str, Any]:
    """The losses of both paths; wrong where they part, or where Triton's do not fall."""
    if by_engine and find_spec("megatron") is None:
        return {"state": "skipped", "message": "megatron-core is not installed"}
    losses: Callable[[torch.device, str], list[float]] = _engine_losses if by_engine else _plain_losses
    ours, plain = losses(device, "triton"), losses(device, "torch")
    apart = max(abs(a - b) / b for a, b in zip(ours, plain))
    faults = []
    if not ours[-1] < ours[0]:
        faults.append(f"the loss does not fall: {ours[0]:.3f} to {ours[-1]:.3f}")
    if not apart <= _LARGEST_DIFFERENCE:
        faults.append(f"the losses part from the torch path's by {apart:.1e} of {_LARGEST_DIFFERENCE:.0e}")
    return {
        "state": "wrong" if faults else "ok",
        "message": "; ".join(faults) or f"loss {ours[0]:.3f} to {ours[-1]:.3f}, as the torch path's on this device",
        "worst": "loss",
        "error": apart,
        "limit": _LARGEST_DIFFERENCE,
        "losses": ours,
        "torch_losses": plain,
    }
