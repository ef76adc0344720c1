"""Byte-level language model: an LSTM (Hochreiter and Schmidhuber 1997)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .base import Key, Params
from .layers import Normal, cross_entropy, dense, dense_init, initialise
from .options import at_least_one, name_with
from .text import BYTES, TextTask


@dataclass(eq=False, kw_only=True)
class LSTM(TextTask):
    """One LSTM layer between an embedding and a linear layer; its initial state is learned.

    Sizes by default as in the language model of Metz et al. 2022 (arXiv 2203.11860, appendix B).
    """

    width: int = 128
    """Of the LSTM's state."""
    embedding: int = 64
    """Width of the embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(width=self.width, embedding=self.embedding)
        self.name = name_with(f"lstm_{self.embedding}-{self.width}", self, "context", "batch_size")

    def init(self, key: Key) -> Params:
        template = {
            "embedding": Normal((BYTES, self.embedding), 1.0),
            "gates": dense_init(self.embedding + self.width, 4 * self.width),
            "initial": {"hidden": Normal((self.width,)), "cell": Normal((self.width,))},
            "out": dense_init(self.width, BYTES),
        }
        return initialise(key, template)

    def loss(self, params: Params, batch: jax.Array) -> jax.Array:
        # What the inputs contribute to the gates is one product for all steps, outside the loop.
        of_input, of_hidden = jnp.split(params["gates"]["w"], [self.embedding])
        inputs = params["embedding"][batch[:, :-1].T] @ of_input + params["gates"]["b"]

        def step(
            state: tuple[jax.Array, jax.Array], x: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            hidden, cell = state
            write, forget, read, candidate = jnp.split(x + hidden @ of_hidden, 4, axis=-1)
            # Biases start at zero; the 1 lets a fresh network remember (Gers et al. 2000).
            cell = jax.nn.sigmoid(forget + 1) * cell + jax.nn.sigmoid(write) * jnp.tanh(candidate)
            hidden = jax.nn.sigmoid(read) * jnp.tanh(cell)
            return (hidden, cell), hidden

        shape = (batch.shape[0], self.width)
        initial = tuple(jnp.broadcast_to(params["initial"][name], shape) for name in ("hidden", "cell"))
        _, hidden = jax.lax.scan(step, initial, inputs)
        return cross_entropy(dense(params["out"], hidden), batch[:, 1:].T)
