"""Steps over parts of tensors on the GPU kernels, run by the emulator: the tests of test_native_parts.py and others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any
from unittest import mock

import numpy as np
import pytest
import test_native_parts
from hypothesis import given, settings
from test_native_parts import PLACES, arrays, box

from lopt_fast import native
from lopt_fast.layout import Part
from lopt_fast.native import Placement
from lopt_fast.spec import Spec

_native = pytest.importorskip("lopt_fast._native")


@contextmanager
def emulated(**settings: Any) -> Iterator[None]:
    old = _native.set_emulator(**settings)
    try:
        yield
    finally:
        _native.set_emulator(**old)


class Cluster(test_native_parts.Cluster):
    """The same problems; numbers of the step and where parts begin lie on the device."""

    variant = "elementwise"

    def device(self) -> Any:
        return _native.gpu_emulator()

    def place(self, a: np.ndarray) -> int:
        """Where the array lies on the device during a phase."""
        return int(a.ctypes.data)

    def take_back(self) -> None:
        """Everything that was placed, as the phase has left it."""

    def phase(
        self, name: str, grads: list[np.ndarray], sums: list[np.ndarray], numbers: Any, **how: Any
    ) -> None:
        lr, weight_decay, grad_scale, t = numbers
        steps, scale = np.array([t], np.int32), np.array([grad_scale], np.float32)
        given = []
        for place in range(PLACES):
            placements = [of[place] for of in self.placements]
            mine = [p[place] for p in self.params]
            theirs = [
                np.ascontiguousarray(pl_order(g[box(part[place])], pl))
                for g, part, pl in zip(grads, self.parts, placements, strict=True)
            ]
            begins = [
                np.array(pl.in_memory_order(part[place].begin) or (0,), np.int32)
                for pl, part in zip(placements, self.parts, strict=True)
            ]
            before = [np.array(a, np.float32) for a in sums]
            tensors = [
                self._tensor(pl, p, g, of[place], lr, weight_decay, steps)
                for pl, p, g, of in zip(placements, mine, theirs, self.states, strict=True)
            ]
            parts = [pl.native_part() for pl in placements]
            spec = native.kernel_spec(self.spec)
            addresses = [self.place(b) for b in begins]
            size = _native.gpu_phase_scratch_bytes(spec, tensors, parts, addresses)
            # What a phase finds in its scratch memory must not matter; what lies behind it must stay.
            memory = np.full(size + 512, 0xFF, np.uint8)
            scratch = self.place(memory)
            start = -scratch % 256
            _native.gpu_phase(
                self.device(), spec=spec, phase=name, tensors=tensors, parts=parts, begins=addresses,
                factors=self.place(before[0]), squares=self.place(before[1]),
                grad_scale=(self.place(scale), "float32"), variant=self.variant, scratch=scratch + start, **how,
            )  # fmt: skip
            self.take_back()
            assert (memory[start + size :] == 0xFF).all()
            assert (memory[:start] == 0xFF).all()
            given.append(before)
        for k, total in enumerate(sums):
            changed = name == "apply" and self.spec.statistics == "lagged"
            if changed or (name, k) in (("factor_sums", 0), ("feature_sums", 1)):
                total[...] = sum(np.array(of[k], np.float64) for of in given)
            else:
                assert all(np.array_equal(of[k], np.float32(total), equal_nan=True) for of in given)

    def _tensor(
        self,
        placement: Placement,
        p: np.ndarray,
        g: np.ndarray,
        state: dict[str, np.ndarray],
        lr: float,
        weight_decay: float,
        steps: np.ndarray,
    ) -> Any:
        s = {name: self.place(a) for name, a in state.items()}
        return _native.GpuTensor(
            loops=astuple(placement.loops), parameter=p.dtype.name, gradient=g.dtype.name, state="float32",
            param=self.place(p), grad=self.place(g), output=self.place(p), apply=True, momentum=s["momentum"],
            second_moment=s["second_moment"], row=s["factored_row"], column=s.get("factored_column", 0),
            mean_squares=s.get("mean_squares", 0), momentum_stride=placement.momentum_stride,
            theta=self.place(self.flat["float32"]), lr=lr, weight_decay=weight_decay,
            t=(self.place(steps), "int32"), step=0, clip_group=-1,
        )  # fmt: skip


def pl_order(a: np.ndarray, placement: Placement) -> np.ndarray:
    """With the axes in the order in which the parameter has them in memory."""
    return a.transpose(placement.order) if a.ndim else a.reshape(1)


@pytest.fixture(autouse=True, scope="module")
def gpu_cluster() -> Iterator[None]:
    with mock.patch.object(test_native_parts, "Cluster", Cluster):
        yield


from test_native_parts import (  # noqa: E402, F401  (these run here again, through the emulator)
    test_every_specification,
    test_memory_order_of_the_whole,
    test_places_that_hold_nothing,
)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_together_are_the_whole(dtype: str, statistics: str) -> None:
    test_native_parts.test_parts_together_are_the_whole(dtype, statistics)


@settings(max_examples=30, deadline=None)
@given(*test_native_parts.CUTS)
def test_any_cut(sizes: list[int], first: int, second: int, lagged: bool) -> None:
    test_native_parts.check_cut(sizes, first, second, lagged)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("variant", ["matmul", "elementwise"])
def test_threads_in_any_order(variant: str, statistics: str) -> None:
    """Each thread of a block on its own: a barrier that is missing would show."""
    with emulated(thread_seed=7):
        cluster = Cluster(
            Spec(hidden_size=8).with_statistics(statistics),
            arrays([(20, 12), (3, 3, 4, 6)]),
            [(2, 2), (1, 1, 2, 2)],
        )
        cluster.variant = variant
        for _ in range(2):
            cluster.step()


def test_threads_that_add_up_one_place_together() -> None:
    """In any order, too: 21 tiles have sums of each column of a part."""
    with emulated(thread_seed=7):
        Cluster(Spec(), arrays([(1300, 256)]), [(2, 2)]).step()


def test_more_tensors_than_fit_one_launch() -> None:
    shapes = [(4 + i % 5, 6) for i in range(90)]
    Cluster(Spec(), arrays(shapes), [(2, 2)] * len(shapes)).step()


LARGE = [
    ((700, 600), (2, 2)), ((3000, 40), (4, 1)), ((40, 3000), (2, 2)), ((20_000, 4), (4, 1)),
    ((64, 48, 3, 3), (2, 2, 1, 1)), ((3, 3, 96, 80), (1, 1, 2, 2)), ((40, 30, 50), (2, 2, 1)), ((30_000,), (4,)),
]  # fmt: skip


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_many_tiles_and_segments(statistics: str) -> None:
    """Parts that are cut into several tiles, along both axes and along batch axes; several sums for a place."""
    cluster = Cluster(
        Spec().with_statistics(statistics), arrays([s for s, _ in LARGE]), [g for _, g in LARGE]
    )
    for _ in range(2):
        cluster.step(grad_scale=0.7)


def test_sums_that_only_the_first_step_needs() -> None:
    """Lagged statistics: the first two phases give zeros later on."""
    cluster = Cluster(Spec().with_statistics("lagged"), arrays([(8, 6), (9,)]), [(2, 2), (4,)])
    cluster.step()
    grads, sums = arrays([(8, 6), (9,)], seed=2), [np.full(14, np.nan), np.full((2, 22), np.nan)]
    for name in ("factor_sums", "feature_sums"):
        cluster.phase(name, grads, sums, (1.0, 0.0, 1.0, 1))
    assert not any(np.any(a != 0) for a in sums)


def test_what_is_refused() -> None:
    cluster = Cluster(Spec(), arrays([(4, 6)]), [(2, 2)])
    grads, sums = arrays([(4, 6)], seed=2), [np.zeros(10), np.zeros((1, 22))]
    before = [p.copy() for p in cluster.params[0]]
    numbers = (1.0, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="unknown phase"):
        cluster.phase("all", grads, sums, numbers)
    with pytest.raises(ValueError, match="only lagged"):
        cluster.phase("finish", grads, sums, numbers)
    cluster.placements[0][0] = test_native_parts._Mixed(
        cluster.placements[0][0], Part((2, 3), (4, 6), (0, 0), 0)
    )
    with pytest.raises(ValueError, match="tensor 0: a part needs 1 to 64 axes, and a copy"):
        cluster.phase("factor_sums", grads, sums, numbers)
    assert all(np.array_equal(a, b) for a, b in zip(cluster.params[0], before, strict=True))
    deep = Part((1,) * 13, (2,) * 13, (0,) * 13, 1)
    cluster = Cluster(Spec(), arrays([deep.whole]), [(2, 2, *(1,) * 11)])
    cluster.parts[0][0] = deep
    cluster.placements[0][0] = Placement(deep.shape, tuple(range(13)), part=deep)
    with pytest.raises(ValueError, match="tensor 0: a part is cut along too many axes"):
        cluster.phase("factor_sums", arrays([deep.whole]), [np.zeros(2**13), sums[1]], numbers)
