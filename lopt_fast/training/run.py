"""Trains one task with several optimizers on the same batches from the same start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import install
from .choices import Choice, TrainingError
from .loop import Curve, Trainer, train_steps
from .problems import BUILT_IN, NEEDS_DATA, Problem, make
from .report import Result

TASKS: tuple[str, ...] = (*BUILT_IN, *NEEDS_DATA)

Started = Callable[[str, int], Callable[[float], None]]
"""Called with a label and the number of steps when a run begins; returns what is called with each loss."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train. `batch_size` None: that of the task."""

    task: str
    optimizers: Sequence[Choice]
    steps: int
    framework: Literal["torch", "jax"] = "torch"
    data: str | Path | None = None
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.framework not in ("torch", "jax"):
            raise TrainingError(f"framework {self.framework!r}: must be torch or jax")
        if not self.optimizers:
            raise TrainingError("give at least one optimizer")
        labels = [choice.label for choice in self.optimizers]
        if len(set(labels)) != len(labels):
            raise TrainingError(f"the same optimizer twice: {', '.join(labels)}")
        if self.steps < 1:
            raise TrainingError(f"steps={self.steps}: must be at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise TrainingError(f"batch_size={self.batch_size}: must be at least 1")
        if self.seed < 0:
            raise TrainingError(f"seed={self.seed}: must not be negative")


def train(config: TrainConfig, started: Started | None = None) -> Result:
    """Train with each optimizer in turn.

    Raises TrainingError, DataError, CheckpointError, BackendError for what the user can put right.
    """
    problem = make(config.task, config.data)
    new_trainer = _trainer_class(config.framework)
    batch_size = config.batch_size or problem.batch_size
    result = Result(config.task, config.framework, config.steps, batch_size, config.seed)

    def run(choice: Choice, steps: int, label: str) -> tuple[Trainer, Curve]:
        trainer = new_trainer(problem, choice, config.seed, batch_size, steps)
        return trainer, train_steps(trainer, steps, started(label, steps) if started is not None else None)

    for choice in config.optimizers:
        tried: dict[float, float] = {}
        if choice.search:
            steps = max(1, config.steps // 3)
            for lr in choice.search:
                _, curve = run(choice.at(lr), steps, f"{choice.label}: lr={lr:g}")
                loss = curve.loss_at(steps, max(1, steps // 5))
                tried[lr] = loss if np.isfinite(loss) else float("inf")
            choice = choice.at(min(tried, key=lambda lr: tried[lr]))
        trainer, curve = run(choice, config.steps, choice.label)
        result.add(choice, curve, trainer.parameters, trainer.state_bytes(), tried)
    return result


def _trainer_class(framework: str) -> Callable[[Problem, Choice, int, int, int], Trainer]:
    try:
        if framework == "torch":
            from .torch_trainer import TorchTrainer

            return TorchTrainer
        from .jax_trainer import JaxTrainer

        return JaxTrainer
    except ImportError as error:
        raise TrainingError(
            f"framework {framework!r} cannot be imported ({error}): {install(framework)}"
        ) from error
