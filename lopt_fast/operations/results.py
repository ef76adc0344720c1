"""What operations return."""

from __future__ import annotations

from typing import NamedTuple

from ..namespace import array_namespace
from ..reference import Array, TensorState


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
    column_mean_square: Array | None = None
    """(tensors, columns), of the columns of an `ElementMlp` before normalisation; 0 for those that a tensor lacks."""

    def of(self, like: Array) -> Statistics:
        """In the type of `like`."""
        xp = array_namespace(like)
        return Statistics(*(None if x is None else xp.astype(x, like.dtype) for x in self))


class Result(NamedTuple):
    """What an operation returns for all tensors."""

    outputs: list[Array]
    """New parameters or what is to be added, see `ModelTensors`; or the steps alone."""
    states: list[TensorState]
    messages: Array | None = None
    """(tensors, messages)"""
    statistics: Statistics | None = None
