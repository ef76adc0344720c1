"""Building blocks of the networks: initial parameters, dense layers, the perceptron, cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp

from .base import Key, Params


@dataclass(frozen=True)
class Normal:
    """How a parameter starts: normal with this mean and standard deviation; std 0: constant."""

    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0


def initialise(key: Key, template: Params) -> Params:
    """The tree `template` with arrays in place of its `Normal`s. One draw for all: far less to compile."""
    leaves, treedef = jax.tree.flatten(template)
    sizes = [math.prod(leaf.shape) if leaf.std else 0 for leaf in leaves]
    drawn = jax.random.normal(key, (sum(sizes),))
    arrays, first = [], 0
    for leaf, size in zip(leaves, sizes, strict=True):
        if leaf.std:
            arrays.append(leaf.mean + leaf.std * drawn[first : first + size].reshape(leaf.shape))
        else:
            arrays.append(jnp.full(leaf.shape, leaf.mean))
        first += size
    return treedef.unflatten(arrays)


def dense_init(inputs: int, outputs: int) -> Params:
    """Weights with variance 1 / inputs, biases zero."""
    return {"w": Normal((inputs, outputs), inputs**-0.5), "b": Normal((outputs,))}


def dense(layer: Params, x: jax.Array) -> jax.Array:
    """(..., inputs) -> (..., outputs)."""
    return x @ layer["w"] + layer["b"]


def mlp_init(sizes: Sequence[int]) -> Params:
    """`sizes`: inputs, hidden widths, outputs."""
    return [dense_init(n_in, n_out) for n_in, n_out in pairwise(sizes)]


def mlp(layers: Params, x: jax.Array) -> jax.Array:
    """ReLU between layers, the last one linear."""
    for layer in layers[:-1]:
        x = jax.nn.relu(dense(layer, x))
    return dense(layers[-1], x)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all but the last axis of the negative log-likelihood of `labels`, in nats."""
    # One-hot: on the CPU a gather, and above all its derivative, takes much longer.
    picked = jnp.sum(logits * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)
