"""Persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021, arXiv 2112.13835), antithetic pairs.

An unroll of thousands of inner steps is cut into truncations, with one outer step after each. Plain evolution
strategies would only see the effect of theta within a truncation. PES draws a new perturbation in every
truncation, keeps the sum of all perturbations that an unroll has seen so far (the accumulator), and
correlates the loss with that sum: an unbiased estimate of the gradient of the whole unroll.

Where an unroll keeps one perturbation from its beginning to its end instead, that perturbation is the
accumulator and nothing is added to it (`reuse_noise` in train.py): "noise reuse" (Li et al. 2023, arXiv
2304.12180), the same formula with less variance, since a difference of losses is no longer multiplied by
perturbations that had little part in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Pytree: TypeAlias = Any


class PESEstimate(NamedTuple):
    """What `pes_gradient` returns."""

    loss: jax.Array
    """Scalar, the mean loss of both signs."""
    delta_losses: jax.Array
    """(truncation, pairs), the loss differences that were used."""
    gradient: Pytree
    """Like theta."""
    accumulator: Pytree
    """(pairs, ...) for each leaf: the sums of perturbations with which the next truncation starts."""


def sample_perturbations(key: jax.Array, theta: Pytree, pairs: int, std: float) -> Pytree:
    """(pairs, *shape) for each leaf of theta, normal with standard deviation `std`."""
    flat, unravel = ravel_pytree(theta)  # one draw for all leaves: far less to compile
    return jax.vmap(unravel)(std * jax.random.normal(key, (pairs, flat.size), flat.dtype))


def pes_gradient(
    positive_loss: jax.Array,
    negative_loss: jax.Array,
    is_done: jax.Array,
    mask: jax.Array,
    accumulator: Pytree,
    perturbation: Pytree,
    std: float,
    sign_delta_loss_scalar: float | None = None,
) -> PESEstimate:
    """Gradient estimate from one truncation of antithetic pairs (theta + perturbation, theta - perturbation).

    positive_loss, negative_loss: (truncation, pairs) inner losses. is_done: (truncation, pairs), the step at
    which an unroll ends; it and what follows belong to the next unroll, which has seen this truncation's
    perturbation only. mask: (truncation, pairs), False where no inner step was made (resets). accumulator,
    perturbation: leaves (pairs, ...). `sign_delta_loss_scalar` replaces the differences of a pair by their
    sign times that number.
    """
    delta = positive_loss - negative_loss
    counted = mask.astype(delta.dtype)
    if sign_delta_loss_scalar is not None:
        # A robust estimate: one vote for each pair, however large its difference.
        vote = jnp.sign(jnp.mean(delta * counted, axis=0)) * sign_delta_loss_scalar
        delta = jnp.broadcast_to(vote, delta.shape)
    finished = jnp.cumsum(is_done, axis=0) > 0
    steps = jnp.sum(counted, axis=0)
    last = jnp.sum(jnp.where(finished, 0.0, delta * counted), axis=0) / steps
    new = jnp.sum(jnp.where(finished, delta * counted, 0.0), axis=0) / steps
    summed = jax.tree.map(jnp.add, accumulator, perturbation)

    def leaf_gradient(seen_by_last: jax.Array, seen_by_new: jax.Array) -> jax.Array:
        each = _expand(last, seen_by_last) * seen_by_last + _expand(new, seen_by_new) * seen_by_new
        return jnp.mean(each, axis=0) / (2 * std**2)

    return PESEstimate(
        loss=jnp.mean(jnp.sum((positive_loss + negative_loss) * counted, axis=0) / steps) / 2,
        delta_losses=delta,
        gradient=jax.tree.map(leaf_gradient, summed, perturbation),
        accumulator=jax.tree.map(
            lambda a, new: jnp.where(_expand(finished[-1], a), new, a), summed, perturbation
        ),
    )


def _expand(x: jax.Array, like: jax.Array) -> jax.Array:
    """(pairs,) seen as (pairs, 1, ...) with the rank of `like`."""
    return jnp.reshape(x, x.shape + (1,) * (like.ndim - 1))
