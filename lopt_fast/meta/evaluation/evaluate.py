"""Training losses of optimizers on tasks: many simulations in one compiled program, on all devices of this process.

A simulation is one network trained with one setting of an optimizer. Simulations with the same seed begin with the
same network and see the same batches, whatever the optimizer, its setting, the other simulations and the devices.
Meta-training does not use these seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...architectures import Architecture
from ...spec import Spec
from .. import devices as local
from ..tasks.base import Data, Task
from ..unroll import InnerState, MakeOptimizer, Theta, inner_optimizer, inner_step, sampler, start, unroll
from .curves import clipped, is_clipped, last, standard_error

FIRST_SEED = 1_000_000
"""Evaluation seeds are counted from here."""

MEMORY = 2**30
"""Bytes that the simulations of one program may take; more of them run one after the other."""

_CPU_SIMULATIONS = 8  # at once on a device: more do not fit its caches
_STRIDE = 50  # steps of one call of the compiled program; more than a run needs are thrown away
_FILLING = 1.6  # a compiled program is used again, if the filled-up rounds make at most so much more work
_SMALLEST_RATIO = 1e-6  # of mean and initial loss, where its logarithm is taken

_EACH = PartitionSpec("simulations")

Report: TypeAlias = Callable[[int], None]
"""Called with the inner steps (of all simulations together) made since the last call."""


@dataclass(frozen=True)
class Result:
    """One optimizer with one setting on one data set of one task. Losses are training losses, clipped (`clipped`)."""

    task: str
    dataset: str
    steps: int
    seeds: int
    initial_loss: float
    """Loss of a network that knows nothing."""
    mean_loss: float
    """Over all steps and seeds."""
    standard_error: float
    """Of `mean_loss`, over the seeds; NaN for one seed."""
    last_loss: float
    """Mean over the last 5 % of the steps."""
    last_standard_error: float
    diverged: int
    """Seeds in which some of the last 5 % of the losses were clipped."""


def stack(settings: Sequence[Any]) -> Any:
    """Settings (numbers or trees of arrays, all alike) as one tree whose leaves have a leading axis (settings,)."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(x, np.float32) for x in leaves]), *settings)


class Simulator:
    """Trains one task with one kind of optimizer; one compilation serves all settings, data sets, seeds and lengths.

    `make_optimizer` is traced: the setting that it gets holds float32 arrays. Simulations are sharded over `devices`
    (by default those of this process that `devices.setup` chose), and run in as many rounds as `memory` bytes demand.
    `spikes`: whether `losses` may be asked for spikes.
    """

    def __init__(
        self,
        make_optimizer: MakeOptimizer,
        task: Task,
        *,
        devices: Sequence[Any] | None = None,
        memory: int = MEMORY,
        spikes: bool = False,
    ) -> None:
        self.task, self._make, self._memory, self._spikes = task, make_optimizer, memory, spikes
        self._mesh = Mesh(np.array(devices or local.mesh().local_devices), ("simulations",))
        self._sharding = NamedSharding(self._mesh, _EACH)
        self._data = jax.device_put(task.data, NamedSharding(self._mesh, PartitionSpec()))
        self._sizes: set[int] = set()  # numbers of simulations that there are programs for
        everywhere = PartitionSpec()
        sharded = partial(jax.shard_map, mesh=self._mesh, out_specs=_EACH, check_vma=False)
        self._start = jax.jit(sharded(jax.vmap(self._first), in_specs=(_EACH,)), out_shardings=self._sharding)
        self._advance = jax.jit(
            sharded(
                jax.vmap(self._some_steps, (None, None, 0, 0)),
                in_specs=(everywhere, everywhere, _EACH, _EACH),
            ),
            out_shardings=self._sharding,
            donate_argnums=3,
        )

    def losses(
        self,
        settings: Sequence[Any],
        variants: Sequence[int],
        steps: int,
        seeds: int,
        report: Report | None = None,
        spikes: Sequence[tuple[int, float]] | None = None,
    ) -> np.ndarray:
        """(settings, variants, seeds, steps) float32 training losses, each before its step, as they came.

        spikes: for each setting (step, factor): the gradient of that step is multiplied by the factor.
        """
        shape = (len(settings), len(variants), seeds)
        which, variant, seed = (x.reshape(-1) for x in np.indices(shape, np.int32))
        at, factor = np.transpose(spikes) if spikes else np.tile([[-1.0], [1.0]], len(settings))
        everything = _Simulation(
            setting=jax.tree.map(lambda x: x[which], stack(settings)),
            variant=np.asarray(variants, np.int32)[variant],
            seed=FIRST_SEED + seed,
            spike_step=at.astype(np.int32)[which],
            spike=factor.astype(np.float32)[which],
        )
        size, rounds = self._size(len(which), everything), []
        for first in range(0, len(which), size):
            # The last round is filled up with copies, so that all have one compiled shape.
            index = np.minimum(np.arange(first, first + size), len(which) - 1)
            some = jax.device_put(jax.tree.map(lambda x: x[index], everything), self._sharding)  # noqa: B023
            rounds.append(self._run(some, steps, min(size, len(which) - first), report))
        return np.concatenate(rounds).reshape(*shape, steps)

    def _run(self, simulations: _Simulation, steps: int, count: int, report: Report | None) -> np.ndarray:
        states, parts = self._start(simulations), []
        for first in range(0, steps, _STRIDE):
            states, losses = self._advance(self._data, first, simulations, states)
            parts.append(np.asarray(losses)[:count, : steps - first])
            if report is not None:
                report(parts[-1].size)
        return np.concatenate(parts, axis=1)

    def _optimizer(self, s: _Simulation) -> optax.GradientTransformation:
        optimizer = self._make(s.setting)
        return optax.chain(_spike(s.spike_step, s.spike), optimizer) if self._spikes else optimizer

    def _first(self, s: _Simulation) -> InnerState:
        return start(self.task, self._optimizer(s), jax.random.fold_in(jax.random.key(s.seed), 0))

    def _some_steps(
        self, data: Data, first: jax.Array, s: _Simulation, state: InnerState
    ) -> tuple[InnerState, jax.Array]:
        batches = jax.random.fold_in(jax.random.key(s.seed), 1)
        draw = sampler(self.task, data, s.variant)
        steps = first + jnp.arange(_STRIDE)
        return unroll(
            self.task, self._optimizer(s), state, steps, lambda i: draw(jax.random.fold_in(batches, i))
        )

    def _size(self, simulations: int, everything: _Simulation) -> int:
        """How many simulations run at once: a multiple of the number of devices."""
        fitting = [n for n in self._sizes if math.ceil(simulations / n) * n <= _FILLING * simulations]
        if fitting:
            return max(fitting)
        each = _step_bytes(self.task, self._optimizer, self._data, everything)
        devices = self._mesh.size
        most = max(1, self._memory // each // devices)
        if self._mesh.devices.flat[0].platform == "cpu":
            most = min(most, _CPU_SIMULATIONS)
        self._sizes.add(size := devices * min(most, math.ceil(simulations / devices)))
        return size


class _Simulation(NamedTuple):
    """Leaves with a leading axis (simulations,), or without it inside vmap."""

    setting: Any
    variant: Any
    seed: Any
    spike_step: Any
    spike: Any


def _spike(at: jax.Array, factor: jax.Array) -> optax.GradientTransformation:
    """Multiplies the gradient of step `at` by `factor`."""

    def update(grads: Any, count: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        del params
        return jax.tree.map(lambda g: jnp.where(count == at, factor * g, g), grads), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def _step_bytes(
    task: Task,
    optimizer: Callable[[_Simulation], optax.GradientTransformation],
    data: Data,
    everything: _Simulation,
) -> int:
    """All intermediate values of a step of one simulation: more than what lives at once, and of the right order."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), everything)

    def step(data: Data, s: _Simulation) -> Any:
        key, made = jax.random.key(s.seed), optimizer(s)
        return inner_step(task, made, start(task, made, key), sampler(task, data, s.variant)(key))

    values = (v.aval for e in jax.make_jaxpr(step)(data, one).eqns for v in e.outvars)
    return sum(int(np.prod(v.shape)) * getattr(v.dtype, "itemsize", 0) for v in values)


def training_losses(
    make_optimizer: MakeOptimizer,
    settings: Sequence[Any],
    task: Task,
    variant: int,
    steps: int,
    seeds: int,
    **options: Any,
) -> np.ndarray:
    """(settings, seeds, steps) training losses of `make_optimizer(setting)`; `options`: those of `Simulator`."""
    return Simulator(make_optimizer, task, **options).losses(settings, [variant], steps, seeds)[:, 0]


def summarise(losses: np.ndarray, task: Task, variant: int) -> Result:
    """From (seeds, steps) losses as they came."""
    seeds, steps = losses.shape
    counted = clipped(losses, task.initial_loss)
    ends = last(counted).mean(axis=1)
    return Result(
        task=task.name,
        dataset=task.variants[variant],
        steps=steps,
        seeds=seeds,
        initial_loss=float(task.initial_loss),
        mean_loss=float(counted.mean()),
        standard_error=standard_error(counted.mean(axis=1)),
        last_loss=float(ends.mean()),
        last_standard_error=standard_error(ends),
        diverged=int(is_clipped(last(losses), task.initial_loss).any(axis=1).sum()),
    )


class Evaluator:
    """Evaluates meta-parameters of `spec` on tasks, all data sets of each. Compiled at the first call, not again."""

    def __init__(self, spec: Spec | Architecture, tasks: Sequence[Task], steps: int, seeds: int) -> None:
        self.spec, self.tasks, self.steps, self.seeds = spec, tuple(tasks), steps, seeds
        make = partial(inner_optimizer, spec, num_steps=steps)
        self._simulators = [Simulator(make, task) for task in tasks]

    def __call__(self, theta: Theta) -> list[Result]:
        """One result for each data set of each task, in order."""
        results = []
        for simulator in self._simulators:
            task = simulator.task
            variants = range(len(task.variants))
            (losses,) = simulator.losses([dict(theta)], variants, self.steps, self.seeds)
            results += [summarise(losses[v], task, v) for v in variants]
        return results


def held_out_score(results: Sequence[Result]) -> float:
    """Mean over the tasks of log(mean loss / initial loss), data sets of a task averaged first; lower is better.

    Diverged losses count as clipped, so that the score is finite. Raises ValueError for no results.
    """
    if not results:
        raise ValueError("no results: give at least one task")
    by_task: dict[str, list[float]] = {}
    for r in results:
        by_task.setdefault(r.task, []).append(math.log(max(r.mean_loss / r.initial_loss, _SMALLEST_RATIO)))
    return float(np.mean([np.mean(logs) for logs in by_task.values()]))
