"""bfloat16 and float16 parameters and gradients on the CPU kernels: conversion bit by bit, then whole steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_parameter_close, random_theta

ml_dtypes = pytest.importorskip("ml_dtypes")  # NumPy's bfloat16

from test_native import HARD_SHAPES, LAYOUTS, Case, _every_other, instruction_set, normal  # noqa: E402

from lopt_fast import backends, native, reference  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402

_module, _reason = backends._import_native()
pytestmark = pytest.mark.skipif(_module is None, reason=f"no compiled kernels: {_reason}")
__all__ = ["instruction_set"]  # a fixture

HALF = ("bfloat16", "float16")
half = pytest.mark.parametrize("dtype", HALF)


def copied(p: np.ndarray, output: np.ndarray) -> None:
    """`p` through the kernel to `output`: a step with learning rate 0."""
    g = np.zeros_like(output)
    state = native.init_state(Spec(), p)
    native.small_fc_step(Spec(), random_theta(Spec()), [p], [g], [state], t=0, lr=0.0, outputs=[output])


@half
def test_every_number_survives(instruction_set: str, dtype: str) -> None:
    every = np.arange(1 << 16).astype(np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        finite = every[np.isfinite(every)]
    for lay_out in (np.array, _every_other):
        out = lay_out(np.ones_like(finite))
        copied(lay_out(finite), out)
        np.testing.assert_array_equal(out, finite)


@half
def test_results_are_rounded_to_nearest_even(instruction_set: str, dtype: str) -> None:
    """Random bits, all ties between neighbours, and what overflows, compared with NumPy's own conversion."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 40_000, np.uint32).view(np.float32)
    small = np.array(10.0 ** rng.uniform(-9, 6, 40_000), np.float32) * rng.choice([-1, 1], 40_000)
    numbers = np.sort(np.arange(0x7C00 if dtype == "float16" else 0x7F80).astype(np.uint16).view(dtype))
    wide = numbers.astype(np.float32)
    ties = wide[1:] / np.float32(2) + wide[:-1] / np.float32(2)
    beyond = np.array([65519.996, 65520.0, 65536.0, 1e30, 3.3895e38, 3.3961776e38, 3.4e38], np.float32)
    values = np.concatenate([values, small.astype(np.float32), ties, np.nextafter(ties, 0), beyond, -beyond])
    values = values[np.isfinite(values)]
    with np.errstate(all="ignore"):
        expected = values.astype(dtype)
    assert np.isinf(expected).any()
    assert (expected[values != 0] == 0).any()
    for lay_out in (np.array, _every_other):
        out = lay_out(np.zeros_like(expected))
        copied(values, out)
        np.testing.assert_array_equal(out, expected)


@half
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_not_a_number_stays_one(instruction_set: str, dtype: str, statistics: Any) -> None:
    """Every NaN of the type, in a gradient and in a parameter, alone in its tensor."""
    every = np.arange(1 << 16).astype(np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        nans = every[np.isnan(every)][::37]
    assert len(nans) > 3
    spec, ones = Spec(statistics=statistics), np.ones(1, dtype)
    for params, grads in ((nans, np.repeat(ones, len(nans))), (np.repeat(ones, len(nans)), nans)):
        p = [params[i : i + 1].copy() for i in range(len(nans))]
        states = [native.init_state(spec, x) for x in p]
        native.small_fc_step(
            spec, random_theta(spec), p, [grads[i : i + 1] for i in range(len(nans))], states, t=0
        )
        assert np.isnan(np.concatenate(p)).all()


@half
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_shapes(instruction_set: str, dtype: str, statistics: Any) -> None:
    shapes = [*HARD_SHAPES, *((n,) for n in range(1, 36, 3)), (3, 16_500), (40_000,), (300, 301)]
    case = Case(Spec(statistics=statistics), [normal(s, dtype, i) for i, s in enumerate(shapes)])
    for _ in range(3):
        case.step(case.gradients(), threads=2)


@half
@pytest.mark.parametrize(("width", "layers"), [(2, 1), (4, 1), (5, 2), (8, 2), (32, 2), (256, 1)])
def test_widths(width: int, layers: int, dtype: str) -> None:
    for statistics in ("exact", "lagged"):
        spec = Spec(
            hidden_size=width,
            hidden_layers=layers,
            statistics=statistics,
            scale="parameter_rms",
            step_mult=0.01,
        )
        case = Case(spec, [normal((7, 300), dtype), normal((270,), dtype), normal((3, 2, 4, 5), dtype)])
        for _ in range(3):
            case.step(case.gradients())


@half
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_and_types_of_gradients(dtype: str, layout: Any) -> None:
    """Parameters and gradients of different types and layouts, one of them float32 too."""
    shapes = [(5, 9), (40, 33), (8, 8, 3, 3), (6, 4, 3, 2)]
    case = Case(Spec(), [layout(normal(s, dtype)) for s in shapes])
    for of_gradient in LAYOUTS:
        for other in ("float32", *HALF):
            case.step([of_gradient(g.astype(other)) for g in case.gradients()])
    case = Case(Spec(statistics="lagged"), [layout(normal(s, "float32")) for s in shapes])
    for of_gradient in LAYOUTS:
        case.step([of_gradient(g.astype(dtype)) for g in case.gradients()])


@half
def test_scalars_of_a_step(dtype: str) -> None:
    shapes = [(6, 5), (50,), (0, 4), (3, 3, 4, 8)]
    for options in (
        {"lr": 0.0, "weight_decay": 0.5},
        {"lr": 0.3, "weight_decay": 0.1, "grad_scale": 1 / 1024},
        {"max_grad_norm": 0.7, "grad_scale": 0.01, "weight_decay": 0.1, "lr": 0.5},
    ):
        case = Case(Spec(statistics="lagged"), [normal(s, dtype, i) for i, s in enumerate(shapes)])
        for _ in range(3):
            case.step(case.gradients(), **options)


@half
@pytest.mark.parametrize("to", ["float32", *HALF])
def test_what_is_to_be_added(dtype: str, to: str) -> None:
    """apply=False into another array of any type: the parameters stay, nothing between the elements is written."""
    spec, theta = Spec(), random_theta(Spec())
    params = [normal((6, 5), dtype), _every_other(normal((4, 70), dtype)), normal((300,), dtype)]
    kept = [p.copy() for p in params]
    grads = [normal(p.shape, dtype, 1) for p in params]
    bases = [np.full([2 * n for n in p.shape], 7.0, to) for p in params]
    outputs = [b[tuple(slice(0, None, 2) for _ in b.shape)] for b in bases]
    states = [native.init_state(spec, p) for p in params]
    options = {"lr": 0.5, "weight_decay": 0.1}
    native.small_fc_step(spec, theta, params, grads, states, t=0, outputs=outputs, apply=False, **options)
    for p, k, g, out, base in zip(params, kept, grads, outputs, bases, strict=True):
        np.testing.assert_array_equal(p, k)
        p64 = np.array(p, np.float64)
        delta, _ = reference.update(
            spec, theta, p64, np.array(g, np.float64), reference.init_state(spec, p64), 0, **options
        )
        assert_parameter_close(out, np.zeros_like(p64), delta)
        out[...] = 7.0
        assert (base == 7.0).all()


def test_same_bits_for_any_threads() -> None:
    shapes = [(300, 301), (70_001,), (3, 40_000), (40_000, 3), *HARD_SHAPES]
    spec, theta = Spec(), random_theta(Spec())
    results = []
    for threads in (1, 2, 3):
        params = [normal(s, HALF[i % 2], i) for i, s in enumerate(shapes)]
        states = [native.init_state(spec, p) for p in params]
        for t in range(2):
            grads = [normal(s, HALF[i % 2], 100 * t + i) for i, s in enumerate(shapes)]
            native.small_fc_step(spec, theta, params, grads, states, t=t, max_grad_norm=1.0, threads=threads)
        results.append([*params, *(a for state in states for a in state)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(a).all() for a in results[0])


@half
def test_float64_goes_with_itself_alone(dtype: str) -> None:
    p, q = normal((4, 5), "float64"), normal((4, 5), dtype)
    for params, grads in ((p, q), (q, p)):
        before, state = params.copy(), native.init_state(Spec(), params)
        with pytest.raises(ValueError, match=r"grads\[0\] is (float64|float16|bfloat16)\(4, 5\)"):
            native.small_fc_step(Spec(), random_theta(Spec()), [params], [grads], [state], t=0)
        np.testing.assert_array_equal(params, before)
        assert not any(a.any() for a in state)
