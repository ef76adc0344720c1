"""What is special about nn_adam: how its network moves Adam's hyperparameters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lopt_fast.architectures.base import Inputs
from lopt_fast.architectures.nn_adam import CONTROLS, NNAdam
from lopt_fast.operations import ModelTensors, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.operations.adam import ADAM_AVERAGES
from lopt_fast.spec import SpecError

Theta = dict[str, np.ndarray]
SHAPES = ((4, 3), (), (5,))


def initial(architecture: NNAdam) -> Theta:
    return {name: a.astype(np.float64) for name, a in architecture.init_theta().items()}


def run(
    architecture: NNAdam, theta: Theta, steps: int
) -> tuple[list[list[np.ndarray]], dict[str, np.ndarray]]:
    """(what each step adds to each parameter, rows after the last)."""
    rng = np.random.default_rng(0)
    params = [np.asarray(rng.standard_normal(s)) for s in SHAPES]
    states = [initial_state(ADAM_AVERAGES, p) for p in params]
    rows = architecture.init_rows(theta, SHAPES)
    added = []
    for t in range(steps):
        tensors = ModelTensors(
            params, [np.asarray(rng.standard_normal(s)) for s in SHAPES], states, [1.0] * 3, [0.0] * 3
        )
        outputs, states, rows, _ = architecture.step(
            Reference, theta, tensors, rows, {}, Inputs(np.asarray(t), None, None)
        )
        params = [p + delta for p, delta in zip(params, outputs, strict=True)]
        added.append(outputs)
    return added, rows


def test_begins_as_adam_without_bias_correction() -> None:
    architecture = NNAdam(initial_lr=0.01, initial_beta1=0.8, initial_beta2=0.9, initial_epsilon=1e-3)
    added, _ = run(architecture, initial(architecture), 3)
    rng = np.random.default_rng(0)
    for s in SHAPES:
        rng.standard_normal(s)
    m, v = ([np.zeros(s) for s in SHAPES] for _ in range(2))
    for outputs in added:
        g = [rng.standard_normal(s) for s in SHAPES]
        m = [0.8 * a + 0.2 * x for a, x in zip(m, g, strict=True)]
        v = [0.9 * a + 0.1 * x**2 for a, x in zip(v, g, strict=True)]
        for a, b, delta in zip(m, v, outputs, strict=True):
            expected = -0.01 * (1 + 1e-3) * a / (1e-3 + np.sqrt(b + 1e-10))
            np.testing.assert_allclose(delta, expected, rtol=1e-5)  # hyperparameters are stored in float32


def test_new_values_act_from_the_next_step() -> None:
    architecture = NNAdam()
    theta = initial(architecture)
    moved = theta | {"controls_b": np.array([1.0, 0.5, -0.5, 2.0])}
    (first, second), rows = run(architecture, theta, 2)
    (moved_first, moved_second), moved_rows = run(architecture, moved, 2)
    for a, b in zip(first, moved_first, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(
        np.abs(a - b).max() > 1e-3 * np.abs(a).max() for a, b in zip(second, moved_second, strict=True)
    )
    for name, change in zip(CONTROLS, moved["controls_b"], strict=True):
        np.testing.assert_allclose(moved_rows[name] - rows[name], 2 * 0.01 * change, rtol=1e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_hyperparameters_stay_within_bounds(sign: float) -> None:
    architecture = NNAdam(output_scale=1.0)
    theta = initial(architecture) | {"controls_b": np.full(4, sign * 1e6)}
    added, rows = run(architecture, theta, 2)
    bounds = {
        "lr": (1e-8, 1e3),
        "beta1": (math.exp(-10), 1),
        "beta2": (math.exp(-10), 1),
        "epsilon": (1e-11, 1e4),
    }
    for name, (low, high) in bounds.items():
        np.testing.assert_allclose(np.exp(10 * rows[name]), high if sign > 0 else low, rtol=1e-9)
    assert all(np.isfinite(delta).all() for outputs in added for delta in outputs)


def test_decay_pulls_towards_the_initial_values() -> None:
    theta = initial(NNAdam()) | {"controls_b": np.ones(4)}
    for strength, left in ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0)):
        _, rows = run(NNAdam(decay_strength=strength), theta, 1)
        for name in CONTROLS:
            np.testing.assert_allclose(rows[name] - theta[name], 0.01 * left, atol=1e-12)


@pytest.mark.parametrize(
    ("bad", "culprit"),
    [
        ({"lstm_size": 0}, "lstm_size=0"),
        ({"initial_lr": 0.0}, "initial_lr=0.0"),
        ({"initial_beta2": 1.0}, "initial_beta2=1.0"),
        ({"output_scale": "much"}, "output_scale='much'"),
    ],
)
def test_unusable_hyperparameters_are_named(bad: dict[str, object], culprit: str) -> None:
    with pytest.raises(SpecError, match=culprit):
        NNAdam.from_dict(bad)
