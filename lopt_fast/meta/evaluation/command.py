"""The command `lopt-fast eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ...terminal import errors, stderr, stdout, write_json

_QUICK = {"steps": 200, "seeds": 2, "rates": 7, "draws": 16}
_USUAL = {"steps": 2000, "seeds": 5, "rates": 15, "draws": 50}


def eval_command(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...", help="Names of shipped weights, files, or folders of meta-training runs."
        ),
    ],
    tasks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Tasks, held-out tasks and data, as in a configuration of meta-training.",
        ),
    ] = None,
    task: Annotated[
        list[str],
        typer.Option(
            metavar="KIND",
            help="Only these kinds of task, small; repeat it. Default: five kinds that need no files.",
        ),
    ] = [],  # noqa: B006  (typer wants a list)
    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=PATH", help="Where a data set lies; repeat it. On top of those in --tasks."
        ),
    ] = [],  # noqa: B006
    steps: Annotated[int | None, typer.Option(min=10, help="Inner steps; default 2000.")] = None,
    horizons: Annotated[str, typer.Option(help="Compare at these multiples of the steps, like 1,5.")] = "1",
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds; default 5.")] = None,
    baselines: Annotated[
        str,
        typer.Option(
            help="Of sgdm, adam, nadamw, adam_default (untuned), by commas. Without adam nothing is relative to it."
        ),
    ] = "sgdm,adam,nadamw",
    rates: Annotated[
        int | None, typer.Option(min=3, help="Learning rates to tune SGD and Adam; default 15.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(min=1, help="Draws from the search space of NAdamW; default 50, the paper has 1000."),
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(help="exact, lagged or both, for learned optimizers; default: as meta-trained."),
    ] = None,
    lr: Annotated[
        str, typer.Option(help="Learning rates of the learned optimizers, separated by commas.")
    ] = "1",
    spike: Annotated[
        float | None, typer.Option(min=0, help="Also multiply the gradient of the middle step by this.")
    ] = None,
    timing: Annotated[
        bool | None,
        typer.Option("--timing/--no-timing", help="Measure the seconds of a step; default: unless --quick."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="200 steps, 2 seeds, 7 learning rates, 16 draws, no timing; unless said otherwise.",
        ),
    ] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices to use; default: all GPUs, or one for each core.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Tuned baselines are kept here; default ~/.cache/lopt_fast/eval."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for plots and results.json.")] = Path(
        "runs/eval"
    ),
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here too.")
    ] = None,
) -> None:
    """Compare learned optimizers with tuned SGD, Adam and NAdamW: tables, training curves, a transfer matrix.

    All optimizers train the same networks on the same batches. How to read the tables: docs/evaluation.md.
    """
    given = {"steps": steps, "seeds": seeds, "rates": rates, "draws": draws}
    usual = _QUICK if quick else _USUAL
    with errors(extra="meta"):
        from .. import devices as local

        local.setup(devices)
        local.mesh()
        from ..config import read_sources
        from . import choices, report
        from .comparison import compare
        from .study import Plan
        from .tuning import Cache, default_folder

        plan = Plan(
            **{name: usual[name] if value is None else value for name, value in given.items()},
            horizons=tuple(int(x) for x in choices.read_numbers("--horizons", horizons, int)),
            baselines=choices.read_baselines(baselines),
            spike=spike,
            timing=not quick if timing is None else timing,
        )
        learned = choices.read_learned(checkpoints, statistics, choices.read_numbers("--lr", lr, float))
        sources = choices.read_tasks(tasks, task, read_sources(data))
        out.mkdir(parents=True, exist_ok=True)
        kept = Cache(cache or default_folder())
        with progress() as started:
            study = compare(sources, learned, plan, kept, started)
        written, no_plots = report.save(study, out)
        write_json(json, report.to_dict(study))
    console = stdout()
    for table in report.tables(study):
        console.print(table)
    console.print(report.wins(study), markup=False, soft_wrap=True)
    for path in written:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    if no_plots:
        console.print(no_plots, markup=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar on the terminal's error output, over the inner steps of what runs at the moment."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=stderr(), transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bars:
        shown = bars.add_task("", visible=False)

        def started(what: str, steps: int) -> Callable[[int], None]:
            bars.reset(shown, description=what, total=steps, visible=True)
            return lambda made: bars.update(shown, advance=made)

        yield started
