"""The per-parameter MLP and its relatives of google/learned_optimization: `mlp_lopt.py`, `rnn_mlp_lopt.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..architectures.fc_lopt import FcLopt
from ..architectures.rnn_fc_lopt import RnnFcLopt
from .arguments import configured
from .family import Family
from .paths import Entry, Table, renamed

_MLP_LAYERS, _RNN_LAYERS = "mlp/~/linear_", "ffmod_params/mlp/~/linear_"

_RNN = {
    "initial_summary": "initial_from_lstm",
    "initial_messages": "initial_from_mlp",
    "lstm_hidden": "lstm_init_state/hidden",
    "lstm_cell": "lstm_init_state/cell",
    "lstm_w": "rnn_params/rnn/linear/w",
    "lstm_b": "rnn_params/rnn/linear/b",
    "summary_w": "rnn_to_in_params/rnn_to_in/w",
    "summary_b": "rnn_to_in_params/rnn_to_in/b",
    "conditioning_w": "rnn_to_ff_params/rnn_to_ff/w",
    "conditioning_b": "rnn_to_ff_params/rnn_to_ff/b",
}


def _mlp(given: Mapping[str, Any]) -> FcLopt:
    names = {
        "hidden_size": "hidden_size",
        "hidden_layers": "hidden_layers",
        "step_mult": "step_mult",
        "exp_mult": "exp_mult",
        "compute_summary": None,
    }
    return configured(FcLopt, given, names)


def _rnn(given: Mapping[str, Any]) -> RnnFcLopt:
    names = {
        "step_multiplier": "step_mult",
        "magnitude_rate": "exp_mult",
        "hidden_size": "hidden_size",
        "hidden_layer": "hidden_layers",
        "from_mlp_size": "messages",
        "from_lstm_size": "summary",
        "lstm_to_ff": "conditioning",
        "lstm_hidden_size": "lstm_size",
        "decays": "decays",
    }
    return configured(RnnFcLopt, given, names)


def _layers(hidden_layers: int, prefix: str, constant: str) -> tuple[Entry, ...]:
    """Layers of an MLP. The last rows of the first, those of inputs equal over a tensor, are our array `constant`."""
    names = {
        f"{kind}{i}": f"{prefix}{i}/{kind}"
        for i in range(hidden_layers + 1)
        for kind in "wb"
        if f"{kind}{i}" != "w0"
    }
    return (Entry(("w0", constant), (f"{prefix}0/w",)), *renamed(names))


def _layers_shown(leaves: Mapping[str, np.ndarray], prefix: str) -> tuple[int, int]:
    """(hidden size, hidden layers)"""
    layers = sum(path.startswith(prefix) and path.endswith("/b") for path in leaves)
    return leaves[f"{prefix}0/b"].shape[0], layers - 1


def _mlp_shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    size, layers = _layers_shown(leaves, _MLP_LAYERS)
    return {"hidden_size": size, "hidden_layers": layers}


def _rnn_shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    size, layers = _layers_shown(leaves, _RNN_LAYERS)
    return {
        "hidden_size": size,
        "hidden_layer": layers,
        "from_mlp_size": leaves["initial_from_mlp"].shape[0],
        "from_lstm_size": leaves["initial_from_lstm"].shape[0],
        "lstm_to_ff": leaves[_RNN["conditioning_b"]].shape[0],
        "lstm_hidden_size": leaves[_RNN["lstm_hidden"]].shape[-1],
    }


mlp = Family(
    "MLPLOpt of google/learned_optimization", FcLopt, _mlp,
    lambda a: Table(_layers(a.hidden_layers, _MLP_LAYERS, "w0_time")), _mlp_shown, grouped=False,
)  # fmt: skip
rnn = Family(
    "RNNMLPLOpt of google/learned_optimization", RnnFcLopt, _rnn,
    lambda a: Table((*_layers(a.hidden_layers, _RNN_LAYERS, "w0_constant"), *renamed(_RNN))), _rnn_shown,
)  # fmt: skip
