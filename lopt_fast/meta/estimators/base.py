"""The interface of gradient estimators.

An unroll is cut into truncations, with one outer step after each. In every truncation `pairs` antithetic pairs
(theta + perturbation, theta - perturbation) train on common data from common initial networks, and the estimator
turns the differences of their losses into a gradient for theta. What it has to remember about a pair from one
truncation to the next is its memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ...errors import UserError

Pytree: TypeAlias = Any
Key: TypeAlias = jax.Array


class EstimatorError(UserError, ValueError):
    """An estimator that cannot be used as asked; names the culprit and the remedy."""


class Truncation(NamedTuple):
    """What the pairs saw in one truncation; leaves (steps, pairs)."""

    positive_loss: jax.Array
    negative_loss: jax.Array
    is_done: jax.Array
    """The step at which an unroll ends; it and what follows count for the next unroll, which has seen this
    truncation's perturbation only. All False where unrolls end between truncations only."""
    mask: jax.Array
    """False where no inner step was made."""


class Estimate(NamedTuple):
    """What one truncation says about theta."""

    loss: jax.Array
    """Scalar, the mean loss of both signs, over pairs."""
    delta_losses: jax.Array
    """(steps, pairs), the loss differences that were used."""
    gradient: Pytree
    """Like theta: the mean over pairs."""
    memory: Pytree
    """(pairs, ...) for each leaf."""


@dataclass(frozen=True)
class Estimator:
    """Plain evolution strategies: a new perturbation in every truncation, no memory. Subclasses replace what they
    do in another way.

    `std`: standard deviation of the perturbations. `sign`: None, or what the differences of a pair are replaced
    by, times their sign (one vote for each pair, however large its difference).

    Raises EstimatorError for a `std` or `sign` that is not positive.
    """

    std: float = 0.01
    sign: float | None = None

    name: ClassVar[str]
    whole_unroll: ClassVar[bool] = False
    """Whether a truncation is always a whole unroll, from its first step to its last."""
    resets_inside: ClassVar[bool] = False
    """Whether an unroll may end inside a truncation."""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise EstimatorError(f"std={self.std}: must be positive")
        if self.sign is not None and not self.sign > 0:
            raise EstimatorError(f"sign={self.sign}: must be positive, or left out")

    def init(self, keys: Key, theta: Pytree) -> Pytree:
        """Memory of pairs at the start of an unroll. keys: (pairs,)."""
        return ()

    def perturb(self, keys: Key, theta: Pytree, memory: Pytree) -> Pytree:
        """Perturbations for the next truncation, (pairs, ...) for each leaf of theta. keys: (pairs,)."""
        return sample_perturbations(keys, theta, self.std)

    def estimate(self, truncation: Truncation, memory: Pytree, perturbation: Pytree) -> Estimate:
        """Gradient from what `perturbation` led to; in expectation that of the mean loss over the steps made."""
        delta = loss_differences(truncation, self.sign)
        gradient = correlate(mean_over_steps(delta, truncation), perturbation, self.std)
        return Estimate(mean_loss(truncation), delta, gradient, memory)


def sample_perturbations(keys: Key, theta: Pytree, std: float) -> Pytree:
    """(pairs, *shape) for each leaf of theta, normal with standard deviation `std`; one key for each pair."""
    flat, unravel = ravel_pytree(theta)  # one draw for all leaves: far less to compile
    return jax.vmap(lambda k: unravel(std * jax.random.normal(k, flat.shape, flat.dtype)))(keys)


def loss_differences(truncation: Truncation, sign: float | None) -> jax.Array:
    """(steps, pairs): positive minus negative loss; with `sign`, the same vote at every step of a pair."""
    delta = truncation.positive_loss - truncation.negative_loss
    if sign is None:
        return delta
    vote = jnp.sign(jnp.mean(jnp.where(truncation.mask, delta, 0.0), axis=0)) * sign
    return jnp.broadcast_to(vote, delta.shape)


def mean_over_steps(values: jax.Array, truncation: Truncation, only: jax.Array | None = None) -> jax.Array:
    """(steps, pairs) -> (pairs,): the sum over inner steps, or over those in `only`, divided by the number of all."""
    counted = truncation.mask if only is None else truncation.mask & only
    # A pair that made no step at all says nothing: 0, not 0 / 0.
    steps = jnp.maximum(jnp.sum(truncation.mask, axis=0), 1)
    return jnp.sum(jnp.where(counted, values, 0.0), axis=0) / steps


def mean_loss(truncation: Truncation) -> jax.Array:
    """Scalar: the mean loss of both signs, over steps, then over pairs."""
    return jnp.mean(mean_over_steps(truncation.positive_loss + truncation.negative_loss, truncation)) / 2


def correlate(delta: jax.Array, perturbation: Pytree, std: float) -> Pytree:
    """Antithetic estimate: the mean over pairs of delta * perturbation / (2 std^2). delta: (pairs,)."""
    return jax.tree.map(lambda e: jnp.mean(expand(delta, e) * e, axis=0) / (2 * std**2), perturbation)


def expand(x: jax.Array, like: jax.Array) -> jax.Array:
    """(pairs,) seen as (pairs, 1, ...) with the rank of `like`."""
    return jnp.reshape(x, x.shape + (1,) * (like.ndim - 1))
