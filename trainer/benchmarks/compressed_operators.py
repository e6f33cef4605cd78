"""Operators whose saved activations are rounded, and the error of their gradients over independent draws of the noise.

An operator runs forward exactly, within `models.saved_activations.compressing`; its backward reads what comes back from
8 or 4 bits. Of the exact gradient g and the gradients ĝ_1 … ĝ_N of N draws, whose mean is m and whose covariance is Σ:

    noise² = mean ‖ĝ_n − g‖² / ‖g‖²                   of one draw
    S²     = sum ‖ĝ_n − m‖² / (N − 1)                  estimates tr Σ
    bias²  = max(‖m − g‖² − S² / N, 0) / ‖g‖²          without what the mean's own error adds
    z      = ‖m − g‖² / (S² / N)                       1 on average where there is no bias

‖m − g‖² − S² / N is the mean of (ĝ_i − g) · (ĝ_j − g) over all pairs i ≠ j. Without bias its mean is 0 and its variance
2 tr Σ² / (N (N − 1)), whatever the distribution of a draw. So z has the standard deviation (2 / ν)^½, where
ν = (tr Σ)² / tr Σ² are the effective degrees of freedom. The test compares z with the quantile of χ²_ν / ν
(Satterthwaite 1946) that a normal number exceeds at 4 standard deviations (p = 3e-5), by Wilson and Hilferty's formula
(1931): about 1 + 4 (2 / ν)^½ where ν is large. tr Σ² comes from draws too: of d_n = ĝ_2n − ĝ_2n−1, (d_n · d_n+1)² has
the mean 4 tr Σ².
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import relu, swiglu
from kernels.attention import attention
from kernels.convolution import causal_conv1d
from kernels.linear_attention import gated_delta_rule, gla
from kernels.matmul import linear
from kernels.moe import grouped_linear, permute, unpermute
from kernels.norms import gated_rms_norm, rms_norm
from kernels.quantization import Noise, Quantized, dequantize, noise_key, quantize
from kernels.spiking import spike
from models.saved_activations import Codec, Kept, compressing

# Standard deviations of a normal number: without bias, one gradient in 30,000 is called biased.
_CONFIDENCE = 4.0
# Taps of the convolution; experts, and experts per token.
_WIDTH, _EXPERTS, _TOP_K = 4, 4, 2
_EPS = 1e-6


@dataclass(frozen=True)
class Operator:
    """An operator and its arguments, float32.

    Attributes:
        function: Of the inputs, then the weights.
        inputs: Activations by name.
        weights: Parameters by name.
        rounded: What backward reads rounded, in the order of saving.
        exact: Gradients that must not change at all.
        unbiased: Gradients in which no rounded number meets itself: their mean must be the exact one.
    """

    function: Callable[..., Tensor]
    inputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()
    exact: frozenset[str] = frozenset()
    unbiased: frozenset[str] = frozenset()

    def gradients(self, codec: Codec | None = None) -> dict[str, Tensor]:
        """The gradients of inputs and weights, of a loss that weighs the outputs with fixed normal numbers.

        Args:
            codec: Encodes what is saved; None keeps it as it is.
        """
        leaves = {name: x.detach().requires_grad_() for name, x in [*self.inputs.items(), *self.weights.items()]}
        # An input that is a leaf would count as a weight.
        given = [1 * leaves[name] for name in self.inputs]
        weights = [leaves[name] for name in self.weights]
        if codec is None:
            y = self.function(*given, *weights)
        else:
            with compressing(codec):
                y = self.function(*given, *weights)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


@dataclass(frozen=True)
class Sizes:
    """Of an operator's inputs.

    Attributes:
        tokens: T.
        channels: D, also of all heads together.
        head_dim: Channels of a head.
        outlier_every: Every so many channels one is larger.
        outlier_factor: How many times.
    """

    tokens: int
    channels: int
    head_dim: int
    outlier_every: int
    outlier_factor: float


class Drawing:
    """Normal random arguments; of activations, some channels are larger.

    Args:
        sizes: Of the activations.
        seed: Of the random numbers.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self._generator = sizes, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator)

    def tokens(self) -> Tensor:
        """Activations [T, D]."""
        x_TD = self.normal(self.sizes.tokens, self.sizes.channels)
        x_TD[:, :: self.sizes.outlier_every] *= self.sizes.outlier_factor
        return x_TD

    def heads(self) -> Tensor:
        """Activations [1, T, H, K]."""
        return self.tokens().unflatten(1, (-1, self.sizes.head_dim))[None]

    def normed(self) -> Tensor:
        """Queries or keys [1, T, H, K] whose mean square is 1 in every head, as after a norm of queries and keys."""
        x_BTHK = self.heads()
        return x_BTHK / x_BTHK.square().mean(-1, keepdim=True).sqrt()

    def unit(self) -> Tensor:
        """Queries or keys [1, T, H, K] of norm 1, as the delta rules take them."""
        return F.normalize(self.heads(), dim=-1)

    def per_head(self) -> Tensor:
        """Standard normal numbers [1, T, H]."""
        return self.normal(1, self.sizes.tokens, self.sizes.channels // self.sizes.head_dim)

    def scale(self) -> Tensor:
        """The weight [D] of a norm."""
        return 1 + 0.1 * self.normal(self.sizes.channels)

    def matrix(self, *leading: int) -> Tensor:
        """The weight [..., D, D] of a linear layer that keeps the inputs' size."""
        return self.normal(*leading, self.sizes.channels, self.sizes.channels) / self.sizes.channels**0.5


def _linear(draw: Drawing) -> Operator:
    inputs, weights = {"x": draw.tokens()}, {"weight": draw.matrix()}
    return Operator(linear, inputs, weights, ("x",), exact=frozenset({"x"}), unbiased=frozenset({"weight"}))


def _rms_norm(draw: Drawing) -> Operator:
    function = partial(rms_norm, eps=_EPS)
    return Operator(function, {"x": draw.tokens()}, {"weight": draw.scale()}, ("x",), unbiased=frozenset({"weight"}))


def _gated_rms_norm(draw: Drawing) -> Operator:
    inputs, weights = {"x": draw.tokens(), "gate": draw.tokens()}, {"weight": draw.scale()}
    return Operator(partial(gated_rms_norm, eps=_EPS), inputs, weights, ("x", "gate"))


def _swiglu(draw: Drawing) -> Operator:
    return Operator(swiglu, {"gate": draw.tokens(), "up": draw.tokens()}, rounded=("gate", "up"))


def _activation(function: Callable[[Tensor], Tensor], draw: Drawing) -> Operator:
    return Operator(function, {"x": draw.tokens()}, rounded=("x",))


def _relu(draw: Drawing) -> Operator:
    return Operator(relu, {"x": draw.tokens()}, exact=frozenset({"x"}))


def _convolution(draw: Drawing) -> Operator:
    weight = draw.normal(draw.sizes.channels, _WIDTH) / _WIDTH**0.5
    # Also the state before the first token, which is 0.
    return Operator(_convolved, {"x": draw.tokens()[None]}, {"weight": weight}, ("x", "state"))


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    return causal_conv1d(x, weight)[0]


def _attention(backend: str, rounded: tuple[str, ...], unbiased: frozenset[str], draw: Drawing) -> Operator:
    inputs = {"q": draw.normed(), "k": draw.normed(), "v": draw.heads()}
    return Operator(partial(attention, backend=backend), inputs, rounded=rounded, unbiased=unbiased)


def _gla(draw: Drawing) -> Operator:
    # The decays of GatedLinearAttention, at an input that is a standard normal number.
    log_decay = F.logsigmoid(draw.normal(*draw.heads().shape)) / 16
    inputs = {"q": draw.heads(), "k": draw.heads(), "v": draw.heads(), "log_decay": log_decay}
    return Operator(_of_recurrence(gla), inputs, rounded=("q", "k", "v"), unbiased=frozenset(inputs))


def _delta_rule(per_channel: bool, draw: Drawing) -> Operator:
    log_decay = F.logsigmoid(draw.normal(*draw.heads().shape) if per_channel else draw.per_head()) / 16
    inputs = {"q": draw.unit(), "k": draw.unit(), "v": draw.heads()}
    inputs |= {"log_decay": log_decay, "beta": draw.per_head().sigmoid()}
    return Operator(_of_recurrence(gated_delta_rule), inputs, rounded=("q", "k", "v"))


def _of_recurrence(kernel: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Tensor]:
    return lambda *inputs: kernel(*inputs)[0]


def _experts(draw: Drawing) -> Operator:
    tokens = draw.sizes.tokens
    gates_TE = draw.normal(tokens, _EXPERTS).softmax(-1)
    routing_map_TE = torch.zeros(tokens, _EXPERTS, dtype=torch.bool).scatter_(1, gates_TE.topk(_TOP_K).indices, True)

    def function(x_TD: Tensor, gates_TE: Tensor, weight_EDD: Tensor) -> Tensor:
        rows_ND, gates_N, tokens_N, counts_E = permute(x_TD, routing_map_TE, gates_TE)
        return unpermute(grouped_linear(rows_ND, weight_EDD, counts_E), tokens_N, tokens, gates_N)

    inputs, weights = {"x": draw.tokens(), "gates": gates_TE}, {"weight": draw.matrix(_EXPERTS)}
    unbiased = frozenset({"gates", "weight"})
    return Operator(function, inputs, weights, ("rows", "outputs"), exact=frozenset({"x"}), unbiased=unbiased)


def _spike(draw: Drawing) -> Operator:
    function = partial(spike, k=2.0, count_range=(-7, 7), gradient="clipped")
    inputs, weights = {"x": draw.tokens()}, {"weight": draw.matrix()}
    return Operator(lambda x, weight: linear(function(x), weight), inputs, weights, exact=frozenset({"x", "weight"}))


OPERATORS: dict[str, Callable[[Drawing], Operator]] = {
    "linear": _linear,
    "experts": _experts,
    "rms_norm": _rms_norm,
    "gated_rms_norm": _gated_rms_norm,
    "swiglu": _swiglu,
    "gelu": partial(_activation, F.gelu),
    "silu": partial(_activation, F.silu),
    "relu": _relu,
    "convolution": _convolution,
    # The one that a CPU takes, torch's fused one with its sums of exponentials, and the scores of all pairs.
    "attention": partial(_attention, "banded", ("q", "k", "v"), frozenset()),
    "attention_sdpa": partial(_attention, "sdpa", ("q", "k", "v", "o"), frozenset()),
    "attention_unfused": partial(_attention, "reference", ("scaled q", "k", "p", "v"), frozenset({"v"})),
    "gla": _gla,
    "gated_delta_rule": partial(_delta_rule, False),
    "kimi_delta_attention": partial(_delta_rule, True),
    "spike": _spike,
}


class Moments:
    """The module's sums over the draws of a gradient.

    Args:
        exact: The exact gradient.
    """

    def __init__(self, exact: Tensor) -> None:
        self._exact = exact.double().flatten()
        self._sum = torch.zeros_like(self._exact)
        self._squares = self._products = 0.0
        self._draws = self._pairs = 0
        self._last = self._difference = self._sum

    def add(self, grad: Tensor) -> None:
        """Take in a draw."""
        error = grad.double().flatten() - self._exact
        self._sum += error
        self._squares += float(error @ error)
        self._draws += 1
        if self._draws % 2 == 0:
            difference = error - self._last
            if self._draws > 2:
                self._products += float(difference @ self._difference) ** 2 / 4
                self._pairs += 1
            self._difference = difference
        self._last = error

    def errors(self) -> "Errors":
        """The module's figures, of at least four draws.

        Raises:
            ValueError: There are fewer.
        """
        if not self._pairs:
            raise ValueError(f"{self._draws} draws have no variance of their variance; take at least 4")
        size, draws = float(self._exact @ self._exact), self._draws
        of_mean = float(self._sum @ self._sum) / draws**2
        variance = max(self._squares - draws * of_mean, 0.0) / (draws - 1)
        # tr Σ² is at most (tr Σ)², but its estimate need not be.
        freedom = max(variance**2 / (self._products / self._pairs), 1.0) if self._products else 1.0
        return Errors(self._squares / draws / size, variance / draws / size, of_mean / size, freedom)


@dataclass(frozen=True)
class Errors:
    """What `Moments` found; squares are relative to the exact gradient's.

    Attributes:
        square: mean ‖ĝ_n − g‖².
        chance: S² / N, which ‖m − g‖² is on average without bias.
        of_mean: ‖m − g‖².
        freedom: ν.
    """

    square: float
    chance: float
    of_mean: float
    freedom: float

    @property
    def is_exact(self) -> bool:
        """Whether all draws gave the exact gradient, to the last bit."""
        return self.square == 0

    @property
    def noise(self) -> float:
        """Root mean square error of one draw, relative to the gradient."""
        return math.sqrt(self.square)

    @property
    def bias(self) -> float:
        """Of the gradient, relative to it, without what chance adds."""
        return math.sqrt(max(self.of_mean - self.chance, 0.0))

    @property
    def z(self) -> float:
        """‖m − g‖² by what it is on average without bias; infinite where draws do not differ from each other."""
        if self.is_exact:
            return 1.0
        return self.of_mean / self.chance if self.chance else math.inf

    @property
    def limit(self) -> float:
        """The largest z of a gradient that passes for unbiased."""
        spread = 2 / (9 * self.freedom)
        return (1 - spread + _CONFIDENCE * math.sqrt(spread)) ** 3

    @property
    def is_unbiased(self) -> bool:
        """Whether the mean lies within its standard error of the exact gradient."""
        return self.z <= self.limit

    @property
    def least(self) -> float:
        """The least bias that the draws would have told from none."""
        return math.sqrt((self.limit - 1) * self.chance)


def rounding(name: str, bits: int, group: int, draw: int, seed: int = 0) -> Codec:
    """The codec of a draw: other noise for each operator, tensor, draw and seed.

    Args:
        name: The operator's.
        bits: Of an element, 8 or 4.
        group: Channels that share a scale and an offset, within a head.
        draw: Its number.
        seed: Of all draws.
    """

    def store(x: Tensor, place: str) -> Kept:
        q = quantize(x, bits=bits, group=group, noise=Noise(noise_key(seed, 0, f"{name}.{place}", draw)))
        return Kept(q.tensors, partial(_restore, q.shape, bits, group))

    return store


def _restore(shape: torch.Size, bits: int, group: int, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return dequantize(Quantized(codes, scale, offset, shape, bits, group))


def measure(operator: Operator, codec_of: Callable[[int], Codec], draws: int) -> dict[str, Errors]:
    """The errors of an operator's gradients, by input and weight, over so many draws.

    Args:
        operator: With its inputs.
        codec_of: The codec of each draw.
        draws: At least 4.
    """
    sums = {name: Moments(grad) for name, grad in operator.gradients().items()}
    for draw in range(draws):
        for name, grad in operator.gradients(codec_of(draw)).items():
            sums[name].add(grad)
    return {name: moments.errors() for name, moments in sums.items()}
