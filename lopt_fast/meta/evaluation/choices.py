"""What `lopt-fast eval` was asked for: learned optimizers, tasks, baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ...checkpoint import load
from ...errors import UserError
from ...spec import Statistics
from ..config import read
from ..tasks import make
from .baselines import BASELINES
from .study import Learned, TaskSource

DEFAULT_TASKS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "transformer": {"width": 16, "layers": 2, "heads": 2, "context": 16, "batch_size": 8},
    "lstm": {"width": 32, "embedding": 16, "context": 16, "batch_size": 8},
    "autoencoder": {},
    "quadratic": {},
}
"""Small tasks that need no files: digits, the sources of Python's library, no data."""

_WEIGHTS = ("best.safetensors", "weights.safetensors")  # of a meta-training run, the better ones first


class EvaluationError(UserError, ValueError):
    """Something that cannot be evaluated as asked; names the culprit and the remedy."""


def read_learned(
    sources: Sequence[str], statistics: str | None, learning_rates: Sequence[float]
) -> list[Learned]:
    """Each checkpoint with each learning rate. `statistics`: exact, lagged, both, or None: as the checkpoint says.

    A source is the name of shipped weights, a file, or the folder of a meta-training run: its best weights.
    Raises EvaluationError, CheckpointError.
    """
    kinds = get_args(Statistics)
    if statistics not in (None, "both", *kinds):
        raise EvaluationError(f"--statistics {statistics}: must be one of {', '.join((*kinds, 'both'))}")
    out = []
    for source in sources:
        path = Path(source)
        files = [path / name for name in _WEIGHTS if (path / name).is_file()]
        checkpoint = load(files[0] if files else source)
        name = path.name if files else checkpoint.name
        for how in kinds if statistics == "both" else (statistics or checkpoint.spec.statistics,):
            checkpoint.spec.with_statistics(how)  # refused here, before anything has been computed
            out += [Learned(name, checkpoint, how, rate) for rate in learning_rates]
    labels = [o.label for o in out]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise EvaluationError(
            f"{twice[0]}: given twice; files and folders of different weights need different names"
        )
    return out


def read_tasks(file: Path | None, kinds: Sequence[str], paths: Mapping[str, str]) -> list[TaskSource]:
    """The tasks of `file` and those of `kinds`; without either the default ones. Re-parametrisations are left out.

    Raises EvaluationError, ConfigError, TaskError, DataError, OSError.
    """
    tables = [(kind, DEFAULT_TASKS.get(kind, {})) for kind in kinds]
    found = dict(paths)
    if file is not None:
        config = read(file)
        given = (*(config.task if "task" in config.model_fields_set else ()), *config.held_out)
        if not given:
            raise EvaluationError(f"{file}: no tasks: add a table [[task]] with a kind")
        found = {**config.data, **found}
        tables += [(table.kind, table.options) for table in given]
    folders = {name: Path(path) for name, path in found.items()}
    return [
        TaskSource(make(kind, options, folders), {"kind": kind, **options})
        for kind, options in tables or DEFAULT_TASKS.items()
    ]


def read_baselines(text: str) -> tuple[str, ...]:
    """Names separated by commas; none for an empty text. Raises EvaluationError."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in BASELINES:
            raise EvaluationError(f"unknown baseline {name!r}: must be among {', '.join(BASELINES)}")
    return names


def read_numbers(option: str, text: str, kind: type[int] | type[float]) -> list[float]:
    """Positive numbers separated by commas. Raises EvaluationError."""
    try:
        numbers = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not all(0 < x < float("inf") for x in numbers):
        words = "whole numbers" if kind is int else "numbers"
        raise EvaluationError(f"{option} {text}: give positive {words} separated by commas")
    return list(numbers)
