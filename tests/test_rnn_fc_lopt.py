"""What is special about rnn_fc_lopt: the loss, the bound on the gradient, messages between tensors and parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lopt_fast.architectures.base import Inputs, Update
from lopt_fast.architectures.conditioned import TENSOR_FEATURES, Observed, axis_features
from lopt_fast.architectures.rnn_fc_lopt import RnnFcLopt
from lopt_fast.operations import ModelTensors, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.published import FAMILIES
from lopt_fast.spec import SpecError

SMALL = RnnFcLopt(hidden_size=6, lstm_size=7, messages=3, summary=4, conditioning=5, decays=(0.5, 0.9))


def random_theta(architecture: RnnFcLopt) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: 0.3 * rng.standard_normal(shape) for name, shape in architecture.theta_shapes.items()}


def tensors_of(
    architecture: RnnFcLopt, *shapes: tuple[int, ...], grad_scale: float = 1.0, seed: int = 0
) -> ModelTensors:
    rng = np.random.default_rng(seed)
    params = [np.asarray(rng.standard_normal(s)) for s in shapes]
    grads = [np.asarray(rng.standard_normal(s)) for s in shapes]
    states = [initial_state(architecture.mlp, p) for p in params]
    return ModelTensors(
        params, grads, states, [1.0] * len(shapes), [0.0] * len(shapes), grad_scale=grad_scale
    )


def observe(
    architecture: RnnFcLopt,
    tensors: ModelTensors,
    t: int = 0,
    loss: float = 1.0,
    validations: tuple[float, ...] = (),
) -> tuple[Observed, dict[str, np.ndarray]]:
    theta = random_theta(architecture)
    shared = architecture.init_shared(theta)
    for value in validations:
        shared = architecture.observe_validation(theta, shared, np.asarray(value))
    inputs = Inputs(np.asarray(t), None, np.asarray(loss))
    return architecture.observe(Reference, theta, tensors, shared, inputs)


def step(architecture: RnnFcLopt, tensors: ModelTensors, theta: dict[str, np.ndarray]) -> Update:
    rows = architecture.init_rows(theta, [p.shape for p in tensors.params])
    inputs = Inputs(np.asarray(0), None, np.asarray(1.0))
    return architecture.step(Reference, theta, tensors, rows, architecture.init_shared(theta), inputs)


def test_gradient_is_bounded_by_ten_times_its_usual_size() -> None:
    """Which is 1 at first."""
    tensors = tensors_of(SMALL, (4, 3), (5,))
    observed, shared = observe(SMALL, tensors)
    assert observed.gradient_clip == pytest.approx(10.0)
    mean_square = sum(np.mean(g**2) for g in tensors.grads) / 2
    assert shared["gradient_scale"] == pytest.approx(0.99 * 0.01 + 0.01 * math.sqrt(mean_square + 1e-8))
    _, after_spike = observe(SMALL, tensors_of(SMALL, (4, 3), (5,), grad_scale=1e9))
    assert after_spike["gradient_scale"] == pytest.approx(0.99 * 0.01 + 0.01 * 10.0)

    a, b = (step(SMALL, tensors_of(SMALL, (4, 3), grad_scale=s), random_theta(SMALL)) for s in (1e9, 1e12))
    np.testing.assert_array_equal(a.outputs[0], b.outputs[0])


def test_validation_moves_its_mean_and_the_clock_alone() -> None:
    theta = random_theta(SMALL)
    before = SMALL.init_shared(theta)
    after = SMALL.observe_validation(theta, before, np.asarray(3.0))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        "valid_loss_mean", "valid_losses",
    }  # fmt: skip
    tensors = tensors_of(SMALL, (4, 3))
    without, _ = observe(SMALL, tensors, t=2)
    with_two, _ = observe(SMALL, tensors, t=2, validations=(3.0, 4.0))
    later, _ = observe(SMALL, tensors, t=4)
    np.testing.assert_array_equal(with_two.constants, later.constants)
    assert not np.array_equal(with_two.constants, without.constants)


def test_validation_loss_is_measured_on_the_scale_of_the_training_loss() -> None:
    """In the first step: mean l / 10 and variance (9 l / 10)^2 / 10, both corrected by a factor of 10."""
    place = TENSOR_FEATURES.index("valid_loss")
    observed, _ = observe(SMALL, tensors_of(SMALL, (4, 3), (2,)), loss=2.0, validations=(3.0, 3.0))
    np.testing.assert_allclose(observed.features[:, place], (3.0 - 2.0) / 1.8, rtol=1e-5)
    observed, _ = observe(SMALL, tensors_of(SMALL, (4, 3), (2,)), loss=2.0)
    np.testing.assert_allclose(observed.features[:, place], -2.0 / 1.8, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((), (1, 1, 1, 1)),
        ((7,), (7, 1, 1, 1)),
        ((5, 6), (5, 6, 1, 1)),
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        ((2, 3, 4, 5, 6, 7), (2, 3, 4, 5 * 6 * 7)),
    ],
)
def test_axes_behind_the_third_are_one(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    np.testing.assert_allclose(axis_features(shape), np.log(sizes) - 1.0)


def test_features_of_a_tensor() -> None:
    """Against their formulas, computed from all elements at once."""
    tensors = tensors_of(SMALL, (), (4, 3))
    observed, _ = observe(SMALL, tensors)
    p, g = tensors.params[1], tensors.grads[1]
    decays = np.array(SMALL.decays).reshape(-1, 1, 1)
    m, v = (1 - decays) * g, (1 - decays) * g**2
    expected = {
        "gradient_norm": np.linalg.norm(g), "parameter_norm": np.linalg.norm(p), "momentum_mean": m.mean(),
        "second_moment_mean": v.mean(), "parameter_mean": p.mean(), "momentum_variance": m.var(),
        "second_moment_variance": v.var(), "parameter_variance": p.var(),
    }  # fmt: skip
    found = dict(zip(TENSOR_FEATURES, observed.features[1], strict=True))
    for name, value in expected.items():
        assert found[name] == pytest.approx(np.clip(np.log(1e-8 + abs(value)), -5, 5)), name
    signs = {
        "momentum_sign": m.mean(),
        "parameter_sign": p.mean(),
        "second_moment_sign": 1.0,
        "is_scalar": -1.0,
    }
    assert {name: found[name] for name in signs} == {name: np.sign(x) for name, x in signs.items()}
    assert observed.features[0, TENSOR_FEATURES.index("is_scalar")] == 1.0
    np.testing.assert_allclose(
        observed.constants[1, -3:], [math.log(2) - 1, math.log(np.linalg.norm(p) + 1e-8), math.log(12)]
    )


def second_of_two(theta: dict[str, np.ndarray], seed: int) -> list[np.ndarray]:
    """Steps of a tensor beside which there is another one that depends on the seed."""
    other, one = tensors_of(SMALL, (4, 3), seed=seed), tensors_of(SMALL, (2,))
    params, grads = [*other.params, *one.params], [*other.grads, *one.grads]
    states = [*other.states, *one.states]
    rows, shared = SMALL.init_rows(theta, [(4, 3), (2,)]), SMALL.init_shared(theta)
    steps = []
    for t in range(2):
        tensors = ModelTensors(params, grads, states, [1.0] * 2, [0.0] * 2)
        inputs = Inputs(np.asarray(t), None, np.asarray(1.0))
        outputs, states, rows, shared = SMALL.step(Reference, theta, tensors, rows, shared, inputs)
        steps.append(outputs[1])
    return steps


def test_tensors_hear_of_each_other_in_the_next_step() -> None:
    """Through the summary alone, and of their own parameters through messages."""
    theta = random_theta(SMALL)
    (first, second), (same, different) = second_of_two(theta, 1), second_of_two(theta, 2)
    np.testing.assert_array_equal(first, same)
    assert np.abs(second - different).max() > 1e-6 * np.abs(second).max()
    deaf = theta | {"summary_w": np.zeros_like(theta["summary_w"])}
    np.testing.assert_array_equal(second_of_two(deaf, 1)[1], second_of_two(deaf, 2)[1])
    mute = theta | {"w2": np.concatenate([theta["w2"][:, :2], 0 * theta["w2"][:, 2:]], axis=1)}
    first_mute, second_mute = second_of_two(mute, 1)
    np.testing.assert_allclose(first_mute, first, rtol=1e-12)
    assert np.abs(second - second_mute).max() > 1e-6 * np.abs(second).max()


def test_without_messages() -> None:
    silent = RnnFcLopt(hidden_size=6, lstm_size=7, messages=0)
    update = step(silent, tensors_of(silent, (4, 3)), random_theta(silent))
    assert np.isfinite(update.outputs[0]).all()
    assert update.rows["messages"].shape == (1, 0)


@pytest.mark.parametrize(
    ("bad", "culprit"),
    [
        ({"messages": -1}, "messages=-1"),
        ({"conditioning": 0}, "conditioning=0"),
        ({"lstm_size": 2.0}, "lstm_size=2.0"),
        ({"decays": []}, "decays"),
        ({"widht": 3}, "widht"),
    ],
)
def test_unusable_hyperparameters_are_named(bad: dict[str, object], culprit: str) -> None:
    with pytest.raises(SpecError, match=culprit):
        RnnFcLopt.from_dict(bad)


@pytest.mark.parametrize("family", ["mlp", "rnn", "nnadam"])
def test_published_weights_that_lack_an_array(family: str) -> None:
    with pytest.raises(SpecError, match="no array '"):
        FAMILIES[family]({}, {})
