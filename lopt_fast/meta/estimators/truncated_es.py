"""Evolution strategies within truncations: what Vicol et al. 2021 (arXiv 2112.13835, Algorithm 1) compare PES with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Estimator


@dataclass(frozen=True)
class TruncatedES(Estimator):
    """A new perturbation in every truncation, and no memory of those before.

    Sees the effect of theta on the losses of the same truncation only: the least variance, biased towards short
    horizons.
    """

    name: ClassVar[str] = "truncated_es"
    resets_inside: ClassVar[bool] = True
