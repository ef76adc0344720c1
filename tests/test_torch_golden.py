"""Golden trajectories of `small_fc_lopt` through `LearnedOptimizer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import RELATIVE, Golden

torch = pytest.importorskip("torch")

from lopt_fast import backends  # noqa: E402
from lopt_fast.checkpoint import Checkpoint  # noqa: E402
from lopt_fast.torch import LearnedOptimizer  # noqa: E402
from lopt_fast.verify import verify  # noqa: E402

GOLDEN = Path(os.environ.get("LOPT_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "golden"
FILES = sorted(f for f in GOLDEN.glob("adafac_*.npz") if f.stem != "adafac_features")
SHORT = [
    f for f in FILES if f.stem in ("adafac_h4_mini", "adafac_tie", "adafac_h32_l1", "adafac_h8_negdecay")
]
PYLO = sorted(GOLDEN.glob("pylo_adafac_*.npz"))

needs_kernel = pytest.mark.skipif(
    backends._import_native()[0] is None, reason=f"no compiled kernels: {backends._import_native()[1]}"
)
needs_golden = pytest.mark.skipif(not FILES, reason=f"no golden files in {GOLDEN} (set LOPT_SHARED)")


def check(path: Path, backend: str, dtype: str, largest: float = float("inf"), **options: Any) -> None:
    """|p - p64| <= 4 eps max|p| + RELATIVE max|change| for each tensor and step; NaN fails.

    `largest`: tensors with more elements are left out. `options`: of LearnedOptimizer.
    """
    golden = Golden(path)
    names = sorted(n for n, p in golden.params0.items() if p.size <= largest)
    params = {n: torch.nn.Parameter(torch.tensor(golden.params0[n].astype(dtype))) for n in names}
    checkpoint = Checkpoint(golden.spec(), golden.theta("float32"))
    optimizer = LearnedOptimizer(params.values(), checkpoint, backend=backend, **options)
    before = {n: golden.params0[n].astype(np.float64) for n in names}
    eps = float(np.finfo(dtype).eps)
    compared = 0
    for t in range(golden.meta["n_steps"]):
        for n, p in params.items():
            p.grad = torch.tensor(golden.grads[n][t].astype(dtype))
        optimizer.step()
        for n, p in params.items():
            trajectory, index = golden.expected64(n)
            expected = trajectory[t]
            actual = p.detach().numpy().astype(np.float64).reshape(-1)
            actual = actual if index is None else actual[index]
            old = before[n].reshape(-1)
            old = old[index] if index is not None and old.size != expected.size else old
            change = float(np.abs(expected - old).max())
            bound = 4 * eps * float(np.abs(expected).max()) + RELATIVE[dtype] * change
            error = float(np.abs(actual - expected).max())
            assert error <= bound, f"{n} step {t}: off by {error:.3e}, allowed {bound:.3e}"
            before[n] = expected
            compared += 1
    assert compared == len(names) * golden.meta["n_steps"] > 0


@needs_golden
@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
def test_kernel(path: Path, dtype: str) -> None:
    check(path, "cpu", dtype)


@needs_golden
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("path", SHORT, ids=lambda f: f.stem)
def test_reference(path: Path, dtype: str) -> None:
    check(path, "reference", dtype)


@needs_golden
@needs_kernel
@pytest.mark.parametrize("path", PYLO, ids=lambda f: f.stem)
def test_pylo(path: Path) -> None:
    report = verify(path, "torch", "cpu", "float32")
    assert report.rows
    assert all(row.passed and row.error <= row.tolerance for row in report.rows), report.rows
