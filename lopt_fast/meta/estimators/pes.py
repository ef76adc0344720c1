"""Persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021, arXiv 2112.13835, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from .base import (
    Estimate,
    Estimator,
    Key,
    Pytree,
    Truncation,
    correlate,
    expand,
    loss_differences,
    mean_loss,
    mean_over_steps,
)


@dataclass(frozen=True)
class PES(Estimator):
    """A new perturbation in every truncation; the loss is correlated with the sum of all that an unroll has seen.

    Plain evolution strategies would only see the effect of theta within a truncation. This estimates the gradient
    of the whole unroll without bias; its variance grows with the number of truncations. Memory: the sum.
    """

    name: ClassVar[str] = "pes"
    resets_inside: ClassVar[bool] = True

    def init(self, keys: Key, theta: Pytree) -> Pytree:
        return jax.tree.map(lambda x: jnp.zeros((keys.shape[0], *x.shape), x.dtype), theta)

    def estimate(self, truncation: Truncation, memory: Pytree, perturbation: Pytree) -> Estimate:
        delta = loss_differences(truncation, self.sign)
        finished = jnp.cumsum(truncation.is_done, axis=0) > 0
        summed = jax.tree.map(jnp.add, memory, perturbation)
        by_last = correlate(mean_over_steps(delta, truncation, ~finished), summed, self.std)
        by_new = correlate(mean_over_steps(delta, truncation, finished), perturbation, self.std)
        return Estimate(
            loss=mean_loss(truncation),
            delta_losses=delta,
            gradient=jax.tree.map(jnp.add, by_last, by_new),
            memory=jax.tree.map(
                lambda old, new: jnp.where(expand(finished[-1], old), new, old), summed, perturbation
            ),
        )
