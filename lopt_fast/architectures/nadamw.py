"""nadamw: Adam with Nesterov momentum, decoupled weight decay and a schedule (Metz et al. 2020, arXiv 2002.11887).

With m, v the running averages of g' = g + l2 * p and its square, and corrected(t) = sqrt(1 - beta2^(t+1)) /
(1 - beta1^(t+1)):

    step = rate(t) * (corrected(t) * (beta1 * m + (1 - beta1) * g') / (sqrt(v) + epsilon) + weight_decay * p)

and m in place of the sum where `nesterov` is off. rate(t): linear warm-up, constant, half a cosine. The baseline of
most work on learned optimizers; `draw` is its search space. Operations used: `adam`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..namespace import array_namespace
from ..operations import AdamScalars, ModelTensors, Operations
from ..operations.adam import ADAM_AVERAGES
from ..reference import Array
from ..spec import Accumulates
from .base import Arrays, Inputs, Theta, Update
from .baseline import Baseline, as_scalar, zeros
from .checks import check_range
from .networks import seen_fraction


@dataclass(frozen=True)
class NAdamW(Baseline):
    """All but `published_quirks` may be traced arrays, (): many settings then run as one batch."""

    NAME: ClassVar[str] = "nadamw"

    learning_rate: Any = 1e-3
    beta1: Any = 0.9
    beta2: Any = 0.999
    epsilon: Any = 1e-8
    nesterov: Any = True
    """Or 1 and 0."""
    weight_decay: Any = 0.0
    """Decoupled."""
    l2: Any = 0.0
    """Added to the gradient, times the parameter."""
    warmup_fraction: Any = 0.0
    """Of the training, in which the rate rises."""
    constant_fraction: Any = 0.0
    """Of the training, before the rate falls; the warm-up is a part of it."""
    final_fraction: Any = 1.0
    """Of `learning_rate`, at the end of the training and beyond."""
    published_quirks: bool = False
    """As google/learned_optimization computes it: `l2` is subtracted; `weight_decay` is multiplied by corrected(t) as
    well; a warm-up lasts for the whole constant part where that is longer, and the first step's rate is 0."""

    def __post_init__(self) -> None:
        check_range(self, 0.0, 1.0, "beta1", "beta2")
        check_range(
            self, 0.0, math.inf, "learning_rate", "epsilon", "weight_decay", "l2", "warmup_fraction",
            "constant_fraction", "final_fraction",
        )  # fmt: skip

    @property
    def needs_num_steps(self) -> bool:
        """Where there is a schedule. Must not be asked of traced hyperparameters."""
        return bool(self.warmup_fraction > 0 or self.final_fraction != 1)

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return ADAM_AVERAGES

    def rate(self, t: Array, num_steps: Array | float, like: Array) -> Array:
        """() learning rate of the step before which `t` were taken, in the type of `like`, ()."""
        xp = array_namespace(like)
        steps, rate, warmup, constant, final = (
            as_scalar(value, like)
            for value in (
                num_steps,
                self.learning_rate,
                self.warmup_fraction,
                self.constant_fraction,
                self.final_fraction,
            )
        )
        now = xp.minimum(xp.astype(t, like.dtype), steps)
        one, least = (
            as_scalar(1.0, like),
            as_scalar(1e-6, like),
        )  # no 0 / 0 where a part of the schedule is empty
        constant_steps = constant * steps
        falling = xp.maximum(steps - constant_steps, least)
        angle = math.pi * (xp.maximum(now, constant_steps) - constant_steps) / falling
        after = rate * (final + (1.0 - final) * (0.5 * xp.cos(angle) + 0.5))
        if self.published_quirks:
            warmup = xp.where(warmup > 0, xp.maximum(warmup, constant), warmup)
        warmup_steps = warmup * steps
        seen = now if self.published_quirks else now + 1.0
        risen = rate * xp.minimum(seen / xp.maximum(warmup_steps, least), one)
        return xp.where(now < warmup_steps, risen, after)

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        per_tensor = zeros(tensors)
        like = per_tensor[0, ...]
        xp = array_namespace(like)
        beta1, beta2, nesterov = (as_scalar(x, like) for x in (self.beta1, self.beta2, self.nesterov))
        rate = as_scalar(self.learning_rate, like)
        if inputs.num_steps is not None:
            rate = self.rate(inputs.t, inputs.num_steps, like)
        corrected = rate * xp.sqrt(seen_fraction(beta2, inputs.t)) / seen_fraction(beta1, inputs.t)
        l2 = as_scalar(self.l2, like)
        scalars = AdamScalars.of(
            per_tensor,
            beta1=beta1,
            beta2=beta2,
            scale=corrected,
            momentum_factor=1.0 - nesterov * (1.0 - beta1),
            gradient_factor=nesterov * (1.0 - beta1),
            epsilon=as_scalar(self.epsilon, like),
            l2=-l2 if self.published_quirks else l2,
        )
        decay = (corrected if self.published_quirks else rate) * as_scalar(self.weight_decay, like)
        outputs, states, *_ = operations.adam(tensors.decayed(decay), scalars)
        return Update(outputs, states, rows, shared)


def draw(draws: int, seed: int = 0) -> list[NAdamW]:
    """Points of NAdamW's search space, the same ones for the same seed; the first of many draws are those of few.

    The space is that of Metz et al. 2020 (arXiv 2002.11887; ranges as in its code, task_set/optimizers/nadamw.py),
    from which come the thousand configurations that Metz et al. 2022 (arXiv 2203.11860, appendix F) compare with.
    These are draws from the space, not that list, and have its quirks.
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
            nesterov=bool(rng.integers(2)),
            weight_decay=_log_uniform(rng, 1e-5, 1e-1) if regularisation != 1 else 0.0,
            l2=_log_uniform(rng, 1e-5, 1e-1) if regularisation != 0 else 0.0,
            warmup_fraction=_log_uniform(rng, 1e-5, 1e-1) if rng.integers(2) else 0.0,
            final_fraction=_log_uniform(rng, 1e-5, 1.0) if rng.integers(2) else 0.0,
            constant_fraction=rng.uniform(),
            published_quirks=True,
        )
        out.append(h)
    return out


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
