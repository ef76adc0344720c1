"""Learned optimizers against tuned baselines, on several tasks: what `lopt-fast eval` computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from ...architectures import Architecture
from ...jax import learned_optimizer
from ...spec import Spec
from ..tasks.base import Task
from ..unroll import start, unroll
from .baselines import BASELINES, Baseline
from .curves import clipped, standard_error, steps_to
from .evaluate import Report, Simulator, summarise
from .study import Comparison, Learned, Plan, Row, Spike, Study, TaskSource
from .tuning import Cache, Tuned, tune

Started: TypeAlias = Callable[[str, int], Report]
"""(what, inner steps of all simulations) -> what is called with the number of inner steps as they are made."""

_TIMED_STEPS = 20  # of one call of the program that is timed
_TIMED_SECONDS = 0.3


def make_learned(spec: Spec | Architecture, setting: Any) -> optax.GradientTransformation:
    """A learned optimizer from (theta, learning rate, number of steps), which may be traced."""
    theta, learning_rate, num_steps = setting
    return learned_optimizer(spec, learning_rate, theta=theta, num_steps=num_steps)


def compare(
    tasks: Sequence[TaskSource],
    learned: Sequence[Learned],
    plan: Plan,
    cache: Cache | None,
    started: Started = lambda what, steps: lambda made: None,
) -> Study:
    """Everything, task by task. Simulations of learned optimizers of one specification run in one program."""
    comparisons: list[Comparison] = []
    spikes: list[Spike] = []
    for source in tasks:
        found, spiked = _compare_on(source, learned, plan, cache, started)
        comparisons += found
        spikes += spiked
    return Study(plan, list(learned), comparisons, spikes)


def _compare_on(
    source: TaskSource, learned: Sequence[Learned], plan: Plan, cache: Cache | None, started: Started
) -> tuple[list[Comparison], list[Spike]]:
    """All optimizers on one task: (for each length and data set, for each data set and optimizer)."""
    task, lengths = source.task, plan.lengths
    variants = range(len(task.variants))
    rows: dict[tuple[int, int], list[Row]] = {(n, v): [] for n in lengths for v in variants}
    spikes: dict[int, list[Spike]] = {v: [] for v in variants}

    def add(simulator: Simulator, there: dict[tuple[int, int], Row]) -> None:
        for at, row in there.items():
            rows[at].append(row)
            if plan.spike is not None and at[0] == lengths[0]:
                spikes[at[1]].append(_spike(simulator, row, at[1], plan, started))

    for group in _by_spec(learned):
        simulator = Simulator(partial(make_learned, group[0].spec), task, spikes=plan.spike is not None)
        one = group[0]  # the others take as long
        # One run serves all lengths, unless the optimizer knows how long it is.
        runs = [[n] for n in lengths] if one.knows_length else [lengths]
        total = len(group) * len(variants) * plan.seeds * sum(run[-1] for run in runs)
        report = started(f"{task.name}: learned", total)
        seconds = _seconds(task, make_learned(one.spec, one.setting(lengths[0])), plan)
        for run in runs:
            settings = [o.setting(run[-1]) for o in group]
            found = simulator.losses(settings, variants, run[-1], plan.seeds, report)
            for o, setting, losses in zip(group, settings, found, strict=True):
                here = {
                    (n, v): _learned_row(o, setting, losses[v, :, :n], task, v, seconds)
                    for n in run
                    for v in variants
                }
                add(simulator, here)
    for baseline in (BASELINES[name] for name in plan.baselines):
        simulator = Simulator(baseline.make, task, spikes=plan.spike is not None)
        count = len(baseline.settings(lengths[-1], plan.rates, plan.draws))
        total = count * len(variants) * plan.seeds * (lengths[-1] if baseline.range else sum(lengths))
        report = started(f"{task.name}: {baseline.label}", total)
        tuned = tune(
            baseline, simulator, source.options, lengths, plan.seeds, plan.rates, plan.draws, cache, report
        )
        seconds = _seconds(task, baseline.make(tuned[0, lengths[0]].setting), plan)
        add(simulator, {(n, v): _baseline_row(baseline, tuned[v, n], task, v, seconds) for n, v in rows})
    comparisons = [
        Comparison(task.name, task.variants[v], n, float(task.initial_loss), r) for (n, v), r in rows.items()
    ]
    for c in comparisons:
        _measure_against_adam(c)
    return comparisons, [s for of_variant in spikes.values() for s in of_variant]


def _learned_row(
    o: Learned, setting: Any, losses: np.ndarray, task: Task, variant: int, seconds: float | None
) -> Row:
    return Row(o.label, o, setting, losses, summarise(losses, task, variant), seconds_per_step=seconds)


def _baseline_row(baseline: Baseline, tuned: Tuned, task: Task, variant: int, seconds: float | None) -> Row:
    result = summarise(tuned.losses, task, variant)
    return Row(baseline.label, None, tuned.setting, tuned.losses, result, tuned.edge, tuned.tried, seconds)


def _by_spec(learned: Sequence[Learned]) -> Iterator[list[Learned]]:
    """Learned optimizers that one program can simulate."""
    for spec in dict.fromkeys(o.spec for o in learned):
        yield [o for o in learned if o.spec == spec]


def _measure_against_adam(c: Comparison) -> None:
    if c.adam is None:
        return
    for row in c.rows:
        row.steps_to_adam = steps_to(clipped(row.losses, c.initial_loss), c.adam.result.last_loss)


def _seconds(task: Task, optimizer: optax.GradientTransformation, plan: Plan) -> float | None:
    """Wall-clock seconds of an inner step of one network on one device: batch, gradient and update, compiled."""
    if not plan.timing:
        return None

    @jax.jit
    def some_steps(data: Any, key: Any, state: Any) -> Any:
        keys = jax.random.split(key, _TIMED_STEPS)
        return unroll(task, optimizer, state, keys, lambda k: task.sample(data, k, 0))[0]

    key = jax.random.key(0)
    state = jax.block_until_ready(some_steps(task.data, key, start(task, optimizer, key)))
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < _TIMED_SECONDS:
        began = time.perf_counter()
        jax.block_until_ready(some_steps(task.data, key, state))
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)) / _TIMED_STEPS


def _spike(simulator: Simulator, row: Row, variant: int, plan: Plan, started: Started) -> Spike:
    """Runs with and without the spike; baselines with the hyperparameters that won."""
    steps, factor, task = plan.lengths[0], plan.spike, simulator.task
    assert factor is not None
    at = steps // 2
    report = started(f"{task.name}: spike, {row.label}", 2 * plan.seeds * steps)
    losses = simulator.losses(
        [row.setting] * 2, [variant], steps, plan.seeds, report, spikes=[(at, 1.0), (at, factor)]
    )[:, 0]
    # The loss at step `at` is that before the spike's update.
    without, spiked = clipped(losses[..., at + 1 :], task.initial_loss).mean(axis=-1)
    return Spike(
        label=row.label,
        task=task.name,
        dataset=task.variants[variant],
        factor=factor,
        step=at,
        mean_loss=float(without.mean()),
        damage=float((spiked - without).mean()),
        standard_error=standard_error(spiked - without),
        diverged=summarise(losses[1], task, variant).diverged,
    )
