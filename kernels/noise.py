"""The noise of stochastic rounding: one number in [0, 1) an element, a function of who it is and nothing else.

    u(n, d) = frac(a_n + b_d)        a_n = hash(key, n), b_d = hash(~key, d), both in [0, 1)

n is a token's number in the whole batch of the step, d a channel's in the whole tensor, and the key stands for (seed,
layer, tensor, step). So a recomputed region, a resumed run and every layout draw the same bits. The hash is splitmix64
(Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195), of N + D numbers in place of N · D: an element costs an
addition and a fraction.

a and b are multiples of 2^-23, so float32 has their sum and its fraction exactly: no backend can differ by a bit.

What the noise is worth. Let a_n, b_d be independent and uniform, as a good hash makes them. Then each u is uniform, and
any two of them are independent: given b_d, a_n moves u(n, d) to every place alike, and of two elements each depends on
an a or a b that the other does not. Rounding errors are functions of single elements' noise, so all their covariances
are 0, and every sum of them over tokens or channels (the weight gradient xᵀg of a linear operator is one) has exactly
the variance that independent noise would give it. Four elements are not independent: with a rectangle's corners the
fourth follows from three. Variances of such sums do not see it, only their fourth moments do.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

# splitmix64's increment and multipliers, as the int64 that torch and Triton calculate with (they wrap around).
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST_FACTOR = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND_FACTOR = 0x94D049BB133111EB - (1 << 64)
# Bits of a and b: with 24, their sum could have one more than float32 holds.
BITS = 23


def noise_key(seed: int, layer: int, tensor: str, step: int) -> int:
    """64 bits, as a signed integer, of what names a tensor in a run: blake2b of all four.

    Args:
        seed: of the run.
        layer: the layer's number in the whole model.
        tensor: the place in the layer, as "ffn.gate"; it may hold no zero byte.
        step: of the optimizer.
    """
    name = f"{seed}\0{layer}\0{tensor}\0{step}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), signed=True)


@dataclass(frozen=True)
class Noise:
    """Which numbers an operand of `quantize` draws, [..., D] of N rows.

    Attributes:
        key: 64 bits, signed; see `noise_key`.
        rows: The rows' numbers in the whole batch of the step, integers of N elements; or the number of the first row,
            where they are consecutive.
        first_channel: The first channel's number in the whole tensor, where this rank has some of the channels.
    """

    key: int
    rows: Tensor | int = 0
    first_channel: int = 0

    def row_numbers(self, rows: int, device: torch.device) -> Tensor:
        """The rows' numbers, int64 [N].

        Raises:
            ValueError: there are not `rows` of them, or they are no integers.
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
        """(a [N, 1], b [D]) in float32."""
        numbers_D = torch.arange(self.first_channel, self.first_channel + channels, device=device)
        # ~key is another generator: a token and a channel of one number must not have one hash.
        return _uniform(self.key, self.row_numbers(rows, device))[:, None], _uniform(~self.key, numbers_D)


def uniform(noise: Noise, rows: int, channels: int, device: torch.device) -> Tensor:
    """The noise u [N, D] in float32: multiples of 2^-23 in [0, 1)."""
    a_N1, b_D = noise.terms(rows, channels, device)
    return (a_N1 + b_D).frac_()


def _uniform(key: int, numbers: Tensor) -> Tensor:
    """The first BITS of each number's hash, as a float32 in [0, 1)."""
    z = _mix((numbers * GOLDEN).add_(key))
    # torch's shift keeps the sign: the mask takes it away.
    return (z >> (64 - BITS)).bitwise_and_((1 << BITS) - 1).to(torch.float32).mul_(2.0**-BITS)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer of int64 numbers, in place."""
    for shift, factor in ((30, FIRST_FACTOR), (27, SECOND_FACTOR), (31, 1)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return z
