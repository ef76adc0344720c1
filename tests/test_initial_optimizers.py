"""Optimizers with an MLP for every parameter are usable before meta-training: they follow momentum."""

from __future__ import annotations

import numpy as np
import pytest
from trajectories import STEPS, run

from lopt_fast.architectures import ARCHITECTURES, Architecture

FOLLOW = {
    "fc_lopt": {},
    "rnn_fc_lopt": {"lstm_size": 8},
    "recurrent_transformer": {},
    "celo": {"lstm_size": 8},
}


@pytest.mark.parametrize("name", FOLLOW)
@pytest.mark.parametrize("seed", [0, 1])
def test_first_steps_follow_the_gradient(name: str, seed: int) -> None:
    architecture = ARCHITECTURES[name].from_dict(FOLLOW[name])
    assert isinstance(architecture, Architecture)
    rng = np.random.default_rng(seed)
    params = [rng.standard_normal((6, 5)), rng.standard_normal(7)]
    gradient = [rng.standard_normal(p.shape) for p in params]
    steps = run(architecture, architecture.init_theta(seed), params, [gradient] * STEPS)
    for step in steps:
        for moved, g in zip(step, gradient, strict=True):
            cosine = -np.sum(moved * g) / np.sqrt(np.sum(moved**2) * np.sum(g**2))
            assert cosine > 0.5
