"""small_fc_lopt in Triton: the passes of README.md over all tensors of a model, for NVIDIA and AMD GPUs.

The launches of a step, in order (`lopt_fast.torch.triton` makes them; each takes all tensors of one layout and type):

    square_sums, clip_factors    clipping alone: sum of g^2 of every tile, then the factor
    find_first_steps             lagged statistics alone: whether a tensor takes its first step
    factor_statistics            pass 1: sums of g^2 along both factored axes, for each tile
    move_accumulators            adds them up, moves the factored accumulators on, their sums over chunks
    fold_factors                 row and column factors, and what row and column columns add to the hidden units
    feature_statistics           pass 2: sums of the squares of the features, for each tile
    fold_network                 adds them up, normalises the first layer; counts the step
    apply                        pass 3: new momentum and second moment, features, MLP, output

With lagged statistics passes 1 and 2 are left out, or do nothing (their `found_inf` is what `find_first_steps` wrote),
unless a tensor takes its first step; after `apply`, which then takes the sums of both, come `move_accumulators` and
`keep_statistics`. No host value is read after the launch: learning rate, step counter, gradient scale and clipping lie
on the device. Sums are in an order that the shapes fix: no atomics.

How a tensor lies and is cut into tiles: kernels/common/triton.py, where FACTORED, GATHER, ALIGNED, ROWS and COLUMNS are
explained too. Here FACTORED says that the rank is at least 2.

More constants of a launch (tl.constexpr):
    PARAM, GRAD, STATE       types in memory; arithmetic is in float32
    H, UNITS, LAYERS         hidden units, the same rounded up to a power of two (MATMUL: at least 16), hidden layers
    MATMUL, PRECISION        products of the network by tl.dot ("ieee": float32; "tf32x3": tensor cores, three
                             products, float32-like), else unit by unit in registers
"""

from dataclasses import dataclass
from typing import Any, Literal

import triton
import triton.language as tl
from lopt_fast.kernels.common.triton import (
    SHAPE,
    average,
    block_of,
    columns_of,
    floats,
    folded,
    folds,
    launched,
    length,
    place_of,
    rows_of,
    slot_of,
    tile_at,
    typed,
)

from lopt_fast.reference import (
    CLIP_EPSILON,
    DIAGONAL_EPSILON,
    FACTOR_EPSILON,
    FACTOR_FLOOR,
    NORMALISER_EPSILON,
    RMS_EPSILON,
    ROW_MEAN_EPSILON,
    SQUARE_EPSILON,
)
from lopt_fast.spec import LAGGED_CLIP, TIMESCALES, Spec

FIELDS = (
    *SHAPE,
    "param", "output", "momentum", "momentum_stride", "second_moment",
    "x_accumulator", "y_accumulator",  # (3, x_size), (3, y_size): row and column or the other way round
    "diagonal",  # (3, elements): rank below 2
    "mean_squares", "step",
    "rates",  # index into the (lr, weight_decay) pairs of `numbers`
    "clip",  # index into `clip`
    "adds",  # 1: the output is what is to be added to the parameter
    "x_is_row",
    "x_sums",  # (run_tiles, x_size) sums of g^2 over y
    "y_sums",  # (x_tiles, y_size) sums of g^2 over x
    "x_factor", "y_factor",  # (3, x_size), (3, y_size)
    "x_bias", "y_bias",  # (UNITS, size), or (size, UNITS) where MATMUL
    "network",  # see `network_at`
    "x_chunk", "x_chunks", "y_chunk", "y_chunks",  # first chunk of each axis, and how many
)  # fmt: skip
"""A tensor in the table: one int64 each. Addresses of float32 arrays but for param, output and the two moments."""
# tl.constexpr: kernels in Triton's cache on disk, which are of other fields, then do not count as the same.
_PLACES = tl.constexpr({name: i for i, name in enumerate(FIELDS)})

RECORD = tl.constexpr(len(FIELDS))
SIDE = tl.constexpr(16)  # a chunk is SIDE x SIDE entries of an accumulator
CHUNK_FIELDS = tl.constexpr(
    8
)  # tensor, axis (0: x), outer, place on the axis, inner, first chunk of these fibres, chunks, 0
CHUNK_STATISTICS = tl.constexpr(
    64
)  # 3 sums of a^2, 3 of 1 / (a + eps); from 16 on 3 x 16 sums of a along the axis
SUMS = tl.constexpr(32)  # sums of a tile: one for each feature, padded

_FIRST = {}
for _i, _column in enumerate(Spec().normalised_columns):
    _FIRST.setdefault(_column.group, _i)

# Columns of the network's input; features are the columns that differ from parameter to parameter, in the order of
# kernels/common/constants.h. The first 13 of both are the same.
NORMALISED = tl.constexpr(len(Spec().normalised_columns))
INPUTS = tl.constexpr(Spec().input_size)
TIMES = tl.constexpr(len(TIMESCALES))
C_ROW = tl.constexpr(_FIRST["fac_row"])
C_COLUMN = tl.constexpr(_FIRST["fac_column"])
C_RSQRT_ROW = tl.constexpr(_FIRST["rsqrt_fac_row"])
C_RSQRT_COLUMN = tl.constexpr(_FIRST["rsqrt_fac_column"])
C_FAC_M = tl.constexpr(_FIRST["fac_m"])
F_P = tl.constexpr(1)
F_RSQRT_V = tl.constexpr(9)
F_FAC_M = tl.constexpr(13)
F_DIAGONAL = tl.constexpr(16)  # rank below 2: also these, each standing for two equal columns
F_RSQRT_DIAGONAL = tl.constexpr(19)
FEATURES = tl.constexpr(22)
DECAYS = tl.constexpr(7)  # 3 momenta, second moment, 3 factored accumulators

E_RMS = tl.constexpr(RMS_EPSILON)
E_SQUARE = tl.constexpr(SQUARE_EPSILON)
E_ROW_MEAN = tl.constexpr(ROW_MEAN_EPSILON)
E_FLOOR = tl.constexpr(FACTOR_FLOOR)
E_DIAGONAL = tl.constexpr(DIAGONAL_EPSILON)
E_FACTOR = tl.constexpr(FACTOR_EPSILON)
E_NORMALISER = tl.constexpr(NORMALISER_EPSILON)
E_CLIP = tl.constexpr(CLIP_EPSILON)
BOUND = tl.constexpr(LAGGED_CLIP)
LOG2E = tl.constexpr(1.4426950408889634)
NAN = tl.constexpr(tl.PropagateNan.ALL)


# ---- where things lie ----


@triton.constexpr_function
def field(name):
    """Place of `name` in a record."""
    return _PLACES.value[name]


@triton.constexpr_function
def theta_at(name, H, LAYERS):
    """Place of an array in theta: lopt_fast.reference.flatten_theta, then the timescales."""
    sizes = {"w0": INPUTS.value * H, "b0": H}
    if LAYERS == 2:
        sizes |= {"w1": H * H, "b1": H}
    sizes |= {"w_out": 2 * H, "b_out": 2, "decays": DECAYS.value, "timescales": TIMES.value, "end": 0}
    names = list(sizes)
    return sum(sizes[n] for n in names[: names.index(name)])


@triton.constexpr_function
def network_at(name, UNITS):
    """Place of an array in a tensor's folded network (float32).

    w0 (32, UNITS) with the normalisers, b0 (UNITS) with the time columns, w_out (UNITS, 2) and b_out (2) with
    everything that multiplies the step, limit (32) bounds on the features before normalisation (lagged), and numbers:
    what multiplies p, seed (bits of an int32), whether it is the tensor's first step.
    """
    sizes = {
        "w0": 32 * UNITS,
        "b0": UNITS,
        "w_out": 2 * UNITS,
        "b_out": 2,
        "limit": 32,
        "numbers": 4,
        "end": 0,
    }
    names = list(sizes)
    return sum(sizes[n] for n in names[: names.index(name)])


@triton.jit
def _x_place(record, group):
    """(array place of a group's row 0, of one row more, batch2, rows) for `_along_x`."""
    x, batch1, batch2 = (
        tl.load(record + field("x")), tl.load(record + field("batch1")), tl.load(record + field("batch2"))
    )  # fmt: skip
    return (group // batch1 * (x * batch1) + group % batch1) * batch2, batch1 * batch2, batch2, x


@triton.jit
def _along_x(array, place, rows, columns, mask, GATHER: tl.constexpr):
    """Values of an array along x for a block: (ROWS, 1), or (ROWS, COLUMNS) where GATHER."""
    first, stride, batch2, x = place
    entries = first + rows * stride
    if GATHER:
        values = tl.load(array + entries[:, None] + (columns % batch2)[None, :], mask=mask, other=0.0)
    else:
        values = tl.load(array + entries, mask=rows < x, other=0.0)[:, None]
    return values


@triton.jit
def _along_y(record, FIELD: tl.constexpr, group, columns, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """COUNT arrays along y for the columns of a tile, (1, COLUMNS) each: they stay in registers."""
    run, size = length(record, field("run"), ALIGNED), length(record, field("y_size"), ALIGNED)
    array = typed(record, FIELD, tl.float32, ALIGNED) + group * run
    values = ()
    for k in tl.static_range(COUNT):
        values += (tl.load(array + k * size + columns, mask=columns < run, other=0.0)[None, :],)
    return values


# ---- arithmetic ----


@triton.jit
def _factor(x):
    """rsqrt(max(x, floor)), NaN for NaN."""
    return tl.rsqrt(tl.maximum(x, E_FLOOR, propagate_nan=NAN))


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=NAN)


@triton.jit
def _rounding_bits(offsets, seed):
    """32 bits for each element, fixed by its place and the step."""
    high = (offsets >> 32).to(tl.uint32) * 0x9E3779B1
    return _mix(offsets.to(tl.uint32) ^ high ^ (seed.to(tl.uint32) * 0x85EBCA6B))


@triton.jit
def _mix(h):
    """Hash of 32 bits to 32 bits (lowbias32 of C. Wellons)."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _to_state(x, bits, TYPE: tl.constexpr):
    """`x` as it is stored; to bfloat16 it is rounded up or down by chance (`bits`), right on average."""
    if TYPE == tl.bfloat16:
        sixteen = bits & 0xFFFF
        rounded = ((x.to(tl.uint32, bitcast=True) + sixteen) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(TYPE)


@triton.jit
def _grad_scale(record, numbers, clip):
    return tl.load(numbers) * tl.load(clip + tl.load(record + field("clip")))


# ---- gradients ----


@triton.jit(do_not_specialize=["first", "count", "a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7"])
def set_addresses(
    to, first, count,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
):  # fmt: skip
    """to[first + i] = a_i for i < count: the addresses become part of a graph that is captured."""
    a = (a0, a1, a2, a3, a4, a5, a6, a7)
    for i in tl.static_range(8):
        tl.store(to + first + i, a[i], mask=i < count)


# ---- clipping ----


@triton.jit(do_not_specialize=["found_inf"])
def square_sums(
    table, gradients, tiles, numbers, norms, found_inf,
    FACTORED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """norms[slot]: sum of (grad_scale g)^2 over a tile; 0 where the tensor is not clipped."""
    if tl.load(found_inf) != 0.0:
        return
    tensor, record, group, x_tile, run_tile = tile_at(tl.program_id(0), table, tiles, RECORD)
    gradient = typed(gradients + tensor, 0, GRAD, ALIGNED)
    columns = columns_of(run_tile, COLUMNS)
    scale = tl.load(numbers)
    begin, end = rows_of(record, x_tile)
    place = place_of(record, group, FACTORED, ALIGNED, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        offsets, mask = block_of(place, first + tl.arange(0, ROWS), columns, FACTORED)
        g = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        total += g * g
    result = tl.where(tl.load(record + field("clip")) != 0, tl.sum(total), 0.0)
    tl.store(norms + slot_of(record, group, x_tile, run_tile), result)


@triton.jit(do_not_specialize=["count"])
def clip_factors(norms, count, numbers, clip, BLOCK: tl.constexpr):
    """clip[1] = min(1, max_norm / (norm + eps)), NaN if that is NaN. One program."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(norms + at, mask=at < count, other=0.0)
    factor = tl.load(numbers + 1) / (tl.sqrt(tl.sum(total)) + E_CLIP)
    tl.store(clip + 1, tl.where(factor >= 1.0, 1.0, factor))


# ---- lagged statistics: whether passes 1 and 2 are needed ----


@triton.jit(do_not_specialize=["count", "found_inf"])
def find_first_steps(table, count, found_inf, idle, BLOCK: tl.constexpr):
    """idle: 0 where one of the `count` tensors takes its first step, which passes 1 and 2 then do for all; else 1, also
    where `found_inf` is not 0. One program."""
    seen = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        steps = tl.load(table + at * RECORD + field("step"), mask=at < count, other=0)
        t = tl.load(steps.to(tl.pointer_type(tl.int64)), mask=at < count, other=1)
        seen = tl.maximum(seen, (t == 0).to(tl.int32))
    needed = (tl.max(seen) != 0) & (tl.load(found_inf) == 0.0)
    tl.store(idle, tl.where(needed, 0.0, 1.0))


# ---- pass 1 and what follows it ----


@triton.jit
def _store_row_sums(record, run_tile, place, rows, columns, squares, GATHER: tl.constexpr):
    """x_sums: sums of a block over y."""
    x_sums = floats(record, field("x_sums")) + run_tile.to(tl.int64) * tl.load(record + field("x_size"))
    first, stride, batch2, x = place
    entries = first + rows * stride
    if GATHER:
        phase = columns % batch2
        for b in range(batch2):
            tl.store(
                x_sums + entries + b, tl.sum(tl.where((phase == b)[None, :], squares, 0.0), 1), mask=rows < x
            )
    else:
        tl.store(x_sums + entries, tl.sum(squares, 1), mask=rows < x)


@triton.jit
def _store_column_sums(record, group, x_tile, columns, squares):
    """y_sums: sums of a tile over x, of what its blocks added up to."""
    y_sums = floats(record, field("y_sums")) + x_tile.to(tl.int64) * tl.load(record + field("y_size"))
    run = tl.load(record + field("run"))
    tl.store(y_sums + group * run + columns, tl.sum(squares, 0), mask=columns < run)


@triton.jit(do_not_specialize=["found_inf"])
def factor_statistics(
    table, gradients, tiles, numbers, clip, found_inf,
    GATHER: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Pass 1 over a tile of a factored tensor: x_sums, y_sums."""
    if tl.load(found_inf) != 0.0:
        return
    tensor, record, group, x_tile, run_tile = tile_at(tl.program_id(0), table, tiles, RECORD)
    gradient = typed(gradients + tensor, 0, GRAD, ALIGNED)
    columns = columns_of(run_tile, COLUMNS)
    scale = _grad_scale(record, numbers, clip)
    begin, end = rows_of(record, x_tile)
    place = place_of(record, group, True, ALIGNED, COLUMNS)
    x_place = _x_place(record, group)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets, mask = block_of(place, rows, columns, True)
        g = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        total += g * g
        _store_row_sums(record, run_tile, x_place, rows, columns, g * g, GATHER)
    _store_column_sums(record, group, x_tile, columns, total)


@triton.jit
def _chunk(table, chunks, index):
    """A chunk is at most 256 entries of one accumulator, seen as [outer, axis, inner]: SIDE x SIDE places, along the
    axis alone where inner is 1.

    (record, descriptor, axis is x, size of the array, length of the axis, inner, entries, mask).
    """
    chunk = chunks + index.to(tl.int64) * CHUNK_FIELDS
    record = table + tl.load(chunk).to(tl.int64) * RECORD
    along_x = tl.load(chunk + 1) == 0
    batch1, batch2 = tl.load(record + field("batch1")), tl.load(record + field("batch2"))
    inner = tl.where(along_x, batch1 * batch2, batch2)
    length = tl.where(along_x, tl.load(record + field("x")), tl.load(record + field("run")) // batch2)
    size = tl.where(along_x, tl.load(record + field("x_size")), tl.load(record + field("y_size")))
    i, j = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    on_axis = tl.load(chunk + 3) + tl.where(inner == 1, i * SIDE + j, i)
    inside = tl.load(chunk + 4) + tl.where(inner == 1, 0, j)
    entries = (tl.load(chunk + 2) * length + on_axis) * inner + inside
    return record, chunk, along_x, size, length, inner, entries, (on_axis < length) & (inside < inner)


@triton.jit
def _of_axis(record, along_x, X_FIELD: tl.constexpr, Y_FIELD: tl.constexpr):
    address = tl.where(along_x, tl.load(record + X_FIELD), tl.load(record + Y_FIELD))
    return address.to(tl.pointer_type(tl.float32))


@triton.jit(do_not_specialize=["found_inf"])
def move_accumulators(
    table, chunks, statistics, theta, found_inf,
    H: tl.constexpr, LAYERS: tl.constexpr, UNITS: tl.constexpr, WHEN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Adds up the tiles of pass 1 and moves a chunk of an accumulator on; leaves its sums in `statistics`.

    WHEN: "exact"; "before" apply with lagged statistics (it moves at the first step alone); "after" it (at all others).
    """
    if tl.load(found_inf) != 0.0:
        return
    index = tl.program_id(0)
    record, _, along_x, size, _, _, entries, mask = _chunk(table, chunks, index)
    moves = True
    if WHEN == "before":
        moves = tl.load(tl.load(record + field("step")).to(tl.pointer_type(tl.int64))) == 0
    if WHEN == "after":
        network = floats(record, field("network"))
        if tl.load(network + network_at("numbers", UNITS) + 2) != 0.0:
            return
    accumulator = _of_axis(record, along_x, field("x_accumulator"), field("y_accumulator"))
    mean = tl.zeros([SIDE, SIDE], tl.float32)
    if moves:
        sums = _of_axis(record, along_x, field("x_sums"), field("y_sums"))
        tiles = tl.where(along_x, tl.load(record + field("run_tiles")), tl.load(record + field("x_tiles")))
        for first in range(0, tiles, TILES):
            tile = first + tl.arange(0, TILES)[:, None, None]
            part = tl.load(
                sums + tile * size + entries[None, :, :], mask=(tile < tiles) & mask[None, :, :], other=0.0
            )
            mean += tl.sum(part, 0)
        run, batch2, x = (
            tl.load(record + field("run")),
            tl.load(record + field("batch2")),
            tl.load(record + field("x")),
        )
        mean = mean / tl.where(along_x, run // batch2, x).to(tl.float32) + E_SQUARE
    to = statistics + index.to(tl.int64) * CHUNK_STATISTICS
    for k in tl.static_range(3):
        a = tl.load(accumulator + k * size + entries, mask=mask, other=0.0)
        if moves:
            a = tl.where(mask, average(a, tl.load(theta + theta_at("decays", H, LAYERS) + 4 + k), mean), 0.0)
            tl.store(accumulator + k * size + entries, a, mask=mask)
        tl.store(to + k, tl.sum(a * a))
        tl.store(to + 3 + k, tl.sum(tl.where(mask, 1.0 / (a + E_FACTOR), 0.0)))
        tl.store(to + 16 + k * SIDE + tl.arange(0, SIDE), tl.sum(a, 0))


@triton.jit
def _time_bias(theta, t, j, H: tl.constexpr, LAYERS: tl.constexpr):
    """Bias of hidden unit j of the first layer with what the time columns add; 0 from unit H on."""
    k = tl.arange(0, 16)
    scales = tl.load(theta + theta_at("timescales", H, LAYERS) + k, mask=k < TIMES, other=1.0)
    weights = tl.load(theta + (k + NORMALISED) * H + j, mask=(k < TIMES) & (j < H), other=0.0)
    tanh = 1.0 - 2.0 / (tl.exp2((t.to(tl.float32) / scales - 1.0) * (2.0 * LOG2E)) + 1.0)
    return tl.load(theta + theta_at("b0", H, LAYERS) + j, mask=j < H, other=0.0) + tl.sum(tanh * weights)


@triton.jit(do_not_specialize=["found_inf"])
def fold_factors(
    table, chunks, statistics, theta, found_inf,
    H: tl.constexpr, LAYERS: tl.constexpr, UNITS: tl.constexpr, MATMUL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Factors and biases of a chunk, with the sums of all chunks of its accumulator."""
    if tl.load(found_inf) != 0.0:
        return
    record, chunk, along_x, size, length, inner, entries, mask = _chunk(table, chunks, tl.program_id(0))
    t = tl.load(tl.load(record + field("step")).to(tl.pointer_type(tl.int64)))
    accumulator = _of_axis(record, along_x, field("x_accumulator"), field("y_accumulator"))
    factor = _of_axis(record, along_x, field("x_factor"), field("y_factor"))
    bias = _of_axis(record, along_x, field("x_bias"), field("y_bias"))
    is_row = along_x == (tl.load(record + field("x_is_row")) != 0)

    # Sums over the whole accumulator (0..5: three of a^2, three of 1 / (a + eps)).
    s = tl.arange(0, 8)
    begin = tl.where(along_x, tl.load(record + field("x_chunk")), tl.load(record + field("y_chunk")))
    count = tl.where(along_x, tl.load(record + field("x_chunks")), tl.load(record + field("y_chunks")))
    squares = tl.zeros([BLOCK, 8], tl.float32)
    for first in range(0, count, BLOCK):
        c = first + tl.arange(0, BLOCK)
        at = (begin + c)[:, None] * CHUNK_STATISTICS + s[None, :]
        squares += tl.load(statistics + at, mask=(c < count)[:, None] & (s < 6)[None, :], other=0.0)
    scales = tl.rsqrt(tl.sum(squares, 0) / size.to(tl.float32) + E_NORMALISER)

    a = ()
    roots = ()
    for k in tl.static_range(3):
        x = tl.load(accumulator + k * size + entries, mask=mask, other=0.0)
        # Sums along the axis, for every fibre of this chunk.
        fibre_begin, fibre_count = tl.load(chunk + 5).to(tl.int64), tl.load(chunk + 6)
        j = tl.arange(0, SIDE)
        sums = tl.zeros([BLOCK, SIDE], tl.float32)
        for first in range(0, fibre_count, BLOCK):
            c = first + tl.arange(0, BLOCK)
            at = (fibre_begin + c)[:, None] * CHUNK_STATISTICS + 16 + k * SIDE + j[None, :]
            sums += tl.load(statistics + at, mask=(c < fibre_count)[:, None], other=0.0)
        fibres = tl.sum(sums, 0)
        fibres = tl.where(inner == 1, tl.sum(fibres), fibres)
        mean = fibres / length.to(tl.float32) + E_ROW_MEAN
        tl.store(factor + k * size + entries, _factor(tl.where(is_row, x / mean[None, :], x)), mask=mask)
        a += (x,)
        roots += (tl.rsqrt(x + E_FACTOR),)

    raw_column = tl.where(is_row, C_ROW, C_COLUMN)
    root_column = tl.where(is_row, C_RSQRT_ROW, C_RSQRT_COLUMN)
    for unit in range(UNITS):
        total = tl.zeros([SIDE, SIDE], tl.float32)
        if along_x:
            total += _time_bias(theta, t, unit, H, LAYERS)
        for k in tl.static_range(3):
            raw = tl.load(theta + (raw_column + k) * H + unit, mask=unit < H, other=0.0)
            root = tl.load(theta + (root_column + k) * H + unit, mask=unit < H, other=0.0)
            raw *= tl.sum(tl.where(s == k, scales, 0.0))
            root *= tl.sum(tl.where(s == 3 + k, scales, 0.0))
            total += raw * a[k] + root * roots[k]
        at = entries * UNITS + unit if MATMUL else unit * size + entries
        tl.store(bias + at, total, mask=mask)


# ---- features: what passes 2 and 3 share ----


@triton.jit
def _rates(theta, H: tl.constexpr, LAYERS: tl.constexpr):
    """The seven 1 - decay."""
    rates = ()
    for k in tl.static_range(DECAYS):
        rates += (tl.load(theta + theta_at("decays", H, LAYERS) + k),)
    return rates


@triton.jit
def _moment_arrays(record, STATE: tl.constexpr, ALIGNED: tl.constexpr):
    """(momenta, elements from one to the next, second moment)."""
    momentum = typed(record, field("momentum"), STATE, ALIGNED)
    stride = length(record, field("momentum_stride"), ALIGNED)
    return momentum, stride, typed(record, field("second_moment"), STATE, ALIGNED)


@triton.jit
def _moments(arrays, offsets, mask, g, rates):
    """(momenta, second moment) after gradient g."""
    momentum, stride, second_moment = arrays
    m = ()
    for k in tl.static_range(3):
        old = tl.load(momentum + k * stride + offsets, mask=mask, other=0.0).to(tl.float32)
        m += (average(old, rates[k], g),)
    v = tl.load(second_moment + offsets, mask=mask, other=0.0).to(tl.float32)
    return m, average(v, rates[3], g * g)


@triton.jit
def _diagonal(record, offsets, mask, g, rates, ALIGNED: tl.constexpr):
    """The full-size accumulators of a tensor that is not factored, after gradient g."""
    diagonal = typed(record, field("diagonal"), tl.float32, ALIGNED)
    elements = length(record, field("elements"), ALIGNED)
    d = ()
    for k in tl.static_range(3):
        old = tl.load(diagonal + k * elements + offsets, mask=mask, other=0.0)
        d += (average(old, rates[4 + k], g * g + E_SQUARE),)
    return d


@triton.jit
def _factors(record, y_factors, place, rows, columns, mask, GATHER: tl.constexpr):
    """Products of row and column factors for a block."""
    x_factor, x_size = floats(record, field("x_factor")), tl.load(record + field("x_size"))
    f = ()
    for k in tl.static_range(3):
        f += (_along_x(x_factor + k * x_size, place, rows, columns, mask, GATHER) * y_factors[k],)
    return f


@triton.jit
def _features(g, p, m, v, d, factors, mask, FACTORED: tl.constexpr):
    """The 16 features of a factored tensor, or the 22 of one that is not. Zero outside the mask."""
    r = tl.where(mask, tl.rsqrt(v + E_RMS), 0.0)
    x = (g, p, m[0], m[1], m[2], v, m[0] * r, m[1] * r, m[2] * r, r)
    if FACTORED:
        for k in tl.static_range(3):
            x += (g * factors[k],)
        for k in tl.static_range(3):
            x += (m[k] * factors[k],)
    else:
        for k in tl.static_range(3):
            x += (g * _factor(d[k] + E_DIAGONAL),)
        for k in tl.static_range(3):
            x += (m[k] * tl.rsqrt(d[k] + E_RMS),)
        for k in tl.static_range(3):
            x += (tl.where(mask, d[k], 0.0),)
        for k in tl.static_range(3):
            x += (tl.where(mask, tl.rsqrt(d[k] + E_FACTOR), 0.0),)
    return x


@triton.jit
def _no_sums(ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros([ROWS, COLUMNS // folds(ALIGNED)], tl.float32),)
    return sums


@triton.jit
def _add_squares(sums, x, ALIGNED: tl.constexpr):
    """Adds x^2 of every feature."""
    out = ()
    for f in tl.static_range(len(sums)):
        out += (sums[f] + folded(x[f] * x[f], ALIGNED),)
    return out


@triton.jit
def _store_sums(to, sums):
    for f in tl.static_range(len(sums)):
        tl.store(to + f, tl.sum(sums[f]))


# ---- pass 2 and what follows it ----


@triton.jit(do_not_specialize=["found_inf"])
def feature_statistics(
    table, gradients, tiles, sums, theta, numbers, clip, found_inf,
    FACTORED: tl.constexpr, GATHER: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """Pass 2 over a tile: sums[slot]. Tiles are taken backwards: the cache still holds what pass 1 read last."""
    if tl.load(found_inf) != 0.0:
        return
    last = tl.num_programs(0) - 1
    tensor, record, group, x_tile, run_tile = tile_at(last - tl.program_id(0), table, tiles, RECORD)
    gradient = typed(gradients + tensor, 0, GRAD, ALIGNED)
    param = typed(record, field("param"), PARAM, ALIGNED)
    columns = columns_of(run_tile, COLUMNS)
    scale = _grad_scale(record, numbers, clip)
    rates = _rates(theta, H, LAYERS)
    begin, end = rows_of(record, x_tile)
    total = _no_sums(ROWS, COLUMNS, ALIGNED, F_DIAGONAL if FACTORED else FEATURES)
    place = place_of(record, group, FACTORED, ALIGNED, COLUMNS)
    moments = _moment_arrays(record, STATE, ALIGNED)
    if FACTORED:
        x_place = _x_place(record, group)
        y_factors = _along_y(record, field("y_factor"), group, columns, 3, ALIGNED)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets, mask = block_of(place, rows, columns, FACTORED)
        g = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        p = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
        m, v = _moments(moments, offsets, mask, g, rates)
        if FACTORED:
            factors = _factors(record, y_factors, x_place, rows, columns, mask, GATHER)
            x = _features(g, p, m, v, None, factors, mask, True)
        else:
            x = _features(g, p, m, v, _diagonal(record, offsets, mask, g, rates, ALIGNED), None, mask, False)
        total = _add_squares(total, x, ALIGNED)
    _store_sums(sums + slot_of(record, group, x_tile, run_tile) * SUMS, total)


@triton.jit
def _mean_squares(record, sums, BLOCK: tl.constexpr):
    """(SUMS,) mean squares of the features of a tensor: sums of all its tiles in their order."""
    f = tl.arange(0, SUMS)
    begin, count = tl.load(record + field("first_slot")), tl.load(record + field("tiles"))
    features = tl.where(tl.load(record + field("x_size")) != 0, F_DIAGONAL, FEATURES)
    total = tl.zeros([BLOCK, SUMS], tl.float32)
    for first in range(0, count, BLOCK):
        c = first + tl.arange(0, BLOCK)
        mask = (c < count)[:, None] & (f < features)[None, :]
        total += tl.load(sums + (begin + c)[:, None] * SUMS + f[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0) / tl.load(record + field("elements")).to(tl.float32)


@triton.jit
def _column_of(f):
    """Column that a feature shows; for the diagonal ones the first of two."""
    return (
        f
        + tl.where(f < F_FAC_M, 0, tl.where(f < F_DIAGONAL, C_FAC_M - F_FAC_M, 0))
        + tl.where(
            f < F_DIAGONAL,
            0,
            tl.where(f < F_RSQRT_DIAGONAL, C_ROW - F_DIAGONAL, C_RSQRT_ROW - F_RSQRT_DIAGONAL),
        )
    )


@triton.jit(do_not_specialize=["found_inf"])
def fold_network(
    table, sums, theta, numbers, found_inf, step_mult, exp_mult, scale_epsilon,
    H: tl.constexpr, LAYERS: tl.constexpr, UNITS: tl.constexpr, LAGGED: tl.constexpr, PARAMETER_RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The folded network of a tensor (`network_at`). Reads the step counter last of all and adds one."""
    if tl.load(found_inf) != 0.0:
        return
    record = table + tl.program_id(0).to(tl.int64) * RECORD
    step = tl.load(record + field("step")).to(tl.pointer_type(tl.int64))
    t = tl.load(step)
    factored = tl.load(record + field("x_size")) != 0
    f = tl.arange(0, SUMS)
    used = f < tl.where(factored, F_DIAGONAL, FEATURES)
    column = tl.where(used, _column_of(f), 0)
    squares = tl.zeros([SUMS], tl.float32)
    if LAGGED:
        if t > 0:
            squares += tl.load(floats(record, field("mean_squares")) + column, mask=used, other=0.0)
        else:
            squares += _mean_squares(record, sums, BLOCK)
    else:
        squares += _mean_squares(record, sums, BLOCK)
    root = tl.sqrt(squares + E_NORMALISER)

    network = floats(record, field("network"))
    tl.store(network + network_at("limit", UNITS) + f, root * BOUND)
    unit = tl.arange(0, UNITS)
    at = column[:, None] * H + unit[None, :]
    real = used[:, None] & (unit < H)[None, :]
    w = tl.load(theta + at, mask=real, other=0.0)
    twin = (C_COLUMN - C_ROW) * H  # the second of two equal columns
    w += tl.load(theta + at + twin, mask=real & (f >= F_DIAGONAL)[:, None], other=0.0)
    tl.store(network + network_at("w0", UNITS) + f[:, None] * UNITS + unit[None, :], w / root[:, None])
    for j in range(UNITS):
        tl.store(network + network_at("b0", UNITS) + j, _time_bias(theta, t, j, H, LAYERS))

    rates = numbers + 2 + 2 * tl.load(record + field("rates"))
    lr = tl.load(rates)
    direction = lr * step_mult
    if PARAMETER_RMS:
        direction *= tl.sqrt(tl.sum(tl.where(f == F_P, squares, 0.0)) + scale_epsilon)
    o = tl.arange(0, 2)
    multiplier = tl.where(o == 0, direction, exp_mult * LOG2E)
    w_out = tl.load(
        theta + theta_at("w_out", H, LAYERS) + 2 * unit[:, None] + o[None, :],
        mask=(unit < H)[:, None],
        other=0.0,
    )
    tl.store(
        network + network_at("w_out", UNITS) + 2 * unit[:, None] + o[None, :], w_out * multiplier[None, :]
    )
    b_out = tl.load(theta + theta_at("b_out", H, LAYERS) + o)
    tl.store(network + network_at("b_out", UNITS) + o, b_out * multiplier)

    to = network + network_at("numbers", UNITS)
    kept = tl.where(tl.load(record + field("adds")) != 0, 0.0, 1.0)
    tl.store(to, kept - lr * tl.load(rates + 1))
    tl.store(to + 1, t.to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(to + 2, tl.where(t == 0, 1.0, 0.0))
    tl.store(step, t + 1)


@triton.jit(do_not_specialize=["found_inf"])
def keep_statistics(table, sums, found_inf, BLOCK: tl.constexpr):
    """mean_squares for the next step, from the sums that `apply` took (lagged statistics)."""
    if tl.load(found_inf) != 0.0:
        return
    record = table + tl.program_id(0).to(tl.int64) * RECORD
    squares = _mean_squares(record, sums, BLOCK)
    mean_squares = floats(record, field("mean_squares"))
    f = tl.arange(0, SUMS)
    column = _column_of(f)
    tl.store(mean_squares + column, squares, mask=f < F_DIAGONAL)
    # Row and column columns: zero where factored, there the sums are.
    tl.store(mean_squares + column, squares, mask=(f >= F_DIAGONAL) & (f < FEATURES))
    tl.store(mean_squares + column + C_COLUMN - C_ROW, squares, mask=(f >= F_DIAGONAL) & (f < FEATURES))


# ---- pass 3 ----


@triton.jit
def _dense(a, x, w, UNITS: tl.constexpr, STRIDE: tl.constexpr):
    """a[j] + sum over k of w[k, j] x[k], unit by unit; weights STRIDE apart from one k to the next."""
    for k in tl.static_range(len(x)):
        out = ()
        for j in tl.static_range(UNITS):
            out += (a[j] + tl.load(w + k * STRIDE + j) * x[k],)
        a = out
    return a


@triton.jit
def _first_biases(
    record, y_biases, place, rows, columns, mask,
    FACTORED: tl.constexpr, GATHER: tl.constexpr, H: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """What the hidden units of the first layer start from: time, row and column columns and the bias."""
    a = ()
    if FACTORED:
        x_bias, x_size = floats(record, field("x_bias")), tl.load(record + field("x_size"))
        for j in tl.static_range(H):
            a += (_along_x(x_bias + j * x_size, place, rows, columns, mask, GATHER) + y_biases[j],)
    else:
        b0 = floats(record, field("network")) + network_at("b0", UNITS)
        for j in tl.static_range(H):
            a += (tl.zeros(mask.shape, tl.float32) + tl.load(b0 + j),)
    return a


@triton.jit
def _elementwise_network(network, theta, x, a, H: tl.constexpr, UNITS: tl.constexpr, LAYERS: tl.constexpr):
    """(direction, magnitude) of a block, in registers: one block of values for each unit, which begins at `a`."""
    zero = tl.zeros(x[0].shape, tl.float32)
    a = _dense(a, x, network, H, UNITS)
    if LAYERS == 2:
        hidden = ()
        for j in tl.static_range(H):
            hidden += (_relu(a[j]),)
        a = ()
        for j in tl.static_range(H):
            a += (zero + tl.load(theta + theta_at("b1", H, LAYERS) + j),)
        a = _dense(a, hidden, theta + theta_at("w1", H, LAYERS), H, H)
    hidden = ()
    for j in tl.static_range(H):
        hidden += (_relu(a[j]),)
    b_out = network + network_at("b_out", UNITS)
    out = _dense(
        (zero + tl.load(b_out), zero + tl.load(b_out + 1)), hidden, network + network_at("w_out", UNITS), 2, 2
    )
    return out[0], out[1]


@triton.jit
def _stack16(x):
    """(M, 16) of 16 blocks with M elements each: a tree of joins, in which the first halving takes the last bit."""
    a = ()
    for i in tl.static_range(8):
        a += (tl.join(x[i], x[i + 8]),)
    b = ()
    for i in tl.static_range(4):
        b += (tl.join(a[i], a[i + 4]),)
    c = (tl.join(b[0], b[2]), tl.join(b[1], b[3]))
    d = tl.join(c[0], c[1])
    # The axes that the joins appended count the bits of the feature from the highest to the lowest.
    return tl.reshape(d, [x[0].shape[0] * x[0].shape[1], 16])


@triton.jit
def _high(x):
    """What tf32 keeps of a float32: the upper 19 bits."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _product(x, w, a, PRECISION: tl.constexpr):
    """a + x w. "tf32x3": x and w as a high and a low part of 11 bits each, without the product of the low ones."""
    if PRECISION == "tf32x3":
        x_high, w_high = _high(x), _high(w)
        a = tl.dot(x - x_high, w_high, a, input_precision="tf32")
        a = tl.dot(x_high, w - w_high, a, input_precision="tf32")
        a = tl.dot(x_high, w_high, a, input_precision="tf32")
    else:
        a = tl.dot(x, w, a, input_precision=PRECISION)
    return a


@triton.jit
def _matmul_network(
    record, theta, x, place, group, rows, columns, mask,
    FACTORED: tl.constexpr, GATHER: tl.constexpr, H: tl.constexpr, UNITS: tl.constexpr, LAYERS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(direction, magnitude) of a block, by products of (elements, features) and (features, units) matrices."""
    network = floats(record, field("network"))
    unit = tl.arange(0, UNITS)
    k = tl.arange(0, 16)
    M: tl.constexpr = rows.shape[0] * columns.shape[0]
    if FACTORED:
        x_bias, y_bias = floats(record, field("x_bias")), floats(record, field("y_bias"))
        first, stride, batch2, x_rows = place
        run = tl.load(record + field("run"))
        x_entries, y_entries = first + rows * stride, group * run + columns
        y = tl.load(
            y_bias + y_entries[:, None] * UNITS + unit[None, :], mask=(columns < run)[:, None], other=0.0
        )
        if GATHER:
            entries = (x_entries[:, None] + (columns % batch2)[None, :])[:, :, None]
            a = tl.load(x_bias + entries * UNITS + unit[None, None, :], mask=mask[:, :, None], other=0.0)
        else:
            inside = (rows < x_rows)[:, None]
            a = tl.load(x_bias + x_entries[:, None] * UNITS + unit[None, :], mask=inside, other=0.0)[
                :, None, :
            ]
        a = tl.reshape(a + y[None, :, :], [M, UNITS])
    else:
        a = tl.zeros([M, UNITS], tl.float32) + tl.load(network + network_at("b0", UNITS) + unit)[None, :]
    w = tl.load(network + k[:, None] * UNITS + unit[None, :])
    a = _product(_stack16(x[0:16]), w, a, PRECISION)
    if not FACTORED:
        zero = tl.zeros(mask.shape, tl.float32)
        rest = x[16:22]
        for _ in tl.static_range(10):
            rest += (zero,)
        w = tl.load(network + (16 + k)[:, None] * UNITS + unit[None, :])
        a = _product(_stack16(rest), w, a, PRECISION)
    a = _relu(a)
    if LAYERS == 2:
        i = tl.arange(0, UNITS)
        real = (i < H)[:, None] & (unit < H)[None, :]
        w = tl.load(theta + theta_at("w1", H, LAYERS) + i[:, None] * H + unit[None, :], mask=real, other=0.0)
        b = tl.load(theta + theta_at("b1", H, LAYERS) + unit, mask=unit < H, other=0.0)
        a = _relu(_product(a, w, tl.zeros([M, UNITS], tl.float32) + b[None, :], PRECISION))
    w_out, b_out = network + network_at("w_out", UNITS) + 2 * unit, network + network_at("b_out", UNITS)
    direction = tl.sum(a * tl.load(w_out)[None, :], 1) + tl.load(b_out)
    magnitude = tl.sum(a * tl.load(w_out + 1)[None, :], 1) + tl.load(b_out + 1)
    return tl.reshape(direction, mask.shape), tl.reshape(magnitude, mask.shape)


@triton.jit(do_not_specialize=["found_inf"])
def apply(
    table, gradients, tiles, sums, theta, numbers, clip, found_inf,
    FACTORED: tl.constexpr, GATHER: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    H: tl.constexpr, UNITS: tl.constexpr, LAYERS: tl.constexpr, LAGGED: tl.constexpr,
    MATMUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass 3 over a tile. With lagged statistics it clips the features and takes the sums of passes 1 and 2."""
    if tl.load(found_inf) != 0.0:
        return
    tensor, record, group, x_tile, run_tile = tile_at(tl.program_id(0), table, tiles, RECORD)
    gradient = typed(gradients + tensor, 0, GRAD, ALIGNED)
    param = typed(record, field("param"), PARAM, ALIGNED)
    output = typed(record, field("output"), PARAM, ALIGNED)
    network = floats(record, field("network"))
    param_scale = tl.load(network + network_at("numbers", UNITS))
    seed = tl.load(network + network_at("numbers", UNITS) + 1).to(tl.int32, bitcast=True)
    columns = columns_of(run_tile, COLUMNS)
    scale = _grad_scale(record, numbers, clip)
    rates = _rates(theta, H, LAYERS)
    begin, end = rows_of(record, x_tile)
    if LAGGED:
        total = _no_sums(ROWS, COLUMNS, ALIGNED, F_DIAGONAL if FACTORED else FEATURES)
        g_squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    place = place_of(record, group, FACTORED, ALIGNED, COLUMNS)
    moments = _moment_arrays(record, STATE, ALIGNED)
    momentum, stride, second_moment = moments
    x_place, y_biases = None, None
    if FACTORED:
        x_place = _x_place(record, group)
        y_factors = _along_y(record, field("y_factor"), group, columns, 3, ALIGNED)
        if not MATMUL:
            y_biases = _along_y(record, field("y_bias"), group, columns, H, ALIGNED)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets, mask = block_of(place, rows, columns, FACTORED)
        g = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        p = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
        m, v = _moments(moments, offsets, mask, g, rates)
        bits = _rounding_bits(offsets, seed)
        tl.store(momentum + offsets, _to_state(m[0], bits, STATE), mask=mask)
        tl.store(momentum + stride + offsets, _to_state(m[1], bits >> 16, STATE), mask=mask)
        bits = _mix(bits)
        tl.store(momentum + 2 * stride + offsets, _to_state(m[2], bits, STATE), mask=mask)
        tl.store(second_moment + offsets, _to_state(v, bits >> 16, STATE), mask=mask)
        if FACTORED:
            factors = _factors(record, y_factors, x_place, rows, columns, mask, GATHER)
            x = _features(g, p, m, v, None, factors, mask, True)
        else:
            d = _diagonal(record, offsets, mask, g, rates, ALIGNED)
            diagonal = typed(record, field("diagonal"), tl.float32, ALIGNED)
            elements = length(record, field("elements"), ALIGNED)
            for k in tl.static_range(3):
                tl.store(diagonal + k * elements + offsets, d[k], mask=mask)
            x = _features(g, p, m, v, d, None, mask, False)
        if LAGGED:
            total = _add_squares(total, x, ALIGNED)
            if FACTORED:
                g_squares += g * g
                _store_row_sums(record, run_tile, x_place, rows, columns, g * g, GATHER)
            clipped = ()
            for f in tl.static_range(len(x)):
                limit = tl.load(network + network_at("limit", UNITS) + f)
                clipped += (
                    tl.minimum(tl.maximum(x[f], -limit, propagate_nan=NAN), limit, propagate_nan=NAN),
                )
            x = clipped
        if MATMUL:
            direction, magnitude = _matmul_network(
                record,
                theta,
                x,
                x_place,
                group,
                rows,
                columns,
                mask,
                FACTORED,
                GATHER,
                H,
                UNITS,
                LAYERS,
                PRECISION,
            )
        else:
            a = _first_biases(record, y_biases, x_place, rows, columns, mask, FACTORED, GATHER, H, UNITS)
            direction, magnitude = _elementwise_network(network, theta, x, a, H, UNITS, LAYERS)
        result = param_scale * p - direction * tl.exp2(magnitude)
        tl.store(output + offsets, result.to(PARAM), mask=mask)
    if LAGGED:
        _store_sums(sums + slot_of(record, group, x_tile, run_tile) * SUMS, total)
        if FACTORED:
            _store_column_sums(record, group, x_tile, columns, g_squares)


# ---- how it is launched ----

Place = Literal["matrix", "gathered", "vector"]


@dataclass(frozen=True)
class Layout:
    """Tensors that one launch takes: how they lie in memory, and their types ("float32", ...)."""

    place: Place
    """matrix: factored, batch2 = 1; gathered: factored, any; vector: rank below 2."""
    aligned: bool
    columns: int
    param: str = "float32"
    grad: str = "float32"
    state: str = "float32"


@dataclass(frozen=True)
class Network:
    """The network and how it is computed. `matmul` pads it to 16 units, so it pays only for wide ones."""

    hidden: int = 4
    layers: int = 2
    lagged: bool = False
    matmul: bool = False
    precision: str = "ieee"

    @property
    def units(self) -> int:
        return max(triton.next_power_of_2(self.hidden), 16 if self.matmul else 2)


MATMUL_FROM = 32
"""Width from which `matmul` is the default (by instructions for an element; not measured on a device yet)."""


def default_precision(backend: str) -> str:
    """Precision of tl.dot that keeps the float32 bound on this backend ("cuda", "hip").

    "tf32x3" multiplies a high and a low part each, three tensor-core products with an error near float32's own; AMD
    has float32 matrix instructions ("ieee"), which NVIDIA has not: there "ieee" is done by the ordinary units.
    """
    return "tf32x3" if backend == "cuda" else "ieee"


def instance(kernel: str, layout: Layout | None, network: Network) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constants, options) with which `kernel` is launched for tensors of a layout."""
    warps = 4
    if layout is None:
        sizes = {"clip_factors": 1024, "find_first_steps": 256}
        constants: dict[str, Any] = {"BLOCK": sizes.get(kernel, 64), "TILES": 8}
    else:
        block, warps = block_elements(kernel, layout, network)
        constants = {
            "FACTORED": layout.place != "vector",
            "GATHER": layout.place == "gathered",
            "ALIGNED": layout.aligned,
            "ROWS": max(block // layout.columns, 1),
            "COLUMNS": layout.columns,
            "PARAM": getattr(tl, layout.param),
            "GRAD": getattr(tl, layout.grad),
            "STATE": getattr(tl, layout.state),
        }
    constants |= {
        "H": network.hidden,
        "UNITS": network.units,
        "LAYERS": network.layers,
        "LAGGED": network.lagged,
        "MATMUL": network.matmul,
        "PRECISION": network.precision,
    }
    return launched(KERNELS[kernel], constants, warps)


def block_elements(kernel: str, layout: Layout, network: Network) -> tuple[int, int]:
    """(elements of a block, warps): as many values for a thread as registers hold without spills."""
    if kernel in ("square_sums", "factor_statistics"):
        return 1024, 4
    if kernel == "feature_statistics":
        return 512, 4
    if network.matmul:
        return 128, 8 if network.units > 32 else 4
    if network.units > 4:
        return 256, 4
    return 512, 4


def choices(layout: Layout, network: Network) -> list[dict[str, int]]:
    """Blocks that autotuning tries for `apply`, the default first."""
    block, warps = block_elements("apply", layout, network)
    rows = max(block // layout.columns, 1)
    found = [(rows, warps), (2 * rows, warps), (2 * rows, 2 * warps), (rows // 2, warps)]
    return [{"ROWS": r, "num_warps": w} for r, w in found if r]


def example_shape(layout: Layout) -> tuple[int, ...]:
    """Shape of a tensor of about four million elements that has this layout."""
    odd = 0 if layout.aligned else 1
    if layout.place == "vector":
        return ((1 << 22) - odd,)
    if layout.place == "gathered":
        return (676, 676, 3, 3)
    return (
        ((1 << 22) // layout.columns // 32, 32 * layout.columns - odd)
        if layout.columns > 16
        else (1 << 18, 16 - odd)
    )


KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        set_addresses, square_sums, clip_factors, find_first_steps, factor_statistics, move_accumulators, fold_factors,
        feature_statistics, fold_network, apply, keep_statistics,
    )
}  # fmt: skip
