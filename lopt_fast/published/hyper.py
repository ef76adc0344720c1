"""VeLO and Celo: `hyper_v2.py` of google/learned_optimization and the optimizers of amoudgl/celo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..architectures.base import Architecture
from ..architectures.celo import Celo
from ..architectures.celo_adam import CeloAdam
from ..architectures.hyper import MixedMlp
from ..architectures.velo import Velo
from ..operations import ElementMlp
from ..spec import SpecError
from .arguments import configured
from .family import Family
from .paths import Entry, Table, renamed

_STACK = "ff_mod_stack/~/"
_LSTM = {
    "lstm_hidden": "lstm_init_state/hidden",
    "lstm_cell": "lstm_init_state/cell",
    "max_w": "rnn_params/linear_1/w",
    "max_b": "rnn_params/linear_1/b",
    "mix_w": "rnn_params/linear_2/w",
    "mix_b": "rnn_params/linear_2/b",
    "lstm_w": "rnn_params/rnn/linear/w",
    "lstm_b": "rnn_params/rnn/linear/b",
}
_CONTROLS = {"controls_w": "rnn_params/rnn_to_controls/w", "controls_b": "rnn_params/rnn_to_controls/b"}
_STEP = {"step_w": "rnn_params/step_size/w", "step_b": "rnn_params/step_size/b"}
_PYLO = {
    "lstm_hidden": "lstm_init_state.0",
    "lstm_cell": "lstm_init_state.1",
    "max_w": "mix_layer2.weight",
    "max_b": "mix_layer2.bias",
    "mix_w": "final_mix_layer.weight",
    "mix_b": "final_mix_layer.bias",
    "lstm_w": "lstm.linear.weight",
    "lstm_b": "lstm.linear.bias",
    "controls_w": "rnn_to_controls.weight",
    "controls_b": "rnn_to_controls.bias",
    "step_w": "step_size.weight",
    "step_b": "step_size.bias",
}

_NO_INFLUENCE: dict[str, str | None] = dict.fromkeys(
    ("reparam_decay", "summarize_each_layer", "summarize_all_control")
)
_MIXED_MLP: dict[str, str | None] = {
    "lstm_hidden_size": "lstm_size",
    "ff_hidden_size": "hidden_size",
    "ff_hidden_layers": "hidden_layers",
    "initial_momentum_decays": "momentum_decays",
    "initial_rms_decays": "rms_decays",
    "initial_adafactor_decays": "adafactor_decays",
    "param_inits": "mixture",
    "exp_mult": "exp_mult",
    "step_mult": "step_mult",
    "clip_param_scale_amount": "scale_cap",
    **_NO_INFLUENCE,
}
_ABLATIONS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "with_g", "with_m", "with_m_feat", "with_rms", "with_rms_feat", "with_rms_norm_g", "with_rsqrt_rms",
            "with_p", "with_fac_norm_g", "with_fac_rms", "with_fac_rsqrt", "with_grad_clip_feat",
            "with_fac_mom_mult", "with_rms_only_norm_g", "adafactor_accumulator", "mix_layers", "param_scale_mult",
        ),
        True,
    ),
    "precondition_output": False,
    "constant_loss": False,
}  # fmt: skip
"""Arguments of all three that are not supported, with the values at which they change nothing."""
_NOT_IN_CELO = {"validation_mode": False, "with_validation_feature_dim": False, "rnn_state_decay": 0.0}


def _velo(given: Mapping[str, Any]) -> Velo:
    names = {
        **_MIXED_MLP,
        "ff_mult": "weights_mult",
        "with_validation_feature_dim": "validation_input",
        "validation_mode": None,
        "rnn_state_decay": "lstm_state_decay",
        "use_bugged_next_lstm_state": "frozen_lstm_state",
        "use_bugged_loss_features": "short_loss_history",
    }
    # Its defaults where they are not ours.
    given = {"lstm_hidden_size": 128, "param_inits": 64, "use_bugged_loss_features": True, **given}
    target = bool(given.get("validation_mode", False) and given.get("with_validation_feature_dim", False))
    given = _without(Velo, given, _ABLATIONS)
    return configured(Velo, given, names, minimise_validation=target)


def _celo(given: Mapping[str, Any]) -> Celo:
    # Its defaults where they are not ours.
    given = {"lstm_hidden_size": 128, "param_inits": 64, "train_phase": 1, **given}
    use_schedule = given["train_phase"] > 1
    given = _without(Celo, given, _ABLATIONS | _NOT_IN_CELO)
    return configured(Celo, given, {**_MIXED_MLP, "train_phase": None}, use_schedule=use_schedule)


def _celo_adam(given: Mapping[str, Any]) -> CeloAdam:
    """Without the factored moments that it keeps and does not use."""
    beta1, beta2 = given.get("initial_momentum_decays", (0.9,)), given.get("initial_rms_decays", (0.999,))
    if len(beta1) != 1 or len(beta2) != 1:
        raise SpecError(
            f"{CeloAdam.NAME}: initial_momentum_decays={beta1}, initial_rms_decays={beta2}: must be one decay each"
        )
    names = {
        "lstm_hidden_size": "lstm_size",
        "initial_epsilon": "epsilon",
        "step_mult": "step_mult",
        **_NO_INFLUENCE,
        **dict.fromkeys(_MIXED_MLP.keys() - {"lstm_hidden_size", "step_mult"}),
    }
    unsupported = {"param_scale_mult": False, "mom_decay": True, "mix_layers": True, "constant_loss": False}
    names |= dict.fromkeys(_ABLATIONS.keys() - unsupported.keys())
    given = _without(CeloAdam, given, unsupported | _NOT_IN_CELO)
    return configured(CeloAdam, given, names, beta1=beta1[0], beta2=beta2[0])


def column_entries(mlp: ElementMlp, first: Sequence[str], rest: str = _STACK) -> tuple[Entry, ...]:
    """Of a network whose first layer is stored by groups of columns, at `first`; the others at `rest` w1, b1, ..."""
    sizes = tuple(map(mlp.group_size, mlp.groups))
    names = {f"{kind}{i}": f"{rest}{kind}{i}" for i in range(mlp.hidden_layers + 1) for kind in "wb"}
    del names["w0"]
    return (Entry(("w0",), tuple(first), sizes), *renamed(names))


def split_columns(mlp: ElementMlp) -> list[str]:
    """Where the weights of each group of columns are."""
    return [f"{_STACK}w0__{i}" for i in range(len(mlp.groups))]


def _mixed_table(architecture: MixedMlp) -> Table:
    stack = column_entries(architecture.mlp, split_columns(architecture.mlp))
    return Table((*stack, *renamed({**_LSTM, **_CONTROLS, **_STEP})), _unused(architecture.theta_shapes))


def _adam_table(architecture: CeloAdam) -> Table:
    return Table(renamed({**_LSTM, **_STEP}), _unused(architecture.theta_shapes))


def _unused(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A layer whose output these implementations compute and discard."""
    return {"rnn_params/linear/w": shapes["max_w"], "rnn_params/linear/b": shapes["max_b"]}


def _shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {"lstm_hidden_size": leaves[_LSTM["lstm_hidden"]].shape[-1], **stack_shown(leaves)} | {
        "param_inits": leaves[f"{_STACK}b0"].shape[0]
    }


def stack_shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the weights of the per-parameter network show."""
    layers = sum(path.startswith(f"{_STACK}b") for path in leaves)
    return {"ff_hidden_size": leaves[f"{_STACK}b0"].shape[-1], "ff_hidden_layers": layers - 1}


def _velo_shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    momenta, seconds = (leaves[f"{_STACK}w0__{i}"].shape[-2] for i in (3, 4))
    inputs = leaves[_LSTM["max_w"]].shape[0]
    return {**_shown(leaves), "with_validation_feature_dim": inputs == 9 + 9 + seconds + 5 + 2 * momenta + 1}


def _pylo_table(architecture: Velo) -> Table:
    """PyLO's VeLO_RNN and VeLO_MLP together. The latter has room for one mixture of its networks as well."""
    layers = range(architecture.hidden_layers + 1)
    stored = ["input", *["hidden"] * (architecture.hidden_layers - 1), "output"]
    at = ["", *[f".{i}" for i in range(architecture.hidden_layers - 1)], ""]
    stack = {f"w{i}": f"{stored[i]}_weights_{at[i]}" for i in layers}
    biases = {f"b{i}": f"{stored[i]}_bias_{at[i]}" for i in layers}
    shapes = architecture.theta_shapes
    unused = {"mix_layer1.weight": shapes["max_w"][::-1], "mix_layer1.bias": shapes["max_b"]}
    for name, path in {**stack, **biases}.items():
        shape = shapes[name][1:]
        unused[path.replace("s_", "s").replace("bias_", "bias")] = shape[::-1] if name in stack else shape
    vectors = {name: path for name, path in _PYLO.items() if name in ("lstm_hidden", "lstm_cell")}
    matrices = {name: path for name, path in _PYLO.items() if name not in vectors}
    entries = renamed(stack | matrices, transposed=True) + renamed(biases | vectors)
    return Table(entries, unused)


def _pylo_shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    mixture, hidden_size, _ = leaves["input_weights_"].shape
    layers = sum(path.startswith("hidden_bias_.") for path in leaves)
    return {
        "lstm_hidden_size": leaves[_PYLO["lstm_hidden"]].shape[-1], "param_inits": mixture,
        "ff_hidden_size": hidden_size, "ff_hidden_layers": layers + 1, "use_bugged_loss_features": False,
    }  # fmt: skip


_FF_MULT = "100 for weights of google/learned_optimization (VeLO), 1 for those of amoudgl/celo (velo-s)"
velo = Family(
    "HyperV2 of google/learned_optimization, or amoudgl/celo's copy of it where `ff_mult` is given (that is 1 by "
    "default there, and 100 in the original, which has no such argument)",
    Velo, _velo, _mixed_table, _velo_shown,
    ask={"ff_mult": _FF_MULT, "use_bugged_loss_features": "true by default there, false for all published weights"},
)  # fmt: skip
celo = Family(
    "Celo of amoudgl/celo", Celo, _celo, _mixed_table, _shown,
    ask={"train_phase": "2 for finished weights, 1 for those of the first phase of meta-training"},
)  # fmt: skip
celo_adam = Family(
    "Celo with Adam's update of amoudgl/celo", CeloAdam, _celo_adam, _adam_table,
    lambda leaves: {"lstm_hidden_size": leaves[_LSTM["lstm_hidden"]].shape[-1]},
)  # fmt: skip
pylo_velo = Family(
    "PyLO's VeLO_RNN and VeLO_MLP, two files", Velo, _velo, _pylo_table, _pylo_shown, format="pylo"
)


def _without(
    kind: type[Architecture], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """`given` without the arguments of `defaults`. Raises SpecError for one that has another value there."""
    for name, value in defaults.items():
        if given.get(name, value) != value:
            raise SpecError(f"{kind.NAME}: {name}={given[name]!r} is not supported, only {value!r}")
    return {name: value for name, value in given.items() if name not in defaults}
