"""Means and variances of tensors (lopt_fast.operations.statistics) in Triton: one pass, then a merge for each tensor.

Of every tile: means and sums of squared distances from them. Those of a tensor are merged by the parallel formula of
Chan, Golub and LeVeque 1979: no difference of large numbers, so that a variance far below the mean's square is right.
"""

import triton
import triton.language as tl
from lopt_fast.kernels.common.triton import (
    RECORD,
    averages_in,
    averages_of,
    block_of,
    field,
    folded,
    folds,
    gradient_of,
    gradient_rule,
    parameter_of,
    place_of,
    tile_of,
    typed,
)

BLOCK = (512, 4)  # elements, warps
MERGE_BLOCK = 64
INFINITY = tl.constexpr(float("inf"))

# Quantities, in this order: parameter, gradient, momenta, second moments; of the absolute gradient the mean alone.


def quantities(momenta: int, second_moments: int) -> int:
    """How many, without the absolute gradient."""
    return 2 + momenta + second_moments


def width(momenta: int, second_moments: int) -> int:
    """WIDTH: places for all quantities, a power of two."""
    return int(triton.next_power_of_2(quantities(momenta, second_moments) + 1))


@triton.jit
def _quantities(arrays, place, rows, columns, rule, MOVED: tl.constexpr):
    """(quantities of a block, mask); running averages after this gradient where MOVED, else as they are."""
    grad, param, momentum, second_moment = arrays
    offsets, mask = block_of(place, rows, columns, False)
    g = gradient_of(grad, offsets, mask, rule)
    x = (parameter_of(param, offsets, mask), g)
    # Rates are 0 unless MOVED. A gradient that is not finite must not spoil averages that do not see it.
    new = g if MOVED else tl.zeros(g.shape, tl.float32)
    return x + averages_of(momentum, offsets, mask, new) + averages_of(
        second_moment, offsets, mask, new * new
    ), mask


@triton.jit
def spreads(
    table, tiles, sums, rates, numbers,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
    MOMENTA: tl.constexpr, SECOND_MOMENTS: tl.constexpr, MOVED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sums[slot], (2, WIDTH): means, and sums of squared distances; in the place behind the last quantity the mean of
    the absolute gradient, and the number of elements."""
    record, slot, group, _, _, begin, end, columns = tile_of(table, tiles, COLUMNS)
    place = place_of(record, group, False, ALIGNED, COLUMNS)
    COUNT: tl.constexpr = 2 + MOMENTA + SECOND_MOMENTS

    # Distances are taken from the mean of the first block, which is near that of the tile.
    arrays = (
        typed(record, field("grad"), TYPE, ALIGNED),
        typed(record, field("param"), TYPE, ALIGNED),
        averages_in(record, rates, MOMENTA, 0, field("momentum"), ALIGNED),
        averages_in(record, rates, SECOND_MOMENTS, MOMENTA, field("second_moment"), ALIGNED),
    )
    rule = gradient_rule(numbers)
    x, mask = _quantities(arrays, place, begin + tl.arange(0, ROWS), columns, rule, MOVED)
    inside = tl.sum(mask.to(tl.float32))
    centres = ()
    distances = ()
    squares = ()
    for k in tl.static_range(COUNT):
        mean = tl.sum(tl.where(mask, x[k], 0.0)) / inside
        centres += (tl.where(tl.abs(mean) < INFINITY, mean, 0.0),)
        distances += (tl.zeros([ROWS, COLUMNS // folds(ALIGNED)], tl.float32),)
        squares += (tl.zeros([ROWS, COLUMNS // folds(ALIGNED)], tl.float32),)
    magnitudes = tl.zeros([ROWS, COLUMNS // folds(ALIGNED)], tl.float32)
    elements = tl.zeros([ROWS, COLUMNS // folds(ALIGNED)], tl.float32)
    for first in range(begin, end, ROWS):
        x, mask = _quantities(arrays, place, first + tl.arange(0, ROWS), columns, rule, MOVED)
        new_distances = ()
        new_squares = ()
        for k in tl.static_range(COUNT):
            distance = tl.where(mask, x[k] - centres[k], 0.0)
            new_distances += (distances[k] + folded(distance, ALIGNED),)
            new_squares += (squares[k] + folded(distance * distance, ALIGNED),)
        distances = new_distances
        squares = new_squares
        magnitudes += folded(tl.abs(x[1]), ALIGNED)
        elements += folded(mask.to(tl.float32), ALIGNED)
    n = tl.sum(elements)
    to = sums + slot * (2 * WIDTH)
    for k in tl.static_range(COUNT):
        distance = tl.sum(distances[k])
        square = tl.sum(squares[k]) - distance * distance / n
        tl.store(to + k, centres[k] + distance / n)
        tl.store(to + WIDTH + k, tl.where(square < 0.0, 0.0, square))
    tl.store(to + COUNT, tl.sum(magnitudes) / n)
    tl.store(to + WIDTH + COUNT, n)


@triton.jit
def merge(table, sums, totals, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """totals[operand], (2, WIDTH): means and variances of a tensor, from those of its tiles. One program each."""
    record = table + tl.program_id(0).to(tl.int64) * RECORD
    begin, count = tl.load(record + field("first_slot")), tl.load(record + field("tiles"))
    elements = tl.load(record + field("elements")).to(tl.float32)
    f = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(0, count, BLOCK):
        n, means, _ = _tiles(sums, begin, count, first, f, COUNT, WIDTH, BLOCK)
        total += means * (n / elements)[:, None]
    mean = tl.sum(total, 0)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(0, count, BLOCK):
        n, means, squares = _tiles(sums, begin, count, first, f, COUNT, WIDTH, BLOCK)
        distance = tl.where((n > 0.0)[:, None], means - mean[None, :], 0.0)
        total += squares + distance * distance * n[:, None]
    to = totals + tl.load(record + field("operand")) * (2 * WIDTH)
    tl.store(to + f, mean)
    tl.store(to + WIDTH + f, tl.sum(total, 0) / elements)


@triton.jit
def _tiles(sums, begin, count, first, f, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(elements, means, squares) of BLOCK tiles of a tensor, 0 behind its last."""
    tile = first + tl.arange(0, BLOCK)
    at = sums + (begin + tile) * (2 * WIDTH)
    n = tl.load(at + WIDTH + COUNT, mask=tile < count, other=0.0)
    mask = (tile < count)[:, None] & (f <= COUNT)[None, :]
    means = tl.load(at[:, None] + f[None, :], mask=mask, other=0.0)
    squares = tl.load(at[:, None] + WIDTH + f[None, :], mask=mask & (f < COUNT)[None, :], other=0.0)
    return n, means, squares
