"""Adam's update (lopt_fast.operations.adam) in Triton: one pass over all tensors."""

import triton
import triton.language as tl
from lopt_fast.kernels.common.triton import (
    block_of,
    field,
    gradient_of,
    gradient_rule,
    output_of,
    parameter_of,
    place_of,
    store_result,
    tile_of,
    typed,
)

from lopt_fast.operations.adam import AdamScalars

SCALARS = tl.constexpr(len(AdamScalars._fields))
_PLACES = tl.constexpr({name: i for i, name in enumerate(AdamScalars._fields)})

BLOCK = (1024, 4)  # elements, warps


@triton.constexpr_function
def scalar(name):
    """Place of a scalar in a tensor's row of them."""
    return _PLACES.value[name]


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
    grad, param = typed(record, field("grad"), TYPE, ALIGNED), typed(record, field("param"), TYPE, ALIGNED)
    momentum = typed(record, field("momentum"), tl.float32, ALIGNED)
    second_moment = typed(record, field("second_moment"), tl.float32, ALIGNED)
    rule, output = gradient_rule(numbers), output_of(record, numbers, TYPE, ALIGNED)
    s = scalars + tl.load(record + field("operand")) * SCALARS
    beta1, beta2, l2 = tl.load(s + scalar("beta1")), tl.load(s + scalar("beta2")), tl.load(s + scalar("l2"))
    momentum_factor, gradient_factor = (
        tl.load(s + scalar("momentum_factor")), tl.load(s + scalar("gradient_factor"))
    )  # fmt: skip
    v_factor, root_epsilon = tl.load(s + scalar("v_factor")), tl.load(s + scalar("root_epsilon"))
    scale, epsilon = tl.load(s + scalar("scale")), tl.load(s + scalar("epsilon"))
    for first in range(begin, end, ROWS):
        offsets, mask = block_of(place, first + tl.arange(0, ROWS), columns, False)
        p = parameter_of(param, offsets, mask)
        g = gradient_of(grad, offsets, mask, rule) + l2 * p
        m = beta1 * tl.load(momentum + offsets, mask=mask, other=0.0) + (1.0 - beta1) * g
        v = beta2 * tl.load(second_moment + offsets, mask=mask, other=0.0) + (1.0 - beta2) * g * g
        tl.store(momentum + offsets, m, mask=mask)
        tl.store(second_moment + offsets, v, mask=mask)
        numerator = momentum_factor * m + gradient_factor * g
        step = scale * numerator / (epsilon + tl.sqrt(v_factor * v + root_epsilon))
        store_result(output, offsets, mask, p, step, OUTPUT, TYPE)
