"""Inner training: an optimizer trains a task for some steps, recording the loss before each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ..architectures import Architecture
from ..jax import learned_optimizer
from ..spec import Spec
from .tasks.base import Batch, Data, Key, Params, Task

Theta: TypeAlias = Mapping[str, jax.Array]
MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
"""Meta-parameters -> the inner optimizer. What they are is up to it: theta, or a learning rate."""
MakeForLength: TypeAlias = Callable[[Any, Any], optax.GradientTransformation]
"""The same from (meta-parameters, number of steps of the unroll), both of which may be traced."""


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


def inner_optimizer(spec: Spec | Architecture, theta: Theta, num_steps: Any) -> optax.GradientTransformation:
    """The optimizer `spec` with meta-parameters `theta`, for unrolls of `num_steps`; both may be traced and batched."""
    return learned_optimizer(spec, theta=theta, num_steps=num_steps)


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
    """(state after one step, training loss before it, which the optimizer sees as well)."""

    def loss_of(params: Params) -> jax.Array:
        if state.scale is not None:
            params = jax.tree.map(jnp.multiply, params, state.scale)
        return task.loss(params, batch)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    update = optax.with_extra_args_support(optimizer).update
    updates, optimizer_state = update(grads, state.optimizer_state, state.params, value=loss)
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
    make: Callable[[jax.Array], optax.GradientTransformation],
    state: InnerState,
    fresh: InnerState,
    lengths: tuple[jax.Array, jax.Array],
    batches: Any,
    draw: Callable[[Any], Batch] = _as_it_is,
) -> tuple[InnerState, Steps]:
    """`unroll`, but where an unroll has made as many steps as it is long the next step is a reset to `fresh`.

    lengths: of this unroll, and of those that begin here; `make` is given that of the present one.
    A reset takes the place of a training step: loss 0, mask False (as in google/learned_optimization).
    """
    first, later = lengths

    def step(carry: tuple[InnerState, jax.Array], x: Any) -> tuple[tuple[InnerState, jax.Array], Steps]:
        state, length = carry
        trained, loss = inner_step(task, make(length), state, draw(x))
        trained = trained._replace(done=trained.step >= length)
        after = jax.tree.map(lambda a, b: jnp.where(state.done, a, b), fresh, trained)
        seen = Steps(jnp.where(state.done, 0.0, loss), after.done, ~state.done)
        return (after, jnp.where(state.done, later, length)), seen

    (state, _), steps = jax.lax.scan(step, (state, jnp.asarray(first)), batches)
    return state, steps
