"""Means and variances of a tensor, its gradient and its running averages: inputs of tensor-level networks."""

from __future__ import annotations

from typing import NamedTuple

from array_api_compat import array_namespace

from ..reference import Array, accumulate
from ..spec import Accumulates
from .accumulators import Decays, ModelTensors, as_vector, clipped


class Statistics(NamedTuple):
    """One row for each tensor, in order. Variances are means of squared distances from the mean (no correction).

    The mean of squares is ``variance + mean ** 2``.
    """

    parameter_mean: Array
    """(tensors,), of the parameter before the step, as all that is named `parameter`."""
    parameter_variance: Array
    gradient_mean: Array
    """(tensors,), of the clipped gradient, as all that is named `gradient`."""
    gradient_variance: Array
    gradient_abs_mean: Array
    momentum_mean: Array
    """(tensors, momenta)"""
    momentum_variance: Array
    second_moment_mean: Array
    """(tensors, second moments)"""
    second_moment_variance: Array


def statistics(
    accumulates: Accumulates,
    tensors: ModelTensors,
    decays: Decays | None,
    gradient_clip: Array | float | None = None,
) -> Statistics:
    """Statistics of all tensors. `decays`: of the running averages after this gradient; None: as they are before it."""
    rows = []
    for p, g, state in zip(tensors.params, tensors.grads, tensors.states, strict=True):
        p, g, state = as_vector(p, g, state)
        xp = array_namespace(p)
        g = clipped(g * tensors.grad_scale, gradient_clip)
        if decays is not None:
            state = accumulate(accumulates, decays.of(p), g, state)
        mean_p, variance_p = _moments(p)
        mean_g, variance_g = _moments(g)
        mean_m, variance_m = _moments(state.momentum, first=1)
        mean_v, variance_v = _moments(state.second_moment, first=1)
        rows.append(
            Statistics(
                mean_p,
                variance_p,
                mean_g,
                variance_g,
                xp.mean(xp.abs(g)),
                mean_m,
                variance_m,
                mean_v,
                variance_v,
            )
        )
    xp = array_namespace(tensors.params[0])
    widest = xp.result_type(*tensors.params)
    return Statistics(
        *(xp.stack([xp.astype(v, widest) for v in values]) for values in zip(*rows, strict=True))
    )


def _moments(x: Array, first: int = 0) -> tuple[Array, Array]:
    """Mean and variance over the axes from `first` on."""
    xp = array_namespace(x)
    axes = tuple(range(first, x.ndim))
    if not axes:  # an accumulator that is not there
        return x, x
    mean = xp.mean(x, axis=axes, keepdims=True)
    variance = xp.mean((x - mean) ** 2, axis=axes)
    return xp.reshape(mean, variance.shape), variance
