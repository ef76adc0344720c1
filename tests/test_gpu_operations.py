"""The GPU kernels of the operations, run by the emulator on CPU tensors, against their definitions in float64.

tests/gpu/test_operations_gpu.py repeats these tests on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lopt_fast.native_operations import unsupported_on_gpus  # noqa: E402
from lopt_fast.operations import AdamScalars, Decays, ModelTensors, Reference, Weights  # noqa: E402
from lopt_fast.operations.adam import ADAM_AVERAGES  # noqa: E402
from lopt_fast.torch import cuda_operations  # noqa: E402
from tests.helpers import needs_emulator  # noqa: E402
from tests.operations_on_devices import (  # noqa: E402
    EMULATOR,
    INTERPRETER,
    arrays_of,
    check,
    kernels,
    run,
    target,
    tensors_of,
    to_numpy,
    to_torch,
)
from tests.test_native_operations import (  # noqa: E402
    SPECS,
    assert_close,
    assert_result_close,
    in_float64,
    random_decays,
    random_scalars,
    random_tensors,
    random_weights,
)

pytestmark = needs_emulator

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (5, 1), (1, 6), (8, 8), (37,), (130, 9), (8, 8, 3, 3), (3, 3, 4, 8), (2, 1, 5, 5), (7, 132), (64,),
]  # fmt: skip
SEVERAL_TILES: list[tuple[int, ...]] = [(150, 72), (18, 2, 40, 2), (2, 3000), (4300,), (4301,)]


@pytest.fixture(autouse=True)
def emulator() -> Iterator[None]:
    with EMULATOR.in_use():
        yield


@pytest.mark.parametrize("name", ["celo", "velo", "celo2", "celo2 tanh", "fc_lopt", "rnn_fc_lopt", "few"])
def test_element_mlp(name: str) -> None:
    check(name, SHAPES, (False, True), apply=False, gradient_clip=1.5)
    check(name, [(6, 8), (5,), (4, 3, 2)], (True, True), steps_only=name == "celo")


def test_what_has_no_kernel_goes_through_the_definition() -> None:
    """Three hidden layers."""
    assert "1 or 2 hidden layers" in str(unsupported_on_gpus(SPECS["all"]))
    check("all", [(6, 5), (5,)], (True, True))
    # All groups of columns, with two.
    spec = replace(SPECS["all"], hidden_layers=2)
    assert unsupported_on_gpus(spec) is None
    arrays = random_tensors(spec, SHAPES, "float32", apply=True)
    arguments = random_decays(spec), random_weights(spec, len(SHAPES), (False, False))
    expected = Reference.element_mlp(spec, in_float64(arrays), *arguments)
    assert_result_close(
        arrays_of(run(spec, tensors_of(arrays), *arguments)), expected, arrays, "float32", "all groups"
    )


@pytest.mark.parametrize("name", ["celo", "rnn_fc_lopt"])
def test_several_tiles_and_the_same_bits_in_every_run(name: str) -> None:
    spec = SPECS[name]
    arrays = random_tensors(spec, SEVERAL_TILES, "float32", apply=True)
    arguments = random_decays(spec), random_weights(spec, len(SEVERAL_TILES), (True, True))
    expected = Reference.element_mlp(spec, in_float64(arrays), *arguments)
    first, second = (run(spec, tensors_of(arrays), *arguments) for _ in range(2))
    assert_result_close(arrays_of(first), expected, arrays, "float32", name)
    for a, b in zip(first.outputs, second.outputs, strict=True):
        assert torch.equal(a, b)


def test_more_tensors_than_a_launch_takes() -> None:
    check("few", [(3, 4), (5,)] * 90, (True, True))


@pytest.mark.parametrize("moved", [True, False])
def test_statistics(moved: bool) -> None:
    spec = SPECS["rnn_fc_lopt"] if moved else ADAM_AVERAGES
    arrays = random_tensors(spec, [*SHAPES, *SEVERAL_TILES], "float32")
    for p in arrays.params:  # variances that a sum of squares alone would lose
        p *= 0.01
        p += 100.0
    decays = random_decays(spec) if moved else None
    expected = Reference.statistics(spec, in_float64(arrays), decays, 1.2)
    actual = kernels().statistics(
        spec, tensors_of(arrays), None if decays is None else Decays(*map(to_torch, decays)), 1.2
    )
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        if name == "column_mean_square":
            assert a is None
            continue
        assert a.dtype == torch.float32
        # The rounding of 100 to float32 moves a variance of 1e-4.
        assert_close(to_numpy(a), e, 1e-3 if name == "parameter_variance" else 1e-5, name)


@pytest.mark.parametrize("apply", [True, False])
def test_adam(apply: bool) -> None:
    shapes = [*SHAPES, *SEVERAL_TILES]
    arrays = random_tensors(ADAM_AVERAGES, shapes, "float32", apply=apply)
    scalars = random_scalars(len(shapes))
    expected = Reference.adam(in_float64(arrays), scalars, 1.2, statistics=True)
    actual = kernels().adam(tensors_of(arrays), AdamScalars(*map(to_torch, scalars)), 1.2, statistics=True)
    assert_result_close(arrays_of(actual), expected, arrays, "float32", "adam")
    found, wanted = actual.statistics, expected.statistics
    assert found is not None
    assert wanted is not None
    for name, a, e in zip(found._fields, found, wanted, strict=True):
        if e is not None:
            assert_close(to_numpy(a), e, 1e-5, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_parameters_and_gradients(dtype: Any) -> None:
    spec = SPECS["celo"]
    arrays = random_tensors(spec, [(6, 5), (9,), (8, 16)], "float32", apply=True)
    tensors = tensors_of(arrays, dtype)
    rounded = replace(
        in_float64(arrays),
        params=[to_numpy(p) for p in tensors.params],
        grads=[to_numpy(g) for g in tensors.grads],
    )
    arguments = random_decays(spec), random_weights(spec, 3, (False, False))
    expected = Reference.element_mlp(spec, rounded, *arguments)
    actual = run(spec, tensors, *arguments)
    eps, rounding = torch.finfo(dtype).eps, 1.01 if target() == INTERPRETER else 0.51  # which truncates
    for a, e, state, wanted in zip(
        actual.outputs, expected.outputs, actual.states, expected.states, strict=True
    ):
        assert a.dtype == dtype
        assert np.abs(to_numpy(a) - e).max() <= rounding * eps * np.abs(e).max()
        for x, y in zip(state, wanted, strict=True):
            assert_close(to_numpy(x), y, 1e-4)


def channels_last(a: Any, *order: int) -> Any:
    return a.permute(order).contiguous().permute(np.argsort(order).tolist())


def test_other_orders_in_memory_and_what_is_refused() -> None:
    """Channels last with state in that order; all else through the definitions, in place as well."""
    spec = SPECS["celo"]
    arrays = random_tensors(spec, [(4, 6, 3, 5), (12, 7), (5, 6)], "float32", apply=True)
    tensors = tensors_of(arrays)
    tensors.params[0] = channels_last(tensors.params[0], 0, 2, 3, 1)
    tensors.grads[0] = channels_last(tensors.grads[0], 0, 2, 3, 1)
    tensors.states[0] = tensors.states[0]._replace(
        momentum=channels_last(tensors.states[0].momentum, 0, 1, 3, 4, 2),
        second_moment=channels_last(tensors.states[0].second_moment, 0, 1, 3, 4, 2),
        factored_column=channels_last(tensors.states[0].factored_column, 0, 1, 3, 2),
    )
    tensors.grads[1] = channels_last(tensors.grads[1], 1, 0)
    tensors.params[2] = torch.zeros(5, 12, device=target().device)[:, ::2].copy_(tensors.params[2])
    all_tensors = zip(tensors.params, tensors.grads, tensors.states, strict=True)
    reasons = [cuda_operations.refusal(*x, spec) for x in all_tensors]
    assert reasons[0] is None
    assert "gradient does not lie" in str(reasons[1])
    assert "gaps in memory" in str(reasons[2])
    arguments = random_decays(spec), random_weights(spec, 3, (True, True)), np.linspace(1.0, 2.0, 3)
    expected = Reference.element_mlp(spec, in_float64(arrays), *arguments)
    actual = run(spec, tensors, *arguments)
    assert all(a is b for a, b in zip(actual.outputs, tensors.params, strict=True))
    assert_result_close(arrays_of(actual), expected, arrays, "float32", "in place")


def test_nothing_is_written_where_infinities_were_found() -> None:
    spec = SPECS["celo"]
    arrays = random_tensors(spec, [(5, 6), (4,), (3, 4)], "float32", apply=True)
    tensors = tensors_of(arrays)
    tensors.params[2] = torch.zeros(3, 8, device=target().device)[:, ::2].copy_(
        tensors.params[2]
    )  # through the definition
    run(spec, tensors, random_decays(spec), random_weights(spec, 3, (False, False)), found_inf=torch.ones(1))
    written = run(
        spec, tensors_of(arrays), random_decays(spec), random_weights(spec, 3, (False, False)),
        found_inf=torch.zeros(1),
    )  # fmt: skip
    assert not any(torch.equal(p, to_torch(q)) for p, q in zip(written.outputs, arrays.params, strict=True))
    adam = tensors_of(random_tensors(ADAM_AVERAGES, [(5, 6)], "float32", apply=True))
    before = [a.clone() for a in (adam.params[0], adam.states[0].momentum)]
    kernels(torch.ones(())).adam(adam, AdamScalars(*map(to_torch, random_scalars(1))))
    assert torch.equal(adam.params[0], before[0])
    assert torch.equal(adam.states[0].momentum, before[1])
    for p, q, state, old in zip(tensors.params, arrays.params, tensors.states, arrays.states, strict=True):
        np.testing.assert_array_equal(to_numpy(p), q)
        for a, b in zip(state, old, strict=True):
            np.testing.assert_array_equal(to_numpy(a), b)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite(value: float) -> None:
    """NaN and Inf where the definitions give them, and nowhere else."""
    spec = SPECS["celo"]
    arrays = random_tensors(spec, [(5, 6), (7,), (4, 3), (4, 8)], "float32", apply=True)
    for g in (*arrays.grads[:2], arrays.grads[3]):
        g.reshape(-1)[-1] = value
    arguments = random_decays(spec), random_weights(spec, 4, (False, False))
    expected = Reference.element_mlp(spec, in_float64(arrays), *arguments, None, 10.0)
    actual = arrays_of(run(spec, tensors_of(arrays), *arguments, None, gradient_clip=10.0))
    for i in range(4):
        assert_close(actual.outputs[i], expected.outputs[i], 1e-4)
        for a, e in zip(actual.states[i], expected.states[i], strict=True):
            assert_close(a, e, 1e-4)
    statistics = kernels().statistics(spec, tensors_of(arrays), None)
    for a, e in zip(statistics, Reference.statistics(spec, in_float64(arrays), None), strict=True):
        if e is not None:
            assert_close(to_numpy(a), e, 1e-4)


def test_empty_tensors_and_numbers_as_tensors() -> None:
    spec = SPECS["few"]
    arrays = random_tensors(spec, [(0, 3), (2, 3)], "float32", apply=True)
    arguments = random_decays(spec), random_weights(spec, 2, (False, False))
    expected = Reference.element_mlp(spec, in_float64(arrays.select([1])), *arguments)
    lr, scale = (
        torch.tensor(x, dtype=torch.float64, device=target().device)
        for x in (arrays.lr[1], arrays.grad_scale)
    )
    tensors = replace(tensors_of(arrays), lr=[lr, lr], grad_scale=scale)
    actual = run(spec, tensors, *arguments)
    assert actual.outputs[0].shape == (0, 3)
    assert_close(to_numpy(actual.outputs[1]), expected.outputs[0], 1e-5)


def test_statistics_of_an_empty_tensor() -> None:
    statistics = kernels().statistics(
        ADAM_AVERAGES, tensors_of(random_tensors(ADAM_AVERAGES, [(0,)], "float32")), None
    )
    assert torch.isnan(statistics.parameter_mean).all()


REFUSED: list[tuple[str, Callable[[ModelTensors, dict[str, Any]], None]]] = [
    ("decays.momentum", lambda t, k: k.update(decays=Decays(*(to_torch(np.zeros(1)) for _ in range(3))))),
    (
        "weights.w.0.",
        lambda t, k: k.update(
            weights=Weights(tuple(to_torch(np.zeros((2, 2))) for _ in range(3)), k["weights"].b)
        ),
    ),
    ("multiplier has shape", lambda t, k: k.update(multiplier=to_torch(np.ones(5)))),
]


@pytest.mark.parametrize(("message", "spoil"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_does_not_fit_is_refused_before_anything_is_written(message: str, spoil: Any) -> None:
    spec = SPECS["celo"]
    tensors = tensors_of(random_tensors(spec, [(5, 6)], "float32", apply=True))
    weights = random_weights(spec, 1, (False, False))
    arguments = {
        "decays": Decays(*map(to_torch, random_decays(spec))),
        "weights": Weights(tuple(map(to_torch, weights.w)), tuple(map(to_torch, weights.b))),
    }
    spoil(tensors, arguments)
    before = tensors.params[0].clone()
    with pytest.raises(ValueError, match=message):
        kernels().element_mlp(spec, tensors, **arguments)
    assert torch.equal(tensors.params[0], before)
