"""Gates: choose each token's experts from the router's logits, and compute the weights of the experts' outputs.

`top_k_gate` chooses k experts per token from scores s = softmax(z) or σ(z), with p = s / sum(s) over all experts:

    chosen = the k largest of s + bias, in the best groups only      (of z, if there are no bias and no groups)
    gates  = chosen · p            normalize = before: the scores of all experts sum to one
             chosen · s / sum(chosen · s)      after: the scores of the chosen experts sum to one
             chosen · s                        none
    times `scale`. The value of a group is the sum of its best k / group_top_k experts (DeepSeek-V3, arXiv:2412.19437,
    section 2.1.2). The bias, which balances loads without a loss, affects only the choice (same section).

`dense_to_sparse_gate` chooses a varying number (EvoMoE, arXiv:2112.14397; with an activation, arXiv:2401.13875):

    p = softmax(u / τ),   u = act(z) + noise
    keep = (p ≥ threshold, or the largest), limited to the first `max_experts` in order of u
    gates = keep · p, divided by their sum if renormalised

The hand-written backward, with q = gates / scale, g the gradient of the gates, and ⟨·,·⟩ a sum over experts:

    softmax      dz = p (dp − ⟨dp, p⟩)
    divide       d(chosen · s) = (g − ⟨g, q⟩) / sum(chosen · s)
    temperature  dτ = −sum(du · u) / τ,   du = dz of the softmax / τ

Arithmetic and results are float32 (float64 for float64 logits). All implementations break ties towards the lower index,
and all compare the quantity that rounds least: logits, activated logits, or biased scores. Values that differ only in
the last digit may be ordered differently by different implementations.

All implementations treat NaN as the largest value, and order NaNs by index. A token with a NaN logit therefore gets
the usual number of experts, one with a NaN gate, and its output is NaN, so the error shows. `dense_to_sparse_gate`
chooses one expert for such a token, because NaN reaches no threshold.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import once_differentiable, save
from kernels.backend import resolve
from kernels.triton import LARGEST_ROW, TINY, implementations

Score = Literal["softmax", "sigmoid"]
Normalize = Literal["before", "after", "none"]
Activation = Literal["none", "relu", "sigmoid", "tanh", "gelu", "silu"]

SCORES = ("softmax", "sigmoid")
NORMALIZATIONS = ("before", "after", "none")
ACTIVATIONS = ("none", "relu", "sigmoid", "tanh", "gelu", "silu")

_BACKENDS = ("torch", "reference")


def top_k_gate_reference(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    normalize: Normalize = "before",
    num_groups: int = 1,
    group_top_k: int = 1,
    bias_E: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`top_k_gate` in plain operations."""
    wide = _widen(logits_TE)
    scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    probs = scores if score == "softmax" else scores / (scores.sum(-1, keepdim=True) + TINY)
    values = _values(wide, scores, num_groups, bias_E)
    if num_groups > 1:
        grouped = values.unflatten(-1, (num_groups, -1))
        best = grouped.sort(dim=-1, descending=True).values[..., : top_k // group_top_k].sum(-1)
        in_group = _largest_by_sort(best, group_top_k)
        values = values.masked_fill(~in_group.repeat_interleave(grouped.shape[-1], -1), -torch.inf)
    chosen = _largest_by_sort(values, top_k)
    return probs, gates_of(wide, chosen, score=score, normalize=normalize, scale=scale), chosen


def gates_of(
    logits_TE: Tensor,
    chosen_TE: Tensor,
    *,
    score: Score = "softmax",
    normalize: Normalize = "before",
    scale: float = 1.0,
) -> Tensor:
    """Compute the gates of `top_k_gate` for experts that something else has chosen, by plain operations.

    Args:
        logits_TE: floating.
        chosen_TE: bool, at least one expert per token.
        score, normalize, scale: as in `top_k_gate`.

    Returns:
        gates_TE, zero except for the chosen experts, float32 (float64 for float64 logits); differentiable.
    """
    wide = _widen(logits_TE)
    if normalize == "after" and score == "softmax":
        return _keep(wide.masked_fill(~chosen_TE, -torch.inf).softmax(-1), chosen_TE) * scale
    scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    if normalize == "after":
        scores = scores / (_keep(scores, chosen_TE).sum(-1, keepdim=True) + TINY)
    elif normalize == "before" and score == "sigmoid":
        scores = scores / (scores.sum(-1, keepdim=True) + TINY)
    return _keep(scores, chosen_TE) * scale


def dense_to_sparse_gate_reference(
    logits_TE: Tensor,
    temperature: Tensor | float,
    threshold: float,
    *,
    activation: Activation = "none",
    noise_TE: Tensor | None = None,
    max_experts: int | None = None,
    renormalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dense_to_sparse_gate` in plain operations."""
    inner = _activate(_widen(logits_TE), activation)
    if noise_TE is not None:
        inner = inner + noise_TE
    probs = (inner / temperature).softmax(-1)
    keep = (probs >= threshold) | _largest_by_sort(inner, 1)
    if max_experts is not None:
        keep = keep & _largest_by_sort(inner, max_experts)
    gates = probs / _keep(probs, keep).sum(-1, keepdim=True) if renormalize else probs
    return probs, _keep(gates, keep), keep


def top_k_gate(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    normalize: Normalize = "before",
    num_groups: int = 1,
    group_top_k: int = 1,
    bias_E: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the top_k experts of each token.

    Args:
        logits_TE: floating.
        top_k: number of experts per token.
        score: "softmax" or "sigmoid".
        normalize: "before" makes the scores of all experts sum to one, "after" those of the chosen experts, "none"
            leaves them. With "after" and top_k = 1 every gate is `scale`, and no gradient flows through it.
        num_groups, group_top_k: number of groups of consecutive experts, all of equal size, and number of best groups
            from which experts are chosen.
        bias_E: added to the scores for the choice only; has no gradient.
        scale: a positive factor of the gates.
        backend: auto, reference, torch or triton.

    Returns:
        probs_TE, the scores of all experts divided by their sum, for balancing losses; gates_TE, zero except for the
        chosen experts; both float32 (float64 for float64 logits); and chosen_TE, bool, top_k per token.

    Raises:
        ValueError: an argument is out of range, or the backend cannot serve these inputs.
    """
    _check_choices("top_k_gate", ("score", score, SCORES), ("normalize", normalize, NORMALIZATIONS))
    _check_logits("top_k_gate", logits_TE)
    experts = logits_TE.shape[1]
    if not 1 <= top_k <= experts or not scale > 0:
        raise ValueError(
            f"top_k_gate: top_k {top_k} must be 1 to the number of experts of logits {tuple(logits_TE.shape)}, "
            f"[tokens, experts], and scale {scale} positive"
        )
    if bias_E is not None and bias_E.shape != (experts,):
        raise ValueError(f"top_k_gate: bias {tuple(bias_E.shape)} must be [{experts}], a number for each expert")
    _check_groups(experts, top_k, num_groups, group_top_k)
    available = implementations(_BACKENDS, logits_TE, bias_E, fits=experts <= LARGEST_ROW)
    choice = resolve("top_k_gate", backend, available)
    if choice == "reference":
        return top_k_gate_reference(
            logits_TE,
            top_k,
            score=score,
            normalize=normalize,
            num_groups=num_groups,
            group_top_k=group_top_k,
            bias_E=bias_E,
            scale=scale,
        )
    arguments = logits_TE, bias_E, top_k, score, normalize, num_groups, group_top_k, scale
    if choice == "triton":
        from kernels.triton import routing  # lazily: not every machine has Triton

        return routing.top_k_gate(*arguments)
    return _TopKGate.apply(*arguments)


def dense_to_sparse_gate(
    logits_TE: Tensor,
    temperature: Tensor | float,
    threshold: float,
    *,
    activation: Activation = "none",
    noise_TE: Tensor | None = None,
    max_experts: int | None = None,
    renormalize: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose every expert whose probability reaches the threshold, and always the most probable one.

    Args:
        logits_TE: floating.
        temperature: positive; a number, or a tensor of one element, which gets a gradient.
        threshold: the lowest probability that is kept.
        activation: applied to the logits before the noise. "none" and "relu" are positively homogeneous: scaling logits
            and temperature by the same factor changes nothing, so a learned temperature is meaningless with them.
        noise_TE: added to the activated logits, for example Gumbel noise; has no gradient.
        max_experts: keep at most this many, the most probable first; None sets no limit.
        renormalize: make the gates of a token sum to one.
        backend: auto, reference, torch or triton.

    Returns:
        probs_TE, of all experts; gates_TE, zero for experts that are not kept; both float32 (float64 for float64
        logits); and keep_TE, bool, at least one per token. With threshold 0, max_experts are kept: a hard top-k.

    Raises:
        ValueError: an argument is out of range, or the backend cannot serve these inputs.
    """
    _check_choices("dense_to_sparse_gate", ("activation", activation, ACTIVATIONS))
    _check_logits("dense_to_sparse_gate", logits_TE)
    experts = logits_TE.shape[1]
    if not 1 <= (experts if max_experts is None else max_experts) <= experts:
        raise ValueError(
            f"dense_to_sparse_gate: max_experts {max_experts} must be 1 to the number of experts of logits "
            f"{tuple(logits_TE.shape)}, [tokens, experts]"
        )
    if noise_TE is not None and noise_TE.shape != logits_TE.shape:
        raise ValueError(
            f"dense_to_sparse_gate: noise {tuple(noise_TE.shape)} must have the logits' shape {tuple(logits_TE.shape)}"
        )
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"dense_to_sparse_gate: temperature {temperature} must be positive")
        temperature = torch.full((), temperature, dtype=wide, device=logits_TE.device)
    elif temperature.numel() != 1:
        raise ValueError(f"dense_to_sparse_gate: temperature {tuple(temperature.shape)} must have one element")
    available = implementations(_BACKENDS, logits_TE, temperature, noise_TE, fits=experts <= LARGEST_ROW)
    choice = resolve("dense_to_sparse_gate", backend, available)
    if choice == "reference":
        return dense_to_sparse_gate_reference(
            logits_TE,
            temperature,
            threshold,
            activation=activation,
            noise_TE=noise_TE,
            max_experts=max_experts,
            renormalize=renormalize,
        )
    arguments = logits_TE, temperature, noise_TE, threshold, activation, max_experts or experts, renormalize
    if choice == "triton":
        from kernels.triton import routing

        return routing.dense_to_sparse_gate(*arguments)
    return _DenseToSparseGate.apply(*arguments)


def _check_logits(op: str, logits_TE: Tensor) -> None:
    if logits_TE.ndim != 2 or not logits_TE.is_floating_point():
        raise ValueError(
            f"{op}: logits must be floating [tokens, experts], not {logits_TE.dtype} {tuple(logits_TE.shape)}"
        )


def _check_choices(op: str, *choices: tuple[str, str, tuple[str, ...]]) -> None:
    for name, value, names in choices:
        if value not in names:
            raise ValueError(f"{op}: {name} must be one of {', '.join(names)}, not {value!r}")


def _check_groups(experts: int, top_k: int, num_groups: int, group_top_k: int) -> None:
    """Raise ValueError unless group_top_k groups hold top_k experts, and k / group_top_k is a whole number."""
    if num_groups < 1 or experts % num_groups or not 1 <= group_top_k <= num_groups:
        raise ValueError(
            f"top_k_gate: num_groups {num_groups} must divide {experts} experts, and group_top_k {group_top_k} be "
            f"1 to num_groups"
        )
    if num_groups > 1 and (top_k % group_top_k or top_k > group_top_k * (experts // num_groups)):
        raise ValueError(
            f"top_k_gate: top_k {top_k} must be a multiple of group_top_k {group_top_k} and at most "
            f"{group_top_k} groups of {experts // num_groups} experts"
        )


def _widen(x: Tensor) -> Tensor:
    """Convert x to the dtype of the arithmetic: float64 for float64, float32 for all others."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return x
    if activation == "gelu":
        return F.gelu(x)
    if activation == "silu":
        return F.silu(x)
    return x.relu() if activation == "relu" else x.sigmoid() if activation == "sigmoid" else x.tanh()


def _values(wide_TE: Tensor, scores_TE: Tensor, num_groups: int, bias_E: Tensor | None) -> Tensor:
    """Return the values that the choice compares: logits if they have the scores' order, because scores saturate."""
    if bias_E is not None:
        return (scores_TE + bias_E).detach()
    return (wide_TE if num_groups == 1 else scores_TE).detach()


def _keep(x_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Return x where the mask is true, else zero. Multiplying by the mask would keep a masked NaN."""
    return x_TE.masked_fill(~mask_TE, 0.0)


def _largest_by_sort(values_TE: Tensor, count: int) -> Tensor:
    """`largest` by a stable sort, its definition."""
    order = values_TE.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values_TE, dtype=torch.bool).scatter(-1, order, True)


def largest(values_TE: Tensor, count: int) -> Tensor:
    """Mark the `count` >= 1 largest values of each row. NaN is the largest, and ties go to the lower index.

    Uses topk, which is faster than a stable sort, and breaks its arbitrary ties here.
    """
    last_T1 = values_TE.topk(count, -1).values[..., -1:]
    nan, nan_T1 = values_TE.isnan(), last_T1.isnan()
    above = (values_TE > last_T1) | (nan & ~nan_T1)
    equal = (values_TE == last_T1) | (nan & nan_T1)
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _choose(values_TE: Tensor, top_k: int, num_groups: int, group_top_k: int) -> Tensor:
    """Choose the experts of `top_k_gate`."""
    if num_groups > 1:
        grouped = values_TE.unflatten(-1, (num_groups, -1))
        best = grouped.topk(top_k // group_top_k, -1).values.sum(-1)
        outside = ~largest(best, group_top_k)
        values_TE = grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)
    return largest(values_TE, top_k)


def _softmax_backward(grad_TE: Tensor, probs_TE: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(grad_TE, probs_TE, -1, probs_TE.dtype)


def _dot(a_TE: Tensor, b_TE: Tensor) -> Tensor:
    """Compute ⟨a, b⟩ of each row, `[T, 1]`."""
    return torch.linalg.vecdot(a_TE, b_TE).unsqueeze(-1)


class _TopKGate(torch.autograd.Function):
    """`top_k_gate`: saves the scores, the gates and the choice, and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        top_k: int,
        score: Score,
        normalize: Normalize,
        num_groups: int,
        group_top_k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = _widen(logits_TE)
        scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
        probs = scores if score == "softmax" else scores / (scores.sum(-1, keepdim=True) + TINY)
        chosen = _choose(_values(wide, scores, num_groups, bias_E), top_k, num_groups, group_top_k)
        if normalize == "after" and score == "softmax":
            gates = wide.masked_fill(~chosen, -torch.inf).softmax(-1)
        elif normalize == "after":
            gates = scores / (_keep(scores, chosen).sum(-1, keepdim=True) + TINY)
        else:
            gates = probs if normalize == "before" else scores
        gates = _keep(gates, chosen).mul_(scale)
        ctx.mark_non_differentiable(chosen)
        save(ctx, statistics=(scores, gates), indices=(chosen,))
        ctx.score, ctx.normalize, ctx.scale, ctx.dtype = score, normalize, scale, logits_TE.dtype
        return probs, gates, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_probs: Tensor, grad_gates: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scores, gates, chosen = ctx.saved_tensors
        softmax, after = ctx.score == "softmax", ctx.normalize == "after"
        if softmax:
            if not after:
                grad_probs = grad_probs + grad_gates * chosen * ctx.scale
            grad = _softmax_backward(grad_probs, scores)
            if after:
                grad += gates * (grad_gates - _dot(grad_gates, gates) / ctx.scale)
            return grad.to(ctx.dtype), *[None] * 7
        total = scores.sum(-1, keepdim=True) + TINY
        if ctx.normalize == "before":
            grad_probs = grad_probs + grad_gates * chosen * ctx.scale
        grad_scores = (grad_probs - _dot(grad_probs, scores) / total) / total
        if after:
            kept = (scores * chosen).sum(-1, keepdim=True) + TINY
            grad_scores += chosen * (grad_gates * ctx.scale - _dot(grad_gates, gates)) / kept
        elif ctx.normalize == "none":
            grad_scores += grad_gates * chosen * ctx.scale
        return torch.ops.aten.sigmoid_backward(grad_scores, scores).to(ctx.dtype), *[None] * 7


class _DenseToSparseGate(torch.autograd.Function):
    """`dense_to_sparse_gate`: saves its inputs, the probabilities and the kept experts."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        temperature: Tensor,
        noise_TE: Tensor | None,
        threshold: float,
        activation: Activation,
        max_experts: int,
        renormalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inner = _activate(_widen(logits_TE), activation)
        if noise_TE is not None:
            inner = inner + noise_TE
        probs = (inner / temperature).softmax(-1)
        keep = (probs >= threshold).scatter_(-1, inner.argmax(-1, keepdim=True), True)
        if max_experts < logits_TE.shape[-1]:
            keep &= largest(inner, max_experts)
        gates = probs / _keep(probs, keep).sum(-1, keepdim=True) if renormalize else probs
        gates = _keep(gates, keep)
        ctx.mark_non_differentiable(keep)
        save(ctx, statistics=(logits_TE, temperature, noise_TE, probs), indices=(keep,))
        ctx.activation, ctx.renormalize = activation, renormalize
        return probs, gates, keep

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_probs: Tensor, grad_gates: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, temperature, noise_TE, probs, keep = ctx.saved_tensors
        if ctx.renormalize:
            kept = probs * keep
            total = kept.sum(-1, keepdim=True)
            grad_gates = (grad_gates - _dot(grad_gates, kept) / total) / total
        grad_inner = _softmax_backward(grad_probs + grad_gates * keep, probs) / temperature
        grad_temperature = None
        wide = _widen(logits_TE)
        if ctx.needs_input_grad[1]:
            inner = _activate(wide, ctx.activation)
            if noise_TE is not None:
                inner = inner + noise_TE
            grad_temperature = -(grad_inner * inner).sum().div(temperature).to(temperature.dtype)
        grad = _activation_backward(grad_inner, wide, ctx.activation).to(logits_TE.dtype)
        return grad, grad_temperature, *[None] * 5


def _activation_backward(grad: Tensor, x: Tensor, activation: Activation) -> Tensor:
    """Compute grad · act'(x)."""
    if activation == "none":
        return grad
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if activation == "relu":
        return torch.where(x <= 0, 0.0, grad)  # NaN keeps its gradient
    act = _activate(x, activation)
    backward = torch.ops.aten.sigmoid_backward if activation == "sigmoid" else torch.ops.aten.tanh_backward
    return backward(grad, act)
