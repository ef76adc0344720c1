"""Inner training: an optimizer trains a task for some steps, recording the loss before each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ..jax import learned_optimizer
from ..spec import Spec
from .tasks import Batch, Key, Params, Task

Theta: TypeAlias = Mapping[str, jax.Array]
MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
"""Meta-parameters -> the inner optimizer. What they are is up to it: theta, or a learning rate."""


class InnerState(NamedTuple):
    """A task being trained."""

    params: Params
    optimizer_state: Any
    step: jax.Array
    """Inner steps made so far."""


def inner_optimizer(spec: Spec, theta: Theta) -> optax.GradientTransformation:
    """The optimizer `spec` with meta-parameters `theta`, which may be traced and batched."""
    return learned_optimizer(spec, theta=theta)


def start(task: Task, optimizer: optax.GradientTransformation, key: Key) -> InnerState:
    """A freshly initialised network."""
    params = task.init(key)
    return InnerState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def sample_batches(task: Task, key: Key, variant: jax.Array, steps: int) -> Batch:
    """The batches of `steps` inner steps; leaves (steps, ...)."""
    return jax.vmap(lambda k: task.sample(k, variant))(jax.random.split(key, steps))


def unroll(
    task: Task, optimizer: optax.GradientTransformation, state: InnerState, batches: Batch
) -> tuple[InnerState, jax.Array]:
    """Train on one batch after the other; returns the state afterwards and the (steps,) training losses."""

    def inner_step(state: InnerState, batch: Batch) -> tuple[InnerState, jax.Array]:
        loss, grads = jax.value_and_grad(task.loss)(state.params, batch)
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
        return InnerState(optax.apply_updates(state.params, updates), optimizer_state, state.step + 1), loss

    return jax.lax.scan(inner_step, state, batches)
