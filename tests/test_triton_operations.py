"""The Triton kernels of the operations without a GPU: in the interpreter against the definitions, and compiled ahead of
time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")

from lopt_fast.architectures.celo import Celo
from lopt_fast.architectures.sgdm import SgdM
from lopt_fast.backends import BackendError
from lopt_fast.benchmark.triton_operations_resources import TYPES
from lopt_fast.torch.operations import operations_backend

TESTS = Path(__file__).parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_in_the_interpreter() -> None:
    """tests/triton_operations_interpreter.py, in a process where TRITON_INTERPRET is set before triton is imported."""
    done = run(
        *("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"),
        TESTS / "triton_operations_interpreter.py",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert not re.search(r"\d+ skipped", done.stdout), done.stdout


def test_last_passes_compile_without_spills(tmp_path: Path) -> None:
    file, names = tmp_path / "rows.json", ["apply celo matrix", "apply rnn_fc_lopt vector"]
    done = run(
        *("-m", "lopt_fast.benchmark.triton_operations_resources", "--json", file),
        *(part for name in names for part in ("--only", name)),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(file.read_text())
    assert sorted((row["target"], row["instance"]) for row in rows) == sorted(product(TARGETS, names))
    for row in rows:
        assert row["spills"] == 0, row
        assert 0 < row["registers"] <= 256, row
        assert row["shared"] <= 64 * 1024, row
        assert (row["matrix_instructions"] > 0) == ("rnn" in row["instance"]), row


def test_launches_have_the_arguments_that_are_compiled() -> None:
    done = run(TESTS / "triton_operations_launches.py", PYTHONPATH=str(TESTS.parent))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    launched = json.loads(done.stdout)
    assert set(launched) == {
        "factor_sums", "move_factored", "column_sums", "add_tiles", "apply", "spreads", "merge", "adam",
    }  # fmt: skip
    for kernel, types in launched.items():
        for name, found in types.items():
            expected = "constexpr" if name.isupper() else TYPES.get(name, "*fp32")
            assert found == expected, f"{kernel}: {name}"


def test_kernels_import_neither_torch_nor_jax() -> None:
    modules = ", ".join(
        f"lopt_fast.kernels.{n}.triton" for n in ("common", "element_mlp", "adam", "statistics")
    )
    done = run("-c", f"import sys, {modules}; print([m for m in ('torch', 'jax') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_it_says_why_it_cannot_be_used() -> None:
    with pytest.raises(BackendError, match="backend='triton' of celo cannot be used: it runs on cuda"):
        operations_backend(Celo(), "cpu", "float32", "triton")
    with pytest.raises(BackendError, match="plain array code"):
        operations_backend(SgdM(), "cuda", "float32", "triton")
    with pytest.raises(BackendError, match=r"PyTorch finds no GPU|capability|float64|triton cannot"):
        operations_backend(Celo(), "cuda", "float64", "triton")
    code = """
from lopt_fast.architectures.celo import Celo
from lopt_fast.torch.operations import operations_backend
assert operations_backend(Celo(), "cuda", "bfloat16", "triton") == "triton"
for spec, dtype, reason in [(Celo(), "float64", "not float64"), (Celo(hidden_size=65), "float32", "hidden_size")]:
    try:
        operations_backend(spec, "cuda", dtype, "triton")
    except RuntimeError as error:
        assert reason in str(error), error
    else:
        raise AssertionError(reason)
"""
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_importing_the_driver_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import lopt_fast.torch; print('imported')"
    assert run("-c", code).stdout.strip() == "imported"
