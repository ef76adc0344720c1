"""The training loop of both frameworks: gradient, update, and how long each took."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np


class Trainer(Protocol):
    """A model, its data and an optimizer in one framework. Both methods return when the work is done."""

    parameters: int

    def gradient(self, step: int) -> float:
        """Loss of the batch of this step; keeps its gradient."""

    def update(self) -> None:
        """One step of the optimizer with the gradient that was kept."""

    def state_bytes(self) -> int:
        """Size of the optimizer's state."""


@dataclass(frozen=True)
class Curve:
    """A training run: arrays of (steps,); after a loss that is not finite they end early."""

    losses: np.ndarray
    """Training loss of each batch, before its update."""
    update_seconds: np.ndarray
    step_seconds: np.ndarray
    """Gradient and update."""

    def loss_at(self, step: int, window: int) -> float:
        """Mean loss of the last `window` batches up to `step` (1 is the first); NaN where the run had diverged."""
        if step > len(self.losses):
            return math.nan
        return float(self.losses[max(0, step - window) : step].mean())

    @property
    def update_ms(self) -> float:
        """Median over the steps, the first few left out."""
        return 1e3 * float(np.median(_settled(self.update_seconds)))

    @property
    def step_ms(self) -> float:
        return 1e3 * float(np.median(_settled(self.step_seconds)))


def _settled(seconds: np.ndarray) -> np.ndarray:
    return seconds[min(5, len(seconds) - 1) :]


def train_steps(trainer: Trainer, steps: int, on_step: Callable[[float], None] | None = None) -> Curve:
    """Train for `steps` steps, or until the loss is not finite. `on_step` is called with the loss of each."""
    losses, updates, totals = [], [], []
    for step in range(steps):
        start = perf_counter()
        loss = trainer.gradient(step)
        middle = perf_counter()
        if math.isfinite(loss):
            trainer.update()
        end = perf_counter()
        losses.append(loss)
        updates.append(end - middle)
        totals.append(end - start)
        if on_step is not None:
            on_step(loss)
        if not math.isfinite(loss):
            break
    return Curve(np.array(losses), np.array(updates), np.array(totals))
