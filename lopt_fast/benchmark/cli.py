"""The subcommands of `lopt-fast bench`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.markdown import Markdown

from ..backends import choose
from ..errors import install
from ..spec import Spec, Statistics
from ..terminal import errors, stderr, stdout
from . import (
    BenchmarkError,
    architectures,
    contenders,
    estimators,
    gpu,
    memory,
    meta,
    passes,
    peers,
    predict,
    records,
    report,
    resources,
    scaling,
    tradeoff,
    update,
    width,
    workloads,
)
from .contenders import Config, Framework

app = typer.Typer(no_args_is_help=True, help="Time optimizer steps. Ratios are paired within one run.")

Sizes = Annotated[
    str,
    typer.Option(
        help="1024 (a square matrix), 512x2048, 300:1000 or 300:25x40 (300 tensors); several by commas."
    ),
]
Widths = Annotated[str, typer.Option("--width", help="Hidden units, several by commas.")]
StatisticsList = Annotated[str, typer.Option("--statistics", help="exact, lagged, or both by a comma.")]
Frameworks = Annotated[str, typer.Option("--framework", help="torch, jax, or both by a comma.")]
Threads = Annotated[
    int | None, typer.Option(help="Processors to use; by default all that this process may use.")
]
Backend = Annotated[str, typer.Option(help="Backend of lopt_fast: auto, cpu or reference.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the record here.")]
Seconds = Annotated[float, typer.Option(help="How long to time each contender of a comparison.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Samples of each contender, instead of --seconds.")]
Burst = Annotated[
    int | None,
    typer.Option(min=1, help="Steps in a row for one sample (default: 1, more for steps under 0.5 ms)."),
]
Gradients = Annotated[
    bool,
    typer.Option(
        "--donate-gradients/--keep-gradients",
        help="JAX: gradients as intermediates of a training step, or as arguments that stay alive.",
    ),
]

Value = TypeVar("Value")


def _say(text: str) -> None:
    stderr().print(text, style="dim", markup=False, soft_wrap=True)


def _list(option: str, text: str, read: Callable[[str], Value]) -> list[Value]:
    try:
        values = [read(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise BenchmarkError(f"{option} {text!r}: {error}") from error
    if not values:
        raise BenchmarkError(f"{option} {text!r}: give at least one")
    return values


def _width(text: str) -> int:
    return Spec(hidden_size=int(text)).hidden_size


def _framework(text: str) -> Framework:
    for name in contenders.FRAMEWORKS:
        if text == name:
            return name
    raise BenchmarkError(f"--framework {text!r}: choose from {', '.join(contenders.FRAMEWORKS)}")


def _statistics(text: str) -> Statistics:
    if text == "exact":
        return "exact"
    if text == "lagged":
        return "lagged"
    raise BenchmarkError(f"--statistics {text!r}: choose from exact, lagged")


def _config(threads: int | None, backend: str = "auto", donate_gradients: bool = True) -> Config:
    chosen = records.available_threads() if threads is None else threads
    records.limit_threads(chosen)
    used = choose(Spec(), "cpu", "float32", backend)
    return Config(threads=chosen, backend=used, donate_gradients=donate_gradients)


def _finish(
    benchmark: str,
    results: Sequence[Mapping[str, Any]],
    config: Config,
    options: Mapping[str, Any],
    load: float | None,
    file: Path | None,
) -> dict[str, Any]:
    record = records.record(benchmark, results, threads=config.threads, options=options, load_average=load)
    if file is not None:
        records.write(file, record)
    _print(report.render(record))
    return record


def _print(text: str) -> None:
    """Markdown, drawn where a terminal shows it."""
    console = stdout()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        typer.echo(text)


def _plot(draw: Callable[[Mapping[str, Any], Path], None], record: Mapping[str, Any], target: Path) -> None:
    try:
        draw(record, target)
        typer.echo(f"plot: {target}")
    except ImportError as error:
        raise BenchmarkError(f"the plot needs matplotlib ({error}): {install('plot')}") from error


def _load() -> float | None:
    """Load average before the run; says so where something else is running."""
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load > 0.5:
        _say(f"load average {load:.1f}: something else is running, the times will be too long")
    return load


@app.command("update")
def update_command(
    sizes: Sizes = "256,512,1024,2048,4096,300:1000,300:25x40",
    widths: Widths = "4,32",
    statistics: StatisticsList = "exact,lagged",
    framework: Frameworks = "torch,jax",
    threads: Threads = None,
    backend: Backend = "auto",
    framework_code: Annotated[
        bool, typer.Option(help="Also time framework code (matmul and element-wise), which is slow.")
    ] = True,
    donate_gradients: Gradients = True,
    seconds: Seconds = 1.5,
    rounds: Rounds = None,
    burst: Burst = None,
    slowest_step: Annotated[
        float, typer.Option(help="Leave out framework code slower than this, in seconds.")
    ] = 60.0,
    json: Json = None,
) -> None:
    """One step against torch AdamW (fused, foreach), optax AdamW and framework code."""
    with errors():
        config = _config(threads, backend, donate_gradients)
        load = _load()
        budget = update.Budget(seconds=seconds, slowest_step=slowest_step, rounds=rounds, burst=burst)
        results = update.run(
            workloads.parse_list(sizes),
            _list("--width", widths, _width),
            _list("--statistics", statistics, _statistics),
            _list("--framework", framework, _framework),
            config,
            framework_code=framework_code,
            session=update.Session(budget, _say),
        )
        options = {"backend": config.backend, "donate_gradients": donate_gradients, "dtype": "float32"}
        _finish("update", results, config, options, load, json)


@app.command("passes")
def passes_command(
    sizes: Sizes = "1024,4096,300:1000",
    widths: Widths = "4,32",
    statistics: StatisticsList = "exact,lagged",
    threads: Threads = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often the copy and a few steps follow each other.")
    ] = 7,
    json: Json = None,
) -> None:
    """Each pass alone with its bytes and GB/s, against a measured copy."""
    with errors():
        config = _config(threads)
        load = _load()
        results = passes.run(
            workloads.parse_list(sizes),
            _list("--width", widths, _width),
            _list("--statistics", statistics, _statistics),
            config,
            rounds=rounds,
            say=_say,
        )
        _finish("passes", results, config, {"dtype": "float32"}, load, json)


@app.command("width")
def width_command(
    size: Annotated[str, typer.Option(help="Tensors, as in `lopt-fast bench update --sizes`.")] = "512",
    widths: Widths = width.WIDTHS,
    framework: Frameworks = "torch,jax",
    threads: Threads = None,
    backend: Backend = "auto",
    seconds: Seconds = 2.0,
    rounds: Rounds = None,
    slowest_step: Annotated[
        float, typer.Option(help="Leave out framework code slower than this, in seconds.")
    ] = 60.0,
    plot: Annotated[Path | None, typer.Option(help="PNG; by default beside --json, or width.png.")] = None,
    json: Json = None,
) -> None:
    """The cost of the width: fused, framework matmul, framework element-wise (the paper's Figure 3b)."""
    with errors():
        config = _config(threads, backend)
        load = _load()
        results = width.run(
            workloads.parse(size),
            sorted(_list("--width", widths, _width)),
            _list("--framework", framework, _framework),
            config,
            update.Session(update.Budget(seconds=seconds, slowest_step=slowest_step, rounds=rounds), _say),
        )
        record = _finish(
            "width", results, config, {"backend": config.backend, "dtype": "float32"}, load, json
        )
        _plot(width.plot, record, plot or (json.with_suffix(".png") if json else Path("width.png")))


@app.command("memory")
def memory_command(
    sizes: Sizes = "1024,4096",
    width_: Annotated[int, typer.Option("--width", help="Hidden units.")] = 4,
    statistics: StatisticsList = "exact,lagged",
    framework: Frameworks = "torch,jax",
    threads: Threads = None,
    backend: Backend = "auto",
    framework_code: Annotated[bool, typer.Option(help="Also framework code, for comparison.")] = False,
    donate_gradients: Gradients = True,
    json: Json = None,
) -> None:
    """Peak memory during a step: no temporary may grow with the number of parameters."""
    with errors():
        config = _config(threads, backend, donate_gradients)
        chosen = _list("--framework", framework, _framework)
        results: list[dict[str, Any]] = []
        for i, mode in enumerate(_list("--statistics", statistics, _statistics)):
            kinds = [
                (f, k)
                for f in chosen
                for k in contenders.KINDS[f]
                if k.startswith("lopt_fast") or (i == 0 and (framework_code or k.startswith("adamw")))
            ]
            described = replace(config, width=_width(str(width_)), statistics=mode)
            results += memory.run(workloads.parse_list(sizes), kinds, described, say=_say)
        options = {"backend": config.backend, "donate_gradients": donate_gradients, "dtype": "float32"}
        _finish("memory", results, config, options, None, json)


@app.command("peers")
def peers_command(
    sizes: Sizes = "256,1024",
    widths: Widths = "4,32",
    threads: Threads = None,
    backend: Backend = "auto",
    seconds: Seconds = 5.0,
    rounds: Rounds = None,
    json: Json = None,
) -> None:
    """google/learned_optimization and PyLO with the same meta-parameters, when they can be imported."""
    with errors():
        config = _config(threads, backend)
        load = _load()
        results = peers.run(
            workloads.parse_list(sizes),
            _list("--width", widths, _width),
            config,
            budget=update.Budget(seconds=seconds, rounds=rounds),
            say=_say,
        )
        _finish("peers", results, config, {"backend": config.backend, "dtype": "float32"}, load, json)


@app.command("meta")
def meta_command(
    pairs: Annotated[str, typer.Option(help="Antithetic pairs, by commas.")] = "8",
    devices: Annotated[
        str | None, typer.Option(help="Numbers of devices, by commas; default: 1 and one for each core.")
    ] = None,
    truncation: Annotated[int, typer.Option(min=1, help="Inner steps of a truncation.")] = 50,
    seconds: Annotated[float, typer.Option(min=0, help="How long each row is measured.")] = 10.0,
    json: Json = None,
) -> None:
    """Meta-training: inner steps a second and seconds to compile."""
    with errors():
        config = _config(None)
        load = _load()
        counts = _list("--devices", devices or ",".join(map(str, sorted({1, config.threads}))), int)
        results = meta.run(_list("--pairs", pairs, int), counts, truncation, seconds, _say)
        _finish("meta", results, config, {"truncation": truncation}, load, json)


@app.command("architectures")
def architectures_command(
    architecture: Annotated[str, typer.Option(help="Names by commas.")] = ",".join(architectures.names()),
    sizes: Annotated[
        str,
        typer.Option(help="perceptron (768-256-256-10), or sizes as in `bench update`; several by commas."),
    ] = "perceptron,10:1024x1024,1000:25x40",
    seconds: Annotated[float, typer.Option(min=0, help="How long each row is measured.")] = 5.0,
    threads: Threads = None,
    backend: Backend = "auto",
    json: Json = None,
) -> None:
    """A step of every architecture in PyTorch, against AdamW and against its own operations."""
    with errors():
        config = _config(threads)
        load = _load()
        results = architectures.run(
            _list("--architecture", architecture, str), _list("--sizes", sizes, str),
            threads=config.threads, seconds=seconds, backend=backend, say=_say,
        )  # fmt: skip
        _finish("architectures", results, config, {"backend": backend, "dtype": "float32"}, load, json)


@app.command("scaling")
def scaling_command(
    architecture: Annotated[str, typer.Option(help="Names by commas.")] = ",".join(architectures.names()),
    widths: Annotated[str, typer.Option(help="Units of hidden layers, by commas.")] = scaling.WIDTHS,
    depths: Annotated[str, typer.Option(help="Layers, by commas.")] = scaling.DEPTHS,
    layers: Annotated[int, typer.Option(help="Layers of the models of different widths.")] = 4,
    width_: Annotated[int, typer.Option("--width", help="Units in the models of different depths.")] = 256,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long each row is measured; three steps at least.")
    ] = 1.0,
    slowest_step: Annotated[
        float, typer.Option(help="Leave out steps that take more than this, in seconds.")
    ] = 5.0,
    threads: Threads = None,
    backend: Backend = "auto",
    plot: Annotated[Path | None, typer.Option(help="PNG; by default beside --json, or scaling.png.")] = None,
    json: Json = None,
) -> None:
    """A step of every optimizer in PyTorch by number of parameters and by depth."""
    with errors():
        config = _config(threads)
        load = _load()
        sizes = scaling.Sizes(_list("--widths", widths, int), _list("--depths", depths, int), layers, width_)
        results = scaling.run(
            _list("--architecture", architecture, str), sizes,
            threads=config.threads, seconds=seconds, slowest_step=slowest_step, backend=backend, say=_say,
        )  # fmt: skip
        options = {**asdict(sizes), "seconds": seconds, "slowest_step": slowest_step, "backend": backend}
        record = _finish("scaling", results, config, options | {"dtype": "float32"}, load, json)
        _plot(scaling.plot, record, plot or (json.with_suffix(".png") if json else Path("scaling.png")))


@app.command("tradeoff")
def tradeoff_command(
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            metavar="FILE_OR_FOLDER",
            help="results.json of `lopt-fast eval`, or its folder. Without it the evaluation is made first.",
        ),
    ] = None,
    checkpoint: Annotated[
        list[str],
        typer.Option(help="Weights beside the shipped ones: a file, or the folder of a run; repeat it."),
    ] = [],  # noqa: B006  (typer wants a list)
    tasks: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Tasks of the evaluation, as in `lopt-fast eval`."),
    ] = None,
    steps: Annotated[int, typer.Option(min=10, help="Inner steps of the evaluation.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the evaluation.")] = 5,
    draws: Annotated[int, typer.Option(min=1, help="Draws from the search space of NAdamW.")] = 50,
    size: Annotated[
        str, typer.Option(help="What a step is timed on, as in `bench update`, or perceptron.")
    ] = "10:1024x1024",
    seconds: Annotated[float, typer.Option(min=0, help="How long each optimizer is timed.")] = 3.0,
    threads: Threads = None,
    backend: Backend = "auto",
    plot: Annotated[Path | None, typer.Option(help="PNG; by default beside --json, or tradeoff.png.")] = None,
    json: Json = None,
) -> None:
    """Time and memory of a step against the training loss: shipped weights and tuned baselines."""
    with errors(extra="meta"):
        config = _config(threads)
        load = _load()
        architectures.use_torch(config.threads)  # what cannot be is refused before anything has been computed
        architectures.shapes_of(size)
        learned = tradeoff.read_learned(checkpoint)
        if evaluation is None:
            from ..meta import devices
            from ..meta.evaluation.command import progress
            from ..meta.evaluation.study import Plan

            devices.setup()
            devices.mesh()
            with progress() as started:
                plan = Plan(steps=steps, seeds=seeds, draws=draws, timing=False)
                losses = tradeoff.evaluate(learned, tasks, plan, started)
        else:
            losses = tradeoff.read_evaluation(evaluation)
        results = tradeoff.run(
            *tradeoff.entries(losses, learned), size,
            threads=config.threads, seconds=seconds, backend=backend, say=_say,
        )  # fmt: skip
        options = {
            "eval": None if evaluation is None else str(evaluation), "steps": losses["steps"],
            "seeds": losses["seeds"], "size": size, "seconds": seconds, "backend": backend, "dtype": "float32",
        }  # fmt: skip
        record = _finish("tradeoff", results, config, options, load, json)
        _plot(tradeoff.plot, record, plot or (json.with_suffix(".png") if json else Path("tradeoff.png")))


@app.command("estimators")
def estimators_command(
    estimator: Annotated[str, typer.Option(help="Names by commas; full_es is always there.")] = ",".join(
        estimators.ESTIMATORS
    ),
    truncations: Annotated[
        str, typer.Option(help="Inner steps between outer steps, by commas.")
    ] = "10,25,50",
    unroll: Annotated[int, typer.Option(help="Inner steps of an unroll.")] = 200,
    pairs: Annotated[int, typer.Option(help="Antithetic pairs for each estimator and truncation.")] = 512,
    std: Annotated[float, typer.Option(help="Standard deviation of the perturbations.")] = 0.01,
    checkpoint: Annotated[str, typer.Option(help="Meta-parameters: a name or a path.")] = "small_fc_lopt",
    seed: Annotated[int, typer.Option(help="Of perturbations, networks and batches.")] = 0,
    threads: Threads = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG; by default beside --json, or estimators.png.")
    ] = None,
    json: Json = None,
) -> None:
    """Variance of the meta-gradient per inner step: full and truncated ES, PES, noise reuse. No times are taken."""
    with errors():
        config = _config(threads)
        problem = estimators.Problem(unroll=unroll, pairs=pairs, std=std, checkpoint=checkpoint, seed=seed)
        results = estimators.run(
            _list("--estimator", estimator, str), _list("--truncations", truncations, int), problem, _say
        )
        record = _finish("estimators", results, config, asdict(problem), None, json)
        _plot(estimators.plot, record, plot or (json.with_suffix(".png") if json else Path("estimators.png")))


@app.command("gpu")
def gpu_command(
    sections: Annotated[str, typer.Option(help="Which sections, by commas.")] = ",".join(gpu.SHARES),
    seconds: Annotated[float, typer.Option(min=1.0, help="How long the whole run may take.")] = gpu.SECONDS,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The same code on the processor, tiny; times mean nothing.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether it can run here (exit status 2 if not).")
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="Write the record here; into a folder: named by device and date."),
    ] = None,
) -> None:
    """Everything on an NVIDIA GPU: models, passes, widths, framework code, peers, JAX, training steps."""
    with errors():
        if check:
            typer.echo(gpu.describe())
            return
        load = _load()
        chosen = _list("--sections", sections, str)
        result = gpu.run(rehearse=rehearse, sections=chosen, seconds=seconds, say=_say)
        device = gpu.device(rehearse)
        record = records.record(
            "gpu",
            [result],
            threads=records.available_threads(),
            options={"rehearsal": rehearse, "seconds": seconds, "dtype": "float32"},
            load_average=load,
            device=device,
        )
        if json is not None:
            file = json / gpu.file_name(device) if json.is_dir() or not json.suffix else json
            records.write(file, record)
            _say(f"record: {file}")
        typer.echo(report.render(record))


@app.command("resources")
def resources_command(
    backend: Annotated[str, typer.Option(help="cuda, triton, or both by a comma.")] = "cuda",
    binary: Annotated[
        Path | None, typer.Option(help="CUDA: another library, object file or cubin than the installed one.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Compare with this table, not kernels/small_fc_lopt/resources.json.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write what is found into the table.")] = False,
    functions: Annotated[
        bool, typer.Option(help="Print what a kernel calls in rows of its own, not added up.")
    ] = False,
    json: Json = None,
) -> None:
    """Registers, spills, vector loads and tensor-core instructions of the compiled GPU kernels (no GPU needed)."""
    with errors():
        file = resources.default_table() if table is None else table
        expected = resources.read(file) if file.exists() or not update else {}
        accepted = dict(expected)
        found: dict[str, resources.Resources] = {}
        complaints: list[str] = []
        for name in _list("--backend", backend, _resources_backend):
            _say(f"reading the kernels of {name}")
            part = resources.measure(name, binary)
            before = resources.select(expected, name)
            complaints += resources.compare(part, before, partial=binary is not None)
            if binary is None:
                accepted = {k: row for k, row in accepted.items() if k not in before}
            accepted |= part
            found |= part
        if json is not None:
            resources.write(json, found)
        typer.echo(resources.render(found, kernels_only=not functions))
        for complaint in complaints:
            _say(complaint)
        if update:
            resources.write(file, accepted)
            _say(f"{file}: {len(found)} rows written")
        elif complaints:
            raise BenchmarkError(f"{len(complaints)} differences to {file}. {resources.ACCEPT}")


def _resources_backend(text: str) -> resources.Backend:
    for name in resources.BACKENDS:
        if text == name:
            return name
    raise BenchmarkError(f"--backend {text!r}: choose from {', '.join(resources.BACKENDS)}")


@app.command("predict")
def predict_command(
    layers: Annotated[int, typer.Option(min=1, max=2, help="Hidden layers.")] = 2,
    parameter_bytes: Annotated[int, typer.Option(help="Bytes of a parameter and of its gradient.")] = 4,
    state_bytes: Annotated[int, typer.Option(help="Bytes of a number of the state.")] = 4,
) -> None:
    """Times per parameter on GPUs, from bytes and operations alone."""
    typer.echo(predict.render(predict.Storage(parameter_bytes, parameter_bytes, state_bytes), layers))
    typer.echo(f"\nThe other operations, float32:\n\n{predict.render_operations()}")


@app.command("report")
def report_command(
    files: Annotated[list[Path], typer.Argument(help="Records that --json wrote.")],
    summary: Annotated[bool, typer.Option(help="Of update records the short table alone.")] = False,
) -> None:
    """Print records as tables in Markdown."""
    with errors():
        for record in [records.read(file) for file in files]:
            if summary and record["benchmark"] == "update":
                typer.echo(f"{report.summary(record)}\n\n{report.origin(record)}\n")
            else:
                typer.echo(report.render(record) + "\n")
