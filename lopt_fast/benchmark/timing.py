"""Alternating timing: every contender once a round (A B A B ...), ratios from the samples of the same round."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

Clock = Callable[[], float]

MIN_SAMPLE_SECONDS = 0.5e-3
"""Fast contenders take several steps in a row for one sample, so that a sample lasts at least this long."""

MAX_BURST = 64


class Timed(Protocol):
    """What `alternate` needs of a contender."""

    @property
    def name(self) -> str: ...

    @property
    def framework(self) -> str: ...

    @property
    def prepare(self) -> Callable[[int], None]:
        """Gets ready for that many steps; not timed."""

    @property
    def run(self) -> Callable[[int], None]:
        """Takes that many steps and returns when they are done."""


@dataclass(frozen=True)
class Summary:
    """Median and spread of one set of samples."""

    median: float
    p10: float
    p90: float
    samples: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def summarise(samples: Sequence[float]) -> Summary:
    """Raises ValueError for no samples."""
    if not samples:
        raise ValueError("no samples to summarise")
    low, median, high = np.percentile(np.asarray(samples, np.float64), [10, 50, 90])
    return Summary(float(median), float(low), float(high), len(samples))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Summary of numerator / denominator, sample by sample: both lists start at the first round, and a contender
    that left early is compared over the rounds that it took part in."""
    pairs = min(len(numerator), len(denominator))
    return summarise([a / b for a, b in zip(numerator[:pairs], denominator[:pairs], strict=True)])


@dataclass(frozen=True)
class Plan:
    """How often: `bursts` steps in a row for one sample, and in how many of the rounds a contender takes part."""

    bursts: Mapping[str, int]
    rounds: Mapping[str, int]


def plan(
    step_seconds: Mapping[str, float],
    *,
    seconds: float,
    min_rounds: int = 15,
    max_rounds: int = 200,
    slow_rounds: int = 3,
    rounds: int | None = None,
    burst: int | None = None,
) -> Plan:
    """Plan for contenders whose step takes about `step_seconds`, so that each is timed for at most about `seconds`.

    All contenders share one burst, since a second step in a row finds in the cache what the first one left there;
    only those that take ten samples' time for one step do one. They share the number of rounds too, but for those
    with which `min_rounds` would take ten times `seconds`: these leave after as many rounds as fit, at least
    `slow_rounds`. `rounds` and `burst` override both.
    """
    fastest = max(min(step_seconds.values()), 1e-9)
    shared = burst or min(MAX_BURST, max(1, math.ceil(MIN_SAMPLE_SECONDS / fastest)))
    bursts = {
        name: shared if burst or step < 10 * MIN_SAMPLE_SECONDS else 1 for name, step in step_seconds.items()
    }
    fits = {name: int(seconds / max(step * bursts[name], 1e-9)) for name, step in step_seconds.items()}
    slow = {name for name, step in step_seconds.items() if step * min_rounds > 10 * seconds}
    common = min([fits[name] for name in fits if name not in slow] or [0])
    common = min(max_rounds, max(min_rounds, common))
    counts = {name: min(common, max(slow_rounds, fits[name])) if name in slow else common for name in fits}
    return Plan(bursts, {name: rounds or count for name, count in counts.items()})


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def warm_up(contender: Timed, *, steps: int = 3, clock: Clock = time.perf_counter) -> float:
    """Seconds that the last of a few steps took; the first ones compile and allocate."""
    seconds = 0.0
    for _ in range(max(1, steps)):
        contender.prepare(1)
        start = clock()
        contender.run(1)
        seconds = clock() - start
    return seconds


def alternate(
    contenders: Sequence[Timed],
    schedule: Plan,
    *,
    settle: float = 0.01,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per step of each contender, one sample a round, in the given order.

    Where the framework changes, `settle` seconds pass first: the other one's threads spin for some milliseconds
    after their last task, and would keep a processor busy.
    """
    names = [c.name for c in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders need different names, got {names}")
    samples: dict[str, list[float]] = {name: [] for name in names}
    before = None
    with no_garbage_collection():
        for round_ in range(max(schedule.rounds[name] for name in names)):
            for contender in contenders:
                if round_ >= schedule.rounds[contender.name]:
                    continue
                if before not in (None, contender.framework):
                    sleep(settle)
                before = contender.framework
                burst = schedule.bursts[contender.name]
                contender.prepare(burst)
                start = clock()
                contender.run(burst)
                samples[contender.name].append((clock() - start) / burst)
            progress()
    return samples
