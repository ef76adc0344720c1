"""NAdamW of google/learned_optimization (`optimizers/nadamw.py`, `learning_rate_schedules.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..architectures.nadamw import NAdamW
from ..spec import SpecError
from .arguments import configured

_NAMES = {
    "learning_rate": "learning_rate",
    "beta1": "beta1",
    "beta2": "beta2",
    "epsilon": "epsilon",
    "use_nesterov": "nesterov",
    "use_bias_correction": None,  # always on there
    "adamw_weight_decay": "weight_decay",
    "l2_weight_decay": "l2",
}
_SCHEDULE = {
    "min_learning_rate_mult": "final_fraction",
    "constant_fraction": "constant_fraction",
    "warmup_fraction": "warmup_fraction",
}
_COSINE = "CosineLearningRateSchedule"


def nadamw(
    given: Mapping[str, Any], leaves: Mapping[str, np.ndarray]
) -> tuple[NAdamW, dict[str, np.ndarray]]:
    """NAdamW with a learning rate, or ``{"CosineLearningRateSchedule": {its arguments}}`` in its place."""
    given = {"learning_rate": 1e-4, **given}
    rate = given["learning_rate"]
    if not isinstance(rate, Mapping):
        return configured(NAdamW, given, _NAMES, published_quirks=True), {}
    if set(rate) != {_COSINE}:
        raise SpecError(f"{NAdamW.NAME}: learning-rate schedules {sorted(rate)}; known is {_COSINE}")
    defaults = {"min_learning_rate_mult": 0.0, "constant_fraction": 0.5, "warmup_fraction": 0.01}
    given = {**given, **defaults, **rate[_COSINE]}
    return configured(NAdamW, given, {**_NAMES, **_SCHEDULE}, published_quirks=True), {}
