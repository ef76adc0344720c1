"""Adam with hyperparameters from an LSTM: `nn_adam.py` of google/learned_optimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..architectures.nn_adam import NNAdam
from .arguments import configured
from .family import Family
from .paths import Table, renamed

_NAMES = {
    "lr": "per_layer_lr",
    "beta1": "per_layer_beta1",
    "beta2": "per_layer_beta2",
    "epsilon": "per_layer_epsilon",
    "lstm_hidden": "lstm_init_state/hidden",
    "lstm_cell": "lstm_init_state/cell",
    "lstm_w": "rnn_params/rnn/linear/w",
    "lstm_b": "rnn_params/rnn/linear/b",
    "controls_w": "rnn_to_controls_params/rnn_to_controls/w",
    "controls_b": "rnn_to_controls_params/rnn_to_controls/b",
}


def _architecture(given: Mapping[str, Any]) -> NNAdam:
    names = {
        "output_scale": "output_scale",
        "initial_learning_rate": "initial_lr",
        "initial_beta1": "initial_beta1",
        "initial_beta2": "initial_beta2",
        "initial_epsilon": "initial_epsilon",
        "lstm_hidden_size": "lstm_size",
        "decay_strength": "decay_strength",
    }
    return configured(NNAdam, given, names)


def _shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {"lstm_hidden_size": leaves[_NAMES["lstm_hidden"]].shape[-1]}


nn_adam = Family(
    "NNAdam of google/learned_optimization", NNAdam, _architecture, lambda a: Table(renamed(_NAMES)), _shown
)
