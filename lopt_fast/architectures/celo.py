"""celo: the learned optimizer of Moudgil et al. 2025 (arXiv 2501.12670).

Per parameter: 30 columns (gradient, clipped gradient, parameter, three momenta, a second moment, their ratios,
AdaFactor's factored moments) -> 4 -> 4 -> [direction, magnitude, unused]. Its weights are a mixture of `mixture` sets,
with proportions softmax(controls). One LSTM for the whole model sees how far the training is and how the loss has
gone; it gives the proportions and the learning rate 0.1 exp(step_size). The step is

    lr * step_mult * direction * exp(exp_mult * magnitude) * sqrt(mean p^2 + 1e-9)

Gradients are clipped to +-1000 first. Operations used: `element_mlp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace

from ..operations import Decays, ElementMlp, ModelTensors, Operations, Weights
from ..reference import Array, Epsilons
from ..spec import Accumulates
from .base import Architecture, Arrays, Inputs, Theta, Update
from .networks import LossHistory, fraction_left, init_linear, linear, lstm, relu

GRADIENT_CLIP = 1000.0
GROUPS = (
    "g", "clip_g", "p", "m", "rms", "m_rsqrt_rms", "rsqrt_rms", "fac_g", "g_rsqrt_rms",
    "fac_row", "fac_column", "rsqrt_fac_row", "rsqrt_fac_column", "fac_m",
)  # fmt: skip
"""Of the columns, in the order of VeLO's and Celo's weights."""
EPSILONS = Epsilons(diagonal_momentum=0.0)


@dataclass(frozen=True)
class Celo(Architecture):
    """Defaults are those of the published weights."""

    NAME: ClassVar[str] = "celo"
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
    use_schedule: bool = True
    """Multiply by the LSTM's learning rate (the second phase of its meta-training), else by 1."""

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
            epsilons=EPSILONS,
        )

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (n_in, n_out) in enumerate(mlp_sizes(self.mlp)):
            shapes |= {f"w{i}": (self.mixture, n_in, n_out), f"b{i}": (self.mixture, n_out)}
        return shapes | schedule_shapes(self.lstm_size, self.mixture)

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            name: init_linear(rng, shape) if "w" in name else np.zeros(shape, np.float32)
            for name, shape in self.theta_shapes.items()
        }

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return self.mlp

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
        xp = array_namespace(theta["w0"])
        shared = schedule(theta, shared, inputs)
        hidden = shared["lstm_hidden"]
        controls = linear(hidden, theta["controls_w"], theta["controls_b"])[0, :]
        controls = xp.exp(controls - xp.max(controls))
        controls = controls / xp.sum(controls)
        layers = range(self.hidden_layers + 1)
        weights = Weights(
            tuple(mixed(theta[f"w{i}"], controls) for i in layers),
            tuple(mixed(theta[f"b{i}"], controls) for i in layers),
        )
        multiplier = learning_rate(theta, hidden, len(tensors)) if self.use_schedule else None
        decays = Decays.constant(hidden, self.momentum_decays, self.rms_decays, self.adafactor_decays)
        outputs, states, _ = operations.element_mlp(
            self.mlp, tensors, decays, weights, multiplier, gradient_clip=GRADIENT_CLIP
        )
        return Update(outputs, states, rows, shared)


def mlp_sizes(mlp: ElementMlp) -> list[tuple[int, int]]:
    """(inputs, outputs) of each layer; there is a third, unused output in VeLO's and Celo's weights."""
    *hidden, (n_in, n_out) = mlp.layer_sizes
    return [*hidden, (n_in, n_out + 1)]


def mixed(theta: Array, controls: Array) -> Array:
    """mean_k(controls_k theta_k)"""
    return array_namespace(theta).tensordot(controls, theta, axes=1) / theta.shape[0]


def schedule_shapes(size: int, controls: int) -> dict[str, tuple[int, ...]]:
    """Meta-parameters of the LSTM that sees time and loss."""
    return {
        "lstm_hidden": (1, size), "lstm_cell": (1, size),
        "max_w": (18, size), "max_b": (size,), "mix_w": (18, size), "mix_b": (size,),
        "lstm_w": (2 * size, 4 * size), "lstm_b": (4 * size,),
        "controls_w": (size, controls), "controls_b": (controls,),
        "step_w": (size, 1), "step_b": (1,),
    }  # fmt: skip


def init_schedule(theta: Theta) -> Arrays:
    """State of the LSTM and of the loss history, for the whole model: its inputs are equal for all tensors."""
    history = LossHistory.empty(theta["lstm_cell"])
    return {
        "lstm_hidden": theta["lstm_hidden"],
        "lstm_cell": theta["lstm_cell"],
        "loss_means": history.means,
        "loss_smallest": history.smallest,
    }


def schedule(theta: Theta, shared: Arrays, inputs: Inputs) -> Arrays:
    """State after one step of the LSTM."""
    xp = array_namespace(theta["lstm_w"])
    assert inputs.loss is not None
    assert inputs.num_steps is not None
    history = LossHistory(shared["loss_means"], shared["loss_smallest"])
    history, loss_features = history.add(inputs.loss, inputs.t, inputs.num_steps)
    left = fraction_left(inputs.t, inputs.num_steps, theta["lstm_w"])
    features = xp.concat([left, loss_features])[None, :]
    # The second term is the maximum over the tensors, which all give the same.
    mix = linear(features, theta["mix_w"], theta["mix_b"]) + relu(
        linear(features, theta["max_w"], theta["max_b"])
    )
    hidden, cell = lstm(mix, shared["lstm_hidden"], shared["lstm_cell"], theta["lstm_w"], theta["lstm_b"])
    return {
        "lstm_hidden": hidden,
        "lstm_cell": cell,
        "loss_means": history.means,
        "loss_smallest": history.smallest,
    }


def learning_rate(theta: Theta, hidden: Array, tensors: int) -> Array:
    """(tensors,) 0.1 exp(step_size), equal for all."""
    xp = array_namespace(hidden)
    size = linear(hidden, theta["step_w"], theta["step_b"])[:, 0]
    return xp.broadcast_to(0.1 * xp.exp(size), (tensors,))
