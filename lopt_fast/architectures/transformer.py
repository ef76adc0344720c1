"""A bidirectional transformer encoder in array code: every token attends to every other, none has a position.

Sources: Vaswani et al. 2017 (arXiv 1706.03762), section 3; Devlin et al. 2018 (arXiv 1810.04805) for the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..namespace import array_namespace
from ..reference import Array
from .networks import init_linear, linear

NormPlacement = Literal["post", "pre"]

NORM_EPSILON = 1e-5  # (x - mean) / sqrt(variance + ...)


@dataclass(frozen=True)
class Encoder:
    """What is fixed of an encoder. Its meta-parameters have a leading axis over the layers.

    "post": x = norm(x + attention(x)); x = norm(x + mlp(x)), as in BERT.
    "pre": x = x + attention(norm(x)); x = x + mlp(norm(x)), and a last norm after all layers.
    Either way the output is normalised, so that it may be fed back as an input any number of times.
    """

    width: int
    layers: int
    heads: int
    key_size: int
    """Of each head; of its values too."""
    mlp_width: int
    norm: NormPlacement

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the meta-parameters."""
        attended = self.heads * self.key_size
        linears = {
            "query": (self.width, attended),
            "key": (self.width, attended),
            "value": (self.width, attended),
            "attention": (attended, self.width),
            "mlp_in": (self.width, self.mlp_width),
            "mlp_out": (self.mlp_width, self.width),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (n_in, n_out) in linears.items():
            shapes |= {f"{name}_w": (self.layers, n_in, n_out), f"{name}_b": (self.layers, n_out)}
        for name in ("attention", "mlp"):
            for part in ("scale", "offset"):
                shapes[f"{name}_norm_{part}"] = (self.layers, self.width)
        if self.norm == "pre":
            shapes |= {"last_norm_scale": (self.width,), "last_norm_offset": (self.width,)}
        return shapes

    def init_theta(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """float32: weights as `init_linear`, normalisation the identity, biases 0."""
        theta: dict[str, np.ndarray] = {}
        for name, shape in self.theta_shapes.items():
            if name.endswith("_w"):
                theta[name] = init_linear(rng, shape)
            else:
                theta[name] = np.full(shape, 1.0 if name.endswith("_scale") else 0.0, np.float32)
        return theta

    def __call__(self, theta: Mapping[str, Array], tokens: Array) -> Array:
        """(tokens, width) -> (tokens, width). A permutation of the tokens permutes the output alike."""
        x = tokens
        for i in range(self.layers):
            layer = {name: theta[name][i, ...] for name in self.theta_shapes if not name.startswith("last_")}
            if self.norm == "post":
                x = _norm(layer, "attention_norm", x + self._attention(layer, x))
                x = _norm(layer, "mlp_norm", x + _mlp(layer, x))
            else:
                x = x + self._attention(layer, _norm(layer, "attention_norm", x))
                x = x + _mlp(layer, _norm(layer, "mlp_norm", x))
        return _norm(theta, "last_norm", x) if self.norm == "pre" else x

    def _attention(self, layer: Mapping[str, Array], x: Array) -> Array:
        """Multi-head self-attention: softmax(queries @ keys.T / sqrt(key size)) @ values."""
        xp = array_namespace(x)
        n = x.shape[0]

        def heads_of(name: str) -> Array:
            """(heads, tokens, key size)"""
            y = linear(x, layer[f"{name}_w"], layer[f"{name}_b"])
            return xp.permute_dims(xp.reshape(y, (n, self.heads, self.key_size)), (1, 0, 2))

        query, key, value = heads_of("query"), heads_of("key"), heads_of("value")
        scores = query @ xp.permute_dims(key, (0, 2, 1)) / math.sqrt(self.key_size)
        attended = xp.permute_dims(softmax(scores) @ value, (1, 0, 2))
        attended = xp.reshape(attended, (n, self.heads * self.key_size))
        return linear(attended, layer["attention_w"], layer["attention_b"])


def _mlp(layer: Mapping[str, Array], x: Array) -> Array:
    hidden = gelu(linear(x, layer["mlp_in_w"], layer["mlp_in_b"]))
    return linear(hidden, layer["mlp_out_w"], layer["mlp_out_b"])


def _norm(theta: Mapping[str, Array], name: str, x: Array) -> Array:
    return layer_norm(x, theta[f"{name}_scale"], theta[f"{name}_offset"])


def softmax(x: Array) -> Array:
    """Over the last axis; the largest is subtracted first, so that exp does not overflow."""
    xp = array_namespace(x)
    weights = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def layer_norm(x: Array, scale: Array, offset: Array) -> Array:
    """scale * (x - mean) / sqrt(variance + 1e-5) + offset, over the last axis."""
    xp = array_namespace(x)
    x = x - xp.mean(x, axis=-1, keepdims=True)
    return scale * (x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)) + offset


def gelu(x: Array) -> Array:
    """x times the normal distribution function of x, approximated with tanh (arrays have no erf): within 5e-4."""
    xp = array_namespace(x)
    return 0.5 * x * (1.0 + xp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
