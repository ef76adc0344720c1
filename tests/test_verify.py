"""`lopt_fast.verify`: published golden files through all frameworks, and files made here with every variant of the
format, tampered with, damaged and foreign."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lopt_fast import reference, verify
from lopt_fast.architectures import initial_theta, small_fc_lopt
from lopt_fast.backends import BackendError
from lopt_fast.cli import app
from lopt_fast.published import FILES
from lopt_fast.spec import Spec
from lopt_fast.verify.replay import runner

GOLDEN = Path(os.environ.get("LOPT_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "golden"
FRAMEWORKS = ("numpy", "torch", "jax")
SHAPES = {"a_scalar": (), "b_vector": (5,), "c_matrix": (4, 6)}
STEPS = 3


def make_golden(folder: Path, hyperparameters: dict[str, Any] | None = None, **options: Any) -> Path:
    """A golden file of family adafac, as the float64 reference computes it, with its inputs beside it."""
    given = {"hidden_size": 4, "step_mult": 0.01, "exp_mult": 0.1} | (hyperparameters or {})
    names = {"initial_momentum_decays", "initial_rms_decays", "initial_adafactor_decays"}
    fields = {k.removeprefix("initial_") if k in names else k: v for k, v in given.items()}
    for ignored in ("concat_weights", "make_separate_weights", "split_weights"):
        fields.pop(ignored, None)
    spec = Spec.from_dict(fields)
    rng = np.random.default_rng(1)
    theta = small_fc_lopt.init_theta(spec, seed=1)
    theta["momentum_decays"] += np.float32(0.05)
    params0 = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    grads = {n: rng.standard_normal((STEPS, *s)).astype(np.float32) for n, s in SHAPES.items()}
    data: dict[str, np.ndarray] = {}
    for name, start in params0.items():
        p, state = start.astype(np.float64), None
        state = reference.init_state(spec, p)
        values = []
        for t in range(STEPS):
            theta64 = {k: v.astype(np.float64) for k, v in theta.items()}
            delta, state = reference.update(spec, theta64, p, grads[name][t].astype(np.float64), state, t)
            p = np.asarray(p + delta)
            values.append(p)
        trajectory = np.stack(values)
        if options.get("thin") == name:
            data[f"sub_index/{name}"] = index = np.array([1, 3, 3, 8])
            data[f"params64_sub/{name}"] = trajectory.reshape(STEPS, -1)[:, index]
            data[f"params_last/{name}"] = trajectory[-1].astype(np.float32)
        else:
            data[f"params64/{name}"] = trajectory
    leaves: dict[str, np.ndarray] = {}
    for name, value in theta.items():
        if name.endswith("decays"):
            leaves[name] = value
        elif options.get("separate"):
            leaves |= {
                f"nn/~/{name}_" + "_".join(map(str, i)): np.asarray(x) for i, x in np.ndenumerate(value)
            }
        else:
            leaves[f"nn/~/{name}"] = value
    meta = {
        "family": "adafac", "inputs": "inputs_x.npz", "n_steps": STEPS, "num_steps": 100,
        "hyperparameters": given, "theta_ref": "weights_x.npz" if options.get("theta_ref") else None,
    }  # fmt: skip
    meta |= options.get("meta", {})
    np.savez(
        folder / "inputs_x.npz",
        **{f"params0/{n}": a for n, a in params0.items()},
        **{f"grads/{n}": a for n, a in grads.items()},
    )
    if options.get("theta_ref"):
        np.savez(folder / "weights_x.npz", meta=np.array("{}"), **leaves)
        leaves = {}
    path = folder / "case.npz"
    np.savez(path, meta=np.array(json.dumps(meta)), **data, **{f"theta/{n}": a for n, a in leaves.items()})
    return path


def edit(path: Path, change: Any) -> Path:
    """The same file with its arrays changed by `change(dict)`."""
    with np.load(path) as archive:
        data = {k: archive[k] for k in archive.files}
    change(data)
    np.savez(path, **data)
    return path


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def need(framework: str) -> None:
    if framework != "numpy":
        pytest.importorskip(framework)


def public_files(*names: str) -> list[Any]:
    """pytest parameters: the trajectories and columns of the golden folder, or those of these names; one that skips if
    the folder is missing."""
    skip = pytest.param(None, marks=pytest.mark.skip(reason="no golden vectors here"))
    paths = [
        p for p in sorted(GOLDEN.glob("*.npz")) if not p.name.startswith(("inputs_", "weights_", "pes_"))
    ]
    return [pytest.param(p, id=p.stem) for p in paths if not names or p.stem in names] or [skip]


def check_public(path: Path, framework: str) -> None:
    report = verify.verify(path, framework)
    assert report.rows
    assert report.passed, report
    assert report.dtype == ("float64" if framework == "numpy" else "float32")
    assert report.backend
    assert set(report.skipped) == ({"p00_scalar"} if path.name.startswith("pylo") else set())


@pytest.mark.parametrize("path", public_files())
def test_public_golden_files_in_numpy(path: Path) -> None:
    check_public(path, "numpy")


@pytest.mark.parametrize("path", public_files())
def test_public_golden_files_in_torch(path: Path) -> None:
    """By the kernels where they can."""
    need("torch")
    check_public(path, "torch")


IN_JAX = (
    "adafac_features", "adafac_h16", "adafac_tie", "celo2_full_routing", "celo_adam_real_short", "celo_real_short",
    "mlp_h8_l1", "mulo_h16", "nadamw_wd", "nnadam_decay", "pylo_adafac_h32", "rnn_valid", "velo_short",
)  # fmt: skip


@pytest.mark.parametrize("path", public_files(*IN_JAX))
def test_public_golden_files_in_jax(path: Path) -> None:
    """One or two of each family: each takes XLA seconds to compile."""
    need("jax")
    check_public(path, "jax")


def test_every_public_family_can_be_replayed() -> None:
    if not GOLDEN.is_dir():
        pytest.skip("no golden vectors here")
    assert len(public_files()) >= 42


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_float64(shared: Path, framework: str) -> None:
    """float64 kernels within the strict bound, 1e-9 of the update."""
    need(framework)
    for name in ("adafac_h4_mini", "adafac_h8_negdecay", "adafac_tie"):
        report = verify.verify(shared / "golden" / f"{name}.npz", framework, dtype="float64")
        assert report.passed, report
        assert max(row.tolerance for row in report.rows) < 1e-9


def test_kernel_on_numpy_arrays(shared: Path) -> None:
    report = verify.verify(shared / "golden" / "adafac_h16.npz", "numpy", "cpu")
    assert (report.backend, report.dtype, report.passed) == ("cpu", "float32", True), report


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_made_file(tmp_path: Path, framework: str) -> None:
    need(framework)
    report = verify.verify(make_golden(tmp_path), framework)
    assert [row.tensor for row in report.rows] == list(SHAPES)
    assert report.passed, report


@pytest.mark.parametrize(
    ("hyperparameters", "options"),
    [
        ({"hidden_size": 7, "hidden_layers": 1}, {}),
        ({"step_mult": 0.5, "exp_mult": 0.0}, {}),
        ({"initial_momentum_decays": [0.5, 0.7, 0.8], "initial_rms_decays": [0.3]}, {}),
        ({"initial_rms_decays": [0.9, 0.99, 0.999]}, {}),
        ({"initial_momentum_decays": [0.9], "initial_adafactor_decays": [0.99]}, {}),
        ({"concat_weights": False}, {}),
        ({"concat_weights": False, "make_separate_weights": True}, {"separate": True}),
        ({"split_weights": True}, {}),
        ({}, {"thin": "c_matrix"}),
        ({}, {"theta_ref": True}),
    ],
)
def test_variants_of_the_format(tmp_path: Path, hyperparameters: dict[str, Any], options: Any) -> None:
    report = verify.verify(make_golden(tmp_path, hyperparameters, **options))
    assert len(report.rows) == len(SHAPES)
    assert report.passed, report


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_tampered_trajectory_fails(tmp_path: Path, framework: str) -> None:
    """One element of one step, by a thousandth of its update."""
    need(framework)

    def change(data: dict[str, np.ndarray]) -> None:
        values = data["params64/c_matrix"]
        values[1, 2, 3] += 1e-3 * np.abs(values[1] - values[0]).max()

    path = edit(make_golden(tmp_path), change)
    report = verify.verify(path, framework)
    assert [row.tensor for row in report.rows if not row.passed] == ["c_matrix"]
    result = run(path, "--framework", framework)
    assert result.exit_code == 1
    assert "FAIL (c_matrix)" in result.output


def test_tampered_public_file_fails(shared: Path, tmp_path: Path) -> None:
    for name in ("inputs_mini.npz", "adafac_features.npz", "pylo_adafac_h32.npz"):
        (tmp_path / name).write_bytes((shared / "golden" / name).read_bytes())

    def features(data: dict[str, np.ndarray]) -> None:
        data["features64/p04_sq10"][2, 3, 3, 20] *= 1 + 1e-7

    def pylo(data: dict[str, np.ndarray]) -> None:
        data["params/p06_m16x32"][5, 3, 3] += 1e-4

    for name, change in (("adafac_features.npz", features), ("pylo_adafac_h32.npz", pylo)):
        report = verify.verify(edit(tmp_path / name, change))
        assert sum(not row.passed for row in report.rows) == 1, report


def test_nan_fails(tmp_path: Path) -> None:
    def change(data: dict[str, np.ndarray]) -> None:
        data["params64/b_vector"][1, 2] = np.nan

    path = edit(make_golden(tmp_path), change)
    result = run(path, "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "FAIL (b_vector)" in result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["passed"]
    assert found["files"][0]["rows"][1]["error"] is None


def test_thinned_tensor_is_checked_everywhere(tmp_path: Path) -> None:
    """An element that the thinned trajectory does not show."""

    def change(data: dict[str, np.ndarray]) -> None:
        data["params_last/c_matrix"][0, 0] += 1e-3

    report = verify.verify(edit(make_golden(tmp_path, thin="c_matrix"), change))
    failed = [row for row in report.rows if not row.passed]
    assert [row.note for row in failed] == ["step 2, all elements"]


def test_exit_codes_and_json(tmp_path: Path) -> None:
    path = make_golden(tmp_path)
    result = run(path, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "1 of 1 files within tolerance" in result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["passed"]
    assert [row["tensor"] for row in found["files"][0]["rows"]] == list(SHAPES)
    # A file that cannot be read does not keep the others from being checked.
    result = run(tmp_path / "missing.npz", path)
    assert result.exit_code == 2
    assert "no such file" in result.output
    assert "1 of 2 files within tolerance, 1 could not" in result.output


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = make_golden(tmp_path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        result = run(path)
        assert result.exit_code == 2, (size, result.output)
        assert "case.npz: not a readable .npz file" in result.output.replace("\n", "")
    rng = np.random.default_rng(0)
    for _ in range(20):  # bytes changed anywhere: an error, a failure, or no effect; never a crash
        damaged = bytearray(whole)
        for position in rng.integers(len(whole), size=8):
            damaged[position] ^= 0xFF
        path.write_bytes(bytes(damaged))
        result = run(path)
        assert result.exit_code in (0, 1, 2)
        assert result.exception is None or isinstance(result.exception, SystemExit)
    path.write_text("not an archive")
    assert run(path).exit_code == 2
    np.savez(path, x=np.zeros(3))
    assert "not a golden file" in run(path).output


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"family": "lion"}, "family 'lion' cannot be replayed; known are adafac, celo"),
        ({"family": "velo"}, "velo: unknown hyperparameters hidden_size"),
        ({"is_valid": [0, 1]}, "is_valid has 2 entries for 3 steps"),
        ({"family": None, "kind": "notes"}, "kind 'notes' cannot be replayed"),
        (
            {"hyperparameters": {"hidden_size": 4, "depth": 3, "colour": 1}},
            "unknown hyperparameters colour, depth",
        ),
        ({"hyperparameters": {"hidden_size": 8}}, "meta-parameter 'w0' has shape"),
        ({"hyperparameters": {"hidden_size": "wide"}}, "hidden_size"),
        ({"inputs": "inputs_y.npz"}, "inputs_y.npz: no such file"),
        ({"n_steps": 4}, "gradients of"),
        ({"n_steps": 2}, "has shape"),
        ({"n_steps": None}, "not a complete golden file"),
        ({"theta_ref": "weights_y.npz"}, "weights_y.npz: no such file"),
    ],
)
def test_unusable_meta(tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    result = run(make_golden(tmp_path, meta=meta))
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_missing_arrays(tmp_path: Path) -> None:
    for missing in ("theta/nn/~/w1", "theta/rms_decays", "meta"):
        path = edit(make_golden(tmp_path), lambda data, missing=missing: data.pop(missing))
        assert run(path).exit_code == 2
    path = edit(make_golden(tmp_path, thin="c_matrix"), lambda data: data.pop("sub_index/c_matrix"))
    assert run(path).exit_code == 2


def test_unusable_arguments(tmp_path: Path) -> None:
    path = make_golden(tmp_path)
    for arguments, message in (
        (("--framework", "mxnet"), "framework 'mxnet': must be one of"),
        (("--dtype", "float16"), "dtype 'float16': must be one of"),
        (("--backend", "abacus"), "backend='abacus': must be one of"),
        (("--backend", "cuda"), "NumPy's arrays are not there"),
        (("--device", "cuda"), "device 'cuda': can be chosen for torch alone"),
        (("--framework", "torch", "--device", "cuda:x"), "device 'cuda:x': must be as"),
    ):
        result = run(path, *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output.replace("\n", " ")
    with pytest.raises(BackendError):
        verify.verify(path, "numpy", "triton")


# Files of other families, made here


def make_family(folder: Path, family: str, hyperparameters: dict[str, Any], **meta: Any) -> Path:
    """A golden file of two tensors with random meta-parameters, as NumPy's float64 replay computes it."""
    rng = np.random.default_rng(3)
    shapes = {"a_vector": (5,), "b_matrix": (4, 3)}
    np.savez(
        folder / "inputs_f.npz", losses=rng.uniform(0.5, 2.0, STEPS).astype(np.float32),
        **{f"params0/{n}": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()},
        **{f"grads/{n}": rng.standard_normal((STEPS, *s)).astype(np.float32) for n, s in shapes.items()},
    )  # fmt: skip
    reader = FILES["adafac" if family == "mulo" else family]
    spec = reader.architecture({k: v for k, v in hyperparameters.items() if k not in MULO})
    leaves = reader.table(spec).write({n: a + 0.05 for n, a in initial_theta(spec, 2).items()})
    about = {
        "family": family, "inputs": "inputs_f.npz", "n_steps": STEPS, "num_steps": 20,
        "hyperparameters": hyperparameters, "theta_ref": None, **meta,
    }  # fmt: skip
    arrays = {f"theta/{path}": a for path, a in leaves.items()}
    path = folder / f"{family}.npz"
    for values in (None, path):  # the second time with the right trajectory
        data = {n: np.zeros((STEPS, *s)) for n, s in shapes.items()}
        if values is not None:
            case = verify.load(path)
            run_numpy, dtype = runner("numpy", "reference", None)
            data, _ = run_numpy(case.replays[0], case.inputs, "reference", dtype, "cpu")
        about_array = np.array(json.dumps(about))
        np.savez(path, meta=about_array, **arrays, **{f"params64/{n}": a for n, a in data.items()})
    return path


MULO = ("mup_lr_scale", "clip_grad")
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rnn": (
        {"hidden_size": 4, "from_mlp_size": 2, "from_lstm_size": 3, "lstm_to_ff": 2, "lstm_hidden_size": 4,
         "step_multiplier": 0.1},
        {"is_valid": [0, 1, 0]},
    ),
    "celo2": ({"regex_1d": "^a_", "ff_hidden_size": 2, "step_mult": 0.1, "weight_decay": 0.1}, {}),
    "celo_adam": ({"lstm_hidden_size": 4, "step_mult": 0.1}, {}),
    "mulo": ({"step_mult": 0.1, "clip_grad": True, "mup_lr_scale": {"b_matrix": 0.25}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("family", list(SMALL))
def test_other_families(family: str, framework: str, tmp_path: Path) -> None:
    """Losses, losses on validation data, the horizon, names and learning rates reach the optimizer."""
    need(framework)
    path = make_family(tmp_path, family, *SMALL[family][:1], **SMALL[family][1])
    report = verify.verify(path, framework)
    assert [row.tensor for row in report.rows] == ["a_vector", "b_matrix"]
    assert report.passed, report

    def change(data: dict[str, np.ndarray]) -> None:
        moved = np.diff(data["params64/b_matrix"], axis=0, prepend=0.0)[-1]
        data["params64/b_matrix"][-1, 2, 1] += 0.5 * np.abs(moved).max()

    assert not verify.verify(edit(path, change), framework).passed


def test_mulo_clips_and_scales(tmp_path: Path) -> None:
    """As small_fc_lopt with gradients of norm 1 over all tensors, and a quarter of the step for one of them."""
    case = verify.load(make_family(tmp_path, "mulo", SMALL["mulo"][0]))
    norms = np.sqrt(sum((g.reshape(STEPS, -1) ** 2).sum(axis=1) for g in case.inputs.grads.values()))
    assert np.abs(norms - 1.0).max() <= 1e-12
    unscaled = dict(SMALL["mulo"][0], mup_lr_scale={})
    other = verify.load(make_family(tmp_path, "mulo", unscaled))
    for name, scale in (("a_vector", 1.0), ("b_matrix", 0.25)):
        start = case.inputs.params0[name].reshape(-1)
        first, full = (c.replays[0].targets[name].values[0] - start for c in (case, other))
        assert np.abs(first - scale * full).max() <= 1e-12 * np.abs(full).max()


def test_stored_steps_are_compared(tmp_path: Path) -> None:
    """`step64`: what a transformation returned, which the loop multiplied by `applied_lr`."""
    path = make_family(tmp_path, "celo2_optax", {"ff_hidden_size": 2, "applied_lr": 0.01})

    def add(data: dict[str, np.ndarray], error: float) -> None:
        for name in ("a_vector", "b_matrix"):
            with np.load(tmp_path / "inputs_f.npz") as inputs:
                start = inputs[f"params0/{name}"].astype(np.float64)
            moved = np.diff(np.concatenate([start[None], data[f"params64/{name}"]]), axis=0)
            data[f"step64/{name}"] = moved / -0.01
        data["step64/b_matrix"][1, 0, 0] *= 1.0 + error

    assert verify.verify(edit(path, lambda data: add(data, 0.0))).passed
    report = verify.verify(edit(path, lambda data: add(data, 1e-3)))
    assert [row.note for row in report.rows if not row.passed] == ["step 1, the step"]


def test_ill_conditioned_column(tmp_path: Path) -> None:
    """rnn_fc_lopt in float32: a tenth of the change for one element in a hundred; in float64 there is no exception."""
    need("torch")
    path = make_family(tmp_path, "rnn", SMALL["rnn"][0])

    def change(data: dict[str, np.ndarray], error: float, count: int) -> None:
        values = data["params64/b_matrix"][-1].reshape(-1)
        values[:count] += error * np.abs(values - data["params64/b_matrix"][-2].reshape(-1)).max()

    assert verify.verify(edit(path, lambda data: change(data, 0.05, 1)), "torch").passed
    assert not verify.verify(path, "torch", dtype="float64").passed
    assert not verify.verify(edit(path, lambda data: change(data, 0.05, 12)), "torch").passed


@pytest.mark.parametrize(
    ("family", "hyperparameters", "meta", "message"),
    [
        ("celo", {"lstm_hidden_size": 4, "train_phase": 2}, {"num_steps": None}, "celo knows its horizon"),
        ("celo", {"lstm_hidden_size": 4, "with_g": False}, {}, "with_g=False is not supported"),
        ("mulo", {"mup_lr_scale": {"c": 2.0}}, {}, "mup_lr_scale names tensors that are not there: c"),
    ],
)
def test_unusable_files_of_other_families(
    family: str, hyperparameters: dict[str, Any], meta: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = make_family(tmp_path, "celo_adam", SMALL["celo_adam"][0])
    about = {
        "family": family,
        "hyperparameters": hyperparameters,
        "inputs": "inputs_f.npz",
        "n_steps": STEPS,
        **meta,
    }
    reader = FILES["adafac" if family == "mulo" else family]
    spec = reader.architecture({k: v for k, v in hyperparameters.items() if k not in ("with_g", *MULO)})
    leaves = {f"theta/{p}": a for p, a in reader.table(spec).write(initial_theta(spec)).items()}
    edit(path, lambda data: data.update(leaves, meta=np.array(json.dumps(about))))
    with pytest.raises(verify.GoldenError, match=message):
        verify.verify(path)


def test_losses_are_needed(tmp_path: Path) -> None:
    path = make_family(tmp_path, "celo_adam", SMALL["celo_adam"][0])
    edit(tmp_path / "inputs_f.npz", lambda data: data.pop("losses"))
    with pytest.raises(
        verify.GoldenError, match="celo_adam looks at the loss, its inputs file has no 'losses'"
    ):
        verify.verify(path)


# Meta-gradients (kind: pes), replayed in JAX


def make_estimate(folder: Path, sign: float | None = None, **meta: Any) -> Path:
    """A file of one estimate, by the formula written out for each pair in float64."""
    rng = np.random.default_rng(7)
    steps, pairs, std = 7, 5, 0.03
    losses = rng.uniform(0.5, 2.0, (2, steps, pairs)).astype(np.float32)
    is_done, mask = np.zeros((steps, pairs), bool), np.ones((steps, pairs), bool)
    is_done[2, 1] = is_done[6, 3] = True
    mask[3, 1] = False
    shapes = {"w": (3, 2), "deep/er/b": (), "deep/er/c": (1,)}
    memory, vec = (
        {n: std * rng.standard_normal((pairs, *s)).astype(np.float32) for n, s in shapes.items()}
        for _ in "ab"
    )
    delta = losses[0].astype(np.float64) - losses[1]
    out: dict[str, Any] = {f"grad/{n}": np.zeros(s) for n, s in shapes.items()}
    out |= {f"new_accumulator/{n}": np.zeros((pairs, *s)) for n, s in shapes.items()}
    out["loss"] = 0.0
    for i in range(pairs):
        made = int(mask[:, i].sum())
        if sign is not None:
            delta[:, i] = sign * np.sign((delta[:, i] * mask[:, i]).sum())
        ended = next((t for t in range(steps) if is_done[t, i]), steps)
        out["loss"] += ((losses[0] + losses[1].astype(np.float64)) * mask)[:, i].sum() / made / pairs / 2
        for n in shapes:
            both = memory[n][i] + vec[n][i].astype(np.float64)
            for t in range(steps):
                seen = both if t < ended else vec[n][i]
                out[f"grad/{n}"] = out[f"grad/{n}"] + mask[t, i] * delta[t, i] / made * seen / pairs / (
                    2 * std**2
                )
            out[f"new_accumulator/{n}"][i] = both if ended == steps else vec[n][i]
    out["delta_losses"] = delta
    path = folder / "estimate.npz"
    np.savez(
        path, meta=np.array(json.dumps({"kind": "pes", "std": std, "sign_delta_loss_scalar": sign} | meta)),
        **{"in/p_loss": losses[0], "in/n_loss": losses[1], "in/is_done": is_done, "in/mask": mask},
        **{f"in/accumulator/{n}": a for n, a in memory.items()}, **{f"in/vec_pos/{n}": a for n, a in vec.items()},
        **{f"out64/{n}": a for n, a in out.items()},
    )  # fmt: skip
    return path


@pytest.mark.parametrize("sign", [None, 0.25])
def test_made_estimate(tmp_path: Path, sign: float | None) -> None:
    need("jax")
    report = verify.verify(make_estimate(tmp_path, sign))
    assert report.passed, report
    assert len(report.rows) == 2 * 8  # float64 and float32
    assert [row.note for row in report.rows if row.tensor == "grad/deep/er/b"] == ["float64", "float32"]
    assert all(row.tolerance <= 1e-11 for row in report.rows if row.note == "float64")


def test_estimates_are_replayed_in_jax_whatever_was_asked_for(tmp_path: Path) -> None:
    """So that a whole folder passes; the line says so."""
    need("jax")
    path = make_estimate(tmp_path)
    for arguments in ((), ("--framework", "torch"), ("--framework", "numpy", "--dtype", "float64")):
        result = run(path, *arguments)
        assert result.exit_code == 0, result.output
        assert "pass (jax, PES, in JAX whatever --framework says" in result.output.replace("\n", " ")
    assert "whatever" not in run(path, "--framework", "jax").output


@pytest.mark.parametrize("value", [1.001, np.nan])
def test_tampered_estimate_fails(tmp_path: Path, value: float) -> None:
    need("jax")
    names = ["delta_losses", "grad/w", "loss", "new_accumulator/deep/er/c"]

    def change(data: dict[str, np.ndarray]) -> None:
        for name in names:
            values = data[f"out64/{name}"]
            values.flat[np.abs(values).argmax()] *= value

    report = verify.verify(edit(make_estimate(tmp_path), change))
    for dtype in ("float64", "float32"):
        assert sorted(r.tensor for r in report.rows if not r.passed and r.note == dtype) == names


def test_unrolls_with_truncated_gradients(shared: Path, tmp_path: Path) -> None:
    """Whole calls of the outer loop; then with one number changed, the smallest change that must be seen."""
    need("jax")
    for name in ("adafac", "sgdm"):
        report = verify.verify(shared / "golden" / f"pes_e2e_{name}.npz")
        assert report.passed, report
        assert {"p_loss", "n_mask", "p_inner_params", "n_iteration", "mean_loss"} < {
            r.tensor for r in report.rows
        }
    source = shared / "golden" / "pes_e2e_sgdm.npz"
    changes = {
        "grad/log_lr": ((1,), 0.01), "acc_after/log_lr": ((2, 1), 1e-3), "p_loss": ((1, 1, 2), 1e-3),
        "n_inner_params": ((3, 2, 1, 0), 1e-2), "p_is_done": ((0, 0, 0), None), "mean_loss": ((4,), 1e-3),
    }  # fmt: skip

    def change(data: dict[str, np.ndarray]) -> None:
        for name, (index, by) in changes.items():
            data[name][index] = not data[name][index] if by is None else data[name][index] * (1 + by)

    (tmp_path / source.name).write_bytes(source.read_bytes())
    report = verify.verify(edit(tmp_path / source.name, change))
    assert {row.tensor for row in report.rows if not row.passed} == set(changes)
    # What the replay reads is the start of an unroll alone: another start is another unroll.
    (tmp_path / source.name).write_bytes(source.read_bytes())

    def restart(data: dict[str, np.ndarray]) -> None:
        data["p_inner_params"][0, 0, 0] += 0.1

    report = verify.verify(edit(tmp_path / source.name, restart))
    assert {"p_inner_params", "p_loss", "grad/log_lr", "mean_loss"} <= {
        r.tensor for r in report.rows if not r.passed
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learned_opt": "LearnableAdam(initial_lr=0.1)"}, "known are AdafacMLPLOpt and LearnableSGDM"),
        ({"learned_opt": "LearnableSGDM(nesterov=True)"}, "cannot be replayed"),
        ({"learned_opt": "__import__('os')"}, "not a constructor with constant arguments"),
        ({"learned_opt": "AdafacMLPLOpt(hidden_size=9)"}, "meta-parameter"),
        ({"learned_opt": "AdafacMLPLOpt(depth=9)"}, "unknown hyperparameters depth"),
        ({"task": "RosenbrockFamily"}, "task 'RosenbrockFamily' cannot be replayed"),
        ({"std": 0.0}, "std=0.0: must be positive"),
        ({"std": None}, "not a complete golden file"),
    ],
)
def test_unusable_unrolls(shared: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    need("jax")
    source = shared / "golden" / "pes_e2e_sgdm.npz"
    (tmp_path / source.name).write_bytes(source.read_bytes())

    def apply(data: dict[str, np.ndarray]) -> None:
        data["meta"] = np.array(json.dumps(json.loads(str(data["meta"])) | change))

    result = run(edit(tmp_path / source.name, apply))
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")


def test_incomplete_estimates(tmp_path: Path) -> None:
    need("jax")
    for missing, message in (
        ("in/p_loss", "without losses"), ("in/mask", "not a complete"), ("in/vec_pos/w", "not a complete"),
        ("out64/grad/w", "not a complete"), ("out64", "has no outputs"),
    ):  # fmt: skip

        def remove(data: dict[str, np.ndarray], missing: str = missing) -> None:
            for key in [k for k in data if k == missing or k.startswith(f"{missing}/")]:
                del data[key]

        with pytest.raises(verify.GoldenError, match=message):
            verify.verify(edit(make_estimate(tmp_path), remove))

    def widen(data: dict[str, np.ndarray]) -> None:
        data["out64/grad/w"] = data["out64/grad/w"][:, :1]

    with pytest.raises(verify.GoldenError, match=r"grad/w has shape \(3, 1\), expected \(3, 2\)"):
        verify.verify(edit(make_estimate(tmp_path), widen))


def test_estimates_without_jax(tmp_path: Path) -> None:
    """The file is named, with the remedy; the other files are still replayed."""
    files = [make_golden(tmp_path), make_estimate(tmp_path)]
    code = "import sys; sys.modules['jax'] = None; from lopt_fast.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "verify", *map(str, files)], capture_output=True, text=True, check=False
    )
    output = " ".join((result.stdout + result.stderr).split())
    assert result.returncode == 2, output
    assert "estimate.npz: meta-gradients are replayed in JAX, which cannot be imported" in output
    assert "pip install '.[jax]' in the source folder" in output
    assert "1 of 2 files within tolerance" in output
