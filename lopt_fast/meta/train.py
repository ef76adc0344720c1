"""Meta-training with PES: `python -m lopt_fast.meta.train CONFIG.json --out DIR [--resume]`.

Many tasks are trained at once, in antithetic pairs. One outer step: every pair advances by one truncation,
PES turns the differences of their losses into a gradient for theta, and Adam applies it. Unrolls have random
lengths, so that at any time the pairs are at different points of training.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import data
from ..architectures import small_fc_lopt
from ..files import write_atomically
from ..spec import Spec
from . import pes
from .tasks import Dataset, Key, Task, mlp_classifier
from .unroll import InnerState, Theta, inner_optimizer, sample_batches, start, unroll

DATASETS = ("digits", "cifar10", "fashion_mnist")


@dataclass(frozen=True)
class MetaTrainConfig:
    """Everything that determines a run, apart from the files of the data sets."""

    spec: Spec = field(default_factory=Spec)
    datasets: tuple[str, ...] = DATASETS
    loss_weights: tuple[float, ...] = (5.0, 1.0, 2.0)
    """One for each data set: easy ones have small losses, and their differences would not count otherwise."""
    image_size: int = 8
    hidden: tuple[tuple[int, ...], ...] = ((32,),)
    """Hidden widths of the inner MLPs, one task for each."""
    batch_size: int = 128
    pairs: int = 18
    """Antithetic pairs for each task; the data sets take turns."""
    truncation: int = 50
    min_unroll: int = 100
    max_unroll: int = 2000
    """Unroll lengths are log-uniform in between, rounded up to whole truncations."""
    std: float = 0.01
    reuse_noise: bool = False
    """Keep one perturbation for a whole unroll (see pes.py)."""
    outer_steps: int = 10_000
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warmup: int = 100
    gradient_clip: float = 3.0
    """Bound on each element of the meta-gradient."""
    loss_clip: float = 1.5
    """Bound on an inner loss, in units of the task's initial loss: divergence is not infinitely bad."""
    average_decay: float = 0.998
    """Decay of the exponential moving average of theta, which is the result of the run."""
    warm_start: float | None = 4.0
    """Start near "momentum over root of second moment" with steps of this size; None: random weights."""
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        if len(self.loss_weights) != len(self.datasets):
            raise ValueError(f"{len(self.loss_weights)} loss_weights for {len(self.datasets)} datasets")
        if self.pairs < len(self.datasets):
            raise ValueError(
                f"pairs={self.pairs}: give at least one for each of {len(self.datasets)} datasets"
            )
        if not 0 <= self.warmup < self.outer_steps:
            raise ValueError(f"warmup={self.warmup}: must be less than outer_steps={self.outer_steps}")
        unknown = sorted(set(self.datasets) - set(DATASETS))
        if unknown:
            raise ValueError(f"unknown datasets {unknown}; known are {', '.join(DATASETS)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MetaTrainConfig:
        """Inverse of `to_dict`; every key may be left out."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings {unknown}; known are {[f.name for f in fields(cls)]}")
        values = {k: _tuples(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{**values, "spec": Spec.from_dict(values.get("spec", {}))})


class Unrolls(NamedTuple):
    """The antithetic pairs of one task. All leaves have a leading axis (pairs,)."""

    inner: InnerState
    """(pairs, 2, ...): theta + perturbation and theta - perturbation."""
    accumulator: Theta
    length: jax.Array
    """Inner steps after which a pair starts anew."""


class OuterState(NamedTuple):
    """All that a run is made of; what a checkpoint holds."""

    outer_step: jax.Array
    theta: Theta
    average: Theta
    outer_optimizer: optax.OptState
    unrolls: tuple[Unrolls, ...]
    """One for each task."""
    key: jax.Array
    """Key data (not a typed key: it is saved with NumPy)."""


def warm_start_theta(spec: Spec, scale: float, seed: int) -> dict[str, np.ndarray]:
    """Small random weights around a network whose direction is `scale` times the normalised m / sqrt(v).

    Saves the outer steps in which a random network learns to follow the gradient at all.
    """
    theta = small_fc_lopt.init_theta(spec, seed)
    column = next(i for i, c in enumerate(spec.normalised_columns) if c.group == "m_rsqrt_rms")
    last = f"w{spec.hidden_layers}"
    for name in theta:
        theta[name] = theta[name] * np.float32(0.5)
    theta["w0"][:, :2] *= 0.2
    # Units 0 and 1 of every layer carry the positive and the negative part.
    theta["w0"][column, :2] = 1.0, -1.0
    for i in range(1, spec.hidden_layers):
        theta[f"w{i}"][:, :2] *= 0.4
        theta[f"w{i}"][:2, :2] = np.eye(2)
    theta[last][:, 0] *= 0.4 * scale
    theta[last][:2, 0] = scale, -scale
    return theta


def load_datasets(config: MetaTrainConfig, directories: dict[str, str]) -> list[Dataset]:
    """The data sets of `config` as standardised grey images; `directories` says where the files lie."""
    loaders: dict[str, Callable[[], data.Images]] = {
        "digits": data.load_digits,
        "cifar10": lambda: data.load_cifar10(directories["cifar10"]),
        "fashion_mnist": lambda: data.load_idx(directories["fashion_mnist"], name="fashion_mnist"),
    }
    out = []
    for name in config.datasets:
        if name != "digits" and name not in directories:
            raise data.DataError(f"say where the files of {name} are: --data {name}=DIR")
        images = loaders[name]()
        pooled = data.average_pool(data.grey(images.images), config.image_size)
        out.append(Dataset(name, data.standardise(pooled), images.labels))
    return out


def make_tasks(config: MetaTrainConfig, datasets: Sequence[Dataset]) -> list[Task]:
    return [mlp_classifier(datasets, hidden, batch_size=config.batch_size) for hidden in config.hidden]


def outer_optimizer(config: MetaTrainConfig) -> optax.GradientTransformation:
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        0.1 * config.learning_rate, config.learning_rate, config.warmup, config.outer_steps,
        config.final_learning_rate,
    )  # fmt: skip
    return optax.chain(optax.clip(config.gradient_clip), optax.adam(schedule, b2=0.99))


def init_outer_state(
    config: MetaTrainConfig, tasks: Sequence[Task], theta: Theta | None = None
) -> OuterState:
    """State before the first outer step. `theta` continues from other meta-parameters."""
    if theta is None:
        initial = (
            small_fc_lopt.init_theta(config.spec, config.seed)
            if config.warm_start is None
            else warm_start_theta(config.spec, config.warm_start, config.seed)
        )
        theta = {k: jnp.asarray(v) for k, v in initial.items()}
    config.spec.check_theta(theta)
    key, *keys = jax.random.split(jax.random.key(config.seed), len(tasks) + 1)
    return OuterState(
        outer_step=jnp.zeros((), jnp.int32),
        theta=theta,
        average=theta,
        outer_optimizer=outer_optimizer(config).init(theta),
        unrolls=tuple(
            jax.jit(partial(_fresh_unrolls, config, task))(theta, k)
            for task, k in zip(tasks, keys, strict=True)
        ),
        key=jax.random.key_data(key),
    )


def make_outer_step(
    config: MetaTrainConfig, tasks: Sequence[Task]
) -> Callable[[OuterState], tuple[OuterState, jax.Array]]:
    """The jitted outer step; the second result is the (tasks, data sets) mean loss of the truncation."""
    optimizer = outer_optimizer(config)
    variant = jnp.arange(config.pairs) % len(config.datasets)
    weight = jnp.asarray(config.loss_weights)[variant]

    def advance(task: Task, theta: Theta, unrolls: Unrolls, key: Key) -> tuple[Unrolls, Theta, jax.Array]:
        """One truncation of all pairs of a task: (unrolls afterwards, gradient, mean loss by data set)."""
        noise_key, batch_key, fresh_key = jax.random.split(key, 3)
        if config.reuse_noise:
            applied, perturbation = unrolls.accumulator, jax.tree.map(jnp.zeros_like, unrolls.accumulator)
        else:
            applied = perturbation = pes.sample_perturbations(noise_key, theta, config.pairs, config.std)
        both = jax.tree.map(lambda x, e: jnp.stack([x + e, x - e], axis=1), theta, applied)
        batches = jax.vmap(lambda k, v: sample_batches(task, k, v, config.truncation))(
            jax.random.split(batch_key, config.pairs), variant
        )

        def one(theta: Theta, inner: InnerState, batches: Any) -> tuple[InnerState, jax.Array]:
            return unroll(task, inner_optimizer(config.spec, theta), inner, batches)

        # The two of a pair see the same batches: what differs is the perturbation alone.
        inner, losses = jax.vmap(jax.vmap(one, (0, 0, None)))(both, unrolls.inner, batches)
        bound = config.loss_clip * task.initial_loss
        losses = jnp.where(losses < bound, losses, bound)  # NaN too
        weighted = losses * weight[:, None, None]
        never = jnp.zeros((config.truncation, config.pairs), bool)  # unrolls only end between truncations
        estimate = pes.pes_gradient(
            weighted[:, 0].T, weighted[:, 1].T, never, ~never, unrolls.accumulator, perturbation, config.std
        )
        done = inner.step[:, 0] >= unrolls.length
        kept = Unrolls(inner, estimate.accumulator, unrolls.length)
        fresh = _fresh_unrolls(config, task, theta, fresh_key)
        unrolls = jax.tree.map(
            lambda a, b: jnp.where(done.reshape(done.shape + (1,) * (a.ndim - 1)), a, b), fresh, kept
        )
        by_dataset = jax.ops.segment_sum(losses.mean((1, 2)), variant, len(config.datasets))
        return unrolls, estimate.gradient, by_dataset / jnp.bincount(variant, length=len(config.datasets))

    @jax.jit
    def outer_step(state: OuterState) -> tuple[OuterState, jax.Array]:
        key, *keys = jax.random.split(jax.random.wrap_key_data(state.key), len(tasks) + 1)
        results = [
            advance(task, state.theta, u, k) for task, u, k in zip(tasks, state.unrolls, keys, strict=True)
        ]
        gradient = jax.tree.map(lambda *g: sum(g) / len(g), *(g for _, g, _ in results))
        updates, optimizer_state = optimizer.update(gradient, state.outer_optimizer)
        theta = optax.apply_updates(state.theta, updates)
        d = config.average_decay
        return OuterState(
            outer_step=state.outer_step + 1,
            theta=theta,
            average=jax.tree.map(lambda a, x: d * a + (1 - d) * x, state.average, theta),
            outer_optimizer=optimizer_state,
            unrolls=tuple(u for u, _, _ in results),
            key=jax.random.key_data(key),
        ), jnp.stack([losses for _, _, losses in results])

    return outer_step


def save(state: OuterState, seconds: float, path: Path) -> None:
    """Write a checkpoint. The file is complete or absent, also if the process is killed."""
    leaves = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    _save_arrays(path, {**leaves, "seconds": np.asarray(seconds)})


def restore(like: OuterState, path: Path) -> tuple[OuterState, float]:
    """(state, seconds spent so far) from a checkpoint of a run with the same configuration."""
    with np.load(path) as file:
        leaves, structure = jax.tree.flatten(like)
        if len(file.files) != len(leaves) + 1:
            raise ValueError(f"{path} belongs to a run with another configuration")
        new = [jnp.asarray(file[f"leaf{i}"]) for i in range(len(leaves))]
        for a, b in zip(leaves, new, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise ValueError(
                    f"{path} belongs to a run with another configuration: {a.shape} and {b.shape}"
                )
        return structure.unflatten(new), float(file["seconds"])


def run(
    config: MetaTrainConfig,
    tasks: Sequence[Task],
    out: Path,
    *,
    resume: bool = False,
    theta: Theta | None = None,
    report: Callable[[str], None] = print,
) -> Theta:
    """Meta-train until `config.outer_steps`; returns the averaged theta.

    Writes into `out`: config.json, state.npz (all it takes to resume), theta.npz (the average), log.jsonl.
    """
    out.mkdir(parents=True, exist_ok=True)
    state, seconds = init_outer_state(config, tasks, theta), 0.0
    if (out / "state.npz").exists():
        if not resume:
            raise FileExistsError(f"{out} holds a run already: resume it, or give another folder")
        if MetaTrainConfig.from_dict(json.loads((out / "config.json").read_text())) != config:
            raise ValueError(f"{out} belongs to a run with another configuration: see its config.json")
        state, seconds = restore(state, out / "state.npz")
    (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    outer_step = make_outer_step(config, tasks)
    losses = []
    clock = time.perf_counter()
    for step in range(int(state.outer_step) + 1, config.outer_steps + 1):
        state, loss = outer_step(state)
        losses.append(loss)
        if step % config.save_every and step != config.outer_steps:
            continue
        mean = np.mean(jax.device_get(losses), axis=0)
        now = time.perf_counter()
        seconds, clock, losses = seconds + now - clock, now, []
        save(state, seconds, out / "state.npz")
        _save_arrays(out / "theta.npz", {k: np.asarray(v) for k, v in state.average.items()})
        by_task = {
            t.name: dict(zip(t.variants, map(float, row), strict=True))
            for t, row in zip(tasks, mean, strict=True)
        }
        line = json.dumps({"outer_step": step, "seconds": round(seconds, 1), "mean_inner_loss": by_task})
        with (out / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        report(line)
    return state.average


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lopt_fast.meta.train", description=__doc__)
    parser.add_argument("config", type=Path, help="JSON file with the fields of MetaTrainConfig that differ")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=DIR", help="where a data set's files are"
    )
    parser.add_argument("--theta", type=Path, help="start from these meta-parameters (.npz)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    options = parser.parse_args(arguments)
    config = MetaTrainConfig.from_dict(json.loads(options.config.read_text()))
    directories = dict(item.split("=", 1) for item in options.data)
    theta = None
    if options.theta is not None:
        with np.load(options.theta) as file:
            theta = {k: jnp.asarray(file[k]) for k in file.files}
    run(
        config,
        make_tasks(config, load_datasets(config, directories)),
        options.out,
        resume=options.resume,
        theta=theta,
    )


def _fresh_unrolls(config: MetaTrainConfig, task: Task, theta: Theta, key: Key) -> Unrolls:
    length_key, init_key, noise_key = jax.random.split(key, 3)
    optimizer = inner_optimizer(config.spec, theta)
    inner = jax.vmap(lambda k: start(task, optimizer, k))(jax.random.split(init_key, config.pairs))
    if config.reuse_noise:
        accumulator = pes.sample_perturbations(noise_key, theta, config.pairs, config.std)
    else:
        accumulator = jax.tree.map(lambda x: jnp.zeros((config.pairs, *x.shape), x.dtype), theta)
    low, high = math.log(config.min_unroll), math.log(config.max_unroll)
    return Unrolls(
        inner=jax.tree.map(lambda x: jnp.stack([x, x], axis=1), inner),
        accumulator=accumulator,
        length=jnp.exp(jax.random.uniform(length_key, (config.pairs,), minval=low, maxval=high)),
    )


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
