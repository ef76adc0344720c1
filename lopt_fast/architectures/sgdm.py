"""sgdm: stochastic gradient descent with momentum (Polyak 1964; Sutskever et al. 2013), as PyTorch computes it.

    m <- momentum * m + g',  g' = g + l2 * p,  step = learning_rate * m,  or learning_rate * (g' + momentum * m)

the latter with `nesterov`. Here m is a sum, not an average. No operation: a few element-wise lines of array code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..operations import ModelTensors, Operations
from ..reference import Array, TensorState
from ..spec import Accumulates, Averages
from .base import Arrays, Inputs, Theta, Update
from .baseline import Baseline
from .checks import check_range


@dataclass(frozen=True)
class SgdM(Baseline):
    """Without `nesterov` and `l2`, `optax.sgd(learning_rate, momentum)`."""

    NAME: ClassVar[str] = "sgdm"
    has_kernels: ClassVar[bool] = False

    learning_rate: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    l2: float = 0.0
    """Added to the gradient, times the parameter: the weight decay of `torch.optim.SGD`."""

    def __post_init__(self) -> None:
        check_range(self, 0.0, 1.0, "momentum")
        check_range(self, 0.0, math.inf, "learning_rate", "l2")

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return Averages(momenta=1)

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        outputs: list[Array] = []
        states: list[TensorState] = []
        for i, (p, g, state) in enumerate(zip(tensors.params, tensors.grads, tensors.states, strict=True)):
            g = g * tensors.grad_scale + self.l2 * p
            m = self.momentum * state.momentum[0, ...] + g
            direction = g + self.momentum * m if self.nesterov else m
            outputs.append(tensors.finish(i, self.learning_rate * direction))
            states.append(state._replace(momentum=m[None]))
        return Update(outputs, states, rows, shared)
