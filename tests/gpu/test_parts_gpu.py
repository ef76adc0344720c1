"""Steps over parts of tensors with the CUDA kernels: tests of test_gpu_parts.py on a GPU, which plays all places."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import test_gpu_parts  # noqa: E402
import test_native_parts  # noqa: E402
from test_gpu_parts import (  # noqa: E402, F401  (these run here again, on the GPU)
    test_every_specification,
    test_many_tiles_and_segments,
    test_memory_order_of_the_whole,
    test_more_tensors_than_fit_one_launch,
    test_parts_together_are_the_whole,
    test_places_that_hold_nothing,
    test_sums_that_only_the_first_step_needs,
)

from lopt_fast import backends  # noqa: E402

pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


class Cluster(test_gpu_parts.Cluster):
    """What a phase works on is copied to the GPU before it, and back after it."""

    where = "cuda"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.placed: dict[int, tuple[np.ndarray, Any]] = {}

    def device(self) -> Any:
        return backends.cuda().device()

    def place(self, a: np.ndarray) -> int:
        address = int(a.ctypes.data)
        if a.size and address not in self.placed:
            span = a.itemsize + sum((n - 1) * stride for n, stride in zip(a.shape, a.strides, strict=True))
            memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(address))
            self.placed[address] = memory, torch.from_numpy(memory.copy()).to(self.where)
        return self.placed[address][1].data_ptr() if a.size else address

    def take_back(self) -> None:
        for memory, copy in self.placed.values():
            memory[...] = copy.cpu().numpy()
        self.placed.clear()


@pytest.fixture(autouse=True)
def on_the_gpu(backend: str) -> Iterator[None]:
    with (
        mock.patch.object(test_gpu_parts, "Cluster", Cluster),
        mock.patch.object(test_native_parts, "Cluster", Cluster),
    ):
        yield
