"""small_fc_lopt: the per-parameter MLP of Metz et al. 2022 (arXiv 2203.11860), Appendix A.

Per parameter: 39 columns (gradient, parameter, three momenta, a second moment, their ratios, AdaFactor's factored
second moments, eleven time columns) -> 4 -> 4 -> [direction, magnitude]; 197 meta-parameters, the decays included.
No network at the tensor level. Operations used: `small_fc_lopt` (statistics, apply).
"""

from __future__ import annotations

import math

import numpy as np

from ..spec import Spec

NAME = Spec.NAME


def spec(**overrides: object) -> Spec:
    """The paper's configuration, with any field of `Spec` overridden. Raises SpecError for unusable values."""
    return Spec.from_dict(overrides)


def init_theta(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial meta-parameters, float32: weights normal with standard deviation 1/sqrt(inputs), truncated at two
    standard deviations; biases and decay offsets zero."""
    rng = np.random.default_rng(seed)
    theta: dict[str, np.ndarray] = {}
    for name, shape in spec.theta_shapes.items():
        if name.startswith("w"):
            draws = rng.standard_normal(shape)
            while (outside := np.abs(draws) > 2.0).any():
                draws[outside] = rng.standard_normal(int(outside.sum()))
            theta[name] = (draws / math.sqrt(shape[0])).astype(np.float32)
        else:
            theta[name] = np.zeros(shape, np.float32)
    return theta
