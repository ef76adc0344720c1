"""Means and variances of a tensor, its gradient and its running averages: inputs of tensor-level networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from ..namespace import array_namespace
from ..reference import Array, TensorState, accumulate
from ..spec import Accumulates
from .accumulators import Decays, ModelTensors, as_vector, clipped
from .mlp import ElementMlp, mean_squares
from .results import Statistics


def statistics(
    accumulates: Accumulates,
    tensors: ModelTensors,
    decays: Decays | None,
    gradient_clip: Array | float | None = None,
    before: bool = False,
) -> Statistics:
    """Statistics of all tensors, in their widest type.

    decays: of the running averages after this gradient, which are looked at; None: as they are before it.
    before: the averages are looked at as they are before this gradient, whatever the decays.

    With decays and an `ElementMlp` as `accumulates`, `column_mean_square` is there as well, of the columns after this
    gradient in any case: `element_mlp` of the same MLP, decays and bound on the gradient takes it, and need not pass
    over all parameters to find it. Not where each matrix has normalisers of its own. Other implementations may leave
    it out.
    """
    rows = []
    for p, g, state in zip(tensors.params, tensors.grads, tensors.states, strict=True):
        p, g, state = as_vector(p, g, state)
        g = clipped(g * tensors.grad_scale, gradient_clip)
        after = state if decays is None else accumulate(accumulates, decays.of(p), g, state)
        row = tensor_statistics(p, g, state if before else after)
        if decays is not None and has_column_mean_square(accumulates):
            row = row._replace(column_mean_square=mean_squares(accumulates, p, g, after))
        rows.append(row)
    return stacked(rows, tensors.params)


def has_column_mean_square(accumulates: Accumulates) -> TypeGuard[ElementMlp]:
    """Whether there are columns, with one mean square for a tensor each."""
    return isinstance(accumulates, ElementMlp) and accumulates.normalise_over == "tensor"


def tensor_statistics(p: Array, g: Array, state: TensorState) -> Statistics:
    """Those of one tensor, of rank 1 and more, without the axis over tensors."""
    xp = array_namespace(p)
    return Statistics(
        *_moments(p), *_moments(g), xp.mean(xp.abs(g)),
        *_moments(state.momentum, first=1), *_moments(state.second_moment, first=1),
    )  # fmt: skip


def stacked(rows: Sequence[Statistics], params: Sequence[Array]) -> Statistics:
    """Those of all tensors, in the widest type of the parameters."""
    xp = array_namespace(params[0])
    widest = xp.result_type(*params)
    return Statistics(
        *(None if values[0] is None else xp.stack([xp.astype(x, widest) for x in values])
          for values in zip(*rows, strict=True))
    )  # fmt: skip


def _moments(x: Array, first: int = 0) -> tuple[Array, Array]:
    """Mean and variance over the axes from `first` on."""
    xp = array_namespace(x)
    axes = tuple(range(first, x.ndim))
    if not axes:  # an accumulator that is not there
        return x, x
    mean = xp.mean(x, axis=axes, keepdims=True)
    variance = xp.mean((x - mean) ** 2, axis=axes)
    return xp.reshape(mean, variance.shape), variance
