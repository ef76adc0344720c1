"""Contenders in JAX: a step under one `jit`, parameters and state donated.

AdamW and framework code are `tx.update` and `optax.apply_updates`, `lopt_fast` too; `lopt_fast_step` is its own `step`,
`lopt_fast_loop` many of these in one call, and `dispatch` hands the arrays of that back as they are.

Gradients are arguments, fresh ones for each sample, made and freed outside of the timed region. In a training step they
would be intermediates, whose memory XLA may reuse. `lopt_fast`, whose custom call writes the updates over the
gradients, has that memory too: they are donated, and since XLA reuses the memory of a donated argument only for a
result, it returns the updates as well. Nothing is computed or moved for that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import reference
from .contenders import (
    BETA1,
    BETA2,
    EPSILON,
    LR,
    WEIGHT_DECAY,
    Arrays,
    Config,
    Contender,
    Kind,
    checkpoint,
    meta_parameters,
)

Step = Callable[[Any, Any, Any], tuple[Any, ...]]
"""(parameters, state, gradients) -> (parameters, state, ...), not yet under jit."""


def build(kind: Kind, config: Config, parameters: Arrays, gradients: Arrays) -> Contender:
    transformation = _transformation(kind, config)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, ...]:
        if kind == "dispatch":
            return jax.lax.optimization_barrier((params, state))  # not known to be the arguments
        if kind == "lopt_fast_step":
            return transformation.step(grads, state, params)
        updates, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, updates) if kind == "lopt_fast" else (params, state)

    def start(params: Any) -> tuple[Any, Any]:
        return params, transformation.init(params)

    if kind == "lopt_fast_loop":
        return _loop(kind, config, parameters, gradients, transformation)
    overwrites = kind == "lopt_fast" and config.donate_gradients
    return wrap(kind, config, parameters, gradients, start, step, overwrites=overwrites)


def wrap(
    kind: str,
    config: Config,
    parameters: Arrays,
    gradients: Arrays,
    start: Callable[[Any], tuple[Any, Any]],
    step: Step,
    read: Callable[[Any, Any], Any] = lambda params, state: params,
    *,
    overwrites: bool = False,
) -> Contender:
    """Contender around `step` under jit, from `start(parameters)`; `read(parameters, state)` finds the parameters.

    overwrites: a result of `step` takes the memory of the gradients.
    """
    donated = (0, 1, 2) if overwrites else (0, 1)
    jitted = jax.jit(step, donate_argnums=donated, keep_unused=True)
    copies = jax.jit(lambda grads: [jnp.copy(g) for g in grads])
    # A copy, since an array that shares NumPy's memory could not be donated; on a named device, as the outputs will
    # be: else the second step would be compiled anew.
    device = jax.devices(config.device)[0]
    params, state = jax.device_put(start([jnp.array(p) for p in parameters]), device)
    fresh = jax.device_put([jnp.array(g) for g in gradients], device)
    waiting: list[list[jax.Array]] = []
    used: list[Any] = []  # freed by `prepare`: that takes milliseconds for large arrays

    def prepare(steps: int) -> None:
        used.clear()
        del waiting[steps:]
        while len(waiting) < steps:
            waiting.append(copies(fresh))
        jax.block_until_ready(waiting)

    def run(steps: int) -> None:
        nonlocal params, state
        for _ in range(steps):
            grads = waiting.pop()
            params, state, *rest = jitted(params, state, grads)
            used.append((grads, rest))
        # All results of a program are there at once; asking each of 300 for it would take 0.2 ms of Python.
        jax.tree.leaves((params, state))[-1].block_until_ready()

    def values() -> list[np.ndarray]:
        return [np.asarray(p) for p in read(params, state)]

    return Contender("jax", kind, prepare, run, values)


def _loop(kind: str, config: Config, parameters: Arrays, gradients: Arrays, transformation: Any) -> Contender:
    """All steps of `run` in one program; the gradients stay as they are."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def steps_of(params: Any, state: Any, grads: Any, steps: int) -> Any:
        def one(_: Any, carry: Any) -> Any:
            params, state = carry
            return transformation.step(grads, state, params)

        return jax.lax.fori_loop(0, steps, one, (params, state))

    device = jax.devices(config.device)[0]
    params = jax.device_put([jnp.array(p) for p in parameters], device)
    grads = jax.device_put([jnp.array(g) for g in gradients], device)
    state = transformation.init(params)

    def run(steps: int) -> None:
        nonlocal params, state
        params, state = steps_of(params, state, grads, steps)
        params[-1].block_until_ready()

    return Contender("jax", kind, lambda steps: None, run, lambda: [np.asarray(p) for p in params])


def _transformation(kind: Kind, config: Config) -> Any:
    if kind == "adamw":
        return optax.adamw(LR, b1=BETA1, b2=BETA2, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    if kind.startswith("lopt_fast") or kind == "dispatch":
        from ..jax import learned_optimizer

        return learned_optimizer(checkpoint(config), backend=config.backend)
    return _framework_transformation(kind, config)


def _framework_transformation(kind: Kind, config: Config) -> Any:
    spec = config.spec
    method: Literal["matmul", "elementwise"] = "matmul" if kind == "matmul" else "elementwise"
    theta = {name: jnp.asarray(a) for name, a in meta_parameters(spec).items()}

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), [reference.init_state(spec, p) for p in params]

    def update(grads: Any, state: Any, params: Any) -> Any:
        t, states = state
        pairs = [
            reference.update(spec, theta, p, g, s, t, method=method)
            for p, g, s in zip(params, grads, states, strict=True)
        ]
        return [delta for delta, _ in pairs], (t + 1, [s for _, s in pairs])

    return optax.GradientTransformation(init, update)
