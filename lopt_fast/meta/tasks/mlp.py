"""Image classification by a multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from .base import Key, Params
from .images import ImageBatch, ImageTask
from .layers import cross_entropy, initialise, mlp, mlp_init
from .options import at_least_one, name_with


@dataclass(eq=False, kw_only=True)
class MLP(ImageTask):
    """Perceptron with ReLU on flattened images, cross-entropy. By default 64-32-10 on the 8x8 digits.

    That on Fashion-MNIST of Metz et al. 2022 (arXiv 2203.11860, appendix B) has hidden = [128, 128].
    """

    hidden: Sequence[int] = (32,)
    """Widths of the hidden layers; none: a linear classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(**{f"hidden[{i}]": n for i, n in enumerate(self.hidden)})
        self.sizes = (math.prod(self.image_shape), *self.hidden, self.classes)
        self.name = name_with("mlp_" + "-".join(map(str, self.sizes)), self, "batch_size")
        self.initial_loss = math.log(self.classes)

    def init(self, key: Key) -> Params:
        return initialise(key, mlp_init(self.sizes))

    def loss(self, params: Params, batch: ImageBatch) -> jax.Array:
        x, y = batch
        return cross_entropy(mlp(params, x.reshape(len(x), -1)), y)
