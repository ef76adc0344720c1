"""Baselines tuned on a task, on the seeds on which all optimizers are compared. Results are kept on disk."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ... import __version__
from ...files import write_atomically
from ..tasks.base import Task
from .baselines import Baseline, NAdamW, describe
from .curves import LOSS_CLIP, clipped
from .evaluate import FIRST_SEED, Report, Simulator

_EXTENSIONS = 3  # how often the range of learning rates is widened at an end where the best one lies


@dataclass(frozen=True)
class Tuned:
    """The setting of a baseline with the smallest mean loss over all steps and seeds, losses clipped."""

    setting: Any
    losses: np.ndarray
    """(seeds, steps) float32, as they came."""
    tried: tuple[tuple[dict[str, float], float], ...]
    """Each setting that was tried, with its mean loss."""
    edge: str = ""
    """"lowest" or "highest" where the best learning rate is at an end of those that were tried."""


class Cache:
    """A folder of tuned baselines, one file for each. A file that cannot be read is as good as none."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def read(self, key: Mapping[str, Any]) -> Tuned | None:
        """What was written with this key."""
        try:
            with np.load(self._path(key)) as file:
                record, losses = json.loads(str(file["record"])), np.asarray(file["losses"], np.float32)
            if record["key"] != _plain(key) or losses.shape != (key["seeds"], key["steps"]):
                return None
            tried = tuple((dict(setting), float(loss)) for setting, loss in record["tried"])
            setting = (
                NAdamW(*record["setting"])
                if isinstance(record["setting"], list)
                else float(record["setting"])
            )
            return Tuned(setting, losses, tried, str(record["edge"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, key: Mapping[str, Any], tuned: Tuned) -> None:
        """The file is whole or absent."""
        record = {"key": _plain(key), "setting": tuned.setting, "tried": tuned.tried, "edge": tuned.edge}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, record=np.array(json.dumps(record)), losses=tuned.losses)
        write_atomically(self._path(key), buffer.getvalue())

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{key['task']}-{key['baseline']}-{_digest(_plain(key))[:16]}.npz"


def default_folder() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/lopt_fast/eval"""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "lopt_fast" / "eval"


def tune(
    baseline: Baseline,
    simulator: Simulator,
    options: Mapping[str, Any],
    horizons: Sequence[int],
    seeds: int,
    rates: int,
    draws: int,
    cache: Cache | None = None,
    report: Report | None = None,
) -> dict[tuple[int, int], Tuned]:
    """By (data set's number, horizon): the baseline tuned for that many steps.

    options: those that the task was made with; they are part of the key in the cache. Learning rates are constant, so
    that one run of the longest horizon serves them all; a schedule needs a run for each.
    """
    task = simulator.task
    variants = range(len(task.variants))
    out: dict[tuple[int, int], Tuned] = {}
    keys = {
        (v, h): _key(baseline, task, options, v, h, seeds, baseline.settings(h, rates, draws))
        for v in variants
        for h in horizons
    }
    for at, key in keys.items():
        if cache is not None and (found := cache.read(key)) is not None:
            out[at] = found
    missing = sorted({h for v, h in keys if (v, h) not in out})
    for run in [missing] if baseline.range and missing else [[h] for h in missing]:
        tuned = _search(baseline, simulator, run, seeds, baseline.settings(run[-1], rates, draws), report)
        for at, result in tuned.items():
            if at not in out:
                out[at] = result
                if cache is not None:
                    cache.write(keys[at], result)
    return out


def _search(
    baseline: Baseline,
    simulator: Simulator,
    horizons: Sequence[int],
    seeds: int,
    settings: list[Any],
    report: Report | None,
) -> dict[tuple[int, int], Tuned]:
    """All `settings`, and learning rates beyond them where the best one is the smallest or the largest."""
    variants = range(len(simulator.task.variants))

    def losses_of(settings: Sequence[Any]) -> np.ndarray:
        return simulator.losses(settings, variants, horizons[-1], seeds, report)

    losses = losses_of(settings)
    for _ in range(_EXTENSIONS if baseline.range else 0):
        best = {
            int(np.argmin(_means(losses[:, v, :, :h], simulator.task))) for v in variants for h in horizons
        }
        ends = [at > 0 for at in (0, len(settings) - 1) if at in best]
        if not ends:
            break
        more = [rate for highest in ends for rate in baseline.beyond(settings, highest)]
        settings, losses = settings + more, np.concatenate([losses, losses_of(more)])
        order = np.argsort(settings)
        settings, losses = [settings[i] for i in order], losses[order]
    return {
        (v, h): _best(baseline, settings, losses[:, v, :, :h], simulator.task)
        for v in variants
        for h in horizons
    }


def _best(baseline: Baseline, settings: Sequence[Any], losses: np.ndarray, task: Task) -> Tuned:
    means = _means(losses, task)
    best = int(np.argmin(means))
    edge = ""
    if baseline.range is not None and best in (0, len(settings) - 1):
        edge = "highest" if best else "lowest"
    tried = tuple((describe(s), float(m)) for s, m in zip(settings, means, strict=True))
    return Tuned(settings[best], losses[best].copy(), tried, edge)


def _means(losses: np.ndarray, task: Task) -> np.ndarray:
    """(settings,) from (settings, seeds, steps), one setting at a time: there may be a thousand."""
    return np.array([clipped(each, task.initial_loss).mean() for each in losses])


def _key(
    baseline: Baseline,
    task: Task,
    options: Mapping[str, Any],
    variant: int,
    steps: int,
    seeds: int,
    settings: Sequence[Any],
) -> dict[str, Any]:
    """Everything that a tuned baseline depends on."""
    return {
        "task": task.name,
        "options": dict(options),
        "class": f"{type(task).__module__}.{type(task).__qualname__}",
        "code": _source_digest(type(task)),
        "data": _data_digest(task),
        "dataset": task.variants[variant],
        "initial_loss": task.initial_loss,
        "steps": steps,
        "seeds": seeds,
        "first_seed": FIRST_SEED,
        "loss_clip": LOSS_CLIP,
        "baseline": baseline.name,
        "settings": _digest([describe(s) for s in settings]),
        "versions": {"lopt_fast": __version__, "jax": jax.__version__, "optax": version("optax")},
    }


def _plain(key: Mapping[str, Any]) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(key, sort_keys=True, default=str))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def _source_digest(kind: type) -> str:
    """Of the file that defines a task's class: a changed task of one's own is another task."""
    try:
        text = Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(text).hexdigest()


def _data_digest(task: Task) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(task.data):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
