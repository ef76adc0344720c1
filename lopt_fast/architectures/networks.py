"""Parts of tensor-level networks, in array code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from array_api_compat import device

from ..namespace import array_namespace
from ..operations import ElementMlp
from ..operations.constants import constant as constant
from ..operations.constants import new as new
from ..reference import Array


def linear(x: Array, w: Array, b: Array) -> Array:
    """x @ w + b; w is (inputs, outputs)."""
    return x @ w + b


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written so that exp does not overflow."""
    xp = array_namespace(x)
    return 0.5 * (xp.tanh(0.5 * x) + 1.0)


def relu(x: Array) -> Array:
    """max(x, 0) that keeps NaN."""
    return array_namespace(x).where(x < 0, 0.0 * x, x)


def clip(x: Array, low: float, high: float) -> Array:
    """`x` within [low, high]; keeps NaN. xp.clip is slow where arrays are small: it broadcasts its bounds first."""
    xp = array_namespace(x)
    return xp.where(x < low, low, xp.where(x > high, high, x))


def lstm(x: Array, hidden: Array, cell: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """(hidden, cell) after one step of an LSTM over rows: gates i, g, f, o, and 1 is added to f (Haiku's LSTM).

    x: (rows, inputs); hidden, cell: (rows, units); w: (inputs + units, 4 units); b: (4 units,).
    """
    xp = array_namespace(x)
    gates = linear(xp.concat([x, hidden], axis=-1), w, b)
    n = cell.shape[-1]
    i, g, f, o = (gates[..., k * n : (k + 1) * n] for k in range(4))
    cell = sigmoid(f + 1.0) * cell + sigmoid(i) * xp.tanh(g)
    return sigmoid(o) * xp.tanh(cell), cell


def log_magnitude(x: Array, scale: float = 1.0) -> Array:
    """scale * log(1e-8 + |x|), the logarithm within [-5, 5]."""
    xp = array_namespace(x)
    return scale * clip(xp.log(1e-8 + xp.abs(x)), -5.0, 5.0)


def seen_fraction(decay: Array, t: Array) -> Array:
    """1 - decay ** (t + 1), accurate for a decay near 1: by what a running average is divided to correct its bias.

    t: steps taken before; decay: of an average that has taken this step.
    """
    xp = array_namespace(decay)
    return -xp.expm1((xp.astype(t, decay.dtype) + 1.0) * xp.log(decay))


def truncated_normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """float32, normal with standard deviation `std`, cut at two of them."""
    draws = rng.standard_normal(shape)
    while (outside := np.abs(draws) > 2.0).any():
        draws[outside] = rng.standard_normal(int(outside.sum()))
    return (draws * std).astype(np.float32)


def init_linear(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Weights (..., inputs, outputs): truncated normal with standard deviation 1 / sqrt(inputs)."""
    return truncated_normal(rng, shape, 1.0 / math.sqrt(shape[-2]))


def init_mlp(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Initial weights `w0`, `w1`, ... of an MLP, truncated normal with 1 / sqrt(inputs), and biases `b0`, ..., zero.

    A layer's weights may lie in several arrays, `w0` and `w0_time`: its inputs are those of all of them.
    """
    theta: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        layer = name.split("_")[0]
        inputs = sum(other[0] for key, other in shapes.items() if key.split("_")[0] == layer)
        weights = name.startswith("w")
        theta[name] = (
            truncated_normal(rng, shape, 1.0 / math.sqrt(inputs)) if weights else np.zeros(shape, np.float32)
        )
    return theta


INITIAL_SCALE = 0.1
"""Of the last layers before meta-training: to direction and magnitude, and to a conditioning."""
FOLLOWED_DECAY = 0.9
"""Of the momentum that an optimizer follows before meta-training, or the nearest that there is."""


def follow_momentum(
    theta: Mapping[str, np.ndarray], mlp: ElementMlp, group: str, decays: Sequence[float], scale: float = 1.0
) -> None:
    """Give initial meta-parameters w0, w1, ... of `mlp` a path that makes the initial optimizer a usable one.

    The first two units of each hidden layer pass on the positive and the negative part of the column of `group` whose
    momentum decays by 0.9; the direction is `scale` times their difference, and what the other units add. Without
    two units nothing changes. Weights may have leading axes; those of other inputs are called w0_*.
    """
    if mlp.hidden_size < 2:
        return
    before = sum(map(mlp.group_size, mlp.groups[: mlp.groups.index(group)]))
    column = before + min(range(len(decays)), key=lambda i: abs(decays[i] - FOLLOWED_DECAY))
    for name, w in theta.items():
        if name.startswith("w0"):
            w[..., :2] = 0.0
    theta["w0"][..., column, :2] = 1.0, -1.0
    for i in range(1, mlp.hidden_layers):
        theta[f"w{i}"][..., :2] = np.eye(mlp.hidden_size, 2)
    last = theta[f"w{mlp.hidden_layers}"]
    last[..., :2, :] = 0.0
    last[..., :2, 0] = scale, -scale


def fraction_left(t: Array, num_steps: Array | float, like: Array) -> Array:
    """(9,) tanh(10 (t / num_steps - c)): where in its training the model is (Metz et al. 2022b, App. B)."""
    xp = array_namespace(like)
    fraction = xp.astype(t, like.dtype) / num_steps
    return xp.tanh(10.0 * (fraction - constant((0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1), like)))


_EXPONENTS = tuple(np.linspace(0.0, 1.0, 10).tolist())


class LossHistory(NamedTuple):
    """Averages of the loss over ten time scales, from 1 step to the length of the training (Metz et al. 2022b).

    Ten numbers each: averages without bias correction, and the smallest of the corrected ones so far.
    """

    means: Array
    smallest: Array

    @classmethod
    def empty(cls, like: Array) -> LossHistory:
        return cls(new([0.0] * 10, like), new([999999999999.0] * 10, like))

    def add(self, loss: Array, t: Array, num_steps: Array | float) -> tuple[LossHistory, Array]:
        """(history with the loss of step t, (9,) features): how the loss of each time scale stands to the next longer.

        The features are 0 in the first two steps.
        """
        xp = array_namespace(self.means)
        like = self.means
        t = xp.astype(t, like.dtype)
        loss = xp.astype(loss, like.dtype)
        exponents = constant(_EXPONENTS, like)
        # time scales 10 ** linspace(1, log10(num_steps), 10); an average's decay is exp(-1 / scale)
        longest = xp.log(xp.asarray(num_steps, dtype=like.dtype, device=device(like)))
        logarithms = -xp.exp(-(math.log(10.0) + exponents * (longest - math.log(10.0))))
        rates = -xp.expm1(logarithms)
        seen = -xp.expm1((t + 1) * logarithms)

        # Also for the bound on the loss, whose averages have seen one step less.
        highest = xp.where(t == 0, loss, xp.max(self.means / seen))
        limit = 2.0 * xp.abs(highest)
        loss = xp.where(loss > limit, limit, loss)
        # Not decays * means + rates * loss: with long time scales the rounding of decays would show.
        means = self.means + rates * (loss - self.means)
        corrected = means / seen
        smallest = xp.where(corrected < self.smallest, corrected, self.smallest)

        span = corrected[1:] - smallest[:-1]
        ratio = (corrected[:-1] - smallest[:-1]) / xp.where(span < 1e-8, constant(1e-8, span), span)
        features = clip(ratio - 1.0, -1.0, 1.0)
        return LossHistory(means, smallest), xp.where(t <= 1, constant(0.0, features), features)
