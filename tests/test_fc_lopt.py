"""fc_lopt against its formula written out: one input for each column, time included."""

from __future__ import annotations

import numpy as np
import pytest

from lopt_fast.architectures.base import Inputs
from lopt_fast.architectures.fc_lopt import FcLopt
from lopt_fast.operations import ModelTensors, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.spec import SpecError


def test_step_is_the_formula() -> None:
    architecture = FcLopt(hidden_size=5, step_mult=0.1, exp_mult=0.5)
    rng = np.random.default_rng(0)
    theta = {name: rng.standard_normal(shape) for name, shape in architecture.theta_shapes.items()}
    p, decays = rng.standard_normal(6), np.array(architecture.momentum_decays)
    state, m = initial_state(architecture.mlp, p), np.zeros((6, 6))
    for t in range(3):
        g = rng.standard_normal(6)
        tensors = ModelTensors([p], [g], [state], [1.0], [0.0])
        update = architecture.step(Reference, theta, tensors, {}, {}, Inputs(np.asarray(t), None, None))

        m = decays * m + (1 - decays) * g[:, None]
        columns = np.concatenate([g[:, None], p[:, None], m], axis=1)
        columns = columns / np.sqrt((columns**2).mean(axis=0) + 1e-5)
        scales = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])
        x = np.concatenate([columns, np.tile(np.tanh(t / scales - 1), (6, 1))], axis=1)
        x = np.maximum(x @ np.concatenate([theta["w0"], theta["w0_time"]]) + theta["b0"], 0)
        x = np.maximum(x @ theta["w1"] + theta["b1"], 0)
        direction, magnitude = (x @ theta["w2"] + theta["b2"]).T
        np.testing.assert_allclose(update.outputs[0], -0.1 * direction * np.exp(0.5 * magnitude), rtol=1e-11)

        p, state = p + update.outputs[0], update.states[0]


@pytest.mark.parametrize(
    ("bad", "culprit"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_layers": 1.5}, "hidden_layers=1.5"),
        ({"momentum_decays": [0.9, 1.0]}, "momentum_decays"),
        ({"step_mult": float("nan")}, "step_mult=nan"),
    ],
)
def test_unusable_hyperparameters_are_named(bad: dict[str, object], culprit: str) -> None:
    with pytest.raises(SpecError, match=culprit):
        FcLopt.from_dict(bad)
