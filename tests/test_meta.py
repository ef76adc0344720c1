"""Meta-training: the PES estimator against recorded outputs, the outer loop, checkpoints, evaluation, data files."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy

from lopt_fast import data  # noqa: E402
from lopt_fast.meta import evaluate, pes, tasks, train  # noqa: E402
from lopt_fast.meta.unroll import inner_optimizer, sample_batches, start, unroll  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def unit_files() -> list[Path]:
    return sorted(GOLDEN.glob("pes_unit_*.npz"))


@pytest.mark.skipif(not unit_files(), reason="no golden files beside the repository")
@pytest.mark.parametrize("path", unit_files(), ids=lambda p: p.stem)
@pytest.mark.parametrize(
    ("dtype", "out", "tolerance"), [(np.float64, "out64/", 1e-14), (np.float32, "out/", 1e-5)]
)
def test_pes_gradient_reproduces_golden(path: Path, dtype: type, out: str, tolerance: float) -> None:
    file = np.load(path)
    meta = json.loads(str(file["meta"]))

    def tree(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): file[k].astype(dtype) for k in file.files if k.startswith(prefix)}

    with jax.enable_x64(dtype is np.float64):
        result = pes.pes_gradient(
            jnp.asarray(file["in/p_loss"].astype(dtype)),
            jnp.asarray(file["in/n_loss"].astype(dtype)),
            file["in/is_done"],
            file["in/mask"],
            tree("in/accumulator/"),
            tree("in/vec_pos/"),
            meta["std"],
            meta["sign_delta_loss_scalar"],
        )
        result = jax.tree.map(np.asarray, result)

    def check(mine: np.ndarray, expected: np.ndarray) -> None:
        assert mine.dtype == dtype
        scale = max(float(np.abs(expected).max()), 1e-30)
        assert (np.abs(mine - expected) <= tolerance * scale).all()

    check(result.loss, file[out + "loss"])
    check(result.delta_losses, file[out + "delta_losses"])
    for name, expected in tree(out + "grad/").items():
        check(result.gradient[name], expected)
    for name, expected in tree(out + "new_accumulator/").items():
        check(result.accumulator[name], expected)


@pytest.mark.parametrize("reuse", [False, True])
def test_estimate_is_the_gradient_of_the_whole_unroll(reuse: bool) -> None:
    """x <- a x + theta, loss x: linear in theta, so that the expectation is known exactly."""
    a, steps, truncation, pairs, std = 0.9, 12, 3, 20_000, 0.1
    theta = jnp.zeros(2)

    def advance(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = []
        for _ in range(truncation):
            x = a * x + shift
            losses.append(x.sum(-1))
        return x, jnp.stack(losses)

    state = (jnp.ones((pairs, 2)), jnp.ones((pairs, 2)))
    key = jax.random.key(0)
    accumulator = pes.sample_perturbations(key, theta, pairs, std if reuse else 0.0)
    never = jnp.zeros((truncation, pairs), bool)
    total = jnp.zeros(2)
    for i in range(steps // truncation):
        fresh = pes.sample_perturbations(jax.random.fold_in(key, i), theta, pairs, 0.0 if reuse else std)
        applied = accumulator if reuse else fresh
        results = [advance(x, theta + sign * applied) for x, sign in zip(state, (1, -1), strict=True)]
        state = (results[0][0], results[1][0])
        estimate = pes.pes_gradient(results[0][1], results[1][1], never, ~never, accumulator, fresh, std)
        accumulator = estimate.accumulator
        total += estimate.gradient * truncation
    exact = sum(sum(a**j for j in range(t + 1)) for t in range(steps))
    np.testing.assert_allclose(np.asarray(total), exact, rtol=0.1)


def toy_dataset(seed: int = 0, name: str = "toy") -> tasks.Dataset:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 200).astype(np.int32)
    inputs = rng.standard_normal((200, 2, 2, 1)).astype(np.float32)
    inputs[:, 0, 0, 0] += 2.0 * labels
    return tasks.Dataset(name, inputs, labels)


CONFIG = train.MetaTrainConfig(
    datasets=("digits", "cifar10"),  # names only: the tests bring their own data
    loss_weights=(1.0, 2.0),
    pairs=4,
    truncation=5,
    min_unroll=5,
    max_unroll=20,
    outer_steps=6,
    warmup=1,
    save_every=3,
)


@pytest.fixture(scope="module")
def toy_task() -> tasks.Task:
    return tasks.mlp_classifier([toy_dataset(0, "a"), toy_dataset(1, "b")], (4,), classes=3, batch_size=8)


@pytest.mark.parametrize("scale", ["none", "parameter_rms"])
def test_outer_steps_are_finite_and_change_theta(toy_task: tasks.Task, scale: str) -> None:
    config = dataclasses.replace(CONFIG, spec=Spec(scale=scale), reuse_noise=scale == "none")
    state = before = train.init_outer_state(config, [toy_task])
    outer_step = train.make_outer_step(config, [toy_task])
    for _ in range(config.outer_steps):
        state, losses = outer_step(state)
        assert losses.shape == (1, 2)
        assert jnp.isfinite(losses).all()
    for name, value in state.theta.items():
        assert jnp.isfinite(value).all()
        assert (value != before.theta[name]).any(), name
    steps = np.asarray(state.unrolls[0].inner.step)
    assert (steps[:, 0] == steps[:, 1]).all()
    assert (steps < config.max_unroll + config.truncation).all()
    assert len(set(steps[:, 0].tolist())) > 1  # pairs are at different points of training


def test_resumed_run_is_the_uninterrupted_run(toy_task: tasks.Task, tmp_path: Path) -> None:
    whole = train.run(CONFIG, [toy_task], tmp_path / "whole", report=lambda line: None)

    class Killed(Exception):
        pass

    def kill(line: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        train.run(CONFIG, [toy_task], tmp_path / "parts", report=kill)
    with pytest.raises(FileExistsError, match="resume"):
        train.run(CONFIG, [toy_task], tmp_path / "parts")
    resumed = train.run(CONFIG, [toy_task], tmp_path / "parts", resume=True, report=lambda line: None)
    for name, value in whole.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(resumed[name]))
    written = np.load(tmp_path / "parts" / "theta.npz")
    assert {k: v.shape for k, v in written.items()} == CONFIG.spec.theta_shapes
    assert len((tmp_path / "parts" / "log.jsonl").read_text().splitlines()) == 2
    again = train.MetaTrainConfig.from_dict(json.loads((tmp_path / "parts" / "config.json").read_text()))
    assert again == CONFIG
    with pytest.raises(ValueError, match="another configuration"):
        train.run(dataclasses.replace(CONFIG, std=0.1), [toy_task], tmp_path / "parts", resume=True)


def test_checkpoint_of_another_configuration_is_refused(toy_task: tasks.Task, tmp_path: Path) -> None:
    train.save(train.init_outer_state(CONFIG, [toy_task]), 1.0, tmp_path / "state.npz")
    other = dataclasses.replace(CONFIG, pairs=6)
    with pytest.raises(ValueError, match="another configuration"):
        train.restore(train.init_outer_state(other, [toy_task]), tmp_path / "state.npz")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"outer_step": 3}, "unknown settings"),
        ({"datasets": ["mnist"], "loss_weights": [1.0]}, "unknown datasets"),
        ({"loss_weights": [1.0]}, "loss_weights"),
        ({"outer_steps": 10, "warmup": 10}, "warmup"),
        ({"pairs": 2}, "pairs"),
    ],
)
def test_bad_configurations_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.MetaTrainConfig.from_dict(values)


@pytest.mark.parametrize("layers", [1, 2])
def test_warm_start_trains(toy_task: tasks.Task, layers: int) -> None:
    spec = Spec(hidden_layers=layers, step_mult=0.01)
    theta = {k: jnp.asarray(v) for k, v in train.warm_start_theta(spec, 3.0, 0).items()}
    optimizer = inner_optimizer(spec, theta)
    batches = sample_batches(toy_task, jax.random.key(1), jnp.asarray(0), 60)
    _, losses = unroll(toy_task, optimizer, start(toy_task, optimizer, jax.random.key(0)), batches)
    assert losses[-10:].mean() < 0.7 * losses[:5].mean()


def all_tasks() -> list[tasks.Task]:
    images = tasks.Dataset("images", np.ones((20, 8, 8, 3), np.float32), np.zeros(20, np.int32))
    text = np.arange(500, dtype=np.int64).astype(np.uint8)
    return [
        tasks.mlp_classifier([images]),
        tasks.autoencoder([images]),
        tasks.conv_classifier([images]),
        tasks.byte_transformer(text, width=8, layers=1, heads=2, context=16, batch_size=2),
    ]


@pytest.mark.parametrize("task", all_tasks(), ids=lambda t: t.name)
def test_tasks_learn(task: tasks.Task) -> None:
    optimizer = optax.adam(1e-2)
    state = start(task, optimizer, jax.random.key(0))
    batches = sample_batches(task, jax.random.key(1), jnp.asarray(0), 20)
    _, losses = jax.jit(lambda s, b: unroll(task, optimizer, s, b))(state, batches)
    assert losses[-1] < losses[0]
    assert losses[0] < 2 * task.initial_loss


def test_tune_adam_finds_the_middle(toy_task: tasks.Task) -> None:
    tuned = evaluate.tune_adam(toy_task, 1, [1e-6, 3e-2, 1e3], steps=30, seeds=2)
    assert tuned.interior
    assert tuned.learning_rate == 3e-2
    assert tuned.best.mean_loss == min(tuned.table.values())
    assert tuned.best.dataset == "b"


def test_compare_reports_every_dataset(toy_task: tasks.Task) -> None:
    rows = evaluate.compare(optax.adam, jnp.float32(3e-2), toy_task, [3e-2], steps=20, seeds=2)
    assert [r["optimizer"]["dataset"] for r in rows] == ["a", "b"]
    for row in rows:  # Adam against itself, on the same seeds
        assert row["optimizer"] == row["adam"]["best"]
        assert not row["better"]


def test_cifar10_binary_and_python_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    flat, labels = rng.integers(0, 256, (3, 3072), np.uint8), np.array([1, 5, 9])
    (tmp_path / "data_batch_1.bin").write_bytes(np.c_[labels.astype(np.uint8), flat].tobytes())
    (tmp_path / "py").mkdir()
    (tmp_path / "py" / "data_batch_1").write_bytes(
        pickle.dumps({b"data": flat, b"labels": labels.tolist()}, 2)
    )
    binary, python = data.load_cifar10(tmp_path), data.load_cifar10(tmp_path / "py")
    np.testing.assert_array_equal(binary.images, python.images)
    np.testing.assert_array_equal(binary.labels, python.labels)
    assert binary.images.shape == (3, 32, 32, 3)
    assert binary.images[2, 1, 4, 2] == flat[2, 2 * 1024 + 1 * 32 + 4]


def test_cifar10_pickle_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": SimpleNamespace(), b"labels": []}, 2))
    with pytest.raises(data.DataError, match="not expected"):
        data.load_cifar10(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path: Path, packed: bool) -> None:
    images = np.arange(2 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(2, 28, 28)

    def write(name: str, values: np.ndarray) -> None:
        raw = (
            bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
        )
        (tmp_path / (name + (".gz" if packed else ""))).write_bytes(gzip.compress(raw) if packed else raw)

    write("train-images-idx3-ubyte", images)
    write("train-labels-idx1-ubyte", np.array([3, 4], np.uint8))
    loaded = data.load_idx(tmp_path)
    np.testing.assert_array_equal(loaded.images[..., 0], images)
    assert loaded.labels.tolist() == [3, 4]
    with pytest.raises(data.DataError, match="t10k"):
        data.load_idx(tmp_path, "test")


def test_missing_cifar10_names_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"data_batch_1\.bin.*unpack"):
        data.load_cifar10(tmp_path)


def test_truncated_cifar10_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(b"\0" * 100)
    with pytest.raises(data.DataError, match="3073"):
        data.load_cifar10(tmp_path)


def test_average_pool_and_standardise() -> None:
    images = np.zeros((1, 28, 28, 1), np.uint8)
    images[:, :2, :2] = 64  # 4 of the 16 pixels of the first square, whose edges of width 2 are padding
    pooled = data.average_pool(images, 8)
    assert pooled.shape == (1, 8, 8, 1)
    assert pooled[0, 0, 0, 0] == 16.0
    assert data.average_pool(images, 28).sum() == images.sum()
    scaled = data.standardise(np.arange(10.0))
    assert scaled.dtype == np.float32
    assert abs(float(scaled.mean())) < 1e-6
    assert abs(float(scaled.std()) - 1) < 1e-6


def test_standard_library_bytes() -> None:
    text = data.load_stdlib_bytes(10_000)
    assert text.dtype == np.uint8
    assert text.shape == (10_000,)
    np.testing.assert_array_equal(text, data.load_stdlib_bytes(20_000)[:10_000])
