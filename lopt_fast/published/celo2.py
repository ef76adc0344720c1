"""Celo2 of amoudgl/celo: the optimizer (`celo2.py`) and the Optax transformation within it (`celo2_optax.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..architectures.celo2 import Celo2
from ..spec import SpecError
from .arguments import configured
from .family import Family
from .hyper import column_entries, split_columns, stack_shown
from .paths import Entry, Table, renamed

_NAMES = {
    "ff_hidden_size": "hidden_size",
    "ff_hidden_layers": "hidden_layers",
    "mlp_activation": "activation",
    "initial_momentum_decays": "momentum_decays",
    "initial_rms_decays": "rms_decays",
    "initial_adafactor_decays": "adafactor_decays",
    "exp_mult": "exp_mult",
    "rmsmult": "output_rms",
    "precondition_output": "precondition_output",
    "normalize_output": "normalise_output",
    "bias_correction": "bias_correction",
    "orthogonalize": "orthogonalise",
    "ns_coeffs": "newton_schulz_coefficients",
    "ns_iters": "newton_schulz_iterations",
    "ns_eps": "newton_schulz_epsilon",
}
_DEFAULTS: dict[str, Any] = {"normalize_input": True, "aggregate_mag": False} | dict.fromkeys(
    (
        "with_g", "with_m", "with_rms", "with_rms_norm_g", "with_rsqrt_rms", "with_p", "with_fac_norm_g",
        "with_fac_rms", "with_fac_rsqrt", "with_grad_clip_feat", "with_fac_mom_mult", "with_rms_only_norm_g",
    ),
    True,
)  # fmt: skip
"""Arguments that are not supported, with the values at which they change nothing."""


def _transformation(given: Mapping[str, Any]) -> Celo2:
    """Moves all tensors by the network. `applied_lr`: what its steps are multiplied by."""
    return _architecture(given, {"applied_lr": "step_mult"}, adam_names="", adam_below_rank=0)


def _optimizer(given: Mapping[str, Any]) -> Celo2:
    """Moves the tensors whose names match `regex_1d` by Adam."""
    names = {
        "regex_1d": "adam_names",
        "mult_1d": "adam_mult",
        "adam_b1": "adam_beta1",
        "adam_b2": "adam_beta2",
        "adam_epsilon": "adam_epsilon",
        "adam_bias_correction": "adam_bias_correction",
        "step_mult": "step_mult",
        "weight_decay": "weight_decay",
    }
    # Its defaults where they are not ours.
    given = {"regex_1d": r".*bias.*|.*embed.*", "adam_b2": 0.999, **given}
    return _architecture(given, names, adam_below_rank=0)


def _architecture(given: Mapping[str, Any], names: Mapping[str, str], **fields: Any) -> Celo2:
    for name, value in _DEFAULTS.items():
        if given.get(name, value) != value:
            raise SpecError(f"{Celo2.NAME}: {name}={given[name]!r} is not supported, only {value!r}")
    given = {name: value for name, value in given.items() if name not in _DEFAULTS}
    scale = "parameter_rms" if given.pop("param_scale_mult", False) else "none"
    return configured(Celo2, given, {**_NAMES, **names}, scale=scale, **fields)


def _table(architecture: Celo2) -> Table:
    return Table(column_entries(architecture.mlp, split_columns(architecture.mlp)))


def _pylo_table(architecture: Celo2) -> Table:
    """PyLO's CELO2MLP."""
    mlp = architecture.mlp
    first = [f"w0.{i}" for i in range(len(mlp.groups))]
    names = {f"{kind}{i}": f"dense_{kind}.{i - 1}" for i in range(1, mlp.hidden_layers + 1) for kind in "wb"}
    return Table(
        (
            Entry(("w0",), tuple(first), tuple(map(mlp.group_size, mlp.groups))),
            *renamed({"b0": "b0", **names}),
        )
    )


def _pylo_shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    layers = sum(path.startswith("dense_w.") for path in leaves)
    return {"ff_hidden_size": leaves["b0"].shape[0], "ff_hidden_layers": layers}


_ASK = {"orthogonalize": "true for celo2, false for celo2-base"}
celo2 = Family("Celo2 of amoudgl/celo", Celo2, _optimizer, _table, stack_shown, ask=_ASK)
transformation = Family(
    "Celo2's Optax transformation of amoudgl/celo, which moves all tensors by the network",
    Celo2, _transformation, _table, stack_shown, ask=_ASK,
)  # fmt: skip
pylo_celo2 = Family("PyLO's CELO2MLP", Celo2, _optimizer, _pylo_table, _pylo_shown, ask=_ASK, format="pylo")
