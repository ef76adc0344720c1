"""What a comparison of optimizers is made of: the plan, who takes part, and the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...architectures import Architecture
from ...checkpoint import Checkpoint
from ...spec import Spec, Statistics
from ..tasks.base import Task
from .baselines import BASELINES, describe
from .evaluate import Result


@dataclass(frozen=True)
class Plan:
    """How optimizers are compared; the same for all tasks."""

    steps: int = 2000
    """Inner steps of a training run."""
    horizons: tuple[int, ...] = (1,)
    """Multiples of `steps` at which they are compared."""
    seeds: int = 5
    baselines: tuple[str, ...] = ("sgdm", "adam", "nadamw")
    rates: int = 15
    """Learning rates to tune SGD and Adam with."""
    draws: int = 50
    """Draws from the search space of NAdamW."""
    spike: float | None = None
    """If given: in runs of their own, of `steps` steps, the gradient in the middle is multiplied by this."""
    timing: bool = True
    """Whether the seconds of a step are measured."""

    @property
    def lengths(self) -> list[int]:
        """Inner steps of the training runs, increasing."""
        return sorted({self.steps * h for h in self.horizons})


@dataclass(frozen=True)
class Learned:
    """A learned optimizer, as it is used."""

    name: str
    checkpoint: Checkpoint
    statistics: Statistics
    learning_rate: float = 1.0

    @property
    def label(self) -> str:
        """Name, how statistics are taken, and the learning rate if it is not 1."""
        rate = f", lr {self.learning_rate:g}" if self.learning_rate != 1 else ""
        return f"{self.name}, {self.statistics}{rate}"

    @property
    def spec(self) -> Spec | Architecture:
        """What it computes. Raises SpecError for statistics that the architecture does not have."""
        return self.checkpoint.spec.with_statistics(self.statistics)

    @property
    def knows_length(self) -> bool:
        """Whether it is told how long the training is."""
        return isinstance(self.checkpoint.spec, Architecture) and self.checkpoint.spec.needs_num_steps

    def setting(self, num_steps: int) -> Any:
        """What `make_learned` takes for training runs of this length."""
        return dict(self.checkpoint.theta), self.learning_rate, num_steps


@dataclass(frozen=True)
class TaskSource:
    """A task and the options that it was made with."""

    task: Task
    options: Mapping[str, Any]


@dataclass
class Row:
    """An optimizer on a data set of a task, for training runs of one length."""

    label: str
    learned: Learned | None
    setting: Any
    """Of a learned optimizer that of `Learned.setting`; of a baseline the hyperparameters that won."""
    losses: np.ndarray
    """(seeds, steps), as they came."""
    result: Result
    edge: str = ""
    tried: tuple[tuple[dict[str, float], float], ...] = ()
    seconds_per_step: float | None = None
    steps_to_adam: int | None = None
    """Steps until the smoothed curve is as low as the end of tuned Adam's; None: never, or no Adam."""

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Those that won; none for learned optimizers."""
        return {} if self.learned else describe(self.setting)

    @property
    def seconds_to_adam(self) -> float | None:
        """`steps_to_adam` in seconds."""
        if self.steps_to_adam is None or self.seconds_per_step is None:
            return None
        return self.steps_to_adam * self.seconds_per_step


@dataclass
class Spike:
    """What one large gradient does to an optimizer on a data set of a task; means over the rest of the steps."""

    label: str
    task: str
    dataset: str
    factor: float
    step: int
    mean_loss: float
    """Without the spike."""
    damage: float
    """By how much it is higher with it."""
    standard_error: float
    """Of `damage`, over the seeds."""
    diverged: int


@dataclass
class Comparison:
    """All optimizers on one data set of one task, for training runs of one length."""

    task: str
    dataset: str
    steps: int
    initial_loss: float
    rows: list[Row]

    def row(self, label: str) -> Row | None:
        """The optimizer of this name."""
        return next((r for r in self.rows if r.label == label), None)

    @property
    def adam(self) -> Row | None:
        """Tuned Adam, if it takes part."""
        return self.row(BASELINES["adam"].label)

    @property
    def winner(self) -> Row:
        """The smallest mean loss."""
        return min(self.rows, key=lambda r: r.result.mean_loss)


@dataclass
class Study:
    """What `compare` returns."""

    plan: Plan
    learned: list[Learned]
    comparisons: list[Comparison]
    spikes: list[Spike]

    def transfer(self) -> tuple[list[str], np.ndarray] | None:
        """Columns, (learned optimizers, columns) mean losses over Adam's, of the shortest runs. None without Adam."""
        first = [c for c in self.comparisons if c.steps == self.plan.lengths[0]]
        if any(c.adam is None for c in first):
            return None
        entries = [
            [c.row(o.label).result.mean_loss / c.adam.result.mean_loss for c in first]  # type: ignore[union-attr]
            for o in self.learned
        ]
        names = [c.task if c.dataset in c.task else f"{c.task} {c.dataset}" for c in first]
        return names, np.array(entries).reshape(len(self.learned), len(first))
