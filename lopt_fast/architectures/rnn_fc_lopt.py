"""rnn_fc_lopt: the learned optimizer of Metz et al. 2020 (arXiv 2009.11243).

Per parameter: the conditioned MLP of conditioned.py, 23 columns -> 32 -> 32 -> [direction, magnitude, 16 messages].
Per tensor: an LSTM of 64 units, which sees 18 features of the tensor, the messages of the tensor's parameters
and a summary of all tensors (the mean of a projection of the LSTM's outputs), the latter two from the step before. A
projection of its output conditions the MLP. The step is

    step_mult * direction * exp(exp_mult * magnitude)

Gradients are clipped to ten times a running average of their root mean square. Operations used: `statistics`,
`element_mlp`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..namespace import array_namespace
from ..operations import ModelTensors, Operations
from .base import Arrays, Inputs, Theta, Update
from .checks import check_sizes
from .conditioned import TENSOR_FEATURES, ConditionedMlp
from .networks import INITIAL_SCALE, init_linear, linear, lstm, truncated_normal


@dataclass(frozen=True)
class RnnFcLopt(ConditionedMlp):
    """Defaults are those of the paper."""

    NAME: ClassVar[str] = "rnn_fc_lopt"

    messages: int = 16
    lstm_size: int = 64
    summary: int = 18
    """Numbers that stand for all tensors together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "lstm_size", "summary")
        if self.messages != 0:
            check_sizes(self, "messages")

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        size = self.lstm_size
        inputs = self.summary + self.messages + len(TENSOR_FEATURES)
        return self.mlp_shapes | {
            "initial_summary": (self.summary,), "initial_messages": (self.messages,),
            "lstm_hidden": (1, size), "lstm_cell": (1, size),
            "lstm_w": (inputs + size, 4 * size), "lstm_b": (4 * size,),
            "summary_w": (size, self.summary), "summary_b": (self.summary,),
            "conditioning_w": (size, self.conditioning), "conditioning_b": (self.conditioning,),
        }  # fmt: skip

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        """That of the MLP follows momentum (`init_mlp_theta`). Otherwise weights and initial messages truncated normal
        with 1 / sqrt(inputs), and `INITIAL_SCALE` times that in the conditioning; all else zero."""
        rng = np.random.default_rng(seed)
        theta = self.init_mlp_theta(rng)
        for name, shape in self.theta_shapes.items():
            if name in theta:
                continue
            if name.startswith("initial"):
                theta[name] = truncated_normal(rng, shape, 1.0 / math.sqrt(max(shape[0], 1)))
            else:
                theta[name] = init_linear(rng, shape) if name.endswith("_w") else np.zeros(shape, np.float32)
        theta["conditioning_w"] *= INITIAL_SCALE
        return theta

    def init_rows(self, theta: Theta, shapes: Sequence[tuple[int, ...]]) -> Arrays:
        xp = array_namespace(theta["w0"])
        return {
            "lstm_hidden": xp.tile(theta["lstm_hidden"], (len(shapes), 1)),
            "lstm_cell": xp.tile(theta["lstm_cell"], (len(shapes), 1)),
            "messages": xp.tile(theta["initial_messages"][None, :], (len(shapes), 1)),
        }

    def init_shared(self, theta: Theta) -> Arrays:
        summary = array_namespace(theta["w0"]).asarray(theta["initial_summary"], copy=True)
        return {**super().init_shared(theta), "summary": summary}

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
        observed, shared = self.observe(operations, theta, tensors, shared, inputs)
        summary = xp.broadcast_to(shared["summary"], (len(tensors), self.summary))
        features = xp.concat([summary, rows["messages"], observed.features], axis=1)
        hidden, cell = lstm(
            features, rows["lstm_hidden"], rows["lstm_cell"], theta["lstm_w"], theta["lstm_b"]
        )
        conditioning = linear(hidden, theta["conditioning_w"], theta["conditioning_b"])
        result = self.update_parameters(operations, theta, tensors, observed, conditioning)
        summary = xp.mean(linear(hidden, theta["summary_w"], theta["summary_b"]), axis=0)
        return Update(
            result.outputs,
            result.states,
            {
                "lstm_hidden": hidden,
                "lstm_cell": cell,
                "messages": rows["messages"] if result.messages is None else result.messages,
            },
            {**shared, "summary": summary},
        )
