"""Replays golden files of persistent evolution strategies: estimates from given losses, and whole truncations.

Both come from google/learned_optimization's TruncatedPES. They are replayed by the estimator `PES` and by
`unroll_with_resets` themselves, hence in JAX. What was drawn at random is read from the file (perturbations, and start
values, targets and steps at resets); everything else is carried on from step to step and from call to call.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..backends import choose
from ..jax import learned_optimizer
from ..published.small_fc import spec_of, theta_of
from ..spec import SpecError
from ..verify import Arrays, GoldenError, Report, Row, group, x64
from .estimators import PES, Estimate, EstimatorError, Truncation
from .tasks.base import Batch, Data, Key, Params, Task
from .unroll import InnerState, MakeOptimizer, Steps, unroll_with_resets

_SIGNS = ("p", "n")
"""theta + perturbation, theta - perturbation."""


def verify(
    path: str | Path, data: Arrays, meta: Mapping[str, Any], framework: str, backend: str, dtype: str | None
) -> Report:
    """Replay the contents of one file. `framework` is the one asked for; the report says that it is JAX.

    Estimates are compared in float64 and in float32 unless `dtype` says which, unrolls in float32. How far a number
    may be off follows from the data: `_estimate_bounds` and `_unroll_bounds`.

    Raises GoldenError for a file that cannot be replayed, BackendError for a backend that cannot be used.
    """
    try:
        scalar = meta.get("sign_delta_loss_scalar")
        estimator = PES(std=float(meta["std"]), sign=None if scalar is None else float(scalar))
        if "in/p_loss" in data:
            dtypes = (dtype,) if dtype else ("float64", "float32")
            rows = [row for name in dtypes for row in _unit(data, estimator, name)]
            label, dtype = "PES", " and ".join(dtypes)
        elif "p_loss" in data:
            dtype = dtype or "float32"
            make, used = _optimizer(data, meta, backend if framework == "jax" else "auto", dtype)
            rows, label = _end_to_end(data, meta, estimator, make, dtype), f"PES, {used}"
        else:
            raise GoldenError("kind 'pes' cannot be replayed without losses, in/p_loss or p_loss")
    except (GoldenError, EstimatorError, SpecError) as error:
        raise GoldenError(f"{path}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise GoldenError(f"{path}: not a complete golden file ({type(error).__name__}: {error})") from error
    if framework != "jax":
        label += ", in JAX whatever --framework says"
    return Report(str(path), "jax", label, dtype, tuple(rows), {})


def _eps(dtype: str) -> float:
    return float(np.finfo(dtype).eps)


def _row(name: str, found: Any, expected: np.ndarray, bound: Any, note: Callable[[Any], str]) -> Row:
    """The element with the largest error relative to its bound; `note` says of its index where that is."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise GoldenError(f"{name} has shape {expected.shape}, expected {found.shape}")
    bound = np.broadcast_to(np.asarray(bound, np.float64), found.shape)
    error = np.abs(found - expected)
    ratio = error / np.maximum(bound, np.finfo(np.float64).tiny)
    i = np.unravel_index(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)), found.shape)
    passed = bool((error <= bound).all())  # False for NaN
    return Row(name, found.shape, float(error[i]), float(bound[i]), passed, note(i))


# Estimates


def _unit(data: Arrays, estimator: PES, dtype: str) -> list[Row]:
    """The estimate from the losses and perturbations of the file, in `dtype`."""
    losses = [data[f"in/{sign}_loss"] for sign in _SIGNS]
    is_done, mask = data["in/is_done"].astype(bool), data["in/mask"].astype(bool)
    memory, vec_pos = group(data, "in/accumulator"), group(data, "in/vec_pos")
    exact = group(data, "out64")
    expected = exact or group(data, "out")
    if not expected:
        raise GoldenError("has no outputs, out64/ or out/")
    with x64(jax, dtype == "float64"):
        given = *(x.astype(dtype) for x in losses), is_done, mask
        estimate = jax.jit(estimator.estimate)(
            Truncation(*given), _cast(memory, dtype), _cast(vec_pos, dtype)
        )
        found = _named(estimate)
    # Outputs in float32 are off themselves.
    eps = _eps(dtype) if exact else _eps(dtype) + _eps("float32")
    wide = [x.astype(np.float64) for x in losses]
    bounds = _estimate_bounds(estimator, wide, mask, memory, vec_pos, eps)
    return [_row(k, v, expected[k], bounds[k], lambda i: dtype) for k, v in found.items()]


def _cast(arrays: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {name: np.asarray(value, dtype) for name, value in arrays.items()}


def _named(estimate: Estimate) -> Arrays:
    """The outputs by their names in a unit file, float64."""
    arrays = {"loss": estimate.loss, "delta_losses": estimate.delta_losses}
    arrays |= {f"grad/{k}": v for k, v in estimate.gradient.items()}
    arrays |= {f"new_accumulator/{k}": v for k, v in estimate.memory.items()}
    return {k: np.asarray(v, np.float64) for k, v in arrays.items()}


def _estimate_bounds(
    estimator: PES,
    losses: list[np.ndarray],
    mask: np.ndarray,
    memory: Arrays,
    vec_pos: Arrays,
    eps: float,
    loss_error: Any = 0.0,
) -> Arrays:
    """How far each output of an estimate may be off, by its name in a unit file.

    A sum of n products, in any order, is off by at most (n + the roundings of a product) eps times the sum of their
    sizes. Here n is steps + pairs; 8 roundings lie between a loss and the gradient. `loss_error`, (steps, pairs) or a
    scalar: how far the losses may be off.
    """
    positive, negative = losses
    roundings = (sum(positive.shape) + 8) * eps
    counted = np.maximum(mask.sum(0), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.where(mask, values, 0.0).sum(0) / counted

    size = np.abs(positive) + np.abs(negative)
    delta = np.abs(positive - negative)
    delta_error = 2 * loss_error + eps * delta
    if estimator.sign is not None:
        delta, delta_error = np.full_like(delta, estimator.sign), np.full_like(delta, eps * estimator.sign)
    weight_error = mean(delta_error) + roundings * mean(delta)
    bounds = {"loss": np.mean(roundings * mean(size) / 2 + mean(loss_error + 0.0 * size))}
    bounds["delta_losses"] = delta_error
    for name, vec in vec_pos.items():
        seen = np.abs(memory[name]) + np.abs(vec).astype(np.float64)
        each = weight_error.reshape(weight_error.shape + (1,) * (seen.ndim - 1)) * seen
        bounds[f"grad/{name}"] = each.mean(0) / (2 * estimator.std**2)
        bounds[f"new_accumulator/{name}"] = eps * seen
    return bounds


# Truncations


class _Quadratic(Task):
    """sum((target - p)^2) with one target for an unroll, which is its data."""

    name, variants, initial_loss = "quadratic", ("quadratic",), 1.0

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def init(self, key: Key) -> Params:
        return jax.random.normal(key, (self.dim,))

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        return jnp.sum((batch - params) ** 2)

    def sample(self, data: Data, key: Key, variant: jax.Array) -> Batch:
        return data


def _optimizer(data: Arrays, meta: Mapping[str, Any], backend: str, dtype: str) -> tuple[MakeOptimizer, str]:
    """(meta-parameters by their names in the file -> the inner optimizer, what it runs on)."""
    text = str(meta["learned_opt"])
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError("not a call by keywords")
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise GoldenError(f"learned_opt {text!r} is not a constructor with constant arguments") from error
    if call.func.id == "AdafacMLPLOpt":
        spec = spec_of(given)
        spec.check_theta(theta_of(group(data, "theta")))
        used = choose(spec, "cpu" if backend in ("auto", "cpu", "reference") else "cuda", dtype, backend)
        return lambda theta: learned_optimizer(spec, theta=theta_of(theta, jnp.stack), backend=backend), used
    if call.func.id == "LearnableSGDM" and given.keys() <= {"initial_lr", "initial_momentum"}:
        return _sgd_with_momentum, "optax"
    raise GoldenError(f"learned_opt {text!r} cannot be replayed; known are AdafacMLPLOpt and LearnableSGDM")


def _sgd_with_momentum(theta: Mapping[str, jax.Array]) -> optax.GradientTransformation:
    momentum = 1 - jnp.exp(theta["one_minus_momentum"])
    return optax.chain(optax.trace(momentum), optax.scale(-jnp.exp(theta["log_lr"])))


def _end_to_end(
    data: Arrays, meta: Mapping[str, Any], estimator: PES, make: MakeOptimizer, dtype: str
) -> list[Row]:
    """All calls, one after the other."""
    if meta["task"] != "FixedDimQuadraticFamily":
        raise GoldenError(f"task {meta['task']!r} cannot be replayed; known is FixedDimQuadraticFamily")
    calls = len(data["p_loss"])
    vec_pos, memory = group(data, "vec_pos"), {k: v[0] for k, v in group(data, "acc_before").items()}
    with x64(jax, dtype == "float64"):
        seen = _unroll(data, int(meta["total"]), make, dtype)
        found = {f"{sign}_{name}": x[:, :, i] for name, x in seen.items() for i, sign in enumerate(_SIGNS)}
        memory, outputs, jitted = _cast(memory, dtype), [], jax.jit(estimator.estimate)
        for c in range(calls):
            of_call = [found[name][c] for name in ("p_loss", "n_loss", "p_is_done", "p_mask")]
            perturbation = _cast({k: v[c] for k, v in vec_pos.items()}, dtype)
            outputs.append((memory, jitted(Truncation(*of_call), memory, perturbation)))
            memory = outputs[-1][1].memory
    for name in vec_pos:
        found[f"acc_before/{name}"] = np.stack([before[name] for before, _ in outputs])
        found[f"acc_after/{name}"] = np.stack([e.memory[name] for _, e in outputs])
        found[f"grad/{name}"] = np.stack([e.gradient[name] for _, e in outputs])
    found["mean_loss"] = np.stack([e.loss for _, e in outputs])
    bounds = _unroll_bounds(data, estimator)
    return [_row(k, v, data[k], bounds.get(k, 0.0), lambda i: f"call {i[0]}") for k, v in found.items()]


def _unroll(data: Arrays, length: int, make: MakeOptimizer, dtype: str) -> dict[str, np.ndarray]:
    """What the unrolls of both signs saw, by the names in the file.

    (calls, steps, 2, pairs) for what belongs to a step, (calls, steps + 1, 2, pairs, ...) for the states around them.
    """
    theta, vec_pos = (_cast(group(data, name), dtype) for name in ("theta", "vec_pos"))
    given = {
        name: np.stack([data[f"{sign}_{name}"] for sign in _SIGNS], axis=2)
        for name in ("inner_params", "target", "inner_step", "done_flag")
    }
    params, targets = given["inner_params"].astype(dtype), given["target"].astype(dtype)
    task = _Quadratic(params.shape[-1])

    def begin(theta: Any, params: jax.Array, step: Any = 0, done: Any = False) -> InnerState:
        return InnerState(
            params, make(theta).init(params), jnp.asarray(step, jnp.int32), jnp.asarray(done), None
        )

    # One step at a time: a truncation may hold several resets, each to a start of its own.
    def one(theta: Any, state: InnerState, fresh: jax.Array, target: jax.Array) -> tuple[InnerState, Steps]:
        lengths = jnp.asarray(length), jnp.asarray(length)
        return unroll_with_resets(
            task, lambda _: make(theta), state, begin(theta, fresh), lengths, target[None]
        )

    advance = jax.jit(jax.vmap(jax.vmap(one)))
    calls, steps = data["p_loss"].shape[:2]
    out: dict[str, list[Any]] = {}

    def note(**values: Any) -> None:
        for name, value in values.items():
            out.setdefault(name, []).append(np.asarray(value))

    state, target = None, targets[0, 0]
    for c in range(calls):
        both = {k: np.stack([x + vec_pos[k][c], x - vec_pos[k][c]]) for k, x in theta.items()}
        if state is None:
            state = jax.jit(jax.vmap(jax.vmap(begin)))(
                both, params[0, 0], given["inner_step"][0, 0], given["done_flag"][0, 0]
            )
        note(inner_params=state.params, inner_step=state.step, done_flag=state.done, target=target)
        for t in range(steps):
            reset = np.asarray(state.done)
            state, seen = advance(both, state, params[c, t + 1], target)
            target = np.where(reset[..., None], targets[c, t + 1], target)
            note(loss=seen.loss[..., 0], is_done=seen.is_done[..., 0], mask=seen.mask[..., 0])
            note(inner_params=state.params, inner_step=state.step, done_flag=state.done, target=target)
            note(iteration=state.step)
    return {name: np.stack(x).reshape(calls, -1, *x[0].shape) for name, x in out.items()}


def _unroll_bounds(data: Arrays, estimator: PES) -> Arrays:
    """How far each array of the file may be off; what is not named may not be off at all.

    Parameters as in every other replay, 4 eps max|p| + 1e-4 max|change of p|; from there through the loss and the
    estimate. All in the eps of float32, in which the file was made.
    """
    eps, out, losses, off = _eps("float32"), {}, [], []
    calls = len(data["p_loss"])
    for sign in _SIGNS:
        params, mask = data[f"{sign}_inner_params"].astype(np.float64), data[f"{sign}_mask"].astype(bool)
        change = np.abs(np.diff(params, axis=1)).max(-1)
        bound = np.zeros(params.shape[:-1])
        for c in range(calls):
            bound[c, 0] = bound[c - 1, -1] if c else 0.0
            bound[c, 1:] = np.where(mask[c], 1e-4 * change[c], 0.0)
        bound += 4 * eps * np.abs(params).max(-1)
        out[f"{sign}_inner_params"] = bound[..., None]
        distance = np.abs(data[f"{sign}_target"] - params)[:, :-1]
        losses.append(data[f"{sign}_loss"].astype(np.float64))
        rounding = (params.shape[-1] + 2) * eps * losses[-1]
        off.append(np.where(mask, 2 * distance.sum(-1) * bound[:, :-1] + rounding, 0.0))
        out[f"{sign}_loss"] = off[-1]
    vec_pos, before = group(data, "vec_pos"), group(data, "acc_before")
    estimates = [
        _estimate_bounds(
            estimator, [x[c] for x in losses], data["p_mask"][c].astype(bool),
            {k: x[c] for k, x in before.items()}, {k: x[c] for k, x in vec_pos.items()},
            eps, np.maximum(off[0][c], off[1][c]),
        )
        for c in range(calls)
    ]  # fmt: skip
    out["mean_loss"] = np.stack([e["loss"] for e in estimates])
    for name in vec_pos:
        out[f"grad/{name}"] = np.stack([e[f"grad/{name}"] for e in estimates])
        # The sum of up to `calls` perturbations, the first of which is given.
        after = calls * np.stack([e[f"new_accumulator/{name}"] for e in estimates])
        out[f"acc_after/{name}"] = after
        out[f"acc_before/{name}"] = np.concatenate([np.zeros_like(after[:1]), after[:-1]])
    return out
