"""Adam's update with hyperparameters for each tensor, in the general form that all its relatives share."""

from __future__ import annotations

from typing import NamedTuple

from array_api_compat import array_namespace

from ..reference import Array, TensorState
from ..spec import Averages
from .accumulators import ModelTensors, clipped
from .mlp import Result


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
        return cls(*(value + array_namespace(like).zeros_like(like) for value in values))


ADAM_AVERAGES = Averages(momenta=1, second_moments=1)
"""What a parameter keeps: m and v."""


def adam(tensors: ModelTensors, scalars: AdamScalars, gradient_clip: Array | float | None = None) -> Result:
    """One update of all tensors."""
    outputs: list[Array] = []
    states: list[TensorState] = []
    for i, (p, g, state) in enumerate(zip(tensors.params, tensors.grads, tensors.states, strict=True)):
        xp = array_namespace(p)
        s = AdamScalars(*(xp.astype(x[i, ...], p.dtype) for x in scalars))
        g = clipped(g * tensors.grad_scale, gradient_clip) + s.l2 * p
        m = s.beta1 * state.momentum[0, ...] + (1.0 - s.beta1) * g
        v = s.beta2 * state.second_moment[0, ...] + (1.0 - s.beta2) * g * g
        numerator = s.momentum_factor * m + s.gradient_factor * g
        step = s.scale * numerator / (s.epsilon + xp.sqrt(s.v_factor * v + s.root_epsilon))
        outputs.append(tensors.finish(i, step))
        states.append(state._replace(momentum=m[None], second_moment=v[None]))
    return Result(outputs, states)
