"""VeLO and Celo: `hyper_v2.py` of google/learned_optimization and the optimizers of amoudgl/celo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..architectures.celo import Celo
from .arguments import configured

_DECAYS = {
    "initial_momentum_decays": "momentum_decays",
    "initial_rms_decays": "rms_decays",
    "initial_adafactor_decays": "adafactor_decays",
}
_COLUMN_GROUPS = 14
_LSTM = {
    "lstm_hidden": "lstm_init_state/hidden",
    "lstm_cell": "lstm_init_state/cell",
    "max_w": "rnn_params/linear_1/w",
    "max_b": "rnn_params/linear_1/b",
    "mix_w": "rnn_params/linear_2/w",
    "mix_b": "rnn_params/linear_2/b",
    "lstm_w": "rnn_params/rnn/linear/w",
    "lstm_b": "rnn_params/rnn/linear/b",
    "controls_w": "rnn_params/rnn_to_controls/w",
    "controls_b": "rnn_params/rnn_to_controls/b",
    "step_w": "rnn_params/step_size/w",
    "step_b": "rnn_params/step_size/b",
}


def celo(given: Mapping[str, Any], leaves: Mapping[str, np.ndarray]) -> tuple[Celo, dict[str, np.ndarray]]:
    """Celo of amoudgl/celo."""
    names = {
        "lstm_hidden_size": "lstm_size",
        "param_inits": "mixture",
        "exp_mult": "exp_mult",
        "step_mult": "step_mult",
        "ff_hidden_size": "hidden_size",
        "ff_hidden_layers": "hidden_layers",
        "train_phase": None,
        "summarize_each_layer": None,
        **_DECAYS,
    }
    architecture = configured(Celo, given, names, use_schedule=given.get("train_phase", 2) > 1)
    return architecture, mlp_stack(leaves) | {name: leaves[path] for name, path in _LSTM.items()}


def mlp_stack(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of the per-parameter network, (mixture, inputs, outputs) and (mixture, outputs): the first layer's are
    stored by groups of columns."""
    prefix = "ff_mod_stack/~/"
    first = [leaves[f"{prefix}w0__{i}"] for i in range(_COLUMN_GROUPS)]
    rest = {
        key.removeprefix(prefix): a for key, a in leaves.items() if key.startswith(prefix) and "__" not in key
    }
    return {"w0": np.concatenate(first, axis=-2), **rest}
