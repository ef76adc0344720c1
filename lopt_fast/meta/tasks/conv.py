"""Image classification by a convolutional network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp

from .base import Key, Params, TaskError
from .images import ImageBatch, ImageTask
from .layers import Normal, cross_entropy, dense, dense_init, initialise
from .options import at_least_one, name_with


@dataclass(eq=False, kw_only=True)
class Conv(ImageTask):
    """3x3 convolutions with ReLU, the mean over positions, a linear layer; cross-entropy.

    By default the ConvNet 32-64-64 of Metz et al. 2022 (arXiv 2203.11860, appendix B), there on CIFAR-10.
    """

    channels: Sequence[int] = (32, 64, 64)
    """Channels of the convolutions."""
    strides: Sequence[int] | None = None
    """Stride of each convolution; left out: 2 for the first, 1 for the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.image_shape) != 3:
            raise TaskError(f"images of shape {self.image_shape}: must be (height, width, channels)")
        if not self.channels:
            raise TaskError("channels is empty: give at least one")
        default = (2, *(1 for _ in self.channels[1:]))
        self.strides = default if self.strides is None else tuple(self.strides)
        if len(self.strides) != len(self.channels):
            raise TaskError(f"{len(self.strides)} strides for {len(self.channels)} channels")
        for name, values in (("channels", self.channels), ("strides", self.strides)):
            at_least_one(**{f"{name}[{i}]": n for i, n in enumerate(values)})
        height, width, depth = self.image_shape
        widths = "-".join(map(str, (depth, *self.channels, self.classes)))
        self.name = name_with(f"conv_{height}x{width}_{widths}", self, "batch_size")
        if self.strides != default:
            self.name += "_strides" + "-".join(map(str, self.strides))
        self.initial_loss = math.log(self.classes)

    def init(self, key: Key) -> Params:
        widths = (self.image_shape[-1], *self.channels)
        layers = [
            {"w": Normal((3, 3, n_in, n_out), (9 * n_in) ** -0.5), "b": Normal((n_out,))}
            for n_in, n_out in pairwise(widths)
        ]
        return initialise(key, {"conv": layers, "out": dense_init(widths[-1], self.classes)})

    def loss(self, params: Params, batch: ImageBatch) -> jax.Array:
        x, y = batch
        assert self.strides is not None
        for layer, stride in zip(params["conv"], self.strides, strict=True):
            x = jax.nn.relu(convolve(x, layer["w"], stride) + layer["b"])
        return cross_entropy(dense(params["out"], x.mean((1, 2))), y)


@partial(
    jax.checkpoint, static_argnums=2
)  # the patches, k * k times the input, are made again rather than kept
def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """(n, height, width, inputs) and (k, k, inputs, outputs) -> (n, height / stride, width / stride, outputs).

    Zero-padded. As a product with patches: with a kernel for each network (vmap), XLA's own convolution is about 20
    times slower inside a loop on the CPU.
    """
    k, _, inputs, outputs = kernel.shape
    sizes = [-(-n // stride) for n in x.shape[1:3]]
    missing = [max((m - 1) * stride + k - n, 0) for m, n in zip(sizes, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)))
    height, width = ((m - 1) * stride + 1 for m in sizes)
    shifted = [x[:, i : i + height : stride, j : j + width : stride] for i in range(k) for j in range(k)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(k * k * inputs, outputs)
