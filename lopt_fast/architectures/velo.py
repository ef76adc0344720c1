"""velo: the learned optimizer of Metz et al. 2022b (arXiv 2211.09760).

Per parameter: the network of `hyper.MixedMlp`, with weights of its own for each tensor. An LSTM over the tensors sees
how far the training is, how the loss has gone, and the rank, size and spread of the tensor's running averages as they
were before this step. Its output gives each tensor's multiplier of the step (which may be negative) and its controls:

    weights = weights_mult * mean_k(controls_k theta_k)

Operations used: `statistics`, `element_mlp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..namespace import array_namespace
from ..operations import ModelTensors, Operations, Statistics
from ..reference import Array
from ..spec import SpecError
from .base import Arrays, Inputs, Theta, Update
from .checks import check_flags, check_numbers
from .hyper import GRADIENT_CLIP, MixedMlp, add_loss, init_loss_history, lstm_step
from .networks import constant, fraction_left, linear, log_magnitude

RANKS = 5


@dataclass(frozen=True)
class Velo(MixedMlp):
    """Defaults are those of the published weights."""

    NAME: ClassVar[str] = "velo"
    sees_tensors: ClassVar[bool] = True

    lstm_size: int = 512
    mixture: int = 256
    weights_mult: float = 100.0
    """Multiplies the mixed weights. Celo's authors meta-trained theirs with 1, which was more stable."""
    validation_input: bool = False
    """The LSTM has one more input: `minimise_validation`."""
    minimise_validation: bool = False
    """Aim at the loss on validation data. Without effect unless the weights have a `validation_input`."""
    lstm_state_decay: float = 0.0
    """Share of the LSTM's state that is forgotten after each step."""
    frozen_lstm_state: bool = False
    """The LSTM starts each step from its initial state: reproduces early weights, trained with an implementation that
    lost the state (`use_bugged_next_lstm_state`)."""
    short_loss_history: bool = False
    """All time scales of the loss history are 10 steps whatever the training's length: reproduces weights trained
    with an implementation that did not pass the length on (`use_bugged_loss_features`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "weights_mult", "lstm_state_decay")
        check_flags(
            self, "validation_input", "minimise_validation", "frozen_lstm_state", "short_loss_history"
        )
        if not 0.0 <= self.lstm_state_decay <= 1.0:
            raise SpecError(f"{self.NAME}: lstm_state_decay={self.lstm_state_decay} must be from 0 to 1")
        if self.minimise_validation and not self.validation_input:
            raise SpecError(
                f"{self.NAME}: minimise_validation needs weights with validation_input=True, which these are not"
            )

    @property
    def lstm_inputs(self) -> int:
        return 9 + 9 + len(self.rms_decays) + RANKS + 2 * len(self.momentum_decays) + self.validation_input

    def init_rows(self, theta: Theta, shapes: Sequence[tuple[int, ...]]) -> Arrays:
        xp = array_namespace(theta["lstm_hidden"])
        return {
            name: xp.concat([theta[name][:0, :], *[theta[name]] * len(shapes)])
            for name in ("lstm_hidden", "lstm_cell")
        }

    def init_shared(self, theta: Theta) -> Arrays:
        return init_loss_history(theta)

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        shared, loss_features = add_loss(shared, inputs, 10.0 if self.short_loss_history else None)
        decays = self.decays(theta["lstm_w"])
        statistics = operations.statistics(self.mlp, tensors, decays, GRADIENT_CLIP, before=True)
        statistics = statistics.of(theta["lstm_w"])
        ranks = [sum(n > 1 for n in p.shape) for p in tensors.params]
        features = self._features(theta, statistics, ranks, loss_features, inputs)
        hidden, cell = lstm_step(theta, features, rows["lstm_hidden"], rows["lstm_cell"])
        controls = linear(hidden, theta["controls_w"], theta["controls_b"])
        outputs, states, *_ = operations.element_mlp(
            self.mlp,
            tensors,
            decays,
            self.weights(theta, controls, self.weights_mult),
            multiplier=linear(hidden, theta["step_w"], theta["step_b"])[:, 0],
            gradient_clip=GRADIENT_CLIP,
            column_mean_square=statistics.column_mean_square,
        )
        kept = rows if self.frozen_lstm_state else {"lstm_hidden": hidden, "lstm_cell": cell}
        rows = {name: (1.0 - self.lstm_state_decay) * state for name, state in kept.items()}
        return Update(outputs, states, rows, shared)

    def _features(
        self, theta: Theta, s: Statistics, ranks: Sequence[int], loss_features: Array, inputs: Inputs
    ) -> Array:
        """(tensors, lstm_inputs) what the LSTM sees."""
        like = theta["lstm_w"]
        xp = array_namespace(like)
        mean_square = s.parameter_variance + s.parameter_mean**2
        # All are relative to the size of the parameter, the second moment linearly too.
        squared = 1.0 / xp.where(mean_square < 1e-9, xp.full_like(mean_square, 1e-9), mean_square)[:, None]
        # The spread of the second moment is about the mean of the momentum, in the weights that there are.
        spread = s.second_moment_variance + (s.second_moment_mean - s.momentum_mean) ** 2
        assert inputs.num_steps is not None
        left = fraction_left(inputs.t, inputs.num_steps, like)

        def of_all_tensors(x: Array) -> Array:
            return xp.broadcast_to(x, (len(ranks), x.shape[0]))

        columns = [
            of_all_tensors(left),
            of_all_tensors(loss_features),
            log_magnitude(10.0 * xp.sqrt(squared) * s.second_moment_mean, 0.5),
            constant([[float(rank == i) for i in range(RANKS)] for rank in ranks], like),
            log_magnitude(10.0 * squared * s.momentum_variance, 0.5),
            log_magnitude(10.0 * squared * spread, 0.5),
        ]
        if self.validation_input:
            columns.append(of_all_tensors(constant([float(self.minimise_validation)], like)))
        return xp.concat(columns, axis=-1)
