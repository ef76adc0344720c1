"""Inner tasks: what a learned optimizer is meta-trained and evaluated on.

A `Task` is one network and loss on one or several data sets of the same shape ("variants"), so that unrolls
on different data sets run in one batched program. Data lie on the device; batches are drawn with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Params: TypeAlias = Any
Batch: TypeAlias = Any
Key: TypeAlias = jax.Array


@dataclass(frozen=True)
class Task:
    """A training problem. All three functions can be traced, vmapped and jitted."""

    name: str
    variants: tuple[str, ...]
    """Names of the data sets."""
    init: Callable[[Key], Params]
    loss: Callable[[Params, Batch], jax.Array]
    """Mean loss of a batch, a scalar."""
    sample: Callable[[Key, jax.Array], Batch]
    """A batch of the data set with this number (a scalar integer below `len(variants)`)."""
    initial_loss: float
    """Loss of a network that knows nothing; diverged losses are clipped relative to it."""


@dataclass(frozen=True)
class Dataset:
    """Inputs (n, *shape) float32 and labels (n,) int32."""

    name: str
    inputs: np.ndarray
    labels: np.ndarray


def mlp_classifier(
    datasets: Sequence[Dataset], hidden: Sequence[int] = (32,), classes: int = 10, batch_size: int = 128
) -> Task:
    """Multilayer perceptron with ReLU and cross-entropy on flattened inputs; by default 64-32-10 on 8x8."""
    flat = [Dataset(d.name, d.inputs.reshape(len(d.inputs), -1), d.labels) for d in datasets]
    sizes = (flat[0].inputs.shape[1], *hidden, classes)

    def loss(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        return cross_entropy(mlp(params, x), y)

    name = "mlp_" + "-".join(map(str, sizes))
    return Task(
        name,
        _names(flat),
        lambda key: mlp_init(key, sizes),
        loss,
        _sampler(flat, batch_size),
        math.log(classes),
    )


def autoencoder(
    datasets: Sequence[Dataset], hidden: Sequence[int] = (64, 16, 64), batch_size: int = 128
) -> Task:
    """Multilayer perceptron that reproduces its flattened input; mean squared error."""
    flat = [Dataset(d.name, d.inputs.reshape(len(d.inputs), -1), d.labels) for d in datasets]
    sizes = (flat[0].inputs.shape[1], *hidden, flat[0].inputs.shape[1])

    def loss(params: Params, batch: Batch) -> jax.Array:
        x, _ = batch
        return jnp.mean((mlp(params, x) - x) ** 2)

    name = "autoencoder_" + "-".join(map(str, sizes))
    return Task(name, _names(flat), lambda key: mlp_init(key, sizes), loss, _sampler(flat, batch_size), 1.0)


def conv_classifier(
    datasets: Sequence[Dataset], channels: Sequence[int] = (16, 32), classes: int = 10, batch_size: int = 128
) -> Task:
    """3x3 convolutions of stride 2 with ReLU, mean over positions, a linear layer. Inputs (n, h, w, c)."""
    widths = (datasets[0].inputs.shape[-1], *channels)

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(channels) + 1)
        params = {}
        for i, (k, n_in, n_out) in enumerate(zip(keys[:-1], widths[:-1], widths[1:], strict=True)):
            params[f"conv{i}"] = {
                "w": jax.random.normal(k, (3, 3, n_in, n_out)) / math.sqrt(9 * n_in), "b": jnp.zeros(n_out)
            }  # fmt: skip
        params["out"] = _dense_init(keys[-1], widths[-1], classes)
        return params

    def loss(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        for i in range(len(channels)):
            layer = params[f"conv{i}"]
            dims = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, layer["w"], (2, 2), "SAME", dimension_numbers=dims)
            x = jax.nn.relu(x + layer["b"])
        x = x.mean((1, 2))
        return cross_entropy(x @ params["out"]["w"] + params["out"]["b"], y)

    name = "conv_" + "-".join(map(str, channels))
    return Task(name, _names(datasets), init, loss, _sampler(datasets, batch_size), math.log(classes))


def byte_transformer(
    text: np.ndarray,
    name: str = "text",
    width: int = 96,
    layers: int = 3,
    heads: int = 4,
    context: int = 64,
    batch_size: int = 8,
) -> Task:
    """Causal transformer that predicts the next byte of `text` (n,) uint8; pre-norm, learned positions.

    The defaults have 0.4 million parameters.
    """
    data = jnp.asarray(text)
    head = width // heads

    def init(key: Key) -> Params:
        keys = iter(jax.random.split(key, 3 + 4 * layers))
        params = {
            "embedding": 0.02 * jax.random.normal(next(keys), (256, width)),
            "positions": 0.02 * jax.random.normal(next(keys), (context, width)),
            "out": _dense_init(next(keys), width, 256),
            "norm": _norm_init(width),
        }
        for i in range(layers):
            params[f"block{i}"] = {
                "norm1": _norm_init(width),
                "qkv": _dense_init(next(keys), width, 3 * width),
                "project": _dense_init(next(keys), width, width),
                "norm2": _norm_init(width),
                "up": _dense_init(next(keys), width, 4 * width),
                "down": _dense_init(next(keys), 4 * width, width),
            }
        return params

    def dense(layer: Params, x: jax.Array) -> jax.Array:
        return x @ layer["w"] + layer["b"]

    def norm(layer: Params, x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * layer["scale"] + layer["bias"]

    def attention(block: Params, x: jax.Array) -> jax.Array:
        n, t, _ = x.shape
        q, k, v = jnp.split(dense(block["qkv"], x).reshape(n, t, heads, 3 * head), 3, axis=-1)
        scores = jnp.einsum("nthd,nshd->nhts", q, k) / math.sqrt(head)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores, axis=-1), v)
        return dense(block["project"], mixed.reshape(n, t, width))

    def loss(params: Params, batch: Batch) -> jax.Array:
        tokens = batch
        x = params["embedding"][tokens[:, :-1]] + params["positions"]
        for i in range(layers):
            block = params[f"block{i}"]
            x = x + attention(block, norm(block["norm1"], x))
            x = x + dense(block["down"], jax.nn.gelu(dense(block["up"], norm(block["norm2"], x))))
        return cross_entropy(dense(params["out"], norm(params["norm"], x)), tokens[:, 1:])

    def sample(key: Key, variant: jax.Array) -> Batch:
        del variant
        starts = jax.random.randint(key, (batch_size, 1), 0, len(text) - context)
        return data[starts + jnp.arange(context + 1)].astype(jnp.int32)

    return Task(f"transformer_{width}x{layers}", (name,), init, loss, sample, math.log(256))


def mlp_init(key: Key, sizes: Sequence[int]) -> Params:
    """Weights normal with variance 1 / inputs, biases zero."""
    keys = jax.random.split(key, len(sizes) - 1)
    layers = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [_dense_init(k, n_in, n_out) for k, n_in, n_out in layers]


def mlp(params: Params, x: jax.Array) -> jax.Array:
    """ReLU between layers, the last one linear."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all but the last axis of the negative log-likelihood of `labels`."""
    picked = jnp.sum(logits * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def _dense_init(key: Key, n_in: int, n_out: int) -> Params:
    return {"w": jax.random.normal(key, (n_in, n_out)) / math.sqrt(n_in), "b": jnp.zeros(n_out)}


def _norm_init(width: int) -> Params:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _names(datasets: Sequence[Dataset]) -> tuple[str, ...]:
    return tuple(d.name for d in datasets)


def _sampler(datasets: Sequence[Dataset], batch_size: int) -> Callable[[Key, jax.Array], Batch]:
    """Batches from data sets of one shape that lie one after the other in one array."""
    sizes = [len(d.inputs) for d in datasets]
    shapes = {d.inputs.shape[1:] for d in datasets}
    if len(shapes) != 1:
        raise ValueError(f"data sets of one task must have inputs of one shape, not {sorted(shapes)}")
    x = jnp.asarray(np.concatenate([d.inputs for d in datasets]), jnp.float32)
    y = jnp.asarray(np.concatenate([d.labels for d in datasets]), jnp.int32)
    counts = jnp.asarray(sizes)
    first = jnp.asarray(np.cumsum([0, *sizes[:-1]]))

    def sample(key: Key, variant: jax.Array) -> Batch:
        index = first[variant] + jax.random.randint(key, (batch_size,), 0, counts[variant])
        return x[index], y[index]

    return sample
