"""Runs a replay in NumPy, PyTorch or JAX."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np

from ..architectures.base import Architecture
from ..architectures.base import Inputs as StepInputs
from ..backends import BACKENDS, BackendError, choose
from ..checkpoint import Checkpoint
from ..errors import install
from ..operations import ModelTensors, Reference
from ..operations.accumulators import initial_state
from ..spec import Spec
from .golden import Arrays, GoldenError, Inputs, Replay

FRAMEWORKS = ("numpy", "torch", "jax")
DTYPES = ("float32", "float64")

Runner = Callable[[Replay, Inputs, str, str, str], tuple[Arrays, str]]
"""(replay, inputs, backend, dtype, device) -> ((steps, *shape) values after each step in float64, backend used)"""


def runner(framework: str, backend: str, dtype: str | None) -> tuple[Runner, str]:
    """What runs a replay in `framework`, and the dtype it does so in. Raises GoldenError for unknown names."""
    runners: dict[str, Runner] = {"numpy": _run_numpy, "torch": _run_torch, "jax": _run_jax}
    if framework not in runners:
        raise GoldenError(f"framework {framework!r}: must be one of {', '.join(FRAMEWORKS)}")
    reference = framework == "numpy" and backend in ("auto", "reference")
    if dtype not in (None, *DTYPES):
        raise GoldenError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    return runners[framework], dtype or ("float64" if reference else "float32")


class _Trajectory:
    """Values of each tensor after each step."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, name: str, value: Any) -> None:
        self._values[name].append(np.array(value, np.float64))

    def stacked(self) -> Arrays:
        return {name: np.stack(values) for name, values in self._values.items()}


# NumPy


def _run_numpy(item: Replay, inputs: Inputs, backend: str, dtype: str, device: str) -> tuple[Arrays, str]:
    if device != "cpu":
        raise BackendError(
            f"backend={backend!r} runs on a GPU, NumPy's arrays are not there: choose torch or jax"
        )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if isinstance(item.spec, Spec):
            chosen = "reference" if backend == "auto" else choose(item.spec, device, dtype, backend)
            return _small_fc(item, item.spec, inputs, dtype, chosen == "cpu"), chosen
        if backend not in ("auto", "reference"):
            known = (
                f"must be one of {', '.join(BACKENDS)}"
                if backend not in BACKENDS
                else "NumPy has the reference"
            )
            raise BackendError(f"backend={backend!r} of {item.spec.NAME}: {known}")
        return _architecture(item, item.spec, inputs, dtype), "reference"


def _small_fc(item: Replay, spec: Spec, inputs: Inputs, dtype: str, kernel: bool) -> Arrays:
    from .. import native, reference

    theta = {name: value.astype(dtype) for name, value in item.theta.items()}
    out = _Trajectory()
    for name, start in inputs.params0.items():
        p = np.array(start, dtype)
        state = (native if kernel else reference).init_state(spec, p)
        lr = item.lr * item.lr_scale.get(name, 1.0)
        for t in range(inputs.steps):
            g = np.asarray(inputs.grads[name][t], dtype)
            if kernel:
                native.small_fc_step(
                    spec, theta, [p], [g], [state], t=t, lr=lr, weight_decay=item.weight_decay
                )
            else:
                delta, state = reference.update(
                    spec, theta, p, g, state, t, lr=lr, weight_decay=item.weight_decay,
                    method="matmul" if item.matmul else "elementwise",
                )  # fmt: skip
                p = np.asarray(p + delta)
            out.add(name, p)
            p = np.array(start, dtype) if item.hold else p
    return out.stacked()


def _architecture(item: Replay, spec: Architecture, inputs: Inputs, dtype: str) -> Arrays:
    theta = {name: np.asarray(value, dtype) for name, value in item.theta.items()}
    names = list(inputs.params0)
    params = [inputs.params0[name].astype(dtype) for name in names]
    states = [initial_state(spec.accumulates(n, p.shape), p) for n, p in zip(names, params, strict=True)]
    rows, shared = spec.init_rows(theta, [p.shape for p in params]), spec.init_shared(theta)
    lr = [item.lr * item.lr_scale.get(name, 1.0) for name in names]
    out, t = _Trajectory(), 0
    for step in range(inputs.steps):
        loss = None if inputs.losses is None else inputs.losses[step].astype(dtype)
        if inputs.is_validation(step):
            shared = spec.observe_validation(theta, shared, loss)
        else:
            tensors = ModelTensors(
                params, [inputs.grads[n][step].astype(dtype) for n in names], states, lr,
                [item.weight_decay] * len(names), names=names, apply=True,
            )  # fmt: skip
            update = spec.step(
                Reference, theta, tensors, rows, shared, StepInputs(np.asarray(t), item.num_steps, loss)
            )
            params, states, rows, shared, t = update.outputs, update.states, update.rows, update.shared, t + 1
        for name, p in zip(names, params, strict=True):
            out.add(name, p)
    return out.stacked()


# PyTorch


def _run_torch(item: Replay, inputs: Inputs, backend: str, dtype: str, device: str) -> tuple[Arrays, str]:
    try:
        import torch
    except ImportError as error:
        raise GoldenError(f"PyTorch cannot be imported ({error}): {install('torch')}") from error
    from ..torch import LearnedOptimizer

    def tensor(value: np.ndarray) -> Any:
        return torch.tensor(value, dtype=getattr(torch, dtype), device=device)

    try:
        params = {name: torch.nn.Parameter(tensor(start)) for name, start in inputs.params0.items()}
    except (RuntimeError, AssertionError) as error:
        raise GoldenError(f"device {device!r} cannot be used by PyTorch: {error}") from error
    groups: defaultdict[float, list[tuple[str, Any]]] = defaultdict(list)
    for name, p in params.items():
        groups[item.lr * item.lr_scale.get(name, 1.0)].append((name, p))
    optimizer = LearnedOptimizer(
        [{"params": named, "lr": lr} for lr, named in groups.items()], Checkpoint(item.spec, item.theta),
        weight_decay=item.weight_decay, backend=backend, num_steps=item.num_steps,
    )  # fmt: skip
    out = _Trajectory()
    for t in range(inputs.steps):
        loss = None if inputs.losses is None else tensor(inputs.losses[t])
        if inputs.is_validation(t):
            optimizer.observe_validation(loss)
        else:
            for name, p in params.items():
                p.grad = tensor(inputs.grads[name][t])
            optimizer.step(loss=loss)
        for name, p in params.items():
            out.add(name, p.detach().cpu().numpy())
            if item.hold:
                with torch.no_grad():
                    p.copy_(tensor(inputs.params0[name]))
    return out.stacked(), ", ".join(sorted(set(optimizer.backends.values())))


# JAX


def _run_jax(item: Replay, inputs: Inputs, backend: str, dtype: str, _: str) -> tuple[Arrays, str]:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise GoldenError(f"JAX cannot be imported ({error}): {install('jax')}") from error

    spec, chosen = item.spec, _backend_in_jax(item.spec, backend, dtype)
    # The CPU kernels are for programs on the CPU, which need not be where JAX puts them.
    place = jax.default_device(jax.devices("cpu")[0]) if chosen == "cpu" else nullcontext()
    with x64(jax, dtype == "float64"), place:
        start = {name: jnp.asarray(p, dtype) for name, p in inputs.params0.items()}
        theta = {name: jnp.asarray(value, dtype) for name, value in item.theta.items()}
        scale = {name: jnp.asarray(item.lr_scale.get(name, 1.0), dtype) for name in start}
        init, step, observe = _jax_steps(spec, item.lr, item.weight_decay, backend, item.num_steps)
        params, state = start, init(start, theta)
        out = _Trajectory()
        for t in range(inputs.steps):
            loss = None if inputs.losses is None else jnp.asarray(inputs.losses[t], dtype)
            if inputs.is_validation(t):
                state = observe(state, loss, theta)
            else:
                gradient = {name: jnp.asarray(g[t], dtype) for name, g in inputs.grads.items()}
                params, state = step(params, gradient, state, theta, scale, loss)
            for name, p in params.items():
                out.add(name, p)
            params = start if item.hold else params
    return out.stacked(), chosen


def _backend_in_jax(spec: Spec | Architecture, backend: str, dtype: str) -> str:
    """The backend that is used. Raises BackendError."""
    from ..jax.call import known_platforms, resolve
    from ..jax.grouped import Grouped
    from ..jax.operations import CustomCalls, implementation

    if isinstance(spec, Spec):
        kernels = resolve(spec, [dtype], backend).kernels
    else:
        found = implementation(spec, backend)
        kernels = () if found is Grouped else ("cpu",) if isinstance(found, CustomCalls) else ("cuda",)
    wanted = known_platforms()[0] if backend == "auto" else backend
    return wanted if wanted in kernels else "reference"


@cache
def _jax_steps(
    spec: Spec | Architecture, lr: float, weight_decay: float, backend: str, num_steps: int | None
) -> tuple[Any, Any, Any]:
    """(init, step, observe_validation), compiled once for all columns of a features file: the meta-parameters are an
    operand."""
    import jax
    import optax

    from ..jax import learned_optimizer

    def make(theta: Any) -> Any:
        return learned_optimizer(spec, lr, weight_decay, theta=theta, backend=backend, num_steps=num_steps)

    def step(params: Any, gradient: Any, state: Any, theta: Any, scale: Any, loss: Any) -> tuple[Any, Any]:
        updates, state = make(theta).update(gradient, state, params, value=loss)
        updates = jax.tree.map(lambda update, factor: factor * update, updates, scale)
        return optax.apply_updates(params, updates), state

    def observe(state: Any, loss: Any, theta: Any) -> Any:
        return make(theta).observe_validation(state, loss)

    return lambda params, theta: make(theta).init(params), jax.jit(step), jax.jit(observe)


@contextmanager
def x64(jax: Any, wanted: bool) -> Iterator[None]:
    """JAX with or without 64-bit types."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", wanted)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
