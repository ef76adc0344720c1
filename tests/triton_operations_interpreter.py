"""The Triton kernels of the operations in Triton's interpreter against their definitions in float64, on CPU tensors;
tests/test_triton_operations.py runs this file in a process of its own, because TRITON_INTERPRET must be set before
triton is imported. tests/gpu/test_triton_operations_gpu.py repeats these tests on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lopt_fast.operations import AdamScalars, Decays, Reference
from lopt_fast.operations.adam import ADAM_AVERAGES
from lopt_fast.torch.triton_operations import refusal
from tests.operations_on_devices import (
    INTERPRETER,
    arrays_of,
    check,
    check_learned_optimizer,
    check_state_moves,
    kernels,
    run,
    target,
    tensors_of,
    to_numpy,
    to_torch,
)
from tests.test_gpu_operations import (  # noqa: F401  (these run here again)
    test_empty_tensors_and_numbers_as_tensors,
    test_gradients_that_are_not_finite,
    test_nothing_is_written_where_infinities_were_found,
    test_sixteen_bit_parameters_and_gradients,
)
from tests.test_native_operations import (
    SPECS,
    assert_close,
    assert_result_close,
    in_float64,
    random_decays,
    random_scalars,
    random_tensors,
    random_weights,
)

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton_interpreter import patch_each_module_once  # noqa: F401

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (5, 1), (1, 6), (6, 6), (37,), (30, 9), (4, 4, 3, 3), (2, 2, 4, 6), (2, 1, 5, 5), (7, 72),
]  # fmt: skip
SEVERAL_TILES = (4200,)


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with INTERPRETER.in_use():
        yield


def test_celo_on_hard_shapes() -> None:
    check("celo", SHAPES, (False, False), apply=False, gradient_clip=1.5)


def test_velo_with_weights_for_each_tensor() -> None:
    check("velo", [(), (5, 4), (3, 2, 2), (7,)], (True, True), apply=False)


def test_fc_lopt() -> None:
    check("fc_lopt", [(6, 5), (4, 3, 2, 2), (3,)], (False, False), apply=False)


def test_rnn_fc_lopt_with_messages() -> None:
    check("rnn_fc_lopt", [(6, 5), (), (9,)], (False, True), gradient_clip=1.2)


def test_other_specifications() -> None:
    """All groups and three hidden layers; vectors without some columns, tanh and steps alone; few columns."""
    check("all", [(6, 5), (4, 3, 2), (5,)], (True, True))
    check("celo2 tanh", [(6, 5), (5,), ()], (False, False), steps_only=True)
    check("few", [(6, 5), (5,)], (False, False))


def test_several_tiles_give_the_same_bits_in_every_run() -> None:
    """3 x 2 tiles; a batch axis inside; many rows of a vector."""
    spec, shapes = SPECS["few"], [(150, 70), (18, 2, 17, 2), (4200,)]
    arrays = random_tensors(spec, shapes, "float32", apply=True)
    arguments = random_decays(spec), random_weights(spec, 3, (True, True))
    expected = Reference.element_mlp(spec, in_float64(arrays), *arguments)
    first, second = (run(spec, tensors_of(arrays), *arguments) for _ in range(2))
    assert_result_close(arrays_of(first), expected, arrays, "float32", "tiles")
    for a, b in zip(first.outputs, second.outputs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("moved", [True, False])
def test_statistics(moved: bool) -> None:
    spec = SPECS["rnn_fc_lopt"] if moved else ADAM_AVERAGES
    shapes = [*SHAPES[:4], (30, 9), SEVERAL_TILES]
    arrays = random_tensors(spec, shapes, "float32")
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


def test_statistics_of_refused_tensors() -> None:
    spec = SPECS["rnn_fc_lopt"]
    arrays = random_tensors(spec, [(6, 5), (7, 4), (9,)], "float32")
    decays = random_decays(spec)
    tensors = tensors_of(arrays)
    tensors.grads[1] = tensors.grads[1].T.contiguous().T  # not in the parameter's order in memory
    assert refusal(tensors.params[1], tensors.grads[1], tensors.states[1], spec) is not None
    expected = Reference.statistics(spec, in_float64(arrays), decays, 1.2)
    actual = kernels().statistics(spec, tensors, Decays(*map(to_torch, decays)), 1.2)
    for name, a, e in zip(actual._fields[:9], actual[:9], expected[:9], strict=True):
        assert_close(to_numpy(a), e, 1e-5, name)


@pytest.mark.parametrize("apply", [True, False])
def test_adam(apply: bool) -> None:
    shapes = [*SHAPES[:6], (30, 9), SEVERAL_TILES]
    arrays = random_tensors(ADAM_AVERAGES, shapes, "float32", apply=apply)
    scalars = random_scalars(len(shapes))
    expected = Reference.adam(in_float64(arrays), scalars, 1.2)
    actual = kernels().adam(tensors_of(arrays), AdamScalars(*map(to_torch, scalars)), 1.2)
    assert_result_close(arrays_of(actual), expected, arrays, "float32", "adam")


def test_other_orders_in_memory_and_what_is_refused() -> None:
    """Channels last with state in that order; all else through the definitions, in place as well."""
    spec = SPECS["celo"]
    shapes = [(4, 6, 3, 5), (12, 7), (5, 6)]
    arrays = random_tensors(spec, shapes, "float32", apply=True)
    tensors = tensors_of(arrays)

    def last(a: torch.Tensor, *order: int) -> torch.Tensor:
        return a.permute(order).contiguous().permute(np.argsort(order).tolist())

    tensors.params[0] = last(tensors.params[0], 0, 2, 3, 1)
    tensors.grads[0] = last(tensors.grads[0], 0, 2, 3, 1)
    tensors.states[0] = tensors.states[0]._replace(
        momentum=last(tensors.states[0].momentum, 0, 1, 3, 4, 2),
        second_moment=last(tensors.states[0].second_moment, 0, 1, 3, 4, 2),
        factored_column=last(tensors.states[0].factored_column, 0, 1, 3, 2),
    )
    tensors.grads[1] = last(tensors.grads[1], 1, 0)
    tensors.params[2] = torch.zeros(5, 12, device=target().device)[:, ::2].copy_(tensors.params[2])
    reasons = [refusal(*x, spec) for x in zip(tensors.params, tensors.grads, tensors.states, strict=True)]
    assert reasons[0] is None
    assert "gradient does not lie" in str(reasons[1])
    assert "gaps in memory" in str(reasons[2])
    stack = to_torch(np.ones((2, 2, 2)))
    assert "each matrix" in str(refusal(stack, stack, tensors.states[0], spec, True))
    arguments = random_decays(spec), random_weights(spec, 3, (True, True)), np.linspace(1.0, 2.0, 3)
    expected = Reference.element_mlp(spec, in_float64(arrays), *arguments)
    actual = run(spec, tensors, *arguments)
    assert all(a is b for a, b in zip(actual.outputs, tensors.params, strict=True))
    assert_result_close(arrays_of(actual), expected, arrays, "float32", "in place")
    found = kernels().statistics(spec, tensors_of(arrays), None)
    for a, e in zip(found, Reference.statistics(spec, in_float64(arrays), None), strict=True):
        if e is not None:
            assert_close(to_numpy(a), e, 1e-5)


def test_errors_come_before_anything_is_written() -> None:
    spec = SPECS["celo"]
    arrays = random_tensors(spec, [(5, 6), (4,)], "float32", apply=True)
    tensors, decays, weights = tensors_of(arrays), random_decays(spec), random_weights(spec, 2, (True, True))

    def fails(match: str, *arguments: Any) -> None:
        with pytest.raises(ValueError, match=match):
            run(spec, *arguments)

    fails("momentum has 2 numbers, expected 3", tensors, decays._replace(momentum=np.ones(2)), weights)
    fails(r"w\[0\] has shape \(3,", tensors, decays, random_weights(spec, 3, (True, True)))
    fails(r"w\[0\] has shape", tensors, decays, random_weights(SPECS["fc_lopt"], 2, (True, True)))
    fails("multiplier", tensors, decays, weights, np.ones(3))
    fails("there are no tensors", tensors.select([]), decays, random_weights(spec, 0, (False, False)))
    with pytest.raises(ValueError, match="beta1"):
        kernels().adam(tensors, AdamScalars(*map(to_torch, random_scalars(3))))
    for p, q in zip(tensors.params, arrays.params, strict=True):
        np.testing.assert_array_equal(to_numpy(p), q)


@pytest.mark.parametrize("name", ["celo", "rnn_fc_lopt", "nn_adam", "celo2"])
def test_learned_optimizer(name: str) -> None:
    check_learned_optimizer(name)


def test_state_moves_between_devices() -> None:
    check_state_moves("nn_adam")
