"""The command `lopt-fast`. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .backends import BACKENDS
from .meta.cli import register as register_meta
from .terminal import errors, fail, print_error, stderr, stdout, write_json
from .training import choices, problems

app = typer.Typer(
    name="lopt-fast",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fast learned optimizers: what runs here, checks against published numbers, training runs, benchmarks.",
)

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here.")]

try:
    from .benchmark.cli import app as _bench
except ImportError as _error:  # a package that benchmarks need is missing: the other commands still work
    _bench = typer.Typer(help="Benchmarks (not available here).")
    _missing = str(_error)

    @_bench.callback(invoke_without_command=True)
    def _no_bench() -> None:
        fail(f"the benchmarks cannot be imported: {_missing}")


app.add_typer(_bench, name="bench")
register_meta(app)


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[float], None]]]:
    """Bars on the terminal's error output; the function given starts a new one and returns what advances it."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"), TimeElapsedColumn(),
    )  # fmt: skip
    # Without redirection: it would send to the error output what is printed meanwhile.
    with Progress(
        *columns, console=stderr(), transient=True, redirect_stdout=False, redirect_stderr=False
    ) as progress:

        def started(label: str, steps: int) -> Callable[[float], None]:
            task = progress.add_task(label, total=steps, note="")
            return lambda loss: progress.update(task, advance=1, note=f"loss {loss:.4g}")

        yield started


# info


@app.command()
def info(json: Json = None) -> None:
    """Versions, instruction set, backends with the reason for each missing one, shipped checkpoints."""
    with errors():
        found = _info()
        console = stdout()
        for name, value in found["versions"].items():
            console.print(f"{name:16} {value or 'not installed'}")
        console.print(f"{'processor':16} {found['processor']}")
        console.print(f"{'instruction set':16} {found['instruction_set']}\n", markup=False)
        backends = Table("operation", "backend", "devices", "status", title="Backends")
        for row in found["backends"]:
            backends.add_row(row["operation"], row["backend"], row["devices"], row["reason"] or "available")
        console.print(backends)
        checkpoints = Table(
            "checkpoint", "architecture", "meta-parameters", "record", title="Shipped checkpoints"
        )
        for row in found["checkpoints"]:
            checkpoints.add_row(row["name"], row["architecture"], str(row["meta_parameters"]), row["record"])
        console.print(checkpoints if found["checkpoints"] else "no checkpoints in this build")
        write_json(json, found)


def _info() -> dict[str, Any]:
    from . import __version__, backends, checkpoint

    versions: dict[str, str | None] = {"lopt_fast": __version__, "python": platform.python_version()}
    for package in ("numpy", "torch", "triton", "jax", "jaxlib", "optax"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    try:
        instruction_set = str(backends.native().instruction_set())
    except backends.BackendError as error:
        instruction_set = f"none: {error}"
    shipped = []
    for name in checkpoint.names():
        loaded = checkpoint.load(name)
        shipped.append(
            {
                "name": name + (" (default)" if name == checkpoint.DEFAULT_NAME else ""),
                "architecture": loaded.architecture,
                "meta_parameters": loaded.spec.theta_size,
                "hyperparameters": loaded.spec.to_dict(),
                "record": _record(loaded),
            }
        )
    return {
        "versions": versions,
        "processor": _processor(),
        "instruction_set": instruction_set,
        "backends": [asdict(row) for row in backends.table()],
        "checkpoints": shipped,
    }


def _record(loaded: Any) -> str:
    """One line of how the weights were made."""
    from .spec import Spec

    spec, record = loaded.spec, loaded.metadata.get("meta_training")
    parts = [f"{spec.statistics} statistics"]
    if isinstance(spec, Spec):
        parts = [f"{spec.hidden_size} x {spec.hidden_layers} hidden, scale {spec.scale}, {parts[0]}"]
    if isinstance(record, dict):
        datasets = record.get("datasets")
        names = [name for name in datasets if name != "preprocessing"] if isinstance(datasets, dict) else []
        parts.append(
            f"meta-trained {record.get('date', '')} on {', '.join(names)}" if names else "meta-trained"
        )
    return "; ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# verify


@app.command()
def verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.npz...", help="Golden files.")],
    framework: Annotated[str, typer.Option(help="torch, jax or numpy.")] = "numpy",
    backend: Annotated[str, typer.Option(help=f"{', '.join(BACKENDS)}.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or float64; default: float64 for NumPy's reference, else float32."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, ...; for torch. Default: one that the backend runs on.")
    ] = None,
    json: Json = None,
) -> None:
    """Replay golden files through the public interface and compare every tensor and step.

    Exit status: 0 all within tolerance, 1 something beyond it, 2 a file that cannot be read or replayed.
    """
    from .verify import GoldenError, Report
    from .verify import verify as replay

    reports: list[Report] = []
    unreadable: dict[str, str] = {}
    with errors(), _progress() as started:
        advance = started("verify", len(files)) if len(files) > 1 else None
        for file in files:
            try:
                report = replay(file, framework, backend, dtype, device)
            except GoldenError as error:
                unreadable[str(file)] = str(error)
            else:
                reports.append(report)
            if advance is not None:
                advance(0.0)
    for report in reports:
        _print_report(report)
    for message in unreadable.values():
        print_error(message)
    passed = sum(report.passed for report in reports)
    console = stdout()
    summary = f"{passed} of {len(files)} files within tolerance"
    if unreadable:
        summary += f", {len(unreadable)} could not be read or replayed"
    console.print(summary)
    status = 2 if unreadable else 0 if passed == len(files) else 1
    with errors():
        write_json(
            json,
            {
                "passed": status == 0,
                "files": [_report_dict(report) for report in reports],
                "errors": [{"file": file, "error": error} for file, error in unreadable.items()],
            },
        )
    raise typer.Exit(status)


def _print_report(report: Any) -> None:
    console = stdout()
    rows = Table("tensor", "shape", "largest error", "tolerance", "at", "", box=None, pad_edge=False)
    for row in report.rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        verdict = "ok" if row.passed else "FAIL"
        rows.add_row(row.tensor, shape, f"{row.error:.2e}", f"{row.tolerance:.2e}", row.note, verdict)
    for tensor, reason in report.skipped.items():
        rows.add_row(tensor, "", "skipped", "", reason, "")
    console.print(rows)
    failed = [row.tensor for row in report.rows if not row.passed]
    verdict = f"FAIL ({', '.join(failed)})" if failed else "pass"
    where = f"{report.framework}, {report.backend}, {report.dtype}"
    console.print(f"{report.file}: {verdict} ({where})\n", markup=False, soft_wrap=True)


def _report_dict(report: Any) -> dict[str, Any]:
    # JSON has no NaN: an error that is not finite is null, and "passed" is false.
    rows = [asdict(row) for row in report.rows]
    for row in rows:
        for key in ("error", "tolerance"):
            row[key] = row[key] if abs(row[key]) < float("inf") else None
    return {**asdict(report), "rows": rows, "passed": report.passed}


# convert


@app.command()
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A file of published weights, or hf:owner/name@revision/file; or a checkpoint of lopt_fast.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File to write.")],
    to: Annotated[str, typer.Option(help="checkpoint, npz, msgpack or pylo.")] = "checkpoint",
    family: Annotated[
        str | None, typer.Option(help="Whose weights they are; default: found from the arrays.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Argument of the published constructor. Repeat it."),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX name, for the checkpoint's metadata.")] = None,
    json: Json = None,
) -> None:
    """Published weights (Flax msgpack, named-array .npz, PyLO safetensors) to a checkpoint, and back.

    Several SOURCEs are files whose arrays belong together. Pickles are not read.
    """
    with errors():
        from .published import convert as conversion

        found = conversion.read(sources, family, _settings(settings or ()), licence)
        if not found.family and to == "checkpoint":
            raise conversion.ConvertError(
                f"{sources[0]} is a checkpoint already: give --to npz, msgpack or pylo"
            )
        target = conversion.write(found.checkpoint, out, to, None if found.family else family)
        checkpoint = found.checkpoint
        console = stdout()
        if found.arguments:
            console.print(f"family {found.family}: {_listed(found.arguments)}", markup=False, soft_wrap=True)
        console.print(
            f"{checkpoint.architecture}, {checkpoint.spec.theta_size} meta-parameters: "
            f"{_listed(checkpoint.spec.to_dict())}", markup=False, soft_wrap=True,
        )  # fmt: skip
        if to == "checkpoint" and "licence" not in checkpoint.metadata:
            console.print("licence not known: --licence SPDX puts it into the checkpoint", markup=False)
        console.print(f"wrote {target}", markup=False, soft_wrap=True)
        write_json(
            json,
            {
                "file": str(target), "format": to, "family": found.family or None,
                "arguments": dict(found.arguments), "architecture": checkpoint.architecture,
                "hyperparameters": checkpoint.spec.to_dict(), "metadata": checkpoint.metadata,
            },
        )  # fmt: skip


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE as JSON where it is, else as text."""
    from json import JSONDecodeError, loads

    from .spec import SpecError

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise SpecError(f"--set {text}: must be NAME=VALUE")
        try:
            found[name] = loads(value)
        except JSONDecodeError:
            found[name] = value
    return found


def _listed(values: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


# train


@app.command()
def train(
    task: Annotated[
        str,
        typer.Option(help=f"{', '.join(problems.BUILT_IN)}; with --data: {', '.join(problems.NEEDS_DATA)}."),
    ],
    optimizer: Annotated[
        list[str],
        typer.Option(
            help=f"{', '.join(choices.names())}, a checkpoint file; NAME@lr=3e-3, NAME:best (a short search). "
            "Repeat it."
        ),
    ],
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 1000,
    framework: Annotated[str, typer.Option(help="torch or jax.")] = "torch",
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the data files.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate where none is given with the name.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: that of the task.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initial values and batches.")] = 0,
    statistics: Annotated[
        str | None, typer.Option(help="exact or lagged, for learned optimizers; default: as meta-trained.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for results; default runs/TASK-FRAMEWORK.")
    ] = None,
    json: Json = None,
) -> None:
    """Train a built-in task with one or several optimizers: a table, results.json and plot.png."""
    with errors():
        from .training import TrainConfig, TrainingError

        if statistics not in (None, "exact", "lagged"):
            raise TrainingError(f"statistics {statistics!r}: must be exact or lagged")
        task = problems.task_name(task)
        chosen = [choices.parse(text, lr, statistics) for text in optimizer]  # type: ignore[arg-type]
        config = TrainConfig(task, chosen, steps, framework, data, batch_size, seed)  # type: ignore[arg-type]
        run_and_report([config], [out or Path("runs") / f"{task}-{framework}"], json)


def run_and_report(configs: Sequence[Any], folders: Sequence[Path], json: Path | None = None) -> None:
    """Train each configuration with progress bars, write its results to its folder, then print all tables."""
    from .training import save, table
    from .training import train as run

    results = []
    with _progress() as started:
        for config, folder in zip(configs, folders, strict=True):
            result = run(config, started)
            results.append((result, *save(result, folder)))
    console = stdout()
    for result, written, no_plot in results:
        console.print(table(result))
        for path in written:
            console.print(f"wrote {path}", markup=False, soft_wrap=True)
        if no_plot:
            console.print(no_plot, markup=False, soft_wrap=True)
    found = [result.to_dict() for result, _, _ in results]
    write_json(json, found[0] if len(found) == 1 else {"runs": found})


def main() -> None:
    """Entry point of the command."""
    app(prog_name="lopt-fast")


if __name__ == "__main__":
    main()
