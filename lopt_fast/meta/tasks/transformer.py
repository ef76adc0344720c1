"""Byte-level language model: a causal transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .base import Key, Params, TaskError
from .layers import Normal, cross_entropy, dense, dense_init, initialise
from .options import at_least_one, name_with
from .text import BYTES, TextTask


@dataclass(eq=False, kw_only=True)
class Transformer(TextTask):
    """Pre-norm blocks of attention and a GELU layer of four times the width; learned positions.

    The defaults have 0.4 million parameters.
    """

    width: int = 96
    """Of the residual stream; a multiple of `heads`."""
    layers: int = 3
    heads: int = 4
    context: int = 64
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(width=self.width, layers=self.layers, heads=self.heads)
        if self.width % self.heads:
            raise TaskError(f"width={self.width}: must be a multiple of heads={self.heads}")
        stem = f"transformer_{self.width}x{self.layers}"
        self.name = name_with(stem, self, "heads", "context", "batch_size")

    def init(self, key: Key) -> Params:
        width = self.width
        blocks = [
            {
                "norm1": _norm_init(width),
                "qkv": dense_init(width, 3 * width),
                "project": dense_init(width, width),
                "norm2": _norm_init(width),
                "up": dense_init(width, 4 * width),
                "down": dense_init(4 * width, width),
            }
            for _ in range(self.layers)
        ]
        template = {
            "embedding": Normal((BYTES, width), 0.02),
            "positions": Normal((self.context, width), 0.02),
            "blocks": blocks,
            "norm": _norm_init(width),
            "out": dense_init(width, BYTES),
        }
        return initialise(key, template)

    def loss(self, params: Params, batch: jax.Array) -> jax.Array:
        x = params["embedding"][batch[:, :-1]] + params["positions"]
        for block in params["blocks"]:
            x = x + self._attention(block, _norm(block["norm1"], x))
            x = x + dense(block["down"], jax.nn.gelu(dense(block["up"], _norm(block["norm2"], x))))
        return cross_entropy(dense(params["out"], _norm(params["norm"], x)), batch[:, 1:])

    def _attention(self, block: Params, x: jax.Array) -> jax.Array:
        """(batch, context, width) -> the same."""
        n, t, width = x.shape
        head = width // self.heads
        q, k, v = jnp.split(dense(block["qkv"], x).reshape(n, t, self.heads, 3 * head), 3, axis=-1)
        scores = jnp.einsum("nthd,nshd->nhts", q, k) / math.sqrt(head)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores, axis=-1), v)
        return dense(block["project"], mixed.reshape(n, t, width))


def _norm_init(width: int) -> Params:
    return {"scale": Normal((width,), mean=1.0), "bias": Normal((width,))}


def _norm(layer: Params, x: jax.Array) -> jax.Array:
    """Layer normalisation over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * layer["scale"] + layer["bias"]
