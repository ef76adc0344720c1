"""Optimizers designed by hand under the interface of learned ones: no meta-parameters.

Each has a `learning_rate`, which the one of the framework multiplies: leave that at 1, or give it a schedule. A
`weight_decay` here is decoupled and multiplied by `learning_rate`; the framework's is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from ..namespace import array_namespace
from ..operations import ModelTensors
from ..operations.constants import constant
from ..reference import Array
from .base import Architecture


@dataclass(frozen=True)
class Baseline(Architecture):
    """Base class. Type and device of what is computed are those of the parameters, as there is no theta to ask."""

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        return {}


def zeros(tensors: ModelTensors) -> Array:
    """(tensors,) in the widest type of the parameters, float32 at least, where the first of them lies."""
    first = tensors.params[0]
    xp = array_namespace(first)
    widest = xp.result_type(xp.float32, *{p.dtype for p in tensors.params})
    return xp.zeros((len(tensors),), dtype=widest, device=device(first))


def as_scalar(value: Any, like: Array) -> Array:
    """() in the library, type and device of `like`; `value` may be a number or an array, traced or not."""
    return constant(value, like)
