"""adafactor: Adam without momentum and with a factored second moment (Shazeer & Stern 2018, arXiv 1804.04235, Alg. 6).

With v the running average of q = g^2 + 1e-30, kept as row and column means R, C of the two largest axes of a tensor,
its decay beta = 1 - (t+1)^-decay_exponent rising from 0:

    u = g / sqrt(v),  v = R C / mean(R)
    step = rate * max(minimum_scale, rms(p)) * u / max(1, rms(u) / clipping),  rate = min(learning_rate, 1 / sqrt(t+1))

The variant is that of optax: tensors whose second-largest axis is below `minimum_factored` keep v in full, all other
axes than the two largest are batch axes, and `momentum` is an average of steps. With `relative_step` off, the rate is
`learning_rate`, as there. Array code alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..layout import factored_dims
from ..namespace import array_namespace
from ..operations import ModelTensors, Operations
from ..reference import SQUARE_EPSILON, Array, TensorState
from ..spec import Accumulates, Averages, SpecError
from .base import Arrays, Inputs, Theta, Update
from .baseline import Baseline, zeros
from .checks import check_range


@dataclass(frozen=True)
class Adafactor(Baseline):
    """Defaults are those of the paper (section 9), with optax's smallest size of what is factored."""

    NAME: ClassVar[str] = "adafactor"
    has_kernels: ClassVar[bool] = False

    learning_rate: float = 0.01
    relative_step: bool = True
    """The rate falls as 1 / sqrt(t+1) from where that is below `learning_rate`."""
    decay_exponent: float = 0.8
    clipping: float | None = 1.0
    """Bound on the root mean square of u; None: no bound."""
    scale_by_parameter: bool = True
    minimum_scale: float = 1e-3
    minimum_factored: int = 128
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, 0.0, 1.0, "momentum")
        check_range(self, 0.0, math.inf, "learning_rate", "decay_exponent", "minimum_scale", "weight_decay")
        if self.clipping is not None and not self.clipping > 0.0:
            raise SpecError(f"{self.NAME}: clipping={self.clipping} must be positive, or None for no bound")
        if type(self.minimum_factored) is not int or self.minimum_factored < 1:
            raise SpecError(
                f"{self.NAME}: minimum_factored={self.minimum_factored!r} must be a positive integer"
            )

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        factored = self._factored(shape) is not None
        return Averages(1 if self.momentum else 0, 0 if factored else 1, 1 if factored else 0)

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        like = zeros(tensors)[0, ...]
        xp = array_namespace(like)
        seen = xp.astype(inputs.t, like.dtype) + 1.0
        new_share = seen**-self.decay_exponent  # 1 - beta
        rate = xp.full_like(like, self.learning_rate)
        if self.relative_step:
            rate = xp.minimum(rate, 1.0 / xp.sqrt(seen))
        tensors = tensors.decayed(self.learning_rate * self.weight_decay)
        outputs: list[Array] = []
        states: list[TensorState] = []
        for i, (p, g, state) in enumerate(zip(tensors.params, tensors.grads, tensors.states, strict=True)):
            share = xp.astype(new_share, p.dtype)
            u, state = self._preconditioned(g * tensors.grad_scale, state, share)
            step = xp.astype(rate, p.dtype) * u
            if self.clipping is not None:
                step = step / _at_least(1.0, _rms(u) / self.clipping)
            if self.scale_by_parameter:
                step = step * _at_least(self.minimum_scale, _rms(p))
            if self.momentum:
                step = self.momentum * state.momentum[0, ...] + (1.0 - self.momentum) * step
                state = state._replace(momentum=step[None])
            outputs.append(tensors.finish(i, step))
            states.append(state)
        return Update(outputs, states, rows, shared)

    def _factored(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """(d1, d0), the axes that are factored; None where none are."""
        dims = factored_dims(shape)
        return None if dims is None or shape[dims[0]] < self.minimum_factored else dims

    def _preconditioned(self, g: Array, state: TensorState, share: Array) -> tuple[Array, TensorState]:
        """(g / sqrt(v), state after g)"""
        xp = array_namespace(g)
        square = g * g + SQUARE_EPSILON
        dims = self._factored(g.shape)

        def averaged(old: Array, new: Array) -> Array:
            return (1.0 - share) * old + share * new[None]

        if dims is None:
            v = averaged(state.second_moment, square)
            return g / xp.sqrt(v[0, ...]), state._replace(second_moment=v)
        d1, d0 = dims
        row = averaged(state.factored_row, xp.mean(square, axis=d0))
        column = averaged(state.factored_column, xp.mean(square, axis=d1))
        rows, columns = xp.expand_dims(row[0, ...], axis=d0), xp.expand_dims(column[0, ...], axis=d1)
        # Two roots: the product of the factors may underflow.
        u = g / xp.sqrt(rows / xp.mean(rows, axis=d1, keepdims=True)) / xp.sqrt(columns)
        return u, state._replace(factored_row=row, factored_column=column)


def _rms(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.sqrt(xp.mean(x * x))


def _at_least(low: float, x: Array) -> Array:
    """max(x, low) that keeps NaN."""
    xp = array_namespace(x)
    return xp.where(x < low, xp.full_like(x, low), x)
