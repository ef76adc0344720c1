"""The tensors of a model as operations take them, and their running averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from array_api_compat import device

from ..layout import column_shape, row_shape
from ..namespace import array_namespace
from ..reference import Array, TensorState
from ..spec import Accumulates
from .constants import constant


class Decays(NamedTuple):
    """1 - decay of each running average, as arrays: (momenta,), (second moments,), (factored moments,)."""

    momentum: Array
    second_moment: Array
    factored: Array

    def of(self, like: Array) -> Decays:
        """In the type of `like`."""
        xp = array_namespace(like)
        return Decays(*(xp.astype(values, like.dtype) for values in self))

    @classmethod
    def constant(
        cls,
        like: Array,
        momentum: Sequence[float] = (),
        second_moment: Sequence[float] = (),
        factored: Sequence[float] = (),
    ) -> Decays:
        """From decays that are hyperparameters, in the library, type and device of `like`."""

        def complement(decays: Sequence[float]) -> Array:
            return constant([1.0 - b for b in decays], like)

        return cls(complement(momentum), complement(second_moment), complement(factored))


@dataclass(frozen=True)
class ModelTensors:
    """Parameters that have a gradient, with what a step does to all of them alike.

    The result of an operation on them is each new parameter, or what is to be added to it:
    ``-lr * (step + weight_decay * p)``.
    """

    params: list[Array]
    grads: list[Array]
    states: list[TensorState]
    lr: Sequence[Array | float]
    """One for each parameter."""
    weight_decay: Sequence[Array | float]
    names: Sequence[str] = ()
    """For architectures that treat some parameters in another way; empty where the framework has none."""
    grad_scale: Array | float = 1.0
    """Multiplies every gradient first."""
    apply: bool = False
    """Results are new parameters, not what is to be added."""

    def __len__(self) -> int:
        return len(self.params)

    def select(self, indices: Sequence[int]) -> ModelTensors:
        """Only those with these indices."""

        def some(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in indices]

        return replace(
            self, params=some(self.params), grads=some(self.grads), states=some(self.states),
            lr=some(self.lr), weight_decay=some(self.weight_decay), names=some(self.names) if self.names else (),
        )  # fmt: skip

    def decayed(self, amount: Array | float) -> ModelTensors:
        """With so much more weight decay, (): an architecture's own, which the learning rate multiplies as well."""
        if isinstance(amount, (int, float)) and amount == 0:
            return self
        more = [
            amount if isinstance(amount, (int, float)) else array_namespace(p).astype(amount, p.dtype)
            for p in self.params
        ]
        return replace(self, weight_decay=[w + a for w, a in zip(self.weight_decay, more, strict=True)])

    def finish(self, i: int, step: Array) -> Array:
        """The result for parameter `i`, whose step is `step`."""
        p = self.params[i]
        delta = -self.lr[i] * (step + self.weight_decay[i] * p)
        return p + delta if self.apply else delta


def initial_state(accumulates: Accumulates, p: Array) -> TensorState:
    """All accumulators of `p` at zero; what is not used has size 0."""
    xp = array_namespace(p)

    def zeros(count: int, shape: Sequence[int]) -> Array:
        dims = (count, *shape) if count else (0,)
        return xp.zeros(dims, dtype=p.dtype, device=device(p))

    return TensorState(**{name: zeros(n, shape) for name, (n, shape) in shapes(accumulates, p.shape).items()})


def shapes(accumulates: Accumulates, shape: Sequence[int]) -> Mapping[str, tuple[int, tuple[int, ...]]]:
    """(how many, shape of each) for every field of `TensorState`."""
    shape = tuple(shape)
    factored, n = len(shape) >= 2, accumulates.factored_moments
    return {
        "momentum": (accumulates.momenta, shape),
        "second_moment": (accumulates.second_moments, shape),
        "factored_row": (n, row_shape(shape) if factored else shape),
        "factored_column": (n, column_shape(shape)) if factored else (0, ()),
        "mean_squares": (0, ()),
    }


def as_vector(p: Array, g: Array, state: TensorState) -> tuple[Array, Array, TensorState]:
    """A scalar as the vector of one element that operations treat it as; others as they are."""
    if p.ndim:
        return p, g, state
    xp = array_namespace(p)
    grown = [xp.reshape(a, (*a.shape, 1)) if a.shape[0] else a for a in state]
    return xp.reshape(p, (1,)), xp.reshape(g, (1,)), TensorState(*grown)


def like_before(before: TensorState, after: TensorState) -> TensorState:
    """`after` in the shapes of `before`: undoes `as_vector` for the state."""
    xp = array_namespace(after.momentum)
    return TensorState(*(xp.reshape(new, old.shape) for old, new in zip(before, after, strict=True)))


def clipped(x: Array, bound: Array | float | None) -> Array:
    """x within [-bound, bound], NaN kept; None: no bound."""
    if bound is None:
        return x
    xp = array_namespace(x)
    high = constant(bound, x)
    return xp.where(x > high, high, xp.where(x < -high, -high, x))
