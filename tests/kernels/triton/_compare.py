"""How a kernel's outputs and gradients are compared with those of a float64 reference."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-3}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def results(run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What `run` returns, and the gradients of the inputs under a random linear loss of it.

    The loss's weights are bfloat16 numbers, so that outputs of every dtype get the same ones as gradients.
    """
    outputs = list(run(*inputs))
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for seed, output in enumerate(outputs):
        if output.requires_grad:
            weights = random(*output.shape, seed=seed + 1000, dtype=torch.bfloat16).detach().double()
            loss = loss + (output.double() * weights).sum()
    return [*outputs, *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])]


def error(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """‖a − b‖ / max(‖b‖, floor), in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(floor)).item()


def assert_matches(
    run: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    tolerance: float | None = None,
    floor: float = 1e-30,
) -> None:
    """`run` on the inputs equals `reference` on the same numbers in float64, in every output and gradient.

    Errors are relative to the tensor's norm, or to `floor` where that is more: for gradients that can cancel to zero.
    """
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    wide = [x.detach().double().requires_grad_() if x.requires_grad else x for x in inputs]
    pairs = zip(results(run, inputs), results(reference, wide), strict=True)
    for index, (actual, expected) in enumerate(pairs):
        assert actual.shape == expected.shape, f"tensor {index}"
        assert actual.isfinite().all(), f"tensor {index}"
        found = error(actual, expected, floor)
        assert found <= tolerance, f"tensor {index}: {found:.1e}"
