"""Who watches a run: a progress bar on the terminal, and TensorBoard where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .run import Report


class TerminalObserver:
    """A bar with loss, inner steps per second and time left; messages above it."""

    def __init__(
        self, console: Console, progress: Progress, bar: Any, scalar: Callable[..., None] | None
    ) -> None:
        self._console, self._progress, self._bar, self._scalar = console, progress, bar, scalar

    def progress(self, report: Report) -> None:
        note = (
            f"loss {report.loss:.4f} of the initial one, {report.inner_steps_per_second:,.0f} inner steps/s, "
            f"{_duration(report.seconds_left)} left"
        )
        self._progress.update(self._bar, completed=report.outer_step, total=report.outer_steps, note=note)

    def scalars(self, outer_step: int, values: Mapping[str, float]) -> None:
        if self._scalar is not None:
            for name, value in values.items():
                self._scalar(name, float(value), step=outer_step)

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, soft_wrap=True)


@contextmanager
def watching(console: Console, out: Path | None, outer_steps: int) -> Iterator[TerminalObserver]:
    """An observer that shows a bar on `console` and writes TensorBoard's files into `out`/tensorboard (None: none)."""
    writer = _tensorboard(out) if out is not None else None
    columns = (
        TextColumn("meta-train"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bars:
        bar = bars.add_task("meta-train", total=outer_steps, note="compiling")
        try:
            yield TerminalObserver(console, bars, bar, writer.add_scalar if writer else None)
        finally:
            if writer is not None:
                writer.close()


def _tensorboard(out: Path) -> Any:
    """A writer of scalars, or None where TensorBoard is not installed."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(out / "tensorboard"))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
