"""The architecture that docs/architectures.md shows. Published trajectories are replayed in test_verify.py."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from lopt_fast import checkpoint
from lopt_fast.architectures import ARCHITECTURES


def test_the_documented_architecture(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of docs/architectures.md, its registry line and its checkpoint, in both frameworks."""
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    from lopt_fast.jax import learned_optimizer
    from lopt_fast.torch import LearnedOptimizer

    text = (root / "docs" / "architectures.md").read_text()
    source, registry, usage = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("rank_adam.py").write_text(source)
    kind = importlib.import_module("rank_adam").RankAdam
    assert registry.split() == ["from", f".{kind.NAME}", "import", kind.__name__, f"{kind.__name__},"]
    monkeypatch.setitem(ARCHITECTURES, kind.NAME, kind)
    exec(usage, {"RankAdam": kind})
    assert checkpoint.load("mine.safetensors").spec == kind(epsilon=1e-6)

    # Three steps are those of Adam, with its usual learning rate and momentum.
    start, grads = np.array([[1.0, -2.0]]), np.array([[[0.3, 1.0]], [[-0.1, 2.0]], [[0.2, 0.5]]])
    ours, adam = (torch.nn.Parameter(torch.tensor(start)) for _ in range(2))
    optimizers = [
        LearnedOptimizer([ours], "mine.safetensors"),
        torch.optim.Adam([adam], lr=1e-3, betas=(1 / (1 + np.exp(-2.2)), 0.999), eps=1e-6),
    ]
    transformation = learned_optimizer("mine.safetensors", backend="reference")
    params = jax.numpy.asarray(start, "float32")
    state = transformation.init(params)
    for g in grads:
        for p, optimizer in zip((ours, adam), optimizers, strict=True):
            p.grad = torch.tensor(g)
            optimizer.step()
        updates, state = transformation.update(jax.numpy.asarray(g, "float32"), state, params)
        params = params + updates
    moved = adam.detach().numpy() - start
    assert np.abs(moved).max() > 1e-3
    assert np.abs(ours.detach().numpy() - start - moved).max() <= 1e-6 * np.abs(moved).max()
    assert np.abs(np.asarray(params) - start - moved).max() <= 1e-3 * np.abs(moved).max()
