"""A fixed workload that measures the outer loop: MLP 64-32-10, batch 128, `small_fc_lopt`, PES, on noise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from . import devices
from .config import EstimatorTable, MetaTrainConfig, TaskTable, TruncationTable
from .outer import OuterLoop, OuterState, initial_theta
from .tasks import MLP, Dataset


@dataclass(frozen=True)
class Throughput:
    """Of the meta-training loop."""

    inner_steps_per_second: float
    """Of all networks together, median over outer steps."""
    compile_seconds: float
    """From nothing to the end of the first outer step."""
    inner_steps: int
    """In one outer step."""
    outer_step_seconds: list[float]


def noise_loop(pairs: int, truncation: int, used: Sequence[Any]) -> tuple[OuterLoop, OuterState]:
    """The loop and its first state on these devices."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((1797, 8, 8, 1)).astype(np.float32)
    task = MLP([Dataset("noise", images, rng.integers(0, 10, len(images)).astype(np.int32))])
    config = MetaTrainConfig(
        estimator=EstimatorTable(name="pes", pairs=pairs),
        truncation=TruncationTable(steps=truncation),
        task=(TaskTable(kind="mlp"),),
    )
    loop = OuterLoop(config, [task], Mesh(np.array(used), (devices.PAIRS,)))
    return loop, loop.init(initial_theta(config))


def measure(
    pairs: int = 8, truncation: int = 50, used: Sequence[Any] | None = None, seconds: float = 10.0
) -> Throughput:
    """Outer steps for `seconds`, at least five."""
    start = time.perf_counter()
    loop, state = noise_loop(pairs, truncation, used or jax.local_devices())
    state, _ = jax.block_until_ready(loop.step(state, loop.data))
    compile_seconds = time.perf_counter() - start
    samples: list[float] = []
    while sum(samples) < seconds or len(samples) < 5:
        start = time.perf_counter()
        state, _ = jax.block_until_ready(loop.step(state, loop.data))
        samples.append(time.perf_counter() - start)
    return Throughput(
        loop.inner_steps / float(np.median(samples)), compile_seconds, loop.inner_steps, samples
    )
