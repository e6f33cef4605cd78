"""Mixtures of experts from dense models (sparse upcycling, arXiv 2212.05055). Imports neither megatron nor deepspeed.

Every routed and shared expert is a copy of the layer's feed-forward F. With S shared experts and gates that sum to
G(x), the layer computes (S + G(x)) F(x). Each of the three matrices of every copy is therefore scaled by

    alpha = (S + G)^(-1/3),  where G is the mean of G(x)

so that the output has the magnitude of F(x) (SpikingBrain, arXiv 2509.05276, section 3.2, whose G is k / N). This is
exact only for alpha = 1: SiLU is not homogeneous, and G is only the mean of G(x).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models.config import ModelConfig, MoEConfig
from models.decoder import shapes
from models.moe.router import Router
from models.moe.spawning import expected_gates, masked_copy
from models.parameters import cast_parameters, draw, seeded_generator
from trainer.errors import ConfigError
from trainer.stored import weights
from trainer.stored.source import DTYPES, Source, open_source


def upcycle(
    source: Path,
    output: Path,
    moe: MoEConfig,
    *,
    router_std: float,
    diversify: float,
    seed: int,
    precision: Literal["fp32", "bf16"],
    max_file_bytes: float,
    report: Callable[[str], None],
) -> Path:
    """Write weights of a mixture of experts whose experts are copies of a dense model's feed-forwards.

    Args:
        source: The dense model: a weights directory, a run directory or one of its checkpoints.
        output: Output directory: empty or absent.
        moe: Expert configuration; the gates at the first training step determine the scale.
        router_std: Standard deviation of the router weights.
        diversify: Fraction of each routed expert's weights that is set to zero, drawn independently for each expert;
            the rest is scaled by 1 / (1 - fraction), as in dropout. 0 keeps the experts identical.
        seed: Router weights and masks are drawn from (seed, name).
        precision: Dtype of the weights; routers and decays are always float32.
        max_file_bytes: Size above which several files are written.
        report: Called with the scale, and with a line per file.

    Returns:
        The checkpoint or directory that was read.

    Raises:
        ConfigError: there is no dense model at `source`, or `moe` does not fit it.
    """
    dense = open_source(source, precision)
    model = shapes(_with_experts(dense, moe), dense.vocab_size)
    cast_parameters(model, DTYPES[precision])
    gates = expected_gates(moe)
    # A gate of the shared experts begins at sigmoid(0).
    shared = moe.shared_experts * (0.5 if moe.shared_expert_gate else 1.0)
    alpha = (shared + gates) ** (-1 / 3)
    report(f"gates add up to {gates:.4g}: the experts' matrices are {alpha:.4g} of the dense ones")
    originals = dict(shapes(dense.model, dense.vocab_size).named_parameters())

    def read(tensors: dict[str, Tensor]) -> None:
        # Everything outside the experts (attention, norms, embedding) is taken over unchanged.
        dense.read({name: tensor for name, tensor in tensors.items() if name in originals})
        for name, tensor in tensors.items():
            if ".ffn.router." in name:
                tensor.copy_(_router(moe, dense.model.hidden_size, router_std, seed, name))
            elif ".ffn.shared_expert_gate." in name:
                tensor.zero_()
            elif name not in originals:
                # Routed and shared experts come from the same dense matrix. One matrix is in memory at a time.
                original = name.replace(".ffn.experts.", ".ffn.").replace(".ffn.shared_experts.", ".ffn.")
                matrix = torch.empty_like(originals[original], device="cpu")
                dense.read({original: matrix})
                _copy(alpha * matrix, tensor, diversify if ".ffn.experts." in name else 0.0, seed, name)

    weights.write(
        output,
        model,
        read,
        tokenizer=dense.tokenizer,
        max_file_bytes=max_file_bytes,
        report=report,
        max_positions=dense.max_positions,
    )
    return dense.path


def _with_experts(dense: Source, moe: MoEConfig) -> ModelConfig:
    """The dense model's configuration with experts added.

    Raises:
        ConfigError: the model already has experts, or the experts of `moe` have another width than its feed-forward.
    """
    if dense.model.moe.num_experts:
        raise ConfigError(f"source: {dense.path} has experts already; name a dense model")
    threshold = dense.model.spiking.threshold
    if threshold != "adaptive" and dense.model.spiking.is_used:
        raise ConfigError(
            f"source: {dense.path} has model.spiking.threshold={threshold}, whose numbers belong to the dense "
            "feed-forward; name a model with threshold=adaptive, or one without spikes"
        )
    width = dense.model.ffn_hidden_size
    if moe.expert_hidden_size not in (None, width):
        raise ConfigError(
            f"moe.expert_hidden_size is {moe.expert_hidden_size}, and the feed-forward of {dense.path} {width} wide; "
            "experts are copies of it: leave the key out"
        )
    try:
        return replace(dense.model, moe=moe)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _router(moe: MoEConfig, hidden_size: int, std: float, seed: int, name: str) -> Tensor:
    """The parameter or buffer of a new router, selected by the last part of `name`."""
    router = Router(moe, hidden_size)
    draw(router, ModelConfig(moe=moe), seed)
    nn.init.normal_(router.weight, std=std, generator=seeded_generator(seed, name))
    tensor: Tensor = router.state_dict()[name.rsplit(".", 1)[-1]]
    return tensor


def _copy(matrix: Tensor, into: Tensor, masked: float, seed: int, name: str) -> None:
    """Fill routed experts [E, O, D], or shared experts side by side in one matrix, with copies of a matrix [O, D]."""
    if into.dim() == 2:
        # Shared experts are concatenated along the inner channels: rows of gate and up, columns of down.
        into.copy_(matrix.repeat(into.shape[0] // matrix.shape[0], into.shape[1] // matrix.shape[1]))
        return
    for expert, copy in enumerate(into):
        copy.copy_(masked_copy(matrix, masked, seed, f"{name}.{expert}"))
