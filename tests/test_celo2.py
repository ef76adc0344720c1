"""celo2 beyond its golden files: orthogonalisation, which tensors Adam moves, stacks of matrices, frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from trajectories import error, in_jax, in_torch, problem, run

from lopt_fast.architectures.base import Inputs
from lopt_fast.architectures.celo2 import Celo2
from lopt_fast.operations import ModelTensors, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.operations.orthogonalise import COEFFICIENTS, newton_schulz, unit_rms
from lopt_fast.published import FAMILIES
from lopt_fast.spec import SpecError


def updates(
    architecture: Celo2, shapes: list[tuple[int, ...]], names: list[str] | None = None, **more: Any
) -> list[np.ndarray]:
    """What the first step adds to each parameter."""
    params, grads = problem(shapes)
    states = [
        initial_state(architecture.accumulates(name, p.shape), p)
        for name, p in zip(names or [""] * len(params), params, strict=True)
    ]
    tensors = ModelTensors(
        params, grads[0], states, [1.0] * len(params), [0.0] * len(params), names=names or (), **more
    )
    theta = {name: a.astype(np.float64) for name, a in architecture.init_theta(1).items()}
    return architecture.step(Reference(), theta, tensors, {}, {}, Inputs(np.asarray(0), None, None)).outputs


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 3), (7, 1), (2, 3, 4), (3, 2, 6, 3)], ids=str)
@pytest.mark.parametrize("iterations", [1, 5])
def test_newton_schulz_keeps_singular_vectors_and_maps_singular_values(
    shape: tuple[int, ...], iterations: int
) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    u, values, v = np.linalg.svd(x, full_matrices=False)
    values = values / np.sqrt((values**2).sum(axis=-1, keepdims=True))
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        values = a * values + b * values**3 + c * values**5
    expected = (u * values[..., None, :]) @ v
    assert np.abs(newton_schulz(x, iterations=iterations, epsilon=0.0) - expected).max() <= 1e-12


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (3, 24, 48)], ids=str)
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    x = 1e-3 * np.random.default_rng(1).standard_normal(shape)
    values = np.linalg.svd(newton_schulz(x), compute_uv=False)
    assert values.min() >= 0.65
    assert values.max() <= 1.25


def test_newton_schulz_of_zeros_is_zero() -> None:
    assert np.array_equal(newton_schulz(np.zeros((3, 2))), np.zeros((3, 2)))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 5, 3), (2, 2, 3, 4)], ids=str)
def test_unit_rms_is_over_the_last_two_axes(shape: tuple[int, ...]) -> None:
    x = np.asarray(3.0 + np.random.default_rng(2).standard_normal(shape))
    found = unit_rms(x, epsilon=0.0)
    assert found.shape == shape
    squares = np.mean(found.reshape(*shape[:-2], -1) ** 2, axis=-1)
    assert np.abs(squares - 1.0).max() <= 1e-12
    assert np.array_equal(unit_rms(np.zeros(shape)), np.zeros(shape))


def test_which_tensors_adam_moves() -> None:
    default = Celo2()
    assert default.uses_adam("layer.bias", (3,))
    assert default.uses_adam("", ())
    assert default.uses_adam("model.embed_tokens.weight", (30, 4))
    assert not default.uses_adam("layer.weight", (3, 4))
    assert not default.uses_adam("", (3, 4))
    by_name = Celo2(adam_below_rank=0, adam_names="^head|b$")
    assert [by_name.uses_adam(n, (3, 4)) for n in ("head/w", "b", "body/w", "")] == [True, True, False, False]
    assert not by_name.uses_adam("scale", ())
    assert not Celo2(adam_below_rank=0, adam_names="").uses_adam("embed", ())


def test_state_is_that_of_what_moves_the_tensor() -> None:
    by_adam, by_network = Celo2().accumulates("b", (5,)), Celo2().accumulates("w", (5, 4))
    assert (by_adam.momenta, by_adam.second_moments, by_adam.factored_moments) == (1, 1, 0)
    assert (by_network.momenta, by_network.second_moments, by_network.factored_moments) == (3, 1, 3)


def test_tensors_do_not_depend_on_which_others_there_are_nor_on_their_order() -> None:
    shapes: list[tuple[int, ...]] = [(6, 4), (5,), (), (3, 3), (2, 3, 4)]
    architecture = Celo2(adam_names="first", weight_decay=0.1)
    params, grads = problem(shapes)
    expected = run(architecture, architecture.init_theta(), params, grads)
    for i in range(len(shapes)):
        alone = run(architecture, architecture.init_theta(), [params[i]], [[g[i]] for g in grads])
        assert error(alone, [[step[i]] for step in expected]) <= 1e-12


def test_a_stack_of_matrices_moves_as_its_matrices() -> None:
    params, grads = problem([(2, 4, 6)])
    theta = Celo2().init_theta()
    whole = run(Celo2(), theta, params, grads)
    parts = run(Celo2(), theta, list(params[0]), [list(g[0]) for g in grads])
    assert error(whole, [[np.stack(step)] for step in parts]) <= 1e-12


def test_size_of_steps() -> None:
    """The learning rate, times its factor for Adam's, whose first step is g (1 - beta1) / (|g| sqrt(1 - beta2))."""
    architecture = Celo2(step_mult=0.01, adam_mult=3.0, output_rms=0.5, adam_below_rank=2)
    matrix, stack, vector = updates(architecture, [(6, 4), (2, 3, 5), (8,)])
    assert abs(rms(matrix) - 0.005) <= 1e-9
    assert np.abs(np.sqrt((stack**2).mean(axis=(1, 2))) - 0.005).max() <= 1e-9
    gradient = problem([(6, 4), (2, 3, 5), (8,)])[1][0][2]
    expected = -0.03 * 0.1 * gradient / np.sqrt(0.05 * gradient**2 + 1e-8)
    assert np.abs(vector - expected).max() <= 1e-14
    corrected = updates(
        Celo2(step_mult=0.01, adam_mult=3.0, adam_bias_correction=True, adam_epsilon=0.0), [(8,)]
    )[0]
    assert np.abs(np.abs(corrected) - 0.03).max() <= 1e-14


def test_weight_decay_is_multiplied_by_the_learning_rate_of_its_tensor() -> None:
    shapes: list[tuple[int, ...]] = [(3, 4), (5,)]
    params = problem(shapes)[0]
    plain = updates(Celo2(step_mult=0.01, adam_mult=3.0), shapes)
    decayed = updates(Celo2(step_mult=0.01, adam_mult=3.0, weight_decay=0.2), shapes)
    for lr, p, before, after in zip((0.01, 0.03), params, plain, decayed, strict=True):
        assert np.abs(after - (before - lr * 0.2 * p)).max() <= 1e-15


def test_names_decide() -> None:
    shapes: list[tuple[int, ...]] = [(3, 4), (3, 4)]
    network, adam = updates(Celo2(step_mult=0.01), shapes, ["body", "embed"])
    assert abs(rms(network) - 0.01) <= 1e-9
    assert abs(rms(adam) - 0.01) > 0.01


def test_torch_in_float32() -> None:
    architecture, (params, grads) = Celo2(), problem([(6, 4), (), (5,), (2, 3, 3, 2)])
    theta = architecture.init_theta()
    expected = run(architecture, theta, params, grads)
    assert error(in_torch(architecture, theta, params, grads), expected) <= 2e-5


@pytest.mark.parametrize(
    "fields",
    [{}, {"bias_correction": True, "precondition_output": True, "activation": "tanh", "adam_below_rank": 0}],
    ids=["default", "variant"],
)
def test_jax_in_float32_compiled(fields: dict[str, Any]) -> None:
    architecture, (params, grads) = (
        Celo2(hidden_size=3, hidden_layers=1, **fields),
        problem([(4, 3), (5,)]),
    )
    theta = architecture.init_theta()
    expected = run(architecture, theta, params, grads)
    assert error(in_jax(architecture, theta, params, grads), expected) <= 5e-5
    assert error(in_torch(architecture, theta, params, grads), expected) <= 5e-5


def test_hyperparameters_and_initial_theta() -> None:
    architecture = Celo2(newton_schulz_coefficients=(2.0, -1.5, 0.5), adam_names="in|out")
    assert Celo2.from_dict(architecture.to_dict()) == architecture
    theta = architecture.init_theta(3)
    architecture.check_theta(theta)
    assert {name: a.shape for name, a in theta.items()} == {
        "w0": (30, 8), "b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 3), "b2": (3,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"adam_names": "("}, "adam_names='\\('"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0"),
        ({"adam_below_rank": -1}, "adam_below_rank=-1"),
        ({"rms_decays": (0.9, 0.99)}, "2 rms_decays"),
        ({"newton_schulz_coefficients": (1.0, 2.0)}, "newton_schulz_coefficients"),
        ({"newton_schulz_iterations": 0}, "newton_schulz_iterations=0"),
        ({"scale": "rms"}, "scale='rms'"),
    ],
)
def test_unusable_hyperparameters_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Celo2(**fields)


@pytest.mark.parametrize(
    "given", [{"normalize_input": False}, {"with_m": False}, {"no_such_thing": 1}], ids=str
)
def test_unsupported_arguments_of_published_weights_are_named(given: dict[str, Any]) -> None:
    for family in ("celo2", "celo2_optax"):
        with pytest.raises(SpecError, match=next(iter(given))):
            FAMILIES[family](given, {})
