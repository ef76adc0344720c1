"""Images compressed and reproduced by a multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .base import Key, Params
from .images import ImageBatch, ImageTask
from .layers import initialise, mlp, mlp_init
from .options import at_least_one, name_with


@dataclass(eq=False, kw_only=True)
class Autoencoder(ImageTask):
    """Perceptron with ReLU that reproduces its flattened, standardised input; mean squared error."""

    hidden: Sequence[int] = (64, 16, 64)
    """Widths of the hidden layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(**{f"hidden[{i}]": n for i, n in enumerate(self.hidden)})
        pixels = math.prod(self.image_shape)
        self.sizes = (pixels, *self.hidden, pixels)
        self.name = name_with("autoencoder_" + "-".join(map(str, self.sizes)), self, "batch_size")
        self.initial_loss = 1.0  # of the answer 0: the variance of the input

    def init(self, key: Key) -> Params:
        return initialise(key, mlp_init(self.sizes))

    def loss(self, params: Params, batch: ImageBatch) -> jax.Array:
        x = batch[0].reshape(len(batch[0]), -1)
        return jnp.mean((mlp(params, x) - x) ** 2)
