"""The folder of a run: what lies in it, and how it is written so that a kill at any moment loses nothing.

config.json          all settings
state.npz            all it takes to go on, as of the last checkpoint
metrics.jsonl        a line for every few outer steps and for every evaluation
initial.safetensors  the meta-parameters that the run began with
weights.safetensors  the averaged meta-parameters of the last checkpoint, ready for use
best.safetensors     those with the best held-out score
*.png                plots, at the end
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from ..checkpoint import Checkpoint
from ..errors import UserError
from ..files import write_atomically
from .config import ConfigError, MetaTrainConfig, from_json

_PROGRESS = "progress"
_MAY_CHANGE = ("checkpoint", "data", "name")  # settings that do not change what a run computes


class RunError(UserError, RuntimeError):
    """A run that cannot begin or go on; names the folder or file and the remedy."""


@dataclass
class Progress:
    """What a checkpoint holds beside the arrays."""

    seconds: float = 0.0
    inner_steps: int = 0
    log_bytes: int = 0
    """Length of metrics.jsonl; what follows was written after the checkpoint and is dropped on resume."""
    best_score: float | None = None
    best_step: int | None = None
    diverged: int = 0
    """Outer steps in which a loss was clipped."""
    refused: int = 0
    """Outer steps without a step, since the gradient was not finite."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class RunFolder:
    """Reads and writes the files of a run. `writes=False`: other processes of the same run, which write nothing."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self.state, self.metrics = path / "state.npz", path / "metrics.jsonl"
        self.config, self.initial = path / "config.json", path / "initial.safetensors"
        self.weights, self.best = path / "weights.safetensors", path / "best.safetensors"

    def begin(self, config: MetaTrainConfig, resume: bool) -> None:
        """Check that the folder fits and write the configuration. Raises RunError, OSError."""
        if self.state.exists():
            if not resume:
                raise RunError(
                    f"{self.path} holds a run already: go on with --resume, or give another folder"
                )
            try:
                before = from_json(self.config.read_text(encoding="utf-8"), str(self.config))
            except (ConfigError, ValueError) as error:
                raise RunError(f"{self.config} cannot be read: {error}") from None
            changed = _differences(before, config)
            if changed:
                raise RunError(
                    f"{self.path} belongs to a run with other settings: {'; '.join(changed)}. "
                    "Use the configuration it began with, or another folder"
                )
        if self._writes:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, config.to_json().encode())

    def save(self, arrays: Any, progress: Progress) -> None:
        """Write a checkpoint of `arrays`, a tree of NumPy arrays. After an OSError the old one is untouched."""
        if not self._writes:
            return
        buffer = io.BytesIO()
        named = {**_named(arrays), _PROGRESS: np.array(json.dumps(asdict(progress)))}
        np.savez(buffer, allow_pickle=False, **named)
        write_atomically(self.state, buffer.getvalue())

    def load(self, like: Any) -> tuple[Any, Progress]:
        """(arrays, progress) of the last checkpoint; `like` is a tree of arrays or of their shapes and types."""
        expected = _named(like)
        try:
            with np.load(self.state) as file:
                found = {name: file[name] for name in file.files}
        except (OSError, ValueError, BadZipFile, EOFError) as error:
            raise RunError(f"{self.state} cannot be read: {error}") from None
        progress = json.loads(str(found.pop(_PROGRESS, "{}")))
        for name in sorted(expected.keys() | found.keys()):
            a, b = expected.get(name), found.get(name)
            if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                raise RunError(f"{self.state} does not fit this version or configuration: {name}")
        known = {f.name for f in fields(Progress)}
        leaves = [found[name] for name in expected]
        return (
            jax.tree.unflatten(jax.tree.structure(like), leaves),
            Progress(**{k: v for k, v in progress.items() if k in known}),
        )

    def cut_log(self, length: int) -> None:
        """Drop what was logged after the checkpoint."""
        if self._writes and self.metrics.exists():
            with self.metrics.open("rb+") as file:
                file.truncate(length)

    def log(self, line: Mapping[str, Any]) -> int:
        """Append a line to metrics.jsonl; returns the file's length."""
        if not self._writes:
            return 0
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            file.flush()
            return file.tell()

    def write_weights(self, target: Path, checkpoint: Checkpoint) -> None:
        """Write meta-parameters for use."""
        if self._writes:
            checkpoint.save(target)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _named(tree: Any) -> dict[str, Any]:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def _differences(a: MetaTrainConfig, b: MetaTrainConfig) -> list[str]:
    out = []
    for name in type(a).model_fields:
        mine, theirs = getattr(a, name), getattr(b, name)
        if name not in _MAY_CHANGE and mine != theirs:
            out.append(f"{name} was {mine} and is {theirs}")
    return out


def _finite(value: Any) -> Any:
    """JSON has no NaN: null in its place."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value
