from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_fast.layout import (
    column_shape,
    dense_strides,
    factored_dims,
    loops,
    memory_order,
    row_shape,
)

SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)


@st.composite
def ordered_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = draw(SHAPES)
    return shape, tuple(draw(st.permutations(range(len(shape)))))


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((), None),
        ((7,), None),
        ((128, 10), (1, 0)),
        ((16, 32), (0, 1)),
        ((10, 10), (0, 1)),
        ((5, 1), (1, 0)),
        ((1, 6), (0, 1)),
        ((1, 1), (0, 1)),
        ((2, 3, 4), (1, 2)),
        ((4, 4, 4), (1, 2)),
        ((3, 3, 8, 16), (2, 3)),
        ((8, 8, 3, 3), (0, 1)),
        ((3, 3, 8, 8), (2, 3)),
        ((6, 6, 1, 1), (0, 1)),
        ((0, 3), (0, 1)),
    ],
)
def test_factored_dims(shape: tuple[int, ...], dims: tuple[int, int] | None) -> None:
    assert factored_dims(shape) == dims


@given(SHAPES)
def test_factored_dims_are_a_stable_argsort(shape: tuple[int, ...]) -> None:
    order = np.argsort(np.array(shape, dtype=np.int64), kind="stable")
    expected = None if len(shape) < 2 else (int(order[-2]), int(order[-1]))
    assert factored_dims(shape) == expected


def test_accumulator_shapes() -> None:
    assert (row_shape((128, 10)), column_shape((128, 10))) == ((10,), (128,))
    assert (row_shape((3, 3, 8, 16)), column_shape((3, 3, 8, 16))) == ((3, 3, 8), (3, 3, 16))


@given(ordered_shapes())
def test_loops_number_the_elements_in_memory_order(case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """The five loops over memory meet the sums over d0 and d1 of the tensor itself."""
    shape, order = case
    view = loops(shape, order)
    assert view.size == int(np.prod(shape, dtype=np.int64))
    assert view.factored == (len(shape) >= 2)
    if not view.factored or not view.size:
        return
    dims = factored_dims(shape)
    assert dims is not None
    d1, d0 = dims
    values = np.random.default_rng(0).standard_normal(shape)
    memory = np.transpose(values, order)
    nested = np.ascontiguousarray(memory).reshape(view.batch0, view.x, view.batch1, view.y, view.batch2)
    over_y, over_x = (d0, d1) if view.x_is_row else (d1, d0)
    for axis, dim in ((3, over_y), (1, over_x)):
        kept = [a for a in order if a != dim]
        expected = np.transpose(values.sum(axis=dim, keepdims=True), [*kept, dim])
        np.testing.assert_allclose(
            nested.sum(axis=axis).reshape(-1), expected.reshape(-1), rtol=1e-12, atol=1e-12
        )


@given(ordered_shapes())
def test_dense_strides_and_memory_order_are_inverse(case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    shape, order = case
    strides = dense_strides(shape, order)
    found = memory_order(strides, shape)
    if 0 in shape:
        return
    again = dense_strides(shape, found)
    # Axes of size 1 may lie anywhere; all others have the same strides.
    assert [s for s, n in zip(strides, shape, strict=True) if n != 1] == [
        s for s, n in zip(again, shape, strict=True) if n != 1
    ]


@given(ordered_shapes())
def test_dense_strides_reach_every_element_once(case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    shape, order = case
    strides = dense_strides(shape, order)
    offsets = sorted(
        sum(i * s for i, s in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, shape))
    )
    assert offsets == list(range(len(offsets)))


def test_memory_order_of_channels_last() -> None:
    shape = (2, 3, 4, 5)
    strides = (60, 1, 15, 3)
    assert memory_order(strides, shape) == (0, 2, 3, 1)
    assert dense_strides(shape, (0, 2, 3, 1)) == strides


def test_memory_order_of_c_order_is_identity() -> None:
    assert memory_order((12, 4, 1), (2, 3, 4)) == (0, 1, 2)
    assert memory_order((1, 1, 1), (1, 1, 1)) == (0, 1, 2)
