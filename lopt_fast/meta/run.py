"""A meta-training run: the loop around the outer step, with evaluation, checkpoints, metrics and an orderly end."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from ..checkpoint import Checkpoint
from . import devices
from .config import MetaTrainConfig, TaskTable
from .evaluation.evaluate import Evaluator, Result, held_out_score
from .outer import Metrics, OuterLoop, OuterState, initial_theta
from .store import Progress, RunError, RunFolder
from .tasks import make as make_task
from .tasks.base import Task

_LOG_SECONDS = 2.0  # metrics are written and shown this often, not for every outer step


@dataclass(frozen=True)
class Report:
    """What the run says while it goes on."""

    outer_step: int
    outer_steps: int
    loss: float
    """Mean over tasks of the mean loss in units of the initial loss."""
    inner_steps_per_second: float
    seconds_left: float


class Observer(Protocol):
    """Is told about progress; every method may do nothing."""

    def progress(self, report: Report) -> None: ...

    def scalars(self, outer_step: int, values: Mapping[str, float]) -> None: ...

    def say(self, message: str) -> None: ...


class Silent:
    """An observer that does nothing."""

    def progress(self, report: Report) -> None:
        del report

    def scalars(self, outer_step: int, values: Mapping[str, float]) -> None:
        del outer_step, values

    def say(self, message: str) -> None:
        del message


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    outer_step: int
    finished: bool
    """False: stopped by a signal; go on with resume."""
    weights: Path
    best: Path | None
    progress: Progress


def load_tasks(
    config: MetaTrainConfig, sources: Mapping[str, str | Path]
) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """(training tasks, held-out tasks). `sources` come on top of the configuration's [data].

    Raises TaskError for a task that cannot be made, DataError for data that are missing.
    """
    where = {name: Path(path) for name, path in {**config.data, **sources}.items()}

    def one(table: TaskTable) -> Task:
        reparametrisation = table.reparametrise.make() if table.reparametrise else None
        return make_task(table.kind, table.options, where, reparametrisation)

    return _with_names_of_their_own(map(one, config.task)), _with_names_of_their_own(
        map(one, config.held_out)
    )


def _with_names_of_their_own(tasks: Iterable[Task]) -> tuple[Task, ...]:
    """Several tasks with one network, on other data or re-parametrised, are numbered."""
    seen: Counter[str] = Counter()
    out = tuple(tasks)
    for task in out:
        seen[task.name] += 1
        if seen[task.name] > 1:
            task.name = f"{task.name}#{seen[task.name]}"
    return out


def run(
    config: MetaTrainConfig,
    tasks: Sequence[Task],
    held_out: Sequence[Task],
    out: Path,
    mesh: Mesh,
    *,
    resume: bool = False,
    observer: Observer | None = None,
) -> Outcome:
    """Meta-train until `config.outer.steps`, or until SIGTERM or SIGINT, after which the state is saved.

    Resuming continues to the same meta-parameters, bit for bit on the same machine and devices, from a checkpoint of
    any number of processes. Raises RunError for a folder that does not fit, ConfigError, CheckpointError, OSError
    (a full disk: what was saved before is whole), devices.LostProcess.
    """
    return _Run(config, tasks, held_out, RunFolder(out, devices.is_first()), mesh, observer or Silent()).go(
        resume
    )


@dataclass
class _Window:
    """Metrics since they were last shown."""

    started: float = field(default_factory=time.perf_counter)
    seen: list[Metrics] = field(default_factory=list)


class _Run:
    def __init__(
        self,
        config: MetaTrainConfig,
        tasks: Sequence[Task],
        held_out: Sequence[Task],
        folder: RunFolder,
        mesh: Mesh,
        observer: Observer,
    ) -> None:
        self.config, self.folder, self.mesh, self.observer = config, folder, mesh, observer
        self.loop = OuterLoop(config, tasks, mesh)
        settings = config.evaluation
        self.evaluators = {
            name: Evaluator(config.spec, some, settings.steps, settings.seeds)
            for name, some in (("training", tasks), ("held_out", held_out))
            if some and settings.every
        }
        self.progress = Progress()

    def go(self, resume: bool) -> Outcome:
        devices.check_same("the configuration", self.config.model_copy(update={"data": {}}).to_json())
        self.folder.begin(self.config, resume)
        devices.check_same(
            "whether --out holds a checkpoint (all processes must see it)", str(self.folder.state.exists())
        )
        theta = initial_theta(self.config)
        state = self.loop.init(theta)
        if resume and self.folder.state.exists():
            arrays, self.progress = self.folder.load(jax.eval_shape(lambda: state))
            state = self.loop.place(arrays)
            self.observer.say(f"going on after outer step {int(state.outer_step)}")
        else:
            self.folder.write_weights(self.folder.initial, self._checkpoint(theta, 0))
            self._save(state)  # so that there is something to go on from, whatever happens
        devices.check_same("the checkpoint in --out", str(int(state.outer_step)))
        self.folder.cut_log(self.progress.log_bytes)
        with _stopped_by_signals() as stopped:
            state, finished = self._loop(state, stopped)
        best = self.folder.best if self.progress.best_step is not None else None
        return Outcome(int(state.outer_step), finished, self.folder.weights, best, self.progress)

    def _loop(self, state: OuterState, stopped: Callable[[], bool]) -> tuple[OuterState, bool]:
        last, window = self.config.outer.steps, _Window()
        for step in range(int(state.outer_step) + 1, last + 1):
            state, metrics = self.loop.step(state, self.loop.data)
            # Awaited: programs on several CPU devices that are dispatched ahead can block all threads of XLA's pool.
            window.seen.append(jax.block_until_ready(metrics))
            evaluates = self.config.evaluation.every and (
                step % self.config.evaluation.every == 0 or step == last
            )
            saves = step % self.config.checkpoint.every == 0 or step == last
            # Asked after every step: all processes stop at the same one.
            stops = devices.any_process(stopped()) and step < last
            if evaluates or saves or stops or time.perf_counter() - window.started > _LOG_SECONDS:
                window = self._show(step, window)
            if evaluates:
                self._evaluate(step, state)
                window = _Window()
            if saves or stops:
                self._save(state)
            if stops:
                return state, False
        return state, True

    def _show(self, step: int, window: _Window) -> _Window:
        """Write and show what happened since the last time."""
        seen: list[Metrics] = jax.device_get(window.seen)
        seconds = time.perf_counter() - window.started
        inner_steps = len(seen) * self.loop.inner_steps
        self.progress.seconds += seconds
        self.progress.inner_steps += inner_steps
        self.progress.refused += sum(bool(m.refused) for m in seen)
        self.progress.diverged += sum(any(c.diverged.any() for c in m.tasks) for m in seen)
        loss, diverged, relative = {}, {}, []
        for number, task in enumerate(self.loop.tasks):
            means = np.mean([m.tasks[number].loss for m in seen], axis=0)
            shares = np.mean([m.tasks[number].diverged for m in seen], axis=0)
            loss[task.task.name] = dict(zip(task.task.variants, map(float, means), strict=True))
            diverged[task.task.name] = dict(zip(task.task.variants, map(float, shares), strict=True))
            relative.append(means.mean() / task.task.initial_loss)
        norms = np.mean([m.task_gradient_norms for m in seen], axis=0)
        rate = inner_steps / seconds
        gradient_norm = float(np.mean([m.gradient_norm for m in seen]))
        line = {
            "outer_step": step,
            "seconds": round(self.progress.seconds, 3),
            "inner_steps_per_second": round(rate, 1),
            "mean_inner_loss": loss,
            "diverged": diverged,
            "gradient_norm": gradient_norm,
            "task_gradient_norms": [float(x) for x in norms],
        }
        self.progress.log_bytes = self.folder.log(line)
        mean = float(np.mean(relative))
        left = (self.config.outer.steps - step) * self.loop.inner_steps / rate
        self.observer.progress(Report(step, self.config.outer.steps, mean, rate, left))
        flat = {f"loss/{t}/{d}": x for t, by in loss.items() for d, x in by.items()}
        self.observer.scalars(step, {**flat, "inner_steps_per_second": rate, "gradient_norm": gradient_norm})
        return _Window()

    def _evaluate(self, step: int, state: OuterState) -> None:
        """Evaluate the average on all tasks, and keep it if it is the best on the held-out ones."""
        theta = self.loop.named(devices.gather(state.average))
        results: dict[str, list[Result]] = {name: e(theta) for name, e in self.evaluators.items()}
        score = held_out_score(results.get("held_out") or results["training"])
        found = {
            name: [
                {"task": r.task, "dataset": r.dataset, "mean_loss": r.mean_loss, "last_loss": r.last_loss}
                for r in rs
            ]
            for name, rs in results.items()
        }
        entry = {"outer_step": step, "score": score, **found}
        self.progress.evaluations.append(entry)
        self.progress.log_bytes = self.folder.log({"evaluation": entry})
        self.observer.scalars(step, {"score": score})
        best = self.progress.best_score
        if np.isfinite(score) and (best is None or score < best):
            self.progress.best_score, self.progress.best_step = score, step
            self.folder.write_weights(self.folder.best, self._checkpoint(theta, step))
        self.observer.say(
            f"outer step {step}: score {score:.4f}" + (" (best)" if self.progress.best_step == step else "")
        )

    def _save(self, state: OuterState) -> None:
        arrays = devices.gather(state)
        self.folder.save(arrays, self.progress)
        self.folder.write_weights(
            self.folder.weights, self._checkpoint(self.loop.named(arrays.average), int(arrays.outer_step))
        )

    def _checkpoint(self, theta: Mapping[str, np.ndarray], step: int) -> Checkpoint:
        record = {
            "date": date.today().isoformat(),
            "name": self.config.name,
            "outer_steps": step,
            "inner_steps": self.progress.inner_steps,
            "seconds": round(self.progress.seconds, 1),
            "datasets": {name: "" for t in self.loop.tasks for name in t.task.variants},
            "tasks": [t.task.name for t in self.loop.tasks],
            "configuration": self.config.model_dump(mode="json", exclude={"data"}),
            "evaluations": self.progress.evaluations[-1:],
            "devices": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}, {jax.process_count()} processes",
            "versions": _versions(),
        }
        return Checkpoint(
            self.config.spec,
            dict(theta),
            self.config.optimizer.architecture,
            metadata={"meta_training": record},
        )


def _versions() -> dict[str, str]:
    found = {}
    for package in ("lopt_fast", "jax", "optax"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and the first SIGINT set what the function given returns; a second SIGINT interrupts at once."""
    event = threading.Event()
    before: dict[int, Any] = {}

    def stop(number: int, frame: Any) -> None:
        del frame
        event.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
        before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Observer", "Outcome", "Report", "RunError", "Silent", "load_tasks", "run"]
