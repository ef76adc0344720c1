"""Plots of a `Study`, as PNG. Needs matplotlib; no display."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .curves import clipped, smoothed, window
from .study import Comparison, Study


def curves(c: Comparison) -> bytes:
    """Smoothed training losses: the mean over the seeds, and the band between the smallest and the largest of them."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    steps = np.arange(1, c.steps + 1)
    lowest = math.inf
    for row in c.rows:
        by_seed = smoothed(clipped(row.losses, c.initial_loss))
        mean = by_seed.mean(axis=0)
        lowest = min(lowest, float(mean.min()))
        (line,) = axes.plot(
            steps, mean, label=row.label, linewidth=1.2, linestyle="-" if row.learned else "--"
        )
        axes.fill_between(
            steps, by_seed.min(axis=0), by_seed.max(axis=0), color=line.get_color(), alpha=0.15, lw=0
        )
    if 0 < lowest < c.initial_loss / 20:
        axes.set_yscale("log")
    axes.set_ylim(top=1.2 * c.initial_loss)
    axes.set(
        xlabel="step",
        ylabel=f"training loss, mean of {window(c.steps)} steps",
        title=f"{c.task}, {c.dataset}",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _png(figure)


def transfer(study: Study, columns: Sequence[str], entries: np.ndarray) -> bytes:
    """Heat map of `Study.transfer`; colours are logarithmic around 1, and end at factors of 2."""
    figure = Figure(figsize=(3 + 1.2 * len(columns), 2 + 0.6 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.log2(entries), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(
        range(len(columns)), [name.replace(" ", "\n") for name in columns], fontsize="small", rotation=30
    )
    axes.set_yticks(
        range(len(entries)), [o.label.replace(", ", "\n") for o in study.learned], fontsize="small"
    )
    for (i, j), value in np.ndenumerate(entries):
        colour = "white" if abs(math.log2(value)) > 0.6 else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour)
    bar = figure.colorbar(image, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["half or less", "Adam's mean loss", "twice or more"])
    axes.set_title(f"mean loss relative to tuned Adam, {study.plan.lengths[0]} steps")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
