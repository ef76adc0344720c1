"""What `lopt-fast train` and the demo share: small tasks, a training loop that times the optimizer, tables, plots."""

from __future__ import annotations

from .choices import BASELINES, Choice, TrainingError
from .loop import Curve
from .report import Result, save, table
from .run import TASKS, TrainConfig, train

__all__ = [
    "BASELINES",
    "TASKS",
    "Choice",
    "Curve",
    "Result",
    "TrainConfig",
    "TrainingError",
    "save",
    "table",
    "train",
]
