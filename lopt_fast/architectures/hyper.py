"""What velo and celo share: a per-parameter network mixed from several by an LSTM, as in VeLO (Metz et al. 2022b).

Per parameter: 30 columns (gradient, clipped gradient, parameter, three momenta, a second moment, their ratios,
AdaFactor's factored moments) -> 4 -> 4 -> [direction, magnitude, unused]. The step is

    multiplier * step_mult * direction * exp(exp_mult * magnitude) * sqrt(mean p^2 + 1e-9)

Gradients are clipped to +-1000 first. The LSTM has one row for each tensor, or one for the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..namespace import array_namespace
from ..operations import Decays, ElementMlp, Weights
from ..reference import Array, Epsilons
from ..spec import Accumulates, SpecError
from .base import Architecture, Arrays, Inputs, Theta
from .checks import check_decays, check_numbers, check_sizes
from .networks import LossHistory, init_linear, linear, lstm, relu

GRADIENT_CLIP = 1000.0
GROUPS = (
    "g", "clip_g", "p", "m", "rms", "m_rsqrt_rms", "rsqrt_rms", "fac_g", "g_rsqrt_rms",
    "fac_row", "fac_column", "rsqrt_fac_row", "rsqrt_fac_column", "fac_m",
)  # fmt: skip
"""Of the columns, in the order of VeLO's and Celo's weights."""
EPSILONS = Epsilons(diagonal_momentum=0.0)


@dataclass(frozen=True)
class MixedMlp(Architecture):
    """Base of velo and celo: the per-parameter network, of which theta holds `mixture`."""

    needs_loss: ClassVar[bool] = True
    needs_num_steps: ClassVar[bool] = True

    hidden_size: int = 4
    hidden_layers: int = 2
    lstm_size: int = 64
    mixture: int = 1
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decays: tuple[float, ...] = (0.999,)
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    step_mult: float = 0.001
    exp_mult: float = 0.001
    scale_cap: float | None = None
    """Bound on the parameter's root mean square in the step, as a multiple of sqrt(elements); None: no bound."""

    def __post_init__(self) -> None:
        check_sizes(self, "hidden_size", "hidden_layers", "lstm_size", "mixture")
        check_numbers(self, "step_mult", "exp_mult")
        if self.scale_cap is not None:
            check_numbers(self, "scale_cap")
        for name in ("momentum_decays", "rms_decays", "adafactor_decays"):
            check_decays(self, name)
        n_m, n_r, n_f = len(self.momentum_decays), len(self.rms_decays), len(self.adafactor_decays)
        if n_r not in (1, n_m) or n_f != n_m:
            raise SpecError(
                f"{self.NAME}: {n_r} rms_decays and {n_f} adafactor_decays for {n_m} momentum_decays: give one "
                "rms_decay or one for each momentum, and one adafactor_decay for each momentum"
            )

    @property
    def mlp(self) -> ElementMlp:
        return ElementMlp(
            groups=GROUPS,
            momenta=len(self.momentum_decays),
            second_moments=len(self.rms_decays),
            factored_moments=len(self.adafactor_decays),
            hidden_size=self.hidden_size,
            hidden_layers=self.hidden_layers,
            step_mult=self.step_mult,
            exp_mult=self.exp_mult,
            scale="parameter_rms",
            scale_epsilon=1e-9,
            scale_cap=self.scale_cap,
            epsilons=EPSILONS,
        )

    @property
    def lstm_inputs(self) -> int:
        """How many numbers the LSTM sees."""
        raise NotImplementedError

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (n_in, n_out) in enumerate(self.mlp.layer_sizes):
            if i == self.hidden_layers:
                n_out += 1  # The published weights have a third output, which nothing reads.
            shapes |= {f"w{i}": (self.mixture, n_in, n_out), f"b{i}": (self.mixture, n_out)}
        shapes |= lstm_shapes(self.lstm_inputs, self.lstm_size)
        return shapes | {
            "controls_w": (self.lstm_size, self.mixture), "controls_b": (self.mixture,),
            "step_w": (self.lstm_size, 1), "step_b": (1,),
        }  # fmt: skip

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        return init_theta(self.theta_shapes, seed)

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return self.mlp

    def decays(self, like: Array) -> Decays:
        return Decays.constant(like, self.momentum_decays, self.rms_decays, self.adafactor_decays)

    def weights(self, theta: Theta, controls: Array, factor: float = 1.0) -> Weights:
        """factor * mean_k(controls_k theta_k); controls (..., mixture), the weights have its leading axes."""

        def mixed(stack: Array, n_out: int) -> Array:
            product = array_namespace(stack).tensordot(controls, stack[..., :n_out], axes=1)
            return product * (factor / self.mixture)

        sizes = [n_out for _, n_out in self.mlp.layer_sizes]
        return Weights(
            tuple(mixed(theta[f"w{i}"], n_out) for i, n_out in enumerate(sizes)),
            tuple(mixed(theta[f"b{i}"], n_out) for i, n_out in enumerate(sizes)),
        )


def lstm_shapes(inputs: int, size: int) -> dict[str, tuple[int, ...]]:
    """Meta-parameters of the LSTM and of the layers before it."""
    return {
        "lstm_hidden": (1, size), "lstm_cell": (1, size),
        "max_w": (inputs, size), "max_b": (size,), "mix_w": (inputs, size), "mix_b": (size,),
        "lstm_w": (2 * size, 4 * size), "lstm_b": (4 * size,),
    }  # fmt: skip


def lstm_step(theta: Theta, features: Array, hidden: Array, cell: Array) -> tuple[Array, Array]:
    """(hidden, cell) of all rows after one step. Rows hear of each other through a maximum over them.

    features: (rows, inputs); hidden, cell: (rows, units).
    """
    xp = array_namespace(features)
    pooled = xp.max(relu(linear(features, theta["max_w"], theta["max_b"])), axis=0, keepdims=True)
    mix = linear(features, theta["mix_w"], theta["mix_b"]) + pooled
    return lstm(mix, hidden, cell, theta["lstm_w"], theta["lstm_b"])


def init_loss_history(theta: Theta) -> Arrays:
    """State of the loss history."""
    history = LossHistory.empty(theta["lstm_cell"])
    return {"loss_means": history.means, "loss_smallest": history.smallest}


def add_loss(shared: Arrays, inputs: Inputs, num_steps: Array | float | None = None) -> tuple[Arrays, Array]:
    """(state, (9,) features) of the loss history after this step's loss; num_steps: other than the training's."""
    assert inputs.loss is not None
    num_steps = inputs.num_steps if num_steps is None else num_steps
    assert num_steps is not None
    history = LossHistory(shared["loss_means"], shared["loss_smallest"])
    history, features = history.add(inputs.loss, inputs.t, num_steps)
    return {"loss_means": history.means, "loss_smallest": history.smallest}, features


def init_theta(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Truncated normal weights with standard deviation 1 / sqrt(inputs); biases and the LSTM's first state 0."""
    rng = np.random.default_rng(seed)
    return {
        name: init_linear(rng, shape)
        if name.startswith("w") or name.endswith("_w")
        else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }
