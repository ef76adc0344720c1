"""The element-wise MLP: columns of every parameter, normalised, through a tiny network, to its step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..namespace import array_namespace
from ..reference import Array, Epsilons, TensorState, accumulate, columns, mlp
from ..spec import Scale
from .accumulators import Decays, ModelTensors, as_vector, clipped, like_before
from .results import Result

_ONE_PER_MOMENTUM = ("m", "m_rsqrt_rms")
_ONE_PER_SECOND_MOMENT = ("rms", "rsqrt_rms", "g_rsqrt_rms")
_FACTORED = ("fac_row", "fac_column", "rsqrt_fac_row", "rsqrt_fac_column", "fac_m")
_ONE_PER_FACTOR = ("fac_g", *_FACTORED)


@dataclass(frozen=True)
class ElementMlp:
    """What is fixed when such an update is compiled. The step of a parameter is

        multiplier * step_mult * direction * exp(exp_mult * magnitude) * scale

    where [direction, magnitude, messages...] are the outputs of the network and `multiplier` is the tensor's.
    """

    groups: tuple[str, ...]
    """Groups of columns (`reference.columns`), in the order of the network's input. The columns are divided by their
    root mean square over the tensor; constant inputs (time, conditioning) are a part of the first bias."""
    momenta: int
    second_moments: int
    factored_moments: int
    hidden_size: int
    hidden_layers: int
    step_mult: float
    exp_mult: float
    messages: int = 0
    """Outputs behind direction and magnitude, whose means over the tensor are returned."""
    scale: Scale = "none"
    """"parameter_rms": sqrt(mean p^2 + scale_epsilon), at most scale_cap * sqrt(elements)."""
    scale_epsilon: float = 0.0
    scale_cap: float | None = None
    activation: Literal["relu", "tanh"] = "relu"
    epsilons: Epsilons = Epsilons()  # noqa: RUF009  # immutable
    normalise_over: Literal["tensor", "matrix"] = "tensor"
    """"matrix": over the last two axes alone, so that each matrix of a stack has its own normalisers (celo2)."""
    factored_vectors: bool = True
    """Whether below rank 2 there are the columns that show factored moments, from "fac_row" to "fac_m"; if not
    (celo2), they are the last groups, and their rows of the first layer are not used there. "fac_g" is always there."""

    def group_size(self, group: str) -> int:
        """Columns of a group."""
        if group in _ONE_PER_MOMENTUM:
            return self.momenta
        if group in _ONE_PER_SECOND_MOMENT:
            return self.second_moments
        return self.factored_moments if group in _ONE_PER_FACTOR else 1

    def columns_of(self, ndim: int) -> int:
        """How many columns a tensor of so many axes has: the first ones."""
        kept = [g for g in self.groups if ndim >= 2 or self.factored_vectors or g not in _FACTORED]
        return sum(self.group_size(g) for g in kept)

    @property
    def layer_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each layer."""
        sizes = [sum(map(self.group_size, self.groups)), *[self.hidden_size] * self.hidden_layers]
        return tuple(zip(sizes, [*sizes[1:], 2 + self.messages], strict=True))


class Weights(NamedTuple):
    """Of each layer: (inputs, outputs) and (outputs,), or with a leading axis over the tensors."""

    w: tuple[Array, ...]
    b: tuple[Array, ...]

    def of(self, tensor: int, like: Array) -> Weights:
        """Those of one tensor, in the type of `like`."""
        xp = array_namespace(like)
        return Weights(
            tuple(xp.astype(w[tensor, ...] if w.ndim == 3 else w, like.dtype) for w in self.w),
            tuple(xp.astype(b[tensor, ...] if b.ndim == 2 else b, like.dtype) for b in self.b),
        )


def element_mlp(
    spec: ElementMlp,
    tensors: ModelTensors,
    decays: Decays,
    weights: Weights,
    multiplier: Array | None = None,
    gradient_clip: Array | float | None = None,
    steps_only: bool = False,
    column_mean_square: Array | None = None,
    bias_correction: Decays | None = None,
) -> Result:
    """One update of all tensors.

    multiplier: (tensors,), None for 1. gradient_clip: bound on the elements of the gradient.
    steps_only: `outputs` are the steps, neither multiplied by the learning rate nor added.
    column_mean_square: what `statistics` found for this step's columns, (tensors, columns); None: to be computed. What
    any other numbers do is not defined: an implementation may look at none or only some of them.
    bias_correction: 1 - decay^(steps taken, with this one) of each running average. All columns but "fac_g" show the
    averages divided by it; the state does not change. Only this definition has it, `Operations` does not.
    """
    if column_mean_square is not None:
        check_column_mean_square(spec, len(tensors), column_mean_square)
    outputs: list[Array] = []
    states: list[TensorState] = []
    messages: list[Array] = []
    for i in range(len(tensors)):
        before = tensors.states[i]
        p, g, state = as_vector(tensors.params[i], tensors.grads[i], before)
        xp = array_namespace(p)
        factor = None if multiplier is None else xp.astype(multiplier[i, ...], p.dtype)
        g = clipped(g * tensors.grad_scale, gradient_clip)
        state = accumulate(spec, decays.of(p), g, state)
        raw = columns(spec, p, g, state, state, spec.epsilons)
        if bias_correction is not None:
            raw = _corrected(spec, p, g, state, bias_correction.of(p), raw)
        found = None if column_mean_square is None else xp.astype(column_mean_square[i, ...], p.dtype)
        step, message = _step(spec, p, raw, weights.of(i, p), factor, found)
        step = xp.reshape(step, tensors.params[i].shape)
        outputs.append(step if steps_only else tensors.finish(i, step))
        states.append(like_before(before, state))
        messages.append(message)
    stacked = array_namespace(messages[0]).stack(messages) if spec.messages else None
    return Result(outputs, states, stacked)


def mean_squares(spec: ElementMlp, p: Array, g: Array, state: TensorState) -> Array:
    """(columns,) mean squares of one tensor's columns, of rank 1 and more; 0 for those that it lacks."""
    xp = array_namespace(p)
    there = spec.columns_of(p.ndim)
    found = [xp.mean(x * x) for x in columns(spec, p, g, state, state, spec.epsilons)]
    return xp.stack([x if k < there else xp.zeros_like(x) for k, x in enumerate(found)])


def check_column_mean_square(spec: ElementMlp, tensors: int, given: Array) -> None:
    """Raises ValueError where `element_mlp` cannot take it."""
    if spec.normalise_over != "tensor":
        raise ValueError("column_mean_square: with normalise_over='matrix' there is none of a whole tensor")
    expected = (tensors, spec.layer_sizes[0][0])
    if tuple(given.shape) != expected:
        raise ValueError(f"column_mean_square has shape {tuple(given.shape)}, expected {expected}")


def _step(
    spec: ElementMlp,
    p: Array,
    raw: Sequence[Array],
    weights: Weights,
    multiplier: Array | None,
    column_mean_square: Array | None,
) -> tuple[Array, Array]:
    """(step, messages) of one tensor, whose columns are `raw`."""
    xp = array_namespace(p)
    inputs = _normalised(spec, raw[: spec.columns_of(p.ndim)], p.ndim, column_mean_square)
    first = weights.w[0][: len(inputs), :]
    # Few operations: a network written out element by element takes XLA seconds to compile for each tensor.
    method: Literal["elementwise", "matmul"] = "matmul"
    direction, magnitude, *messages = mlp(
        [first, *weights.w[1:]], weights.b, inputs, tuple(p.shape), method, spec.activation
    )
    step = spec.step_mult * direction * xp.exp(spec.exp_mult * magnitude)
    if spec.scale == "parameter_rms":
        scale = xp.sqrt(xp.mean(p * p) + spec.scale_epsilon)
        if spec.scale_cap is not None:
            scale = clipped(scale, spec.scale_cap * math.sqrt(math.prod(p.shape)))
        step = step * scale
    if multiplier is not None:
        step = step * multiplier
    means = [xp.mean(x) for x in messages[: spec.messages]]
    return step, xp.stack(means) if means else xp.zeros_like(p[:0])


def _normalised(spec: ElementMlp, raw: Sequence[Array], ndim: int, given: Array | None) -> list[Array]:
    axes = tuple(range(ndim))[-2 if spec.normalise_over == "matrix" else 0 :]
    out = []
    for k, x in enumerate(raw):
        xp = array_namespace(x)
        mean_square = xp.mean(x * x, axis=axes, keepdims=True) if given is None else given[k, ...]
        out.append(x / xp.sqrt(mean_square + spec.epsilons.normaliser))
    return out


def _corrected(
    spec: ElementMlp, p: Array, g: Array, state: TensorState, corrections: Decays, raw: Sequence[Array]
) -> list[Array]:
    """The columns with bias-corrected averages, but "fac_g" as it is in `raw`."""
    xp = array_namespace(p)

    def divided(average: Array, correction: Array) -> Array:
        return (
            average / xp.reshape(correction, (-1,) + (1,) * (average.ndim - 1))
            if average.shape[0]
            else average
        )

    state = state._replace(
        momentum=divided(state.momentum, corrections.momentum),
        second_moment=divided(state.second_moment, corrections.second_moment),
        factored_row=divided(state.factored_row, corrections.factored),
        factored_column=divided(state.factored_column, corrections.factored),
    )
    groups = [group for group in spec.groups for _ in range(spec.group_size(group))]
    corrected = columns(spec, p, g, state, state, spec.epsilons)
    return [old if group == "fac_g" else new for group, old, new in zip(groups, raw, corrected, strict=True)]
