"""The CPU kernels of the operations against their definitions in float64: hard shapes, layouts, threads, NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lopt_fast import backends
from lopt_fast.architectures import ARCHITECTURES
from lopt_fast.architectures.base import Inputs
from lopt_fast.architectures.celo import Celo
from lopt_fast.architectures.celo2 import Celo2
from lopt_fast.architectures.fc_lopt import FcLopt
from lopt_fast.architectures.rnn_fc_lopt import RnnFcLopt
from lopt_fast.architectures.velo import Velo
from lopt_fast.operations import (
    AdamScalars,
    Decays,
    ElementMlp,
    ModelTensors,
    Reference,
    Result,
    Statistics,
    Weights,
)
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.operations.adam import ADAM_AVERAGES
from lopt_fast.reference import TensorState
from lopt_fast.spec import Averages
from tests.helpers import RELATIVE, assert_states_close, assert_update_close

native_operations = pytest.importorskip("lopt_fast.native_operations")
_module, _reason = backends._import_native()
pytestmark = pytest.mark.skipif(_module is None, reason=f"no compiled kernels: {_reason}")

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (5, 1), (1, 6), (10, 10), (37,), (130, 9), (8, 8, 3, 3), (3, 3, 4, 6), (4, 1, 5, 5), (7, 129),
]  # fmt: skip
GROUPS = Celo().mlp.groups
SPECS: dict[str, ElementMlp] = {
    "celo": Celo().mlp,
    "velo": replace(Velo().mlp, scale_cap=0.05),
    "celo2": Celo2().mlp,
    "celo2 tanh": replace(Celo2().mlp, activation="tanh", exp_mult=0.01, scale="parameter_rms"),
    "fc_lopt": FcLopt().mlp,
    "rnn_fc_lopt": RnnFcLopt().mlp,
    "all": ElementMlp((*GROUPS, "log_abs_p"), 3, 3, 3, 7, 3, 0.01, 0.1, messages=2, scale="parameter_rms"),
    "few": ElementMlp(("fac_g", "rms"), 2, 1, 2, 1, 1, 0.01, 0.1),
}


def random_weights(spec: ElementMlp, tensors: int, per_tensor: Sequence[bool], seed: int = 0) -> Weights:
    """per_tensor: of all weights, of the first bias."""
    rng = np.random.default_rng(seed)
    w, b = [], []
    for i, (n_in, n_out) in enumerate(spec.layer_sizes):
        n_out += i == spec.hidden_layers  # an output that nothing reads, as in Celo's weights
        axis = (tensors,) if per_tensor[0] else ()
        w.append(rng.standard_normal((*axis, n_in, n_out)) / np.sqrt(n_in))
        axis = (tensors,) if per_tensor[0] or (per_tensor[1] and i == 0) else ()
        b.append(0.3 * rng.standard_normal((*axis, n_out)))
    return Weights(tuple(w), tuple(b))


def random_tensors(
    accumulates: Any, shapes: Sequence[tuple[int, ...]], dtype: str, seed: int = 0, **options: Any
) -> ModelTensors:
    """Parameters, gradients and states that are not zero, the same numbers in either type."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape).astype(np.float32).astype(dtype))

    params = [draw(shape) for shape in shapes]

    def draw_state(p: np.ndarray) -> TensorState:
        momentum, *squares = (0.1 * draw(a.shape) for a in initial_state(accumulates, p))
        return TensorState(momentum, *map(np.abs, squares))

    states = [draw_state(p) for p in params]
    return ModelTensors(
        params, [draw(shape) for shape in shapes], states,
        lr=[1.0 + 0.1 * i for i in range(len(shapes))], weight_decay=[0.01 * i for i in range(len(shapes))],
        **{"grad_scale": 0.7, **options},
    )  # fmt: skip


def random_decays(accumulates: Any) -> Decays:
    rates = np.array([0.9, 0.1, 0.01, 0.3, 0.001, 0.5, 0.05, 0.002])
    return Decays(rates[: accumulates.momenta], rates[: accumulates.second_moments] / 2,
                  rates[: accumulates.factored_moments])  # fmt: skip


def in_float64(tensors: ModelTensors) -> ModelTensors:
    def wide(a: Any) -> np.ndarray:
        return np.asarray(a, np.float64)

    return replace(
        tensors,
        params=[wide(p) for p in tensors.params],
        grads=[wide(g) for g in tensors.grads],
        states=[TensorState(*map(wide, s)) for s in tensors.states],
    )


def kernels(**options: Any) -> Any:
    return native_operations.CpuOperations(**{"pool": "own", "threads": 2, "copies": True, **options})


def assert_close(actual: Any, expected: Any, relative: float, what: str = "") -> None:
    """Relative to the largest of `expected`, which has the same NaN and Inf."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=what)
    if finite.any():
        error, largest = np.abs(actual - expected)[finite].max(), np.abs(expected[finite]).max()
        assert error <= relative * largest, f"{what}: off by {error:.3e}, largest {largest:.3e}"


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, b in zip(actual.outputs, expected.outputs, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    for one, other in zip(actual.states, expected.states, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    if expected.messages is not None:
        np.testing.assert_array_equal(np.asarray(actual.messages), np.asarray(expected.messages))


def assert_result_close(
    actual: Result, expected: Result, tensors: ModelTensors, dtype: str, what: str
) -> None:
    for i, p in enumerate(tensors.params):
        before = np.asarray(p, np.float64) * tensors.apply
        assert_update_close(
            actual.outputs[i] - before, expected.outputs[i] - before, before, dtype, f"{what} {p.shape}"
        )
        assert_states_close(actual.states[i], expected.states[i], dtype, f"{what} {p.shape}")
    assert (actual.messages is None) == (expected.messages is None)
    if expected.messages is not None:
        assert_close(actual.messages, expected.messages, RELATIVE[dtype], f"{what} messages")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SPECS)
def test_element_mlp(name: str, dtype: str) -> None:
    spec = SPECS[name]
    for case, (apply, steps_only, per_tensor) in enumerate(
        [(True, False, (True, True)), (False, False, (False, True)), (True, True, (False, False))]
    ):
        tensors = random_tensors(spec, SHAPES, dtype, seed=case, apply=apply)
        weights = random_weights(spec, len(SHAPES), per_tensor, seed=case)
        multiplier = 1.0 + np.arange(len(SHAPES)) / 7 if case else None
        arguments: dict[str, Any] = {"gradient_clip": 1.5 if case else None, "steps_only": steps_only}
        for p, g, state in zip(tensors.params, tensors.grads, tensors.states, strict=True):
            assert native_operations.refusal(p, g, state, spec, spec.normalise_over == "matrix") is None
        actual = kernels().element_mlp(spec, tensors, random_decays(spec), weights, multiplier, **arguments)
        wide = in_float64(tensors)
        expected = Reference.element_mlp(spec, wide, random_decays(spec), weights, multiplier, **arguments)
        assert_result_close(
            actual, expected, replace(tensors, apply=apply and not steps_only), dtype, f"case {case}"
        )


LARGE: list[tuple[int, ...]] = [(300, 401), (90_001,), (2, 70_001), (24, 16, 3, 3), (3, 70, 400)]
"""Cut into several tiles, or into several tasks."""


@pytest.mark.parametrize("name", ["celo", "rnn_fc_lopt", "celo2"])
def test_large_tensors_are_right_and_the_same_bits_on_any_threads(name: str) -> None:
    spec = SPECS[name]
    shapes = LARGE[:3] if name == "rnn_fc_lopt" else LARGE
    tensors = random_tensors(spec, shapes, "float32", apply=True)
    arguments = spec, tensors, random_decays(spec), random_weights(spec, len(shapes), (True, True))
    first = kernels(pool="serial").element_mlp(*arguments)
    expected = Reference.element_mlp(spec, in_float64(tensors), *arguments[2:])
    assert_result_close(first, expected, tensors, "float32", name)
    for threads in (2, 3, 7):
        assert_same_bits(kernels(threads=threads).element_mlp(*arguments), first)


def assert_statistics_close(actual: Statistics, expected: Statistics, dtype: str) -> None:
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if e is None:
            continue
        assert a.dtype == dtype
        bound = {"float32": 1e-5, "float64": 1e-11}[dtype]
        if name == "column_mean_square":  # each on its own: they are of very different sizes
            # 8,192 are added up in their own type: where they are all alike, as bounded ones, roundings are too.
            np.testing.assert_allclose(a, e, rtol=3 * bound, atol=0, err_msg=name)
        else:
            assert_close(a, e, bound, name)


def assert_same_statistics(actual: Statistics, expected: Statistics) -> None:
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        np.testing.assert_array_equal(a, e, err_msg=name)


def far_from_zero(tensors: ModelTensors) -> ModelTensors:
    """Parameters with variances that a sum of squares alone would lose."""
    for p in tensors.params:
        p *= 0.01
        p += 100.0
    return tensors


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics(dtype: str, moved: bool) -> None:
    counts = Averages.of(SPECS["rnn_fc_lopt"])
    tensors = far_from_zero(random_tensors(counts, [*SHAPES, *LARGE], dtype))
    decays = random_decays(counts) if moved else None
    actual = kernels().statistics(counts, tensors, decays, gradient_clip=1.2)
    expected = Reference.statistics(counts, in_float64(tensors), decays, gradient_clip=1.2)
    assert_statistics_close(actual, expected, dtype)
    for threads in (1, 5):
        assert_same_statistics(
            kernels(threads=threads).statistics(counts, tensors, decays, gradient_clip=1.2), actual
        )


@pytest.mark.parametrize("length", [1, 128, 1000, 5000])
def test_variances_of_steps(length: int) -> None:
    """Means that jump, by far more than what is beside them, after `length` elements; also within a group of them."""
    rng = np.random.default_rng(0)
    n = 40_000
    p = 1e-3 * rng.standard_normal(n) + 100.0 * rng.standard_normal(n // length + 1)[np.arange(n) // length]
    p[:128] += 1e4
    p = p.astype(np.float32)
    tensors = ModelTensors([p], [p[::-1].copy()], [initial_state(Averages(), p)], [1.0], [0.0])
    found = kernels().statistics(Averages(), tensors, None)
    variance = np.var(p.astype(np.float64))
    assert abs(found.parameter_variance[0] - variance) <= 1e-5 * variance
    assert abs(found.gradient_variance[0] - variance) <= 1e-5 * variance


WHOLE = {
    **{name: spec for name, spec in SPECS.items() if spec.normalise_over == "tensor"},
    "without p": replace(SPECS["few"], scale="parameter_rms", scale_epsilon=1e-3),
    "not of vectors": replace(SPECS["celo2"], normalise_over="tensor"),
}
"""Specifications whose columns have one mean square for a tensor."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", WHOLE)
def test_mean_squares_of_columns(name: str, dtype: str) -> None:
    """Found by `statistics`, which tells nothing else than without columns, and taken by `element_mlp`."""
    spec, shapes = WHOLE[name], [*SHAPES, *LARGE[: 1 if dtype == "float64" else 4]]
    tensors = random_tensors(spec, shapes, dtype)
    decays, clip = random_decays(spec), 1.2
    found = kernels().statistics(spec, tensors, decays, clip)
    assert_statistics_close(found, Reference.statistics(spec, in_float64(tensors), decays, clip), dtype)
    assert_same_statistics(
        found._replace(column_mean_square=None),
        kernels().statistics(Averages.of(spec), tensors, decays, clip),
    )
    before = kernels(threads=5).statistics(spec, tensors, decays, clip, before=True)
    np.testing.assert_array_equal(before.column_mean_square, found.column_mean_square)
    assert_same_statistics(
        before._replace(column_mean_square=None), kernels().statistics(spec, tensors, None, clip)
    )

    weights = random_weights(spec, len(shapes), (True, True))
    arguments = decays, weights, 1.0 + np.arange(len(shapes)) / 7, clip
    given = kernels().element_mlp(spec, tensors, *arguments, column_mean_square=found.column_mean_square)
    if dtype == "float64" and name != "without p":  # which adds its squares up in a loop of its own
        assert_same_bits(given, kernels().element_mlp(spec, tensors, *arguments))
    expected = Reference.element_mlp(spec, in_float64(tensors), *arguments)
    assert_result_close(given, expected, tensors, dtype, name)
    # They are what normalises. Columns of an axis are found again, as that takes no pass.
    other = kernels().element_mlp(
        spec, tensors, *arguments, column_mean_square=2.0 * found.column_mean_square
    )
    moved = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(other.outputs, given.outputs, strict=True)]
    assert max(moved) > 1e-3


def random_scalars(tensors: int) -> AdamScalars:
    return AdamScalars.of(
        np.linspace(0.1, 0.2, tensors), beta1=0.9, beta2=np.linspace(0.99, 0.999, tensors), scale=0.3,
        momentum_factor=1.1, gradient_factor=0.2, v_factor=1.3, epsilon=1e-3, root_epsilon=1e-4, l2=0.02,
    )  # fmt: skip


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adam(dtype: str, apply: bool) -> None:
    shapes = [*SHAPES, *LARGE]
    tensors = far_from_zero(random_tensors(ADAM_AVERAGES, shapes, dtype, apply=apply))
    scalars = random_scalars(len(shapes))
    actual = kernels().adam(tensors, scalars, 1.2)
    expected = Reference.adam(in_float64(tensors), scalars, 1.2, statistics=True)
    assert_result_close(actual, expected, tensors, dtype, "adam")
    first, second = (
        kernels(threads=threads).adam(tensors, scalars, 1.2, statistics=True) for threads in (1, 5)
    )
    assert_same_bits(first, actual)
    assert_same_bits(second, actual)
    assert_statistics_close(first.statistics, expected.statistics, dtype)
    assert_same_statistics(second.statistics, first.statistics)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_that_are_not_finite(dtype: str, value: float) -> None:
    """Where the definitions give NaN or Inf, and nowhere else."""
    for clip in (None, 10.0):
        for name in ("celo", "velo", "celo2", "rnn_fc_lopt", "all"):
            spec = SPECS[name]
            tensors = random_tensors(spec, SHAPES, dtype, apply=True)
            for g in tensors.grads:
                g.reshape(-1)[-1] = value
            weights = random_weights(spec, len(SHAPES), (False, False))
            arguments = random_decays(spec), weights, None, clip
            actual = kernels().element_mlp(spec, tensors, *arguments)
            expected = Reference.element_mlp(spec, in_float64(tensors), *arguments)
            for i, p in enumerate(tensors.params):
                what = f"{name} {p.shape} clip {clip}"
                assert_close(actual.outputs[i], expected.outputs[i], 1e-4, what)
                for a, e in zip(actual.states[i], expected.states[i], strict=True):
                    assert_close(a, e, 1e-4, what)
        tensors = random_tensors(ADAM_AVERAGES, SHAPES, dtype, apply=True)
        for g in tensors.grads:
            g.reshape(-1)[0] = value
        adam = kernels().adam(tensors, random_scalars(len(SHAPES)), clip, statistics=True)
        by_definition = Reference.adam(in_float64(tensors), random_scalars(len(SHAPES)), clip, True)
        for a, e in zip(adam.outputs, by_definition.outputs, strict=True):
            assert_close(a, e, 1e-4, "adam")
        for a, e in zip(adam.statistics[:-1], by_definition.statistics[:-1], strict=True):
            assert_close(a, e, 1e-4, "statistics of adam")
        found = kernels().statistics(ADAM_AVERAGES, tensors, None, clip)
        by_definition = Reference.statistics(ADAM_AVERAGES, in_float64(tensors), None, clip)
        for a, e in zip(found[:-1], by_definition[:-1], strict=True):
            assert_close(a, e, 1e-4, "statistics")


def test_instruction_sets() -> None:
    spec = SPECS["all"]
    tensors = random_tensors(spec, SHAPES, "float32", apply=True)
    arguments = random_decays(spec), random_weights(spec, len(SHAPES), (False, True))
    expected = Reference.element_mlp(spec, in_float64(tensors), *arguments)
    before = _module.instruction_set()
    try:
        for name in _module.available_instruction_sets():
            _module.set_instruction_set(name)
            assert_result_close(
                kernels().element_mlp(spec, tensors, *arguments), expected, tensors, "float32", name
            )
    finally:
        _module.set_instruction_set(before)


def dense(a: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """A copy whose axes lie in memory as `order`, outermost first."""
    return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


def test_other_orders_in_memory_and_what_is_refused() -> None:
    """Parameters in any dense order, with state in that order; all else through the definitions, in place as well."""
    spec = SPECS["celo"]
    shapes = [(4, 6, 3, 5), (12, 7), (12, 7), (5, 6), (9,)]
    plain = random_tensors(spec, shapes, "float32", apply=True)
    order = (0, 2, 3, 1)  # channels last
    p = dense(plain.params[0], order)
    state = TensorState(
        momentum=dense(plain.states[0].momentum, (0, 1, 3, 4, 2)),
        second_moment=dense(plain.states[0].second_moment, (0, 1, 3, 4, 2)),
        factored_row=plain.states[0].factored_row,  # without axis 1
        factored_column=dense(plain.states[0].factored_column, (0, 1, 3, 2)),  # without axis 3
        mean_squares=plain.states[0].mean_squares,
    )
    gap = np.zeros((12, 14), np.float32)[:, ::2]
    gap[:] = plain.params[2]
    shifted = np.zeros(9 * 4 + 1, np.uint8)[1:].view(np.float32)
    shifted[:] = plain.grads[4]
    tensors = replace(
        plain,
        params=[p, plain.params[1], gap, plain.params[3], plain.params[4]],
        grads=[dense(plain.grads[0], order), dense(plain.grads[1], (1, 0)), *plain.grads[2:4], shifted],
        states=[state, *plain.states[1:3],
                plain.states[3]._replace(momentum=plain.states[3].momentum[::-1]), plain.states[4]],
    )  # fmt: skip
    reasons = [
        native_operations.refusal(*one, spec)
        for one in zip(tensors.params, tensors.grads, tensors.states, strict=True)
    ]
    assert reasons[0] is None
    for reason, found in zip(
        ["gradient does not lie", "gaps in memory", "momentum overlap", "not aligned"],
        reasons[1:],
        strict=True,
    ):
        assert found is not None
        assert reason in found
    arguments = (
        random_decays(spec),
        random_weights(spec, len(shapes), (True, True)),
        np.linspace(1.0, 2.0, len(shapes)),
    )
    expected = Reference.element_mlp(spec, in_float64(tensors), *arguments)
    before = in_float64(tensors)
    actual = kernels(copies=False).element_mlp(spec, tensors, *arguments)
    assert all(a is b for a, b in zip(actual.outputs, tensors.params, strict=True))
    assert_result_close(actual, expected, before, "float32", "in place")

    found = kernels().statistics(spec, tensors, arguments[0])
    wide = in_float64(tensors)
    assert_statistics_close(found, Reference.statistics(spec, wide, arguments[0]), "float32")
    given = kernels().element_mlp(spec, tensors, *arguments, column_mean_square=found.column_mean_square)
    expected = Reference.element_mlp(spec, wide, *arguments)
    assert_result_close(given, expected, wide, "float32", "mean squares given")

    tensors = replace(tensors, states=[s._replace(momentum=s.momentum[:1]) for s in tensors.states])
    scalars, wide = random_scalars(len(shapes)), in_float64(tensors)
    seen = kernels(copies=False).adam(tensors, scalars, 1.2, statistics=True)
    expected = Reference.adam(wide, scalars, 1.2, statistics=True)
    assert_result_close(seen, expected, wide, "float32", "adam in place")
    assert_statistics_close(seen.statistics, expected.statistics, "float32")


def test_in_place_and_copies() -> None:
    spec = SPECS["celo"]
    tensors = random_tensors(spec, [(5, 9), ()], "float32", apply=True)
    before = in_float64(tensors)
    arguments = random_decays(spec), random_weights(spec, 2, (False, False))
    copied = kernels(copies=True).element_mlp(spec, tensors, *arguments)
    assert_same_bits(Result(tensors.params, tensors.states), Result(before.params, before.states))
    deltas = kernels(copies=False).element_mlp(spec, replace(tensors, apply=False), *arguments)
    np.testing.assert_array_equal(tensors.params[0], before.params[0])
    assert deltas.states[0].momentum is tensors.states[0].momentum
    assert_same_bits(Result([], tensors.states), Result([], copied.states))
    np.testing.assert_allclose(tensors.params[0] + deltas.outputs[0], copied.outputs[0], rtol=1e-6)


def test_empty_tensors_are_left_alone() -> None:
    spec = SPECS["rnn_fc_lopt"]
    tensors = random_tensors(spec, [(0, 3), (2, 3)], "float32", apply=True)
    result = kernels().element_mlp(
        spec, tensors, random_decays(spec), random_weights(spec, 2, (False, False))
    )
    assert result.outputs[0].shape == (0, 3)
    assert np.isnan(result.messages[0]).all()
    assert np.isfinite(result.messages[1]).all()


def test_errors_come_before_anything_is_written() -> None:
    spec = SPECS["celo"]
    tensors = random_tensors(spec, [(5, 9), (4,)], "float32", apply=True)
    before = in_float64(tensors)
    decays, weights = random_decays(spec), random_weights(spec, 2, (True, True))
    operations = kernels(copies=False)

    def fails(match: str, *arguments: Any, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            operations.element_mlp(*arguments)
        assert_same_bits(Result(tensors.params, tensors.states), Result(before.params, before.states))

    fails(
        "3 numbers, expected 2|2 numbers, expected 3",
        spec,
        tensors,
        decays._replace(momentum=np.ones(2)),
        weights,
    )
    fails(r"w\[0\] has shape \(3,", spec, tensors, decays, random_weights(spec, 3, (True, True)))
    fails("layer 0 are", spec, tensors, decays, random_weights(SPECS["fc_lopt"], 2, (True, True)))
    fails("multiplier", spec, tensors, decays, weights, np.ones(3))
    fails(r"column_mean_square has shape \(2, 3\), expected \(2, 30\)",
          spec, tensors, decays, weights, None, None, False, np.ones((2, 3)))  # fmt: skip
    fails("column_mean_square: with normalise_over='matrix'",
          SPECS["celo2"], tensors, decays, weights, None, None, False, np.ones((2, 3)))  # fmt: skip
    fails("there are no tensors", spec, tensors.select([]), decays, weights)
    fails("list", spec, replace(tensors, params=[[1.0], [2.0]]), decays, weights, error=TypeError)
    tensors.states[1].momentum.flags.writeable = False
    fails("momentum of tensor 1 is read-only", spec, tensors, decays, weights)
    with pytest.raises(ValueError, match="pool='threads'"):
        kernels(pool="threads")


def test_specifications_that_are_refused_take_the_definition() -> None:
    spec = replace(SPECS["fc_lopt"], hidden_size=300)
    assert native_operations.unsupported(spec) == "it takes hidden_size 1 to 256, not 300"
    tensors = random_tensors(spec, [(5, 9), (4,)], "float64", apply=True)
    arguments = random_decays(spec), random_weights(spec, 2, (True, True))
    expected = Reference.element_mlp(spec, in_float64(tensors), *arguments)
    assert kernels().statistics(spec, tensors, arguments[0]).column_mean_square is None
    assert_same_bits(kernels(copies=False).element_mlp(spec, tensors, *arguments), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pytorch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    spec = SPECS["rnn_fc_lopt"]
    arrays = random_tensors(spec, [(6, 5), (8, 4, 3, 3), ()], dtype, apply=True)
    expected_arguments = random_decays(spec), random_weights(spec, 3, (False, True))
    expected = Reference.element_mlp(spec, in_float64(arrays), *expected_arguments)
    tensors = replace(
        arrays,
        params=[torch.nn.Parameter(torch.tensor(p)) for p in arrays.params],
        grads=[torch.tensor(g) for g in arrays.grads],
        states=[TensorState(*map(torch.tensor, state)) for state in arrays.states],
        lr=[torch.tensor(x, dtype=torch.float64) for x in arrays.lr],
    )
    decays, weights = expected_arguments
    versions = [p._version for p in tensors.params]
    with torch.no_grad():
        result = kernels(pool="openmp", threads=0, copies=False).element_mlp(
            spec, tensors, Decays(*map(torch.tensor, decays)),
            Weights(tuple(map(torch.tensor, weights.w)), tuple(map(torch.tensor, weights.b))),
        )  # fmt: skip
    assert all(a is b for a, b in zip(result.outputs, tensors.params, strict=True))
    assert all(p._version > version for p, version in zip(tensors.params, versions, strict=True))
    assert result.messages.dtype == getattr(torch, dtype)
    numpy = Result(
        [p.detach().numpy() for p in result.outputs],
        [TensorState(*(a.numpy() for a in state)) for state in result.states],
        result.messages.numpy(),
    )
    assert_result_close(numpy, expected, arrays, dtype, "torch")
    negated = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    assert "lazily negated" in native_operations.refusal(torch.ones(3), negated, tensors.states[0], spec)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "small_fc_lopt"])
def test_architectures_on_the_kernels(name: str) -> None:
    """Three steps of each, with the kernels in place and with the definitions."""
    architecture = ARCHITECTURES[name]()
    rng = np.random.default_rng(0)
    theta = {key: np.asarray(a, np.float64) for key, a in architecture.init_theta(0).items()}
    shapes = [(6, 4), (5,), (4, 3, 3, 2)]
    names = ["kernel", "bias", "filter"]
    values = [0.1 * rng.standard_normal(shape) for shape in shapes]
    grads = [[rng.standard_normal(shape) for shape in shapes] for _ in range(3)]

    def trajectory(operations: Any) -> list[np.ndarray]:
        params = [p.copy() for p in values]
        states = [
            initial_state(architecture.accumulates(n, p.shape), p) for n, p in zip(names, params, strict=True)
        ]
        rows, shared = architecture.init_rows(theta, shapes), architecture.init_shared(theta)
        for t in range(3):
            tensors = ModelTensors(params, grads[t], states, [1.0] * 3, [0.1] * 3, names=names, apply=True)
            inputs = Inputs(np.asarray(t), 10, np.asarray(1.0 / (t + 1)))
            params, states, rows, shared = architecture.step(operations, theta, tensors, rows, shared, inputs)
        return params

    for actual, expected, start in zip(
        trajectory(kernels(copies=False)), trajectory(Reference), values, strict=True
    ):
        assert_close(actual - start, expected - start, 1e-9)
