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

from ..unroll import MakeOptimizer


class NAdamW(NamedTuple):
    """Hyperparameters of `nadamw`; numbers or scalar arrays."""

    learning_rate: Any = 1e-3
    beta1: Any = 0.9
    beta2: Any = 0.999
    epsilon: Any = 1e-8
    nesterov: Any = 1.0
    """1 or 0."""
    weight_decay: Any = 0.0
    """Decoupled, times the bias-corrected learning rate."""
    l2: Any = 0.0
    warmup_fraction: Any = 0.0
    constant_fraction: Any = 0.0
    """Of the horizon, before the learning rate falls."""
    final_fraction: Any = 1.0
    """Of the learning rate, at the end."""
    num_steps: Any = 1.0
    """Horizon of the schedule."""


class NAdamWState(NamedTuple):
    """State of `nadamw`."""

    count: jax.Array
    first_moment: Any
    second_moment: Any


def nadamw_learning_rate(h: NAdamW, step: jax.Array) -> jax.Array:
    """Linear warm-up from 0, constant, then half a cosine down to `final_fraction` of the learning rate.

    As in google/learned_optimization: where there is a warm-up, it lasts for the larger of both fractions of the
    horizon. Beyond the horizon the learning rate stays what it was at its end.
    """
    step = jnp.minimum(step, h.num_steps)
    constant = h.constant_fraction * h.num_steps
    last = h.final_fraction * h.learning_rate
    falling = jnp.maximum(h.num_steps - constant, 1e-6)  # nothing falls where the constant part is all
    angle = jnp.pi * (jnp.maximum(step, constant) - constant) / falling
    after = (h.learning_rate - last) * (jnp.cos(angle) / 2 + 0.5) + last
    warmup = jnp.where(
        h.warmup_fraction > 0, jnp.maximum(h.warmup_fraction, h.constant_fraction) * h.num_steps, 0.0
    )
    return jnp.where(step < warmup, h.learning_rate * step / jnp.maximum(warmup, 1e-6), after)


def nadamw(h: NAdamW) -> optax.GradientTransformation:
    """Adam with Nesterov momentum, decoupled weight decay and a schedule (Metz et al. 2020, arXiv 2002.11887).

    As google/learned_optimization computes it: L2 regularisation is subtracted from the gradient, not added, and the
    second moment is not corrected for its bias where epsilon is added to its root.
    """

    def init(params: Any) -> NAdamWState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return NAdamWState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: Any, state: NAdamWState, params: Any = None) -> tuple[Any, NAdamWState]:
        if params is None:
            raise ValueError("nadamw reads the parameters: call update(grads, state, params)")
        t = state.count + 1
        rate = nadamw_learning_rate(h, state.count) * jnp.sqrt(1 - h.beta2**t) / (1 - h.beta1**t)
        grads = jax.tree.map(lambda g, p: g - h.l2 * p, grads, params)
        first = jax.tree.map(lambda m, g: h.beta1 * m + (1 - h.beta1) * g, state.first_moment, grads)
        second = jax.tree.map(lambda v, g: h.beta2 * v + (1 - h.beta2) * g * g, state.second_moment, grads)

        def step(g: jax.Array, m: jax.Array, v: jax.Array, p: jax.Array) -> jax.Array:
            direction = jnp.where(h.nesterov > 0, h.beta1 * m + (1 - h.beta1) * g, m)
            return -rate * (direction / (jnp.sqrt(v) + h.epsilon) + h.weight_decay * p)

        return jax.tree.map(step, grads, first, second, params), NAdamWState(t, first, second)

    return optax.GradientTransformation(init, update)


def draw_nadamw(draws: int, num_steps: int, seed: int = 0) -> list[NAdamW]:
    """Points of NAdamW's search space, the same ones for the same seed; the first of many draws are those of few.

    The space is that of Metz et al. 2020 (arXiv 2002.11887; ranges as in its code, task_set/optimizers/nadamw.py),
    from which come the thousand configurations that Metz et al. 2022 (arXiv 2203.11860, appendix F) compare with.
    These are draws from the space, not that list.
    """
    out = []
    for i in range(draws):
        rng = np.random.default_rng((seed, i))
        regularisation = rng.integers(3)  # decoupled weight decay, L2, or both
        h = NAdamW(
            learning_rate=_log_uniform(rng, 1e-5, 1.0),
            beta1=1 - _log_uniform(rng, 1e-3, 1.0),
            beta2=1 - _log_uniform(rng, 1e-5, 1.0),
            epsilon=_log_uniform(rng, 1e-8, 1e4),
            nesterov=float(rng.integers(2)),
            weight_decay=_log_uniform(rng, 1e-5, 1e-1) if regularisation != 1 else 0.0,
            l2=_log_uniform(rng, 1e-5, 1e-1) if regularisation != 0 else 0.0,
            warmup_fraction=_log_uniform(rng, 1e-5, 1e-1) if rng.integers(2) else 0.0,
            final_fraction=_log_uniform(rng, 1e-5, 1.0) if rng.integers(2) else 0.0,
            constant_fraction=rng.uniform(),
            num_steps=float(num_steps),
        )
        out.append(h)
    return out


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


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
