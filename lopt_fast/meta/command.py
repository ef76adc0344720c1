"""The command `lopt-fast meta-train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import install
from ..files import write_atomically
from ..terminal import errors, stderr, write_json


def meta_train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The settings of the run.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the run.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")
    ] = False,
    data: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="Where a data set lies; repeat it. On top of the table data."),
    ] = [],  # noqa: B006  (typer wants a list)
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Devices of this process; default: all GPUs, or one for each core."),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help='Address of process 0; "auto" under Slurm and the like.'),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    process_id: Annotated[int, typer.Option(min=0, help="Number of this process, from 0.")] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print all settings with their meanings.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here.")
    ] = None,
) -> None:
    """Meta-train a learned optimizer with evolution strategies, and keep the best by held-out tasks.

    Writes checkpoints; after a kill at any moment --resume continues to the same weights. SIGTERM saves and stops.
    Exit status: 0 finished, 2 settings, data or files that cannot be used, 75 another process was lost, 143 stopped
    by a signal.
    """
    console = stderr()
    with errors(extra="meta"):
        if explain:
            from .config import explain as text

            print(text(), end="")
            return
        if config is None or out is None:
            raise typer.BadParameter("give CONFIG.toml and --out DIR, or --explain")
        finished, numbers = _run(
            config, out, resume, data, console, (devices, coordinator, processes, process_id)
        )
        if process_id == 0:
            write_json(json, numbers)
    if not finished:
        console.print(
            f"stopped and saved; go on with: lopt-fast meta-train {config} --out {out} --resume", markup=False
        )
        raise typer.Exit(143)


def _run(
    config_path: Path,
    out: Path,
    resume: bool,
    data: list[str],
    console: Console,
    where: tuple[int | None, str | None, int, int],
) -> tuple[bool, dict[str, Any]]:
    from . import devices
    from .config import read, read_sources

    config, sources = read(config_path), read_sources(data)
    devices.setup(*where)
    with devices.guard():
        from .observers import watching
        from .run import load_tasks, run

        tasks, held_out = load_tasks(config, sources)
        mesh = devices.mesh()
        first = devices.is_first()
        if first:
            out.mkdir(parents=True, exist_ok=True)
        quiet = console if first else Console(quiet=True)
        with watching(quiet, out if first else None, config.outer.steps) as observer:
            outcome = run(config, tasks, held_out, out, mesh, resume=resume, observer=observer)
    numbers = {
        "outer_step": outcome.outer_step,
        "finished": outcome.finished,
        "inner_steps": outcome.progress.inner_steps,
        "seconds": outcome.progress.seconds,
        "best_step": outcome.progress.best_step,
        "best_score": outcome.progress.best_score,
        "clipped_outer_steps": outcome.progress.diverged,
        "refused_outer_steps": outcome.progress.refused,
    }
    if first:
        _finish(config_path, out, outcome, Console(highlight=False, soft_wrap=True))
    return outcome.finished, numbers


def _finish(config_path: Path, out: Path, outcome: Any, console: Console) -> None:
    """Plots, and what was written."""
    from .plots import plot_run

    progress = outcome.progress
    write_atomically(out / "config.toml", config_path.read_bytes())
    console.print(
        f"{outcome.outer_step} outer steps, {progress.inner_steps:,} inner steps in {progress.seconds:,.0f} s; "
        f"{progress.diverged} outer steps with clipped losses, {progress.refused} refused"
    )
    written = [outcome.weights] + ([outcome.best] if outcome.best else [])
    try:
        written += plot_run(out) if outcome.finished else []
    except ImportError:
        console.print(f"no plots: matplotlib is not installed: {install('plot')}", markup=False)
    for path in written:
        note = (
            f" (outer step {progress.best_step}, score {progress.best_score:.4f})"
            if path == outcome.best
            else ""
        )
        console.print(f"wrote {path}{note}", markup=False)
