"""Hand-designed optimizers that learned ones are compared with. Their hyperparameters may be traced and batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...architectures import nadamw as architecture
from ...architectures.base import Inputs
from ...operations import ModelTensors, Reference
from ...operations.accumulators import initial_state
from ...reference import TensorState
from ..unroll import MakeOptimizer


class NAdamW(NamedTuple):
    """Hyperparameters of the architecture `nadamw`, in its order, as a pytree; numbers or scalar arrays."""

    learning_rate: Any = 1e-3
    beta1: Any = 0.9
    beta2: Any = 0.999
    epsilon: Any = 1e-8
    nesterov: Any = 1.0
    weight_decay: Any = 0.0
    l2: Any = 0.0
    warmup_fraction: Any = 0.0
    constant_fraction: Any = 0.0
    final_fraction: Any = 1.0
    num_steps: Any = 1.0
    """Horizon of the schedule."""


class NAdamWState(NamedTuple):
    """State of `nadamw`."""

    count: jax.Array
    averages: list[TensorState]
    """Of each parameter."""


def nadamw(h: NAdamW) -> optax.GradientTransformation:
    """The architecture `nadamw`, with the quirks of google/learned_optimization: most results have them."""
    values = h._asdict()
    num_steps = values.pop("num_steps")
    definition = architecture.NAdamW(**values, published_quirks=True)

    def init(params: Any) -> NAdamWState:
        leaves = jax.tree.leaves(params)
        return NAdamWState(
            jnp.zeros((), jnp.int32), [initial_state(definition.accumulates("", p.shape), p) for p in leaves]
        )

    def update(grads: Any, state: NAdamWState, params: Any = None) -> tuple[Any, NAdamWState]:
        if params is None:
            raise ValueError("nadamw reads the parameters: call update(grads, state, params)")
        leaves, tree = jax.tree.flatten(params)
        tensors = ModelTensors(
            leaves, tree.flatten_up_to(grads), state.averages, [1.0] * len(leaves), [0.0] * len(leaves)
        )
        inputs = Inputs(state.count, num_steps, loss=None)
        outputs, averages, _, _ = definition.step(Reference(), {}, tensors, {}, {}, inputs)
        return tree.unflatten(outputs), NAdamWState(state.count + 1, averages)

    return optax.GradientTransformation(init, update)


def draw_nadamw(draws: int, num_steps: int, seed: int = 0) -> list[NAdamW]:
    """Points of NAdamW's search space (`architectures.nadamw.draw`) for training runs of `num_steps`."""
    return [
        NAdamW(**{name: float(getattr(h, name)) for name in NAdamW._fields[:-1]}, num_steps=float(num_steps))
        for h in architecture.draw(draws, seed)
    ]


@dataclass(frozen=True)
class Baseline:
    """An optimizer with what is tried to tune it: learning rates in a range, or draws from a search space."""

    name: str
    label: str
    make: MakeOptimizer
    range: tuple[float, float] | None
    """Smallest and largest learning rate, where that is all there is to tune; None: draws from NAdamW's space."""
    untuned: float | None = None
    """The one learning rate that is tried, instead."""

    def settings(self, num_steps: int, rates: int, draws: int) -> list[Any]:
        """What is tried for training runs of `num_steps`: `rates` learning rates, or `draws` draws."""
        if self.untuned is not None:
            return [self.untuned]
        if self.range is None:
            return list(draw_nadamw(draws, num_steps))
        return [float(x) for x in np.geomspace(*self.range, rates)]

    def beyond(self, rates: Sequence[float], highest: bool) -> list[float]:
        """Learning rates beyond an end of `rates` (sorted, evenly spaced): a quarter as many, at most 4."""
        first, second = (rates[-1], rates[-2]) if highest else (rates[0], rates[1])
        count = min(4, -(-len(rates) // 4))
        return [first * (first / second) ** (i + 1) for i in range(count)]


def describe(setting: Any) -> dict[str, float]:
    """A setting of a baseline by names, plain numbers; those of NAdamW that do nothing are left out."""
    if not isinstance(setting, NAdamW):
        return {"learning_rate": float(setting)}
    values = {k: float(v) for k, v in setting._asdict().items()}
    return {k: v for k, v in values.items() if v or k in ("learning_rate", "beta1", "nesterov")}


BASELINES: dict[str, Baseline] = {
    "sgdm": Baseline("sgdm", "SGD, momentum 0.9", partial(optax.sgd, momentum=0.9), (1e-3, 3.0)),
    "adam": Baseline("adam", "Adam", optax.adam, (1e-4, 0.3)),
    "nadamw": Baseline("nadamw", "NAdamW", nadamw, None),
    "adam_default": Baseline("adam_default", "Adam, untuned", optax.adam, None, untuned=1e-3),
}
