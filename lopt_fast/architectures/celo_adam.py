"""celo_adam: Adam with the learned learning rate of celo (Moudgil et al. 2025, arXiv 2501.12670).

One LSTM for the whole model sees how far the training is and how the loss has gone, and gives lr = 0.1 exp(step_size):

    step = step_mult * lr * m' / (epsilon + sqrt(v' + 1e-10)),  m' = m / (1 - beta1^(t+1)),  v' = v / (1 - beta2^(t+1))

Gradients are clipped to +-1000 first. Operations used: `adam`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..operations import AdamScalars, ModelTensors, Operations
from ..operations.adam import ADAM_AVERAGES
from ..spec import Accumulates, SpecError
from .base import Architecture, Arrays, Inputs, Theta, Update
from .celo import SCHEDULE_INPUTS, init_schedule, learning_rate, schedule
from .checks import check_numbers, check_sizes
from .hyper import GRADIENT_CLIP, init_theta, lstm_shapes
from .networks import constant, seen_fraction


@dataclass(frozen=True)
class CeloAdam(Architecture):
    """Defaults are those of the published weights."""

    NAME: ClassVar[str] = "celo_adam"
    needs_loss: ClassVar[bool] = True
    needs_num_steps: ClassVar[bool] = True

    lstm_size: int = 64
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    step_mult: float = 0.001

    def __post_init__(self) -> None:
        check_sizes(self, "lstm_size")
        check_numbers(self, "beta1", "beta2", "epsilon", "step_mult")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SpecError(f"{self.NAME}: {name}={getattr(self, name)} must be from 0 to below 1")
        if self.epsilon < 0.0:
            raise SpecError(f"{self.NAME}: epsilon={self.epsilon} must not be negative")

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        step: dict[str, tuple[int, ...]] = {"step_w": (self.lstm_size, 1), "step_b": (1,)}
        return lstm_shapes(SCHEDULE_INPUTS, self.lstm_size) | step

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        return init_theta(self.theta_shapes, seed)

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return ADAM_AVERAGES

    def init_shared(self, theta: Theta) -> Arrays:
        return init_schedule(theta)

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        shared = schedule(theta, shared, inputs)
        lr = learning_rate(theta, shared["lstm_hidden"], len(tensors))
        beta1, beta2 = constant(self.beta1, lr), constant(self.beta2, lr)
        scalars = AdamScalars.of(
            lr,
            beta1=beta1,
            beta2=beta2,
            scale=self.step_mult * lr,
            momentum_factor=1.0 / seen_fraction(beta1, inputs.t),
            v_factor=1.0 / seen_fraction(beta2, inputs.t),
            epsilon=self.epsilon,
            root_epsilon=1e-10,
        )
        outputs, states, *_ = operations.adam(tensors, scalars, gradient_clip=GRADIENT_CLIP)
        return Update(outputs, states, rows, shared)
