"""Random quadratics: no data, no network, any scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .base import Data, Key, Params, Reparametrisation, Task, TaskError
from .options import at_least_one


@dataclass(eq=False, kw_only=True)
class Quadratic(Task):
    """Half the mean of (q - target)² over all elements of a matrix and a vector, q normal at the start.

    The optimizer sees p = q / c, with a c for each element that is drawn anew for each unroll, log-uniform: curvatures
    c², optima target / c, and distances to go that are the larger the smaller the gradient. Without a
    re-parametrisation of one's own in the configuration c² spans `condition`, with one it is that.
    """

    shape: Sequence[int] = (32, 32)
    """(rows, columns) of the matrix; the vector has as many elements as columns."""
    condition: float = 1e4
    """Largest over smallest curvature."""
    noise: float = 0.0
    """Standard deviation of noise in the targets, drawn for each step."""

    def __post_init__(self) -> None:
        if len(self.shape) != 2:
            raise TaskError(f"shape={self.shape}: must be (rows, columns)")
        at_least_one(**{f"shape[{i}]": n for i, n in enumerate(self.shape)})
        if not self.condition >= 1:
            raise TaskError(f"condition={self.condition}: must be at least 1")
        if not self.noise >= 0:
            raise TaskError(f"noise={self.noise}: must not be negative")
        rows, columns = self.shape
        self.name = f"quadratic_{rows}x{columns}_{self.condition:g}"
        if self.noise:
            self.name += f"_noise{self.noise:g}"
        self.variants = ("quadratic",)
        self.initial_loss = 1 + self.noise**2 / 2
        self.reparametrisation = Reparametrisation("parameter", self.condition**-0.25, self.condition**0.25)
        self._count = rows * columns + columns
        self.data = {
            "targets": jnp.asarray(np.random.default_rng(0).standard_normal(self._count), jnp.float32)
        }

    def init(self, key: Key) -> Params:
        rows, columns = self.shape
        q = jax.random.normal(key, (self._count,))
        return {"matrix": q[columns:].reshape(rows, columns), "vector": q[:columns]}

    def loss(self, params: Params, batch: jax.Array) -> jax.Array:
        q = jnp.concatenate([params["vector"], params["matrix"].ravel()])
        return 0.5 * jnp.mean((q - batch) ** 2)

    def sample(self, data: Data, key: Key, variant: jax.Array) -> jax.Array:
        if not self.noise:
            return data["targets"]
        return data["targets"] + self.noise * jax.random.normal(key, (self._count,))
