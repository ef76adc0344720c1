"""`lopt-fast train`: tiny runs of every task, what they write, what they refuse."""

from __future__ import annotations

import json
import pickle
import runpy
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lopt_fast import Checkpoint, Spec
from lopt_fast.architectures import small_fc_lopt
from lopt_fast.cli import app
from lopt_fast.training import TrainConfig, TrainingError, problems, train
from lopt_fast.training.choices import parse
from lopt_fast.training.loop import train_steps

FRAMEWORKS = ("torch", "jax")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that lowers the loss a little: the direction is the gradient's sign."""
    spec = Spec(step_mult=1e-2)
    theta = {name: np.zeros(shape, np.float32) for name, shape in spec.theta_shapes.items()}
    theta["w0"][0, :2] = 1.0, -1.0
    theta["w1"][:2, :2] = np.eye(2)
    theta["w2"][:2, 0] = 1.0, -1.0
    return Checkpoint(spec, theta).save(tmp_path_factory.mktemp("weights") / "descent.safetensors")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def smaller(problem: Any) -> Any:
    """The same task with a network that compiles at once."""
    if isinstance(problem, problems.TextProblem):
        return replace(problem, width=16, layers=1)
    return replace(problem, hidden=(4,)) if isinstance(problem, problems.ImageProblem) else problem


def write_cifar(folder: Path) -> None:
    rng = np.random.default_rng(0)
    batch = {b"data": rng.integers(256, size=(40, 3072), dtype=np.uint8), b"labels": list(range(10)) * 4}
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch))


def write_idx(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, array in (
        ("images-idx3", rng.integers(256, size=(40, 28, 28), dtype=np.uint8)),
        ("labels-idx1", rng.integers(10, size=40, dtype=np.uint8)),
    ):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (folder / f"train-{name}-ubyte").write_bytes(header + array.tobytes())


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("task", ["digits", "stdlib-lm", "quadratic", "cifar10", "mnist", "fashion-mnist"])
def test_every_task(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, framework: str, task: str
) -> None:
    """A few steps of the learned optimizer and of AdamW: finite losses that start alike, table, JSON, plot."""
    pytest.importorskip(framework)
    pytest.importorskip("sklearn") if task == "digits" else None
    monkeypatch.setattr("lopt_fast.training.run.make", lambda *given: smaller(problems.make(*given)))
    data: list[str | Path] = []
    if task in ("cifar10", "mnist", "fashion-mnist"):
        (write_cifar if task == "cifar10" else write_idx)(tmp_path)
        data = ["--data", tmp_path]
    out = tmp_path / "out"
    result = run(
        "--task", task, "--framework", framework, "--optimizer", weights, "--optimizer", "adamw", "--steps", 3,
        "--batch-size", 4, "--out", out, *data,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("descent", "adamw", "loss at", "optimizer", "ms/step", "share", "of step", "bytes /"):
        assert text in result.output
    found = json.loads((out / "results.json").read_text())
    first, second = found["optimizers"]
    assert len(first["losses"]) == len(second["losses"]) == 3
    assert first["losses"][0] == pytest.approx(second["losses"][0], rel=1e-5)
    assert np.isfinite([*first["losses"], *second["losses"]]).all()
    assert 16 <= first["state_bytes_per_parameter"] < 40
    assert 8 <= second["state_bytes_per_parameter"] < 9
    assert 0 < first["optimizer_share"] < 1
    pytest.importorskip("matplotlib")
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == ["plot.png", "results.json"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_losses_fall(weights: Path, framework: str) -> None:
    pytest.importorskip(framework)
    texts = (f"{weights}", f"{weights}@statistics=lagged", "adamw@lr=0.1", "sgdm@lr=0.3")
    config = TrainConfig("quadratic", [parse(text) for text in texts], 60, framework)  # type: ignore[arg-type]
    for entry in train(config).entries:
        assert entry.curve.losses[-1] < 0.8 * entry.curve.losses[0], entry.choice.label


def test_same_seed_same_losses(weights: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    config = TrainConfig("digits", [parse(str(weights))], 4, seed=3)
    first, second = train(config), train(config)
    np.testing.assert_array_equal(first.entries[0].curve.losses, second.entries[0].curve.losses, strict=True)
    other = train(TrainConfig("digits", [parse(str(weights))], 4, seed=4))
    assert first.entries[0].curve.losses[0] != other.entries[0].curve.losses[0]


def test_search_takes_the_best_rate(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = run(
        "--task", "quadratic", "--optimizer", "sgdm:best", "--steps", 30, "--out", tmp_path, "--json",
        tmp_path / "numbers.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "numbers.json").read_text())["optimizers"][0]
    tried = {entry["lr"]: entry["loss"] for entry in found["learning_rate_search"]}
    assert len(tried) == 4
    assert found["lr"] == min(tried, key=lambda lr: tried[lr])
    assert f"sgdm:best (lr={found['lr']:g})" in result.output


def test_divergence_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = run(
        "--task", "quadratic", "--optimizer", "sgdm@lr=1e30", "--optimizer", "adamw", "--steps", 20, "--out", tmp_path
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "diverged" in result.output
    first, second = json.loads((tmp_path / "results.json").read_text())["optimizers"]
    assert first["diverged_at"] < 20
    assert first["loss_at"]["20"] is None
    assert second["diverged_at"] is None


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("--task", "quadratic", "--optimizer", "adamw", "--steps", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "no plot: matplotlib cannot be imported" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_choices(weights: Path) -> None:
    choice = parse("adamw@lr=3e-3,weight_decay=0.1")
    assert (choice.name, choice.lr, choice.weight_decay, choice.checkpoint) == ("adamw", 3e-3, 0.1, None)
    assert parse("adamw").lr == 1e-3
    assert parse("adamw", lr=0.5).lr == 0.5
    assert parse("adamw@lr=0.1", lr=0.5).lr == 0.1
    choice = parse(f"{weights}@statistics=lagged", statistics="exact")
    assert (choice.lr, choice.statistics, choice.label) == (1.0, "lagged", "descent@statistics=lagged")
    assert parse(str(weights), statistics="lagged").label == "descent lagged"
    assert len(parse("adamw:best").search) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chess", "--optimizer", "adamw"], "task 'chess': must be one of"),
        (["--task", "cifar10", "--optimizer", "adamw"], "give their folder with --data"),
        (["--task", "mnist", "--optimizer", "adamw", "--data", "/nowhere"], "give the folder"),
        (["--task", "digits", "--optimizer", "adamw", "--data", "/nowhere"], "needs no --data"),
        (["--task", "quadratic", "--optimizer", "adam_the_first"], "neither a file nor the name"),
        (["--task", "quadratic", "--optimizer", "adamw@lr=fast"], "lr=fast: must be a number"),
        (["--task", "quadratic", "--optimizer", "adamw@lr=-1"], "lr=-1: must be a number"),
        (["--task", "quadratic", "--optimizer", "adamw@beta=1"], "unknown option beta"),
        (["--task", "quadratic", "--optimizer", "adamw@statistics=lagged"], "adamw has no statistics"),
        (["--task", "quadratic", "--optimizer", "adamw:best@lr=1"], "either :best or lr="),
        (["--task", "quadratic", "--optimizer", "adamw", "--optimizer", "adamw"], "the same optimizer twice"),
        (["--task", "quadratic", "--optimizer", "adamw", "--framework", "mxnet"], "must be torch or jax"),
        (["--task", "quadratic", "--optimizer", "adamw", "--statistics", "new"], "must be exact or lagged"),
        (["--task", "quadratic", "--optimizer", "adamw", "--steps", "0"], "steps"),
        (["--task", "quadratic"], "optimizer"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint(tmp_path: Path, weights: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:-7])
    result = run("--task", "quadratic", "--optimizer", damaged, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "damaged.safetensors" in result.output


def test_loop_stops_when_the_loss_is_not_finite() -> None:
    class Trainer:
        parameters = 1
        updates = 0

        def gradient(self, step: int) -> float:
            return float("nan") if step == 3 else 1.0

        def update(self) -> None:
            self.updates += 1

        def state_bytes(self) -> int:
            return 0

    trainer = Trainer()
    curve = train_steps(trainer, 10)
    assert trainer.updates == 3
    assert len(curve.losses) == len(curve.step_seconds) == 4
    assert np.isnan(curve.loss_at(10, 2))
    assert curve.loss_at(3, 2) == 1.0


def test_config_is_checked() -> None:
    with pytest.raises(TrainingError, match="at least one optimizer"):
        TrainConfig("digits", [], 10)
    with pytest.raises(TrainingError, match="batch_size=0"):
        TrainConfig("digits", [parse("adamw")], 10, batch_size=0)


def test_initial_weights_train(tmp_path: Path) -> None:
    """A checkpoint made from initial meta-parameters runs in both frameworks with the same losses at the start."""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    spec = Spec()
    path = Checkpoint(spec, small_fc_lopt.init_theta(spec)).save(tmp_path / "init.safetensors")
    curves = [
        train(TrainConfig("quadratic", [parse(str(path))], 5, framework)).entries[0].curve.losses  # type: ignore[arg-type]
        for framework in FRAMEWORKS
    ]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)


def test_the_demo_has_a_million_parameters() -> None:
    """The transformer at its full size, both frameworks."""
    pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    from lopt_fast.training import jax_trainer, torch_trainer

    problem = problems.make("stdlib-lm")
    model, _ = torch_trainer._model(problem)
    init, _ = jax_trainer._functions(problem)
    in_torch = sum(p.numel() for p in model.parameters())
    in_jax = sum(a.size for a in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))
    assert in_torch == in_jax
    assert 1e6 < in_torch < 1.1e6


@pytest.mark.parametrize("example", ["plug_in_torch.py", "plug_in_jax.py"])
def test_plug_in_examples(root: Path, example: str, default_xla: None) -> None:
    """With the default weights the loss ends far below where it started."""
    pytest.importorskip("torch" if "torch" in example else "jax")
    done = subprocess.run(
        [sys.executable, str(root / "examples" / example)], capture_output=True, text=True, check=True
    )
    losses = [float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 5
    assert losses[-1] < 0.5 * losses[0] or losses[-1] < 0.05


def test_demo(
    root: Path,
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From end to end, with three steps of smaller networks: both tables, all files."""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    monkeypatch.setattr("lopt_fast.training.run.make", lambda *given: smaller(problems.make(*given)))
    arguments = [
        "demo.py", "--steps", "3", "--out", str(tmp_path), "--learned", str(weights), "--learned",
        f"{weights}@statistics=lagged",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(root / "examples" / "demo.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "stdlib-lm in torch" in shown
    assert "digits in jax" in shown
    assert shown.count("descent@statistics=lagged") == 2
    assert str(tmp_path / "stdlib-lm-torch" / "plot.png") in shown.replace("\n", "")
    assert len(list(tmp_path.glob("*/results.json"))) == 2
