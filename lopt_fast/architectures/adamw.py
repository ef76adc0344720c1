"""adamw: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101), as PyTorch computes it.

With m, v the running averages of the gradient and its square:

    step = learning_rate * (m' / (epsilon + sqrt(v')) + weight_decay * p)
    m' = m / (1 - beta1^(t+1)),  v' = v / (1 - beta2^(t+1))

Operations used: `adam`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..operations import AdamScalars, ModelTensors, Operations
from ..operations.adam import ADAM_AVERAGES
from ..spec import Accumulates
from .base import Arrays, Inputs, Theta, Update
from .baseline import Baseline, as_scalar, zeros
from .checks import check_range
from .networks import seen_fraction


@dataclass(frozen=True)
class AdamW(Baseline):
    """Defaults are those of `torch.optim.AdamW`."""

    NAME: ClassVar[str] = "adamw"

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_range(self, 0.0, 1.0, "beta1", "beta2")
        check_range(self, 0.0, math.inf, "learning_rate", "epsilon", "weight_decay")

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return ADAM_AVERAGES

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        like = zeros(tensors)
        beta1, beta2 = as_scalar(self.beta1, like), as_scalar(self.beta2, like)
        scalars = AdamScalars.of(
            like,
            beta1=beta1,
            beta2=beta2,
            scale=self.learning_rate / seen_fraction(beta1, inputs.t),
            v_factor=1.0 / seen_fraction(beta2, inputs.t),
            epsilon=self.epsilon,
        )
        decayed = tensors.decayed(self.learning_rate * self.weight_decay)
        outputs, states, *_ = operations.adam(decayed, scalars)
        return Update(outputs, states, rows, shared)
