"""Tensors for the tests of the Triton kernels of the operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lopt_fast.operations import ModelTensors
from lopt_fast.reference import TensorState


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
