"""celo: the learned optimizer of Moudgil et al. 2025 (arXiv 2501.12670).

Per parameter: the network of `hyper.MixedMlp`, mixed with proportions softmax(controls). One LSTM for the whole model
sees how far the training is and how the loss has gone; it gives the proportions and the learning rate
0.1 exp(step_size), which multiplies the step. Operations used: `element_mlp`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..namespace import array_namespace
from ..operations import ModelTensors, Operations
from ..reference import Array
from .base import Arrays, Inputs, Theta, Update
from .checks import check_flags
from .hyper import GRADIENT_CLIP, MixedMlp, add_loss, init_loss_history, lstm_step
from .networks import INITIAL_SCALE, follow_momentum, fraction_left, linear

SCHEDULE_INPUTS = 18
LEARNING_RATE = 0.1
"""Where the LSTM says 0."""
WARM_SCALE = 4.0


@dataclass(frozen=True)
class Celo(MixedMlp):
    """Defaults are those of the published weights."""

    NAME: ClassVar[str] = "celo"

    use_schedule: bool = True
    """Multiply by the LSTM's learning rate (the second phase of its meta-training), else by 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "use_schedule")

    @property
    def lstm_inputs(self) -> int:
        return SCHEDULE_INPUTS

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        """A usable optimizer: the direction is `WARM_SCALE` times the momentum over the root of its second moment,
        normalised (`follow_momentum`), and small random terms; the learning rate is near 1, what the LSTM says of it
        random. The second phase of meta-training can begin where the first has ended."""
        theta = super().init_theta(seed)
        theta[f"w{self.hidden_layers}"] *= INITIAL_SCALE
        scale = WARM_SCALE * self.mixture  # `weights` is a mean over the mixture
        follow_momentum(theta, self.mlp, "m_rsqrt_rms", self.momentum_decays, scale)
        theta["step_b"][:] = math.log(1.0 / LEARNING_RATE)
        return theta

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
        multiplier = learning_rate(theta, hidden, len(tensors)) if self.use_schedule else None
        outputs, states, *_ = operations.element_mlp(
            self.mlp,
            tensors,
            self.decays(hidden),
            self.weights(theta, controls),
            multiplier,
            gradient_clip=GRADIENT_CLIP,
        )
        return Update(outputs, states, rows, shared)


def init_schedule(theta: Theta) -> Arrays:
    """State of the LSTM and of the loss history, for the whole model: its inputs are equal for all tensors."""
    # Sums, because state must not be meta-parameters themselves, which stay as they are.
    lstm = {name: theta[name] + 0.0 for name in ("lstm_hidden", "lstm_cell")}
    return lstm | init_loss_history(theta)


def schedule(theta: Theta, shared: Arrays, inputs: Inputs) -> Arrays:
    """State after one step of the LSTM."""
    xp = array_namespace(theta["lstm_w"])
    assert inputs.num_steps is not None
    history, loss_features = add_loss(shared, inputs)
    left = fraction_left(inputs.t, inputs.num_steps, theta["lstm_w"])
    features = xp.concat([left, loss_features])[None, :]
    hidden, cell = lstm_step(theta, features, shared["lstm_hidden"], shared["lstm_cell"])
    return {"lstm_hidden": hidden, "lstm_cell": cell} | history


def learning_rate(theta: Theta, hidden: Array, tensors: int) -> Array:
    """(tensors,) 0.1 exp(step_size), equal for all."""
    xp = array_namespace(hidden)
    size = linear(hidden, theta["step_w"], theta["step_b"])[:, 0]
    return xp.broadcast_to(LEARNING_RATE * xp.exp(size), (tensors,))
