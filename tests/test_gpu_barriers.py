"""No barrier is missing in the GPU kernels: the emulator runs their threads one by one, from barrier to barrier.

With a `thread_seed`, which thread goes on is random (csrc/emulated_block.h). A thread that does not wait for what it
reads then finds something else, and other bits come out than from threads that go together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers import random_theta
from test_gpu_core import Device, equal, normal

from lopt_fast.spec import Spec

_native = pytest.importorskip("lopt_fast._native")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads on stacks of their own need Linux")

SEEDS = [1, 2]


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    old = _native.set_emulator()
    yield
    _native.set_emulator(**old)


def same_in_any_order(run: Callable[[], list[np.ndarray]]) -> None:
    _native.set_emulator()
    together = run()
    assert together
    for seed in SEEDS:
        _native.set_emulator(thread_seed=seed)
        equal(together, run())


def test_a_missing_barrier_is_found() -> None:
    """Threads read what their neighbours write. Those that go together do not notice that nobody waits."""
    threads = 256
    right = [*range(1, threads), 0]
    for seed in (0, *SEEDS):
        assert _native.gpu_test_next_numbers(thread_seed=seed, threads=threads) == right
    assert _native.gpu_test_next_numbers(thread_seed=0, threads=0) == right
    for seed in SEEDS:
        found = np.array(_native.gpu_test_next_numbers(thread_seed=seed, threads=0))
        assert 0.2 * threads < np.count_nonzero(found != right) < 0.8 * threads
        with pytest.raises(RuntimeError, match="wait at a barrier that others do not come to"):
            _native.gpu_test_next_numbers(thread_seed=seed, threads=100)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize(
    ("width", "variant"), [(4, "elementwise"), (8, "elementwise"), (16, "elementwise"), (32, "matmul")]
)
def test_small_fc_lopt(width: int, variant: str, statistics: Any) -> None:
    """Tiles of all kinds, of one and of several batches, one and four elements a thread; several segments."""
    spec = Spec(hidden_size=width, statistics=statistics)
    shapes = [(5,), (300,), (70, 63), (40, 64), (3, 3, 4, 8), (16, 8, 3, 3), (2, 1400), (2, 1401), (33, 2100)]

    def run() -> list[np.ndarray]:
        device = Device(spec, random_theta(spec), [normal(s, i) for i, s in enumerate(shapes)])
        for t in range(2):
            grads = [normal(s, 100 * t + i) for i, s in enumerate(shapes)]
            cell = np.array([t], np.int64)
            device.step(grads, max_norms=[1.0], clip_group=0, variant=variant, t=(cell.ctypes.data, "int64"))
        return device.bits()

    same_in_any_order(run)


@pytest.mark.parametrize("name", ["celo", "rnn_fc_lopt", "adam", "statistics"])
def test_operations(name: str) -> None:
    pytest.importorskip("torch")
    from lopt_fast.operations import AdamScalars, Decays
    from lopt_fast.operations.adam import ADAM_AVERAGES
    from tests import operations_on_devices as devices
    from tests.test_native_operations import (
        SPECS,
        random_decays,
        random_scalars,
        random_tensors,
        random_weights,
    )

    spec: Any = SPECS.get(name, SPECS["rnn_fc_lopt"] if name == "statistics" else ADAM_AVERAGES)
    shapes = [(), (37,), (30, 9), (8, 16), (3, 3, 4, 8), (4300,), (150, 40)]
    arrays = random_tensors(spec, shapes, "float32", apply=True)

    def run() -> list[np.ndarray]:
        tensors = devices.tensors_of(arrays)
        if name == "statistics":
            decays = Decays(*map(devices.to_torch, random_decays(spec)))
            found = devices.kernels().statistics(spec, tensors, decays, 1.2)
            return [devices.to_numpy(a) for a in found if a is not None]
        if name == "adam":
            scalars = AdamScalars(*map(devices.to_torch, random_scalars(len(shapes))))
            result = devices.kernels().adam(tensors, scalars)
        else:
            weights = random_weights(spec, len(shapes), (False, True))
            result = devices.run(spec, tensors, random_decays(spec), weights)
        result = devices.arrays_of(result)
        messages = [] if result.messages is None else [result.messages]
        arrays_found = [*result.outputs, *(a for state in result.states for a in state), *messages]
        return [a.reshape(-1) for a in arrays_found]

    with devices.EMULATOR.in_use():
        same_in_any_order(run)
