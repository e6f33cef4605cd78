"""Noise of stochastic rounding: one number in [0, 1) per element, a function of the element's identity alone.

    u(n, d) = frac(a_n + b_d)        a_n = hash(key, n), b_d = hash(~key, d), both in [0, 1)

n is the token's index in the step's global batch, d is the channel's index in the unsharded tensor, and the key is a
hash of (seed, layer, tensor, step). A recomputed region, a resumed run and every layout therefore draw the same bits.
The hash is splitmix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195). It runs for N + D numbers, not for
N · D; each element then costs one addition and one fraction.

a and b are multiples of 2^-23, so their sum and its fraction are exact in float32. All backends agree bit by bit.

Quality of the noise. Assume that all a_n and b_d are independent and uniform. Then each u is uniform, and any two are
independent: of two different elements, each depends on an a or a b that the other does not, and adding a uniform number
modulo 1 gives a uniform result. Each rounding error depends on one u only, so all covariances of rounding errors are 0.
A sum of them over tokens or channels, such as the weight gradient xᵀg of a linear layer, thus has exactly the variance
that fully independent noise would give. Four elements need not be independent: if they are the corners of a rectangle,
three determine the fourth. This does not affect the variances of such sums, only their fourth moments.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

# splitmix64's increment and multipliers, as int64. torch and Triton compute in int64, which wraps around.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST_FACTOR = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND_FACTOR = 0x94D049BB133111EB - (1 << 64)
# Bits of a and b. With 24 bits, their sum could have 25, one more than float32 holds.
BITS = 23


def noise_key(seed: int, layer: int, tensor: str, step: int) -> int:
    """Hash the arguments, which identify a tensor in a run, to a signed 64-bit integer with blake2b.

    Args:
        seed: the run's seed.
        layer: the layer's index in the whole model.
        tensor: the tensor's name in the layer, such as "ffn.gate"; it must not contain a zero byte.
        step: the optimizer step.
    """
    name = f"{seed}\0{layer}\0{tensor}\0{step}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), signed=True)


@dataclass(frozen=True)
class Noise:
    """Identifies the elements of a tensor [..., D] with N rows, for `quantize` to draw their noise.

    Attributes:
        key: Signed 64-bit key; see `noise_key`.
        rows: The rows' indices in the step's global batch, N integers. If they are consecutive, the index of the first
            row suffices.
        first_channel: Index of this rank's first channel in the unsharded tensor.
    """

    key: int
    rows: Tensor | int = 0
    first_channel: int = 0

    def row_numbers(self, rows: int, device: torch.device) -> Tensor:
        """Return the rows' indices, int64 [N].

        Raises:
            ValueError: the indices are not `rows` integers.
        """
        if isinstance(self.rows, int):
            return torch.arange(self.rows, self.rows + rows, device=device)
        if self.rows.numel() != rows or self.rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"noise: rows must be {rows} integers (int64 or int32), one a row, not "
                f"{tuple(self.rows.shape)} {self.rows.dtype}"
            )
        return self.rows.reshape(-1).to(device, torch.int64)

    def terms(self, rows: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (a [N, 1], b [D]) in float32."""
        numbers_D = torch.arange(self.first_channel, self.first_channel + channels, device=device)
        # ~key gives a different hash function, so that token i and channel i get different hashes.
        return _uniform(self.key, self.row_numbers(rows, device))[:, None], _uniform(~self.key, numbers_D)


def uniform(noise: Noise, rows: int, channels: int, device: torch.device) -> Tensor:
    """Return the noise u [N, D] in float32: multiples of 2^-23 in [0, 1)."""
    a_N1, b_D = noise.terms(rows, channels, device)
    return (a_N1 + b_D).frac_()


def _uniform(key: int, numbers: Tensor) -> Tensor:
    """Return the leading BITS bits of each number's hash as a float32 in [0, 1)."""
    z = _mix((numbers * GOLDEN).add_(key))
    # torch's shift is arithmetic. The mask removes the copies of the sign bit.
    return (z >> (64 - BITS)).bitwise_and_((1 << BITS) - 1).to(torch.float32).mul_(2.0**-BITS)


def _mix(z: Tensor) -> Tensor:
    """Apply splitmix64's finalizer to int64 numbers, in place."""
    for shift, factor in ((30, FIRST_FACTOR), (27, SECOND_FACTOR), (31, 1)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return z
