"""The benchmarks after the papers' figures, `scaling` and `tradeoff`, and their plots. Speed is never asserted."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lopt_fast.benchmark import BenchmarkError, architectures, plotting, records, report, scaling, tradeoff
from lopt_fast.benchmark.cli import app
from lopt_fast.checkpoint import load

PNG = b"\x89PNG"
SHIPPED = "small_fc_lopt"
"""Weights that take lagged statistics, and whose optimizer has no state of the whole model."""


def run_command(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


# --- scaling ----------------------------------------------------------------------------------------------------------


def test_models_are_perceptrons_and_each_is_measured_once() -> None:
    model = scaling.Model(width=16, layers=3)
    assert model.shapes == [(784, 16), (16,), (16, 16), (16,), (16, 10), (10,)]
    assert model.parameters == 784 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert scaling.Model(99, 1).shapes == [(784, 10), (10,)]
    sizes = scaling.Sizes(widths=[32, 16], depths=[5, 3], layers=3, width=16)
    assert sizes.models == [scaling.Model(16, 3), scaling.Model(16, 5), scaling.Model(32, 3)]
    with pytest.raises(BenchmarkError, match="size 0"):
        scaling.Sizes([16], [0])


def test_slow_steps_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    tried: list[tuple[str, scaling.Model]] = []

    def measured(
        name: str, model: scaling.Model, seconds: float, slowest_step: float, backend: str
    ) -> dict[str, Any]:
        tried.append((name, model))
        taken = model.parameters / (1e3 if name == "celo2" else 1e9)
        if taken > slowest_step:
            raise architectures.TooSlow(f"takes {taken:.0f} s")
        return {"step": {"median": taken}}

    monkeypatch.setattr(scaling, "_measured", measured)
    sizes = scaling.Sizes(widths=[1, 2, 4, 8], depths=[2], layers=3, width=9)
    rows = scaling.run(
        ["celo2", "sgdm"],
        sizes,
        threads=1,
        seconds=0.0,
        slowest_step=1.0,
        backend="auto",
        say=lambda text: None,
    )
    skipped = {(r["architecture"], r["width"]): r["skipped"] for r in rows if "skipped" in r}
    assert len(rows) == 2 * 5
    assert set(skipped) == {("celo2", width) for width in (2, 4, 8, 9)}
    assert "narrower" in skipped["celo2", 4]
    # Of another depth: nothing is known of it, so it is tried.
    assert skipped["celo2", 9] == "takes 7 s"
    assert [model.width for name, model in tried if name == "celo2"] == [1, 9]
    assert len([name for name, _ in tried if name == "sgdm"]) == 5


def test_a_step_beyond_the_limit_ends_the_measurement() -> None:
    pytest.importorskip("torch")
    calls: list[int] = []
    with pytest.raises(architectures.TooSlow, match="more than 0 s"):
        architectures.measure(lambda: calls.append(1), [(2, 2)], seconds=0.0, slowest_step=0.0)
    assert len(calls) == 1
    found = architectures.measure(lambda: calls.append(1), [(2, 2)], seconds=0.0, rounds=2)
    assert found["step"]["samples"] == found["adamw"]["samples"] == 2
    assert found["parameters"] == 4
    assert found["operations"] is None


def test_scaling_command(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    file = tmp_path / "scaling.json"
    output = run_command(
        "scaling", "--architecture", "celo_adam,sgdm", "--widths", "4,8", "--depths", "2,3", "--layers", "2",
        "--width", "4", "--seconds", "0", "--json", str(file),
    )  # fmt: skip
    record = records.read(file)
    rows = record["results"]
    assert [(r["width"], r["layers"], r["architecture"]) for r in rows] == [
        (width, layers, name) for width, layers in ((4, 2), (4, 3), (8, 2)) for name in ("celo_adam", "sgdm")
    ]
    for r in rows:
        assert r["parameters"] == scaling.Model(r["width"], r["layers"]).parameters
        assert r["step"]["median"] > 0.0
        if r["architecture"] == "celo_adam":
            assert 0.0 <= r["share_outside_operations"] < 1.0
            expected = 1.0 - 1.0 / r["vs_operations"]["median"]
            assert abs(r["share_outside_operations"] - expected) <= 1e-9
        else:
            assert r["share_outside_operations"] is None
    assert [[m[:2] for m in models] for _, _, models in scaling.panels(record)] == [
        [(4, 2), (8, 2)],
        [(4, 2), (4, 3)],
    ]
    assert "| optimizer | 4 (3.2k) | 8 (6.4k) |" in output
    assert "| AdamW, fused |" in output
    assert run_command("report", str(file)).startswith("2 layers, width 4 to 8:")
    assert file.with_suffix(".png").read_bytes().startswith(PNG)


def test_scaling_report_names_what_is_missing() -> None:
    rows: list[dict[str, Any]] = [
        {"architecture": "celo2", "width": 8, "layers": 4, "parameters": 1, "skipped": "a step takes 9 s"},
        {
            "architecture": "sgdm", "width": 8, "layers": 4, "parameters": 1, "step": {"median": 2e-3},
            "adamw": {"median": 1e-3}, "share_outside_operations": None,
        },
    ]  # fmt: skip
    options = {"widths": [8], "depths": [4], "layers": 4, "width": 256}
    text = report.scaling({"results": rows, "options": options})
    assert "- celo2, width 8, 4 layers: a step takes 9 s" in text
    assert "| sgdm | 2.00 ms |" in text
    assert "| AdamW, fused | 1.00 ms |" in text
    assert scaling.adamw(rows) == {scaling.Model(8, 4): 1e-3}


# --- tradeoff ---------------------------------------------------------------------------------------------------------


def optimizer(label: str, mean_loss: float, search: int = 0) -> dict[str, Any]:
    return {
        "optimizer": label, "mean_loss": mean_loss, "standard_error": 0.0, "last_loss": 0.0,
        "last_standard_error": None, "diverged": 0, "search": [{}] * search,
    }  # fmt: skip


def evaluation(*comparisons: tuple[str, str, float, list[dict[str, Any]]]) -> dict[str, Any]:
    """As `results.json`: (task, data set, initial loss, optimizers), and the first one again for a longer training."""
    name = SHIPPED
    weights = [(name, "exact", 1.0), (name, "lagged", 0.5), ("elsewhere", "exact", 1.0)]
    first = comparisons[0]
    return {
        "steps": 100,
        "seeds": 2,
        "learned": [
            {"optimizer": f"{n}, {s}, {r}", "name": n, "statistics": s, "learning_rate": r}
            for n, s, r in weights
        ],
        "comparisons": [
            {"task": task, "dataset": dataset, "steps": steps, "initial_loss": initial, "optimizers": rows}
            for steps, chosen in ((100, comparisons), (500, [first]))
            for task, dataset, initial, rows in chosen
        ],
    }


def test_meta_loss_is_that_of_the_held_out_score() -> None:
    pytest.importorskip("jax")
    pytest.importorskip("pydantic")
    name = SHIPPED
    found, missing = tradeoff.entries(
        evaluation(
            ("a", "x", 2.0, [optimizer(f"{name}, exact, 1.0", 1.0), optimizer("Adam", 0.5, 15)]),
            ("a", "y", 2.0, [optimizer(f"{name}, exact, 1.0", 0.25), optimizer("Adam", 0.5, 19)]),
            ("b", "z", 4.0, [optimizer(f"{name}, exact, 1.0", 4.0), optimizer("Adam", 2.0, 15)]),
        ),
        tradeoff.read_learned([]),
    )
    assert missing == {}
    ours, adam = found
    # Of the mean losses over the initial ones 1/2 and 1/8 are of one task, 1 is of the other.
    assert abs(ours.meta_loss - math.sqrt(math.sqrt(1 / 2 * 1 / 8) * 1.0)) <= 1e-12
    assert ours.losses == {"a x": 1.0, "a y": 0.25, "b z": 4.0}
    assert (ours.label, ours.learned) == (name, True)
    assert (adam.label, adam.timed, adam.learned) == ("Adam, best of 15", "torch.optim.Adam", False)
    assert abs(adam.meta_loss - math.sqrt(0.25 * 0.5)) <= 1e-12


def test_optimizers_of_an_evaluation_are_found_or_missed_with_the_reason() -> None:
    pytest.importorskip("jax")
    pytest.importorskip("pydantic")
    name = SHIPPED
    labels = [f"{name}, lagged, 0.5", "elsewhere, exact, 1.0", "NAdamW", "Adam, untuned"]
    some = [optimizer(label, 1.0) for label in labels]
    found, missing = tradeoff.entries(
        evaluation(("a", "x", 2.0, some), ("b", "y", 2.0, some[:-1])), tradeoff.read_learned([])
    )
    assert [entry.label for entry in found] == [f"{name}, lagged, lr 0.5", "NAdamW"]
    timed = found[0].timed
    assert not isinstance(timed, str)
    assert timed.spec.statistics == "lagged"
    assert all(np.array_equal(timed.theta[key], value) for key, value in load(name).theta.items())
    assert found[1].timed == "nadamw"
    assert "--checkpoint" in missing["elsewhere, exact, 1.0"]
    assert missing["Adam, untuned"] == "it was evaluated in 1 of 2 comparisons"
    with pytest.raises(BenchmarkError, match="elsewhere"):
        tradeoff.entries(evaluation(("a", "x", 2.0, some[1:2])), tradeoff.read_learned([]))


def test_state_is_counted() -> None:
    torch = pytest.importorskip("torch")
    for timed, arrays in (("torch.optim.SGD", 1), ("torch.optim.Adam", 2), ("nadamw", 2)):
        optimizer, _, step = tradeoff.build(timed, [(8, 8), (5,)], "auto")
        step()
        assert 0 <= tradeoff.state_bytes(optimizer) - arrays * 4 * 69 <= 16, timed  # and the number of steps
    ours, by, step = tradeoff.build(load(SHIPPED), [(8, 8)], "reference")
    step()
    assert by == "reference"
    entries = [a for a in ours.state[ours.param_groups[0]["params"][0]].values() if torch.is_tensor(a)]
    assert tradeoff.state_bytes(ours) == sum(a.nbytes for a in entries)


def test_tradeoff_command(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    pytest.importorskip("pydantic")
    pytest.importorskip("matplotlib")
    name = SHIPPED
    rows = [
        optimizer(f"{name}, exact, 1.0", 0.4),
        optimizer("Adam", 0.8, 3),
        optimizer("elsewhere, exact, 1.0", 1.0),
    ]
    (tmp_path / "results.json").write_text(json.dumps(evaluation(("a", "x", 2.0, rows))))
    file = tmp_path / "tradeoff.json"
    output = run_command(
        "tradeoff", "--eval", str(tmp_path), "--size", "2:64x64", "--seconds", "0", "--json", str(file)
    )
    ours, adam, missed = records.read(file)["results"]
    assert (ours["optimizer"], adam["optimizer"]) == (name, "Adam, best of 3")
    for row, loss in ((ours, 0.2), (adam, 0.4)):
        assert abs(row["meta_loss"] - loss) <= 1e-12
        assert row["parameters"] == 2 * 64 * 64
        assert row["step"]["median"] > 0.0
        assert row["temporary_bytes_per_parameter"] >= 0.0
    assert ours["architecture"] == load(name).architecture
    assert abs(adam["state_bytes_per_parameter"] - (8.0 + 2 * 4 / 8192)) <= 1e-9  # with the number of steps
    assert missed.keys() == {"optimizer", "skipped"}
    assert "- elsewhere, exact, 1.0: the weights are not shipped" in output
    assert f"| {name} | 0.2000 |" in output
    assert run_command("report", str(file)).startswith("| optimizer | mean loss / initial |")
    assert file.with_suffix(".png").read_bytes().startswith(PNG)


def test_without_results_the_evaluation_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    pytest.importorskip("pydantic")
    from lopt_fast.meta.evaluation.study import Plan

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tasks = tmp_path / "tasks.toml"
    tasks.write_text('[[task]]\nkind = "quadratic"\n')
    learned = tradeoff.read_learned([])[:1]
    plan = Plan(steps=10, seeds=1, baselines=("adam",), rates=3, timing=False)
    found, missing = tradeoff.entries(
        tradeoff.evaluate(learned, tasks, plan, lambda what, steps: lambda made: None), learned
    )
    assert missing == {}
    assert [entry.learned for entry in found] == [True, False]
    assert all(0.0 < entry.meta_loss < 3.0 for entry in found)


# --- plots ------------------------------------------------------------------------------------------------------------


def test_the_frontier_is_what_nothing_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 6.0), (2.0, 4.0), (4.0, 1.0)]
    assert tradeoff.frontier(points) == [(1.0, 5.0), (2.0, 4.0), (3.0, 1.0)]
    assert tradeoff.frontier([]) == []


def test_labels_of_close_points_leave_each_other_room(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = plotting.figure(6, 4)
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.uniform(0.4, 0.6, (10, 2))]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    labels = [f"optimizer number {i}" for i in range(len(points))]
    plotting.label_points(axes, points, labels, fontsize="small")
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    frame = axes.get_window_extent(renderer)
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
    plotting.save(figure, tmp_path / "folder" / "labels.png")
    assert (tmp_path / "folder" / "labels.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("scaling", "--architecture", "slower"), "slower"),
        (("scaling", "--widths", "0"), "size 0"),
        (("scaling", "--depths", "few"), "few"),
        (("tradeoff", "--eval", "no-such-file"), "lopt-fast eval"),
        (("tradeoff", "--eval", __file__), "test_bench_figures.py"),
        (("tradeoff", "--size", "nonsense"), "nonsense"),
        (("tradeoff", "--checkpoint", "no-such-weights"), "no-such-weights"),
    ],
)
def test_bad_options_are_named_without_a_traceback(arguments: tuple[str, ...], culprit: str) -> None:
    outcome = CliRunner().invoke(app, list(arguments))
    assert outcome.exit_code == 2
    assert culprit in outcome.output
