"""The built-in tasks in JAX; gradient and update are compiled apart, to time each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..jax import learned_optimizer
from ..meta import tasks
from .choices import Choice
from .problems import Problem, QuadraticProblem, TextProblem

Params = Any


class JaxTrainer:
    """Implements `loop.Trainer`. `steps` is the length of the training."""

    def __init__(self, problem: Problem, choice: Choice, seed: int, batch_size: int, steps: int) -> None:
        init, loss = _functions(problem)
        self._problem, self._seed, self._batch_size = problem, seed, batch_size
        self._params: Params = jax.jit(init)(jax.random.key(seed))
        transformation = _transformation(choice, steps)
        self._state = jax.jit(transformation.init)(self._params)
        self.parameters = sum(p.size for p in jax.tree.leaves(self._params))

        def update(params: Params, state: Any, gradient: Params, loss: jax.Array) -> tuple[Params, Any]:
            if hasattr(transformation, "step"):  # ours: writes the new parameters, no update in between
                return transformation.step(gradient, state, params, value=loss)
            updates, state = transformation.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        # Compiled here, so that no step waits for it.
        self._gradient_of = jax.jit(jax.value_and_grad(loss)).lower(self._params, self._batch(0)).compile()
        arguments = self._params, self._state, self._params, jnp.zeros(())
        self._update = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile()

    def _batch(self, step: int) -> Any:
        arrays = self._problem.batch(np.random.default_rng((self._seed, step)), self._batch_size)
        return _as_jax(arrays)

    def gradient(self, step: int) -> float:
        self._current, self._gradient = jax.block_until_ready(
            self._gradient_of(self._params, self._batch(step))
        )
        return float(self._current)

    def update(self) -> None:
        self._params, self._state = jax.block_until_ready(
            self._update(self._params, self._state, self._gradient, self._current)
        )

    def state_bytes(self) -> int:
        return sum(a.nbytes for a in jax.tree.leaves(self._state))


def _as_jax(batch: tuple[np.ndarray, ...]) -> Any:
    arrays = tuple(jnp.asarray(a, jnp.int32 if a.dtype == np.int64 else a.dtype) for a in batch)
    return arrays[0] if len(arrays) == 1 else arrays


def _transformation(choice: Choice, steps: int) -> Any:
    if choice.checkpoint is not None:
        return learned_optimizer(
            choice.checkpoint, choice.lr, choice.weight_decay, statistics=choice.statistics, num_steps=steps
        )
    if choice.name == "adamw":
        return optax.adamw(choice.lr, weight_decay=choice.weight_decay)
    return optax.chain(optax.add_decayed_weights(choice.weight_decay), optax.sgd(choice.lr, momentum=0.9))


def _functions(problem: Problem) -> tuple[Callable[..., Params], Callable[..., jax.Array]]:
    """(init, loss) of the network."""
    if isinstance(problem, QuadraticProblem):

        def loss(params: Params, batch: Any) -> jax.Array:
            terms = zip(params, problem.curvatures, problem.targets, strict=True)
            return sum((0.5 * (h * (p - t) ** 2).sum() for p, h, t in terms), jnp.zeros(()))

        return lambda key: [jnp.zeros(t.shape) for t in problem.targets], loss
    task: tasks.Task
    if isinstance(problem, TextProblem):
        shown = tasks.Text(problem.name, problem.text[: problem.context + 1])  # batches are drawn here
        task = tasks.Transformer(
            [shown], width=problem.width, layers=problem.layers, heads=problem.heads, context=problem.context
        )
    else:
        images = [tasks.Dataset(problem.name, problem.images[:1], problem.labels[:1])]
        if problem.convolutions:
            task = tasks.Conv(images, channels=problem.hidden, strides=[2] * len(problem.hidden))
        else:
            task = tasks.MLP(images, hidden=problem.hidden)
    return task.init, task.loss
