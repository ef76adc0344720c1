"""Tables, JSON and plots of a `Study`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ...errors import install
from ...files import write_atomically
from ...training.report import write_json
from .curves import clipped, smoothed
from .study import Comparison, Learned, Row, Spike, Study

_POINTS = 200  # of a curve in JSON


def trained_on(learned: Learned) -> str:
    """What the checkpoint was meta-trained on, from its record."""
    record = learned.checkpoint.metadata.get("meta_training")
    if not isinstance(record, Mapping):
        return "unknown"
    tasks = record.get("tasks")
    name = (
        ", ".join(map(str, tasks))
        if isinstance(tasks, list)
        else str(record.get("inner_task", "")).split(",")[0]
    )
    sets = [k for k in record.get("datasets") or {} if k != "preprocessing"]
    return " on ".join(part for part in (name, ", ".join(sets)) if part) or "unknown"


def hyperparameters(row: Row) -> str:
    """Those that won, in few digits."""
    short = {"learning_rate": "lr", "num_steps": ""}
    parts = [f"{short.get(k, k)} {v:.3g}" for k, v in row.hyperparameters.items() if short.get(k, k)]
    return ", ".join(parts)


# tables


def _table(title: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    return table


def tables(study: Study) -> list[Table]:
    """All of them."""
    out = [_comparison_table(c, study.plan.seeds) for c in study.comparisons]
    out += [_spike_table(study.spikes)] if study.spikes else []
    matrix = _transfer_table(study)
    return out + ([matrix] if matrix is not None else [])


def _comparison_table(c: Comparison, seeds: int) -> Table:
    """One row for each optimizer, the one with the smallest mean loss marked."""
    table = _table(f"{c.task}, {c.dataset}: {c.steps} steps, {seeds} seeds", "* smallest mean loss")
    table.add_column("optimizer", overflow="fold")
    names = ["mean loss", "last 5 %"]
    timed = any(r.seconds_per_step is not None for r in c.rows)
    names += ["ms/step"] if timed else []
    if c.adam is not None:
        names += ["mean loss\n/ Adam's", "steps to\nAdam's end"] + (
            ["seconds to\nAdam's end"] if timed else []
        )
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("hyperparameters, remarks", overflow="fold")
    for row in c.rows:
        r = row.result
        cells = [_with_error(r.mean_loss, r.standard_error), _with_error(r.last_loss, r.last_standard_error)]
        cells += [_ms(row)] if timed else []
        if c.adam is not None:
            cells.append(f"{r.mean_loss / c.adam.result.mean_loss:.3f}")
            cells.append("never" if row.steps_to_adam is None else str(row.steps_to_adam))
            cells += (
                ["never" if row.seconds_to_adam is None else f"{row.seconds_to_adam:.3g}"] if timed else []
            )
        mark = " *" if row is c.winner else ""
        table.add_row(
            row.label + mark, *cells, "; ".join(filter(None, [hyperparameters(row), *_remarks(row)]))
        )
    return table


def _remarks(row: Row) -> list[str]:
    remarks = []
    if row.edge:
        remarks.append(f"the {row.edge} learning rate tried")
    if row.result.diverged:
        remarks.append(f"diverged: {row.result.diverged} of {row.result.seeds} seeds")
    return remarks


def _with_error(value: float, error: float) -> str:
    return f"{value:.4g} ± {error:.1g}" if math.isfinite(error) else f"{value:.4g}"


def _ms(row: Row) -> str:
    return "" if row.seconds_per_step is None else f"{1e3 * row.seconds_per_step:.3g}"


def _transfer_table(study: Study) -> Table | None:
    """Rows: learned optimizers; columns: tasks; entries: mean loss over tuned Adam's. None without Adam."""
    found = study.transfer()
    if found is None:
        return None
    columns, entries = found
    table = _table(
        f"mean loss / tuned Adam's, {study.plan.lengths[0]} steps",
        "below 1: better than Adam. Mean: geometric",
    )
    table.add_column("optimizer", overflow="fold")
    table.add_column("meta-trained on", overflow="fold")
    for name in [*columns, "mean"]:
        table.add_column(name.replace(" ", "\n"), justify="right", overflow="fold")
    for learned, row in zip(study.learned, entries, strict=True):
        means = [*row, np.exp(np.log(row).mean())]
        table.add_row(learned.label, trained_on(learned), *(f"{x:.3f}" for x in means))
    return table


def _spike_table(spikes: list[Spike]) -> Table:
    """What a spike costs."""
    table = _table(
        f"gradient of step {spikes[0].step} times {spikes[0].factor:g}: mean loss of the steps after it",
        "damage: with the spike minus without, on the same seeds",
    )
    for name in ("task", "optimizer"):
        table.add_column(name, overflow="fold")
    for name in ("without", "damage", "diverged"):
        table.add_column(name, justify="right")
    for s in spikes:
        where = f"{s.task}, {s.dataset}"
        table.add_row(
            where, s.label, f"{s.mean_loss:.4g}", _with_error(s.damage, s.standard_error), str(s.diverged)
        )
    return table


def wins(study: Study) -> str:
    """How often each optimizer has the smallest mean loss."""
    counted = Counter(c.winner.label for c in study.comparisons)
    parts = [f"{label} {n}" for label, n in counted.most_common()]
    return f"smallest mean loss in {len(study.comparisons)} comparisons: " + "; ".join(parts)


# JSON


def to_dict(study: Study) -> dict[str, Any]:
    """Plain JSON values; what is not finite is null."""
    found = study.transfer()
    return _finite(
        {
            "steps": study.plan.steps,
            "horizons": list(study.plan.horizons),
            "seeds": study.plan.seeds,
            "learned": [
                {
                    "optimizer": o.label,
                    "name": o.name,
                    "statistics": o.statistics,
                    "learning_rate": o.learning_rate,
                    "trained_on": trained_on(o),
                }
                for o in study.learned
            ],
            "comparisons": [_comparison_dict(c) for c in study.comparisons],
            "wins": dict(Counter(c.winner.label for c in study.comparisons)),
            "transfer": found
            and {
                "rows": [o.label for o in study.learned],
                "columns": found[0],
                "relative": found[1].tolist(),
            },
            "spikes": [vars(s) for s in study.spikes],
        }
    )


def _comparison_dict(c: Comparison) -> dict[str, Any]:
    return {
        "task": c.task,
        "dataset": c.dataset,
        "steps": c.steps,
        "initial_loss": c.initial_loss,
        "winner": c.winner.label,
        "optimizers": [_row_dict(c, row) for row in c.rows],
    }


def _row_dict(c: Comparison, row: Row) -> dict[str, Any]:
    by_seed = smoothed(clipped(row.losses, c.initial_loss))
    at = np.unique(np.linspace(0, c.steps - 1, min(_POINTS, c.steps)).round().astype(int))
    r = row.result
    return {
        "optimizer": row.label,
        "learned": row.learned is not None,
        "hyperparameters": row.hyperparameters,
        "edge": row.edge,
        "mean_loss": r.mean_loss,
        "standard_error": r.standard_error,
        "last_loss": r.last_loss,
        "last_standard_error": r.last_standard_error,
        "diverged": r.diverged,
        "seconds_per_step": row.seconds_per_step,
        "relative_to_adam": r.mean_loss / c.adam.result.mean_loss if c.adam else None,
        "steps_to_adam": row.steps_to_adam,
        "seconds_to_adam": row.seconds_to_adam,
        "search": [{**setting, "mean_loss": loss} for setting, loss in row.tried],
        "curve": {
            "step": (at + 1).tolist(),
            "mean": by_seed.mean(axis=0)[at].tolist(),
            "low": by_seed.min(axis=0)[at].tolist(),
            "high": by_seed.max(axis=0)[at].tolist(),
        },
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# files


def save(study: Study, folder: Path) -> tuple[list[Path], str | None]:
    """Write results.json and the plots, each as a whole or not at all: (paths, why there are no plots or None)."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "results.json"]
    write_json(written[0], to_dict(study))
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return written, f"no plots: matplotlib cannot be imported ({error}): {install('plot')}"
    from . import plots

    for c in study.comparisons:
        written.append(folder / (re.sub(r"[^\w.-]+", "_", f"{c.task}_{c.dataset}_{c.steps}") + ".png"))
        write_atomically(written[-1], plots.curves(c))
    matrix = study.transfer()
    if matrix is not None and len({o.name for o in study.learned}) > 1:
        written.append(folder / "transfer.png")
        write_atomically(written[-1], plots.transfer(study, *matrix))
    return written, None
