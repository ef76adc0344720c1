"""The element-wise MLP (lopt_fast.operations.element_mlp) in Triton, for NVIDIA and AMD GPUs: README.md.

The launches of a step, in order (`lopt_fast.torch.triton_operations` makes them; each takes all tensors of a layout):

    factor_sums              pass 1: sums of the squared gradient along both factored axes, for each tile
    move_factored            adds them up, moves the factored moments on, and takes the means of the row accumulators
    column_sums, add_tiles   pass 2: sums of the squares of the columns
    (folding)                array code: normalisers and everything that multiplies the step, into the weights
    apply, add_tiles         pass 3: new running averages, columns, network, output; sums of the last hidden units

Momenta and second moments are written by the last pass alone; pass 2 computes what they will be. The columns that the
network sees, in the order of its input, are of three kinds: of an element, (ROWS, COLUMNS); along y, (1, COLUMNS), which
stay in registers for a tile; and along x, (ROWS, 1), or (ROWS, COLUMNS) where GATHER.

More constants of a launch (tl.constexpr; the others: kernels/common/triton.py):
    ELEMENT, ALONG_X, ALONG_Y   columns of each kind: (group, member, place in the network's input)
    X_IS_ROW                    which factored axis is the outer one
    INPUTS, H, LAYERS           inputs of the network, hidden units and hidden layers
    TANH                        activation; else max(x, 0)
    RMS_EPSILON, DIAGONAL_EPSILON  see lopt_fast.reference.Epsilons
    WITH_SQUARE                 also the sum of the squared parameter, behind those of the columns
    WITH_HIDDEN                 also the sums of the last hidden units
"""

from typing import Any

import triton
import triton.language as tl
from lopt_fast.kernels.common.triton import (
    RECORD,
    Layout,
    average,
    averages_of,
    block_of,
    clipped,
    field,
    floats,
    gradient_of,
    parameter_of,
    place_of,
    store_averages,
    store_result,
    tile_of,
)

from lopt_fast.operations import ElementMlp
from lopt_fast.reference import (
    DIAGONAL_EPSILON,
    FACTOR_EPSILON,
    FACTOR_FLOOR,
    GRADIENT_BOUND,
    LOG_EPSILON,
    ROW_MEAN_EPSILON,
    SQUARE_EPSILON,
)

MOVE_FIELDS = tl.constexpr(6)  # of a piece: see `move_factored`

E_SQUARE = tl.constexpr(SQUARE_EPSILON)
E_ROW_MEAN = tl.constexpr(ROW_MEAN_EPSILON)
E_FLOOR = tl.constexpr(FACTOR_FLOOR)
E_DIAGONAL = tl.constexpr(DIAGONAL_EPSILON)
E_FACTOR = tl.constexpr(FACTOR_EPSILON)
E_LOG = tl.constexpr(LOG_EPSILON)
BOUND = tl.constexpr(GRADIENT_BOUND)
LOG2E = 1.4426950408889634
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.constexpr_function
def group_of(columns, i):
    """Group of a column in one of the lists ELEMENT, ALONG_X, ALONG_Y."""
    return columns[i][0]


@triton.constexpr_function
def member_of(columns, i):
    """Which of its group it is."""
    return columns[i][1]


@triton.constexpr_function
def input_of(columns, i):
    """Its place in the network's input."""
    return columns[i][2]


@triton.constexpr_function
def count_of(columns):
    return len(columns)


@triton.constexpr_function
def network_at(layer, bias, INPUTS, H, LAYERS):
    """Place of a layer's weights, (inputs, outputs), or its bias in a tensor's folded network; layer LAYERS + 1 is the
    end. The last layer has two outputs: direction with all that multiplies the step, magnitude times log2 e."""
    at, inputs = 0, INPUTS
    for i in range(LAYERS + 1):
        outputs = 2 if i == LAYERS else H
        if i == layer:
            return at + inputs * outputs if bias else at
        at += (inputs + 1) * outputs
        inputs = H
    return at


# ---- pass 1 and what follows it ----


@triton.jit
def factor_sums(
    table, tiles, numbers,
    GATHER: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Pass 1 over a tile: x_sums, y_sums."""
    record, _, group, x_tile, run_tile, begin, end, columns = tile_of(table, tiles, COLUMNS)
    place = place_of(record, group, True, ALIGNED, COLUMNS)
    x_first, x_stride, x_phase, x = _along_x(record, group, columns, GATHER)
    x_sums = floats(record, field("x_sums")) + run_tile * tl.load(record + field("x_size"))
    over_x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets, mask = block_of(place, rows, columns, True)
        g = gradient_of(record, offsets, mask, numbers, TYPE, ALIGNED)
        square = g * g
        over_x += square
        to = x_sums + x_first + rows * x_stride
        if GATHER:
            for b in range(tl.load(record + field("batch2"))):
                part = tl.sum(tl.where((x_phase == b)[None, :], square, 0.0), 1)
                tl.store(to + b, part, mask=rows < x)
        else:
            tl.store(to, tl.sum(square, 1), mask=rows < x)
    run = tl.load(record + field("run"))
    y_sums = floats(record, field("y_sums")) + x_tile * tl.load(record + field("y_size")) + group * run
    tl.store(y_sums + columns, tl.sum(over_x, 0), mask=columns < run)


@triton.jit
def _along_x(record, group, columns, GATHER: tl.constexpr):
    """Where the entries along x of a group lie: (that of row 0, from one row to the next, how far behind it that of
    each column is, rows)."""
    x, batch1, batch2 = (
        tl.load(record + field("x")), tl.load(record + field("batch1")), tl.load(record + field("batch2"))
    )  # fmt: skip
    phase = columns * 0
    if GATHER:
        phase = columns % batch2
    return (group // batch1 * (x * batch1) + group % batch1) * batch2, batch1 * batch2, phase, x


@triton.jit
def move_factored(
    table, pieces, rates, found_inf, FIRST_RATE: tl.constexpr, FACTORED_MOMENTS: tl.constexpr, TILES: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """The factored moments of a piece of an accumulator, and of a row accumulator their mean along its axis.

    A piece is `count` entries `stride` apart: (record, is along x, first, stride, count, batch); of a row accumulator
    its whole axis for one combination of all others, `batch`; of a column accumulator any piece, batch -1.
    Where found_inf is not 0 nothing is written.
    """
    if tl.load(found_inf) != 0.0:
        return
    piece = pieces + tl.program_id(0).to(tl.int64) * MOVE_FIELDS
    record = table + tl.load(piece) * RECORD
    along_x = tl.load(piece + 1) != 0
    begin, stride, count, batch = (
        tl.load(piece + 2), tl.load(piece + 3), tl.load(piece + 4), tl.load(piece + 5)
    )  # fmt: skip
    x, run, batch2 = (
        tl.load(record + field("x")), tl.load(record + field("run")), tl.load(record + field("batch2"))
    )  # fmt: skip
    places = tl.where(along_x, field("x_accumulator"), field("y_accumulator"))
    accumulator = tl.load(record + places).to(tl.pointer_type(tl.float32))
    accumulator_stride = tl.load(record + places + 1)
    sums = tl.load(record + tl.where(along_x, field("x_sums"), field("y_sums"))).to(
        tl.pointer_type(tl.float32)
    )
    size = tl.load(record + tl.where(along_x, field("x_size"), field("y_size")))
    tiles = tl.load(record + tl.where(along_x, field("run_tiles"), field("x_tiles")))
    others = tl.where(along_x, run // batch2, x).to(tl.float32)
    totals = ()
    for _ in tl.static_range(FACTORED_MOMENTS):
        totals += (tl.zeros([ENTRIES], tl.float32),)
    for first in range(0, count, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        mask = entry < count
        at = begin + entry * stride
        square = tl.zeros([TILES, ENTRIES], tl.float32)
        for first_tile in range(0, tiles, TILES):
            tile = first_tile + tl.arange(0, TILES)
            inside = (tile < tiles)[:, None] & mask[None, :]
            square += tl.load(sums + tile[:, None] * size + at[None, :], mask=inside, other=0.0)
        mean_square = tl.sum(square, 0) / others + E_SQUARE
        new_totals = ()
        for k in tl.static_range(FACTORED_MOMENTS):
            to = accumulator + k * accumulator_stride + at
            new = average(tl.load(to, mask=mask, other=0.0), tl.load(rates + FIRST_RATE + k), mean_square)
            tl.store(to, new, mask=mask)
            new_totals += (totals[k] + tl.where(mask, new, 0.0),)
        totals = new_totals
    if batch >= 0:
        batches = tl.load(record + field("batch0")) * tl.load(record + field("batch1")) * batch2
        means = floats(record, field("means")) + batch
        for k in tl.static_range(FACTORED_MOMENTS):
            tl.store(means + k * batches, tl.sum(totals[k]) / count.to(tl.float32))


# ---- columns: what passes 2 and 3 share ----


@triton.jit
def _floored(x):
    """rsqrt(max(x, floor)), NaN for NaN."""
    return tl.rsqrt(tl.where(x < E_FLOOR, E_FLOOR, x))


@triton.jit
def _axis_column(GROUP: tl.constexpr, moment):
    """A column that shows a factored moment along an axis."""
    if GROUP == "fac_row" or GROUP == "fac_column":
        x = moment
    else:
        x = tl.rsqrt(moment + E_FACTOR)
    return x


@triton.jit
def _axis_columns(COLUMNS_OF: tl.constexpr, moments):
    x = ()
    for i in tl.static_range(count_of(COLUMNS_OF)):
        x += (_axis_column(group_of(COLUMNS_OF, i), moments[member_of(COLUMNS_OF, i)]),)
    return x


@triton.jit
def _axis_factors(moments, means, IS_ROW: tl.constexpr):
    """Of each factored moment: what it multiplies gradients and momenta by."""
    factors = ()
    for k in tl.static_range(len(moments)):
        if IS_ROW:
            factors += (_floored(moments[k] / (means[k] + E_ROW_MEAN)),)
        else:
            factors += (_floored(moments[k]),)
    return factors


@triton.jit
def _element_column(
    GROUP: tl.constexpr, K: tl.constexpr, g, p, m, v, d, x_factors, y_factors,
    FACTORED: tl.constexpr, RMS_EPSILON: tl.constexpr, DIAGONAL_EPSILON: tl.constexpr,
):  # fmt: skip
    """Member K of a group, as lopt_fast.reference.columns. d: factored moments of a tensor that is not FACTORED."""
    if GROUP == "g":
        x = g
    elif GROUP == "clip_g":
        x = clipped(g, BOUND)
    elif GROUP == "p":
        x = p
    elif GROUP == "log_abs_p":
        x = tl.log(tl.abs(p) + E_LOG)
    elif GROUP == "m":
        x = m[K]
    elif GROUP == "rms":
        x = v[K]
    elif GROUP == "rsqrt_rms":
        x = tl.rsqrt(v[K] + RMS_EPSILON)
    elif GROUP == "g_rsqrt_rms":
        x = g * tl.rsqrt(v[K] + RMS_EPSILON)
    elif GROUP == "m_rsqrt_rms":
        x = m[K] * tl.rsqrt(v[K if len(v) > 1 else 0] + RMS_EPSILON)
    elif GROUP == "fac_g":
        if FACTORED:
            x = g * (x_factors[K] * y_factors[K])
        else:
            x = g * _floored(d[K] + E_DIAGONAL)
    elif GROUP == "fac_m":
        if FACTORED:
            x = m[K] * (x_factors[K] * y_factors[K])
        else:
            x = m[K] * tl.rsqrt(d[K] + DIAGONAL_EPSILON)
    else:
        x = _axis_column(GROUP, d[K])
    return x


@triton.jit
def _y_moments(record, group, columns, FACTORED_MOMENTS: tl.constexpr):
    """Factored moments along y, (1, COLUMNS) each."""
    run = tl.load(record + field("run"))
    array = floats(record, field("y_accumulator")) + group * run + columns
    stride = tl.load(record + field("y_accumulator_stride"))
    moments = ()
    for k in tl.static_range(FACTORED_MOMENTS):
        moments += (tl.load(array + k * stride, mask=columns < run, other=0.0)[None, :],)
    return moments


@triton.jit
def _means(record, group, columns, FACTORED_MOMENTS: tl.constexpr, GATHER: tl.constexpr):
    """Of the row accumulators, for the columns of a tile: (1, COLUMNS), or () where they are all one batch."""
    batch2 = tl.load(record + field("batch2"))
    batches = tl.load(record + field("batch0")) * tl.load(record + field("batch1")) * batch2
    array = floats(record, field("means")) + group * batch2
    means = ()
    for k in tl.static_range(FACTORED_MOMENTS):
        if GATHER:
            means += (tl.load(array + k * batches + columns % batch2)[None, :],)
        else:
            means += (tl.load(array + k * batches),)
    return means


@triton.jit
def _x_moments(record, along_x, rows, mask, FACTORED_MOMENTS: tl.constexpr, GATHER: tl.constexpr):
    """Factored moments along x: (ROWS, 1), or (ROWS, COLUMNS) where GATHER."""
    first, x_stride, phase, x = along_x
    array = floats(record, field("x_accumulator")) + first
    stride = tl.load(record + field("x_accumulator_stride"))
    moments = ()
    for k in tl.static_range(FACTORED_MOMENTS):
        if GATHER:
            at = array + k * stride + (rows * x_stride)[:, None] + phase[None, :]
            moments += (tl.load(at, mask=mask, other=0.0),)
        else:
            at = array + k * stride + rows * x_stride
            moments += (tl.load(at, mask=rows < x, other=0.0)[:, None],)
    return moments


@triton.jit
def _element_columns(
    ELEMENT: tl.constexpr, g, p, m, v, d, x_factors, y_factors,
    FACTORED: tl.constexpr, RMS_EPSILON: tl.constexpr, DIAGONAL_EPSILON: tl.constexpr,
):  # fmt: skip
    x = ()
    for i in tl.static_range(count_of(ELEMENT)):
        x += (_element_column(group_of(ELEMENT, i), member_of(ELEMENT, i), g, p, m, v, d, x_factors, y_factors,
                              FACTORED, RMS_EPSILON, DIAGONAL_EPSILON),)  # fmt: skip
    return x


# ---- pass 2 ----


@triton.jit
def _zeros(like, COUNT: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (like * 0.0,)
    return sums


@triton.jit
def _add(sums, values, mask):
    """sums + values inside the mask."""
    out = ()
    for i in tl.static_range(len(values)):
        out += (sums[i] + tl.where(mask, values[i], 0.0),)
    return out


@triton.jit
def _squares(x):
    out = ()
    for i in tl.static_range(len(x)):
        out += (x[i] * x[i],)
    return out


@triton.jit
def _store_sums(to, COLUMNS_OF: tl.constexpr, sums, factor):
    for i in tl.static_range(count_of(COLUMNS_OF)):
        tl.store(to + input_of(COLUMNS_OF, i), tl.sum(sums[i]) * factor)


@triton.jit
def column_sums(
    table, tiles, sums, rates, numbers,
    FACTORED: tl.constexpr, GATHER: tl.constexpr, X_IS_ROW: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
    MOMENTA: tl.constexpr, SECOND_MOMENTS: tl.constexpr, FACTORED_MOMENTS: tl.constexpr,
    ELEMENT: tl.constexpr, ALONG_X: tl.constexpr, ALONG_Y: tl.constexpr, INPUTS: tl.constexpr,
    RMS_EPSILON: tl.constexpr, DIAGONAL_EPSILON: tl.constexpr, WITH_SQUARE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 2 over a tile: sums[slot], (WIDTH,): of the squares of the columns, and of the parameter behind them."""
    record, slot, group, _, _, begin, end, columns = tile_of(table, tiles, COLUMNS)
    place = place_of(record, group, FACTORED, ALIGNED, COLUMNS)
    block = tl.zeros([ROWS, COLUMNS], tl.float32)
    row = block if GATHER else tl.zeros([ROWS, 1], tl.float32)
    total = _zeros(block, count_of(ELEMENT))
    x_total = _zeros(row, count_of(ALONG_X))
    p_total = block
    x_moments, x_factors, y_moments, y_factors, means, along_x = (), (), (), (), (), None
    if FACTORED:
        along_x = _along_x(record, group, columns, GATHER)
        y_moments = _y_moments(record, group, columns, FACTORED_MOMENTS)
        means = _means(record, group, columns, FACTORED_MOMENTS, GATHER)
        y_factors = _axis_factors(y_moments, means, not X_IS_ROW)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets, mask = block_of(place, rows, columns, FACTORED)
        g = gradient_of(record, offsets, mask, numbers, TYPE, ALIGNED)
        p = parameter_of(record, offsets, mask, TYPE, ALIGNED)
        m = averages_of(record, offsets, mask, g, rates, MOMENTA, 0, field("momentum"), ALIGNED)
        v = averages_of(
            record, offsets, mask, g * g, rates, SECOND_MOMENTS, MOMENTA, field("second_moment"), ALIGNED
        )
        d = ()
        if FACTORED:
            x_moments = _x_moments(record, along_x, rows, mask, FACTORED_MOMENTS, GATHER)
            x_factors = _axis_factors(x_moments, means, X_IS_ROW)
        else:
            d = averages_of(record, offsets, mask, g * g + E_SQUARE, rates, FACTORED_MOMENTS,
                            MOMENTA + SECOND_MOMENTS, field("x_accumulator"), ALIGNED)  # fmt: skip
        x = _element_columns(ELEMENT, g, p, m, v, d, x_factors, y_factors,
                             FACTORED, RMS_EPSILON, DIAGONAL_EPSILON)  # fmt: skip
        total = _add(total, _squares(x), mask)
        x_mask = mask if GATHER else (rows < place[2])[:, None]
        x_total = _add(x_total, _squares(_axis_columns(ALONG_X, x_moments)), x_mask)
        if WITH_SQUARE:
            p_total += p * p
    to = sums + slot * WIDTH
    _store_sums(to, ELEMENT, total, 1.0)
    inside = columns < place[3]
    _store_sums(to, ALONG_X, x_total, 1.0 if GATHER else tl.sum(inside.to(tl.float32)))
    y_total = _add(
        _zeros(tl.zeros([1, COLUMNS], tl.float32), count_of(ALONG_Y)), _squares(_axis_columns(ALONG_Y, y_moments)), inside[None, :]
    )
    _store_sums(to, ALONG_Y, y_total, (end - begin).to(tl.float32))
    if WITH_SQUARE:
        tl.store(to + INPUTS, tl.sum(p_total))


# ---- pass 3 ----


@triton.jit
def _add_products(units, x, COLUMNS_OF: tl.constexpr, w, H: tl.constexpr):
    """units[j] + sum over the columns of w[place in the input, j] x: the first layer."""
    for i in tl.static_range(count_of(COLUMNS_OF)):
        out = ()
        for j in tl.static_range(H):
            out += (units[j] + x[i] * tl.load(w + input_of(COLUMNS_OF, i) * H + j),)
        units = out
    return units


@triton.jit
def _dense(x, w, b, OUTPUTS: tl.constexpr):
    """b[j] + sum over i of w[i, j] x[i]: another layer."""
    units = ()
    for j in tl.static_range(OUTPUTS):
        total = x[0] * tl.load(w + j) + tl.load(b + j)
        for i in tl.static_range(1, len(x)):
            total += x[i] * tl.load(w + i * OUTPUTS + j)
        units += (total,)
    return units


@triton.jit
def _activated(units, TANH: tl.constexpr):
    out = ()
    for j in tl.static_range(len(units)):
        if TANH:
            # Of the magnitude, with its sign: exp of a large number must not become infinite.
            small = tl.exp(tl.abs(units[j]) * -2.0)
            size = (1.0 - small) / (1.0 + small)
            out += (tl.where(units[j] < 0.0, -size, size),)
        else:
            out += (tl.where(units[j] < 0.0, 0.0, units[j]),)
    return out


@triton.jit
def apply(
    table, tiles, sums, rates, numbers, networks, found_inf,
    FACTORED: tl.constexpr, GATHER: tl.constexpr, X_IS_ROW: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr, OUTPUT: tl.constexpr,
    MOMENTA: tl.constexpr, SECOND_MOMENTS: tl.constexpr, FACTORED_MOMENTS: tl.constexpr,
    ELEMENT: tl.constexpr, ALONG_X: tl.constexpr, ALONG_Y: tl.constexpr, INPUTS: tl.constexpr,
    H: tl.constexpr, LAYERS: tl.constexpr, TANH: tl.constexpr,
    RMS_EPSILON: tl.constexpr, DIAGONAL_EPSILON: tl.constexpr, WITH_HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 3 over a tile: averages, output; sums[slot], (WIDTH,), of the last hidden units. networks: (tensors, size).

    Where found_inf is not 0 nothing is written.
    """
    if tl.load(found_inf) != 0.0:
        return
    record, slot, group, _, _, begin, end, columns = tile_of(table, tiles, COLUMNS)
    place = place_of(record, group, FACTORED, ALIGNED, COLUMNS)
    network = networks + tl.load(record + field("operand")) * network_at(LAYERS + 1, False, INPUTS, H, LAYERS)
    w0 = network + network_at(0, False, INPUTS, H, LAYERS)
    b0 = network + network_at(0, True, INPUTS, H, LAYERS)
    block = tl.zeros([ROWS, COLUMNS], tl.float32)
    hidden_total = _zeros(block, H if WITH_HIDDEN else 0)
    x_moments, x_factors, y_moments, y_factors, means, along_x = (), (), (), (), (), None
    if FACTORED:
        along_x = _along_x(record, group, columns, GATHER)
        y_moments = _y_moments(record, group, columns, FACTORED_MOMENTS)
        means = _means(record, group, columns, FACTORED_MOMENTS, GATHER)
        y_factors = _axis_factors(y_moments, means, not X_IS_ROW)
    # What is equal for all rows of the tile: the bias with the columns along y.
    y_units = ()
    for j in tl.static_range(H):
        y_units += (tl.zeros([1, COLUMNS], tl.float32) + tl.load(b0 + j),)
    y_units = _add_products(y_units, _axis_columns(ALONG_Y, y_moments), ALONG_Y, w0, H)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets, mask = block_of(place, rows, columns, FACTORED)
        g = gradient_of(record, offsets, mask, numbers, TYPE, ALIGNED)
        p = parameter_of(record, offsets, mask, TYPE, ALIGNED)
        m = averages_of(record, offsets, mask, g, rates, MOMENTA, 0, field("momentum"), ALIGNED)
        v = averages_of(
            record, offsets, mask, g * g, rates, SECOND_MOMENTS, MOMENTA, field("second_moment"), ALIGNED
        )
        store_averages(record, offsets, mask, m, field("momentum"), ALIGNED)
        store_averages(record, offsets, mask, v, field("second_moment"), ALIGNED)
        d = ()
        if FACTORED:
            x_moments = _x_moments(record, along_x, rows, mask, FACTORED_MOMENTS, GATHER)
            x_factors = _axis_factors(x_moments, means, X_IS_ROW)
        else:
            d = averages_of(record, offsets, mask, g * g + E_SQUARE, rates, FACTORED_MOMENTS,
                            MOMENTA + SECOND_MOMENTS, field("x_accumulator"), ALIGNED)  # fmt: skip
            store_averages(record, offsets, mask, d, field("x_accumulator"), ALIGNED)
        x = _element_columns(ELEMENT, g, p, m, v, d, x_factors, y_factors,
                             FACTORED, RMS_EPSILON, DIAGONAL_EPSILON)  # fmt: skip
        units = _add_products(y_units, _axis_columns(ALONG_X, x_moments), ALONG_X, w0, H)
        units = _activated(_add_products(units, x, ELEMENT, w0, H), TANH)
        for layer in tl.static_range(1, LAYERS):
            w = network + network_at(layer, False, INPUTS, H, LAYERS)
            units = _activated(
                _dense(units, w, network + network_at(layer, True, INPUTS, H, LAYERS), H), TANH
            )
        if WITH_HIDDEN:
            hidden_total = _add(hidden_total, units, mask)
        w, b = (
            network + network_at(LAYERS, False, INPUTS, H, LAYERS),
            network + network_at(LAYERS, True, INPUTS, H, LAYERS),
        )
        direction, magnitude = _dense(units, w, b, 2)
        step = direction * tl.exp2(magnitude)
        store_result(record, offsets, mask, p, step, numbers, OUTPUT, TYPE, ALIGNED)
    if WITH_HIDDEN:
        for j in tl.static_range(H):
            tl.store(sums + slot * WIDTH + j, tl.sum(hidden_total[j]))


# ---- how it is launched ----

MOST_HIDDEN = 64
MOST_FACTORED = 8
FACTOR_BLOCK = 1024
MOVE_ENTRIES = 128
MOVE_TILES = 8


def block(spec: ElementMlp, kernel: str) -> int:
    """Elements of a block: as many values for a thread as its registers hold."""
    if kernel == "column_sums" or spec.hidden_size <= 4:
        return 512
    return 256 if spec.hidden_size <= 16 else 128


def unsupported(spec: ElementMlp) -> str | None:
    """None, or the reason why the kernels cannot compute this specification for any tensor."""
    if not 1 <= spec.hidden_size <= MOST_HIDDEN:
        return f"it takes hidden_size 1 to {MOST_HIDDEN}, not {spec.hidden_size}"
    if spec.hidden_layers < 1:
        return "it takes at least 1 hidden layer"
    if spec.factored_moments > MOST_FACTORED:
        return f"it takes {MOST_FACTORED} factored moments, not {spec.factored_moments}"
    return None


def width(spec: ElementMlp) -> int:
    """WIDTH: places for all sums of a tile, a power of two."""
    return int(triton.next_power_of_2(max(spec.layer_sizes[0][0] + 1, spec.hidden_size)))


def constants(spec: ElementMlp, layout: Layout, output: str) -> dict[str, Any]:
    """Constants that `spec` gives for a layout."""
    vector = layout.place == "vector"
    names = [(group, k) for group in spec.groups for k in range(spec.group_size(group))]
    columns = [(group, k, i) for i, (group, k) in enumerate(names)][: spec.columns_of(1 if vector else 2)]
    row, column = ("fac_row", "rsqrt_fac_row"), ("fac_column", "rsqrt_fac_column")
    along_x, along_y = (row, column) if layout.x_is_row else (column, row)
    if vector:
        along_x = along_y = ()
    return {
        "OUTPUT": output,
        "MOMENTA": spec.momenta,
        "SECOND_MOMENTS": spec.second_moments,
        "FACTORED_MOMENTS": spec.factored_moments,
        "ELEMENT": tuple(c for c in columns if c[0] not in (*along_x, *along_y)),
        "ALONG_X": tuple(c for c in columns if c[0] in along_x),
        "ALONG_Y": tuple(c for c in columns if c[0] in along_y),
        "INPUTS": len(names),
        "H": spec.hidden_size,
        "LAYERS": spec.hidden_layers,
        "TANH": spec.activation == "tanh",
        "RMS_EPSILON": spec.epsilons.rms,
        "DIAGONAL_EPSILON": spec.epsilons.diagonal_momentum,
        "WITH_SQUARE": spec.scale == "parameter_rms",
        "WITH_HIDDEN": spec.messages > 0,
        "WIDTH": width(spec),
    }
