"""How a tensor is seen by the factored accumulators and by the kernels: the one definition of axes and ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def factored_dims(shape: Sequence[int]) -> tuple[int, int] | None:
    """(d1, d0): the axes of the second-largest and the largest size; None below rank 2.

    The order is stable: of equal sizes the later axis counts as larger. There is no minimum size.
    "Row" accumulators keep d1 (they average over d0), "column" accumulators keep d0.
    """
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return order[-2], order[-1]


def row_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a row accumulator: `shape` without d0 (rank >= 2)."""
    dims = factored_dims(shape)
    assert dims is not None
    return tuple(n for axis, n in enumerate(shape) if axis != dims[1])


def column_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a column accumulator: `shape` without d1 (rank >= 2)."""
    dims = factored_dims(shape)
    assert dims is not None
    return tuple(n for axis, n in enumerate(shape) if axis != dims[0])


@dataclass(frozen=True)
class Part:
    """The elements [begin, begin + shape) of a tensor of shape `whole`, of which several places hold a part each."""

    shape: tuple[int, ...]
    whole: tuple[int, ...]
    begin: tuple[int, ...]
    copies: int = 1
    """How many places hold this very part."""


@dataclass(frozen=True)
class Loops:
    """A tensor in memory order as five nested loops [batch0, x, batch1, y, batch2].

    x and y are the two factored axes, x the outer one; `x_is_row` tells whether x is d1. All other axes are batch
    axes, merged. A tensor of rank < 2 is `y` alone, not factored. Row and column accumulators are contiguous in the
    same order, without their missing axis: [batch0, x, batch1, batch2] and [batch0, batch1, y, batch2].
    """

    batch0: int
    x: int
    batch1: int
    y: int
    batch2: int
    x_is_row: bool
    factored: bool

    @property
    def size(self) -> int:
        return self.batch0 * self.x * self.batch1 * self.y * self.batch2


def loops(
    shape: Sequence[int], order: Sequence[int] | None = None, whole: Sequence[int] | None = None
) -> Loops:
    """Loops of a tensor whose axes lie in memory as `order` (outermost first; default: C order).

    Of a part, `whole` is the shape of the tensor: it decides which axes are factored.
    """
    dims = factored_dims(shape if whole is None else whole)
    if dims is None:
        return Loops(1, 1, 1, math.prod(shape), 1, True, False)
    d1, d0 = dims
    axes = list(range(len(shape))) if order is None else list(order)
    outer, inner = sorted((axes.index(d1), axes.index(d0)))
    sizes = [shape[axis] for axis in axes]
    return Loops(
        batch0=math.prod(sizes[:outer]),
        x=sizes[outer],
        batch1=math.prod(sizes[outer + 1 : inner]),
        y=sizes[inner],
        batch2=math.prod(sizes[inner + 1 :]),
        x_is_row=axes[outer] == d1,
        factored=True,
    )


def memory_order(strides: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Axes from the outermost to the innermost in memory; axes of size 1 and ties keep their place."""
    real = sorted((a for a in range(len(shape)) if shape[a] != 1), key=lambda a: -strides[a])
    it = iter(real)
    return tuple(a if shape[a] == 1 else next(it) for a in range(len(shape)))


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a dense tensor whose axes lie in memory as `order` (outermost first)."""
    strides = [1] * len(shape)
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)
