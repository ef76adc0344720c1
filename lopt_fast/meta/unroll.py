"""Inner training: an optimizer trains a task for some steps, recording the loss before each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ..jax import learned_optimizer
from ..spec import Spec
from .tasks.base import Batch, Data, Key, Params, Task

Theta: TypeAlias = Mapping[str, jax.Array]
MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
"""Meta-parameters -> the inner optimizer. What they are is up to it: theta, or a learning rate."""


class InnerState(NamedTuple):
    """A task being trained."""

    params: Params
    """As the optimizer sees them: divided by `scale`."""
    optimizer_state: Any
    step: jax.Array
    """int32 [], inner steps made so far."""
    done: jax.Array
    """bool [], whether the last step was the unroll's last (see `unroll_with_resets`)."""
    scale: Params | None
    """Of the task's re-parametrisation; None without one."""


def inner_optimizer(spec: Spec, theta: Theta) -> optax.GradientTransformation:
    """The optimizer `spec` with meta-parameters `theta`, which may be traced and batched."""
    return learned_optimizer(spec, theta=theta)


def start(task: Task, optimizer: optax.GradientTransformation, key: Key) -> InnerState:
    """A freshly initialised network."""
    init_key, scale_key = jax.random.split(key)
    params, scale = task.init(init_key), None
    if task.reparametrisation is not None:
        scale = task.reparametrisation.sample(scale_key, params)
        params = jax.tree.map(jnp.divide, params, scale)
    state = InnerState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), bool), scale)
    # Without weak types: the state after a step has none, and would be compiled for again.
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)


def sampler(task: Task, data: Data, variant: jax.Array) -> Callable[[Key], Batch]:
    """A key -> a batch: `draw` of the functions below, with keys in place of batches.

    Inside vmap over networks that share the keys, each batch is drawn once for all of them.
    """
    return lambda key: task.sample(data, key, variant)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def inner_step(
    task: Task, optimizer: optax.GradientTransformation, state: InnerState, batch: Batch
) -> tuple[InnerState, jax.Array]:
    """(state after one step, training loss before it)."""

    def loss_of(params: Params) -> jax.Array:
        if state.scale is not None:
            params = jax.tree.map(jnp.multiply, params, state.scale)
        return task.loss(params, batch)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, optimizer_state=optimizer_state, step=state.step + 1), loss


def unroll(
    task: Task,
    optimizer: optax.GradientTransformation,
    state: InnerState,
    batches: Any,
    draw: Callable[[Any], Batch] = _as_it_is,
) -> tuple[InnerState, jax.Array]:
    """Train on one batch after the other; returns the state afterwards and the (steps,) training losses.

    Leaves of `batches` have a leading axis (steps,); `draw` makes a batch of what they hold for a step.
    """
    return jax.lax.scan(lambda s, x: inner_step(task, optimizer, s, draw(x)), state, batches)


class Steps(NamedTuple):
    """What `unroll_with_resets` records of each step; leaves (steps,)."""

    loss: jax.Array
    is_done: jax.Array
    """Whether this step was the last of its unroll."""
    mask: jax.Array
    """False where no training step was made: at a reset."""


def unroll_with_resets(
    task: Task,
    optimizer: optax.GradientTransformation,
    state: InnerState,
    fresh: InnerState,
    length: jax.Array,
    batches: Any,
    draw: Callable[[Any], Batch] = _as_it_is,
) -> tuple[InnerState, Steps]:
    """`unroll`, but where an unroll has made `length` steps the next step is a reset to `fresh`.

    A reset takes the place of a training step: loss 0, mask False (as in google/learned_optimization).
    """

    def step(state: InnerState, x: Any) -> tuple[InnerState, Steps]:
        trained, loss = inner_step(task, optimizer, state, draw(x))
        trained = trained._replace(done=trained.step >= length)
        after = jax.tree.map(lambda a, b: jnp.where(state.done, a, b), fresh, trained)
        return after, Steps(jnp.where(state.done, 0.0, loss), after.done, ~state.done)

    return jax.lax.scan(step, state, batches)
