"""nn_adam: Adam whose hyperparameters an LSTM moves, those of each tensor on their own (Metz et al. 2022, App. C).

Per parameter: Adam without bias correction,

    step = lr (1 + epsilon) m / (epsilon + sqrt(v + 1e-10))

Per tensor: an LSTM of 32 units that sees 19 features of the tensor and changes lr, beta1, beta2 and epsilon, kept as
0.1 log(lr), 0.1 log(1 - beta) and 0.1 log(epsilon), from the next step on. It sees the parameter before the step, and
the running averages after it. Gradients are clipped to +-1000. Operations used: `adam`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..namespace import array_namespace
from ..operations import AdamScalars, ModelTensors, Operations, Statistics
from ..operations.adam import ADAM_AVERAGES
from ..reference import Array
from ..spec import Accumulates, SpecError
from .base import Architecture, Arrays, Inputs, Theta, Update
from .checks import check_numbers, check_sizes
from .networks import clip, constant, init_linear, linear, log_magnitude, lstm

GRADIENT_CLIP = 1000.0
CONTROLS = ("lr", "beta1", "beta2", "epsilon")
"""In the order of the network's outputs."""
FEATURES = (
    "beta1", "beta2", "epsilon", "is_vector", "is_scalar", "lr", "gradient_mean", "gradient_sign", "gradient_abs_mean",
    "momentum_mean", "momentum_sign", "parameter_mean", "parameter_sign", "second_moment_mean", "second_moment_sign",
    "gradient_variance", "momentum_variance", "parameter_variance", "second_moment_variance",
)  # fmt: skip
"""What the LSTM sees of each tensor; how they are computed: `tensor_features`."""
_LOG_BOUNDS = {
    "lr": (math.log(1e-8), math.log(1e3)),
    "epsilon": (math.log(1e-11), math.log(1e4)),
    "beta1": (-10.0, 0.0),
    "beta2": (-10.0, 0.0),
}
"""Of log(lr), log(epsilon), log(1 - beta)."""


@dataclass(frozen=True)
class NNAdam(Architecture):
    """Defaults are those of the public implementation."""

    NAME: ClassVar[str] = "nn_adam"
    sees_tensors: ClassVar[bool] = True

    lstm_size: int = 32
    output_scale: float = 0.01
    """Multiplies what the network adds to a control."""
    decay_strength: float = 0.0
    """Share of the way back to its initial value that a control goes in each step."""
    initial_lr: float = 1e-4
    """Of the initial meta-parameters, as those that follow."""
    initial_beta1: float = 0.9
    initial_beta2: float = 0.999
    initial_epsilon: float = 1e-8

    def __post_init__(self) -> None:
        check_sizes(self, "lstm_size")
        check_numbers(self, "output_scale", "decay_strength", *(f"initial_{name}" for name in CONTROLS))
        for name in ("initial_lr", "initial_epsilon"):
            if getattr(self, name) <= 0.0:
                raise SpecError(f"{self.NAME}: {name}={getattr(self, name)} must be positive")
        for name in ("initial_beta1", "initial_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SpecError(f"{self.NAME}: {name}={getattr(self, name)} must be from 0 to below 1")

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        size = self.lstm_size
        return {
            **dict.fromkeys(CONTROLS, ()),
            "lstm_hidden": (1, size), "lstm_cell": (1, size),
            "lstm_w": (len(FEATURES) + size, 4 * size), "lstm_b": (4 * size,),
            "controls_w": (size, len(CONTROLS)), "controls_b": (len(CONTROLS),),
        }  # fmt: skip

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        """As Adam: the network changes nothing yet. LSTM weights truncated normal with 1 / sqrt(inputs)."""
        theta = {name: np.zeros(shape, np.float32) for name, shape in self.theta_shapes.items()}
        theta["lstm_w"] = init_linear(np.random.default_rng(seed), theta["lstm_w"].shape)
        logs = {
            "lr": math.log(self.initial_lr),
            "beta1": math.log(1.0 - self.initial_beta1),
            "beta2": math.log(1.0 - self.initial_beta2),
            "epsilon": math.log(self.initial_epsilon),
        }
        return theta | {name: np.asarray(0.1 * logs[name], np.float32) for name in CONTROLS}

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return ADAM_AVERAGES

    def init_rows(self, theta: Theta, shapes: Sequence[tuple[int, ...]]) -> Arrays:
        xp = array_namespace(theta["lstm_w"])
        n = len(shapes)
        return {
            **{name: xp.tile(xp.reshape(theta[name], (1,)), (n,)) for name in CONTROLS},
            "lstm_hidden": xp.tile(theta["lstm_hidden"], (n, 1)),
            "lstm_cell": xp.tile(theta["lstm_cell"], (n, 1)),
        }

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        like = theta["lstm_w"]
        xp = array_namespace(like)
        values = {name: xp.exp(clipped_log(name, rows[name])) for name in CONTROLS}
        lr, epsilon = values["lr"], values["epsilon"]
        scalars = AdamScalars.of(
            lr,
            beta1=1.0 - values["beta1"],
            beta2=1.0 - values["beta2"],
            scale=lr * (1.0 + epsilon),
            epsilon=epsilon,
            root_epsilon=1e-10,
        )
        result = operations.adam(tensors, scalars, GRADIENT_CLIP, statistics=True)
        assert result.statistics is not None
        statistics = result.statistics.of(like)
        features = tensor_features(statistics, rows, [p.ndim for p in tensors.params])
        hidden, cell = lstm(
            features, rows["lstm_hidden"], rows["lstm_cell"], theta["lstm_w"], theta["lstm_b"]
        )
        deltas = self.output_scale * linear(hidden, theta["controls_w"], theta["controls_b"])
        new_rows = {"lstm_hidden": hidden, "lstm_cell": cell}
        for i, name in enumerate(CONTROLS):
            control = rows[name] + deltas[:, i]
            control = control + self.decay_strength * (theta[name] - control)
            new_rows[name] = 0.1 * clipped_log(name, control)
        return Update(result.outputs, result.states, new_rows, shared)


def clipped_log(name: str, control: Array) -> Array:
    """Logarithm of lr, epsilon or 1 - beta, within its bounds. control: a tenth of it, (tensors,)."""
    return clip(10.0 * control, *_LOG_BOUNDS[name])


def tensor_features(statistics: Statistics, controls: Arrays, ndims: Sequence[int]) -> Array:
    """(tensors, 19): `FEATURES` of tensors of so many axes.

    Means and variances are 0.5 log of their magnitudes, within +-2.5, controls a fifth of them, within +-1; flags are
    -1 and 1.
    """
    like = statistics.parameter_mean
    xp = array_namespace(like)
    momentum, momentum_variance = statistics.momentum_mean[:, 0], statistics.momentum_variance[:, 0]
    second, second_variance = statistics.second_moment_mean[:, 0], statistics.second_moment_variance[:, 0]
    seen = {name: 0.2 * clip(controls[name], -5.0, 5.0) for name in CONTROLS}
    columns = [
        seen["beta1"],
        seen["beta2"],
        seen["epsilon"],
        constant([1.0 if ndim == 1 else -1.0 for ndim in ndims], like),
        constant([1.0 if ndim == 0 else -1.0 for ndim in ndims], like),
        seen["lr"],
        log_magnitude(statistics.gradient_mean, 0.5),
        xp.sign(statistics.gradient_mean),
        log_magnitude(statistics.gradient_abs_mean, 0.5),
        log_magnitude(momentum, 0.5),
        xp.sign(momentum),
        log_magnitude(statistics.parameter_mean, 0.5),
        xp.sign(statistics.parameter_mean),
        log_magnitude(second, 0.5),
        xp.sign(second),
        log_magnitude(statistics.gradient_variance, 0.5),
        log_magnitude(momentum_variance, 0.5),
        log_magnitude(statistics.parameter_variance, 0.5),
        log_magnitude(second_variance, 0.5),
    ]
    return xp.stack(columns, axis=1)
