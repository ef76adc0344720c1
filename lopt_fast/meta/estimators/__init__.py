"""Gradient estimators, by name. A new one is a file with a subclass of `Estimator`, and a row in `ESTIMATORS`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .base import Estimate, Estimator, EstimatorError, Truncation
from .full_es import FullES
from .noise_reuse import NoiseReuse
from .pes import PES
from .truncated_es import TruncatedES

ESTIMATORS: dict[str, type[Estimator]] = {
    "full_es": FullES,
    "truncated_es": TruncatedES,
    "pes": PES,
    "nres": NoiseReuse,
    "es_single": NoiseReuse,  # another paper's name
}


def make(name: str, std: float = 0.01, sign: float | None = None, **options: Any) -> Estimator:
    """The estimator called `name`. Raises EstimatorError for an unknown name, option or value."""
    if name not in ESTIMATORS:
        raise EstimatorError(f"estimator {name!r}: must be one of {', '.join(ESTIMATORS)}")
    kind = ESTIMATORS[name]
    known = [f.name for f in fields(kind)]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise EstimatorError(f"estimator {name}: unknown options {unknown}; known are {', '.join(known)}")
    return kind(std=std, sign=sign, **options)


__all__ = [
    "ESTIMATORS",
    "PES",
    "Estimate",
    "Estimator",
    "EstimatorError",
    "FullES",
    "NoiseReuse",
    "TruncatedES",
    "Truncation",
    "make",
]
