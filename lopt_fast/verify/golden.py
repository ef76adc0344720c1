"""Golden files: what they hold, and the optimizers that are to reproduce it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..architectures.base import Architecture
from ..errors import UserError
from ..published import FAMILIES
from ..published.small_fc import DECAYS, fixed_decays, spec_of
from ..spec import Spec, SpecError

Arrays = dict[str, np.ndarray]

_READ_OUT = 1024.0  # a power of two, large enough that the rounding of the parameter does not count


class GoldenError(UserError, ValueError):
    """A golden file that cannot be read or replayed, or a framework that is missing; names it and the reason."""


@dataclass(frozen=True)
class Target:
    """What one tensor has to be after each step."""

    values: np.ndarray
    """(steps, n) float64."""
    exact: bool
    """Whether the values come from a float64 run."""
    index: np.ndarray | None = None
    """(n,) flat indices that `values` shows; None: all."""
    last: np.ndarray | None = None
    """All elements after the last step of a float32 run, where `values` shows only some."""
    last_error: float = 0.0
    """How far that run is from `values` there."""
    float32_error: float = 0.0
    """How far a float32 run of the other implementation was from these values, where the file says so."""
    moves: np.ndarray | None = None
    """(steps, n) float64: what each step adds, where the file has it beside the values."""


@dataclass(frozen=True)
class Inputs:
    """What an optimizer is told in each step."""

    params0: Arrays
    grads: Arrays
    """(steps, *shape) for each tensor."""
    losses: np.ndarray | None = None
    """(steps,)"""
    validation: tuple[bool, ...] = ()
    """Steps in which the loss is one on validation data, and nothing is updated; empty: none."""

    @property
    def steps(self) -> int:
        return len(next(iter(self.grads.values())))

    def is_validation(self, t: int) -> bool:
        return bool(self.validation) and self.validation[t]


@dataclass(frozen=True)
class Replay:
    """One optimizer, run over all tensors and steps of a case."""

    spec: Spec | Architecture
    theta: Arrays
    targets: dict[str, Target]
    matmul: bool = True
    lr: float = 1.0
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    """Multiplies `lr` for the tensors that it names."""
    weight_decay: float = 0.0
    num_steps: int | None = None
    hold: bool = False
    """Put the parameters back to their start values after each step."""
    label: str = ""


@dataclass(frozen=True)
class Case:
    """The contents of one golden file."""

    inputs: Inputs
    replays: tuple[Replay, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """Tensors that are not compared, and why."""
    unit: float = 1.0
    """Size of 1 in a column of the MLP's input: errors are divided by this."""


def load(path: str | Path) -> Case:
    """Read a golden file with the inputs and weights that it refers to. Raises GoldenError."""
    path = Path(path)
    data = read_file(path)
    return load_contents(path, data, read_meta(path, data))


def load_contents(path: Path, data: Arrays, meta: Mapping[str, Any]) -> Case:
    """The case of a golden file that has been read. Raises GoldenError."""
    try:
        if meta.get("kind") == "features":
            return _features(path, data, meta)
        family = meta.get("family")
        if family not in _READERS and family not in FAMILIES:
            what = f"family {family!r}" if family else f"kind {meta.get('kind')!r}"
            known = ", ".join(sorted({*FAMILIES, *_READERS}))
            raise GoldenError(f"{path}: {what} cannot be replayed; known are {known}, features and pes")
        return _trajectory(path, data, meta)
    except SpecError as error:
        raise GoldenError(f"{path}: {error}") from error
    except GoldenError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise GoldenError(f"{path}: not a complete golden file ({type(error).__name__}: {error})") from error


def read_file(path: Path) -> Arrays:
    """The arrays of an .npz file. Raises GoldenError."""
    if not path.is_file():
        raise GoldenError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # numpy, zipfile and zlib raise many things for a damaged file
        raise GoldenError(f"{path}: not a readable .npz file ({error})") from error


def read_meta(path: Path, data: Arrays) -> dict[str, Any]:
    """What a golden file says about itself. Raises GoldenError."""
    try:
        meta = json.loads(str(data["meta"]))
        return dict(meta)
    except (KeyError, ValueError, TypeError) as error:
        raise GoldenError(f"{path}: not a golden file: no JSON under the key 'meta'") from error


def group(data: Mapping[str, np.ndarray], name: str) -> Arrays:
    """The arrays `name/<key>` by <key>."""
    return {key.removeprefix(f"{name}/"): a for key, a in data.items() if key.startswith(f"{name}/")}


def _inputs(path: Path, meta: Mapping[str, Any], names: Sequence[str], steps: int) -> Inputs:
    """Start values, and the first `steps` steps of gradients and losses, of the named tensors."""
    source = path.parent / Path(meta["inputs"]).name
    data = read_file(source)
    params0, grads = group(data, "params0"), group(data, "grads")
    for name in names:
        if name not in params0 or name not in grads:
            raise GoldenError(f"{path}: tensor {name!r} is not in {source}")
        if grads[name].shape[1:] != params0[name].shape or len(grads[name]) < steps:
            raise GoldenError(
                f"{source}: gradients of {name!r} have shape {grads[name].shape}, expected at least {steps} of "
                f"{params0[name].shape}"
            )
    losses = data.get("losses")
    if losses is not None and (losses.ndim != 1 or len(losses) < steps):
        raise GoldenError(f"{source}: losses have shape {losses.shape}, expected at least {steps}")
    validation = tuple(map(bool, meta.get("is_valid") or ()))
    if validation and len(validation) != steps:
        raise GoldenError(f"{path}: is_valid has {len(validation)} entries for {steps} steps")
    return Inputs(
        {n: params0[n] for n in names},
        {n: grads[n][:steps] for n in names},
        None if losses is None else losses[:steps],
        validation,
    )


# Trajectories


def _trajectory(path: Path, data: Arrays, meta: Mapping[str, Any]) -> Case:
    exact = any(key.startswith(("params64/", "params64_sub/")) for key in data)
    suffix = "64" if exact else ""
    whole, thinned = group(data, f"params{suffix}"), group(data, f"params{suffix}_sub")
    moves = group(data, f"step{suffix}") | group(data, f"step{suffix}_sub")
    index, last = group(data, "sub_index"), group(data, "params_last")
    names = sorted({*whole, *thinned})
    if not names:
        raise GoldenError(f"{path}: has no parameter trajectories")
    steps = int(meta["n_steps"])
    inputs = _inputs(path, meta, names, steps)
    given = dict(meta["hyperparameters"])
    applied_lr = float(given.get("applied_lr", 1.0))
    targets, skipped = {}, {}
    for name in names:
        size = inputs.params0[name].size
        values = whole[name] if name in whole else thinned[name]
        shown = None if name in whole else index[name]
        if values.shape[:1] != (steps,) or values[0].size != (size if shown is None else len(shown)):
            raise GoldenError(
                f"{path}: trajectory of {name!r} has shape {values.shape}, not that of its inputs"
            )
        if shown is not None and not (len(shown) and shown.min() >= 0 and shown.max() < size):
            raise GoldenError(f"{path}: sub_index of {name!r} leaves the tensor of {size} elements")
        if name in moves and moves[name].shape != values.shape:
            raise GoldenError(f"{path}: steps of {name!r} have shape {moves[name].shape}, not {values.shape}")
        if size == 0:
            skipped[name] = "no elements"
        elif meta["family"] == "pylo_adafac" and inputs.params0[name].ndim == 0 and values.ndim == 1:
            skipped[name] = "PyLO normalises a 0-d tensor over its columns: wrong by design, not replayed"
        else:
            target = Target(values.reshape(steps, -1).astype(np.float64), exact, shown)
            if exact and (measured := (meta.get("f32_vs_f64") or {}).get(name)):
                largest = float(np.abs(target.values).max())
                target = replace(target, float32_error=float(measured["param_rel_max"]) * largest)
            if shown is not None and name in last:
                whole_run = last[name].reshape(-1).astype(np.float64)
                error = float(np.abs(whole_run[shown] - target.values[-1]).max())
                target = replace(target, last=whole_run, last_error=error)
            if name in moves:
                added = -applied_lr * moves[name].reshape(steps, -1).astype(np.float64)
                target = replace(target, moves=added)
            targets[name] = target
    if not targets:
        raise GoldenError(f"{path}: no tensor can be compared: {skipped}")
    leaves = group(data, "theta")
    if meta.get("theta_ref"):
        leaves = read_file(path.parent / Path(meta["theta_ref"]).name)
        leaves.pop("meta", None)
    read = _READERS.get(meta["family"], _published)
    item, inputs = read(meta["family"], given, leaves, inputs)
    item.spec.check_theta(item.theta)
    if isinstance(item.spec, Architecture):
        if inputs.losses is None and (item.spec.needs_loss or inputs.validation):
            raise GoldenError(f"{path}: {item.spec.NAME} looks at the loss, its inputs file has no 'losses'")
        if item.spec.needs_num_steps and meta.get("num_steps") is None:
            raise GoldenError(f"{path}: {item.spec.NAME} knows its horizon, the file has no 'num_steps'")
    return Case(inputs, (replace(item, targets=targets, num_steps=meta.get("num_steps")),), skipped)


def _published(
    family: str, given: Mapping[str, Any], leaves: Arrays, inputs: Inputs
) -> tuple[Replay, Inputs]:
    return Replay(*FAMILIES[family](given, leaves), {}), inputs


def _adafac(family: str, given: Mapping[str, Any], leaves: Arrays, inputs: Inputs) -> tuple[Replay, Inputs]:
    item, inputs = _published(family, given, leaves, inputs)
    return replace(item, matmul=bool(given.get("concat_weights", True))), inputs


def _pylo(family: str, given: Mapping[str, Any], leaves: Arrays, inputs: Inputs) -> tuple[Replay, Inputs]:
    item, inputs = _published(family, given, leaves, inputs)
    lr, weight_decay = float(given.get("lr", 1.0)), float(given.get("weight_decay", 0.0))
    return replace(item, lr=lr, weight_decay=weight_decay), inputs


def _mulo(family: str, given: Mapping[str, Any], leaves: Arrays, inputs: Inputs) -> tuple[Replay, Inputs]:
    """A step scaled tensor by tensor, and gradients that are clipped and made finite before anything sees them."""
    rest = dict(given)
    scale = {name: float(x) for name, x in (rest.pop("mup_lr_scale", None) or {}).items()}
    if unknown := sorted(scale.keys() - inputs.params0.keys()):
        raise GoldenError(f"mup_lr_scale names tensors that are not there: {', '.join(unknown)}")
    clip = rest.pop("clip_grad", False)
    if rest.pop("mup_lrs", None) is not None:
        raise SpecError(
            "hyperparameter mup_lrs cannot be replayed, only None: mup_lr_scale tells what was used"
        )
    item, inputs = _adafac("adafac", rest, leaves, inputs)
    return replace(item, lr_scale=scale), replace(inputs, grads=_finite(inputs.grads, clip))


def _finite(grads: Arrays, clip: bool) -> Arrays:
    """Gradients of each step scaled down to a norm of 1, over all tensors, where that is asked for, then NaN as 0
    and infinities as the largest float32."""
    out = {name: g.astype(np.float64) for name, g in grads.items()}
    if clip:
        squares = sum((g.reshape(len(g), -1) ** 2).sum(axis=1) for g in out.values())
        norm = np.sqrt(squares)
        factor = np.where(norm < 1.0, 1.0, 1.0 / norm)
        out = {name: g * factor.reshape(-1, *(1,) * (g.ndim - 1)) for name, g in out.items()}
    largest = float(np.finfo(np.float32).max)
    return {name: np.nan_to_num(g, posinf=largest, neginf=-largest) for name, g in out.items()}


_READERS = {"adafac": _adafac, "pylo_adafac": _pylo, "mulo": _mulo}
"""Families with more to them than a published optimizer at learning rate 1."""


# Columns


def _features(path: Path, data: Arrays, meta: Mapping[str, Any]) -> Case:
    """Each column as the trajectory of a network of two units that passes it on: relu(x) - relu(-x)."""
    exact = any(key.startswith("features64/") for key in data)
    features = group(data, "features64" if exact else "features")
    if not features:
        raise GoldenError(f"{path}: has no features")
    steps = len(next(iter(features.values())))
    inputs = _inputs(path, meta, sorted(features), steps)
    spec = replace(
        spec_of(meta.get("hyperparameters") or {}),
        hidden_size=2, hidden_layers=1, step_mult=_READ_OUT, exp_mult=0.0,
    )  # fmt: skip
    zeros = {name: np.zeros(shape, np.float32) for name, shape in spec.theta_shapes.items()}
    zeros |= {name: np.asarray(meta[name]) for name in DECAYS}
    spec.check_theta(zeros)
    spec, zeros = fixed_decays(spec, zeros, "float64")  # meta-parameters of a checkpoint are float32
    zeros["w1"][:, 0] = 1.0, -1.0
    for name, values in features.items():
        if values.shape != (steps, *inputs.params0[name].shape, spec.input_size):
            raise GoldenError(
                f"{path}: features of {name!r} have shape {values.shape}, expected "
                f"{(steps, *inputs.params0[name].shape, spec.input_size)}"
            )
    labels = [f"{c.group}[{c.index}]" for c in spec.normalised_columns]
    labels += [f"time[{i}]" for i in range(spec.input_size - len(labels))]
    replays = []
    for k, label in enumerate(labels):
        theta = {**zeros, "w0": zeros["w0"].copy()}
        theta["w0"][k] = 1.0, -1.0
        targets = {
            name: Target(
                inputs.params0[name].reshape(1, -1).astype(np.float64)
                - _READ_OUT * values[..., k].reshape(steps, -1).astype(np.float64),
                exact,
            )
            for name, values in features.items()
        }
        replays.append(Replay(spec, theta, targets, hold=True, label=f"column {k} {label}"))
    return Case(inputs, tuple(replays), unit=_READ_OUT)
