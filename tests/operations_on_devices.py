"""What the tests of the GPU drivers of the operations share, Triton's and CUDA's."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lopt_fast.architectures import ARCHITECTURES
from lopt_fast.checkpoint import Checkpoint
from lopt_fast.operations import ModelTensors
from lopt_fast.reference import TensorState
from lopt_fast.torch import LearnedOptimizer
from tests.test_native_operations import assert_close


def to_torch(a: Any) -> Any:
    return torch.tensor(np.asarray(a), dtype=torch.float32)


def tensors_of(arrays: ModelTensors, dtype: torch.dtype = torch.float32) -> ModelTensors:
    """Copies on PyTorch's CPU; state in float32."""
    return replace(
        arrays,
        params=[to_torch(p).to(dtype) for p in arrays.params],
        grads=[to_torch(g).to(dtype) for g in arrays.grads],
        states=[TensorState(*map(to_torch, s)) for s in arrays.states],
    )


def check_learned_optimizer(name: str, backend: str) -> LearnedOptimizer:
    """Two steps through the public interface, against the definitions in float64; then one that finds an infinity.
    Returns the optimizer."""
    architecture: Any = ARCHITECTURES[name]()
    rng = np.random.default_rng(0)
    theta = {k: a + 0.05 * rng.standard_normal(a.shape) for k, a in architecture.init_theta().items()}
    starts = [rng.standard_normal(shape) for shape in [(6, 4), (5,), (3, 2, 2)]]
    grads = [[rng.standard_normal(p.shape) for p in starts] for _ in range(2)]

    def steps(chosen: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], Any]:
        params = [torch.nn.Parameter(torch.tensor(p).to(dtype)) for p in starts]
        params[2].data = params[2].data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        named = [(f"weight{i}", p) for i, p in enumerate(params)]
        optimizer = LearnedOptimizer(
            named, Checkpoint(architecture, theta), lr=0.5, weight_decay=0.1, num_steps=10, backend=chosen
        )
        for t in range(2):
            for p, g in zip(params, grads[t], strict=True):
                p.grad = torch.tensor(g).to(dtype)
            optimizer.step(loss=1.0 / (t + 1))
        return params, optimizer

    expected, _ = steps("reference", torch.float64)
    actual, optimizer = steps(backend, torch.float32)
    for a, e, start in zip(actual, expected, starts, strict=True):
        moved = (e.detach().numpy() - start).reshape(-1)
        assert_close(
            a.detach().numpy().reshape(-1) - start.reshape(-1), moved, 2e-4 + 1e-6 / np.abs(moved).max()
        )
    before = copy.deepcopy([actual, optimizer.state_dict()])
    optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.ones(1)
    actual[0].grad[0, 0] = np.inf
    optimizer.step(loss=1.0)
    for a, b in zip(actual, before[0], strict=True):
        assert torch.equal(a, b)
    for i, entries in optimizer.state_dict()["state"].items():
        for key, a in entries.items():
            assert torch.equal(a, before[1]["state"][i][key]), key
    return optimizer
