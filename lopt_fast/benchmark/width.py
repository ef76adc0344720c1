"""`lopt-fast bench width`: seconds per step over the width of the MLP, fused against framework code (Metz et al.
2022, arXiv 2203.11860, Figure 3b), with a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .contenders import Config, Framework, Kind
from .update import Session
from .workloads import Workload

WIDTHS = "2,4,8,16,32,64,128,256"


def run(
    workload: Workload,
    widths: Sequence[int],
    frameworks: Sequence[Framework],
    config: Config,
    session: Session,
) -> list[dict[str, Any]]:
    """One comparison for each width and framework: AdamW, fused, matmul, element-wise."""
    kinds: dict[Framework, list[Kind]] = {
        "torch": ["adamw_fused", "lopt_fast", "matmul", "elementwise"],
        "jax": ["adamw", "lopt_fast", "matmul", "elementwise"],
    }
    return [
        session.compare(
            [(framework, kind) for kind in kinds[framework]], replace(config, width=width), workload
        )
        for framework in frameworks
        for width in widths
    ]


_STYLE = {
    "lopt_fast": ("lopt_fast, fused", "o-"),
    "matmul": ("framework code, matmul", "s--"),
    "elementwise": ("framework code, element-wise", "^--"),
    "adamw_fused": ("AdamW, fused", "k:"),
    "adamw": ("optax AdamW", "k:"),
}


def series(record: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """{contender: [(width, nanoseconds per parameter)]} of a width record, in order of width."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in record["results"]:
        for contender in result["contenders"]:
            lines.setdefault(contender["name"], []).append((result["width"], contender["ns_per_parameter"]))
    return {name: sorted(points) for name, points in lines.items()}


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Nanoseconds per parameter over width, one panel for each framework. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = series(record)
    frameworks = list(dict.fromkeys(name.partition("/")[0] for name in lines))
    figure, axes = pyplot.subplots(
        1, max(1, len(frameworks)), figsize=(5.5 * max(1, len(frameworks)), 4), squeeze=False, sharey=True
    )
    for axis, framework in zip(axes[0], frameworks, strict=False):
        for name, points in lines.items():
            if name.partition("/")[0] == framework:
                label, style = _STYLE.get(name.partition("/")[2], (name, "-"))
                axis.loglog([w for w, _ in points], [t for _, t in points], style, label=label, base=2)
        axis.set_yscale("log", base=10)
        axis.set_xticks(widths := sorted({w for points in lines.values() for w, _ in points}))
        axis.set_xticklabels([str(w) for w in widths])
        axis.set_xlabel("hidden units")
        axis.set_title(framework)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("nanoseconds per parameter and step")
    machine = record["machine"]
    workload = record["results"][0]["workload"] if record["results"] else ""
    figure.suptitle(f"{workload}, {machine['processor']}, {machine['threads']} threads", fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
