"""What the Triton kernels share: how tensors lie and how they are cut into tiles, running averages, sums; and of the
operations (all but kernels/small_fc_lopt, which has its own) the table of tensors, gradients and outputs.

A launch takes all tensors of one `Layout`. Each is a record of the table: int64 numbers, `FIELDS`. A tensor is
[batch0, x, batch1, y, batch2] in memory order (lopt_fast.layout.Loops): for each (batch0, batch1), a group, a matrix of
x rows and run = y * batch2 columns, its rows batch1 * run elements apart. A tile is some rows (`rows_per_tile`) of
COLUMNS columns of a group, and one program's work, in blocks of (ROWS, COLUMNS). Where no factored moments are kept a
tensor is cut into rows of COLUMNS elements instead.

Sums go from a tile to its own place, its slot, and `add_tiles` adds the slots of a tensor up in their order: no
atomics, the same bits in every run. Numbers of a step are read on the device, the host waits for nothing.

Constants of a launch (tl.constexpr):
    FACTORED                 matrices; else rows of COLUMNS elements
    GATHER                   batch2 may be above 1: the place along x differs from column to column
    ALIGNED                  every address, stride and length is a multiple of 16 bytes: vector loads
    ROWS, COLUMNS            block, powers of two
    TYPE                     of parameters, gradients and outputs; state and arithmetic are float32
    MOMENTA, SECOND_MOMENTS, FACTORED_MOMENTS   how many running averages of each kind
    OUTPUT                   "parameter": the new parameter; "delta": what is to be added to it; "step": the step alone
"""

from dataclasses import dataclass
from typing import Any, Literal

import triton
import triton.language as tl

SHAPE = (
    "elements", "batch0", "x", "batch1", "run", "batch2", "x_size", "y_size",
    "rows_per_tile", "x_tiles", "run_tiles", "tiles", "first_slot",
)  # fmt: skip
"""The first fields of every record: how the tensor lies, and its tiles. A kernel's own fields stand behind them."""
OF_CALL = (
    "param", "grad", "output",
    "momentum", "momentum_stride", "second_moment", "second_moment_stride",  # strides: from one average to the next
    "x_accumulator", "x_accumulator_stride",  # factored moments along x; not FACTORED: of every element
    "y_accumulator", "y_accumulator_stride",
    "lr", "weight_decay",  # places in `numbers`
)  # fmt: skip
"""Fields that may differ from call to call. Addresses are of float32 arrays but for the first three."""
FIELDS = (
    *SHAPE,
    *OF_CALL,
    "operand",  # row of the arrays that have one for each tensor
    "x_sums", "y_sums",  # (tiles along the run, x_size), (tiles along x, y_size): sums of g^2 over the other axis
    "means",  # (factored moments, batches): of the row accumulator along its axis
)  # fmt: skip
# tl.constexpr: kernels in Triton's cache on disk, which are of other fields, then do not count as the same.
_PLACES = tl.constexpr({name: i for i, name in enumerate(FIELDS)})

RECORD = tl.constexpr(len(FIELDS))
TILE_FIELDS = tl.constexpr(4)  # tensor, group, tile along x, tile along the run
GRAD_SCALE = tl.constexpr(0)  # places in `numbers`, which then has learning rates and weight decays
GRAD_BOUND = tl.constexpr(1)

TYPES = ("float32", "bfloat16", "float16")


@triton.constexpr_function
def field(name):
    """Place of `name` in a record; of those in SHAPE in any record."""
    return _PLACES.value[name]


# ---- where things lie ----


@triton.jit
def floats(record, FIELD: tl.constexpr):
    """Address of a float32 array of the record."""
    return tl.load(record + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def typed(record, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Address of an array of TYPE, with the promise that it is a multiple of 16 where ALIGNED."""
    pointer = tl.load(record + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def length(record, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """A stride or a length, with the promise that it is a multiple of 8 elements where ALIGNED."""
    value = tl.load(record + FIELD)
    if ALIGNED:
        value = tl.multiple_of(value, 8)
    return value


@triton.jit
def tile_at(index, table, tiles, LENGTH: tl.constexpr):
    """Of a tile, in a table whose records have LENGTH fields: (tensor, record, group, tile along x, tile along the
    run)."""
    tile = tiles + index.to(tl.int64) * TILE_FIELDS
    tensor = tl.load(tile).to(tl.int64)
    group, x_tile, run_tile = tl.load(tile + 1).to(tl.int64), tl.load(tile + 2), tl.load(tile + 3)
    return tensor, table + tensor * LENGTH, group, x_tile, run_tile


@triton.jit
def slot_of(record, group, x_tile, run_tile):
    """Slot of a tile: its number among all tiles."""
    x_tiles, run_tiles = tl.load(record + field("x_tiles")), tl.load(record + field("run_tiles"))
    return tl.load(record + field("first_slot")) + (group * x_tiles + x_tile) * run_tiles + run_tile


@triton.jit
def rows_of(record, x_tile):
    """First row of a tile and the row behind its last."""
    count = tl.load(record + field("rows_per_tile"))
    begin = x_tile * count
    return begin, tl.minimum(begin + count, tl.load(record + field("x")))


@triton.jit
def columns_of(run_tile, COLUMNS: tl.constexpr):
    """Columns of a tile."""
    return run_tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def tile_of(table, tiles, COLUMNS: tl.constexpr):
    """Of this program's tile: (record, slot, group, tile along x, tile along the run, first row, row behind the last,
    columns)."""
    _tensor, record, group, x_tile, run_tile = tile_at(tl.program_id(0), table, tiles, RECORD)
    begin, end = rows_of(record, x_tile)
    slot, columns = slot_of(record, group, x_tile, run_tile), columns_of(run_tile, COLUMNS)
    return record, slot, group, x_tile.to(tl.int64), run_tile.to(tl.int64), begin, end, columns


@triton.jit
def place_of(record, group, FACTORED: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr):
    """(first element of a group, elements from one row to the next, rows, what bounds columns) for `block_of`."""
    x = tl.load(record + field("x"))
    if FACTORED:
        batch1, bound = tl.load(record + field("batch1")), length(record, field("run"), ALIGNED)
        base = (group // batch1 * (x * batch1) + group % batch1) * bound
        stride = batch1 * bound
        if ALIGNED:
            base, stride = tl.multiple_of(base, 8), tl.multiple_of(stride, 8)
    else:
        base, stride, bound = group * 0, x * 0 + COLUMNS, length(record, field("elements"), ALIGNED)
    return base, stride, x, bound


@triton.jit
def block_of(place, rows, columns, FACTORED: tl.constexpr):
    """(offsets, mask) of the elements of a block, both (ROWS, COLUMNS)."""
    base, stride, x, bound = place
    offsets = base + rows[:, None] * stride + columns[None, :]
    if FACTORED:
        mask = (rows < x)[:, None] & (columns < bound)[None, :]
    else:
        mask = offsets < bound
    return offsets, mask


# ---- arithmetic ----


@triton.jit
def clipped(x, bound):
    """x within [-bound, bound], NaN kept."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def average(old, rate, new):
    """Exponential moving average with rate = 1 - decay, as lopt_fast.reference.accumulate."""
    return (old - old * rate) + new * rate


@triton.jit
def gradient_rule(numbers):
    """(scale, bound) of gradients."""
    return tl.load(numbers + GRAD_SCALE), tl.load(numbers + GRAD_BOUND)


@triton.jit
def gradient_of(grad, offsets, mask, rule):
    """The gradient of a block, scaled and clipped; 0 outside the mask."""
    scale, bound = rule
    return clipped(tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32) * scale, bound)


@triton.jit
def parameter_of(param, offsets, mask):
    """The parameters of a block; 0 outside the mask."""
    return tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def averages_in(
    record, rates, COUNT: tl.constexpr, FIRST_RATE: tl.constexpr, FIELD: tl.constexpr, ALIGNED: tl.constexpr
):
    """COUNT running averages whose address is in FIELD: (address, distance from one to the next, 1 - decays)."""
    chosen = ()
    for k in tl.static_range(COUNT):
        chosen += (tl.load(rates + FIRST_RATE + k),)
    return typed(record, FIELD, tl.float32, ALIGNED), length(record, FIELD + 1, ALIGNED), chosen


@triton.jit
def averages_of(averages, offsets, mask, new):
    """Those of a block after the value `new`."""
    array, stride, rates = averages
    after = ()
    for k in tl.static_range(len(rates)):
        after += (average(tl.load(array + k * stride + offsets, mask=mask, other=0.0), rates[k], new),)
    return after


@triton.jit
def store_averages(averages, offsets, mask, values):
    """Writes what `averages_of` gave."""
    array, stride, _rates = averages
    for k in tl.static_range(len(values)):
        tl.store(array + k * stride + offsets, values[k], mask=mask)


@triton.jit
def output_of(record, numbers, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a step's result goes: (address, learning rate, weight decay)."""
    lr = tl.load(numbers + tl.load(record + field("lr")))
    weight_decay = tl.load(numbers + tl.load(record + field("weight_decay")))
    return typed(record, field("output"), TYPE, ALIGNED), lr, weight_decay


@triton.jit
def store_result(output, offsets, mask, p, step, OUTPUT: tl.constexpr, TYPE: tl.constexpr):
    """Writes what a step gives: see OUTPUT."""
    address, lr, weight_decay = output
    result = step
    if OUTPUT != "step":
        result = -lr * (step + p * weight_decay)
        if OUTPUT == "parameter":
            result = p + result
    tl.store(address + offsets, result.to(TYPE), mask=mask)


# ---- sums of tiles ----


@triton.constexpr_function
def folds(ALIGNED):
    """How many neighbours, which one thread holds, are added before they go to a running sum: fewer registers."""
    return 4 if ALIGNED else 1


@triton.jit
def folded(x, ALIGNED: tl.constexpr):
    """(ROWS, COLUMNS / folds): sums of neighbours."""
    if ALIGNED:
        x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 4]), 2)
    return x


@triton.jit
def add_tiles(table, sums, totals, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """totals[operand]: the sum of `sums`, (slots, WIDTH), over all tiles of a tensor. A program for each record."""
    record = table + tl.program_id(0).to(tl.int64) * RECORD
    begin, count = tl.load(record + field("first_slot")), tl.load(record + field("tiles"))
    f = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(0, count, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        at = (begin + tile)[:, None] * WIDTH + f[None, :]
        total += tl.load(sums + at, mask=(tile < count)[:, None], other=0.0)
    tl.store(totals + tl.load(record + field("operand")) * WIDTH + f, tl.sum(total, 0))


# ---- how they are launched ----


@dataclass(frozen=True)
class Layout:
    """Tensors that one launch takes: how they lie in memory."""

    place: Literal["matrix", "gathered", "vector"]
    """matrix: factored, batch2 = 1; gathered: factored, any; vector: all others."""
    x_is_row: bool
    """Which of the two factored axes is the outer one; True for a vector."""
    aligned: bool
    columns: int
    dtype: str = "float32"
    """Of parameters, gradients and outputs."""

    def constants(self, block: int) -> dict[str, Any]:
        """Constants of a launch with blocks of about so many elements."""
        return {
            "FACTORED": self.place != "vector",
            "GATHER": self.place == "gathered",
            "X_IS_ROW": self.x_is_row,
            "ALIGNED": self.aligned,
            "ROWS": max(block // self.columns, 1),
            "COLUMNS": self.columns,
            "TYPE": getattr(tl, self.dtype),
        }


def layout_columns(run: int) -> int:
    """COLUMNS for rows of `run` elements."""
    return 16 if run <= 32 else 64


def rows_per_tile(elements: int, columns: int) -> int:
    """Rows of a tile. Many rows make for few partial sums, few rows for many tiles; the shape alone decides."""
    rows = 256 if elements >= 1 << 22 else 128 if elements >= 1 << 19 else 64
    return rows * (64 // columns)


ADD_TILES_BLOCK = 64


def launched(kernel: Any, constants: dict[str, Any], warps: int = 4) -> tuple[dict[str, Any], dict[str, Any]]:
    """(those of the constants that `kernel` has, options), as a launch takes them."""
    # One stage: loads are not staged in shared memory.
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return {name: value for name, value in constants.items() if name in kernel.arg_names}, options
