"""How GPU kernels are reached from PyTorch: their module, current device and stream, memory that outlives a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..architectures import Architecture
from ..backends import cuda
from ..native import flat_theta
from ..spec import Spec

KERNELS: dict[str, Callable[[], Any]] = {"cuda": lambda: cuda().device()}
"""Backends that csrc/gpu.h describes: what gives the capsule with their GpuDevice."""


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream(device: torch.device) -> int:
    """Handle of the current stream of `device`."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether what is enqueued on the current stream of `device` goes to a graph instead."""
    if device.type != "cuda":
        return False
    with guard(device):
        return torch.cuda.is_current_stream_capturing()


class Memory:
    """What plans share and captured graphs may refer to: kept as long as the optimizer, whatever becomes of a plan."""

    def __init__(self, spec: Spec | Architecture, theta: Mapping[str, Any]) -> None:
        self.spec, self.theta = spec, theta
        self._flat: dict[torch.device, torch.Tensor] = {}
        self._named: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
        self._scratch: dict[tuple[torch.device, int], torch.Tensor] = {}
        self.captured: list[Any] = []

    def flat_theta(self, device: torch.device) -> torch.Tensor:
        """The meta-parameters as GPU kernels take them."""
        if device not in self._flat:
            assert isinstance(self.spec, Spec)
            flat = flat_theta(self.spec, self.theta)["float32"]
            self._flat[device] = torch.tensor(flat, dtype=torch.float32, device=device)
        return self._flat[device]

    def named_theta(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The meta-parameters as the reference takes them."""
        key = (device, dtype)
        if key not in self._named:
            self._named[key] = {
                name: torch.tensor(array, dtype=dtype, device=device) for name, array in self.theta.items()
            }
        return self._named[key]

    def scratch(self, device: torch.device, stream: int, size: int) -> torch.Tensor:
        """At least `size` bytes, aligned to 256, for what is enqueued next on `stream`, the current one.

        Kept from step to step. While a graph is captured it comes from the graph's own memory, as a temporary.
        """
        if capturing(device):
            return _aligned_bytes(device, size)
        key = (device, stream)
        if key not in self._scratch or self._scratch[key].numel() < size:
            self._scratch[key] = _aligned_bytes(device, size)
        return self._scratch[key]


def _aligned_bytes(device: torch.device, size: int) -> torch.Tensor:
    memory = torch.empty(size + 255, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % 256
    return memory[start : start + size]
