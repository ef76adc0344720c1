"""How long unrolls are, when the first ones end, and what a truncation of them does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ..jax.custom_call import vary_like
from .estimators import Estimate, Estimator, Truncation
from .tasks.base import Data, Key, Task
from .unroll import InnerState, MakeForLength, sampler, start, unroll, unroll_with_resets

Pytree: TypeAlias = Any


@dataclass(frozen=True)
class Lengths:
    """Log-uniform between two numbers of inner steps; constant where they are equal."""

    low: int
    high: int

    def sample(self, keys: Key) -> jax.Array:
        """(pairs,) int32."""
        low, high = jnp.log(self.low), jnp.log(self.high + 1)
        drawn = jax.vmap(lambda k: jnp.exp(jax.random.uniform(k, minval=low, maxval=high)))(keys)
        return jnp.clip(drawn.astype(jnp.int32), self.low, self.high)


class Unrolls(NamedTuple):
    """The antithetic pairs of one task. All leaves have a leading axis (pairs,)."""

    inner: InnerState
    """(pairs, 2, ...): theta + perturbation and theta - perturbation."""
    memory: Pytree
    """Of the estimator."""
    length: jax.Array
    """Inner steps after which a pair starts anew."""


class Counts(NamedTuple):
    """What happened in a truncation, by data set of the task; leaves (data sets,)."""

    loss: jax.Array
    """Mean loss, as clipped."""
    diverged: jax.Array
    """Share of the inner losses that were clipped: not finite, or beyond the bound."""


@dataclass(frozen=True)
class TruncatedTask:
    """A task with how it is unrolled."""

    task: Task
    make_optimizer: MakeForLength
    """From meta-parameters as one vector (n,) and the length of the unroll."""
    estimator: Estimator
    lengths: Lengths
    steps: int
    """Inner steps of a truncation."""
    resets_inside: bool
    loss_clip: float
    """Bound on a loss, in units of the task's initial loss."""
    data_weights: tuple[float, ...]
    """One for each data set."""

    def fresh(self, theta: jax.Array, keys: Key) -> Unrolls:
        """Unrolls at their beginning. keys: (pairs,)."""
        init_keys, length_keys, memory_keys = _split(keys, 3)
        length = self.lengths.sample(length_keys)
        inner = jax.vmap(lambda k, n: start(self.task, self.make_optimizer(theta, n), k))(init_keys, length)
        unrolls = Unrolls(
            inner=jax.tree.map(lambda x: jnp.stack([x, x], axis=1), inner),
            memory=self.estimator.init(memory_keys, theta),
            length=length,
        )
        leaves, treedef = jax.tree.flatten(unrolls)
        return treedef.unflatten(
            vary_like(leaves, ())
        )  # zeros are pairs' own too: inside shard_map, different ones

    def advance(
        self, theta: jax.Array, unrolls: Unrolls, data: Data, keys: Key, variant: jax.Array
    ) -> tuple[Unrolls, Estimate, Counts]:
        """One truncation of all pairs. keys, variant (number of the data set): (pairs,)."""
        noise_keys, batch_keys, fresh_keys = _split(keys, 3)
        fresh = self.fresh(theta, fresh_keys)
        if self.estimator.whole_unroll:
            unrolls = fresh
        perturbation = self.estimator.perturb(noise_keys, theta, unrolls.memory)
        both = jnp.stack([theta + perturbation, theta - perturbation], axis=1)
        if self.estimator.whole_unroll:
            inner, seen = self._whole(both, unrolls, data, batch_keys, variant)
        elif self.resets_inside:
            inner, seen = self._with_resets(both, unrolls, fresh, data, batch_keys, variant)
        else:
            inner, losses = self._plain(both, unrolls.inner, unrolls.length, data, batch_keys, variant)
            seen = Truncation(losses[0], losses[1], *_unmasked(losses[0]))
        # A loss that is not finite or beyond the bound counts as the bound: no NaN reaches the gradient.
        bound = self.loss_clip * self.task.initial_loss
        wild = [~(losses < bound) & seen.mask for losses in seen[:2]]
        clipped = [jnp.where(losses < bound, losses, bound) for losses in seen[:2]]
        counts = self._count(clipped, wild, seen.mask, variant)
        unit = jnp.asarray(self.data_weights, jnp.float32)[variant] / self.task.initial_loss
        scaled = seen._replace(positive_loss=clipped[0] * unit, negative_loss=clipped[1] * unit)
        estimate = self.estimator.estimate(scaled, unrolls.memory, perturbation)
        after = Unrolls(inner, estimate.memory, unrolls.length)
        if self.resets_inside:
            # A fresh unroll has a length of its own from the step on at which it began.
            began = inner.step[:, 0] < self.steps
            after = after._replace(length=jnp.where(began, fresh.length, unrolls.length))
        elif not self.estimator.whole_unroll:
            # A pair of which both have diverged has nothing to tell any more.
            lost = (wild[0][-1] & wild[1][-1]) & ~jnp.isfinite(
                seen.positive_loss[-1] + seen.negative_loss[-1]
            )
            after = _choose((inner.step[:, 0] >= unrolls.length) | lost, fresh, after)
        return after, estimate, counts

    def _plain(
        self, both: jax.Array, inner: InnerState, length: jax.Array, data: Data, keys: Key, variant: jax.Array
    ) -> tuple[InnerState, jax.Array]:
        """(inner states, losses (2, steps, pairs)) after `steps` steps."""

        def pair(
            both: jax.Array, inner: InnerState, length: jax.Array, key: Key, variant: jax.Array
        ) -> tuple[InnerState, jax.Array]:
            # The two of a pair see the same batches: what differs is the perturbation alone.
            draw, batches = sampler(self.task, data, variant), jax.random.split(key, self.steps)

            def one(theta: jax.Array, inner: InnerState) -> tuple[InnerState, jax.Array]:
                return unroll(self.task, self.make_optimizer(theta, length), inner, batches, draw)

            return jax.vmap(one)(both, inner)

        inner, losses = jax.vmap(pair)(both, inner, length, keys, variant)
        return inner, losses.transpose(1, 2, 0)

    def _with_resets(
        self, both: jax.Array, unrolls: Unrolls, fresh: Unrolls, data: Data, keys: Key, variant: jax.Array
    ) -> tuple[InnerState, Truncation]:
        def pair(
            both: jax.Array,
            inner: InnerState,
            fresh: InnerState,
            lengths: tuple[jax.Array, jax.Array],
            key: Key,
            variant: jax.Array,
        ) -> tuple[InnerState, Any]:
            draw, batches = sampler(self.task, data, variant), jax.random.split(key, self.steps)

            def one(theta: jax.Array, inner: InnerState, fresh: InnerState) -> tuple[InnerState, Any]:
                def make(length: jax.Array) -> optax.GradientTransformation:
                    return self.make_optimizer(theta, length)

                return unroll_with_resets(self.task, make, inner, fresh, lengths, batches, draw)

            return jax.vmap(one)(both, inner, fresh)

        lengths = unrolls.length, fresh.length
        inner, seen = jax.vmap(pair)(both, unrolls.inner, fresh.inner, lengths, keys, variant)
        losses, is_done, mask = (x.transpose(1, 2, 0) for x in seen)
        return inner, Truncation(losses[0], losses[1], is_done[0], mask[0])

    def _whole(
        self, both: jax.Array, unrolls: Unrolls, data: Data, keys: Key, variant: jax.Array
    ) -> tuple[InnerState, Truncation]:
        """Unrolls from beginning to end; steps beyond a pair's own length are made but not counted."""
        chunks = -(-self.lengths.high // self.steps)

        def chunk(inner: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
            here = jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)
            return self._plain(both, inner, unrolls.length, data, here, variant)

        inner, losses = jax.lax.scan(chunk, unrolls.inner, jnp.arange(chunks))
        losses = losses.transpose(1, 0, 2, 3).reshape(2, chunks * self.steps, -1)
        mask = jnp.arange(chunks * self.steps)[:, None] < unrolls.length
        return inner, Truncation(losses[0], losses[1], jnp.zeros_like(mask), mask)

    def _count(
        self, losses: list[jax.Array], wild: list[jax.Array], mask: jax.Array, variant: jax.Array
    ) -> Counts:
        """Sums over this device's pairs; `jax.lax.psum` of numerator and denominator is the caller's."""
        steps = mask.sum(0)
        loss = jnp.where(mask, losses[0] + losses[1], 0).sum(0) / steps / 2
        share = (wild[0].sum(0) + wild[1].sum(0)) / steps / 2
        count = len(self.task.variants)
        return Counts(*(jax.ops.segment_sum(x, variant, count) for x in (loss, share)))


def stagger(unrolls: Unrolls, index: jax.Array, pairs: int, least: int) -> Unrolls:
    """Let the unrolls of pair number `index` of `pairs` end at that share of their lengths, after `least` steps."""
    length = jnp.ceil(unrolls.length * (index + 1) / pairs).astype(unrolls.length.dtype)
    return unrolls._replace(length=jnp.maximum(jnp.minimum(least, unrolls.length), length))


def _split(keys: Key, count: int) -> Key:
    """`count` arrays (pairs,) of keys from one."""
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, count))(keys), 1, 0)


def _unmasked(losses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(is_done, mask) where unrolls end between truncations only."""
    never = jnp.zeros(losses.shape, bool)
    return never, ~never


def _choose(where: jax.Array, yes: Any, no: Any) -> Any:
    """Leaf by leaf, for pairs."""
    return jax.tree.map(
        lambda a, b: jnp.where(where.reshape(where.shape + (1,) * (a.ndim - 1)), a, b), yes, no
    )
