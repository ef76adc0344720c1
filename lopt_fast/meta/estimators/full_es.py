"""Evolution strategies over whole unrolls: antithetic pairs as in Salimans et al. 2017 (arXiv 1703.03864)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Estimator


@dataclass(frozen=True)
class FullES(Estimator):
    """One perturbation, one whole unroll, one estimate: the mean loss of the unroll's own steps times the perturbation.

    Unbiased, at the price of one outer step for each unroll, however long.
    """

    name: ClassVar[str] = "full_es"
    whole_unroll: ClassVar[bool] = True
