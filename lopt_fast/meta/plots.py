"""The plots at the end of a run, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .store import read_metrics


def plot_run(folder: Path) -> list[Path]:
    """Write meta_loss.png and, where the run was evaluated, evaluation.png. Raises ImportError without matplotlib."""
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "mean_inner_loss" in line]
    evaluations = [line["evaluation"] for line in lines if "evaluation" in line]
    written = []
    if steps:
        series: dict[str, list[tuple[int, float]]] = {}
        for line in steps:
            for task, by in line["mean_inner_loss"].items():
                for dataset, loss in by.items():
                    if loss is not None:
                        series.setdefault(f"{task} {dataset}", []).append((line["outer_step"], loss))
        written.append(_plot(series, folder / "meta_loss.png", "mean inner loss of the truncation"))
    if evaluations:
        series = {}
        for entry in evaluations:
            for group in ("training", "held_out"):
                for result in entry.get(group, []):
                    name = f"{result['task']} {result['dataset']}" + (
                        " (held out)" if group == "held_out" else ""
                    )
                    if result["mean_loss"] is not None:
                        series.setdefault(name, []).append((entry["outer_step"], result["mean_loss"]))
        written.append(_plot(series, folder / "evaluation.png", "mean training loss of the evaluation"))
    return written


def _plot(series: dict[str, list[tuple[int, float]]], target: Path, label: str) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.add_subplot()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set(xlabel="outer step", ylabel=label, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(target, dpi=120)
    return target
