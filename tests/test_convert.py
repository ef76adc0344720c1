"""`lopt-fast convert`: files of published weights to checkpoints and back, and weights from the Hugging Face Hub.

Files of each kind are made here by the names that the published implementations use; the Hub is a module that stands
in for huggingface_hub, nothing is downloaded.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from lopt_fast import checkpoint, hub, reference
from lopt_fast.architectures import ARCHITECTURES, initial_theta
from lopt_fast.architectures.velo import Velo
from lopt_fast.checkpoint import Checkpoint, CheckpointError
from lopt_fast.cli import app
from lopt_fast.published import FAMILIES, FILES, convert, msgpack, sources
from lopt_fast.published.family import Family
from lopt_fast.spec import Spec, SpecError

GIVEN: dict[str, dict[str, Any]] = {
    "adafac": {"hidden_size": 6, "hidden_layers": 1},
    "celo": {"lstm_hidden_size": 5, "param_inits": 3, "train_phase": 2},
    "celo2": {"ff_hidden_size": 3, "orthogonalize": False},
    "celo2_optax": {"ff_hidden_layers": 1, "orthogonalize": True},
    "celo_adam": {"lstm_hidden_size": 5},
    "mlp": {"hidden_size": 5, "hidden_layers": 3},
    "rnn": {"hidden_size": 5, "from_mlp_size": 2, "from_lstm_size": 4, "lstm_to_ff": 3, "lstm_hidden_size": 6},
    "nnadam": {"lstm_hidden_size": 5},
    "velo": {"lstm_hidden_size": 5, "param_inits": 3, "ff_mult": 1.0, "use_bugged_loss_features": False},
    "pylo_adafac": {
        "hidden_size": 8, "hidden_layers": 2, "momentum_decays": [0.1, 0.2, 0.05], "rms_decays": [0.01],
        "adafactor_decays": 0.0, "step_mult": 0.01,
    },
    "pylo_celo2": {"ff_hidden_size": 3, "orthogonalize": True},
    "pylo_velo": {"lstm_hidden_size": 5, "param_inits": 3, "use_bugged_loss_features": False},
}  # fmt: skip
"""Constructor arguments of a small optimizer of each family."""
EVERY = pytest.mark.parametrize("name", list(FILES))


def leaves_of(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays by the family's own names, those that nothing depends on among them."""
    family = FILES[name]
    spec = family.architecture(GIVEN[name])
    shapes = family.table(spec).shapes(spec.theta_shapes)
    rng = np.random.default_rng(seed)
    return {path: np.asarray(rng.standard_normal(shape), np.float32) for path, shape in shapes.items()}


def save(path: Path, name: str, leaves: dict[str, np.ndarray]) -> Path:
    """In the format that the family's authors use."""
    if FILES[name].format == "pylo":
        save_file(leaves, path)
    else:
        path.write_bytes(sources.msgpack_bytes(leaves, FILES[name].grouped))
    return path


def asked(name: str) -> dict[str, Any]:
    """The arguments that have to be given."""
    return {argument: GIVEN[name][argument] for argument in FILES[name].ask}


def run(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    result.text = result.output.replace("\n", " ")
    return result


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert np.array_equal(a[name], b[name]), name


# Reading and writing


@EVERY
def test_family_is_found_and_arrays_come_back(name: str, tmp_path: Path) -> None:
    leaves = leaves_of(name)
    source = save(tmp_path / "theta", name, leaves)
    family = name if name.startswith("celo2") else None  # their arrays are the same
    found = convert.read([source], family, asked(name))
    spec, theta = FILES[name](GIVEN[name], leaves)
    assert found.family == name
    assert found.checkpoint.spec == spec
    assert_same(found.checkpoint.theta, theta)
    loaded = checkpoint.load(convert.write(found.checkpoint, tmp_path / "ours.safetensors"))
    assert loaded.spec == spec
    assert_same(loaded.theta, theta)
    formats = {"velo": ("npz", "msgpack")} if name == "pylo_velo" else {}
    for to in formats.get("velo", ("npz", "msgpack") if FILES[name].format == "haiku" else ("pylo",)):
        written = convert.write(
            loaded, tmp_path / to, to, name if to != "npz" and name != "pylo_velo" else None
        )
        again = sources.read(written).leaves
        if name != "pylo_velo":
            unused = FILES[name].table(spec).unused
            assert_same({**leaves, **{path: np.zeros_like(leaves[path]) for path in unused}}, again)
        if to != "msgpack":  # which has no room for what the arrays do not show
            back = convert.read([written])
            assert back.checkpoint.spec == spec
            assert_same(back.checkpoint.theta, theta)


@pytest.mark.parametrize("name", [n for n, family in FILES.items() if family.ask])
def test_what_is_not_known_is_asked_for(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "theta", name, leaves_of(name))
    for missing in FILES[name].ask:
        rest = {k: v for k, v in asked(name).items() if k != missing}
        with pytest.raises(convert.ConvertError, match=f"Give --set {missing}="):
            convert.read([source], name, rest)


def test_arrays_of_several_families(tmp_path: Path) -> None:
    source = save(tmp_path / "theta", "celo2", leaves_of("celo2"))
    with pytest.raises(convert.ConvertError, match="--family celo2 or --family celo2_optax"):
        convert.read([source], None, asked("celo2"))


def test_flax_files_are_byte_for_byte_the_same(shared: Path, tmp_path: Path) -> None:
    """The published weights of Celo through our checkpoint: only what nothing depends on is lost."""
    for name in ("celo", "celo_adam"):
        published = sources.read(shared / "golden" / f"weights_{name}.npz")
        result = run(shared / "golden" / f"weights_{name}.npz", "-o", tmp_path / "ours.safetensors")
        assert result.exit_code == 0, result.output
        loaded = checkpoint.load(tmp_path / "ours.safetensors")
        assert loaded.architecture == name
        assert loaded.metadata["licence"] == "MIT"
        assert "github.com/amoudgl/celo" in loaded.metadata["published"]["source"]
        assert (
            run(tmp_path / "ours.safetensors", "-o", tmp_path / "theta.state", "--to", "msgpack").exit_code
            == 0
        )
        again = sources.read(tmp_path / "theta.state").leaves
        for path, a in published.leaves.items():
            unused = path.startswith("rnn_params/linear/")
            assert np.array_equal(again[path], np.zeros_like(a) if unused else a), path


def test_golden_files_tell_their_arguments(shared: Path) -> None:
    for case in ("velo_bugloss", "adafac_h4_init", "celo2_full_routing", "rnn_valid", "nnadam_decay"):
        with np.load(shared / "golden" / f"{case}.npz") as file:
            meta = json.loads(str(file["meta"]))
        found = convert.read([shared / "golden" / f"{case}.npz"])
        leaves = sources.read(shared / "golden" / f"{case}.npz").leaves
        spec, theta = FAMILIES[meta["family"]](meta["hyperparameters"], leaves)
        assert found.checkpoint.spec == spec
        assert_same(found.checkpoint.theta, theta)
    with pytest.raises(sources.SourceError, match=r"they are in weights_celo\.npz"):
        sources.read(shared / "golden" / "celo_real.npz")


def test_meta_parameters_within_a_parameter_checkpoint(tmp_path: Path) -> None:
    """As google/learned_optimization stores them: beside a generation and a step."""
    arrays = leaves_of("nnadam")
    tree = msgpack.loads(sources.msgpack_bytes(arrays, True))
    (tmp_path / "theta").write_bytes(msgpack.dumps({"params": tree, "gen_id": "x", "step": 7}))
    assert_same(sources.read(tmp_path / "theta").leaves, arrays)


def test_separate_weights(tmp_path: Path) -> None:
    """AdafacMLPLOpt's `make_separate_weights`: an array for each weight."""
    leaves: dict[str, np.ndarray] = {}
    for path, a in leaves_of("adafac").items():
        entries = np.ndenumerate(a) if path.startswith("nn/") else ()
        leaves |= {f"{path}_{'_'.join(map(str, i))}": np.asarray(x) for i, x in entries}
        leaves |= {} if path.startswith("nn/") else {path: a}
    np.savez(tmp_path / "theta.npz", **leaves)
    found = convert.read([tmp_path / "theta.npz"])
    assert_same(found.checkpoint.theta, FILES["adafac"](GIVEN["adafac"], leaves_of("adafac"))[1])


def test_pylo_network_is_the_same_function(tmp_path: Path) -> None:
    """PyLO's MetaMLP computes x @ weight.T + bias, relu between layers."""
    leaves = leaves_of("pylo_adafac")
    x = np.random.default_rng(1).standard_normal((39, 7)).astype(np.float32)
    y = x.T
    modules = ("input", "linear_0", "output")
    for module in modules:
        y = y @ leaves[f"network.{module}.weight"].T + leaves[f"network.{module}.bias"]
        y = y if module == "output" else np.maximum(y, 0.0)
    theta = convert.read(
        [save(tmp_path / "x", "pylo_adafac", leaves)], None, asked("pylo_adafac")
    ).checkpoint.theta
    ours = reference.mlp(
        [theta[f"w{i}"] for i in range(3)], [theta[f"b{i}"] for i in range(3)], list(x), (7,), "matmul"
    )
    assert np.abs(np.stack(ours, axis=1) - y).max() <= 1e-5 * np.abs(y).max()


def test_pylo_decays_are_in_the_hyperparameters(tmp_path: Path) -> None:
    """PyLO: clip(1 - (1 - b) exp(10 d), 0, 1) in float32, with d an argument."""
    source = save(tmp_path / "x", "pylo_adafac", leaves_of("pylo_adafac"))
    spec = convert.read([source], None, {**asked("pylo_adafac"), "rms_decays": [2.0]}).checkpoint.spec
    assert isinstance(spec, Spec)
    expected = 1.0 - (1.0 - np.array([0.9, 0.99, 0.999])) * np.exp(10.0 * np.array([0.1, 0.2, 0.05]))
    assert np.abs(np.array(spec.momentum_decays) - expected).max() <= 1e-6
    assert spec.rms_decays == (0.0,)


def test_pylo_velo_is_two_files(tmp_path: Path) -> None:
    leaves = leaves_of("pylo_velo")
    of_mlp = {k: a for k, a in leaves.items() if k.startswith(("input_", "hidden_", "output_"))}
    save_file(of_mlp, tmp_path / "mlp.safetensors")
    save_file({k: a for k, a in leaves.items() if k not in of_mlp}, tmp_path / "rnn.safetensors")
    result = run(
        tmp_path / "rnn.safetensors", tmp_path / "mlp.safetensors", "-o", tmp_path / "velo.safetensors"
    )
    assert result.exit_code == 0, result.output
    spec = checkpoint.load(tmp_path / "velo.safetensors").spec
    assert isinstance(spec, Velo)
    assert (spec.weights_mult, spec.short_loss_history, spec.mixture) == (100.0, False, 3)
    assert "of no known family" in run(tmp_path / "mlp.safetensors", "-o", tmp_path / "y").text
    twice = run(tmp_path / "mlp.safetensors", tmp_path / "mlp.safetensors", "-o", tmp_path / "y")
    assert "is in more than one of the files" in twice.text
    assert (
        "can be read, not written"
        in run(tmp_path / "velo.safetensors", "-o", tmp_path / "y", "--to", "pylo").text
    )
    assert not (tmp_path / "y").exists()


def test_every_architecture_with_published_weights_has_a_family() -> None:
    kinds = {family.kind.NAME for family in FILES.values()}
    assert kinds >= {
        "small_fc_lopt",
        "fc_lopt",
        "rnn_fc_lopt",
        "nn_adam",
        "velo",
        "celo",
        "celo_adam",
        "celo2",
    }
    assert kinds <= ARCHITECTURES.keys()
    assert all(isinstance(FAMILIES[n], Family) for n in FILES if not n.startswith("pylo"))


# The command


def test_command(tmp_path: Path) -> None:
    source = save(tmp_path / "theta.state", "celo", leaves_of("celo"))
    result = run(source, "-o", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert "Give --set train_phase=... (2 for finished weights" in result.text
    out = tmp_path / "x.safetensors"
    result = run(
        source, "-o", out, "--set", "train_phase=1", "--licence", "MIT", "--json", tmp_path / "x.json"
    )
    assert result.exit_code == 0, result.output
    assert "family celo: lstm_hidden_size=5" in result.text
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["hyperparameters"]["use_schedule"] is False
    loaded = checkpoint.load(out)
    assert loaded.metadata["licence"] == "MIT"
    assert loaded.metadata["published"]["arguments"]["train_phase"] == 1
    assert loaded.metadata["published"]["files"][0]["name"] == "theta.state"
    assert "licence not known" in run(source, "-o", out, "--set", "train_phase=2").text
    assert "is a checkpoint already: give --to" in run(out, "-o", tmp_path / "y").text
    assert "it has its family and arguments" in run(out, "-o", tmp_path / "y", "--family", "celo").text
    assert "family 'lion'" in run(source, "-o", tmp_path / "y", "--family", "lion").text
    assert "must be NAME=VALUE" in run(source, "-o", tmp_path / "y", "--set", "train_phase").text
    assert "format 'hdf5'" in run(source, "-o", tmp_path / "y", "--set", "train_phase=2", "--to", "hdf5").text
    assert (
        "unknown hyperparameters colour"
        in run(source, "-o", tmp_path / "y", "--family", "celo", "--set", "colour=1").text
    )
    assert (
        "array 'lstm_init_state/hidden' has shape (1, 5), expected (1, 7)"
        in run(source, "-o", tmp_path / "y", "--family", "celo", "--set", "lstm_hidden_size=7").text
    )
    assert "neither a file nor the name" in run(tmp_path / "missing", "-o", tmp_path / "y").text
    assert "cannot be written" in run(out, "-o", tmp_path / "no" / "folder", "--to", "npz").text
    assert not (tmp_path / "y").exists()


def test_shipped_weights_can_be_written_in_every_format(tmp_path: Path) -> None:
    ours = checkpoint.load("small_fc_lopt_mix")
    for to in ("npz", "msgpack", "pylo"):
        assert run("small_fc_lopt_mix", "-o", tmp_path / to, "--to", to).exit_code == 0
    for to in ("npz", "pylo"):
        assert_same(convert.read([tmp_path / to]).checkpoint.theta, ours.theta)
        assert convert.read([tmp_path / to]).checkpoint.spec == ours.spec


# Files that are refused


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("harm").mkdir, ())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_not_opened(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(_Harmful(), protocol))
    result = run(tmp_path / "x.pkl", "-o", "y")
    assert result.exit_code == 2
    assert "a pickle" in result.text
    np.savez(tmp_path / "x.npz", a=np.array([_Harmful()], dtype=object))
    assert run(tmp_path / "x.npz", "-o", "y").exit_code == 2
    assert not Path("harm").exists()


def test_torch_files_are_not_opened(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.zeros(3)}, tmp_path / "x.pt")
    assert "safetensors.torch.save_file" in run(tmp_path / "x.pt", "-o", tmp_path / "y").text


def test_damaged_files(tmp_path: Path) -> None:
    """Cut anywhere, or with bytes changed: an error of ours or arrays, never a crash."""
    rng = np.random.default_rng(0)
    whole = sources.msgpack_bytes(leaves_of("nnadam"), True)
    path = tmp_path / "x"
    for size in [0, 1, 5, 9, 30, *rng.integers(len(whole), size=30)]:
        path.write_bytes(whole[:size])
        with pytest.raises(sources.SourceError):
            sources.read(path)
    for data in (whole, save(tmp_path / "p", "pylo_celo2", leaves_of("pylo_celo2")).read_bytes()):
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(min(len(data), 400), size=4):
                damaged[position] = rng.integers(256)
            path.write_bytes(bytes(damaged))
            try:
                sources.read(path)
            except SpecError:
                continue


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("hello"), "neither .npz nor safetensors"),
        (lambda path: path.write_bytes(msgpack.dumps({})), "holds no arrays"),
        (lambda path: path.write_bytes(msgpack.dumps([1, 2])), "not a tree of arrays"),
        (lambda path: path.write_bytes(msgpack.dumps({"a": {"b": "text"}})), "a/b is str, not an array"),
        (lambda path: path.write_bytes(msgpack.dumps({"a": np.arange(3)})), "must be real floating-point"),
        (lambda path: path.write_bytes(msgpack.dumps({"a": np.zeros(3)})), "of no known family"),
        (lambda path: save_file({"a": np.arange(3)}, path), "must be real floating-point"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
def test_foreign_files(write: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "x")
    result = run(tmp_path / "x", "-o", tmp_path / "y")
    assert result.exit_code == 2, result.output
    assert message in result.text
    assert not (tmp_path / "y").exists()


# MessagePack


def test_messagepack_values() -> None:
    """Bytes from the specification's tables."""
    for data, value in (
        (b"\x00", 0), (b"\x7f", 127), (b"\xff", -1), (b"\xe0", -32), (b"\xcc\x80", 128), (b"\xcd\x01\x00", 256),
        (b"\xce\x00\x01\x00\x00", 65536), (b"\xcf" + b"\x00" * 7 + b"\x05", 5), (b"\xd0\x80", -128),
        (b"\xd1\xff\x00", -256), (b"\xd2\xff\xff\xff\xff", -1), (b"\xd3" + b"\xff" * 8, -1),
        (b"\xca\x3f\x80\x00\x00", 1.0), (b"\xcb\x3f\xf0" + b"\x00" * 6, 1.0), (b"\xc0", None), (b"\xc2", False),
        (b"\xc3", True), (b"\xa2hi", "hi"), (b"\xd9\x02hi", "hi"), (b"\xda\x00\x02hi", "hi"),
        (b"\xdb\x00\x00\x00\x02hi", "hi"), (b"\xc4\x01\x09", b"\x09"), (b"\xc5\x00\x01\x09", b"\x09"),
        (b"\xc6\x00\x00\x00\x01\x09", b"\x09"), (b"\x92\x01\x02", [1, 2]), (b"\xdc\x00\x01\x05", [5]),
        (b"\xdd\x00\x00\x00\x01\x05", [5]), (b"\x81\xa1a\x01", {"a": 1}), (b"\xde\x00\x01\xa1a\x01", {"a": 1}),
        (b"\xdf\x00\x00\x00\x01\xa1a\x01", {"a": 1}),
    ):  # fmt: skip
        assert msgpack.loads(data) == value


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (300, 70)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "bool"])
def test_messagepack_arrays(shape: tuple[int, ...], dtype: str) -> None:
    a = np.asarray(np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    tree = {
        "a": a,
        "nested": {str(i): i for i in range(40)},
        "text": "x" * 300,
        "list": [0, 200, 70000, 1 << 40],
    }
    found = msgpack.loads(msgpack.dumps(tree))
    assert found["a"].dtype == a.dtype
    assert found["a"].shape == a.shape
    assert np.array_equal(found["a"], a)
    assert {k: v for k, v in found.items() if k != "a"} == {k: v for k, v in tree.items() if k != "a"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too early"), (b"\xc1", "starts no value"), (b"\x01\x02", "after the end"),
        (b"\xa1\xff", "not MessagePack"),
        (b"\x91" * 200 + b"\x01", "nested too deeply"), (b"\xdd\xff\xff\xff\xff", "too early"),
        (b"\x81\x01\x02", "a key that is not a string"), (b"\x82\xa1a\x01\xa1a\x02", "a key occurs twice"),
        (b"\xd4\x07\x00", "extension type 7"), (b"\xd4\x01\x00", "an array that is not"),
        (b"\xc7\x05\x01\x93\x90\xa1O\xc4", "too early"), (b"\xc7\x06\x01\x93\x90\xa1O\xc4\x00", "dtype 'O'"),
    ],
)  # fmt: skip
def test_messagepack_refuses(data: bytes, message: str) -> None:
    with pytest.raises(msgpack.MessagePackError, match=message):
        msgpack.loads(data)


def test_messagepack_of_a_tampered_array() -> None:
    good = msgpack.dumps({"a": np.zeros((2, 3), np.float32)})
    for bad in (good.replace(b"float32", b"float64"), good.replace(b"\x92\x02\x03", b"\x92\x02\x04")):
        with pytest.raises(msgpack.MessagePackError, match="wrong number of bytes"):
            msgpack.loads(bad)
    with pytest.raises(msgpack.MessagePackError, match=r"an array of shape \[-1, 3\]"):
        msgpack.loads(good.replace(b"\x92\x02\x03", b"\x92\xff\x03"))


# The Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Files of the repository me/opt at COMMIT and at main, by name; a module that serves them as the Hub's does."""
    known: dict[str, Path] = {}

    def listed(repo: str, revision: str) -> list[str]:
        assert (repo, revision) in (("me/opt", COMMIT), ("me/opt", "main"))
        return ["README.md", *known]

    def download(repo: str, filename: str, *, revision: str) -> str:
        listed(repo, revision)
        if filename not in known:
            raise OSError(f"404: {filename}")
        return str(known[filename])

    module = types.SimpleNamespace(list_repo_files=listed, hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return known


def test_checkpoint_from_the_hub(files: dict[str, Path], tmp_path: Path) -> None:
    spec = Spec(hidden_size=3)
    files["a/b.safetensors"] = Checkpoint(spec, initial_theta(spec, 1)).save(tmp_path / "b.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reference_ in (f"hf:me/opt@{COMMIT}", f"hf:me/opt@{COMMIT}/a/b.safetensors"):
            assert_same(checkpoint.load(reference_).theta, initial_theta(spec, 1))
    with pytest.warns(hub.HubWarning, match="'main' is not a commit hash"):
        checkpoint.load("hf:me/opt@main")


def test_hub_errors(files: dict[str, Path], tmp_path: Path) -> None:
    for reference_, message in (
        ("hf:me/opt", "names no revision"),
        ("hf:me/opt/x.safetensors", "names no revision"),
        ("hf:opt@main", "must be hf:owner/name@revision"),
        (f"hf:me/opt@{COMMIT}", "has no file of a known kind"),
        (f"hf:me/opt@{COMMIT}/x.safetensors", "cannot be downloaded .OSError: 404: x.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(reference_)
    files |= {"x.safetensors": tmp_path / "x", "theta.state": tmp_path / "y"}
    with pytest.raises(CheckpointError, match=r"has x\.safetensors, theta\.state\. Name one"):
        checkpoint.load(f"hf:me/opt@{COMMIT}")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        CheckpointError, match=r"pip install '\.\[hub\]' in the source folder of lopt_fast, or download"
    ):
        checkpoint.load(f"hf:me/opt@{COMMIT}")
    assert "names no revision" in run("hf:me/opt", "-o", "y").text


def test_convert_from_the_hub(files: dict[str, Path], tmp_path: Path) -> None:
    files["theta.state"] = save(tmp_path / "theta.state", "nnadam", leaves_of("nnadam"))
    result = run(f"hf:me/opt@{COMMIT}", "-o", tmp_path / "x.safetensors", "--licence", "MIT")
    assert result.exit_code == 0, result.output
    published = checkpoint.load(tmp_path / "x.safetensors").metadata["published"]
    assert published["files"][0]["name"] == f"hf:me/opt@{COMMIT}"


def test_hub_is_not_imported_with_the_package(tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise SystemExit('imported')\n")
    code = "import lopt_fast.checkpoint, lopt_fast.published.convert, lopt_fast.cli"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(tmp_path), "PATH": ""})
