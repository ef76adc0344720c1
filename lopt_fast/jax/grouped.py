"""The operations over all parameters of one shape at once: XLA then compiles each shape, not each parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..operations import (
    AdamScalars,
    Decays,
    ElementMlp,
    ModelTensors,
    Reference,
    Result,
    Statistics,
    Weights,
)
from ..reference import Array
from ..spec import Accumulates

GROUPED_SIZE = 2**20
"""Parameters with more elements are compiled one by one: those of a group are copied into one array first."""

BATCHED_SIZE = 2**16
"""So many elements of a group are computed at a time: their columns should fit into a cache."""

Out = TypeVar("Out")


class Grouped:
    """Implements `Operations` with the definitions, mapped over tensors. Only the order of sums differs from theirs."""

    @staticmethod
    def statistics(
        accumulates: Accumulates,
        tensors: ModelTensors,
        decays: Decays | None,
        gradient_clip: Array | float | None = None,
        before: bool = False,
    ) -> Statistics:
        def one(tensors: ModelTensors, operands: None) -> Statistics:
            del operands
            return Reference.statistics(accumulates, tensors, decays, gradient_clip, before)

        return _concatenated(_each(one, tensors, None))

    @staticmethod
    def element_mlp(
        spec: ElementMlp,
        tensors: ModelTensors,
        decays: Decays,
        weights: Weights,
        multiplier: Array | None = None,
        gradient_clip: Array | float | None = None,
        steps_only: bool = False,
        column_mean_square: Array | None = None,
    ) -> Result:
        # Weights with a leading axis are each tensor's own.
        own = Weights(
            tuple(w if w.ndim == 3 else None for w in weights.w),
            tuple(b if b.ndim == 2 else None for b in weights.b),
        )

        def one(tensors: ModelTensors, operands: tuple[Weights, Array | None, Array | None]) -> Result:
            mine, factor, mean_square = operands
            chosen = Weights(
                *(
                    tuple(common if array is None else array for array, common in zip(a, b, strict=True))
                    for a, b in zip(mine, weights, strict=True)
                )
            )
            return Reference.element_mlp(
                spec, tensors, decays, chosen, factor, gradient_clip, steps_only, mean_square
            )

        return _joined(_each(one, tensors, (own, multiplier, column_mean_square)))

    @staticmethod
    def adam(
        tensors: ModelTensors,
        scalars: AdamScalars,
        gradient_clip: Array | float | None = None,
        statistics: bool = False,
    ) -> Result:
        def one(tensors: ModelTensors, scalars: AdamScalars) -> Result:
            return Reference.adam(tensors, scalars, gradient_clip, statistics)

        return _joined(_each(one, tensors, scalars))


def _joined(results: list[Result]) -> Result:
    """The result for all tensors from that for each of them."""
    messages = [r.messages for r in results if r.messages is not None]
    statistics = [r.statistics for r in results if r.statistics is not None]
    return Result(
        [r.outputs[0] for r in results],
        [r.states[0] for r in results],
        jnp.concatenate(messages) if messages else None,
        _concatenated(statistics) if statistics else None,
    )


def _concatenated(rows: list[Statistics]) -> Statistics:
    """The statistics of all tensors from those of each of them."""
    joined: Statistics = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
    return joined


def _each(one: Callable[[ModelTensors, Any], Out], tensors: ModelTensors, operands: Any) -> list[Out]:
    """`one` for each tensor alone, with its rows (1, ...) of the arrays in `operands`, (tensors, ...)."""
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(tensors.params):
        alone = i if p.size > GROUPED_SIZE else None
        groups.setdefault((alone, p.shape, p.dtype, *(a.shape for a in tensors.states[i])), []).append(i)

    def single(mine: Any, rows: Any) -> Out:
        p, g, state, lr, weight_decay = mine
        alone = replace(
            tensors, params=[p], grads=[g], states=[state], lr=[lr], weight_decay=[weight_decay], names=()
        )
        return one(alone, jax.tree.map(lambda a: a[None], rows))

    found: dict[int, Out] = {}
    for indices in groups.values():
        members = [_operands_of(tensors, i) for i in indices]
        rows = _rows(operands, indices)
        if len(indices) == 1:
            found[indices[0]] = single(members[0], jax.tree.map(lambda a: a[0], rows))
            continue
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
        together = _mapped(single, stacked, rows, _batch(len(indices), members[0][0].size))
        for k, i in enumerate(indices):
            found[i] = jax.tree.map(lambda a, k=k: a[k], together)
    return [found[i] for i in range(len(tensors))]


def _mapped(single: Callable[[Any, Any], Out], members: Any, rows: Any, batch: int) -> Out:
    """`single` over the leading axes, `batch` at a time, which divides them."""
    split = jax.tree.map(lambda a: jnp.reshape(a, (len(a) // batch, batch, *a.shape[1:])), (members, rows))
    found = jax.lax.map(lambda x: jax.vmap(single)(*x), split)
    return jax.tree.map(lambda a: jnp.reshape(a, (a.shape[0] * batch, *a.shape[2:])), found)


def _batch(count: int, size: int) -> int:
    """How many of `count` tensors at a time: a divisor, as a remainder would be compiled apart."""
    return max(k for k in range(1, count + 1) if count % k == 0 and (k == 1 or k * size <= BATCHED_SIZE))


def _rows(operands: Any, indices: list[int]) -> Any:
    return jax.tree.map(lambda a: a[np.array(indices)], operands)


def _operands_of(tensors: ModelTensors, i: int) -> Any:
    p = tensors.params[i]
    numbers = (jnp.asarray(x, p.dtype) for x in (tensors.lr[i], tensors.weight_decay[i]))
    return p, tensors.grads[i], tensors.states[i], *numbers
