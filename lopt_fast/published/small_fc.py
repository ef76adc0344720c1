"""small_fc_lopt: `adafac_mlp_lopt.py` of google/learned_optimization, muLO's copy of it and PyLO's AdafacLO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..spec import Spec, SpecError
from .arguments import configured
from .family import Family
from .paths import Arrays, Table, renamed

DECAYS = ("momentum_decays", "rms_decays", "adafactor_decays")
_CONSTRUCTOR: dict[str, str | None] = {
    "hidden_size": "hidden_size",
    "hidden_layers": "hidden_layers",
    "step_mult": "step_mult",
    "exp_mult": "exp_mult",
    "initial_momentum_decays": "momentum_decays",
    "initial_rms_decays": "rms_decays",
    "initial_adafactor_decays": "adafactor_decays",
    "concat_weights": None,
    "make_separate_weights": None,
    "split_weights": None,
}
_PYLO_IN_THETA = ("hidden_size", "hidden_layers", "hf_key", *DECAYS)
"""Arguments of PyLO's AdafacLO that its meta-parameters show; it counts layers in another way."""
_PYLO_KNOWN: dict[str, Any] = {"max_grad_norm": None, "clip_grad": False, "mup_lrs": None, "input_size": 39}
"""Arguments of PyLO's AdafacLO that are known with this value alone."""


def pylo_adafac(given: Mapping[str, Any], leaves: Mapping[str, np.ndarray]) -> tuple[Spec, Arrays]:
    """AdafacLO, with the meta-parameters by the paths of AdafacMLPLOpt, its decays among them.

    PyLO keeps its decays as float32 in [0, 1], momentum included; so they become initial ones here. Its weight decay
    acts on the new parameter: (p - lr s)(1 - lr wd) = p - lr ((1 - lr wd) s + wd p).
    """
    for name, value in _PYLO_KNOWN.items():
        if name in given and given[name] != value:
            raise SpecError(f"hyperparameter {name}={given[name]!r} cannot be replayed, only {value!r}")
    theta = theta_of(leaves)
    layers = sum(name.startswith("w") for name in theta)
    shown = {"hidden_layers": layers - 1, "hidden_size": int(theta["b0"].shape[0]), "step_mult": 0.01}
    left_out = {"lr", "weight_decay", *_PYLO_KNOWN, *_PYLO_IN_THETA}
    spec = spec_of({k: v for k, v in given.items() if k not in left_out}, shown)
    spec.check_theta(theta)
    spec, theta = fixed_decays(spec, theta, "float32", lowest=0.0)
    shrunk = 1.0 - float(given.get("lr", 1.0)) * float(given.get("weight_decay", 0.0))
    return replace(spec, step_mult=spec.step_mult * shrunk), theta


def spec_of(given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Spec:
    """Constructor arguments as a Spec. Raises SpecError for unknown ones, naming them.

    defaults: fields by our names, where an argument does not say otherwise.
    """
    named = {field for argument, field in _CONSTRUCTOR.items() if argument in given}
    return configured(
        Spec, given, _CONSTRUCTOR, **{k: v for k, v in (defaults or {}).items() if k not in named}
    )


def theta_of(leaves: Mapping[str, Any], stack: Callable[[list[Any]], Any] = np.stack) -> dict[str, Any]:
    """Meta-parameters by the names of Spec.theta_shapes, from pytree paths; w{l}_{i}_{j} and b{l}_{j} are joined."""
    theta: dict[str, Any] = {}
    single: dict[str, dict[tuple[int, ...], Any]] = {}
    for path, value in leaves.items():
        name, *position = path.rsplit("/", 1)[-1].split("_")
        if position and all(part.isdecimal() for part in position):
            single.setdefault(name, {})[tuple(map(int, position))] = value
        else:
            theta["_".join([name, *position])] = value
    for name, entries in single.items():
        shape = tuple(max(axis) + 1 for axis in zip(*entries, strict=True))
        if len(entries) != np.prod(shape):
            raise SpecError(f"meta-parameters {name}_*: {len(entries)} entries do not fill shape {shape}")
        theta[name] = stack([entries[i] for i in np.ndindex(*shape)]).reshape(shape)
    return theta


def fixed_decays(
    spec: Spec, theta: Mapping[str, Any], dtype: str, lowest: float = -np.inf
) -> tuple[Spec, Arrays]:
    """The same decays, computed in `dtype` and at least `lowest`, as initial ones with zero meta-parameters."""
    decays: dict[str, Any] = {}
    zeros: Arrays = {}
    one, ten = np.ones((), dtype), np.full((), 10, dtype)
    for name in DECAYS:
        initial, offset = np.asarray(getattr(spec, name), dtype), np.asarray(theta[name], dtype)
        beta = one - np.exp((np.log(one - initial) / ten + offset) * ten)
        decays[name] = tuple(float(b) for b in np.maximum(beta, lowest))
        zeros[name] = np.zeros(initial.shape, np.float32)
    return replace(spec, **decays), {**theta, **zeros}


def _layers(count: int) -> list[str]:
    return [f"{kind}{i}" for i in range(count) for kind in "wb"]


def _table(spec: Spec) -> Table:
    paths = {name: f"nn/~/{name}" for name in _layers(spec.hidden_layers + 1)}
    return Table(renamed(paths | {name: name for name in DECAYS}))


def _joined(leaves: Mapping[str, np.ndarray]) -> Arrays:
    return {name if name in DECAYS else f"nn/~/{name}": a for name, a in theta_of(leaves).items()}


def _shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    layers = sum(path.startswith("nn/~/b") for path in leaves)
    return {"hidden_size": leaves["nn/~/b0"].shape[0], "hidden_layers": layers - 1}


def _pylo(given: Mapping[str, Any]) -> Spec:
    """AdafacLO from its arguments, `hidden_layers` counted as ours."""
    shown = {"hidden_size": given["hidden_size"], "hidden_layers": given["hidden_layers"], "step_mult": 0.01}
    spec = spec_of({k: v for k, v in given.items() if k not in (*_PYLO_KNOWN, *_PYLO_IN_THETA)}, shown)
    return fixed_decays(spec, {name: given.get(name, 0.0) for name in DECAYS}, "float32", lowest=0.0)[0]


def _pylo_table(spec: Spec) -> Table:
    modules = ["input", *(f"linear_{i}" for i in range(spec.hidden_layers - 1)), "output"]
    weights = {f"w{i}": f"network.{module}.weight" for i, module in enumerate(modules)}
    biases = {f"b{i}": f"network.{module}.bias" for i, module in enumerate(modules)}
    return Table((*renamed(weights, transposed=True), *renamed(biases)), absent=DECAYS)


def _pylo_shown(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    linear = sum(path.startswith("network.linear_") and path.endswith(".bias") for path in leaves)
    return {"hidden_size": leaves["network.input.bias"].shape[0], "hidden_layers": linear + 1}


adafac = Family(
    "AdafacMLPLOpt of google/learned_optimization", Spec, spec_of, _table, _shown, prepare=_joined,
)  # fmt: skip
pylo_meta_mlp = Family(
    "PyLO's MetaMLP, of its AdafacLO, MuLO and ELO", Spec, _pylo, _pylo_table, _pylo_shown, format="pylo",
    ask={
        "momentum_decays": "PyLO's argument of the optimizer, 0 for ELO",
        "rms_decays": "likewise",
        "adafactor_decays": "likewise",
        "step_mult": "0.01 is AdafacLO's and MuLO's default; 1 for ELO",
    },
)  # fmt: skip
