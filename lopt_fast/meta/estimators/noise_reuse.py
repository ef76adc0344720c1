"""Noise reuse: NRES (Li et al. 2023, arXiv 2304.12180), found at the same time as ES-Single (Vicol, Kolter and
Swersky 2023, arXiv 2304.11153).

Two papers, one estimator: a perturbation is kept for a whole unroll, and the losses of every truncation are
correlated with it. As with all estimators of this package the mean over the steps of a truncation is taken. Where an
unroll ends inside a truncation, NRES draws anew at that step; here unrolls with this estimator end between truncations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Estimator, Key, Pytree, sample_perturbations


@dataclass(frozen=True)
class NoiseReuse(Estimator):
    """One perturbation for an unroll, from its first step to its last.

    Unbiased for the whole unroll as PES is. The estimate of one truncation varies less, since a loss is not multiplied
    by perturbations that had little part in it; the estimates of an unroll's truncations depend more on each other,
    all being along one direction: their mean is that of full_es. So unrolls should be spread over the horizon, as the
    outer loop does. Memory: the perturbation.
    """

    name: ClassVar[str] = "nres"

    def init(self, keys: Key, theta: Pytree) -> Pytree:
        return sample_perturbations(keys, theta, self.std)

    def perturb(self, keys: Key, theta: Pytree, memory: Pytree) -> Pytree:
        return memory
