"""What a task is: one network and loss, on one or several data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ...errors import UserError

Params: TypeAlias = Any
Batch: TypeAlias = Any
Data: TypeAlias = Any
Key: TypeAlias = jax.Array
Level: TypeAlias = Literal["global", "tensor", "parameter"]


class TaskError(UserError, ValueError):
    """A task that cannot be made or used; names the culprit and the remedy."""


class Task(ABC):
    """A training problem on one or several data sets of the same shape ("variants"), trained in one batched program.

    Subclasses set `name`, `variants` and `initial_loss` and define `init`, `loss` and `sample`, which are traced,
    vmapped and jitted. What they draw, they draw from the key that they are given.
    """

    name: str
    variants: tuple[str, ...]
    """Names of the data sets."""
    initial_loss: float
    """Loss of a network that knows nothing; losses are normalised by it, and diverged ones clipped relative to it."""
    data: Data = ()
    """Arrays that `sample` reads. They are arguments of the compiled program, not constants in it."""
    reparametrisation: Reparametrisation | None = None

    @abstractmethod
    def init(self, key: Key) -> Params:
        """The parameters of a fresh network: any tree of float32 arrays."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> jax.Array:
        """Mean loss of a batch, a scalar."""

    @abstractmethod
    def sample(self, data: Data, key: Key, variant: jax.Array) -> Batch:
        """A batch of the data set with this number (a scalar integer below `len(variants)`), from `self.data`."""


@dataclass(frozen=True)
class Reparametrisation:
    """The optimizer sees p / c where the network uses p, with a random c for each unroll, log-uniform in
    [`low`, `high`]: augmentation that teaches an optimizer to cope with any scale (Moudgil et al. 2025, section 4).

    `level`: one c for the whole network, for each tensor, or for each parameter.
    """

    level: Level = "tensor"
    low: float = 1e-3
    high: float = 1e3

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise TaskError(f"level={self.level!r}: must be one of {', '.join(get_args(Level))}")
        if not 0 < self.low <= self.high:
            raise TaskError(f"low={self.low}, high={self.high}: must be positive, low at most high")

    def sample(self, key: Key, params: Params) -> Params:
        """c for each leaf of `params`: scalars, or arrays of the leaf's shape."""
        leaves, treedef = jax.tree.flatten(params)
        low, high = jnp.log(self.low), jnp.log(self.high)
        if self.level == "parameter":
            flat, unravel = ravel_pytree(params)
            return unravel(jnp.exp(jax.random.uniform(key, flat.shape, minval=low, maxval=high)))
        count = 1 if self.level == "global" else len(leaves)
        drawn = jnp.exp(jax.random.uniform(key, (count,), minval=low, maxval=high))
        return treedef.unflatten([drawn[i % count] for i in range(len(leaves))])
