"""Adam's update (lopt_fast.operations.adam) in Triton: one pass over all tensors."""

import triton
import triton.language as tl
from lopt_fast.kernels.common.triton import (
    block_of,
    field,
    gradient_of,
    parameter_of,
    place_of,
    store_averages,
    store_result,
    tile_of,
    typed,
)

from lopt_fast.operations.adam import AdamScalars

SCALARS = tl.constexpr(len(AdamScalars._fields))
_PLACES = {name: i for i, name in enumerate(AdamScalars._fields)}

BLOCK = (1024, 4)  # elements, warps


@triton.constexpr_function
def scalar(name):
    """Place of a scalar in a tensor's row of them."""
    return _PLACES[name]


@triton.jit
def adam(
    table, tiles, scalars, numbers, found_inf,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """A tile; scalars: (tensors, SCALARS). Where found_inf is not 0 nothing is written."""
    if tl.load(found_inf) != 0.0:
        return
    record, _, group, _, _, begin, end, columns = tile_of(table, tiles, COLUMNS)
    place = place_of(record, group, False, ALIGNED, COLUMNS)
    s = scalars + tl.load(record + field("operand")) * SCALARS
    momentum = typed(record, field("momentum"), tl.float32, ALIGNED)
    second_moment = typed(record, field("second_moment"), tl.float32, ALIGNED)
    for first in range(begin, end, ROWS):
        offsets, mask = block_of(place, first + tl.arange(0, ROWS), columns, False)
        p = parameter_of(record, offsets, mask, TYPE, ALIGNED)
        g = gradient_of(record, offsets, mask, numbers, TYPE, ALIGNED) + p * tl.load(s + scalar("l2"))
        m = tl.load(momentum + offsets, mask=mask, other=0.0)
        v = tl.load(second_moment + offsets, mask=mask, other=0.0)
        beta1, beta2 = tl.load(s + scalar("beta1")), tl.load(s + scalar("beta2"))
        m = beta1 * m + (1.0 - beta1) * g
        v = beta2 * v + (1.0 - beta2) * g * g
        store_averages(record, offsets, mask, (m,), field("momentum"), ALIGNED)
        store_averages(record, offsets, mask, (v,), field("second_moment"), ALIGNED)
        numerator = m * tl.load(s + scalar("momentum_factor")) + g * tl.load(s + scalar("gradient_factor"))
        root = tl.sqrt(v * tl.load(s + scalar("v_factor")) + tl.load(s + scalar("root_epsilon")))
        step = numerator * tl.load(s + scalar("scale")) / (root + tl.load(s + scalar("epsilon")))
        store_result(record, offsets, mask, p, step, numbers, OUTPUT, TYPE, ALIGNED)
