"""Mean training loss of an optimizer on a task, against Adam with its learning rate tuned on the same seeds.

`python -m lopt_fast.meta.evaluate THETA.npz --config CONFIG.json --json FILE` evaluates on the data sets of a
meta-training run, with seeds that meta-training does not use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .tasks import Key, Task
from .train import MetaTrainConfig, load_datasets, make_tasks
from .unroll import InnerState, MakeOptimizer, inner_optimizer, sample_batches, start, unroll

FIRST_SEED = 1_000_000
"""Evaluation seeds are counted from here."""


@dataclass(frozen=True)
class Result:
    """One optimizer on one data set of one task, over the same seeds as all others."""

    task: str
    dataset: str
    steps: int
    seeds: int
    mean_loss: float
    """Mean training loss over all steps and seeds."""
    standard_error: float
    """Of `mean_loss`, over the seeds."""
    last_loss: float
    """Mean over the last 5 % of the steps."""


@dataclass(frozen=True)
class Tuned:
    """The best of several learning rates."""

    best: Result
    learning_rate: float
    interior: bool
    """Whether the best one is neither the smallest nor the largest that was tried."""
    table: dict[str, float]
    """Learning rate -> mean training loss, NaN and infinity included as they came."""


@lru_cache(maxsize=4)
def _compiled(
    make_optimizer: MakeOptimizer, task: Task, steps: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(initialise, advance by `steps`), over seeds; one compilation serves all settings and data sets."""

    @jax.jit
    def initialise(setting: Any, keys: Key) -> InnerState:
        return jax.vmap(lambda k: start(task, make_optimizer(setting), jax.random.fold_in(k, 0)))(keys)

    @jax.jit
    def advance(
        setting: Any, variant: int, states: InnerState, keys: Key, i: int
    ) -> tuple[InnerState, jax.Array]:
        def one(state: InnerState, key: Key) -> tuple[InnerState, jax.Array]:
            batches = sample_batches(task, jax.random.fold_in(key, 1 + i), variant, steps)
            return unroll(task, make_optimizer(setting), state, batches)

        return jax.vmap(one)(states, keys)

    return initialise, advance


def training_losses(
    make_optimizer: MakeOptimizer, settings: Sequence[Any], task: Task, variant: int, steps: int, seeds: int
) -> np.ndarray:
    """(settings, seeds, steps) training losses of `make_optimizer(setting)`, one setting after the other.

    All settings see the same initial networks and batches.
    """
    chunk = min(steps, 100)  # batches of so many steps are drawn at once
    initialise, advance = _compiled(make_optimizer, task, chunk)
    keys = jax.vmap(jax.random.key)(FIRST_SEED + jnp.arange(seeds))
    out = []
    for setting in settings:
        states, losses = initialise(setting, keys), []
        for i in range(-(-steps // chunk)):
            states, loss = advance(setting, variant, states, keys, i)
            losses.append(np.asarray(loss, np.float64))
        out.append(np.concatenate(losses, axis=1)[:, :steps])
    return np.stack(out)


def summarise(losses: np.ndarray, task: Task, variant: int) -> Result:
    """From (seeds, steps) losses."""
    seeds, steps = losses.shape
    by_seed = losses.mean(axis=1)
    return Result(
        task=task.name,
        dataset=task.variants[variant],
        steps=steps,
        seeds=seeds,
        mean_loss=float(by_seed.mean()),
        standard_error=float(by_seed.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else float("nan"),
        last_loss=float(losses[:, -max(1, steps // 20) :].mean()),
    )


def tune_adam(task: Task, variant: int, learning_rates: Sequence[float], steps: int, seeds: int) -> Tuned:
    """Adam with each learning rate, all on the same seeds."""
    losses = training_losses(
        optax.adam, [jnp.float32(lr) for lr in learning_rates], task, variant, steps, seeds
    )
    results = [summarise(each, task, variant) for each in losses]
    means = np.array([r.mean_loss for r in results])
    best = int(np.nanargmin(means))
    return Tuned(
        best=results[best],
        learning_rate=float(learning_rates[best]),
        interior=0 < best < len(results) - 1,
        table={f"{lr:.4g}": float(m) for lr, m in zip(learning_rates, means, strict=True)},
    )


def compare(
    make_optimizer: MakeOptimizer,
    setting: Any,
    task: Task,
    learning_rates: Sequence[float],
    steps: int,
    seeds: int,
) -> list[dict[str, Any]]:
    """One entry for each data set of `task`: the optimizer, Adam's best, and which is better."""
    out = []
    for variant in range(len(task.variants)):
        (losses,) = training_losses(make_optimizer, [setting], task, variant, steps, seeds)
        mine, adam = summarise(losses, task, variant), tune_adam(task, variant, learning_rates, steps, seeds)
        out.append(
            {"optimizer": asdict(mine), "adam": asdict(adam), "better": mine.mean_loss < adam.best.mean_loss}
        )
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lopt_fast.meta.evaluate", description=__doc__)
    parser.add_argument("theta", type=Path, help="meta-parameters (.npz)")
    parser.add_argument("--config", type=Path, required=True, help="config.json of the meta-training run")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=DIR", help="where a data set's files are"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--learning-rates", type=int, default=15, help="how many for Adam, from 1e-4 to 1e-1")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(arguments)
    config = MetaTrainConfig.from_dict(json.loads(options.config.read_text()))
    with np.load(options.theta) as file:
        theta = {k: jnp.asarray(file[k]) for k in file.files}
    rates = [float(r) for r in np.logspace(-4, -1, options.learning_rates)]
    rows = []
    for task in make_tasks(config, load_datasets(config, dict(item.split("=", 1) for item in options.data))):
        rows += compare(
            partial(inner_optimizer, config.spec),
            theta,
            task,
            rates,
            options.steps,
            options.seeds,
        )
    for row in rows:
        mine, adam = row["optimizer"], row["adam"]
        print(
            f"{mine['task']} {mine['dataset']}: {mine['mean_loss']:.4f}, "
            f"Adam {adam['best']['mean_loss']:.4f} at {adam['learning_rate']:.2g}"
            + ("" if adam["interior"] else " (edge of the range)")
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
