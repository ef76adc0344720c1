"""The element-wise MLP (lopt_fast.operations.element_mlp) in Triton, for NVIDIA and AMD GPUs: README.md.

The launches of a step, in order (`lopt_fast.torch.triton_operations` makes them; each takes all tensors of a layout):

    factor_sums              pass 1: sums of the squared gradient along both factored axes, for each tile
    move_factored            adds them up, moves the factored moments on, and takes the means of the row accumulators
    column_sums, add_tiles   pass 2: sums of the squares of the columns
    (folding)                array code: normalisers and everything that multiplies the step, into the weights
    apply, add_tiles         pass 3: new running averages, columns, network, output; sums of the last hidden units

Momenta and second moments are written by the last pass alone; pass 2 computes what they will be. The columns that the
network sees, in the order of its input, are of three kinds: of an element, (ROWS, COLUMNS); along y, (1, COLUMNS),
which stay in registers for a tile; and along x, (ROWS, 1), or (ROWS, COLUMNS) where GATHER.

More constants of a launch (tl.constexpr; the others: kernels/common/triton.py):
    ELEMENT, ALONG_X, ALONG_Y   columns of each kind: (group, member, place in the network's input)
    X_IS_ROW                    which factored axis is the outer one
    INPUTS, H, LAYERS           inputs of the network, hidden units and hidden layers
    TANH                        activation; else max(x, 0)
    MATMUL, PRECISION, UNITS    products of the network by tl.dot, hidden units padded to UNITS; else unit by unit in
                                registers, which grows with H^2: a minute of compiling at 32
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
    averages_in,
    averages_of,
    block_of,
    clipped,
    field,
    floats,
    folded,
    folds,
    gradient_of,
    gradient_rule,
    output_of,
    parameter_of,
    place_of,
    store_averages,
    store_result,
    tile_of,
    typed,
)
from lopt_fast.kernels.small_fc_lopt.triton import _product, _stack16, default_precision

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
def index_of(columns, place):
    """Of the column with this place in the network's input; -1 if it is not in the list."""
    for i, column in enumerate(columns):
        if column[2] == place:
            return i
    return -1


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
    place, rule = place_of(record, group, True, ALIGNED, COLUMNS), gradient_rule(numbers)
    grad = typed(record, field("grad"), TYPE, ALIGNED)
    x_first, x_stride, x_phase, x = _along_x(record, group, columns, GATHER)
    x_sums = floats(record, field("x_sums")) + run_tile * tl.load(record + field("x_size"))
    over_x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets, mask = block_of(place, rows, columns, True)
        g = gradient_of(grad, offsets, mask, rule)
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
def _factored_moments(
    record, group, columns, FACTORED: tl.constexpr, GATHER: tl.constexpr, X_IS_ROW: tl.constexpr,
    FACTORED_MOMENTS: tl.constexpr,
):  # fmt: skip
    """What is equal for all rows of a tile: (moments along y, their factors, means, `_along_x`)."""
    moments, factors, means, along_x = (), (), (), ()
    if FACTORED:
        moments = _y_moments(record, group, columns, FACTORED_MOMENTS)
        means = _means(record, group, columns, FACTORED_MOMENTS, GATHER)
        factors = _axis_factors(moments, means, not X_IS_ROW)
        along_x = _along_x(record, group, columns, GATHER)
    return moments, factors, means, along_x


@triton.jit
def _averages(
    record, rates, FACTORED: tl.constexpr, ALIGNED: tl.constexpr, MOMENTA: tl.constexpr,
    SECOND_MOMENTS: tl.constexpr, FACTORED_MOMENTS: tl.constexpr,
):  # fmt: skip
    """`averages_in` for momenta, second moments, and factored moments where they are of every element."""
    momentum = averages_in(record, rates, MOMENTA, 0, field("momentum"), ALIGNED)
    second_moment = averages_in(record, rates, SECOND_MOMENTS, MOMENTA, field("second_moment"), ALIGNED)
    of_elements = averages_in(record, rates, 0 if FACTORED else FACTORED_MOMENTS, MOMENTA + SECOND_MOMENTS,
                              field("x_accumulator"), ALIGNED)  # fmt: skip
    return momentum, second_moment, of_elements


@triton.jit
def _averages_and_columns(
    record, averages, offsets, mask, rows, y_factors, means, along_x, g, p,
    FACTORED: tl.constexpr, GATHER: tl.constexpr, X_IS_ROW: tl.constexpr, FACTORED_MOMENTS: tl.constexpr,
    ELEMENT: tl.constexpr, ALONG_X: tl.constexpr, RMS_EPSILON: tl.constexpr, DIAGONAL_EPSILON: tl.constexpr,
):  # fmt: skip
    """Of a block: (momenta, second moments, moments of every element where not FACTORED: after gradient g; columns of
    elements, columns along x)."""
    m = averages_of(averages[0], offsets, mask, g)
    v = averages_of(averages[1], offsets, mask, g * g)
    d = averages_of(averages[2], offsets, mask, g * g + E_SQUARE)
    x_moments, x_factors = (), ()
    if FACTORED:
        x_moments = _x_moments(record, along_x, rows, mask, FACTORED_MOMENTS, GATHER)
        x_factors = _axis_factors(x_moments, means, X_IS_ROW)
    x = ()
    for i in tl.static_range(count_of(ELEMENT)):
        x += (_element_column(group_of(ELEMENT, i), member_of(ELEMENT, i), g, p, m, v, d, x_factors, y_factors,
                              FACTORED, RMS_EPSILON, DIAGONAL_EPSILON),)  # fmt: skip
    return m, v, d, x, _axis_columns(ALONG_X, x_moments)


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
def _add_squares(sums, x, mask, FOLD: tl.constexpr):
    """sums + x^2 inside the mask, neighbours added where FOLD."""
    out = ()
    for i in tl.static_range(len(x)):
        out += (sums[i] + folded(tl.where(mask, x[i] * x[i], 0.0), FOLD),)
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
    place, rule = place_of(record, group, FACTORED, ALIGNED, COLUMNS), gradient_rule(numbers)
    grad, param = typed(record, field("grad"), TYPE, ALIGNED), typed(record, field("param"), TYPE, ALIGNED)
    averages = _averages(record, rates, FACTORED, ALIGNED, MOMENTA, SECOND_MOMENTS, FACTORED_MOMENTS)
    block = tl.zeros([ROWS, COLUMNS // folds(ALIGNED)], tl.float32)
    total = _zeros(block, count_of(ELEMENT))
    x_total = _zeros(tl.zeros([ROWS, COLUMNS if GATHER else 1], tl.float32), count_of(ALONG_X))
    p_total = block
    y_moments, y_factors, means, along_x = _factored_moments(
        record, group, columns, FACTORED, GATHER, X_IS_ROW, FACTORED_MOMENTS
    )
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets, mask = block_of(place, rows, columns, FACTORED)
        g = gradient_of(grad, offsets, mask, rule)
        p = parameter_of(param, offsets, mask)
        found = _averages_and_columns(
            record, averages, offsets, mask, rows, y_factors, means, along_x, g, p,
            FACTORED, GATHER, X_IS_ROW, FACTORED_MOMENTS, ELEMENT, ALONG_X, RMS_EPSILON, DIAGONAL_EPSILON,
        )  # fmt: skip
        total = _add_squares(total, found[3], mask, ALIGNED)
        x_mask = mask if GATHER else (rows < place[2])[:, None]
        x_total = _add_squares(x_total, found[4], x_mask, False)
        if WITH_SQUARE:
            p_total += folded(p * p, ALIGNED)
    to = sums + slot * WIDTH
    _store_sums(to, ELEMENT, total, 1.0)
    inside = columns < place[3]
    _store_sums(to, ALONG_X, x_total, 1.0 if GATHER else tl.sum(inside.to(tl.float32)))
    y_total = _zeros(tl.zeros([1, COLUMNS], tl.float32), count_of(ALONG_Y))
    y_total = _add_squares(y_total, _axis_columns(ALONG_Y, y_moments), inside[None, :], False)
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
def _activation(x, TANH: tl.constexpr):
    if TANH:
        # Of the magnitude, with its sign: exp of a large number must not become infinite.
        small = tl.exp(tl.abs(x) * -2.0)
        size = (1.0 - small) / (1.0 + small)
        y = tl.where(x < 0.0, -size, size)
    else:
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def _activated(units, TANH: tl.constexpr):
    out = ()
    for j in tl.static_range(len(units)):
        out += (_activation(units[j], TANH),)
    return out


@triton.jit
def _network_in_registers(
    network, x, x_columns, y_units,
    ELEMENT: tl.constexpr, ALONG_X: tl.constexpr, INPUTS: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
    """(direction, magnitude, last hidden units) of a block: a block of values for each unit."""
    w = network + network_at(0, False, INPUTS, H, LAYERS)
    units = _add_products(y_units, x_columns, ALONG_X, w, H)
    units = _activated(_add_products(units, x, ELEMENT, w, H), TANH)
    for layer in tl.static_range(1, LAYERS):
        w = network + network_at(layer, False, INPUTS, H, LAYERS)
        b = network + network_at(layer, True, INPUTS, H, LAYERS)
        units = _activated(_dense(units, w, b, H), TANH)
    w = network + network_at(LAYERS, False, INPUTS, H, LAYERS)
    b = network + network_at(LAYERS, True, INPUTS, H, LAYERS)
    direction, magnitude = _dense(units, w, b, 2)
    return direction, magnitude, units


@triton.jit
def _sixteen(
    x, x_columns, y_columns, like, CHUNK: tl.constexpr,
    ELEMENT: tl.constexpr, ALONG_X: tl.constexpr, ALONG_Y: tl.constexpr,
):  # fmt: skip
    """Columns 16 CHUNK to 16 CHUNK + 15 of the network's input, each (ROWS, COLUMNS); 0 behind the last."""
    zero = like * 0.0
    columns = ()
    for k in tl.static_range(16):
        if index_of(ELEMENT, CHUNK * 16 + k) >= 0:
            columns += (x[index_of(ELEMENT, CHUNK * 16 + k)],)
        elif index_of(ALONG_X, CHUNK * 16 + k) >= 0:
            columns += (x_columns[index_of(ALONG_X, CHUNK * 16 + k)] + zero,)
        elif index_of(ALONG_Y, CHUNK * 16 + k) >= 0:
            columns += (y_columns[index_of(ALONG_Y, CHUNK * 16 + k)] + zero,)
        else:
            columns += (zero,)
    return columns


@triton.jit
def _network_by_products(
    network, x, x_columns, y_columns, mask,
    ELEMENT: tl.constexpr, ALONG_X: tl.constexpr, ALONG_Y: tl.constexpr, INPUTS: tl.constexpr, H: tl.constexpr,
    LAYERS: tl.constexpr, TANH: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(direction, magnitude, last hidden units) of a block: matrices of (elements, inputs) and (inputs, units)."""
    M: tl.constexpr = mask.shape[0] * mask.shape[1]
    unit, k = tl.arange(0, UNITS), tl.arange(0, 16)
    like = tl.where(mask, 0.0, 0.0)
    used: tl.constexpr = count_of(ELEMENT) + count_of(ALONG_X) + count_of(ALONG_Y)
    w0 = network + network_at(0, False, INPUTS, H, LAYERS)
    b0 = tl.load(network + network_at(0, True, INPUTS, H, LAYERS) + unit, mask=unit < H, other=0.0)
    a = tl.zeros([M, UNITS], tl.float32) + b0[None, :]
    for chunk in tl.static_range((used + 15) // 16):
        columns = _sixteen(x, x_columns, y_columns, like, chunk, ELEMENT, ALONG_X, ALONG_Y)
        inputs = k + chunk * 16
        real = (inputs < used)[:, None] & (unit < H)[None, :]
        w = tl.load(w0 + inputs[:, None] * H + unit[None, :], mask=real, other=0.0)
        a = _product(_stack16(columns), w, a, PRECISION)
    a = _activation(a, TANH)
    i = tl.arange(0, UNITS)
    for layer in tl.static_range(1, LAYERS):
        at = network + network_at(layer, False, INPUTS, H, LAYERS)
        real = (i < H)[:, None] & (unit < H)[None, :]
        w = tl.load(at + i[:, None] * H + unit[None, :], mask=real, other=0.0)
        b = tl.load(network + network_at(layer, True, INPUTS, H, LAYERS) + unit, mask=unit < H, other=0.0)
        a = _activation(_product(a, w, tl.zeros([M, UNITS], tl.float32) + b[None, :], PRECISION), TANH)
    w_out = network + network_at(LAYERS, False, INPUTS, H, LAYERS) + unit * 2
    b_out = network + network_at(LAYERS, True, INPUTS, H, LAYERS)
    direction = tl.sum(a * tl.load(w_out, mask=unit < H, other=0.0)[None, :], 1) + tl.load(b_out)
    magnitude = tl.sum(a * tl.load(w_out + 1, mask=unit < H, other=0.0)[None, :], 1) + tl.load(b_out + 1)
    return tl.reshape(direction, mask.shape), tl.reshape(magnitude, mask.shape), a


@triton.jit
def apply(
    table, tiles, sums, rates, numbers, networks, found_inf,
    FACTORED: tl.constexpr, GATHER: tl.constexpr, X_IS_ROW: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr, OUTPUT: tl.constexpr,
    MOMENTA: tl.constexpr, SECOND_MOMENTS: tl.constexpr, FACTORED_MOMENTS: tl.constexpr,
    ELEMENT: tl.constexpr, ALONG_X: tl.constexpr, ALONG_Y: tl.constexpr, INPUTS: tl.constexpr,
    H: tl.constexpr, LAYERS: tl.constexpr, TANH: tl.constexpr,
    MATMUL: tl.constexpr, PRECISION: tl.constexpr, UNITS: tl.constexpr,
    RMS_EPSILON: tl.constexpr, DIAGONAL_EPSILON: tl.constexpr, WITH_HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 3 over a tile: averages, output; sums[slot], (WIDTH,), of the last hidden units. networks: (tensors, size).

    Where found_inf is not 0 nothing is written.
    """
    if tl.load(found_inf) != 0.0:
        return
    record, slot, group, _, _, begin, end, columns = tile_of(table, tiles, COLUMNS)
    place, rule = place_of(record, group, FACTORED, ALIGNED, COLUMNS), gradient_rule(numbers)
    grad, param = typed(record, field("grad"), TYPE, ALIGNED), typed(record, field("param"), TYPE, ALIGNED)
    averages = _averages(record, rates, FACTORED, ALIGNED, MOMENTA, SECOND_MOMENTS, FACTORED_MOMENTS)
    output = output_of(record, numbers, TYPE, ALIGNED)
    network = networks + tl.load(record + field("operand")) * network_at(LAYERS + 1, False, INPUTS, H, LAYERS)
    if WITH_HIDDEN:
        if MATMUL:
            hidden_total = tl.zeros([ROWS * COLUMNS, UNITS], tl.float32)
        else:
            hidden_total = _zeros(tl.zeros([ROWS, COLUMNS], tl.float32), H)
    y_moments, y_factors, means, along_x = _factored_moments(
        record, group, columns, FACTORED, GATHER, X_IS_ROW, FACTORED_MOMENTS
    )
    y_columns = _axis_columns(ALONG_Y, y_moments)
    y_units = ()
    if not MATMUL:  # the bias with the columns along y
        for j in tl.static_range(H):
            b0 = tl.load(network + network_at(0, True, INPUTS, H, LAYERS) + j)
            y_units += (tl.zeros([1, COLUMNS], tl.float32) + b0,)
        w0 = network + network_at(0, False, INPUTS, H, LAYERS)
        y_units = _add_products(y_units, y_columns, ALONG_Y, w0, H)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets, mask = block_of(place, rows, columns, FACTORED)
        g = gradient_of(grad, offsets, mask, rule)
        p = parameter_of(param, offsets, mask)
        m, v, d, x, x_columns = _averages_and_columns(
            record, averages, offsets, mask, rows, y_factors, means, along_x, g, p,
            FACTORED, GATHER, X_IS_ROW, FACTORED_MOMENTS, ELEMENT, ALONG_X, RMS_EPSILON, DIAGONAL_EPSILON,
        )  # fmt: skip
        store_averages(averages[0], offsets, mask, m)
        store_averages(averages[1], offsets, mask, v)
        store_averages(averages[2], offsets, mask, d)
        if MATMUL:
            direction, magnitude, hidden = _network_by_products(
                network, x, x_columns, y_columns, mask,
                ELEMENT, ALONG_X, ALONG_Y, INPUTS, H, LAYERS, TANH, UNITS, PRECISION,
            )  # fmt: skip
            if WITH_HIDDEN:
                hidden_total += tl.where(tl.reshape(mask, [ROWS * COLUMNS])[:, None], hidden, 0.0)
        else:
            direction, magnitude, hidden = _network_in_registers(
                network, x, x_columns, y_units, ELEMENT, ALONG_X, INPUTS, H, LAYERS, TANH
            )
            if WITH_HIDDEN:
                hidden_total = _add(hidden_total, hidden, mask)
        step = direction * tl.exp2(magnitude)
        store_result(output, offsets, mask, p, step, OUTPUT, TYPE)
    if WITH_HIDDEN:
        to = sums + slot * WIDTH
        if MATMUL:
            unit = tl.arange(0, UNITS)
            tl.store(to + unit, tl.sum(hidden_total, 0), mask=unit < H)
        else:
            for j in tl.static_range(H):
                tl.store(to + j, tl.sum(hidden_total[j]))


# ---- how it is launched ----

MOST_HIDDEN = 64
MATMUL_FROM = 16
"""Width from which the network is computed by matrix products (not measured on a device yet)."""
MOST_FACTORED = 8
FACTOR_BLOCK = (1024, 4)  # elements, warps
MOVE_ENTRIES = 128
MOVE_TILES = 8


def block(spec: ElementMlp, kernel: str) -> tuple[int, int]:
    """(elements of a block, warps): as many values for a thread as its registers hold."""
    if kernel == "column_sums":
        return 512, 4
    if spec.hidden_size >= MATMUL_FROM:
        return 128, 8 if spec.hidden_size > 32 else 4
    return 512 if spec.hidden_size <= 4 else 256, 4


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


def constants(spec: ElementMlp, layout: Layout, output: str, backend: str = "cuda") -> dict[str, Any]:
    """Constants that `spec` gives for a layout. backend: "cuda" or "hip"."""
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
        "MATMUL": spec.hidden_size >= MATMUL_FROM,
        "PRECISION": default_precision(backend),
        "UNITS": max(int(triton.next_power_of_2(spec.hidden_size)), 16),
        "RMS_EPSILON": spec.epsilons.rms,
        "DIAGONAL_EPSILON": spec.epsilons.diagonal_momentum,
        "WITH_SQUARE": spec.scale == "parameter_rms",
        "WITH_HIDDEN": spec.messages > 0,
        "WIDTH": width(spec),
    }
