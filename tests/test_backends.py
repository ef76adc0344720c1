from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from lopt_fast import backends
from lopt_fast.backends import BACKENDS, BackendError, BackendWarning, choose, native, table
from lopt_fast.spec import Spec

SPEC = Spec()


@pytest.fixture
def core_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_import_native", lambda: (object(), ""))


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
        (SPEC, "cpu", "bfloat16", "float32 and float64, not bfloat16"),
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


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_backends_of_later_versions(backend: str) -> None:
    with pytest.raises(BackendError, match=f"'{backend}'.*not built in this version"):
        choose(SPEC, "gpu", "float32", backend)


def test_unknown_backend() -> None:
    with pytest.raises(
        BackendError, match="backend='gpu': must be one of auto, cuda, triton, cpu, reference"
    ):
        choose(SPEC, "cpu", "float32", "gpu")


def test_table_has_every_implementation() -> None:
    rows = table()
    assert [(r.operation, r.backend) for r in rows] == [("small_fc_lopt", b) for b in BACKENDS if b != "auto"]
    reasons = {row.backend: row.reason for row in rows}
    assert reasons["reference"] is None
    assert reasons["cuda"] == reasons["triton"] == "not built in this version"


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
