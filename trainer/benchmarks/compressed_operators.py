"""Operators whose saved activations are rounded, and the error of their gradients over independent draws of the noise.

An operator's forward is exact and runs in `models.saved_activations.compressing`. Its backward reads activations that
were stored in 8 or 4 bits. Let g be the exact gradient, and ĝ_1 … ĝ_N the gradients of N draws of the noise. Their mean
is m, and the covariance of one draw is Σ.

    noise² = mean ‖ĝ_n − g‖² / ‖g‖²                   the error of one draw
    S²     = sum ‖ĝ_n − m‖² / (N − 1)                  an estimate of tr Σ
    bias²  = max(‖m − g‖² − S² / N, 0) / ‖g‖²          the error of the mean, less the part that chance explains
    z      = ‖m − g‖² / (S² / N)                       1 on average if there is no bias

‖m − g‖² − S² / N equals the mean of (ĝ_i − g) · (ĝ_j − g) over all pairs i ≠ j. Without bias, it has the expectation 0
and the variance 2 tr Σ² / (N (N − 1)) for any distribution of the draws. The standard deviation of z is therefore
(2 / ν)^½, where ν = (tr Σ)² / tr Σ² is the effective number of degrees of freedom.

The test compares z with a quantile of χ²_ν / ν (Satterthwaite 1946). An unbiased gradient exceeds the quantile with the
probability p = 3e-5, like a normal variable that exceeds 4 standard deviations. The quantile follows from Wilson and
Hilferty's formula (1931); for large ν it is about 1 + 4 (2 / ν)^½. tr Σ² is also estimated from the draws: with
d_n = ĝ_2n − ĝ_2n−1, the mean of (d_n · d_n+1)² is 4 tr Σ².
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

# Limit of the test in standard deviations of a normal variable. One unbiased gradient in 30,000 is called biased.
_CONFIDENCE = 4.0
# Taps of the convolution, number of experts, and experts per token.
_WIDTH, _EXPERTS, _TOP_K = 4, 4, 2
_EPS = 1e-6


@dataclass(frozen=True)
class Operator:
    """An operator and its arguments, float32.

    Attributes:
        function: Computes the output from the inputs, followed by the weights.
        inputs: Activations by name.
        weights: Parameters by name.
        rounded: Names of the tensors that backward reads in rounded form, in the order of saving.
        exact: Arguments whose gradients must be bitwise exact.
        unbiased: Arguments whose gradients are linear in each rounded number, so that their mean must be exact.
    """

    function: Callable[..., Tensor]
    inputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()
    exact: frozenset[str] = frozenset()
    unbiased: frozenset[str] = frozenset()

    def gradients(self, codec: Codec | None = None) -> dict[str, Tensor]:
        """Return the gradients of inputs and weights by name.

        The loss is a sum of the outputs, weighted with fixed normal random numbers.

        Args:
            codec: Encodes the saved activations. None keeps them exact.
        """
        leaves = {name: x.detach().requires_grad_() for name, x in [*self.inputs.items(), *self.weights.items()]}
        # Compression treats leaves as weights, so the inputs must not be leaves.
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
    """Sizes of an operator's inputs.

    Attributes:
        tokens: T.
        channels: D, the number of channels of a token, which are those of all heads together.
        head_dim: Channels of a head.
        outlier_every: Distance between outlier channels.
        outlier_factor: Factor by which outlier channels are larger.
    """

    tokens: int
    channels: int
    head_dim: int
    outlier_every: int
    outlier_factor: float


class Drawing:
    """Draws normal random arguments. Some channels of the activations are outliers.

    Args:
        sizes: Sizes of the activations.
        seed: Seed of the random numbers.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self._generator = sizes, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=self._generator)

    def tokens(self) -> Tensor:
        """Draw activations [T, D]."""
        x_TD = self.normal(self.sizes.tokens, self.sizes.channels)
        x_TD[:, :: self.sizes.outlier_every] *= self.sizes.outlier_factor
        return x_TD

    def heads(self) -> Tensor:
        """Draw activations [1, T, H, K]."""
        return self.tokens().unflatten(1, (-1, self.sizes.head_dim))[None]

    def normed(self) -> Tensor:
        """Draw queries or keys [1, T, H, K] whose mean square is 1 in every head, as after a norm per head."""
        x_BTHK = self.heads()
        return x_BTHK / x_BTHK.square().mean(-1, keepdim=True).sqrt()

    def unit(self) -> Tensor:
        """Draw queries or keys [1, T, H, K] of norm 1, as the delta rules expect them."""
        return F.normalize(self.heads(), dim=-1)

    def per_head(self) -> Tensor:
        """Draw standard normal numbers [1, T, H]."""
        return self.normal(1, self.sizes.tokens, self.sizes.channels // self.sizes.head_dim)

    def scale(self) -> Tensor:
        """Draw the weight [D] of a norm."""
        return 1 + 0.1 * self.normal(self.sizes.channels)

    def matrix(self, *leading: int) -> Tensor:
        """Draw the weight [..., D, D] of a linear layer whose outputs are about as large as its inputs."""
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
    # Backward also reads the state before the first token, which is 0.
    return Operator(_convolved, {"x": draw.tokens()[None]}, {"weight": weight}, ("x", "state"))


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    return causal_conv1d(x, weight)[0]


def _attention(backend: str, rounded: tuple[str, ...], unbiased: frozenset[str], draw: Drawing) -> Operator:
    inputs = {"q": draw.normed(), "k": draw.normed(), "v": draw.heads()}
    return Operator(partial(attention, backend=backend), inputs, rounded=rounded, unbiased=unbiased)


def _gla(draw: Drawing) -> Operator:
    # The decays of GatedLinearAttention for gate inputs that are standard normal numbers.
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
    # The default on CPUs; torch's fused attention, which saves sums of exponentials; and unfused attention, which
    # saves the probabilities of all pairs.
    "attention": partial(_attention, "banded", ("q", "k", "v"), frozenset()),
    "attention_sdpa": partial(_attention, "sdpa", ("q", "k", "v", "o"), frozenset()),
    "attention_unfused": partial(_attention, "reference", ("scaled q", "k", "p", "v"), frozenset({"v"})),
    "gla": _gla,
    "gated_delta_rule": partial(_delta_rule, False),
    "kimi_delta_attention": partial(_delta_rule, True),
    "spike": _spike,
}


class Moments:
    """Sums over the draws of a gradient, from which the module's figures follow.

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
        """Add the gradient of a draw."""
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
        """Return the module's figures.

        Raises:
            ValueError: there are fewer than four draws.
        """
        if not self._pairs:
            raise ValueError(f"{self._draws} draws are too few to estimate the spread of the variance; take at least 4")
        size, draws = float(self._exact @ self._exact), self._draws
        of_mean = float(self._sum @ self._sum) / draws**2
        variance = max(self._squares - draws * of_mean, 0.0) / (draws - 1)
        # tr Σ² is at most (tr Σ)², but its estimate may be larger.
        freedom = max(variance**2 / (self._products / self._pairs), 1.0) if self._products else 1.0
        return Errors(self._squares / draws / size, variance / draws / size, of_mean / size, freedom)


@dataclass(frozen=True)
class Errors:
    """Errors of a gradient, as defined in the module's docstring. Squares are relative to ‖g‖².

    Attributes:
        square: Mean ‖ĝ_n − g‖².
        chance: S² / N, the average of ‖m − g‖² if there is no bias.
        of_mean: ‖m − g‖².
        freedom: ν.
    """

    square: float
    chance: float
    of_mean: float
    freedom: float

    @property
    def is_exact(self) -> bool:
        """Whether all draws gave the exact gradient, bit for bit."""
        return self.square == 0

    @property
    def noise(self) -> float:
        """Root mean square error of one draw, relative to the gradient's norm."""
        return math.sqrt(self.square)

    @property
    def bias(self) -> float:
        """Bias relative to the gradient's norm, less the part that chance explains."""
        return math.sqrt(max(self.of_mean - self.chance, 0.0))

    @property
    def z(self) -> float:
        """‖m − g‖² relative to its average without bias. Infinite if the draws are equal but not exact."""
        if self.is_exact:
            return 1.0
        return self.of_mean / self.chance if self.chance else math.inf

    @property
    def limit(self) -> float:
        """The largest z at which a gradient is called unbiased."""
        spread = 2 / (9 * self.freedom)
        return (1 - spread + _CONFIDENCE * math.sqrt(spread)) ** 3

    @property
    def is_unbiased(self) -> bool:
        """Whether chance explains the distance of the mean from the exact gradient."""
        return self.z <= self.limit

    @property
    def least(self) -> float:
        """The smallest bias that the test would have detected with these draws, relative to the gradient's norm."""
        return math.sqrt((self.limit - 1) * self.chance)


def rounding(name: str, bits: int, group: int, draw: int, seed: int = 0) -> Codec:
    """Return the codec of a draw. Its noise differs between operators, tensors, draws and seeds.

    Args:
        name: Name of the operator.
        bits: Bits per element, 8 or 4.
        group: Channels that share a scale and an offset, within a head.
        draw: Number of the draw.
        seed: Seed of all draws.
    """

    def store(x: Tensor, place: str) -> Kept:
        q = quantize(x, bits=bits, group=group, noise=Noise(noise_key(seed, 0, f"{name}.{place}", draw)))
        return Kept(q.tensors, partial(_restore, q.shape, bits, group))

    return store


def _restore(shape: torch.Size, bits: int, group: int, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return dequantize(Quantized(codes, scale, offset, shape, bits, group))


def measure(operator: Operator, codec_of: Callable[[int], Codec], draws: int) -> dict[str, Errors]:
    """Return the errors of an operator's gradients by the name of the input or weight.

    Args:
        operator: The operator and its arguments.
        codec_of: Returns the codec of a draw, given its number.
        draws: Number of draws, at least 4.
    """
    sums = {name: Moments(grad) for name, grad in operator.gradients().items()}
    for draw in range(draws):
        for name, grad in operator.gradients(codec_of(draw)).items():
            sums[name].add(grad)
    return {name: moments.errors() for name, moments in sums.items()}
