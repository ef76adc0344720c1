"""Golden trajectories through the JAX interface, and the same trajectory as PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import lopt_fast.jax as lopt  # noqa: E402
from lopt_fast import backends  # noqa: E402
from lopt_fast.architectures import small_fc_lopt  # noqa: E402
from lopt_fast.checkpoint import Checkpoint  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402
from lopt_fast.verify import verify  # noqa: E402

GOLDEN = Path(os.environ.get("LOPT_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "golden"
FILES = sorted([*GOLDEN.glob("adafac_*.npz"), *GOLDEN.glob("pylo_adafac_*.npz")])
FEW_TENSORS = GOLDEN / "adafac_tie.npz"  # the reference takes XLA seconds for each tensor to compile

needs_kernel = pytest.mark.skipif(
    backends.choose(Spec(), "cpu", "float32", "auto") != "cpu", reason="the compiled core is missing"
)
needs_golden = pytest.mark.skipif(not FILES, reason=f"no golden files in {GOLDEN} (set LOPT_SHARED)")


def check(file: Path, backend: str, dtype: str) -> None:
    report = verify(file, "jax", backend, dtype)
    assert report.backend == backend
    assert report.dtype == dtype
    assert report.rows
    for row in report.rows:
        assert row.passed, row
        assert row.error <= row.tolerance, row


@needs_golden
@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_kernel_reproduces(file: Path, dtype: str) -> None:
    check(file, "cpu", dtype)


@needs_golden
def test_reference_reproduces() -> None:
    check(FEW_TENSORS, "reference", "float64")


@needs_golden
@needs_kernel
def test_kernel_in_float32_step_by_step() -> None:
    """Without `verify`: |p - p64| <= 4 eps max|p| + 1e-4 max|change| for each tensor and step."""
    inputs, case = np.load(GOLDEN / "inputs_mini.npz"), np.load(GOLDEN / "adafac_h4_mini.npz")
    spec = Spec(step_mult=0.01, exp_mult=0.1)
    theta = {n: case[f"theta/{n}" if n.endswith("decays") else f"theta/nn/~/{n}"] for n in spec.theta_shapes}
    names = [k.removeprefix("params0/") for k in inputs if k.startswith("params0/")]
    tx = lopt.learned_optimizer(spec, theta=theta, backend="cpu")
    params = {n: jnp.asarray(inputs[f"params0/{n}"]) for n in names}
    before = {n: inputs[f"params0/{n}"].astype(np.float64) for n in names}
    state, step = tx.init(params), jax.jit(tx.step, donate_argnums=(1, 2))
    for t in range(12):
        params, state = step({n: jnp.asarray(inputs[f"grads/{n}"][t]) for n in names}, state, params)
        for n in names:
            expected = case[f"params64/{n}"][t]
            change = np.abs(expected - before[n]).max()
            limit = 4 * np.finfo(np.float32).eps * np.abs(expected).max() + 1e-4 * change
            assert np.abs(np.asarray(params[n], np.float64) - expected).max() <= limit, (n, t)
            before[n] = expected


@needs_kernel
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_same_trajectory_as_pytorch(tmp_path: Path, statistics: str) -> None:
    torch = pytest.importorskip("torch")
    from lopt_fast.torch import LearnedOptimizer

    spec = Spec(step_mult=0.01, exp_mult=0.1)
    path = Checkpoint(spec, small_fc_lopt.init_theta(spec, 3)).save(tmp_path / "weights.safetensors")
    rng = np.random.default_rng(0)
    shapes = {"w": (20, 30), "b": (30,), "s": (), "conv": (4, 3, 5, 6), "large": (300, 280)}
    start = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    grads = [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(5)]
    options = {"weight_decay": 0.125, "statistics": statistics, "max_grad_norm": 2.0}

    theirs = {n: torch.nn.Parameter(torch.tensor(a)) for n, a in start.items()}
    torch_optimizer = LearnedOptimizer(theirs.values(), path, lr=0.5, **options)
    tx = lopt.learned_optimizer(path, 0.5, **options)
    mine = jax.tree.map(jnp.asarray, start)
    state, step = tx.init(mine), jax.jit(tx.step)
    before = start
    for t, g in enumerate(grads):
        mine, state = step(g, state, mine)
        for n, p in theirs.items():
            p.grad = torch.tensor(g[n])
        torch_optimizer.step()
        after = {n: p.detach().numpy().copy() for n, p in theirs.items()}
        for n, b in after.items():
            limit = 2 * np.finfo(np.float32).eps * np.abs(b).max() + 1e-5 * np.abs(b - before[n]).max()
            assert np.abs(np.asarray(mine[n]) - b).max() <= limit, (n, t)
        before = after
