"""Benchmark of the error that activations in 8 or 4 bits cause in gradients: bias and noise, by operator and argument.

Each operator of trainer.benchmarks.compressed_operators runs on fixed random inputs, once exactly and then with many
draws of the rounding noise. Statistics stay exact (`kernels.autograd.save`): inverse norms, decays, write strengths,
states and sums of exponentials. Noise averages out over training steps, but bias does not. A bias above 1 % of the
gradient's norm is reported as unsafe. Such an operator should be recomputed, or the activations that it reads kept
exactly.

A gradient that is linear in each rounded number is unbiased. This holds for the weights of linear layers, experts and
RMSNorm, and for all gradients of gated linear attention. The command fails if one of these is biased, or if a gradient
whose backward reads no rounded number is not bitwise exact.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from trainer.benchmarks.report import Comparison, report, say
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.benchmarks.compressed_operators import Errors, Operator

DESCRIPTION = "Bias and noise of each operator's gradients if backward reads activations in 8 or 4 bits."
# Bias, relative to the gradient's norm, above which an operator's saved activations should not be rounded.
UNSAFE = 0.01
# With this number of draws, the error of tr Σ², which determines the limit of z, is about 30 %.
LEAST_DRAWS = 50


@dataclass
class Config:
    """Operators, sizes and draws.

    Attributes:
        json: Write the comparisons to this file.
        operators: Operators to measure. An empty list measures all.
        bits: Bits per element: 8, 4 or both.
        group: Channels that share a scale and an offset, within a head.
        draws: Draws of the noise for each operator and number of bits.
        tokens: Tokens of a sequence.
        channels: Channels of a token, which are those of all heads together.
        head_dim: Channels of a head.
        outlier_every: Distance between outlier channels of the normal random activations.
        outlier_factor: Factor by which outlier channels are larger.
        seed: Seed of inputs and noise.
        threads: CPU threads; 0 uses every core.
    """

    json: str | None = None
    operators: list[str] = field(default_factory=list)
    bits: list[int] = field(default_factory=lambda: [8, 4])
    group: int = 64
    draws: int = 1000
    tokens: int = 256
    channels: int = 256
    head_dim: int = 64
    outlier_every: int = 128
    outlier_factor: float = 10.0
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("group", "tokens", "channels", "head_dim", "outlier_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.draws < LEAST_DRAWS:
            raise ConfigError(
                f"draws is {self.draws}: it must be at least {LEAST_DRAWS} to distinguish bias from noise"
            )
        if not self.bits or not set(self.bits) <= {8, 4}:
            raise ConfigError(f"bits are {self.bits}: they must be 8 or 4")
        if self.channels % self.head_dim:
            raise ConfigError(f"channels is {self.channels}: it must be a multiple of head_dim, {self.head_dim}")
        if self.operators:
            from trainer.benchmarks.compressed_operators import OPERATORS  # here, for it imports torch

            if unknown := [name for name in self.operators if name not in OPERATORS]:
                raise ConfigError(f"operators has {', '.join(unknown)}; choose from {', '.join(OPERATORS)}")


def main(config: Config) -> None:
    """Measure and print the table. Exit with 1 if a gradient that must be exact or unbiased is not."""
    from trainer.benchmarks.compressed_operators import OPERATORS, Drawing, Sizes
    from trainer.device import configure_threads, keep_freed_memory

    keep_freed_memory()
    configure_threads(config.threads)
    sizes = Sizes(config.tokens, config.channels, config.head_dim, config.outlier_every, config.outlier_factor)
    lines, wrong = [], []
    for name in config.operators or OPERATORS:
        operator = OPERATORS[name](Drawing(sizes, config.seed))
        for bits in config.bits:
            for of, found in _measure(config, name, operator, bits).items():
                line = compare(f"{name}, {bits} bits: {of}", found, operator.rounded)
                lines.append(line)
                broken = (of in operator.exact and not found.is_exact) or (
                    of in operator.unbiased and not found.is_unbiased
                )
                wrong += [line.case] * broken
    shape = f"{config.draws} draws, {config.tokens} tokens of {config.channels} channels, groups of {config.group}"
    title = f"gradients from rounded activations: bias (ours), error of one draw (peer), in % of the norm; {shape}"
    report(title, lines, config.json)
    if wrong:
        raise SystemExit(f"these gradients must be exact or unbiased, but are not: {'; '.join(wrong)}")


def _measure(config: Config, name: str, operator: "Operator", bits: int) -> dict[str, "Errors"]:
    from trainer.benchmarks.compressed_operators import measure, rounding

    say(f"{name}, {bits} bits: {config.draws} draws")
    return measure(operator, partial(rounding, name, bits, config.group, seed=config.seed), config.draws)


def compare(case: str, found: "Errors", rounded: tuple[str, ...]) -> Comparison:
    """Return a line with bias (ours) and noise (peer) in % of the gradient's norm, and the verdict as its note.

    The ratio is noise / bias. If the bias is below the smallest detectable one, that one replaces it. The ratio of an
    exact gradient is 1.
    """
    ratio = 1.0 if found.is_exact else found.noise / max(found.bias, found.least)
    note = f"{verdict(found)}; rounded: {', '.join(rounded) or 'nothing'}"
    return Comparison(case, 100 * found.bias, 100 * found.noise, ratio, "%", note)


def verdict(found: "Errors") -> str:
    """Return the verdict on a gradient: exact, unbiased, biased or unsafe, with the figures of the test."""
    if found.is_exact:
        return "exact"
    z = f"z {found.z:.3f}, at most {found.limit:.3f} without bias"
    if found.is_unbiased:
        return f"unbiased within its standard error ({z}; a bias of {found.least:.2%} would show)"
    if found.bias <= UNSAFE:
        return f"biased ({z})"
    return f"unsafe: biased above {UNSAFE:.0%}, recompute or keep exact ({z})"
