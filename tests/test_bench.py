"""The benchmark harness: arithmetic on an injected clock, records, reports, and small runs of the commands. Speed is
never asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lopt_fast.benchmark import (
    BenchmarkError,
    contenders,
    memory,
    passes,
    peers,
    records,
    report,
    timing,
    update,
    width,
    workloads,
)
from lopt_fast.benchmark.cli import app
from lopt_fast.benchmark.contenders import Config, Contender


class FakeClock:
    """Time passes only where a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def contender(self, framework: str, kind: str, cost: Callable[[int], float], log: list[str]) -> Contender:
        """Its n-th sample costs cost(n) seconds a step; preparing costs an hour."""
        calls = 0

        def prepare(steps: int) -> None:
            self.now += 3600.0
            log.append(f"prepare {kind} {steps}")

        def run(steps: int) -> None:
            nonlocal calls
            self.now += steps * cost(calls)
            calls += 1
            log.append(f"run {kind} {steps}")

        return Contender(framework, kind, prepare, run, lambda: [np.zeros(1, np.float32)])


# --- timing -------------------------------------------------------------------------------------------------------


def test_contenders_alternate_and_preparation_is_not_timed() -> None:
    clock, log, slept = FakeClock(), [], []
    a = clock.contender("torch", "a", lambda n: 1.0 + n, log)
    b = clock.contender("jax", "b", lambda n: 2.0 + 2 * n, log)
    plan = timing.Plan({"torch/a": 2, "jax/b": 1}, {"torch/a": 3, "jax/b": 2})
    samples = timing.alternate([a, b], plan, settle=0.5, clock=clock, sleep=slept.append)
    assert samples == {"torch/a": [1.0, 2.0, 3.0], "jax/b": [2.0, 4.0]}
    one_round = ["prepare a 2", "run a 2", "prepare b 1", "run b 1"]
    assert log == [*one_round, *one_round, "prepare a 2", "run a 2"]
    assert slept == [0.5] * 4  # once at each change of framework


def test_alternate_refuses_two_contenders_of_one_name() -> None:
    clock = FakeClock()
    a = clock.contender("torch", "a", lambda n: 1.0, [])
    with pytest.raises(ValueError, match="different names"):
        timing.alternate([a, a], timing.Plan({"torch/a": 1}, {"torch/a": 1}), clock=clock)


def test_garbage_collection_comes_back_after_an_error() -> None:
    import gc

    during = []

    def fail() -> None:
        with timing.no_garbage_collection():
            during.append(gc.isenabled())
            raise RuntimeError("boom")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert during == [False]
    assert gc.isenabled()


def test_ratios_are_paired_by_round() -> None:
    # The machine becomes ten times slower half-way: the paired ratio does not notice, one of medians would.
    base = [1.0, 1.0, 10.0, 10.0, 10.0]
    other = [3.0, 3.0, 30.0]
    ratio = timing.paired_ratio(other, base)
    assert (ratio.median, ratio.p10, ratio.p90, ratio.samples) == (3.0, 3.0, 3.0, 3)


def test_summary_gives_median_and_percentiles() -> None:
    found = timing.summarise([float(n) for n in range(11)][::-1])
    assert (found.median, found.p10, found.p90, found.samples) == (5.0, 1.0, 9.0, 11)
    with pytest.raises(ValueError, match="no samples"):
        timing.summarise([])


def test_plan_shares_bursts_and_rounds_except_for_slow_contenders() -> None:
    steps = {"fast": 1e-4, "learned": 3e-4, "code": 20.0}
    plan = timing.plan(steps, seconds=3.0)
    assert plan.bursts == {"fast": 5, "learned": 5, "code": 1}
    assert plan.rounds == {"fast": 200, "learned": 200, "code": 3}
    plan = timing.plan({"adamw": 0.02, "learned": 0.06}, seconds=3.0)
    assert plan.bursts == {"adamw": 1, "learned": 1}
    assert plan.rounds == {"adamw": 50, "learned": 50}
    plan = timing.plan({"adamw": 0.5, "learned": 1.5}, seconds=1.0)
    assert plan.rounds["adamw"] == 15
    assert plan.rounds["learned"] == 3
    plan = timing.plan(steps, seconds=3.0, rounds=7, burst=2)
    assert set(plan.rounds.values()) == {7}
    assert set(plan.bursts.values()) == {2}


def test_warm_up_reports_the_last_step() -> None:
    clock = FakeClock()
    contender = clock.contender("torch", "a", lambda n: [9.0, 5.0, 2.0][n], [])
    assert timing.warm_up(contender, steps=3, clock=clock) == 2.0


# --- workloads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "shape"),
    [
        ("64", 1, (64, 64)),
        ("8x16", 1, (8, 16)),
        ("300:1000", 300, (1000,)),
        ("1:50", 1, (50,)),
        ("3:25x40", 3, (25, 40)),
    ],
)
def test_workloads_are_parsed_and_labelled(text: str, count: int, shape: tuple[int, ...]) -> None:
    workload = workloads.parse(text)
    assert (workload.count, workload.shape) == (count, shape)
    assert workloads.parse(workload.label) == workload
    assert workload.parameters == count * int(np.prod(shape))


@pytest.mark.parametrize("text", ["", "0", "x", "-3", "4x", "0:5", "a:5", "3:", "1.5"])
def test_unusable_sizes_are_named(text: str) -> None:
    with pytest.raises(BenchmarkError, match="size"):
        workloads.parse(text)


def test_byte_model() -> None:
    small, large = workloads.parse("64"), workloads.parse("4096")
    cache = 32 * 2**20
    assert small.bytes_per_parameter("exact", cache) == 44.0
    assert large.bytes_per_parameter("exact", cache) == 72.0
    assert large.bytes_per_parameter("lagged", cache) == 44.0
    # A list of small tensors is taken tensor by tensor.
    assert workloads.parse("3000:1000").bytes_per_parameter("exact", 2**20) == 44.0
    config = Config()
    model = contenders.bytes_per_parameter
    assert model("torch", "adamw_fused", config, large, cache) == 28.0
    assert model("jax", "lopt_fast", config, large, cache) == 72.0 + 12.0
    assert model("jax", "lopt_fast_step", config, large, cache) == 72.0
    assert model("torch", "matmul", config, large, cache) is None


def test_values_are_the_same_each_time() -> None:
    parameters, gradients = workloads.parse("2:3x4").values
    again, _ = workloads.parse("2:3x4").values
    assert len(parameters) == len(gradients) == 2
    np.testing.assert_array_equal(parameters[1], again[1])
    assert parameters[0].dtype == np.float32
    assert not np.array_equal(parameters[0], gradients[0])


# --- verification before timing -------------------------------------------------------------------------------------


def oracle_contender(spoil: Callable[[np.ndarray], np.ndarray]) -> contenders.Builder:
    """The AdamW oracle as a contender, with `spoil` applied to what it shows."""

    def build(parameters: contenders.Arrays, gradients: contenders.Arrays) -> Contender:
        steps = iter(
            contenders.adamw_oracle(
                [p.astype(np.float64) for p in parameters], [g.astype(np.float64) for g in gradients]
            )
        )
        now = list(parameters)

        def run(count: int) -> None:
            for _ in range(count):
                now[:] = next(steps)

        return Contender("numpy", "oracle", lambda count: None, run, lambda: [spoil(p) for p in now])

    return build


def test_verify_accepts_the_right_result() -> None:
    assert contenders.verify(oracle_contender(lambda p: p), contenders.adamw_oracle) == 0.0


@pytest.mark.parametrize(
    "spoil",
    [lambda p: p * (1 + 1e-4), lambda p: p * np.nan, lambda p: p[..., :1], lambda p: p + 1e-6],
    ids=["wrong", "nan", "shape", "slightly wrong"],
)
def test_verify_refuses_a_wrong_result(spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(BenchmarkError, match=r"numpy/oracle is not timed: after step 1 on .* \(33, 20\)"):
        contenders.verify(oracle_contender(spoil), contenders.adamw_oracle)


def test_results_that_are_not_finite_are_not_reported() -> None:
    bad = Contender("torch", "a", lambda n: None, lambda n: None, lambda: [np.array([1.0, np.inf])])
    with pytest.raises(BenchmarkError, match="torch/a is not reported"):
        contenders.check_finite(bad)


@pytest.mark.parametrize("kind", ["adamw_fused", "adamw_foreach", "lopt_fast", "matmul", "elementwise"])
def test_torch_contenders_are_right(kind: contenders.Kind) -> None:
    pytest.importorskip("torch")
    config = Config(threads=1, statistics="lagged")
    error = contenders.verify(contenders.builder("torch", kind, config), contenders.oracle(kind, config))
    assert 0.0 <= error <= 1.0


@pytest.mark.parametrize("kind", ["adamw", "lopt_fast", "lopt_fast_step", "lopt_fast_loop", "dispatch"])
def test_jax_contenders_are_right(kind: contenders.Kind) -> None:
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    config = Config()
    error = contenders.verify(contenders.builder("jax", kind, config), contenders.oracle(kind, config))
    assert 0.0 <= error <= 1.0


def test_jax_framework_code_is_right_and_keeps_its_gradients() -> None:
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    config = Config(width=2, donate_gradients=False)
    build = contenders.builder("jax", "matmul", config)
    error = contenders.verify(build, contenders.oracle("matmul", config), shapes=[(5, 3)])
    assert 0.0 <= error <= 1.0


def test_a_jax_contender_may_keep_its_parameters_in_its_state() -> None:
    """As google/learned_optimization does."""
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    from lopt_fast.benchmark.jax_contenders import wrap

    def build(parameters: contenders.Arrays, gradients: contenders.Arrays) -> contenders.Contender:
        return wrap(
            "sgd",
            Config(),
            parameters,
            gradients,
            lambda params: ((), params),
            lambda nothing, state, grads: (nothing, [p - g for p, g in zip(state, grads, strict=True)]),
            lambda nothing, state: state,
        )

    parameters, gradients = [np.ones((3,), np.float32)], [np.full((3,), 0.25, np.float32)]
    contender = build(parameters, gradients)
    contender.prepare(2)
    contender.run(2)
    np.testing.assert_array_equal(contender.parameters()[0], np.full((3,), 0.5, np.float32))


def test_an_unknown_contender_is_named() -> None:
    with pytest.raises(BenchmarkError, match="jax has no contender 'adamw_fused'"):
        contenders.builder("jax", "adamw_fused", Config())


# --- what is left out -----------------------------------------------------------------------------------------------


def test_slow_and_large_framework_code_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    session = update.Session(update.Budget(slowest_step=10.0))
    many = workloads.parse("300:10")
    large = workloads.parse("4096")
    monkeypatch.setattr(records, "memory_available", lambda: 2**45)
    assert session.reason_to_skip("torch", "matmul", Config(), large) is None
    session.pace["torch", "matmul", 4] = 1e-6
    assert "one step would take about 17 s" in str(session.reason_to_skip("torch", "matmul", Config(), large))
    # A wider one takes longer in proportion to its products; other contenders are not held back.
    assert session.reason_to_skip("torch", "matmul", Config(width=32), workloads.parse("1024")) is not None
    assert session.reason_to_skip("torch", "elementwise", Config(), large) is None
    assert "out of memory" in str(
        session.reason_to_skip("jax", "elementwise", Config(width=256), workloads.parse("8"))
    )
    assert "300 tensors" in str(session.reason_to_skip("jax", "matmul", Config(), many))
    assert session.reason_to_skip("torch", "matmul", Config(), many) is None
    monkeypatch.setattr(records, "memory_available", lambda: 2**30)
    assert "GB are free" in str(session.reason_to_skip("jax", "matmul", Config(), large))
    assert session.reason_to_skip("torch", "lopt_fast", Config(), large) is None


# --- records --------------------------------------------------------------------------------------------------------


def test_a_record_says_where_when_and_with_what() -> None:
    record = records.record("update", [{"workload": "8x8"}], threads=2, options={"backend": "cpu"})
    assert record["schema"] == records.SCHEMA
    assert {"processor", "cores", "threads", "instruction_set", "cache_bytes"} <= record["machine"].keys()
    assert record["machine"]["threads"] == 2
    assert {"lopt_fast", "torch", "jax", "numpy", "python"} <= record["versions"].keys()
    assert record["versions"]["numpy"] == np.__version__
    assert record["date"].endswith("+00:00")
    assert {"commit", "command", "options", "results"} <= record.keys()


def test_records_are_written_whole_and_read_back(tmp_path: Path) -> None:
    record = records.record("update", [], threads=1, options={})
    file = tmp_path / "new" / "record.json"
    records.write(file, record)
    assert records.read(file) == record
    with pytest.raises(ValueError, match="Out of range"):
        records.write(file, {**record, "results": [{"x": float("nan")}]})
    assert records.read(file) == record
    assert [p.name for p in file.parent.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 0, "benchmark": "update"}', '{"schema": 1}']
)
def test_what_is_not_a_record_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(BenchmarkError, match=r"x\.json"):
        records.read(file)
    with pytest.raises(BenchmarkError, match="missing"):
        records.read(tmp_path / "missing.json")


def test_the_command_line_leaves_out_the_path_of_the_program() -> None:
    line = records.command_line(["/somewhere/bin/lopt-fast", "bench", "update", "--sizes", "1 2"])
    assert line == "lopt-fast bench update --sizes '1 2'"


def test_more_threads_than_processors_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="--threads 100000"):
        records.limit_threads(100_000)


def test_committed_results_can_be_reported() -> None:
    folder = Path(__file__).resolve().parents[1] / "bench" / "results"
    for file in sorted(folder.glob("*.json")):
        record = records.read(file)
        assert record["machine"]["processor"], file
        assert report.render(record)


# --- reports --------------------------------------------------------------------------------------------------------


def spread(median: float) -> dict[str, float]:
    return {"median": median, "p10": median * 0.9, "p90": median * 1.1, "samples": 20}


def entry(name: str, seconds: float, gb: float | None, ratios: dict[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": spread(seconds),
        "burst": 1,
        "ns_per_parameter": seconds * 1e3,
        "bytes_per_parameter": None if gb is None else 72.0,
        "gb_per_second": gb,
        "ratios": {other: spread(ratio) for other, ratio in ratios.items()},
        "error_over_tolerance": 0.1,
    }


@pytest.fixture
def update_record() -> dict[str, Any]:
    fused, ours = "torch/adamw_fused", "torch/lopt_fast"
    results = [
        {
            "workload": "1024x1024",
            "parameters": 1 << 20,
            "width": 4,
            "statistics": "exact",
            "contenders": [
                entry(fused, 0.001, 28.0, {}),
                entry(ours, 0.0027, 30.0, {fused: 2.7}),
                entry("jax/lopt_fast", 0.0032, 31.0, {ours: 1.2, "jax/adamw": 2.1}),
                entry("jax/lopt_fast_step", 0.0028, 31.0, {ours: 1.05}),
                entry("jax/lopt_fast_loop", 0.0027, 31.0, {ours: 1.0}),
                entry("jax/dispatch", 0.0001, None, {ours: 0.04}),
            ],
            "skipped": {},
        },
        {
            "workload": "1024x1024",
            "parameters": 1 << 20,
            "width": 4,
            "statistics": "exact",
            "contenders": [
                entry(fused, 0.001, 28.0, {}),
                entry("torch/matmul", 0.5, None, {fused: 500.0, ours: 185.0}),
            ],
            "skipped": {"jax/matmul": "needs about 9 GB of temporaries, 1 GB are free"},
        },
    ]
    return records.record("update", results, threads=2, options={})


def test_update_report(update_record: dict[str, Any]) -> None:
    summary = report.summary(update_record).splitlines()
    assert summary[2] == (
        "| 1024x1024 | 4 | exact | 2.70 ms | 2.70 (2.43 to 2.97) |  | 3.20 ms | 2.10 (1.89 to 2.31) "
        "| 1.20 (1.08 to 1.32) | 2.80 ms | 1.05 (0.95 to 1.16) | 2.70 ms | 1.00 (0.90 to 1.10) "
        "| 100 µs | 0.04 (0.04 to 0.04) |"
    )
    assert len(summary) == 3
    text = report.render(update_record)
    assert (
        "| 1024x1024 | 4 | exact | torch/matmul | 500 ms | 500000 |" not in text
    )  # ns per parameter is below
    assert "| torch/matmul | 500 ms | 500 |  | 500 (450 to 550) |  | 185 (166 to 204) |" in text
    assert text.count("torch/adamw_fused |") == 1  # once, not again beside the framework code
    assert "- jax/matmul, 1024x1024, width 4: needs about 9 GB of temporaries" in text
    assert update_record["machine"]["processor"] in text


def test_units_and_digits() -> None:
    assert [report.seconds(s) for s in (2.0, 0.0123, 45.6e-6, 7e-9)] == [
        "2.00 s",
        "12.3 ms",
        "45.6 µs",
        "7.00 ns",
    ]
    assert [report.digits(x) for x in (0.5, 12.34, 999.6)] == ["0.50", "12.3", "1000"]


def test_width_series_and_plot(update_record: dict[str, Any], tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib
    wide = {**update_record["results"][0], "width": 8}
    record = {**update_record, "benchmark": "width", "results": [wide, update_record["results"][0]]}
    assert width.series(record)["torch/lopt_fast"] == [(4, 2.7), (8, 2.7)]
    width.plot(record, tmp_path / "plots" / "width.png")
    assert (tmp_path / "plots" / "width.png").read_bytes().startswith(b"\x89PNG")


# --- passes ---------------------------------------------------------------------------------------------------------


def test_passes_compare_with_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.native, "kernel_spec", lambda spec: spec)
    asked: list[dict[str, Any]] = []

    def hook(**arguments: Any) -> dict[str, list[float]]:
        asked.append(arguments)
        steps = arguments["steps"]
        return {
            "factor_statistics": [1e-6] * steps,
            "feature_statistics": [2e-6] * steps,
            "apply": [4e-6] * steps,
            "step": [7e-6] * steps,
        }

    workload = workloads.parse("8x16")
    results = passes.run(
        [workload], [4], ["exact"], Config(threads=1), rounds=2, time_passes=hook, copy_parameters=1 << 12
    )
    assert len(asked) == 2
    assert asked[0]["loops"] == (1, 8, 1, 16, 1, True, True)
    found = {p["name"]: p for p in results[0]["passes"]}
    assert list(found) == ["factor_statistics", "feature_statistics", "apply", "step"]
    assert found["apply"]["gb_per_second"] == pytest.approx(44 * 128 / 4e-6 / 1e9)
    copy_rate = results[0]["copy_gb_per_second"]
    assert found["apply"]["share_of_copy"] == pytest.approx(found["apply"]["gb_per_second"] / copy_rate)
    assert found["step"]["gb_per_second"] is None
    assert found["step"]["seconds"]["samples"] == 2 * passes.STEPS
    record = records.record("passes", results, threads=1, options={})
    assert "| 8x16 | 4 | exact | factor statistics | 1.00 µs | 7.81 | 4.00 |" in report.render(record)


def test_passes_that_do_not_run_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.native, "kernel_spec", lambda spec: spec)

    def hook(**arguments: Any) -> dict[str, list[float]]:
        return {"factor_statistics": [0.0], "feature_statistics": [0.0], "apply": [2e-6], "step": [3e-6]}

    results = passes.run(
        [workloads.parse("8")], [4], ["lagged"], Config(), rounds=1, time_passes=hook, copy_parameters=64
    )
    assert [p["name"] for p in results[0]["passes"]] == ["apply", "step"]


def test_a_build_without_the_hook_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.backends, "native", lambda: object())
    with pytest.raises(BenchmarkError, match="no time_passes"):
        passes.run([workloads.parse("8")], [4], ["exact"], Config())


def test_the_native_hook_times_every_pass() -> None:
    try:
        passes.native_hook()
    except passes.backends.BackendError as error:
        pytest.skip(str(error))
    config = Config(threads=1)
    results = passes.run(
        workloads.parse_list("32x48,3:50"),
        [4],
        ["exact", "lagged"],
        config,
        rounds=1,
        copy_parameters=1 << 12,
    )
    assert len(results) == 4
    for result in results:
        found = {p["name"]: p["seconds"]["median"] for p in result["passes"]}
        assert found["apply"] > 0.0
        assert found["step"] > 0.0
        assert ("feature_statistics" in found) == (result["statistics"] == "exact")
        # Vectors have no factors.
        factored = "x" in result["workload"]
        assert ("factor_statistics" in found) == (result["statistics"] == "exact" and factored)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_peak_memory_sees_what_is_freed_again() -> None:
    pytest.importorskip("resource")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    size = 64 << 20

    def allocate() -> None:
        np.ones(size, np.uint8)

    assert abs(memory.peak_increase(allocate) - size) < size // 8
    assert memory.peak_increase(lambda: None) < size // 8


def test_memory_is_measured_in_a_subprocess_and_its_slope_reported() -> None:
    pytest.importorskip("torch")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    results = memory.run(
        [workloads.parse("2048"), workloads.parse("128")], [("torch", "adamw_foreach")], Config(threads=1)
    )
    # The foreach implementation allocates temporaries of the size of the parameters: the measurement has to see them.
    assert results[0]["temporary_bytes_per_parameter"] > 3.5
    assert list(results[0]["increase_bytes"]) == ["128x128", "2048x2048"]
    text = report.render(records.record("memory", results, threads=1, options={}))
    assert "| torch/adamw_foreach | 4 | exact |" in text


def test_memory_needs_two_sizes_and_names_a_failing_contender() -> None:
    with pytest.raises(BenchmarkError, match="two different"):
        memory.run([workloads.parse("64")], [("torch", "lopt_fast")], Config())


# --- peers ----------------------------------------------------------------------------------------------------------


def test_a_missing_peer_is_reported_with_the_reason() -> None:
    def load(config: Config) -> contenders.Builder:
        raise ModuleNotFoundError("No module named 'pylo'")

    peer = peers.Peer("pylo", "torch", "https://example.org/pylo", load)
    results = peers.run([workloads.parse("8")], [4], Config(), peers=[peer])
    assert results[0]["contenders"] == []
    assert results[0]["skipped"] == {
        "torch/pylo": "cannot be imported: ModuleNotFoundError: No module named 'pylo' "
        "(get it from https://example.org/pylo)"
    }


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    pytest.importorskip("torch")
    from lopt_fast.benchmark import torch_contenders

    def load(config: Config) -> contenders.Builder:
        return lambda p, g: contenders.renamed(torch_contenders.build("adamw_fused", config, p, g), "wrong")

    peer = peers.Peer("wrong", "torch", "", load)
    results = peers.run([workloads.parse("8")], [4], Config(threads=1), peers=[peer])
    assert results[0]["contenders"] == []
    assert "times the allowed error" in results[0]["skipped"]["torch/wrong"]


# --- commands -------------------------------------------------------------------------------------------------------


def run_command(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_update_command_writes_a_complete_record(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    file = tmp_path / "update.json"
    output = run_command(
        "update", "--sizes", "8,3:10", "--width", "2", "--framework", "torch", "--rounds", "2", "--burst", "1",
        "--json", str(file),
    )  # fmt: skip
    record = json.loads(file.read_text())
    assert records.read(file) == record
    names = [[c["name"] for c in r["contenders"]] for r in record["results"]]
    fast = ["torch/adamw_fused", "torch/adamw_foreach", "torch/lopt_fast"]
    slow = [["torch/adamw_fused", "torch/lopt_fast", f"torch/{kind}"] for kind in ("matmul", "elementwise")]
    assert names == [fast, fast, *slow] * 2
    assert [r["statistics"] for r in record["results"]] == ["exact", "lagged", "exact", "exact"] * 2
    for result in record["results"]:
        for c in result["contenders"]:
            assert c["seconds"]["samples"] == 2
            assert c["seconds"]["median"] > 0.0
            assert 0.0 <= c["error_over_tolerance"] <= 1.0
            others = {other["name"] for other in result["contenders"]} - {c["name"]}
            assert c["ratios"].keys() == others & set(contenders.BASELINES)
    assert "| 8x8 | 2 | exact |" in output
    assert run_command("report", str(file)).startswith("| tensors |")
    assert run_command("report", "--summary", str(file)).startswith("| tensors |")


def test_width_command_plots(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    file = tmp_path / "width.json"
    run_command(
        "width",
        "--size",
        "4x6",
        "--width",
        "4,2",
        "--framework",
        "torch",
        "--rounds",
        "1",
        "--json",
        str(file),
    )
    assert [r["width"] for r in records.read(file)["results"]] == [2, 4]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_architectures_command(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    file = tmp_path / "architectures.json"
    output = run_command(
        "architectures", "--architecture", "small_fc_lopt,celo,adamw", "--sizes", "8,3:10", "--seconds", "0",
        "--json", str(file),
    )  # fmt: skip
    rows = records.read(file)["results"]
    assert [(r["workload"], r["architecture"]) for r in rows] == [
        (size, name) for size in ("8", "3:10") for name in ("small_fc_lopt", "celo", "adamw")
    ]
    assert [r["parameters"] for r in rows] == [64] * 3 + [30] * 3
    for r in rows:
        assert r["step"]["median"] > 0.0
        assert (r["operations"] is None) == (r["architecture"] == "small_fc_lopt")  # its plan calls none
        if r["operations"] is not None:
            assert 0.0 < r["operations"]["median"] < r["step"]["median"]
    assert "| 3:10 | celo | cpu |" in output


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("architectures", "--architecture", "slower"), "slower"),
        (("update", "--sizes", "nonsense"), "nonsense"),
        (("update", "--width", "1"), "hidden_size=1"),
        (("update", "--width", "four"), "four"),
        (("update", "--framework", "tensorflow"), "tensorflow"),
        (("update", "--statistics", "sometimes"), "sometimes"),
        (("update", "--threads", "0"), "--threads 0"),
        (("update", "--backend", "abacus"), "abacus"),
        (("report", "no-such-file.json"), "no-such-file.json"),
    ],
)
def test_bad_options_are_named_without_a_traceback(arguments: tuple[str, ...], culprit: str) -> None:
    outcome = CliRunner().invoke(app, list(arguments))
    assert outcome.exit_code == 2
    assert culprit in outcome.output
