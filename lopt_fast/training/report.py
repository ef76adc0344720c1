"""Results of training runs: table, JSON, plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ..errors import install
from ..files import write_atomically
from .choices import Choice
from .loop import Curve

_WINDOW = 20


@dataclass(frozen=True)
class Entry:
    """One optimizer's run."""

    choice: Choice
    curve: Curve
    parameters: int
    state_bytes: int
    tried: Mapping[float, float]
    """Learning rate -> loss of its short run; inf where it diverged."""


@dataclass
class Result:
    """All runs of one task."""

    task: str
    framework: str
    steps: int
    batch_size: int
    seed: int
    entries: list[Entry] = field(default_factory=list)

    def add(
        self, choice: Choice, curve: Curve, parameters: int, state_bytes: int, tried: Mapping[float, float]
    ) -> None:
        self.entries.append(Entry(choice, curve, parameters, state_bytes, tried))

    @property
    def fixed_steps(self) -> tuple[int, ...]:
        """Where the table shows the loss: a tenth, a quarter, half and the end of the run."""
        return tuple(sorted({max(1, round(self.steps * part)) for part in (0.1, 0.25, 0.5, 1.0)}))

    @property
    def window(self) -> int:
        """Number of batches over which a loss in the table is the mean."""
        return max(1, min(_WINDOW, self.steps // 10))

    @property
    def title(self) -> str:
        size = self.entries[0].parameters if self.entries else 0
        return f"{self.task} in {self.framework}, {size:,} parameters, {self.steps} steps of batch {self.batch_size}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite is null."""
        return {
            "task": self.task,
            "framework": self.framework,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "loss_window": self.window,
            "optimizers": [self._entry(e) for e in self.entries],
        }

    def _entry(self, e: Entry) -> dict[str, Any]:
        return {
            "optimizer": e.choice.label,
            "name": e.choice.name,
            "lr": e.choice.lr,
            "weight_decay": e.choice.weight_decay,
            "statistics": e.choice.statistics
            or (e.choice.checkpoint.spec.statistics if e.choice.checkpoint else None),
            "parameters": e.parameters,
            "learning_rate_search": [{"lr": lr, "loss": _finite(loss)} for lr, loss in e.tried.items()],
            "loss_at": {str(s): _finite(e.curve.loss_at(s, self.window)) for s in self.fixed_steps},
            "mean_loss": _finite(float(e.curve.losses.mean())),
            "diverged_at": None if len(e.curve.losses) == self.steps else len(e.curve.losses),
            "optimizer_ms": e.curve.update_ms,
            "step_ms": e.curve.step_ms,
            "optimizer_share": e.curve.update_ms / e.curve.step_ms,
            "state_bytes_per_parameter": e.state_bytes / e.parameters,
            "losses": [_finite(x) for x in e.curve.losses.tolist()],
            "seconds": np.cumsum(e.curve.step_seconds).round(6).tolist(),
        }


def table(result: Result) -> Table:
    """Loss at fixed steps and what the optimizer costs."""
    out = Table(
        title=result.title,
        caption=f"loss: training loss, mean of {result.window} batches",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    out.add_column("optimizer", min_width=13, overflow="fold")
    for step in result.fixed_steps:
        out.add_column(f"loss at\n{step}", justify="right")
    for name in ("optimizer\nms/step", "share\nof step", "state\nbytes /\nparam"):
        out.add_column(name, justify="right")
    for e in result.entries:
        losses = [e.curve.loss_at(s, result.window) for s in result.fixed_steps]
        out.add_row(
            e.choice.label,
            *(f"{x:.4g}" if math.isfinite(x) else "diverged" for x in losses),
            f"{e.curve.update_ms:.3g}",
            f"{e.curve.update_ms / e.curve.step_ms:.1%}",
            f"{e.state_bytes / e.parameters:.1f}",
        )
    return out


def save(result: Result, folder: Path) -> tuple[list[Path], str | None]:
    """Write results.json and plot.png, each as a whole or not at all: (paths, why there is no plot or None)."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "results.json"]
    write_json(written[0], result.to_dict())
    try:
        image = plot(result)
    except ImportError as error:
        return written, f"no plot: matplotlib cannot be imported ({error}): {install('plot')}"
    written.append(folder / "plot.png")
    write_atomically(written[1], image)
    return written, None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Raises ValueError for NaN; readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def plot(result: Result) -> bytes:
    """PNG: training loss by step and by seconds, running mean. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    window = max(1, result.steps // 40)
    lowest, highest = math.inf, -math.inf
    for e in result.entries:
        losses = e.curve.losses[np.isfinite(e.curve.losses)]
        if not len(losses):
            continue
        sums = np.cumsum(np.concatenate([[0.0], losses]))
        ends = np.arange(1, len(losses) + 1)
        smooth = (sums[ends] - sums[np.maximum(ends - window, 0)]) / np.minimum(ends, window)
        by_step.plot(ends, smooth, label=e.choice.label)
        by_time.plot(np.cumsum(e.curve.step_seconds)[: len(losses)], smooth, label=e.choice.label)
        lowest, highest = min(lowest, smooth.min()), max(highest, smooth[0])
    if 0 < lowest < highest / 20:
        by_step.set_yscale("log")
    if lowest < highest < math.inf:
        by_step.set_ylim(top=1.1 * highest)
    by_step.set(xlabel="step", ylabel=f"training loss, mean of {window} batches")
    by_time.set(xlabel="seconds (gradient and update)")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    by_step.legend(fontsize="small")
    figure.suptitle(result.title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
