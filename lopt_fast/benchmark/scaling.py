"""`lopt-fast bench scaling`: seconds of a step of every optimizer by number of parameters and by depth (Moudgil et al.
2023, "Learning to Optimize with Recurrent Hierarchical Transformers", Figures 3 and 4), with a plot.

The models are perceptrons: of some layers and many widths, and of one width and many depths. Beside the time stands the
share of the step outside of operations: the network over tensors, and what Python and the framework do around it.
Nothing but the step is timed, so there is no batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..architectures import ARCHITECTURES, initial_theta
from ..checkpoint import Checkpoint
from . import BenchmarkError, architectures, plotting
from .architectures import TooSlow

INPUTS, CLASSES = 784, 10
WIDTHS, DEPTHS = "128,256,512,1024,2048,4096", "4,8,16,32,64,128"
ADAMW = "AdamW, fused"


class Model(NamedTuple):
    """A perceptron with `layers` matrices, between hidden layers of `width` units."""

    width: int
    layers: int

    @property
    def label(self) -> str:
        return f"width {self.width}, {self.layers} layers"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its tensors: 784 inputs, 10 classes."""
        units = [INPUTS, *[self.width] * (self.layers - 1), CLASSES]
        return [shape for n_in, n_out in pairwise(units) for shape in ((n_in, n_out), (n_out,))]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Sizes:
    """Models in two series. Raises BenchmarkError for sizes that cannot be."""

    widths: Sequence[int]
    depths: Sequence[int]
    layers: int = 4
    """Of the models of different widths."""
    width: int = 256
    """Of the models of different depths."""

    def __post_init__(self) -> None:
        for size in (*self.widths, *self.depths, self.layers, self.width):
            if size < 1:
                raise BenchmarkError(f"size {size}: widths and numbers of layers are at least 1")

    @property
    def models(self) -> list[Model]:
        """Each once, those with few parameters first."""
        both = {Model(w, self.layers) for w in self.widths} | {Model(self.width, d) for d in self.depths}
        return sorted(both, key=lambda m: (m.parameters, m))


def run(
    chosen: Sequence[str],
    sizes: Sizes,
    *,
    threads: int,
    seconds: float,
    slowest_step: float,
    backend: str,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each model and architecture.

    One that takes more than `slowest_step` seconds for its first step is left out, and so are wider models that would
    in proportion to their parameters: such a row has the reason, `skipped`, in the place of times.
    """
    architectures.check(chosen)
    architectures.use_torch(threads)
    rows: list[dict[str, Any]] = []
    slowness: dict[tuple[str, int], float] = {}  # seconds per parameter of the last narrower model
    for model in sizes.models:
        for name in chosen:
            row: dict[str, Any] = {
                "architecture": name,
                "width": model.width,
                "layers": model.layers,
                "parameters": model.parameters,
            }
            say(f"{name}, {model.label}")
            key = name, model.layers
            try:
                guess = slowness.get(key, 0.0) * model.parameters
                if guess > slowest_step:
                    raise TooSlow(f"a step would take {guess:.1f} s and more, judged by a narrower model")
                row |= _measured(name, model, seconds, slowest_step, backend)
            except TooSlow as reason:
                slowness[key] = max(slowness.get(key, 0.0), slowest_step / model.parameters)
                row["skipped"] = str(reason)
            else:
                slowness[key] = row["step"]["median"] / model.parameters
            rows.append(row)
    return rows


def _measured(name: str, model: Model, seconds: float, slowest_step: float, backend: str) -> dict[str, Any]:
    spec = ARCHITECTURES[name]()
    optimizer = architectures.learned(Checkpoint(spec, initial_theta(spec)), model.shapes, backend)
    found = architectures.measure(
        architectures.step_of(optimizer), model.shapes, seconds=seconds, rounds=3, slowest_step=slowest_step
    )
    used = found["vs_operations"]
    share = None if used is None else max(0.0, 1.0 - 1.0 / used["median"])
    return {"backend": architectures.backend_of(optimizer)} | found | {"share_outside_operations": share}


def adamw(rows: Sequence[Mapping[str, Any]]) -> dict[Model, float]:
    """Median seconds of AdamW's step, which all architectures took turns with, by model."""
    found: dict[Model, list[float]] = {}
    for row in rows:
        if "skipped" not in row:
            found.setdefault(Model(row["width"], row["layers"]), []).append(row["adamw"]["median"])
    return {model: sorted(medians)[len(medians) // 2] for model, medians in found.items()}


def panels(record: Mapping[str, Any]) -> list[tuple[str, str, list[Model]]]:
    """(title, what its horizontal axis is: `parameters` or `layers`, models in order) of both series."""
    options = record["options"]
    models = [Model(row["width"], row["layers"]) for row in record["results"]]
    depths = sorted({m for m in models if m.width == options["width"] and m.layers in options["depths"]})
    widths = sorted({m for m in models if m.layers == options["layers"] and m.width in options["widths"]})
    return [
        (f"{options['layers']} layers, width {_span(m.width for m in widths)}", "parameters", widths),
        (f"width {options['width']}, {_span(m.layers for m in depths)} layers", "layers", depths),
    ]


def _span(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return " to ".join(f"{value:,}" for value in dict.fromkeys((ordered[0], ordered[-1]))) if ordered else ""


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Two panels, seconds over parameters and over layers, with the share outside of operations below them. Needs
    matplotlib."""
    from matplotlib.ticker import EngFormatter, NullLocator, PercentFormatter

    found = {
        (row["architecture"], Model(row["width"], row["layers"])): row
        for row in record["results"]
        if "skipped" not in row
    }
    rival, machine = adamw(record["results"]), record["machine"]
    slowest: dict[str, float] = {}
    for (name, _), row in found.items():
        slowest[name] = max(slowest.get(name, 0.0), row["step"]["median"])
    figure = plotting.figure(13, 8)
    axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(2, 1))
    for (title, unit, models), above, below in zip(panels(record), axes[0], axes[1], strict=True):
        at = {m: m.parameters if unit == "parameters" else m.layers for m in models}
        for name in sorted(slowest, key=lambda name: -slowest[name]):  # as the legend shows them
            line = {
                "linestyle": "-" if ARCHITECTURES[name]().theta_shapes else "--",
                "linewidth": 1.4, "markersize": 5, **plotting.style(name),
            }  # fmt: skip
            shown = {at[m]: found[name, m] for m in models if (name, m) in found}
            above.plot(list(shown), [row["step"]["median"] for row in shown.values()], label=name, **line)
            shares = {x: row["share_outside_operations"] for x, row in shown.items()}
            shares = {x: share for x, share in shares.items() if share is not None}
            below.plot(list(shares), list(shares.values()), **line)
        timed = [m for m in models if m in rival]
        above.plot([at[m] for m in timed], [rival[m] for m in timed], "k:", linewidth=2, label=ADAMW)
        above.set(title=title, xscale="log", yscale="log")
        above.yaxis.set_major_formatter(EngFormatter(unit="s"))
        below.set(xlabel=unit)
        below.yaxis.set_major_formatter(PercentFormatter(1.0))
        below.set_xticks(list(at.values()), [short(x) for x in at.values()])
        below.xaxis.set_minor_locator(NullLocator())
        for axis in (above, below):
            axis.grid(True, which="major", alpha=0.35)
            axis.grid(True, which="minor", alpha=0.12)
            axis.tick_params(which="both", labelleft=True)
    axes[0][0].set_ylabel("time of a step")
    axes[1][0].set_ylim(bottom=0)
    axes[1][0].set_ylabel("share outside of operations")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle(
        "A step of each optimizer in PyTorch, perceptrons (dashed: designed by hand); "
        f"{machine['processor']}, {machine['threads']} threads"
    )
    plotting.save(figure, path)


def short(number: int) -> str:
    """Three digits at most: 101k, 1.3M."""
    for unit, scale in (("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:.2g}{unit}" if number < 10 * scale else f"{number / scale:.0f}{unit}"
    return str(number)
