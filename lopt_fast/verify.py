"""Replays golden files through the public interface of NumPy, PyTorch or JAX and compares every step.

A golden file holds start values, gradients, meta-parameters and the parameters after each step, as another
implementation computed them. Three kinds are known here: trajectories of google/learned_optimization's AdafacMLPLOpt
(family `adafac`) and of PyLO's AdafacLO (`pylo_adafac`), and the MLP's input columns (`kind: features`), which are
read out through a network that passes one column on: 39 trajectories with parameters held in place. A fourth,
estimates of meta-gradients (`kind: pes`), is replayed by lopt_fast/meta/verify_pes.py.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .backends import BackendError, BackendWarning, choose
from .checkpoint import Checkpoint
from .spec import Spec, SpecError

Arrays = dict[str, np.ndarray]

FRAMEWORKS = ("numpy", "torch", "jax")
DTYPES = ("float32", "float64")
FAMILIES = ("adafac", "pylo_adafac")

_READ_OUT = 1024.0  # a power of two, large enough that the rounding of the parameter does not count
_DECAYS = ("momentum_decays", "rms_decays", "adafactor_decays")
_CONSTRUCTOR = {  # constructor argument of AdafacMLPLOpt -> field of Spec; None: has no influence on the result
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
_PYLO_NEUTRAL: dict[str, Any] = {"max_grad_norm": None, "clip_grad": False, "mup_lrs": None, "input_size": 39}
"""Arguments of PyLO's AdafacLO that are known with this value alone."""
_PYLO_IN_THETA = ("hidden_size", "hidden_layers", "hf_key", *_DECAYS)
"""Arguments of PyLO's AdafacLO that the meta-parameters in the file show; it counts layers in another way."""


class GoldenError(ValueError):
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


@dataclass(frozen=True)
class Replay:
    """One optimizer, run over all tensors and steps of a case."""

    spec: Spec
    theta: Arrays
    targets: dict[str, Target]
    matmul: bool = True
    lr: float = 1.0
    weight_decay: float = 0.0
    hold: bool = False
    """Put the parameters back to their start values after each step."""
    label: str = ""


@dataclass(frozen=True)
class Case:
    """The contents of one golden file."""

    params0: Arrays
    grads: Arrays
    """(steps, *shape) for each tensor."""
    replays: tuple[Replay, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """Tensors that are not compared, and why."""
    unit: float = 1.0
    """Size of 1 in a column of the MLP's input: errors are divided by this."""


@dataclass(frozen=True)
class Row:
    """The worst step of one tensor: the one with the largest error relative to its tolerance."""

    tensor: str
    shape: tuple[int, ...]
    error: float
    tolerance: float
    passed: bool
    note: str


@dataclass(frozen=True)
class Report:
    """What `verify` found out about one file."""

    file: str
    framework: str
    backend: str
    dtype: str
    rows: tuple[Row, ...]
    skipped: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)


def verify(
    path: str | Path,
    framework: str = "numpy",
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
) -> Report:
    """Replay one golden file.

    `device` is PyTorch's name of one, as "cuda:1"; None: the first that the backend runs on, the CPU for "auto" and
    "reference".

    Meta-gradients (`kind: pes`) are replayed in JAX whatever the framework; the report says so.

    `dtype` is float64 for NumPy's reference, else float32 by default. Let p be the expected parameters of a tensor
    after a step and d their change in it: the error may be ``4 eps max|p| + r max|d|``, with the eps of float64 and
    r = 1e-9 where both runs are in float64, with the eps of float32 and r = 1e-4 otherwise.

    Raises GoldenError for a file that cannot be read or replayed and for a missing framework, BackendError for a
    backend that cannot be used.
    """
    asked = dtype
    run, dtype = _runner(framework, backend, dtype)
    if device is not None and framework != "torch":
        raise GoldenError(f"device {device!r}: can be chosen for torch alone, not for {framework}")
    if device is not None and not re.fullmatch(r"[a-z]+(:\d+)?", device):
        raise GoldenError(f"device {device!r}: must be as cpu, cuda or cuda:1")
    device = device or _device(backend)
    path = Path(path)
    data = _read(path)
    meta = _meta(path, data)
    if meta.get("kind") == "pes":
        return _pes(path, data, meta, framework, backend, asked)
    case = _load(path, data, meta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendWarning)  # the report names the backend
        chosen = ", ".join(sorted({_chosen(r.spec, framework, backend, dtype, device) for r in case.replays}))
    worst: dict[str, tuple[float, Row]] = {}
    for item in case.replays:
        found = run(item, case.params0, case.grads, backend, dtype, device)
        for name, target in item.targets.items():
            ratio, row = _compare(name, case.params0[name], found[name], target, item, dtype, case.unit)
            if name not in worst or not ratio <= worst[name][0]:
                worst[name] = ratio, row
    return Report(
        str(path), framework, chosen, dtype, tuple(row for _, row in worst.values()), dict(case.skipped)
    )


def _pes(
    path: Path, data: Arrays, meta: Mapping[str, Any], framework: str, backend: str, dtype: str | None
) -> Report:
    try:
        from .meta import verify_pes
    except ImportError as error:
        raise GoldenError(
            f"{path}: meta-gradients are replayed in JAX, which cannot be imported ({error}): "
            "pip install 'lopt-fast[jax]'"
        ) from error
    return verify_pes.verify(path, data, meta, framework, backend, dtype)


def _compare(
    name: str, start: np.ndarray, found: np.ndarray, target: Target, item: Replay, dtype: str, unit: float
) -> tuple[float, Row]:
    """(largest error / tolerance over the steps, the row that reports it); NaN counts as the largest."""
    steps = len(target.values)
    flat = found.reshape(steps, -1)
    p0 = start.astype(np.float64).reshape(-1)
    shown = slice(None) if target.index is None else target.index
    before = np.concatenate([p0[None, shown], target.values[:-1]]) if not item.hold else p0[None, shown]
    moved = np.abs(target.values - before).max(axis=1)
    strict = dtype == "float64" and target.exact
    eps, rtol = (np.finfo(np.float64).eps, 1e-9) if strict else (np.finfo(np.float32).eps, 1e-4)
    size = np.maximum(np.abs(target.values).max(axis=1), unit if item.hold else 0.0)
    tolerance = 4.0 * float(eps) * size + rtol * moved
    error = np.abs(flat[:, shown] - target.values).max(axis=1)
    label = [item.label] * steps
    if target.last is not None:  # a float32 run itself: it may be as far off as this one
        eps = np.finfo(np.float32).eps
        limit = 4.0 * float(eps) * np.abs(target.last).max() + 1e-4 * moved[-1]
        error = np.append(error, np.abs(flat[-1] - target.last).max())
        tolerance = np.append(tolerance, limit if strict else 2.0 * limit)
        label.append("all elements")
    ratio = error / np.maximum(tolerance, np.finfo(np.float64).tiny)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    i = int(np.argmax(ratio))
    note = f"step {min(i, steps - 1)}" + (f", {label[i]}" if label[i] else "")
    passed = bool((error <= tolerance).all())  # False for NaN
    row = Row(name, start.shape, float(error[i]) / unit, float(tolerance[i]) / unit, passed, note)
    return float(ratio[i]), row


# Files


def load(path: str | Path) -> Case:
    """Read a golden file with the inputs and weights that it refers to. Raises GoldenError."""
    path = Path(path)
    data = _read(path)
    return _load(path, data, _meta(path, data))


def _load(path: Path, data: Arrays, meta: Mapping[str, Any]) -> Case:
    try:
        if meta.get("kind") == "features":
            return _features(path, data, meta)
        family = meta.get("family")
        if family not in FAMILIES:
            what = f"family {family!r}" if family else f"kind {meta.get('kind')!r}"
            raise GoldenError(
                f"{path}: {what} cannot be replayed; known are {', '.join(FAMILIES)}, features and pes"
            )
        return _trajectory(path, data, meta)
    except SpecError as error:
        raise GoldenError(f"{path}: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise GoldenError(f"{path}: not a complete golden file ({type(error).__name__}: {error})") from error


def _read(path: Path) -> Arrays:
    if not path.is_file():
        raise GoldenError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # numpy, zipfile and zlib raise many things for a damaged file
        raise GoldenError(f"{path}: not a readable .npz file ({error})") from error


def _meta(path: Path, data: Arrays) -> dict[str, Any]:
    try:
        meta = json.loads(str(data["meta"]))
        return dict(meta)
    except (KeyError, ValueError, TypeError) as error:
        raise GoldenError(f"{path}: not a golden file: no JSON under the key 'meta'") from error


def group(data: Mapping[str, np.ndarray], name: str) -> Arrays:
    """The arrays `name/<key>` by <key>."""
    return {key.removeprefix(f"{name}/"): a for key, a in data.items() if key.startswith(f"{name}/")}


def _inputs(path: Path, meta: Mapping[str, Any], names: Sequence[str], steps: int) -> tuple[Arrays, Arrays]:
    """(start values, gradients of the first `steps` steps) of the named tensors."""
    source = path.parent / Path(meta["inputs"]).name
    data = _read(source)
    params0, grads = group(data, "params0"), group(data, "grads")
    for name in names:
        if name not in params0 or name not in grads:
            raise GoldenError(f"{path}: tensor {name!r} is not in {source}")
        if grads[name].shape[1:] != params0[name].shape or len(grads[name]) < steps:
            raise GoldenError(
                f"{source}: gradients of {name!r} have shape {grads[name].shape}, expected at least {steps} of "
                f"{params0[name].shape}"
            )
    return {n: params0[n] for n in names}, {n: grads[n][:steps] for n in names}


def _trajectory(path: Path, data: Arrays, meta: Mapping[str, Any]) -> Case:
    exact = any(key.startswith(("params64/", "params64_sub/")) for key in data)
    suffix = "64" if exact else ""
    whole, thinned = group(data, f"params{suffix}"), group(data, f"params{suffix}_sub")
    index, last = group(data, "sub_index"), group(data, "params_last")
    names = sorted({*whole, *thinned})
    if not names:
        raise GoldenError(f"{path}: has no parameter trajectories")
    steps = int(meta["n_steps"])
    params0, grads = _inputs(path, meta, names, steps)
    targets, skipped = {}, {}
    for name in names:
        size = params0[name].size
        values = whole[name] if name in whole else thinned[name]
        shown = None if name in whole else index[name]
        if values.shape[:1] != (steps,) or values[0].size != (size if shown is None else len(shown)):
            raise GoldenError(
                f"{path}: trajectory of {name!r} has shape {values.shape}, not that of its inputs"
            )
        if shown is not None and not (len(shown) and shown.min() >= 0 and shown.max() < size):
            raise GoldenError(f"{path}: sub_index of {name!r} leaves the tensor of {size} elements")
        if size == 0:
            skipped[name] = "no elements"
        elif meta["family"] == "pylo_adafac" and params0[name].ndim == 0 and values.ndim == 1:
            skipped[name] = "PyLO normalises a 0-d tensor over its columns: wrong by design, not replayed"
        else:
            flat = values.reshape(steps, -1).astype(np.float64)
            full = last[name].reshape(-1).astype(np.float64) if shown is not None and name in last else None
            targets[name] = Target(flat, exact, shown, full)
    if not targets:
        raise GoldenError(f"{path}: no tensor can be compared: {skipped}")
    leaves = group(data, "theta")
    if meta.get("theta_ref"):
        leaves = _read(path.parent / Path(meta["theta_ref"]).name)
        leaves.pop("meta", None)
    given = dict(meta["hyperparameters"])
    make = _pylo_replay if meta["family"] == "pylo_adafac" else _adafac_replay
    return Case(params0, grads, (make(given, theta_of(leaves), targets),), skipped)


def spec_of(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Spec:
    """Constructor arguments as a Spec. Raises SpecError for unknown ones, naming them."""
    unknown = sorted(given.keys() - _CONSTRUCTOR.keys())
    if unknown:
        raise SpecError(f"unknown hyperparameters {', '.join(unknown)}; known are {', '.join(_CONSTRUCTOR)}")
    named = {new: given[old] for old, new in _CONSTRUCTOR.items() if new is not None and old in given}
    return Spec.from_dict({**defaults, **named})


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


def _adafac_replay(given: Mapping[str, Any], theta: Arrays, targets: dict[str, Target]) -> Replay:
    spec = spec_of(given, {})
    spec.check_theta(theta)
    return Replay(spec, theta, targets, matmul=bool(given.get("concat_weights", True)))


def _pylo_replay(given: Mapping[str, Any], theta: Arrays, targets: dict[str, Target]) -> Replay:
    """PyLO keeps its decays as float32 in [0, 1], momentum included, and lets weight decay act on the new parameter."""
    lr, weight_decay = float(given.get("lr", 1.0)), float(given.get("weight_decay", 0.0))
    for name, neutral in _PYLO_NEUTRAL.items():
        if name in given and given[name] != neutral:
            raise SpecError(f"hyperparameter {name}={given[name]!r} cannot be replayed, only {neutral!r}")
    left_out = {"lr", "weight_decay", *_PYLO_NEUTRAL, *_PYLO_IN_THETA}
    layers = sum(name.startswith("w") for name in theta)
    shown = {"hidden_layers": layers - 1, "hidden_size": int(theta["b0"].shape[0]), "step_mult": 0.01}
    spec = spec_of({k: v for k, v in given.items() if k not in left_out}, shown)
    spec.check_theta(theta)
    spec, theta = _with_decays(spec, theta, "float32", lowest=0.0)
    # (p - lr s)(1 - lr wd) = p - lr ((1 - lr wd) s + wd p)
    spec = replace(spec, step_mult=spec.step_mult * (1.0 - lr * weight_decay))
    return Replay(spec, theta, targets, lr=lr, weight_decay=weight_decay)


def _with_decays(
    spec: Spec, theta: Mapping[str, Any], dtype: str, lowest: float = -np.inf
) -> tuple[Spec, Arrays]:
    """The same decays, computed in `dtype` and at least `lowest`, as initial ones with zero meta-parameters."""
    decays: dict[str, Any] = {}
    zeros: Arrays = {}
    one, ten = np.ones((), dtype), np.full((), 10, dtype)
    for name in _DECAYS:
        initial, offset = np.asarray(getattr(spec, name), dtype), np.asarray(theta[name], dtype)
        beta = one - np.exp((np.log(one - initial) / ten + offset) * ten)
        decays[name] = tuple(float(b) for b in np.maximum(beta, lowest))
        zeros[name] = np.zeros(initial.shape, np.float32)
    return replace(spec, **decays), {**theta, **zeros}


def _features(path: Path, data: Arrays, meta: Mapping[str, Any]) -> Case:
    """Each column as the trajectory of a network of two units that passes it on: relu(x) - relu(-x)."""
    exact = any(key.startswith("features64/") for key in data)
    features = group(data, "features64" if exact else "features")
    if not features:
        raise GoldenError(f"{path}: has no features")
    steps = len(next(iter(features.values())))
    params0, grads = _inputs(path, meta, sorted(features), steps)
    spec = replace(
        spec_of(meta.get("hyperparameters") or {}, {}),
        hidden_size=2, hidden_layers=1, step_mult=_READ_OUT, exp_mult=0.0,
    )  # fmt: skip
    zeros = {name: np.zeros(shape, np.float32) for name, shape in spec.theta_shapes.items()}
    zeros |= {name: np.asarray(meta[name]) for name in _DECAYS}
    spec.check_theta(zeros)
    spec, zeros = _with_decays(spec, zeros, "float64")  # meta-parameters of a checkpoint are float32
    zeros["w1"][:, 0] = 1.0, -1.0
    for name, values in features.items():
        if values.shape != (steps, *params0[name].shape, spec.input_size):
            raise GoldenError(
                f"{path}: features of {name!r} have shape {values.shape}, expected "
                f"{(steps, *params0[name].shape, spec.input_size)}"
            )
    labels = [f"{c.group}[{c.index}]" for c in spec.normalised_columns]
    labels += [f"time[{i}]" for i in range(spec.input_size - len(labels))]
    replays = []
    for k, label in enumerate(labels):
        theta = {**zeros, "w0": zeros["w0"].copy()}
        theta["w0"][k] = 1.0, -1.0
        targets = {
            name: Target(
                params0[name].reshape(1, -1).astype(np.float64)
                - _READ_OUT * values[..., k].reshape(steps, -1).astype(np.float64),
                exact,
            )
            for name, values in features.items()
        }
        replays.append(Replay(spec, theta, targets, hold=True, label=f"column {k} {label}"))
    return Case(params0, grads, tuple(replays), unit=_READ_OUT)


# Frameworks

Runner = Callable[[Replay, Arrays, Arrays, str, str, str], Arrays]
"""(replay, start values, gradients, backend, dtype, device) -> (steps, *shape) values after each step, float64."""


def _runner(framework: str, backend: str, dtype: str | None) -> tuple[Runner, str]:
    runners: dict[str, Runner] = {"numpy": _run_numpy, "torch": _run_torch, "jax": _run_jax}
    if framework not in runners:
        raise GoldenError(f"framework {framework!r}: must be one of {', '.join(FRAMEWORKS)}")
    reference = framework == "numpy" and backend in ("auto", "reference")
    if dtype not in (None, *DTYPES):
        raise GoldenError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    return runners[framework], dtype or ("float64" if reference else "float32")


def _chosen(spec: Spec, framework: str, backend: str, dtype: str, device: str) -> str:
    """Name of the backend that will run. Raises BackendError if a forced one cannot."""
    if framework == "numpy" and backend == "auto":
        return "reference"
    if framework == "numpy" and device != "cpu":
        raise BackendError(
            f"backend={backend!r} runs on a GPU, NumPy's arrays are not there: choose torch or jax"
        )
    kind, _, ordinal = device.partition(":")
    return choose(spec, kind, dtype, backend, ordinal=int(ordinal or 0))


def _device(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def _run_numpy(item: Replay, params0: Arrays, grads: Arrays, backend: str, dtype: str, device: str) -> Arrays:
    from . import native, reference

    theta = {name: value.astype(dtype) for name, value in item.theta.items()}
    kernel = backend == "cpu"
    out: Arrays = {}
    for name, start in params0.items():
        p = np.array(start, dtype)
        state = (native if kernel else reference).init_state(item.spec, p)
        values = []
        for t in range(len(grads[name])):
            g = np.asarray(grads[name][t], dtype)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                if kernel:
                    native.small_fc_step(
                        item.spec, theta, [p], [g], [state], t=t, lr=item.lr, weight_decay=item.weight_decay
                    )
                else:
                    delta, state = reference.update(
                        item.spec, theta, p, g, state, t, lr=item.lr, weight_decay=item.weight_decay,
                        method="matmul" if item.matmul else "elementwise",
                    )  # fmt: skip
                    p = np.asarray(p + delta)
            values.append(p.astype(np.float64))
            p = np.array(start, dtype) if item.hold else p
        out[name] = np.stack(values)
    return out


def _run_torch(item: Replay, params0: Arrays, grads: Arrays, backend: str, dtype: str, device: str) -> Arrays:
    try:
        import torch
    except ImportError as error:
        raise GoldenError(f"PyTorch cannot be imported ({error}): pip install 'lopt-fast[torch]'") from error
    from .torch import LearnedOptimizer

    def tensor(value: np.ndarray) -> Any:
        return torch.tensor(value, dtype=getattr(torch, dtype), device=device)

    try:
        params = {name: torch.nn.Parameter(tensor(start)) for name, start in params0.items()}
    except (RuntimeError, AssertionError) as error:
        raise GoldenError(f"device {device!r} cannot be used by PyTorch: {error}") from error
    optimizer = LearnedOptimizer(
        list(params.values()), Checkpoint(item.spec, item.theta), lr=item.lr,
        weight_decay=item.weight_decay, backend=backend,
    )  # fmt: skip
    values: dict[str, list[np.ndarray]] = {name: [] for name in params}
    for t in range(len(next(iter(grads.values())))):
        for name, p in params.items():
            p.grad = tensor(grads[name][t])
        optimizer.step()
        for name, p in params.items():
            values[name].append(p.detach().cpu().numpy().astype(np.float64))
            if item.hold:
                with torch.no_grad():
                    p.copy_(tensor(params0[name]))
    return {name: np.stack(v) for name, v in values.items()}


def _run_jax(item: Replay, params0: Arrays, grads: Arrays, backend: str, dtype: str, device: str) -> Arrays:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise GoldenError(f"JAX cannot be imported ({error}): pip install 'lopt-fast[jax]'") from error

    with x64(jax, dtype == "float64"):
        start = {name: jnp.asarray(p, dtype) for name, p in params0.items()}
        theta = {name: jnp.asarray(value, dtype) for name, value in item.theta.items()}
        init, step = _jax_step(item.spec, item.lr, item.weight_decay, backend)
        params, state = start, init(start, theta)
        values: dict[str, list[np.ndarray]] = {name: [] for name in params}
        for t in range(len(next(iter(grads.values())))):
            gradient = {name: jnp.asarray(g[t], dtype) for name, g in grads.items()}
            params, state = step(params, gradient, state, theta)
            for name, p in params.items():
                values[name].append(np.asarray(p, np.float64))
            params = start if item.hold else params
    return {name: np.stack(v) for name, v in values.items()}


@cache
def _jax_step(spec: Spec, lr: float, weight_decay: float, backend: str) -> tuple[Any, Any]:
    """Compiled once for all columns of a features file: the meta-parameters are an operand."""
    import jax
    import optax

    from .jax import learned_optimizer

    def make(theta: Any) -> Any:
        return learned_optimizer(spec, lr, weight_decay, theta=theta, backend=backend)

    def step(params: Any, gradient: Any, state: Any, theta: Any) -> tuple[Any, Any]:
        updates, state = make(theta).update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return lambda params, theta: make(theta).init(params), jax.jit(step)


@contextmanager
def x64(jax: Any, wanted: bool) -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", wanted)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


__all__ = ["BackendError", "Case", "GoldenError", "Replay", "Report", "Row", "Target", "load", "verify"]
