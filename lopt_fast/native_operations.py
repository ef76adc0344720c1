"""`Operations` of the CPU kernels, in place: on NumPy arrays and on PyTorch's tensors in main memory."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from .backends import native
from .native_tensors import Kept as Kept
from .native_tensors import Table, address_of, check_library
from .native_tensors import refusal as refusal
from .operations import AdamScalars, Decays, ElementMlp, ModelTensors, Reference, Result, Statistics, Weights
from .operations.adam import ADAM_AVERAGES
from .operations.mlp import check_column_mean_square
from .operations.statistics import has_column_mean_square
from .reference import Array, TensorState
from .spec import Accumulates, Averages

MOST_AVERAGES = 8
"""Running averages of one kind that the kernels take (kernels/common/operands.h)."""
MOST_HIDDEN = 256
MOST_LAYERS = 8
_STATISTICS_ALONE = 5
"""Columns of the kernel's result before those of momenta and second moments."""


def unsupported(spec: ElementMlp) -> str | None:
    """None, or the reason why the kernel cannot compute this specification for any tensor."""
    averages = max(Averages.of(spec))
    factored = [group != "fac_g" and "fac" in group.split("_") for group in spec.groups]
    if not 1 <= spec.hidden_size <= MOST_HIDDEN:
        return f"it takes hidden_size 1 to {MOST_HIDDEN}, not {spec.hidden_size}"
    if not 1 <= spec.hidden_layers <= MOST_LAYERS:
        return f"it takes 1 to {MOST_LAYERS} hidden layers, not {spec.hidden_layers}"
    if averages > MOST_AVERAGES:
        return f"it takes {MOST_AVERAGES} running averages of a kind, not {averages}"
    if len(set(spec.groups)) < len(spec.groups):
        return "it takes each group of columns once"
    if not spec.factored_vectors and factored != sorted(factored):
        return "where vectors lack the columns that show factored moments, it takes those groups last"
    return None


@lru_cache(maxsize=64)
def unsupported_on_gpus(spec: ElementMlp) -> str | None:
    """None, or the reason why the CUDA kernels cannot compute this specification for any tensor.

    Raises BackendError where the compiled core is missing.
    """
    reason: str | None = native().gpu_mlp_refusal(mlp_spec(spec), Averages.of(spec))
    return reason


def columns_of_statistics(accumulates: Accumulates, decays: Decays | None) -> ElementMlp | None:
    """The MLP whose columns' mean squares the kernel of statistics finds as well, if any."""
    if decays is None or not has_column_mean_square(accumulates) or unsupported(accumulates):
        return None
    return accumulates


class CpuOperations:
    """The operations (`lopt_fast.operations.Operations`) on NumPy arrays or PyTorch tensors.

    States are written in place and returned; so are parameters with `ModelTensors.apply`, else outputs are new arrays.
    A tensor that the kernels refuse (`refusal`) goes through the definitions and is copied into place. Numbers that are
    arrays (weights, decays, learning rates) are read on the host: on another device they are waited for.

    pool: "serial", "own" (std::thread) or "openmp" (the libgomp that the process has loaded, PyTorch's).
    threads: 0 for as many as the pool has. Results are the same bits for all of them.
    copies: write to copies of parameters and states instead.
    kept: where to keep what is prepared; see there what that promises.
    in_numpy: operands and results that are not as large as parameters are NumPy arrays, also of PyTorch's tensors.

    Raises BackendError where the compiled core is missing, TypeError for arrays of other libraries, ValueError for
    arrays that do not fit; nothing has been written then.
    """

    def __init__(
        self,
        pool: str = "own",
        threads: int = 0,
        copies: bool = False,
        kept: Kept | None = None,
        in_numpy: bool = False,
    ) -> None:
        if pool not in ("serial", "own", "openmp"):
            raise ValueError(f"pool={pool!r}: must be 'serial', 'own' or 'openmp'")
        self._threads: dict[str, Any] = {"pool": pool, "threads": threads}
        self._copies = copies
        self._table = Table if kept is None else kept.table
        self._in_numpy = in_numpy
        self._native = native()

    def statistics(
        self,
        accumulates: Accumulates,
        tensors: ModelTensors,
        decays: Decays | None,
        gradient_clip: Array | float | None = None,
        before: bool = False,
    ) -> Statistics:
        spec = columns_of_statistics(accumulates, decays)
        counts = Averages.of(accumulates)
        counts = counts if spec else counts._replace(factored_moments=0)
        table = self._table(tensors, counts)
        places = _statistics_places(counts, spec)
        rows = np.empty((len(tensors), places[-1].stop))
        if table.refused:
            some = Reference.statistics(
                spec or counts,
                tensors.select(table.refused),
                _as_operands(decays, tensors),
                gradient_clip,
                before,
            )
            _put(rows, table.refused, some, places)
        if table.taken:
            found = np.empty((len(table.taken), rows.shape[1]))
            rates = ([0.0] * counts[0], [0.0] * counts[1], []) if decays is None else _rates(decays, counts)
            self._native.statistics(
                rates=rates, columns=None if spec is None else mlp_spec(spec),
                moved=decays is not None and not before, tensors=table.filled(tensors), out=address_of(found),
                **_gradient_rule(tensors, gradient_clip), **self._threads,
            )  # fmt: skip
            rows[table.taken] = found
        return self._statistics(rows, places, tensors, table)

    def element_mlp(
        self,
        spec: ElementMlp,
        tensors: ModelTensors,
        decays: Decays,
        weights: Weights,
        multiplier: Array | None = None,
        gradient_clip: Array | float | None = None,
        steps_only: bool = False,
        column_mean_square: Array | None = None,
    ) -> Result:
        if column_mean_square is not None:
            check_column_mean_square(spec, len(tensors), column_mean_square)
        counts = Averages.of(spec)
        tensors = self._copied(tensors)
        by_matrix = spec.normalise_over == "matrix"
        table = self._table(
            tensors, counts, written=True, by_matrix=by_matrix, refuse_all=unsupported(spec) is not None
        )
        outputs, new, mode = _outputs(tensors, steps_only)
        messages = np.empty((len(tensors), spec.messages))
        if table.refused:
            some = Weights(
                tuple(_some(w, 3, table.refused) for w in weights.w),
                tuple(_some(b, 2, table.refused) for b in weights.b),
            )
            factor = None if multiplier is None else multiplier[table.refused]
            given = None if column_mean_square is None else column_mean_square[table.refused]
            rates, some, factor, given = _as_operands((decays, some, factor, given), tensors)
            result = Reference.element_mlp(
                spec, tensors.select(table.refused), rates, some, factor, gradient_clip, steps_only, given
            )
            if spec.messages:
                messages[table.refused] = _numbers(result.messages)
        if table.taken:
            found = np.empty((len(table.taken), spec.messages))
            layers = [
                (_rows_of(w, 3, table, f"w[{i}]"), _rows_of(b, 2, table, f"b[{i}]"))
                for i, (w, b) in enumerate(zip(weights.w, weights.b, strict=True))
            ]
            factors = None if multiplier is None else _rows_of(multiplier, 1, table, "multiplier")
            squares = (
                None if column_mean_square is None else _rows_of(column_mean_square, 2, table, "squares")
            )
            self._native.element_mlp(
                spec=mlp_spec(spec), rates=_rates(decays, counts), layers=[_layer(w, b) for w, b in layers],
                tensors=table.filled(tensors, new), multipliers=0 if factors is None else address_of(factors),
                column_mean_square=0 if squares is None else address_of(squares), output=mode,
                messages=address_of(found), **_gradient_rule(tensors, gradient_clip), **self._threads,
            )  # fmt: skip
            messages[table.taken] = found
        if table.refused:
            table.place(result, outputs)
        _tell_autograd(tensors, mode)
        found_messages = self._result(messages, tensors, table) if spec.messages else None
        return Result(outputs, tensors.states, found_messages)

    def adam(
        self,
        tensors: ModelTensors,
        scalars: AdamScalars,
        gradient_clip: Array | float | None = None,
        statistics: bool = False,
    ) -> Result:
        tensors = self._copied(tensors)
        table = self._table(tensors, Averages.of(ADAM_AVERAGES), written=True)
        outputs, new, mode = _outputs(tensors)
        places = _statistics_places(Averages.of(ADAM_AVERAGES))
        rows = np.empty((len(tensors), places[-1].stop))
        if table.refused:
            some = _as_operands(AdamScalars(*(x[table.refused] for x in scalars)), tensors)
            result = Reference.adam(tensors.select(table.refused), some, gradient_clip, statistics)
            if result.statistics is not None:
                _put(rows, table.refused, result.statistics, places)
        if table.taken:
            columns = [
                _rows_of(x, 1, table, f"scalars.{name}")
                for name, x in zip(scalars._fields, scalars, strict=True)
            ]
            numbers = np.stack(columns, axis=-1)
            found = np.empty((len(table.taken), rows.shape[1]))
            self._native.adam(
                tensors=table.filled(tensors, new), scalars=address_of(numbers), output=mode,
                statistics=address_of(found) if statistics else 0,
                **_gradient_rule(tensors, gradient_clip), **self._threads,
            )  # fmt: skip
            rows[table.taken] = found
        if table.refused:
            table.place(result, outputs)
        _tell_autograd(tensors, mode)
        seen = self._statistics(rows, places, tensors, table) if statistics else None
        return Result(outputs, tensors.states, statistics=seen)

    def _copied(self, tensors: ModelTensors) -> ModelTensors:
        """The tensors with the arrays that are to be written."""
        if not self._copies:
            return tensors
        check_library(tensors)
        return replace(
            tensors,
            params=[_copy(p) for p in tensors.params] if tensors.apply else tensors.params,
            states=[TensorState(*map(_copy, state)) for state in tensors.states],
        )

    def _statistics(
        self, rows: np.ndarray, places: list[slice], tensors: ModelTensors, table: Table
    ) -> Statistics:
        alone = [rows[:, place.start] for place in places[:_STATISTICS_ALONE]]
        several = [rows[:, place] for place in places[_STATISTICS_ALONE:]]
        return Statistics(*(self._result(values, tensors, table) for values in (*alone, *several)))

    def _result(self, values: np.ndarray, tensors: ModelTensors, table: Table) -> Array:
        """In the widest type of the parameters."""
        p = tensors.params[0]
        if self._in_numpy or isinstance(p, np.ndarray):
            return values.astype(str(table.widest).removeprefix("torch."))
        return sys.modules["torch"].asarray(np.ascontiguousarray(values), dtype=table.widest, device=p.device)


# ---- what differs between NumPy and PyTorch ----


def _copy(a: Array) -> Array:
    return np.copy(a, order="K") if isinstance(a, np.ndarray) else a.detach().clone()


def _as_operands(operand: Any, tensors: ModelTensors) -> Any:
    """Arrays, and those in tuples, in the library of the tensors."""
    if isinstance(operand, np.ndarray) and not isinstance(tensors.params[0], np.ndarray):
        return sys.modules["torch"].as_tensor(operand)
    if isinstance(operand, tuple):
        found = [_as_operands(x, tensors) for x in operand]
        return type(operand)(*found) if hasattr(operand, "_fields") else tuple(found)
    return operand


def _numbers(a: Array) -> np.ndarray:
    """On the host, float64."""
    if hasattr(a, "detach"):
        a = a.detach().cpu().numpy()
    return np.ascontiguousarray(a, np.float64)


def _outputs(tensors: ModelTensors, steps_only: bool = False) -> tuple[list[Array], list[Array] | None, str]:
    """Where results go, the same where it is not the parameters, and what they are."""
    if tensors.apply and not steps_only:
        return list(tensors.params), None, "parameter"
    torch_or_numpy = np if isinstance(tensors.params[0], np.ndarray) else sys.modules["torch"]
    new = [torch_or_numpy.empty_like(p) for p in tensors.params]
    return new, new, "step" if steps_only else "delta"


def _tell_autograd(tensors: ModelTensors, mode: str) -> None:
    """That the parameters have changed."""
    if mode == "parameter" and not isinstance(tensors.params[0], np.ndarray):
        sys.modules["torch"].autograd.graph.increment_version(tensors.params)


# ---- arguments of the kernels ----


@lru_cache(maxsize=64)
def mlp_spec(spec: ElementMlp) -> Any:
    """`spec` as the compiled core takes it."""
    return native().MlpSpec(
        groups=list(spec.groups),
        hidden_size=spec.hidden_size,
        hidden_layers=spec.hidden_layers,
        messages=spec.messages,
        step_mult=spec.step_mult,
        exp_mult=spec.exp_mult,
        parameter_rms=spec.scale == "parameter_rms",
        scale_epsilon=spec.scale_epsilon,
        scale_cap=math.inf if spec.scale_cap is None else spec.scale_cap,
        tanh=spec.activation == "tanh",
        rms_epsilon=spec.epsilons.rms,
        diagonal_momentum_epsilon=spec.epsilons.diagonal_momentum,
        normaliser_epsilon=spec.epsilons.normaliser,
        factored_vectors=spec.factored_vectors,
    )


def _rates(decays: Decays, counts: Averages) -> tuple[list[float], ...]:
    rates = []
    for name, values, count in zip(decays._fields, decays, counts, strict=True):
        rates.append(_numbers(values).reshape(-1).tolist() if count else [])
        if len(rates[-1]) != count:
            raise ValueError(f"decays.{name} has {len(rates[-1])} numbers, expected {count}")
    return tuple(rates)


def _gradient_rule(tensors: ModelTensors, gradient_clip: Array | float | None) -> dict[str, float]:
    bound = math.inf if gradient_clip is None else float(gradient_clip)
    return {"grad_scale": float(tensors.grad_scale), "grad_bound": bound}


def _some(a: Array, ndim: int, indices: list[int]) -> Array:
    """Those of some tensors, where there is an axis over them."""
    return a[indices] if a.ndim == ndim else a


def _rows_of(a: Array, ndim: int, table: Table, name: str) -> np.ndarray:
    """The numbers of the tensors that the kernels take: with `ndim` axes the first is over the tensors."""
    values = _numbers(a)
    if values.ndim != ndim:
        if values.ndim != ndim - 1 or ndim == 1:
            raise ValueError(f"{name} has shape {values.shape}: {ndim} axes are expected")
        return values
    if len(values) != len(table):
        raise ValueError(f"{name} has shape {values.shape} for {len(table)} tensors")
    return np.ascontiguousarray(values[table.taken]) if table.refused else values


def _layer(w: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
    """See csrc/operations_python.cc."""
    n_in, n_out = w.shape[-2:]
    if b.shape[-1] != n_out:
        raise ValueError(f"a layer has weights {w.shape} and biases {b.shape}")
    return (
        w.ctypes.data,
        b.ctypes.data,
        n_in,
        n_out,
        n_in * n_out if w.ndim == 3 else 0,
        n_out if b.ndim == 2 else 0,
    )


def _statistics_places(counts: Averages, columns: ElementMlp | None = None) -> list[slice]:
    """Where a row of the kernel's result holds each field of `Statistics`."""
    n_m, n_r, _ = counts
    sizes = [1] * _STATISTICS_ALONE + [n_m, n_m, n_r, n_r]
    if columns is not None:
        sizes.append(columns.layer_sizes[0][0])
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _put(rows: np.ndarray, indices: list[int], statistics: Statistics, places: list[slice]) -> None:
    """What the definition has found for some tensors into their rows."""
    for values, place in zip(statistics, places, strict=False):
        rows[indices, place] = _numbers(values).reshape(len(indices), -1)
