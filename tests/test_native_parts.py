"""Steps over parts of tensors: what several places compute together is what one place computes of the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers import assert_parameter_close, assert_states_close, random_theta
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_fast import backends, native, reference
from lopt_fast.layout import Part, memory_order
from lopt_fast.native import Placement
from lopt_fast.spec import Spec

_module, _reason = backends._import_native()
pytestmark = pytest.mark.skipif(_module is None, reason=f"no compiled kernels: {_reason}")
PLACES = 4
FULL_SIZE = ("momentum", "second_moment")


def parts_of(whole: Sequence[int], grid: Sequence[int]) -> list[Part]:
    """Of each of the PLACES places, the tensor cut along each axis into so many pieces as equal as they can be."""
    cuts = [[np.array_split(np.arange(n), k)[i] for i in range(k)] for n, k in zip(whole, grid, strict=True)]
    boxes = list(itertools.product(*cuts))
    copies = PLACES // len(boxes)
    assert copies * len(boxes) == PLACES
    found = [
        Part(
            tuple(map(len, box)),
            tuple(whole),
            tuple(int(axis[0]) if len(axis) else 0 for axis in box),
            copies,
        )
        for box in boxes
    ]
    return found * copies


def box(part: Part) -> tuple[slice, ...]:
    return tuple(slice(b, b + n) for b, n in zip(part.begin, part.shape, strict=True))


class Cluster:
    """Several tensors in all places, and the same in float64 for the reference."""

    def __init__(
        self, spec: Spec, params: list[np.ndarray], grids: list[tuple[int, ...]], seed: int = 0
    ) -> None:
        self.spec, self.theta, self.rng = spec, random_theta(spec, seed), np.random.default_rng(seed)
        self.flat = native.flat_theta(spec, self.theta)
        self.exact = [np.array(p, np.float64) for p in params]
        self.exact_states = [reference.init_state(spec, p) for p in self.exact]
        self.parts = [parts_of(p.shape, grid) for p, grid in zip(params, grids, strict=True)]
        self.placements = [
            [Placement(part.shape, memory_order(p.strides, p.shape), part=part) for part in parts]
            for p, parts in zip(params, self.parts, strict=True)
        ]
        self.params = [
            [p[box(part)].copy(order="K") for part in parts]
            for p, parts in zip(params, self.parts, strict=True)
        ]
        self.states = [
            [self._state(pl, native.arithmetic(p.dtype.name)) for pl in placements]
            for p, placements in zip(params, self.placements, strict=True)
        ]
        self.t = 0

    def _state(self, placement: Placement, dtype: str) -> dict[str, np.ndarray]:
        found = {}
        for name, (shape, strides) in placement.state_layouts(self.spec).items():
            size = (
                1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
                if 0 not in shape
                else 0
            )
            memory = np.zeros(size, dtype)
            found[name] = np.lib.stride_tricks.as_strided(
                memory, shape, [s * memory.itemsize for s in strides]
            )
        return found

    def phase(
        self, name: str, grads: list[np.ndarray], sums: list[np.ndarray], numbers: Any, **how: Any
    ) -> None:
        """In every place; what it gives is added up."""
        given = []
        for place in range(PLACES):
            placements = [of[place] for of in self.placements]
            mine = [p[place] for p in self.params]
            theirs = [g[box(part[place])] for g, part in zip(grads, self.parts, strict=True)]
            before = [np.array(a) for a in sums]
            native.native().small_fc_phase(
                spec=native.kernel_spec(self.spec),
                phase=name,
                theta_float32=self.flat["float32"].ctypes.data,
                theta_float64=self.flat["float64"].ctypes.data,
                records=[
                    pl.record(native.arithmetic(p.dtype.name), {k: a.ctypes.data for k, a in of[place].items()})
                    for pl, p, of in zip(placements, mine, self.states, strict=True)
                ],
                parts=[pl.native_part() for pl in placements],
                params=[self._address(pl, p) for pl, p in zip(placements, mine, strict=True)],
                grads=[self._address(pl, g) for pl, g in zip(placements, theirs, strict=True)],
                numbers=[numbers] * len(mine),
                factors=before[0].ctypes.data,
                squares=before[1].ctypes.data,
                pool="own",
                threads=1 + place,
                **how,
            )  # fmt: skip
            given.append(before)
        for k, total in enumerate(sums):
            changed = name == "apply" and self.spec.statistics == "lagged"
            if changed or (name, k) in (("factor_sums", 0), ("feature_sums", 1)):
                total[...] = sum(of[k] for of in given)
            else:
                assert all(np.array_equal(of[k], total, equal_nan=True) for of in given)

    @staticmethod
    def _address(placement: Placement, a: np.ndarray) -> tuple[int, Any, str]:
        strides = [s // a.itemsize for s in a.strides]
        return a.ctypes.data, placement.strides_of_view(strides), a.dtype.name

    def step(self, lr: float = 1.0, weight_decay: float = 0.0, grad_scale: float = 1.0) -> None:
        scale = math.exp(self.rng.standard_normal())
        grads = [
            np.asarray(scale * self.rng.standard_normal(p.shape), np.float32).astype(of[0].dtype)
            for p, of in zip(self.exact, self.params, strict=True)
        ]
        factors = sum(of[0].native_part().sums(factored=of[0].loops.factored) for of in self.placements)
        sums = [np.full(factors, np.nan), np.full((len(grads), _module.part_squares), np.nan)]
        numbers = (lr, weight_decay, grad_scale, self.t)
        lagged = self.spec.statistics == "lagged"
        if not lagged or self.t == 0:
            self.phase("factor_sums", grads, sums, numbers)
            self.phase("feature_sums", grads, sums, numbers)
        self.phase("apply", grads, sums, numbers)
        if lagged:
            self.phase("finish", grads, sums, numbers)
        for i, (exact, g) in enumerate(zip(self.exact, grads, strict=True)):
            whole = np.empty_like(exact)
            for part, p in zip(self.parts[i], self.params[i], strict=True):
                whole[box(part)] = p
            delta, self.exact_states[i] = reference.update(
                self.spec, self.theta, exact, np.array(g, np.float64), self.exact_states[i], self.t,
                lr=lr, weight_decay=weight_decay, grad_scale=grad_scale,
            )  # fmt: skip
            dtype = self.params[i][0].dtype
            what = f"tensor {i} {dtype}{exact.shape} step {self.t}"
            assert_parameter_close(whole.astype(dtype), exact, delta, what)
            self.exact[i] = np.array(whole, np.float64)
            for part, state in zip(self.parts[i], self.states[i], strict=True):
                cut = (slice(None), *box(part))
                factored = len(exact.shape) >= 2
                wanted = reference.TensorState(
                    *(
                        a[cut] if name in FULL_SIZE or (name == "factored_row" and not factored) else a
                        for name, a in self.exact_states[i]._asdict().items()
                    )
                )
                empty = np.zeros(0)
                found = reference.TensorState(
                    *(state.get(name, empty) for name in reference.TensorState._fields)
                )
                assert_states_close(found, wanted, native.arithmetic(dtype.name), what)
        self.t += 1


def arrays(shapes: Sequence[tuple[int, ...]], dtype: str = "float32", seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(0.1 * rng.standard_normal(s), np.float32).astype(dtype) for s in shapes]


MIXED = [
    ((64, 48), (4, 1)), ((48, 64), (2, 2)), ((20, 20), (1, 4)), ((7, 33), (2, 2)), ((6, 5), (1, 1)),
    ((129,), (4,)), ((5,), (2,)), ((3,), (1,)), ((3, 3, 16, 8), (1, 1, 2, 2)), ((8, 6, 3, 3), (4, 1, 1, 1)),
    ((8, 6, 3, 3), (1, 2, 2, 1)), ((3, 40, 24), (2, 2, 1)), ((2, 2, 2, 2, 2), (2, 1, 2, 1, 1)), ((300, 257), (2, 2)),
]  # fmt: skip


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_parts_together_are_the_whole(dtype: str, statistics: str) -> None:
    spec = Spec().with_statistics(statistics)
    cluster = Cluster(spec, arrays([s for s, _ in MIXED], dtype), [g for _, g in MIXED])
    for _ in range(3):
        cluster.step(lr=0.5, weight_decay=0.01, grad_scale=0.7)


@pytest.mark.parametrize("options", [{"hidden_size": 16}, {"scale": "parameter_rms"}, {"hidden_layers": 1}])
def test_every_specification(options: dict[str, Any]) -> None:
    cluster = Cluster(Spec(**options), arrays([(40, 24), (65,)]), [(2, 2), (4,)])
    for _ in range(2):
        cluster.step()


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_places_that_hold_nothing(statistics: str) -> None:
    """Three rows in four places; a tensor with no elements at all."""
    params = arrays([(3, 7), (2,), (0, 5)])
    cluster = Cluster(Spec().with_statistics(statistics), params, [(4, 1), (4,), (1, 4)])
    for _ in range(2):
        cluster.step()


def test_memory_order_of_the_whole() -> None:
    """Convolutions in channels_last order, matrices transposed: accumulators lie in the order of the parameter."""
    params = arrays([(24, 40), (8, 6, 3, 3)])
    params = [np.asfortranarray(params[0]), params[1].transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)]
    cluster = Cluster(Spec(), params, [(2, 2), (2, 2, 1, 1)])
    for _ in range(2):
        cluster.step()


CUTS = (
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(0, 4),
    st.booleans(),
)
"""Sizes of a tensor, two axes (of any rank) that are cut in two, and whether statistics are lagged."""


def check_cut(sizes: list[int], first: int, second: int, lagged: bool) -> None:
    grid = [1] * len(sizes)
    for axis in (first, second):
        grid[axis % len(sizes)] *= 2
    spec = Spec().with_statistics("lagged" if lagged else "exact")
    cluster = Cluster(spec, arrays([tuple(sizes)], seed=sum(sizes)), [tuple(grid)])
    for _ in range(2):
        cluster.step()


@settings(max_examples=40, deadline=None)
@given(*CUTS)
def test_any_cut(sizes: list[int], first: int, second: int, lagged: bool) -> None:
    check_cut(sizes, first, second, lagged)


def test_what_is_refused() -> None:
    part = _module.Part
    with pytest.raises(ValueError, match="equally many"):
        part(sizes=[2], whole=[2, 3], begin=[0], x_axis=0, y_axis=1, copies=1)
    cluster = Cluster(Spec(), arrays([(4, 6)]), [(2, 2)])
    grads, sums = arrays([(4, 6)], seed=2), [np.zeros(10), np.zeros((1, 22))]
    before = [p.copy() for p in cluster.params[0]]
    with pytest.raises(ValueError, match="unknown phase"):
        cluster.phase("all", grads, sums, (1.0, 0.0, 1.0, 0))
    with pytest.raises(ValueError, match="only lagged"):
        cluster.phase("finish", grads, sums, (1.0, 0.0, 1.0, 0))
    for wrong in (
        Part((2, 3), (4, 6), (3, 0), 1),
        Part((2, 3), (4, 6), (0, 0), 0),
        Part((2, 4), (4, 6), (0, 2), 1),
    ):
        cluster.placements[0][0] = Placement(wrong.shape, (0, 1), part=wrong)
        if wrong.shape != (2, 3):
            record = Placement((2, 3), (0, 1), part=Part((2, 3), (4, 6), (0, 0), 1))
            cluster.placements[0][0] = _Mixed(record, wrong)
        with pytest.raises(ValueError, match="part"):
            cluster.phase("factor_sums", grads, sums, (1.0, 0.0, 1.0, 0))
    assert all(np.array_equal(a, b) for a, b in zip(cluster.params[0], before, strict=True))


class _Mixed:
    """The record of one placement with the part of another."""

    def __init__(self, placement: Placement, part: Part) -> None:
        self._placement, self._part = placement, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._placement, name)

    def native_part(self) -> Any:
        return Placement(self._part.shape, (0, 1), part=self._part).native_part()
