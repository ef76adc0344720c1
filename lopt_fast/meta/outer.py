"""The outer step: every pair of every task advances by one truncation, and theta by one step of the outer optimizer.

One jitted program. The pairs are sharded over the devices of a mesh, of one process or of many; theta and the outer
optimizer's state are replicated, and gradients are averaged over the devices. A pair draws everything random from a
key of its own, so that the number of devices changes nothing but the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..architectures import Architecture, small_fc_lopt
from ..architectures import initial_theta as random_theta
from ..data import canonical
from ..spec import Spec
from . import devices
from .config import ConfigError, MetaTrainConfig, TaskTable
from .tasks.base import Data, Key, Task
from .truncation import Counts, Lengths, TruncatedTask, Unrolls, stagger
from .unroll import inner_optimizer

PAIRS, EVERYWHERE = PartitionSpec(devices.PAIRS), PartitionSpec()
_SCALE_DECAY = 0.99  # of the running mean square of a task's gradient norm
_SCALE_EPSILON = 1e-20

OuterStep: TypeAlias = Callable[["OuterState", tuple[Data, ...]], tuple["OuterState", "Metrics"]]


class OuterState(NamedTuple):
    """All that a run is made of; what a checkpoint holds."""

    outer_step: jax.Array
    theta: jax.Array
    """(n,), all trained meta-parameters as one vector (`OuterLoop.named` gives them their names): far less to
    compile."""
    average: jax.Array
    """Exponential moving average of theta."""
    optimizer_state: optax.OptState
    squared_norms: jax.Array
    """(tasks,), running mean squares of the norms of the tasks' gradients, biased towards 0 as in Adam."""
    unrolls: tuple[Unrolls, ...]
    """One for each task."""


class Metrics(NamedTuple):
    """Of one outer step."""

    tasks: tuple[Counts, ...]
    gradient_norm: jax.Array
    """Before clipping."""
    task_gradient_norms: jax.Array
    """(tasks,)"""
    refused: jax.Array
    """Whether the gradient was not finite and no step was made."""


def truncated_tasks(config: MetaTrainConfig, tasks: Sequence[Task]) -> tuple[TruncatedTask, ...]:
    """The training tasks with how they are unrolled. Raises ConfigError for weights of data sets that a task lacks."""
    return tuple(_truncated(config, table, task) for table, task in zip(config.task, tasks, strict=True))


def _truncated(config: MetaTrainConfig, table: TaskTable, task: Task) -> TruncatedTask:
    weights = {canonical(name): weight for name, weight in table.data_weights.items()}
    unknown = sorted(weights.keys() - set(map(canonical, task.variants)))
    if unknown:
        raise ConfigError(
            f"task {task.name}: data_weights for {unknown}, but it has {', '.join(task.variants)}"
        )
    pairs = table.pairs or config.estimator.pairs
    if pairs < len(task.variants):
        raise ConfigError(
            f"task {task.name}: pairs={pairs}, but it has {len(task.variants)} data sets: give more"
        )
    unroll = table.unroll or config.truncation
    named = _naming(config)
    return TruncatedTask(
        task=task,
        make_optimizer=lambda theta, length: inner_optimizer(config.spec, named(theta), length),
        estimator=config.estimator.make(),
        lengths=Lengths(unroll.min_steps, unroll.max_steps),
        steps=config.truncation.steps,
        resets_inside=config.truncation.resets == "inside",
        loss_clip=table.loss_clip,
        data_weights=tuple(weights.get(canonical(name), 1.0) for name in task.variants),
    )


def _vector(
    config: MetaTrainConfig, theta: Mapping[str, np.ndarray]
) -> tuple[jax.Array, Callable[[Any], Any]]:
    """(the trained ones of these meta-parameters as a vector, vector -> trained meta-parameters by name)."""
    return ravel_pytree(
        {name: np.asarray(a, np.float32) for name, a in theta.items() if config.optimizer.is_trained(name)}
    )


def _naming(config: MetaTrainConfig) -> Callable[[Any], dict[str, Any]]:
    """Vector -> all meta-parameters by name; those that are not trained are as the run begins with."""
    shapes = config.spec.theta_shapes
    _, unravel = _vector(config, {name: np.zeros(shape) for name, shape in shapes.items()})
    fixed = [name for name in shapes if not config.optimizer.is_trained(name)]
    if not fixed:
        return unravel
    initial = initial_theta(config)
    return lambda vector: unravel(vector) | {name: initial[name] for name in fixed}


def initial_theta(config: MetaTrainConfig) -> dict[str, np.ndarray]:
    """Meta-parameters before the first outer step. Raises ConfigError for a checkpoint that does not fit."""
    spec, settings = config.spec, config.optimizer
    checkpoint = config.initial_checkpoint()
    if checkpoint is not None:
        if checkpoint.architecture != spec.NAME:
            raise ConfigError(
                f"optimizer.initial: {settings.initial} is {checkpoint.architecture}, not {spec.NAME}"
            )
        if checkpoint.spec.theta_shapes != spec.theta_shapes:
            raise ConfigError(
                f"optimizer.initial: {settings.initial} has other meta-parameters than optimizer.spec"
            )
        return dict(checkpoint.theta)
    if isinstance(spec, Architecture) or settings.initial == "random":
        return random_theta(spec, config.seed)
    return warm_start_theta(spec, settings.warm_scale, config.seed)


def warm_start_theta(spec: Spec, scale: float, seed: int) -> dict[str, np.ndarray]:
    """Small random weights around a network whose direction is `scale` times the normalised m / sqrt(v)."""
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


class OuterLoop:
    """Compiled functions of a run on the devices of a mesh.

    Raises ConfigError if a task's pairs are not a multiple of the number of devices.
    """

    def __init__(self, config: MetaTrainConfig, tasks: Sequence[Task], mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.tasks = truncated_tasks(config, tasks)
        self.pairs = tuple(table.pairs or config.estimator.pairs for table in config.task)
        for task, pairs in zip(tasks, self.pairs, strict=True):
            if pairs % mesh.size:
                raise ConfigError(
                    f"task {task.name}: {pairs} pairs cannot be shared by {mesh.size} devices: "
                    "give a multiple of that, or another number of devices"
                )
        self.data: tuple[Data, ...] = devices.replicate(mesh, tuple(task.data for task in tasks))
        self._optimizer = config.outer.make()
        self._weights = np.array([table.weight for table in config.task], np.float32)
        everywhere, pairs = NamedSharding(mesh, EVERYWHERE), NamedSharding(mesh, PAIRS)
        self._begin = jax.jit(self._start, in_shardings=everywhere, out_shardings=pairs)
        # Said in full: what XLA chose for the result would be another program's argument, compiled again.
        state = OuterState(everywhere, everywhere, everywhere, everywhere, everywhere, pairs)
        self.step: OuterStep = jax.jit(
            self._step, donate_argnums=0, in_shardings=(state, everywhere), out_shardings=(state, everywhere)
        )

    @property
    def inner_steps(self) -> int:
        """Inner steps of all networks in one outer step."""
        chunks = [-(-t.lengths.high // t.steps) if t.estimator.whole_unroll else 1 for t in self.tasks]
        return sum(2 * p * c * t.steps for p, c, t in zip(self.pairs, chunks, self.tasks, strict=True))

    def init(self, theta: Mapping[str, np.ndarray]) -> OuterState:
        """State before the first outer step."""
        self.config.spec.check_theta(theta)
        vector, _ = _vector(self.config, theta)
        state = OuterState(
            outer_step=jnp.zeros((), jnp.int32),
            theta=vector,
            average=vector,
            optimizer_state=self._optimizer.init(vector),
            squared_norms=jnp.zeros(len(self.tasks)),
            unrolls=(),
        )
        state = devices.replicate(self.mesh, jax.tree.map(np.array, state))
        return state._replace(unrolls=self._begin(state.theta))

    def named(self, vector: jax.Array | np.ndarray) -> dict[str, np.ndarray]:
        """Meta-parameters by the names of `theta_shapes`."""
        return {name: np.asarray(x) for name, x in _naming(self.config)(jnp.asarray(vector)).items()}

    def place(self, state: Any) -> OuterState:
        """A state read from a checkpoint (arrays of all pairs, on the host) laid out on the devices."""
        unrolls = devices.shard(self.mesh, state.unrolls)
        return devices.replicate(self.mesh, state._replace(unrolls=()))._replace(unrolls=unrolls)

    def _start(self, theta: jax.Array) -> tuple[Unrolls, ...]:
        def local(theta: jax.Array) -> tuple[Unrolls, ...]:
            out = []
            for number, task in enumerate(self.tasks):
                index = self._index(number)
                unrolls = task.fresh(theta, self._keys(number, index, 0))
                if self.config.truncation.staggered and not task.estimator.whole_unroll:
                    unrolls = stagger(unrolls, index, self.pairs[number], task.steps)
                out.append(unrolls)
            return tuple(out)

        return self._shard_map(local, EVERYWHERE, PAIRS)(theta)

    def _step(self, state: OuterState, data: tuple[Data, ...]) -> tuple[OuterState, Metrics]:
        unrolls, gradients, counts = self._shard_map(
            self._advance, (EVERYWHERE, EVERYWHERE, PAIRS, EVERYWHERE), (PAIRS, EVERYWHERE, EVERYWHERE)
        )(state.theta, state.outer_step, state.unrolls, data)
        norms = jnp.linalg.norm(gradients, axis=1)
        decay = _SCALE_DECAY
        squared = decay * state.squared_norms + (1 - decay) * jnp.where(jnp.isfinite(norms), norms, 0) ** 2
        weights = self._weights / self._weights.sum()
        if self.config.outer.balance:
            corrected = squared / (1 - decay ** (state.outer_step + 1))
            weights = weights * jax.lax.rsqrt(corrected + _SCALE_EPSILON)
        gradient = weights @ gradients
        norm = jnp.linalg.norm(gradient)
        refused = ~jnp.isfinite(norm)
        updates, optimizer_state = self._optimizer.update(gradient, state.optimizer_state, state.theta)
        theta = optax.apply_updates(state.theta, updates)
        theta, optimizer_state, squared = jax.tree.map(
            lambda new, old: jnp.where(refused, old, new),
            (theta, optimizer_state, squared),
            (state.theta, state.optimizer_state, state.squared_norms),
        )
        d = self.config.outer.average_decay
        after = OuterState(
            outer_step=state.outer_step + 1,
            theta=theta,
            average=d * state.average + (1 - d) * theta,
            optimizer_state=optimizer_state,
            squared_norms=squared,
            unrolls=unrolls,
        )
        return after, Metrics(counts, norm, norms, refused)

    def _advance(
        self, theta: jax.Array, outer_step: jax.Array, unrolls: tuple[Unrolls, ...], data: tuple[Data, ...]
    ) -> tuple[tuple[Unrolls, ...], jax.Array, tuple[Counts, ...]]:
        """One truncation of this device's pairs; gradients (tasks, n) and counts are means over all pairs."""
        after, local = [], []
        for number, task in enumerate(self.tasks):
            index = self._index(number)
            keys = self._keys(number, index, outer_step + 1)
            variant = index % len(task.task.variants)
            new, estimate, count = task.advance(theta, unrolls[number], data[number], keys, variant)
            members = jax.ops.segment_sum(jnp.ones(len(index)), variant, len(task.task.variants))
            after.append(new)
            local.append((estimate.gradient, count, members))
        # One collective: several at a time can block all threads of XLA's pool on the CPU, each waiting for another.
        flat, unravel = ravel_pytree(local)
        total = unravel(jax.lax.psum(flat, devices.PAIRS))
        gradients = jnp.stack([gradient for gradient, _, _ in total]) / self.mesh.size
        counts = tuple(Counts(*(x / members for x in count)) for _, count, members in total)
        return tuple(after), gradients, counts

    def _index(self, number: int) -> jax.Array:
        """Numbers of this device's pairs among all pairs of a task."""
        local = self.pairs[number] // self.mesh.size
        return jax.lax.axis_index(devices.PAIRS) * local + jnp.arange(local)

    def _keys(self, number: int, index: jax.Array, outer_step: jax.Array | int) -> Key:
        """A key for each pair of a task in an outer step (0: before the first)."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), number), outer_step)
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)

    def _shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)
