"""One rank of test_linear_cross_entropy_sharded: its part of the vocabulary against the whole on one rank."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would keep, with its threads, as a default argument
import torch.nn.functional as F
from torch import Tensor

from kernels.embedding import sharded_embedding
from kernels.losses import _blocks
from kernels.losses.distillation import distillation_kl, distillation_kl_reference
from kernels.losses.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.losses.token_log_probs import token_log_probs, token_log_probs_reference
from kernels.triton import usable
from tests.interpreter import round_to_nearest
from tests.kernels.test_linear_cross_entropy import _LargestOutput

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
TOKENS, WIDTH, ROWS = 37, 12, 17  # several blocks of tokens; rows of the vocabulary on each rank
BLOCK_TOKENS = 5


def make_case(name: str, world: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels and token weights; the first two in float64."""
    generator = torch.Generator().manual_seed(0)
    tokens = 1 if name == "one token" else TOKENS
    rows = world if name == "one row a rank" else ROWS * world
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, rows, (tokens,), generator=generator)
    token_weights = torch.rand(tokens, generator=generator)
    if name == "masked":
        labels[torch.rand(tokens, generator=generator) < 0.3] = _blocks.IGNORE_LABEL
        token_weights[torch.rand(tokens, generator=generator) < 0.3] = 0
        labels[:BLOCK_TOKENS] = _blocks.IGNORE_LABEL  # a whole block of tokens
    elif name == "large logits":
        hidden *= 1e3
    elif name == "labels on the first rank":
        labels %= ROWS
    elif name == "labels on the last rank":
        labels = labels % ROWS + ROWS * (world - 1)
    elif name == "borders":
        borders = torch.arange(world + 1) * ROWS
        labels[: 2 * world] = torch.cat((borders[:-1], borders[1:] - 1))
    return hidden, weight, labels, token_weights


CASES = ["masked", "large logits", "labels on the first rank", "labels on the last rank", "borders", "one token"]
CASES += ["one row a rank"]


def part(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Cut out this rank's rows."""
    return whole.detach().chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, in the precision of the comparison: what bfloat16 loses in a sum is not under test."""
    x = x.detach().double().contiguous()
    dist.all_reduce(x, group=group)
    return x


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' tensors, one below the other."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: {error:.1e}"


def check_loss(
    case: str, dtype: torch.dtype, backend: str, factor: float, device: str, group: dist.ProcessGroup
) -> None:
    hidden, weight, labels, token_weights = make_case(case, dist.get_world_size(group))
    hidden, weight = (x.to(device, dtype) for x in (hidden, weight))
    labels, token_weights = labels.to(device), token_weights.to(device)
    # Large logits rounded to bfloat16 are off by whole units, on one rank as on many.
    wide = dtype if (case, dtype) == ("large logits", torch.bfloat16) else torch.float64
    exact = [x.detach().clone().to(wide).requires_grad_() for x in (hidden, weight)]
    expected, expected_nll = linear_cross_entropy_reference(*exact, labels, token_weights)
    (factor * expected).backward()

    leaves = [hidden.requires_grad_(), part(weight, group).requires_grad_()]
    loss, nll = linear_cross_entropy(*leaves, labels, token_weights, group=group, backend=backend)
    (factor * loss).backward()
    assert loss.dtype == nll.dtype == torch.promote_types(dtype, torch.float32)
    assert not nll.requires_grad and loss.dim() == 0
    assert [x.grad.dtype for x in leaves] == [dtype, dtype]
    assert_close("loss", loss, expected, TOLERANCE[dtype])
    assert_close("nll", nll, expected_nll, TOLERANCE[dtype])
    assert_close("d_hidden", summed(leaves[0].grad, group), exact[0].grad, TOLERANCE[dtype])
    assert_close("d_weight", gathered(leaves[1].grad, group), exact[1].grad, TOLERANCE[dtype])
    assert len(gathered(torch.cat((loss[None], nll))[None], group).unique(dim=0)) == 1, "the ranks' losses differ"


def check_losses(device: str, group: dist.ProcessGroup) -> None:
    backends = {dtype: ["torch", "reference"] for dtype in TOLERANCE}
    for dtype in TOLERANCE:
        if usable(torch.empty(0, dtype=dtype, device=device)):
            backends[dtype].append("triton")
    for dtype, names in backends.items():
        for backend in names:
            # The interpreter is slow, and test_halves_of_a_softmax has more of Triton's own cases.
            for index, case in enumerate(CASES[:3] if backend == "triton" and device == "cpu" else CASES):
                factor = 1.0 if index % 2 else 3.0
                try:
                    check_loss(case, dtype, backend, factor, device, group)
                except AssertionError as error:
                    where = f"{case}, {dtype}, {backend}, rank {dist.get_rank(group)} of {dist.get_world_size(group)}"
                    raise AssertionError(f"{where}: {error}") from error


def check_work(device: str, group: dist.ProcessGroup) -> None:
    """One exchange a block of tokens; of the logits, one block of this rank's; of the gradients, what is asked for."""
    hidden, weight, labels, _ = make_case("masked", dist.get_world_size(group))
    hidden, labels, weight = hidden.to(device), labels.to(device), part(weight, group).to(device).requires_grad_()
    exchanges = []
    exchange: Callable[..., object] = dist.all_gather

    def counted(outputs: list[Tensor], *args: object, **kwargs: object) -> object:
        exchanges.append(outputs)
        return exchange(outputs, *args, **kwargs)

    dist.all_gather = counted
    blocks = -(-TOKENS // BLOCK_TOKENS)
    with _LargestOutput() as largest:
        linear_cross_entropy(hidden, weight, labels, group=group, backend="torch")[0].backward()
    assert len(exchanges) == blocks
    assert largest.numel == ROWS * WIDTH  # the gradient of weight; all tokens' logits are three times as many
    assert largest.matmuls == 2 * blocks  # logits and the gradient of weight
    with torch.no_grad(), _LargestOutput() as largest:
        linear_cross_entropy(hidden, weight, labels, group=group, backend="torch")
    assert (len(exchanges), largest.matmuls) == (2 * blocks, blocks)
    dist.all_gather = exchange


def check_log_probs(device: str, group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    # Padding that takes the end of a rank's rows, and all of the last rank's.
    sizes = {"masked": None, "borders": ROWS * world - 3, "labels on the first rank": ROWS, "one token": None}
    for dtype, backends in ((torch.float64, ("torch", "reference")), (torch.float32, ("torch", "triton"))):
        for backend in backends:
            if backend == "triton" and not usable(torch.empty(0, dtype=dtype, device=device)):
                continue
            for case, vocab_size in sizes.items():
                try:
                    check_log_probs_of(case, dtype, backend, vocab_size, device, group)
                except AssertionError as error:
                    where = f"{case}, {dtype}, {backend}, rank {dist.get_rank(group)} of {world}"
                    raise AssertionError(f"{where}: {error}") from error


def check_log_probs_of(
    case: str, dtype: torch.dtype, backend: str, vocab_size: int | None, device: str, group: dist.ProcessGroup
) -> None:
    hidden, weight, tokens, _ = (x.to(device) for x in make_case(case, dist.get_world_size(group)))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if vocab_size is not None:
        tokens = tokens.clamp(max=vocab_size - 1)
    generator = torch.Generator().manual_seed(3)
    factors = torch.randn(2, len(tokens), generator=generator, dtype=torch.float64).to(device)
    exact = [x.double().clone().requires_grad_() for x in (hidden, weight)]
    expected = token_log_probs_reference(*exact, tokens, 1.4, vocab_size=vocab_size)
    sum((x * factor).sum() for x, factor in zip(expected, factors)).backward()

    leaves = [hidden.clone().requires_grad_(), part(weight, group).requires_grad_()]
    options = {"temperature": 1.4, "vocab_size": vocab_size, "group": group, "backend": backend}
    found = token_log_probs(*leaves, tokens, **options)
    sum((x * factor).sum() for x, factor in zip(found, factors)).backward()
    for name, actual, whole in zip(("log_probs", "entropies"), found, expected):
        assert_close(name, actual, whole, TOLERANCE[dtype])
    assert_close("d_hidden", summed(leaves[0].grad, group), exact[0].grad, TOLERANCE[dtype])
    assert_close("d_weight", gathered(leaves[1].grad, group), exact[1].grad, TOLERANCE[dtype])
    assert len(gathered(torch.stack(found)[None], group).unique(dim=0)) == 1, "the ranks' results differ"


@contextmanager
def counted_exchanges() -> Iterator[list[int]]:
    """The elements that each collective in here sends."""
    sent: list[int] = []

    def counted(exchange: Callable[..., object]) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            sent.append(args[1].numel())
            return exchange(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce", "broadcast", "reduce_scatter", "all_to_all", "send", "recv"):
            patch.setattr(dist, name, counted(getattr(dist, name)))
        yield sent


def check_log_probs_exchanges(device: str, group: dist.ProcessGroup) -> None:
    """One for all tokens, of three numbers each or two, and none in the backward."""
    hidden, weight, tokens, _ = make_case("masked", dist.get_world_size(group))
    hidden, tokens, weight = hidden.to(device), tokens.to(device), part(weight, group).to(device).requires_grad_()
    with counted_exchanges() as sent:
        log_probs, entropies = token_log_probs(hidden, weight, tokens, group=group, backend="torch")
        (log_probs.sum() + entropies.sum()).backward()
        assert sent == [3 * TOKENS]
        with torch.no_grad():
            token_log_probs(hidden, weight, tokens, entropy=False, group=group, backend="torch")
        assert sent == [3 * TOKENS, 2 * TOKENS]


def make_teacher(tokens: int, rows: int, device: str) -> tuple[Tensor, Tensor]:
    """Hidden states and head of a wider model, in float64."""
    generator = torch.Generator().manual_seed(4)
    shapes = (tokens, WIDTH + 3), (rows, WIDTH + 3)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes)
    return hidden, weight


def check_distillation(
    case: str, dtype: torch.dtype, backend: str, direction: str, device: str, group: dist.ProcessGroup
) -> None:
    """Loss, divergences and gradients of a vocabulary that is cut, against the whole in float64."""
    hidden, weight, _, token_weights = (x.to(device) for x in make_case(case, dist.get_world_size(group)))
    inputs = [x.to(dtype) for x in (hidden, weight, *make_teacher(len(hidden), len(weight), device))]
    exact = [x.double().clone().requires_grad_(i < 2) for i, x in enumerate(inputs)]
    expected, expected_kl = distillation_kl_reference(*exact, token_weights, direction, 1.4)
    expected.backward()

    hidden, weight, teacher_hidden, teacher_weight = inputs
    leaves = [hidden.clone().requires_grad_(), part(weight, group).requires_grad_()]
    options = {"direction": direction, "temperature": 1.4, "group": group, "backend": backend}
    loss, kl = distillation_kl(*leaves, teacher_hidden, part(teacher_weight, group), token_weights, **options)
    loss.backward()
    assert_close("loss", loss, expected, TOLERANCE[dtype])
    assert_close("kl", kl, expected_kl, TOLERANCE[dtype])
    assert_close("d_hidden", summed(leaves[0].grad, group), exact[0].grad, TOLERANCE[dtype])
    assert_close("d_weight", gathered(leaves[1].grad, group), exact[1].grad, TOLERANCE[dtype])
    assert len(gathered(torch.cat((loss[None], kl))[None], group).unique(dim=0)) == 1, "the ranks' losses differ"


def check_distillations(device: str, group: dist.ProcessGroup) -> None:
    # Of large logits the student's choice is certain: the reverse divergence has no gradient but rounding.
    cases = [(case, direction) for case in CASES for direction in ("forward", "reverse")]
    cases.remove(("large logits", "reverse"))
    for dtype, backends in ((torch.float64, ("torch", "reference")), (torch.float32, ("torch", "triton"))):
        for backend in backends:
            if backend == "triton" and not usable(torch.empty(0, dtype=dtype, device=device)):
                continue
            # The interpreter is slow.
            for case, direction in cases[:2] if backend == "triton" and device == "cpu" else cases:
                try:
                    check_distillation(case, dtype, backend, direction, device, group)
                except AssertionError as error:
                    where = f"{case}, {dtype}, {backend}, {direction}, rank {dist.get_rank(group)}"
                    raise AssertionError(f"{where}: {error}") from error


def check_distillation_exchanges(device: str, group: dist.ProcessGroup) -> None:
    """One of three numbers a token for each block, and none in the backward."""
    hidden, weight, _, _ = (x.to(device) for x in make_case("masked", dist.get_world_size(group)))
    teacher_hidden, teacher_weight = make_teacher(len(hidden), len(weight), device)
    leaves = hidden.requires_grad_(), part(weight, group).requires_grad_()
    with counted_exchanges() as sent:
        distillation_kl(*leaves, teacher_hidden, part(teacher_weight, group), group=group)[0].backward()
    blocks = [BLOCK_TOKENS] * (TOKENS // BLOCK_TOKENS) + [TOKENS % BLOCK_TOKENS]
    assert sent == [3 * tokens for tokens in blocks]


def check_embedding(device: str, group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, ROWS * world, (3, TOKENS), generator=generator).to(device)
    tokens[0, : 2 * world] = make_case("borders", world)[2][: 2 * world]
    whole = torch.randn(ROWS * world, WIDTH, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    grad = torch.randn(3, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(device)
    expected = F.embedding(tokens, whole)
    expected.backward(grad)

    here = tokens.div(ROWS, rounding_mode="floor") == rank
    leaf = part(whole, group).requires_grad_()
    x = sharded_embedding(tokens, leaf, group)
    assert torch.equal(x[here], expected[here]) and not x[~here].any()
    # What reaches tokens of other ranks is nothing to this one, be it as it may.
    x.backward(grad.masked_fill(~here[..., None], torch.nan))
    assert torch.equal(summed(x, group), expected)
    assert_close("d_weight", gathered(leaf.grad, group), whole.grad, 1e-14)


def check_tied(device: str, group: dist.ProcessGroup) -> None:
    """Embedding and head of one weight: the loss's partial gradient of hidden, summed, enters the embedding."""
    _, whole, labels, token_weights = (x.to(device) for x in make_case("masked", dist.get_world_size(group)))
    tokens = labels.clamp(min=0).flip(0)
    whole.requires_grad_()
    expected, _ = linear_cross_entropy_reference(F.embedding(tokens, whole), whole, labels, token_weights)
    expected.backward()

    leaf = part(whole, group).requires_grad_()
    x = sharded_embedding(tokens, leaf, group)
    hidden = summed(x, group).requires_grad_()
    loss, _ = linear_cross_entropy(hidden, leaf, labels, token_weights, group=group)
    loss.backward()
    x.backward(summed(hidden.grad, group))
    assert_close("loss", loss, expected, 1e-10)
    assert_close("d_weight", gathered(leaf.grad, group), whole.grad, 1e-10)


def main(backend: str) -> None:
    torch.set_num_threads(1)
    device = "cuda" if backend == "nccl" else "cpu"
    if device == "cpu" and usable(torch.empty(0)):
        round_to_nearest()
    dist.init_process_group(backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    _blocks.block_tokens = lambda weight: BLOCK_TOKENS
    _blocks._SOFTMAX_ELEMENTS = 2 * ROWS  # rows by two
    group = dist.group.WORLD
    check_losses(device, group)
    check_work(device, group)
    check_log_probs(device, group)
    check_log_probs_exchanges(device, group)
    check_distillations(device, group)
    check_distillation_exchanges(device, group)
    check_embedding(device, group)
    check_tied(device, group)
    if world > 2:  # ranks in a group that are not those in the world
        pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
        check_tied(device, pairs[rank // 2])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
