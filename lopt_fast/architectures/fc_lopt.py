"""fc_lopt: the per-parameter MLP of Metz et al. 2019 (arXiv 1810.10180).

Per parameter: 8 columns (gradient, parameter, six momenta) and 11 of time -> 32 -> 32 -> [direction, magnitude]. No
network at the tensor level. The step is

    step_mult * direction * exp(exp_mult * magnitude)

Time is equal for all parameters, so its columns are folded into the first bias. Operations used: `element_mlp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..namespace import array_namespace
from ..operations import Decays, ElementMlp, ModelTensors, Operations, Weights
from ..reference import time_columns
from ..spec import TIMESCALES, Accumulates
from .base import Architecture, Arrays, Inputs, Theta, Update
from .checks import check_decays, check_numbers, check_sizes
from .networks import INITIAL_SCALE, follow_momentum, init_mlp, linear


@dataclass(frozen=True)
class FcLopt(Architecture):
    """Defaults are those of the public implementation."""

    NAME: ClassVar[str] = "fc_lopt"

    hidden_size: int = 32
    hidden_layers: int = 2
    momentum_decays: tuple[float, ...] = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    step_mult: float = 0.001
    exp_mult: float = 0.001

    def __post_init__(self) -> None:
        check_sizes(self, "hidden_size", "hidden_layers")
        check_numbers(self, "step_mult", "exp_mult")
        check_decays(self, "momentum_decays")

    @property
    def mlp(self) -> ElementMlp:
        return ElementMlp(
            groups=("g", "p", "m"),
            momenta=len(self.momentum_decays),
            second_moments=0,
            factored_moments=0,
            hidden_size=self.hidden_size,
            hidden_layers=self.hidden_layers,
            step_mult=self.step_mult,
            exp_mult=self.exp_mult,
        )

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        """`w0` is of the columns, `w0_time` of the time columns."""
        shapes: dict[str, tuple[int, ...]] = {"w0_time": (len(TIMESCALES), self.hidden_size)}
        for i, (n_in, n_out) in enumerate(self.mlp.layer_sizes):
            shapes |= {f"w{i}": (n_in, n_out), f"b{i}": (n_out,)}
        return shapes

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Weights truncated normal with 1 / sqrt(inputs), `INITIAL_SCALE` times that in the last layer; biases zero.
        A step begins as 0.001 times the momentum, normalised (`follow_momentum`), and small random terms."""
        theta = init_mlp(np.random.default_rng(seed), self.theta_shapes)
        theta[f"w{self.hidden_layers}"] *= INITIAL_SCALE
        follow_momentum(theta, self.mlp, "m", self.momentum_decays)
        return theta

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return self.mlp

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        xp = array_namespace(theta["w0"])
        layers = range(self.hidden_layers + 1)
        time = xp.stack(time_columns(xp, inputs.t, theta["w0"]))
        biases = [theta[f"b{i}"] for i in layers]
        biases[0] = linear(time, theta["w0_time"], theta["b0"])
        weights = Weights(tuple(theta[f"w{i}"] for i in layers), tuple(biases))
        decays = Decays.constant(theta["w0"], momentum=self.momentum_decays)
        outputs, states, *_ = operations.element_mlp(self.mlp, tensors, decays, weights)
        return Update(outputs, states, rows, shared)
