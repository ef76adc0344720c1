"""Meta-parameters that others have published: their names and hyperparameters as ours.

A family is one published implementation of an architecture. Its reader takes the constructor arguments that were
passed and the arrays by their paths, and returns (architecture, meta-parameters by the names of `theta_shapes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..architectures.base import Architecture
from . import hyper

Leaves = Mapping[str, np.ndarray]
Reader = Callable[[Mapping[str, Any], Leaves], tuple[Architecture, dict[str, np.ndarray]]]

FAMILIES: dict[str, Reader] = {
    "celo": hyper.celo,
}
"""By the name of the family in golden files."""
