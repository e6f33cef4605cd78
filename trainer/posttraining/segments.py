"""Sums over sequences and groups of flat tensors."""

from torch import Tensor


def segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sum the values of each segment.

    Args:
        values: [N], floating. Differentiable.
        segments: Number of each value's segment, int64 [N] in [0, count). Segments need not be contiguous.
        count: Number of segments.

    Returns:
        [count], 0 for segments without values.
    """
    return values.new_zeros(count).index_add(0, segments, values)
