"""Adam's update with hyperparameters for each tensor, in the general form that all its relatives share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..namespace import array_namespace
from ..reference import Array, TensorState
from ..spec import Averages
from .accumulators import ModelTensors, as_vector, clipped
from .results import Result, Statistics
from .statistics import stacked, tensor_statistics

if TYPE_CHECKING:
    from .base import Operations


class AdamScalars(NamedTuple):
    """Operands, each (tensors,): with g' = clip(g) + l2 * p, and m, v the averages of g' and g'^2 after this step,

    step = scale * (momentum_factor * m + gradient_factor * g') / (epsilon + sqrt(v_factor * v + root_epsilon))
    """

    beta1: Array
    beta2: Array
    scale: Array
    momentum_factor: Array
    gradient_factor: Array
    v_factor: Array
    epsilon: Array
    root_epsilon: Array
    l2: Array

    @classmethod
    def of(
        cls, like: Array, *, beta1: Array | float, beta2: Array | float, scale: Array | float,
        momentum_factor: Array | float = 1.0, gradient_factor: Array | float = 0.0, v_factor: Array | float = 1.0,
        epsilon: Array | float, root_epsilon: Array | float = 0.0, l2: Array | float = 0.0,
    ) -> AdamScalars:  # fmt: skip
        """Each as an array like `like`, (tensors,): numbers and arrays () are those of all tensors."""
        values = beta1, beta2, scale, momentum_factor, gradient_factor, v_factor, epsilon, root_epsilon, l2
        zeros = array_namespace(like).zeros_like(like)
        return cls(*(value + zeros for value in values))


ADAM_AVERAGES = Averages(momenta=1, second_moments=1)
"""What a parameter keeps: m and v."""


def adam(
    tensors: ModelTensors,
    scalars: AdamScalars,
    gradient_clip: Array | float | None = None,
    statistics: bool = False,
) -> Result:
    """One update of all tensors.

    statistics: the result has them too, of the clipped gradient (without l2 * p) and the averages after this step.
    """
    outputs: list[Array] = []
    states: list[TensorState] = []
    rows: list[Statistics] = []
    for i, (p, g, state) in enumerate(zip(tensors.params, tensors.grads, tensors.states, strict=True)):
        xp = array_namespace(p)
        s = AdamScalars(*(xp.astype(x[i, ...], p.dtype) for x in scalars))
        clipped_g = clipped(g * tensors.grad_scale, gradient_clip)
        g = clipped_g + s.l2 * p
        m = s.beta1 * state.momentum[0, ...] + (1.0 - s.beta1) * g
        v = s.beta2 * state.second_moment[0, ...] + (1.0 - s.beta2) * g * g
        numerator = s.momentum_factor * m + s.gradient_factor * g
        step = s.scale * numerator / (s.epsilon + xp.sqrt(s.v_factor * v + s.root_epsilon))
        outputs.append(tensors.finish(i, step))
        states.append(state._replace(momentum=m[None], second_moment=v[None]))
        if statistics:
            rows.append(tensor_statistics(*as_vector(p, clipped_g, states[-1])))
    return Result(outputs, states, statistics=stacked(rows, tensors.params) if statistics else None)


def adam_between_statistics(
    operations: Operations, tensors: ModelTensors, scalars: AdamScalars, gradient_clip: Array | float | None
) -> Result:
    """`adam` with statistics by operations that have both, but not together."""
    # The parameter before the step, the averages after it: operations may write in place.
    before = operations.statistics(Averages(), tensors, None, gradient_clip)
    result = operations.adam(tensors, scalars, gradient_clip)
    # Nothing of the parameters before the step, which may have been overwritten; only averages are looked at.
    moved = replace(tensors, params=result.outputs, grads=result.outputs, states=result.states)
    after = operations.statistics(ADAM_AVERAGES, moved, None, gradient_clip)
    return result._replace(
        statistics=before._replace(
            momentum_mean=after.momentum_mean,
            momentum_variance=after.momentum_variance,
            second_moment_mean=after.second_moment_mean,
            second_moment_variance=after.second_moment_variance,
        )
    )
