"""What plots of records have in common: colours, labels that leave each other room, files. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from ..architectures import ARCHITECTURES
from ..files import write_atomically

COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
    "#08306b", "#67000d", "#00441b", "#3f007d",
)  # fmt: skip
MARKERS = "os^Dv<>PXp*hd8"

Point: TypeAlias = tuple[float, float]
Box: TypeAlias = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""

_DISTANCES = (7.0, 12.0, 18.0, 26.0, 36.0, 50.0)  # of a label from its point, in points of 1/72 inch
_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))  # the better ones first
_CLOSE = 12.0  # a label that is no further away needs no line
_MARKER = 4.0  # half the size of one, likewise


def style(architecture: str) -> dict[str, str]:
    """Colour and marker of an architecture, the same in all plots."""
    index = list(ARCHITECTURES).index(architecture)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def figure(width: float, height: float) -> Any:
    """An empty one of this size in inches, for a file alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def save(figure: Any, path: Path) -> None:
    """Write the figure as PNG, all of it or nothing."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, image.getvalue())


def label_points(
    axes: Any,
    points: Sequence[Point],
    labels: Sequence[str],
    lines: Sequence[tuple[Point, Point]] = (),
    **text: Any,
) -> None:
    """Write each label beside its point, joined to it by a line if that is not close: where it covers no point, no
    other label and none of `lines`, horizontal or vertical ones, as far as there is room. All in data coordinates.
    The limits of the axes and the layout of the figure must be final."""
    renderer = axes.figure.canvas.get_renderer()
    scale = axes.figure.dpi / 72
    pixels = [tuple(axes.transData.transform(p)) for p in points]
    taken = [_box(x, y, _MARKER * scale, _MARKER * scale) for x, y in pixels]
    for ends in lines:
        (x0, y0), (x1, y1) = axes.transData.transform(ends)
        taken.append(_box((x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0) / 2 + scale, abs(y1 - y0) / 2 + scale))
    frame = axes.get_window_extent(renderer)
    for point, (x, y), label in sorted(
        zip(points, pixels, labels, strict=True), key=lambda item: -item[1][1]
    ):
        note = axes.annotate(
            label, point, (0, 0), textcoords="offset points", ha="center", va="center", **text
        )
        extent = note.get_window_extent(renderer)
        half_width, half_height = extent.width / 2, extent.height / 2
        offsets = [
            (distance, dx * (distance * scale + half_width), dy * distance * scale)
            for distance, (dx, dy) in product(_DISTANCES, _DIRECTIONS)
        ]
        boxes = [_box(x + dx, y + dy, half_width, half_height) for _, dx, dy in offsets]
        costs = [sum(_overlap(box, other) for other in taken) + 1e3 * _outside(box, frame) for box in boxes]
        best = costs.index(min(costs))  # the first of the equal ones, which is the closest
        distance, dx, dy = offsets[best]
        box = boxes[best]
        taken.append(box)
        note.set_position((dx / scale, dy / scale))
        if distance > _CLOSE:
            edge = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            axes.annotate(
                "", point, axes.transData.inverted().transform(edge),
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            )  # fmt: skip


def _box(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlap(a: Box, b: Box) -> float:
    """Area in pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, frame: Any) -> float:
    """By how many pixels a box sticks out of a frame."""
    left, bottom, right, top = box
    beyond = (frame.x0 - left, right - frame.x1, frame.y0 - bottom, top - frame.y1)
    return sum(max(0.0, pixels) for pixels in beyond)
