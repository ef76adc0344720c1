"""The definition of every operation in plain array code, for NumPy (in float64: the oracle), PyTorch and JAX.

Written against the Python array API standard, so that one text serves all three; also the implementation that is
used where no kernel exists. Equations: Metz et al. 2022 (arXiv 2203.11860), Appendix A.

Shapes: `p` and `g` have any shape. Decays lie on a leading axis: momentum (n_m, *shape), second moment
(n_r, *shape), row accumulator (n_f, *shape without d0), column accumulator (n_f, *shape without d1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from array_api_compat import array_namespace, device

from .layout import column_shape, factored_dims, row_shape
from .spec import LAGGED_CLIP, TIMESCALES, Accumulates, Spec

Array: TypeAlias = Any
"""An array of any library of the array API standard."""

RMS_EPSILON = 1e-6  # rsqrt(second moment + ...), and m * (v + ...)^-1/2 where the tensor is not factored
SQUARE_EPSILON = 1e-30  # g^2 + ..., before it is averaged
ROW_MEAN_EPSILON = 1e-9  # row / (mean of row + ...)
FACTOR_FLOOR = 1e-9  # rsqrt(max(factor, ...))
DIAGONAL_EPSILON = 1e-9  # rsqrt(v + ...) of the preconditioned gradient where the tensor is not factored
FACTOR_EPSILON = 1e-8  # rsqrt(row + ...), rsqrt(column + ...)
NORMALISER_EPSILON = 1e-5  # x * rsqrt(mean x^2 + ...)
CLIP_EPSILON = 1e-6  # max_norm / (norm of all gradients + ...)
LOG_EPSILON = 1e-8  # log(|p| + ...)
GRADIENT_BOUND = 0.1  # of the column clip_g


class TensorState(NamedTuple):
    """Accumulators of one tensor. What a specification or a shape does not use is an array of size 0."""

    momentum: Array
    second_moment: Array
    factored_row: Array
    """Row accumulator; the full-size accumulator where rank < 2."""
    factored_column: Array
    mean_squares: Array
    """(normalised columns,) mean squares of the per-parameter columns of the last step (0 elsewhere), used by lagged
    statistics alone."""


def decay_complements(xp: Any, spec: Spec, theta: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """1 - decay of momentum, second moment and factored accumulators: (1 - b0) * exp(10 theta).

    A learned decay may leave [0, 1]; it is clipped there for the second moments, not for momentum.
    """

    def complement(initial: tuple[float, ...], offsets: Array) -> Array:
        rates = xp.asarray([1.0 - b for b in initial], dtype=offsets.dtype, device=device(offsets))
        return rates * xp.exp(10.0 * offsets)

    return (
        complement(spec.momentum_decays, theta["momentum_decays"]),
        xp.clip(complement(spec.rms_decays, theta["rms_decays"]), 0.0, 1.0),
        xp.clip(complement(spec.adafactor_decays, theta["adafactor_decays"]), 0.0, 1.0),
    )


def flatten_theta(spec: Spec, theta: Mapping[str, Array]) -> Array:
    """(theta_size,) meta-parameters as the kernels take them: weights and biases in the order of
    `Spec.theta_shapes`, then 1 - decay in place of the decay meta-parameters."""
    spec.check_theta(theta)
    xp = array_namespace(*theta.values())
    names = [n for n in spec.theta_shapes if not n.endswith("_decays")]
    parts = [xp.reshape(theta[n], (-1,)) for n in names]
    return xp.concat([*parts, *decay_complements(xp, spec, theta)])


def init_state(spec: Spec, p: Array) -> TensorState:
    """All accumulators start at zero."""
    xp = array_namespace(p)
    shape = tuple(p.shape)

    def zeros(used: bool, *dims: int) -> Array:
        return xp.zeros(dims if used else (0,), dtype=p.dtype, device=device(p))

    n_m, n_r, n_f = len(spec.momentum_decays), len(spec.rms_decays), len(spec.adafactor_decays)
    factored = len(shape) >= 2
    return TensorState(
        momentum=zeros(spec.uses_momentum, n_m, *shape),
        second_moment=zeros(spec.uses_second_moment, n_r, *shape),
        factored_row=zeros(spec.uses_factored, n_f, *(row_shape(shape) if factored else shape)),
        factored_column=zeros(
            spec.uses_factored and factored, n_f, *(column_shape(shape) if factored else ())
        ),
        mean_squares=zeros(spec.statistics == "lagged", len(spec.normalised_columns)),
    )


def _rsqrt(xp: Any, x: Array) -> Array:
    return 1.0 / xp.sqrt(x)


def _floor(xp: Any, x: Array, low: float) -> Array:
    """max(x, low) that keeps NaN."""
    return xp.where(x < low, xp.full_like(x, low), x)


def accumulate(
    spec: Accumulates, complements: tuple[Array, Array, Array], g: Array, state: TensorState
) -> TensorState:
    """The accumulators after gradient `g`: exponential moving averages of g, g^2 and the means of g^2.

    Each is written as b * a + (1 - b) * new: a + (1 - b) * (new - a) would not forget `a` where b is 0.
    """
    xp = array_namespace(g)
    d_m, d_r, d_f = complements

    def ema(old: Array, new: Array, rate: Array) -> Array:
        rate = xp.reshape(rate, (-1,) + (1,) * new.ndim)
        return (1.0 - rate) * old + rate * new[None]

    square = g * g
    new = state._asdict()
    if spec.momenta:
        new["momentum"] = ema(state.momentum, g, d_m)
    if spec.second_moments:
        new["second_moment"] = ema(state.second_moment, square, d_r)
    if spec.factored_moments:
        square = square + SQUARE_EPSILON
        dims = factored_dims(g.shape)
        if dims is None:
            new["factored_row"] = ema(state.factored_row, square, d_f)
        else:
            d1, d0 = dims
            new["factored_row"] = ema(state.factored_row, xp.mean(square, axis=d0), d_f)
            new["factored_column"] = ema(state.factored_column, xp.mean(square, axis=d1), d_f)
    return TensorState(**new)


class Epsilons(NamedTuple):
    """Those in which architectures differ."""

    rms: float = RMS_EPSILON
    """rsqrt(second moment + ...)"""
    diagonal_momentum: float = RMS_EPSILON
    """m * (v + ...)^-1/2 where the tensor is not factored"""
    normaliser: float = NORMALISER_EPSILON
    """x * rsqrt(mean x^2 + ...)"""


class Columns(Accumulates, Protocol):
    """Which columns are computed."""

    @property
    def groups(self) -> tuple[str, ...]: ...


def columns(
    spec: Columns,
    p: Array,
    g: Array,
    state: TensorState,
    factors: TensorState,
    epsilons: Epsilons = Epsilons(),  # noqa: B008  # immutable
) -> list[Array]:
    """The columns before normalisation, in the order of the MLP's input, each broadcastable to `p`.

    `state` gives momentum and second moment, `factors` the factored accumulators of a factored tensor (they are the
    same but for lagged statistics). A full-size accumulator (rank < 2) is always that of `state`.
    """
    xp = array_namespace(p)
    m, v = state.momentum, state.second_moment
    groups: dict[str, list[Array]] = {"g": [g], "p": [p]}
    if "clip_g" in spec.groups:
        bound = xp.full_like(g, GRADIENT_BOUND)
        groups["clip_g"] = [xp.where(g > bound, bound, xp.where(g < -bound, -bound, g))]
    if "log_abs_p" in spec.groups:
        groups["log_abs_p"] = [xp.log(xp.abs(p) + LOG_EPSILON)]
    if spec.momenta:
        groups["m"] = [m[i] for i in range(m.shape[0])]
    if spec.second_moments:
        groups["rms"] = [v[i] for i in range(v.shape[0])]
        groups["rsqrt_rms"] = [_rsqrt(xp, x + epsilons.rms) for x in groups["rms"]]
        groups["g_rsqrt_rms"] = [g * x for x in groups["rsqrt_rms"]]
        if spec.momenta and len(groups["rms"]) in (1, spec.momenta):
            r = groups["rsqrt_rms"]
            groups["m_rsqrt_rms"] = [x * r[i if len(r) > 1 else 0] for i, x in enumerate(groups["m"])]
    if spec.factored_moments:
        dims = factored_dims(p.shape)
        if dims is None:
            diagonal = [state.factored_row[i] for i in range(state.factored_row.shape[0])]
            inverse = [_rsqrt(xp, x + FACTOR_EPSILON) for x in diagonal]
            groups["fac_g"] = [
                g * _rsqrt(xp, _floor(xp, x + DIAGONAL_EPSILON, FACTOR_FLOOR)) for x in diagonal
            ]
            groups |= {"fac_row": diagonal, "fac_column": diagonal}
            groups |= {"rsqrt_fac_row": inverse, "rsqrt_fac_column": inverse}
            scales = [_rsqrt(xp, x + epsilons.diagonal_momentum) for x in diagonal]
        else:
            d1, d0 = dims
            # Keep the missing axes as axes of size 1: row and column columns stay small until they are summed.
            row, column = (
                xp.expand_dims(factors.factored_row, axis=d0 + 1),
                xp.expand_dims(factors.factored_column, axis=d1 + 1),
            )
            row_mean = xp.mean(row, axis=d1 + 1, keepdims=True)
            row_factor = _rsqrt(xp, _floor(xp, row / (row_mean + ROW_MEAN_EPSILON), FACTOR_FLOOR))
            column_factor = _rsqrt(xp, _floor(xp, column, FACTOR_FLOOR))
            scales = [row_factor[i] * column_factor[i] for i in range(row.shape[0])]
            groups["fac_g"] = [g * s for s in scales]
            groups["fac_row"] = [row[i] for i in range(row.shape[0])]
            groups["fac_column"] = [column[i] for i in range(column.shape[0])]
            groups["rsqrt_fac_row"] = [_rsqrt(xp, x + FACTOR_EPSILON) for x in groups["fac_row"]]
            groups["rsqrt_fac_column"] = [_rsqrt(xp, x + FACTOR_EPSILON) for x in groups["fac_column"]]
        if spec.momenta and len(scales) == len(groups["m"]):
            groups["fac_m"] = [x * s for x, s in zip(groups["m"], scales, strict=True)]
    return [x for name in spec.groups for x in groups[name]]


def normalise(spec: Spec, raw: list[Array], state: TensorState, t: Array | int) -> tuple[list[Array], Array]:
    """Columns divided by their root mean square over the tensor, and the mean squares that the next step may use.

    With lagged statistics the mean squares of per-parameter columns are those of `state`, but for the first step,
    and the normalised columns are clipped. Row and column columns always have their own, which are those of the
    accumulators that they show.
    """
    xp = array_namespace(raw[0])
    lagged = spec.statistics == "lagged"
    factored = raw[0].ndim >= 2
    out, mean_squares = [], []
    for i, (column, x) in enumerate(zip(spec.normalised_columns, raw, strict=True)):
        mean_square = xp.mean(x * x)
        per_parameter = column.kind == "element" or not factored
        mean_squares.append(mean_square if per_parameter else xp.zeros_like(mean_square))
        if lagged and per_parameter:
            used = xp.where(xp.asarray(t, device=device(x)) == 0, mean_square, state.mean_squares[i])
            x = x * _rsqrt(xp, used + NORMALISER_EPSILON)
            bound = xp.full_like(x, LAGGED_CLIP)
            x = xp.where(x > bound, bound, xp.where(x < -bound, -bound, x))
        else:
            x = x * _rsqrt(xp, mean_square + NORMALISER_EPSILON)
        out.append(x)
    return out, xp.stack(mean_squares) if lagged else state.mean_squares


def time_columns(xp: Any, t: Array | int, like: Array) -> list[Array]:
    """tanh(t / x - 1) for each timescale x."""
    now = xp.astype(xp.asarray(t, device=device(like)), like.dtype)
    return [xp.tanh(now / x - 1.0) for x in TIMESCALES]


def mlp(
    weights: Sequence[Array],
    biases: Sequence[Array],
    inputs: list[Array],
    shape: tuple[int, ...],
    method: Literal["elementwise", "matmul"],
    activation: Literal["relu", "tanh"] = "relu",
) -> list[Array]:
    """Outputs of every parameter, each of `shape`; the last layer is linear.

    weights, biases: of each layer, (inputs, outputs) and (outputs,).
    `elementwise` expands the products over columns and units and keeps row and column columns small; `matmul`
    stacks all columns to (*shape, inputs) first.
    """
    xp = array_namespace(*inputs)
    layers = len(weights)

    def activate(x: Array) -> Array:
        return xp.tanh(x) if activation == "tanh" else _floor(xp, x, 0.0)

    if method == "matmul":
        x = xp.stack([xp.broadcast_to(c, shape) for c in inputs], axis=-1)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            x = x @ w + b
            x = activate(x) if i + 1 < layers else x
        return [x[..., i] for i in range(x.shape[-1])]
    units = inputs
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        sums = []
        for j in range(w.shape[1]):
            by_size: dict[
                tuple[int, ...], Array
            ] = {}  # sum equal shapes first: row and column sums stay small
            for k, x in enumerate(units):
                term, key = x * w[k, j], tuple(x.shape)
                by_size[key] = by_size[key] + term if key in by_size else term
            total = b[j]
            for part in sorted(by_size.values(), key=lambda a: math.prod(a.shape)):
                total = total + part
            sums.append(activate(total) if i + 1 < layers else total)
        units = sums
    return [xp.broadcast_to(unit, shape) for unit in units]


def update(
    spec: Spec,
    theta: Mapping[str, Array],
    p: Array,
    g: Array,
    state: TensorState,
    t: Array | int,
    *,
    lr: Array | float = 1.0,
    weight_decay: Array | float = 0.0,
    grad_scale: Array | float = 1.0,
    method: Literal["elementwise", "matmul"] | None = None,
) -> tuple[Array, TensorState]:
    """One step on one tensor: (what is to be added to `p`, state after the step).

    `t` is the number of steps taken before. `grad_scale` multiplies the gradient first (global-norm clipping).
    The added value is -lr * (step + weight_decay * p).
    """
    xp = array_namespace(p)
    shape = tuple(p.shape)
    if 0 in shape:
        return xp.zeros_like(p), state
    if method is None:
        method = "elementwise" if spec.hidden_size <= 8 else "matmul"
    squeeze = not shape
    if squeeze:  # a scalar is a vector of one element
        p, g, shape = xp.reshape(p, (1,)), xp.reshape(g, (1,)), (1,)
        state = TensorState(*(xp.reshape(a, (*a.shape, 1)) if a.ndim == 1 and i < 3 and a.size else a
                              for i, a in enumerate(state)))  # fmt: skip
    g = g * grad_scale
    new = accumulate(spec, decay_complements(xp, spec, theta), g, state)
    factors = new
    if spec.statistics == "lagged" and len(shape) >= 2 and spec.uses_factored:
        first = xp.asarray(t, device=device(p)) == 0
        factors = new._replace(
            factored_row=xp.where(first, new.factored_row, state.factored_row),
            factored_column=xp.where(first, new.factored_column, state.factored_column),
        )
    normalised, mean_squares = normalise(spec, columns(spec, p, g, new, factors), state, t)
    inputs = [*normalised, *time_columns(xp, t, p)]
    layers = range(len(spec.layer_sizes))
    direction, magnitude = mlp(
        [theta[f"w{i}"] for i in layers], [theta[f"b{i}"] for i in layers], inputs, shape, method
    )
    step = spec.step_mult * direction * xp.exp(spec.exp_mult * magnitude)
    if spec.scale == "parameter_rms":
        p_square = xp.mean(p * p)
        if spec.statistics == "lagged":
            index = next(i for i, c in enumerate(spec.normalised_columns) if c.group == "p")
            p_square = xp.where(xp.asarray(t, device=device(p)) == 0, p_square, state.mean_squares[index])
        step = step * xp.sqrt(p_square + spec.scale_epsilon)
    delta = -lr * (step + weight_decay * p)
    new = new._replace(mean_squares=mean_squares)
    if squeeze:
        delta = xp.reshape(delta, ())
        new = TensorState(
            *(xp.reshape(a, (a.shape[0],)) if i < 3 and a.size else a for i, a in enumerate(new))
        )
    return delta, new
