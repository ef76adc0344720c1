"""`lopt-fast bench tradeoff`: time and memory of a step against the training loss that is reached (Metz et al. 2022,
arXiv 2203.11860, Figures 1 and 2), with a plot.

The loss comes from `lopt-fast eval`: the mean training loss on the evaluation tasks, of weights and tuned baselines.
The time is that of a step in PyTorch on tensors of a given size, of baselines with the fastest implementation at hand.
Memory has two parts: the state, which stays, and the most that a step allocates beside it. It is measured in a process
of its own, as in `memory`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint, load, names
from . import BenchmarkError, architectures, memory, plotting

if TYPE_CHECKING:
    from ..meta.evaluation.comparison import Started
    from ..meta.evaluation.study import Learned, Plan

TORCH: Mapping[str, Mapping[str, Any]] = {
    "torch.optim.SGD": {"momentum": 0.9},
    "torch.optim.Adam": {},
}
"""Options of the optimizers of PyTorch that are timed, beside `fused`."""
_BASELINES = {"sgdm": "torch.optim.SGD", "adam": "torch.optim.Adam", "adam_default": "torch.optim.Adam"}
"""What is timed in the place of a baseline of the evaluation; for others the architecture of its name."""


@dataclass(frozen=True)
class Entry:
    """An optimizer of an evaluation."""

    label: str
    learned: bool
    timed: str | Checkpoint
    """One of `TORCH`, or what `load` takes."""
    losses: Mapping[str, float]
    """Mean training loss of each task and data set."""
    meta_loss: float
    """Geometric mean over the tasks of the mean training loss over the initial loss, data sets of a task first."""


# the loss


def read_evaluation(path: Path) -> dict[str, Any]:
    """`results.json` of `lopt-fast eval`, or that in the folder. Raises BenchmarkError."""
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(
            f"{file}: {error}; `lopt-fast eval --out DIR` writes DIR/results.json"
        ) from error
    if not isinstance(found, dict) or not found.get("comparisons") or "learned" not in found:
        raise BenchmarkError(f"{file}: not a results.json of `lopt-fast eval` with at least one comparison")
    return found


def evaluate(learned: Sequence[Learned], tasks: Path | None, plan: Plan, started: Started) -> dict[str, Any]:
    """What `lopt-fast eval` writes, of these optimizers. Needs JAX."""
    from ..meta.evaluation import choices, report
    from ..meta.evaluation.comparison import compare
    from ..meta.evaluation.tuning import Cache, default_folder

    sources = choices.read_tasks(tasks, (), {})
    return report.to_dict(compare(sources, learned, plan, Cache(default_folder()), started))


def read_learned(checkpoints: Sequence[str]) -> list[Learned]:
    """The shipped weights and `checkpoints`, as `lopt-fast eval` takes them."""
    from ..meta.evaluation import choices

    return choices.read_learned([*names(), *(c for c in checkpoints if c not in names())], None, [1.0])


def entries(evaluation: Mapping[str, Any], learned: Sequence[Learned]) -> tuple[list[Entry], dict[str, str]]:
    """(the optimizers of an evaluation whose step can be taken, {label of another: why not}).

    learned: the weights that there are. Of several lengths of training the shortest counts.
    """
    from ..meta.evaluation.baselines import BASELINES
    from ..meta.evaluation.evaluate import Result, held_out_score

    weights = {o.name: o.checkpoint for o in learned}
    used = {o["optimizer"]: o for o in evaluation["learned"]}
    baselines = {b.label: name for name, b in BASELINES.items()}
    shortest = min(c["steps"] for c in evaluation["comparisons"])
    comparisons = [c for c in evaluation["comparisons"] if c["steps"] == shortest]
    rows: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for c in comparisons:
        for row in c["optimizers"]:
            rows.setdefault(row["optimizer"], []).append((c, row))
    found, missing = [], {}
    for label, both in rows.items():
        own = used.get(label)
        if own is not None and own["name"] not in weights:
            missing[label] = "the weights are not shipped: give them with --checkpoint"
            continue
        if len(both) < len(comparisons):
            missing[label] = f"it was evaluated in {len(both)} of {len(comparisons)} comparisons"
            continue
        results = [
            Result(
                task=c["task"], dataset=c["dataset"], steps=c["steps"], seeds=evaluation["seeds"],
                initial_loss=c["initial_loss"],
                **{k: row[k] for k in ("mean_loss", "standard_error", "last_loss", "last_standard_error", "diverged")},
            )
            for c, row in both
        ]  # fmt: skip
        timed: str | Checkpoint
        if own is not None:
            shown, timed = _weights(own, weights[own["name"]])
        else:
            name = baselines[label]
            tried = min(len(row["search"]) for _, row in both)
            shown = f"{label}, best of {tried}" if tried > 1 else label
            timed = _BASELINES.get(name, name)
        losses = {f"{r.task} {r.dataset}": r.mean_loss for r in results}
        found.append(Entry(shown, own is not None, timed, losses, math.exp(held_out_score(results))))
    if not found:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in missing.items())
        raise BenchmarkError(f"no optimizer of the evaluation can be timed: {reasons}")
    return found, missing


def _weights(used: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[str, Checkpoint]:
    """(label, checkpoint as it was used)"""
    label, spec = used["name"], checkpoint.spec
    if used["statistics"] != spec.statistics:
        label, spec = f"{label}, {used['statistics']}", spec.with_statistics(used["statistics"])
    if used["learning_rate"] != 1:
        label += f", lr {used['learning_rate']:g}"
    return label, replace(checkpoint, spec=spec)


# time and memory


def build(
    timed: str | Checkpoint, shapes: Sequence[tuple[int, ...]], backend: str
) -> tuple[Any, str, Callable[[], object]]:
    """(optimizer, what computes its steps, its step) for tensors of these shapes."""
    if isinstance(timed, str) and timed in TORCH:
        import torch

        kind = getattr(torch.optim, timed.removeprefix("torch.optim."))
        optimizer = kind(architectures.parameters(shapes), lr=1e-3, fused=True, **TORCH[timed])
        return optimizer, "PyTorch, fused", optimizer.step
    ours = architectures.learned(load(timed), shapes, backend)
    return ours, architectures.backend_of(ours), architectures.step_of(ours)


def state_bytes(optimizer: Any) -> int:
    """Of an optimizer of PyTorch that has taken a step; of ours with what all parameters share."""
    import torch

    everything = [*optimizer.state.values(), optimizer.param_groups[0].get("shared", {})]
    arrays = (a for state in everything for a in state.values() if isinstance(a, torch.Tensor))
    return sum(a.numel() * a.element_size() for a in arrays)


def run(
    found: Sequence[Entry],
    missing: Mapping[str, str],
    size: str,
    *,
    threads: int,
    seconds: float,
    backend: str,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each optimizer, those without a step last."""
    architectures.use_torch(threads)
    shapes = architectures.shapes_of(size)
    rows: list[dict[str, Any]] = []
    for entry in found:
        say(f"time and memory of {entry.label}, {size}")
        with tempfile.TemporaryDirectory() as folder:
            weights = entry.timed if isinstance(entry.timed, Checkpoint) else None
            source = weights.save(Path(folder) / "weights.safetensors") if weights else entry.timed
            request = {"timed": str(source), "size": size, "backend": backend, "threads": threads}
            used = memory.in_subprocess(__name__, request, f"memory of {entry.label}")
        _, by, step = build(entry.timed, shapes, backend)
        measured = architectures.measure(step, shapes, seconds=seconds)
        number = measured["parameters"]
        rows.append(
            {
                "optimizer": entry.label,
                "learned": entry.learned,
                "architecture": weights.architecture if weights else entry.timed,
                "backend": by,
                "workload": size,
                **measured,
                "state_bytes_per_parameter": used["state"] / number,
                "temporary_bytes_per_parameter": used["temporary"] / number,
                "meta_loss": entry.meta_loss,
                "losses": dict(entry.losses),
            }
        )
    return rows + [{"optimizer": label, "skipped": reason} for label, reason in missing.items()]


def _main(request: str) -> None:
    """Memory of the steps of one optimizer."""
    from .records import limit_threads

    asked = json.loads(request)
    limit_threads(asked["threads"])
    architectures.use_torch(asked["threads"])
    optimizer, _, step = build(asked["timed"], architectures.shapes_of(asked["size"]), asked["backend"])
    temporary = memory.probe(step)
    print(json.dumps({"temporary": temporary, "state": state_bytes(optimizer)}))


# the plot


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, loss) for which no other one costs less and has a lower loss, by cost."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Meta-loss over time and over memory, a panel for each. Needs matplotlib."""
    from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, NullFormatter

    rows = [row for row in record["results"] if "skipped" not in row]
    options, machine = record["options"], record["machine"]
    looks = [
        {"color": plotting.style(row["architecture"])["color"], "marker": "o"}
        if row["learned"]
        else {"color": "0.25", "marker": "s"}
        for row in rows
    ]
    losses = [row["meta_loss"] for row in rows]
    times = [row["step"]["median"] for row in rows]
    states = [row["state_bytes_per_parameter"] for row in rows]
    peaks = [state + row["temporary_bytes_per_parameter"] for state, row in zip(states, rows, strict=True)]

    figure = plotting.figure(13, 6)
    left, right = figure.subplots(1, 2, sharey=True)
    bars = [((state, loss), (peak, loss)) for state, peak, loss in zip(states, peaks, losses, strict=True)]
    for bar, look in zip(bars, looks, strict=True):
        right.plot(
            *zip(*bar, strict=True), color=look["color"], linewidth=1.2, alpha=0.5, marker="|", markevery=[1]
        )
    lines = {}
    for axis, costs in ((left, times), (right, states)):
        corners = _steps(frontier(list(zip(costs, losses, strict=True))))
        lines[axis] = list(pairwise(corners))
        axis.plot(
            *zip(*corners, strict=True),
            color="0.85",
            linewidth=2.5,
            zorder=0,
            label="smallest loss at this cost",
        )
        for cost, loss, look in zip(costs, losses, looks, strict=True):
            axis.plot(
                cost, loss, markersize=7, markeredgecolor="white", markeredgewidth=0.5, zorder=3, **look
            )
        axis.set_xscale("log")
        axis.grid(True, alpha=0.35)
        axis.margins(x=0.15, y=0.1)
    if max(losses) > 2 * min(losses):
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        left.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        left.yaxis.set_minor_formatter(NullFormatter())
    left.xaxis.set_major_formatter(EngFormatter(unit="s"))
    left.set(xlabel="time of a step", ylabel="mean training loss / initial loss")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    right.set(xlabel="bytes per parameter: state (point), and with what a step allocates (bar)")
    left.plot([], [], linestyle="none", marker="o", color="0.6", label="learned")
    left.plot([], [], linestyle="none", marker="s", color="0.25", label="designed by hand")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    count, _, shape = options["size"].rpartition(":")
    figure.suptitle(
        f"tasks and data sets: {len(rows[0]['losses'])}, {options['steps']:,} steps each; "
        f"time of a step on {f'{count} tensors of ' if count else ''}{shape}, {machine['processor']}, "
        f"{machine['threads']} threads",
        fontsize="medium",
    )
    figure.draw_without_rendering()  # limits and layout are final from here on
    figure.set_layout_engine("none")
    names = [row["optimizer"] for row in rows]
    for axis, costs, more in ((left, times, []), (right, states, bars)):
        points = list(zip(costs, losses, strict=True))
        plotting.label_points(axis, points, names, [*lines[axis], *more], fontsize="small")
    plotting.save(figure, path)


def _steps(points: Sequence[plotting.Point]) -> list[plotting.Point]:
    """Corners of the stairs through points: right, then down."""
    corners = list(points[:1])
    for before, point in pairwise(points):
        corners += [(point[0], before[1]), point]
    return corners


if __name__ == "__main__":
    _main(sys.argv[1])
