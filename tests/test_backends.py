from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lopt_fast import backends
from lopt_fast.architectures.celo import Celo
from lopt_fast.backends import BACKENDS, BackendError, BackendWarning, choose, native, table
from lopt_fast.spec import Spec

SPEC = Spec()


@pytest.fixture
def core_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(element_mlp=None)
    monkeypatch.setattr(backends, "_import_native", lambda: (core, ""))


@pytest.fixture
def core_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backends, "_import_native", lambda: (None, "the compiled core is missing (no such file)")
    )


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())


@pytest.mark.usefixtures("core_is_there")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_auto_takes_the_kernel(dtype: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(SPEC, "cpu", dtype) == "cpu"
        assert choose(SPEC, "cpu", dtype, "cpu") == "cpu"
        assert choose(replace(SPEC, hidden_size=7, statistics="lagged"), "cpu", dtype) == "cpu"


@pytest.mark.usefixtures("core_is_there")
@pytest.mark.parametrize(
    ("spec", "device", "dtype", "reason"),
    [
        (SPEC, "cpu", "int8", "float32, float64, bfloat16 and float16, not int8"),
        (replace(SPEC, feature_set="m"), "cpu", "float32", "feature_set 'default', not 'm'"),
        (replace(SPEC, rms_decays=(0.9, 0.99, 0.999)), "cpu", "float32", "not 3, 3 and 3"),
        (SPEC, "cuda", "float32", "runs on cpu, these arrays are on cuda"),
        (SPEC, "tpu", "float32", "runs on cpu, these arrays are on tpu"),
    ],
)
def test_what_the_kernel_refuses(spec: Spec, device: str, dtype: str, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        choose(spec, device, dtype, "cpu")
    with pytest.warns(BackendWarning, match=reason):
        assert choose(spec, device, dtype) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(spec, device, dtype) == "reference"  # said once
        assert choose(spec, device, dtype, "reference") == "reference"


@pytest.mark.usefixtures("core_is_missing")
def test_missing_core() -> None:
    with pytest.raises(BackendError, match=r"no such file"):
        native()
    with pytest.raises(BackendError, match="no such file"):
        choose(SPEC, "cpu", "float32", "cpu")
    with pytest.warns(BackendWarning, match="no such file"):
        assert choose(SPEC, "cpu", "float32") == "reference"
    assert {row.backend: row.reason for row in table()}[
        "cpu"
    ] == "the compiled core is missing (no such file)"


class Core:
    """Stands for lopt_fast._native, as CMake left it."""

    def __init__(self, cuda_build: str) -> None:
        self.cuda_build = cuda_build


class Kernels:
    """Stands for lopt_fast._cuda: device 0 is too old, device 1 will do."""

    def problem(self, ordinal: int) -> str | None:
        return "compute capability 7.5 is below 8.0" if ordinal == 0 else None


def test_the_core_says_why_there_is_no_cuda_module() -> None:
    built = importlib.util.find_spec("lopt_fast._cuda") is not None
    assert (native().cuda_build == "") == built


@pytest.fixture
def nothing_cached() -> Iterator[None]:
    caches = (backends._import_cuda, backends._cuda_missing, backends._triton_missing)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def imports(monkeypatch: pytest.MonkeyPatch, core: Any, found: dict[str, Any]) -> None:
    """Only `found` can be imported, `core` is lopt_fast._native."""

    def import_module(name: str) -> Any:
        if name not in found:
            raise ImportError(f"No module named {name!r}")
        return found[name]

    monkeypatch.setattr(backends, "_import_native", lambda: (core, "" if core else "the core is missing"))
    monkeypatch.setattr(backends, "import_module", import_module)
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if name in found else None)


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize(
    ("core", "found", "reason"),
    [
        (None, {}, "the core is missing"),
        (Core("no nvcc was found"), {}, r"_cuda was not built \(no nvcc was found\): reinstall .* nvcc"),
        (Core(""), {}, "_cuda was built, but cannot be imported"),
        (Core(""), {"lopt_fast._cuda": Kernels()}, "compute capability 7.5 is below 8.0"),
    ],
    ids=["core", "build", "import", "device"],
)
def test_why_cuda_is_missing(
    monkeypatch: pytest.MonkeyPatch, core: Any, found: dict[str, Any], reason: str
) -> None:
    imports(monkeypatch, core, found)
    with pytest.raises(BackendError, match=f"backend='cuda'.*{reason}"):
        choose(SPEC, "gpu", "float32", "cuda")
    with pytest.warns(BackendWarning, match=reason):
        assert choose(SPEC, "cuda", "float32") == "reference"
    assert next(row.reason for row in table() if row.backend == "cuda")
    if not found:
        with pytest.raises(BackendError, match=reason):
            backends.cuda()


class Torch:
    """Stands for PyTorch in lopt_fast.torch.triton."""

    class version:
        cuda: str | None = None
        hip: str | None = None
        __version__ = "2.13.0+cpu"


class Driver:
    """Stands for lopt_fast.torch.triton."""

    torch = Torch

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def available(self) -> str | None:
        return self.reason


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize(
    ("core", "found", "reason"),
    [
        (None, {}, "the core is missing"),
        (Core(""), {}, "triton is not installed: pip install triton"),
        (Core(""), {"triton": 1}, "torch is not installed: pip install torch"),
        (Core(""), {"triton": 1, "torch": 1}, "it needs PyTorch, which cannot be imported"),
        (
            Core(""),
            {"triton": 1, "torch": 1, "lopt_fast.torch.triton": Driver("no GPU")},
            "2.13.0.cpu. was built without CUDA",
        ),
    ],
    ids=["core", "triton", "torch", "import", "device"],
)
def test_why_triton_is_missing(
    monkeypatch: pytest.MonkeyPatch, core: Any, found: dict[str, Any], reason: str
) -> None:
    imports(monkeypatch, core, found)
    monkeypatch.setattr(backends, "_has_gpu_driver", lambda: True)
    with pytest.raises(BackendError, match=f"backend='triton'.*{reason}"):
        choose(SPEC, "cuda", "float32", "triton")


@pytest.mark.usefixtures("nothing_cached")
def test_triton_without_a_gpu_does_not_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    imports(monkeypatch, Core(""), {"triton": 1, "torch": 1})
    monkeypatch.setattr(backends, "_has_gpu_driver", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="no driver of an NVIDIA or AMD GPU"):
        choose(SPEC, "cuda", "float32", "triton")


@pytest.mark.usefixtures("nothing_cached")
def test_gpu_backends_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA, then Triton, by device; float64, wide networks and other feature sets go to the reference."""
    driver = {"triton": 1, "torch": 1, "lopt_fast.torch.triton": Driver(None)}
    imports(monkeypatch, Core(""), {"lopt_fast._cuda": Kernels(), **driver})
    monkeypatch.setattr(backends, "_has_gpu_driver", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(SPEC, "cuda", "float32") == "triton"
        assert choose(SPEC, "cuda", "float32", ordinal=1) == "cuda"
        assert choose(SPEC, "gpu", "bfloat16", ordinal=1) == "cuda"
        assert choose(replace(SPEC, hidden_size=64), "cuda", "float16", "triton", ordinal=1) == "triton"
        assert choose(SPEC, "cpu", "float32", ordinal=1) == "cpu"
    for spec, dtype, reason in (
        (SPEC, "float64", "float32, bfloat16 and float16, not float64"),
        (replace(SPEC, hidden_size=65), "float32", "hidden_size 2 to 64, not 65"),
        (replace(SPEC, feature_set="m"), "float32", "feature_set"),
    ):
        with pytest.warns(BackendWarning, match=f"cuda: .*{reason}.*; triton: .*{reason}"):
            assert choose(spec, "cuda", dtype, ordinal=1) == "reference"


@pytest.mark.usefixtures("nothing_cached")
def test_other_devices_import_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "import_module", lambda name: pytest.fail(f"imports {name}"))
    monkeypatch.setattr(backends, "_import_native", lambda: (Core(""), ""))
    assert choose(SPEC, "cpu", "float32") == "cpu"


@pytest.mark.usefixtures("core_is_there")
def test_operations_have_specifications_of_their_own() -> None:
    mlp = Celo().mlp
    assert choose(mlp, "cpu", "float32", operation="element_mlp") == "cpu"
    assert choose(None, "cpu", "float64", operation="adam") == "cpu"
    with pytest.raises(BackendError, match="hidden_size 1 to 256, not 300"):
        choose(replace(mlp, hidden_size=300), "cpu", "float32", "cpu", operation="element_mlp")
    with pytest.raises(BackendError, match="bfloat16 and float16, not complex64"):
        choose(None, "cpu", "complex64", "cpu", operation="statistics")


def test_unknown_backend() -> None:
    with pytest.raises(
        BackendError, match="backend='gpu': must be one of auto, cuda, triton, cpu, reference"
    ):
        choose(SPEC, "cpu", "float32", "gpu")


def test_table_has_every_implementation() -> None:
    rows = table()
    assert [(r.operation, r.backend) for r in rows] == [
        (operation, b)
        for operation in ("small_fc_lopt", "element_mlp", "adam", "statistics")
        for b in BACKENDS
        if b != "auto"
    ]
    assert {row.backend: row.reason for row in rows}["reference"] is None


def test_import_needs_no_framework_and_no_core() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "jax", "jaxlib", "optax", "matplotlib") or name == "lopt_fast._native":
            raise ImportError("refused " + name)
sys.meta_path.insert(0, Refuse())
import numpy as np
import lopt_fast, lopt_fast.reference, lopt_fast.spec, lopt_fast.checkpoint, lopt_fast.backends
from lopt_fast.architectures.small_fc_lopt import init_theta
spec = lopt_fast.Spec()
p = np.ones((3, 4))
delta, _ = lopt_fast.reference.update(spec, init_theta(spec), p, p, lopt_fast.reference.init_state(spec, p), 0)
assert np.isfinite(delta).all()
try:
    lopt_fast.backends.native()
except lopt_fast.BackendError as error:
    assert "refused lopt_fast._native" in str(error) and "pip install" in str(error), error
else:
    raise AssertionError("the core was refused, yet found")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
