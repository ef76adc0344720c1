"""What an architecture is: hyperparameters, meta-parameters, state, and a step made of operations.

An architecture's file says *what* is computed, in array code that runs in NumPy, PyTorch and JAX alike; the work on
every parameter is in `operations`. To add one: write its file, and add its line to `ARCHITECTURES` (__init__.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from ..operations import ModelTensors, Operations
from ..reference import Array, TensorState
from ..spec import Accumulates, Hyperparameters, Statistics

Theta = Mapping[str, Array]
"""Meta-parameters by the names of `theta_shapes`, all of one type."""
Arrays = dict[str, Array]


class Inputs(NamedTuple):
    """What a step is told beside parameters and gradients."""

    t: Array
    """int (), steps taken before."""
    num_steps: Array | float | None
    """Length of the training; given where `needs_num_steps`."""
    loss: Array | None
    """(), of this step's gradient; given where `needs_loss`."""


class Update(NamedTuple):
    """What a step returns."""

    outputs: list[Array]
    """As `ModelTensors` says: new parameters, or what is to be added to them."""
    states: list[TensorState]
    rows: Arrays
    shared: Arrays


@dataclass(frozen=True)
class Architecture(Hyperparameters):
    """Base class. Fields of the subclass, a frozen dataclass, are its hyperparameters.

    State has three parts: `TensorState` of each parameter, `rows` (arrays with a leading axis over the tensors) and
    `shared` (arrays of the whole model).
    """

    statistics: ClassVar[Statistics] = "exact"
    needs_loss: ClassVar[bool] = False
    sees_tensors: ClassVar[bool] = False
    """Whether it has a network with a row for each tensor, not one for the whole model or none."""

    @property
    def has_kernels(self) -> bool:
        """Whether its work on every parameter is in operations that kernels compute. If not it is plain array code,
        whatever the backend."""
        return True

    @property
    def needs_num_steps(self) -> bool:
        """Where it does not depend on hyperparameters, a ClassVar."""
        return False

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Initial meta-parameters, float32."""
        raise NotImplementedError

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        """Which running averages the parameter of this name and shape has."""
        raise NotImplementedError

    def init_rows(self, theta: Theta, shapes: Sequence[tuple[int, ...]]) -> Arrays:
        """Tensor-level state of tensors of these shapes, (tensors, ...) each, in the type of `theta`."""
        return {}

    def init_shared(self, theta: Theta) -> Arrays:
        """State of the whole model, in the type of `theta`."""
        return {}

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        """One step of the tensors that have a gradient; `rows` are theirs. At least one tensor, none of size 0."""
        raise NotImplementedError

    def observe_validation(self, theta: Theta, shared: Arrays, loss: Array) -> Arrays:
        """`shared` after a loss on validation data has been seen; most architectures do not look at it."""
        return shared
