from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import random_theta
from safetensors import safe_open
from safetensors.numpy import save_file

from lopt_fast import checkpoint as checkpoint_module
from lopt_fast.checkpoint import Checkpoint, CheckpointError, load, names
from lopt_fast.spec import Spec, SpecError

SPEC = Spec(hidden_size=8, scale="parameter_rms", statistics="lagged", step_mult=0.01)
METADATA = {"licence": "Apache-2.0", "meta_training": {"outer_steps": 3, "loss": [2.5, 2.25]}}


def make() -> Checkpoint:
    return Checkpoint(SPEC, random_theta(SPEC, dtype="float32"), name="made", metadata=METADATA)


def rewrite(path: Path, changes: dict[str, Any] | None = None, **tensors: Any) -> None:
    """Change entries of the document and tensors of a checkpoint (None removes), with a checksum that fits."""
    with safe_open(path, framework="numpy") as file:
        old: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = {**json.loads(file.metadata()["lopt_fast"]), **(changes or {})}
    arrays = {k: np.ascontiguousarray(v) for k, v in {**old, **tensors}.items() if v is not None}
    document = {k: v for k, v in document.items() if v is not None}
    if not (changes and "sha256" in changes):
        document["sha256"] = checkpoint_module._digest(document, arrays)
    save_file(arrays, path, {"lopt_fast": json.dumps(document)})


def test_round_trip(tmp_path: Path) -> None:
    made = make()
    path = made.save(tmp_path / "some name.safetensors")
    read = load(path)
    assert (read.spec, read.architecture, read.name) == (SPEC, "small_fc_lopt", "some name")
    assert read.metadata == METADATA
    assert list(read.theta) == list(SPEC.theta_shapes)
    for key, value in made.theta.items():
        assert read.theta[key].dtype == np.float32
        np.testing.assert_array_equal(read.theta[key], value)
    assert load(read) is read
    assert load(str(path)).spec == SPEC


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    a = make().save(tmp_path / "a.safetensors").read_bytes()
    b = load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors").read_bytes()
    assert a == b


def test_theta_is_copied_to_float32() -> None:
    theta = random_theta(SPEC, dtype="float64")
    made = Checkpoint(SPEC, theta)
    theta["w0"][:] = 7.0
    assert made.theta["w0"].dtype == np.float32
    assert not (made.theta["w0"] == 7.0).any()


def test_save_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    make().save(path)
    assert load(path).spec == SPEC
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make().save(tmp_path / "x.safetensors")
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be written \(No space left"):
        Checkpoint(Spec(), random_theta(Spec(), dtype="float32")).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_save_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="existing, writable folder"):
        make().save(tmp_path / "nowhere" / "x.safetensors")


@pytest.mark.parametrize("metadata", [{"array": np.zeros(2)}, {"loss": float("nan")}, {"key": {1, 2}}])
def test_metadata_must_be_json(tmp_path: Path, metadata: dict[str, Any]) -> None:
    made = Checkpoint(SPEC, random_theta(SPEC), metadata=metadata)
    with pytest.raises(CheckpointError, match="plain JSON"):
        made.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def _with(name: str, value: Any) -> dict[str, Any]:
    return {**random_theta(SPEC), name: value}


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        (_with("w1", np.full((8, 8), np.nan)), "'w1' has 64 values that are not finite"),
        (_with("b0", np.r_[np.zeros(7), 1e300]), "'b0' has 1 values that are not finite in float32"),
        (_with("b0", np.zeros(7)), r"'b0' has shape \(7,\), expected \(8,\)"),
        (_with("b0", np.zeros(8, np.int32)), "'b0' has dtype int32"),
        (_with("b0", np.zeros(8, np.complex64)), "'b0' has dtype complex64"),
        (_with("b0", np.array(["x"] * 8)), "'b0' has dtype"),
        (_with("extra", np.zeros(8)), r"unknown \['extra'\]"),
        ({"w0": np.zeros((39, 8))}, "missing"),
    ],
)
def test_bad_theta(theta: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(SPEC, theta)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = make().save(tmp_path / "x.safetensors")
    rewrite(path, {"architecture": "slower"})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: unknown architecture 'slower'"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": None}, "format version None"),
        ({"format_version": 2}, "format version 2"),
        ({"architecture": None}, "unknown architecture None"),
        ({"architecture": ["small_fc_lopt"]}, "unknown architecture"),
        ({"hyperparameters": None}, "hyperparameters are not a JSON object"),
        ({"hyperparameters": [1]}, "hyperparameters are not a JSON object"),
        ({"hyperparameters": {"hidden_size": 8, "colour": 1}}, r"unknown hyperparameters \['colour'\]"),
        ({"hyperparameters": {"hidden_size": None}}, "hidden_size=None"),
        ({"hyperparameters": {"momentum_decays": "abc"}}, "unusable hyperparameters"),
        ({"hyperparameters": {"momentum_decays": 3}}, "unusable hyperparameters"),
        ({"hyperparameters": {"momentum_decays": [10**400]}}, "unusable hyperparameters"),
        ({"hyperparameters": {"step_mult": float("inf")}}, "step_mult=inf"),
        (
            {"hyperparameters": {"hidden_size": 16}},
            r"'w0' is F32 of shape \(39, 8\), expected F32 of shape \(39, 16\)",
        ),
        ({"hyperparameters": {"hidden_size": 8, "hidden_layers": 1}}, r"unknown \['b2', 'w2'\]"),
        ({"metadata": None}, "metadata is not a JSON object"),
        ({"metadata": 3}, "metadata is not a JSON object"),
        ({"sha256": None}, "checksum"),
        ({"sha256": "0" * 64}, "checksum"),
    ],
)
def test_bad_documents_name_file_and_reason(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = make().save(tmp_path / "x.safetensors")
    rewrite(path, changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert isinstance(error.value, SpecError)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "nope"])
def test_metadata_that_is_no_document(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file(random_theta(SPEC, dtype="float32"), path, {"lopt_fast": text})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its metadata is not (JSON|a JSON object)"):
        load(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w0": None}, r"missing \['w0'\]"),
        ({"w9": np.zeros(3, np.float32)}, r"unknown \['w9'\]"),
        ({"w0": np.zeros((39, 8))}, r"'w0' is F64"),
        ({"w0": np.zeros((39, 8), np.float16)}, r"'w0' is F16"),
        ({"w0": np.zeros((8, 39), np.float32)}, r"of shape \(8, 39\), expected F32 of shape \(39, 8\)"),
        ({"w0": np.full((39, 8), np.inf, np.float32)}, "'w0' has 312 values that are not finite"),
    ],
)
def test_bad_tensors_name_file_and_reason(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    path = make().save(tmp_path / "x.safetensors")
    rewrite(path, **tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_every_truncation_and_every_kind_of_damage(tmp_path: Path) -> None:
    whole = make().save(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "damaged.safetensors"
    rng = np.random.default_rng(0)
    damaged = [
        whole[:n] for n in {0, 1, 7, 8, 9, 100, *rng.integers(10, len(whole), 40).tolist(), len(whole) - 1}
    ]
    damaged.append(whole + b"\0")
    for position in [*range(800), *rng.integers(8, len(whole), 100).tolist()]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"damaged\.safetensors: "):
            load(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"weight": np.zeros((3, 3), np.float32)}, path)
    with pytest.raises(CheckpointError, match="not a lopt_fast checkpoint"):
        load(path)
    canary = tmp_path / "canary"
    path.write_bytes(pickle.dumps(Canary(str(canary))))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(path)
    assert not canary.exists()


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_missing_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="'no_such_optimizer' is neither a file nor the name of shipped weights"
    ):
        load("no_such_optimizer")
    with pytest.raises(CheckpointError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="from int: give a name, a path or a Checkpoint"):
        load(3)  # type: ignore[arg-type]


def test_names_are_the_files_of_the_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = checkpoint_module.DEFAULT_NAME
    monkeypatch.setattr(checkpoint_module, "_WEIGHTS", tmp_path)
    assert names() == ()
    with pytest.raises(CheckpointError, match="none in this build"):
        load(default)
    make().save(tmp_path / f"{default}.safetensors")
    make().save(tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("")
    assert names() == tuple(sorted(("other", default)))
    assert load("other").name == "other"
    assert load().name == default


@pytest.mark.parametrize("name", names())
def test_shipped_weights(name: str) -> None:
    shipped = load(name)
    assert shipped.name == name
    assert shipped.metadata["licence"] == "Apache-2.0"
    assert shipped.metadata["meta_training"]


def test_default_is_shipped_if_anything_is() -> None:
    if not names():
        pytest.skip("no weights are shipped in this build")
    assert load().name == checkpoint_module.DEFAULT_NAME


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    """A process that saves in a loop is killed again and again; what lies there can always be read."""
    path = tmp_path / "x.safetensors"
    code = (
        "import sys\n"
        "from lopt_fast import Checkpoint, Spec\n"
        "from lopt_fast.architectures.small_fc_lopt import init_theta\n"
        "spec = Spec(hidden_size=64)\n"
        "made = Checkpoint(spec, init_theta(spec))\n"
        "made.save(sys.argv[1]); print('started', flush=True)\n"
        "while True: made.save(sys.argv[1])\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            for _ in range(5):
                assert load(path).spec.hidden_size == 64
        finally:
            process.kill()
            process.communicate()
        assert load(path).spec.hidden_size == 64


def test_format_is_as_documented(tmp_path: Path) -> None:
    path = make().save(tmp_path / "x.safetensors")
    with safe_open(path, framework="numpy") as file:
        header = file.metadata()
        assert set(file.keys()) == set(SPEC.theta_shapes)
    assert set(header) == {"lopt_fast"}
    document = json.loads(header["lopt_fast"])
    assert set(document) == {"format_version", "architecture", "hyperparameters", "metadata", "sha256"}
    assert document["format_version"] == 1
    assert Spec.from_dict(document["hyperparameters"]) == SPEC
