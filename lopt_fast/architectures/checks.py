"""Checks of hyperparameters, for `__post_init__`: SpecError names the architecture, the field and its value."""

from __future__ import annotations

import math

from ..spec import SpecError
from .base import Architecture


def check_sizes(architecture: Architecture, *names: str) -> None:
    """Raise SpecError unless these hyperparameters are positive integers."""
    for name in names:
        value = getattr(architecture, name)
        if type(value) is not int or value < 1:
            raise SpecError(f"{architecture.NAME}: {name}={value!r} must be a positive integer")


def check_flags(architecture: Architecture, *names: str) -> None:
    """Raise SpecError unless these hyperparameters are True or False."""
    for name in names:
        value = getattr(architecture, name)
        if not isinstance(value, bool):
            raise SpecError(f"{architecture.NAME}: {name}={value!r} must be True or False")


def check_numbers(architecture: Architecture, *names: str) -> None:
    """Raise SpecError unless these hyperparameters are finite numbers; integers become floats."""
    for name in names:
        value = getattr(architecture, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SpecError(f"{architecture.NAME}: {name}={value!r} must be a finite number")
        object.__setattr__(architecture, name, float(value))


def check_decays(architecture: Architecture, name: str) -> None:
    """Raise SpecError unless this hyperparameter is a tuple of decays; integers become floats."""
    decays = tuple(float(b) for b in getattr(architecture, name))
    if not decays or not all(0.0 <= b < 1.0 for b in decays):
        raise SpecError(
            f"{architecture.NAME}: {name}={decays}: give at least one decay, each from 0 to below 1"
        )
    object.__setattr__(architecture, name, decays)


def check_range(architecture: Architecture, low: float, below: float, *names: str) -> None:
    """Raise SpecError unless these hyperparameters are numbers from `low` to below `below`. Traced ones pass."""
    for name in names:
        value = getattr(architecture, name)
        if isinstance(value, (bool, str)) or value is None:
            raise SpecError(f"{architecture.NAME}: {name}={value!r} must be a number")
        if isinstance(value, (int, float)) and not low <= value < below:
            raise SpecError(f"{architecture.NAME}: {name}={value} must be from {low:g} to below {below:g}")
