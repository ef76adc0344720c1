"""The GPU benchmark without a GPU: shapes of the models, every section in rehearsal, records, findings, messages."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from lopt_fast import backends  # noqa: E402
from lopt_fast.benchmark import BenchmarkError, gpu, gpu_sections, models, records, report  # noqa: E402
from lopt_fast.benchmark.cli import app  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

needs_core = pytest.mark.skipif(
    backends.choose(gpu_sections.Config().spec, "cpu", "float32", "auto") != "cpu",
    reason="the compiled core is missing",
)
no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


# ---- models ----


@pytest.mark.parametrize(("model", "parameters"), [
    (models.RESNET18, 11_689_512), (models.RESNET50, 25_557_032), (models.VIT_B16, 86_567_656),
    (models.GPT2_124M, 124_439_808), (models.GPT2_355M, 354_823_168),
])  # fmt: skip
def test_models_have_the_published_number_of_parameters(model: models.Model, parameters: int) -> None:
    assert sum(math.prod(s) for s in models.shapes(model)) == parameters


@pytest.mark.parametrize("model", [models.RESNET18, *models.MODELS.values()], ids=str)
def test_shapes_are_those_of_the_modules(model: Any) -> None:
    with torch.device("meta"):
        modules = models.build(model)
    assert [tuple(p.shape) for p in modules.parameters()] == models.shapes(model)


def test_attention_looks_back_alone() -> None:
    """A token's logits depend on those before it, and on itself."""
    torch.manual_seed(0)
    model = models.tiny(models.GPT2_124M)
    assert isinstance(model, models.GPT2)
    network = models.build_gpt2(model)
    x = torch.arange(6)[None]
    changed = x.clone()
    changed[0, 3] = 20
    difference = (network(x) - network(changed)).abs().amax(-1)[0]
    assert (difference[:3] == 0).all()
    assert (difference[3:] > 0).all()


# ---- sections ----


def rehearse(section: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from lopt_fast.benchmark.gpu_contenders import find_place

    emitted: list[Any] = []
    gpu_sections.run_section(section, find_place(rehearse=True), 600.0, emitted.append, lambda text: None)
    assert json.loads(json.dumps(emitted, allow_nan=False)) == emitted
    return [e["row"] for e in emitted if "row" in e], [e["skipped"] for e in emitted if "skipped" in e]


def names(rows: list[dict[str, Any]], workload: str, width: int | None = None) -> set[str]:
    chosen = [r for r in rows if r["workload"] == workload and (width is None or r["width"] in (None, width))]
    for r in chosen:
        assert r["seconds"]["median"] > 0
        assert r["seconds"]["samples"] >= 2
        assert (
            r["error_over_tolerance"] is None or 0 <= r["error_over_tolerance"] <= gpu_sections.BFLOAT16_LIMIT
        )
    return {r["contender"] for r in chosen}


@needs_core
def test_update() -> None:
    rows, skipped = rehearse("update")
    assert not skipped
    expected = {"adamw_fused", "adamw_foreach", "cpu_exact", "cpu_lagged"}
    for model in models.MODELS:
        assert names(rows, model, 4) == expected
    assert names(rows, "GPT-2 124M", 32) == expected
    for r in rows:
        assert 0 <= r["error_over_tolerance"] <= 1
        assert ("adamw_fused" in r["ratios"]) == (r["contender"] != "adamw_fused")


@needs_core
def test_passes() -> None:
    rows, skipped = rehearse("passes")
    assert not skipped
    expected = {"copy", "factor_statistics", "feature_statistics", "apply", "phased", "single_launch"}
    assert names(rows, "GPT-2 124M") == expected
    for r in rows:
        assert (r["share_of_copy"] is None) == (r["contender"] == "copy")
    verified = {
        r["contender"]: r["error_over_tolerance"] for r in rows if r["error_over_tolerance"] is not None
    }
    assert verified.keys() == {"phased", "single_launch"}
    assert all(0 <= error <= 1 for error in verified.values())


@needs_core
def test_widths() -> None:
    rows, skipped = rehearse("widths")
    assert not skipped
    ours = {"kernel_elementwise", "kernel_matmul", "kernel_matmul_bfloat16", "cpu_exact"}
    for width in (2, 8):
        found = names(rows, "24x20", width)
        assert found == {"adamw_fused", "framework_matmul", "framework_elementwise", *ours}
    for r in rows:
        if r["contender"] in ("kernel_elementwise", "kernel_matmul"):
            assert r["error_over_tolerance"] <= 1


@needs_core
def test_framework_code() -> None:
    rows, skipped = rehearse("framework")
    assert not skipped
    expected = {"adamw_fused", "cpu_exact", "framework_matmul", "framework_elementwise"}
    assert names(rows, "GPT-2 124M") == expected


@needs_core
def test_missing_peers_are_a_note() -> None:
    rows, skipped = rehearse("peers")
    assert names(rows, "GPT-2 124M") == {"adamw_fused", "cpu_exact"}
    (note,) = skipped
    assert note["what"] == "pylo"
    assert "cannot be imported" in note["reason"]


@needs_core
def test_compiled() -> None:
    rows, skipped = rehearse("compiled")
    assert not skipped
    for model in models.MODELS:
        assert names(rows, model) == {"adamw_fused", "adamw_compiled", "cpu_exact", "cpu_lagged"}
    ours = [r for r in rows if r["contender"].startswith("cpu")]
    assert all(r["ratios"].keys() == {"adamw_fused", "adamw_compiled"} for r in ours)


@needs_core
def test_training_steps() -> None:
    rows, skipped = rehearse("training")
    assert not skipped
    for model in ("ResNet-18", "ResNet-50", "GPT-2 124M", "ViT-B/16"):
        expected = {"adamw_fused", "cpu_exact", "cpu_lagged"}
        assert names(rows, f"training {model}, batch 2") == expected


@needs_core
def test_jax_steps_and_population() -> None:
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    rows, skipped = rehearse("jax")
    assert not skipped
    assert names(rows, "GPT-2 124M") == {"jax adamw", "jax step_exact", "jax step_lagged"}
    rows, skipped = rehearse("pes")
    assert not skipped
    (row,) = rows
    assert row["per_second"]["inner steps"] == pytest.approx(2 * 2 * 2 / row["seconds"]["median"])


@needs_core
def test_what_fails_or_is_late_is_a_note() -> None:
    from lopt_fast.benchmark.gpu_contenders import find_place

    emitted: list[Any] = []
    place = find_place(rehearse=True)
    late = gpu_sections.Run(place, emitted.append, lambda text: None, deadline=-1.0, section="update")
    assert late.compare("tensors", [gpu_sections._adamw(late, "fused")], [(3, 4)]) == {}
    assert emitted == [{"skipped": {"section": "update", "what": "tensors", "reason": "out of time"}}]
    emitted.clear()

    def broken(parameters: Any, gradients: Any) -> Any:
        raise RuntimeError("an illegal address\nand a trace")

    run = gpu_sections.Run(place, emitted.append, lambda text: None, deadline=math.inf, section="update")
    large = gpu_sections.Entry("large", broken, None, memory=1e18)
    rows = run.compare(
        "tensors",
        [gpu_sections.Entry("broken", broken, None), large, gpu_sections._adamw(run, "fused")],
        [(3, 4)],
    )
    assert rows.keys() == {"adamw_fused"}
    reasons = {e["skipped"]["what"]: e["skipped"]["reason"] for e in emitted if "skipped" in e}
    assert reasons["tensors, broken"] == "RuntimeError: an illegal address"
    assert "GB" in reasons["tensors, large"]


@needs_core
def test_a_wrong_result_is_not_timed() -> None:
    from lopt_fast.benchmark.gpu_contenders import find_place, wrap

    emitted: list[Any] = []
    place = find_place(rehearse=True)
    run = gpu_sections.Run(place, emitted.append, lambda text: None, deadline=math.inf, section="update")

    def still(parameters: Any, gradients: Any) -> Any:
        return wrap(place, "still", [torch.as_tensor(p) for p in parameters], lambda: None)

    entry = gpu_sections.Entry("still", still, gpu_sections._adamw(run, "fused").oracle)
    assert run.compare("tensors", [entry], [(3, 4)]) == {}
    assert "BenchmarkError" in emitted[0]["skipped"]["reason"]


# ---- the whole run ----


@needs_core
def test_command_in_rehearsal(tmp_path: Path) -> None:
    """A section in a process of its own, the record and the table."""
    outcome = CliRunner().invoke(
        app, ["gpu", "--rehearse", "--sections", "peers", "--seconds", "60", "--json", str(tmp_path)]
    )
    assert outcome.exit_code == 0, outcome.output
    (file,) = tmp_path.glob("*.json")
    record = records.read(file)
    assert file.name.startswith("emulator")
    assert record["options"]["rehearsal"] is True
    assert record["device"]["name"].startswith("emulator")
    (result,) = record["results"]
    assert {r["contender"] for r in result["rows"]} == {"adamw_fused", "cpu_exact"}
    assert all(f["met"] is None for f in result["findings"])
    assert "| peers | GPT-2 124M | 32 | exact | cpu_exact |" in outcome.output
    assert "not measured" in outcome.output


def test_a_section_that_dies_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run
    code = 'import os; print("{\\"row\\": 1}", flush=True); os.abort()'
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options)
    )
    emitted = gpu._in_process("update", True, 60.0, lambda text: None)
    assert emitted[0] == {"row": 1}
    assert emitted[1]["skipped"]["reason"] == "its process ended with status -6"


def test_a_section_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(gpu.subprocess, "run", run)
    (note,) = gpu._in_process("update", True, 60.0, lambda text: None)
    assert "stopped after" in note["skipped"]["reason"]


@no_gpu_here
def test_without_a_gpu_one_line_says_so() -> None:
    for arguments in (["gpu"], ["gpu", "--check"]):
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code == 2
        (line,) = outcome.output.strip().splitlines()[-1:]
        assert "no GPU" in line
        assert "Traceback" not in outcome.output


def test_an_unknown_section_is_named() -> None:
    with pytest.raises(BenchmarkError, match="everything: choose from update"):
        gpu.run(rehearse=True, sections=["everything"])


def test_all_sections_have_a_function_and_a_share() -> None:
    assert gpu.SHARES.keys() == gpu_sections.SECTIONS.keys()
    assert sum(gpu.SHARES.values()) == pytest.approx(1.0)


# ---- findings and the table ----


def row(section: str, contender: str, width: int | None, seconds: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "section": section, "workload": "GPT-2 124M", "parameters": 10, "contender": contender, "width": width,
        "statistics": "exact", "seconds": {"median": seconds, "p10": seconds, "p90": seconds, "samples": 3}, "burst": 1,
        "ns_per_parameter": 0.01, "bytes_per_parameter": None, "gb_per_second": 3000.0, "share_of_copy": None,
        "ratios": {}, "error_over_tolerance": 0.5, "per_second": None, **more,
    }  # fmt: skip


def ratio(value: float) -> dict[str, float]:
    return {"median": value, "p10": value, "p90": value, "samples": 3}


def test_findings() -> None:
    rows = [
        row("passes", "apply", 4, share_of_copy=ratio(0.85)),
        row("update", "cuda_exact", 4, ratios={"adamw_fused": ratio(2.6)}),
        row("update", "cuda_lagged", 4, ratios={"adamw_fused": ratio(1.7)}, statistics="lagged"),
        row("peers", "cuda_exact", 32, ratios={"pylo": ratio(0.05)}),
        *[row("widths", "kernel_elementwise", w, seconds=float(w)) for w in (2, 4, 8, 16)],
        *[row("widths", "kernel_matmul", w, seconds=s) for w, s in ((2, 1.0), (4, 5.0), (8, 6.0), (16, 7.0))],
    ]
    found = gpu.findings(rows)
    assert [f["value"] for f in found] == [0.85, 2.6, 1.7, pytest.approx(20.0), 8.0]
    assert [f["met"] for f in found] == [True, False, True, True, None]
    assert all(f["value"] is None and f["met"] is None for f in gpu.findings([]))


@pytest.mark.parametrize(("matmul", "expected"), [
    ({2: 1.0, 4: 1.0}, 2.0), ({2: 9.0, 4: 1.0}, 4.0), ({2: 1.0, 4: 9.0}, None), ({}, None),
])  # fmt: skip
def test_crossing(matmul: dict[int, float], expected: float | None) -> None:
    rows = [row("widths", "kernel_elementwise", w, seconds=float(w)) for w in (2, 4)]
    assert (
        gpu.crossing([*rows, *(row("widths", "kernel_matmul", w, seconds=s) for w, s in matmul.items())])
        == expected
    )


def test_table() -> None:
    rows = [
        row("passes", "apply", 4, share_of_copy=ratio(0.85)),
        row("update", "cuda_exact graph", 4, ratios={"adamw_fused graph": ratio(2.4)}),
        row("pes", "outer step", 4, per_second={"inner steps": 12345.0}),
    ]
    result = {
        "rows": rows, "findings": gpu.findings(rows),
        "skipped": [{"section": "peers", "what": "pylo", "reason": "cannot be imported"}], "seconds": {"update": 3.0},
    }  # fmt: skip
    record = records.record("gpu", [result], threads=1, options={}, device={"name": "H200", "driver": "580"})
    text = report.render(record)
    assert "| passes | GPT-2 124M | 4 | exact | apply | 1.00 s | 0.0100 | 3000 | 85% |" in text
    assert "| 2.40 |" in text
    assert "12345 inner steps" in text
    assert "| apply pass, width 4: share of the measured copy | 0.85 | at least 0.8 | met |" in text
    assert "- peers, pylo: cannot be imported" in text
    assert "name H200, driver 580" in text


def test_committed_results_can_be_reported() -> None:
    for file in sorted((ROOT / "bench" / "results" / "gpu").glob("*.json")):
        assert report.render(records.read(file)).startswith("| section |")
