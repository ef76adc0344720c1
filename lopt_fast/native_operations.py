"""`Operations` of the CPU kernels, in place: on NumPy arrays and on PyTorch's tensors in main memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .backends import native
from .layout import column_shape, dense_strides, factored_dims, loops, memory_order, row_shape
from .operations import AdamScalars, Decays, ElementMlp, ModelTensors, Reference, Result, Statistics, Weights
from .operations.adam import ADAM_AVERAGES
from .reference import Array, TensorState
from .spec import Accumulates, Averages

MOST_AVERAGES = 8
"""Running averages of one kind that the kernels take (kernels/common/operands.h)."""
MOST_HIDDEN = 256
MOST_LAYERS = 8
_STATE = ("momentum", "second_moment", "factored_row", "factored_column")
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


def refusal(
    p: Array, g: Array, state: TensorState, accumulates: Accumulates, by_matrix: bool = False
) -> str | None:
    """None, or the reason why the kernels cannot take this tensor as it lies in memory.

    accumulates: the averages that the operation reads. by_matrix: columns are normalised over the last two axes alone.
    """
    found = _entry(p, g, state, Averages.of(accumulates), by_matrix)
    return found if isinstance(found, str) else None


class CpuOperations:
    """The operations (`lopt_fast.operations.Operations`) on NumPy arrays or PyTorch tensors.

    States are written in place and returned; so are parameters with `ModelTensors.apply`, else outputs are new arrays.
    A tensor that the kernels refuse (`refusal`) goes through the definitions and is copied into place. Numbers that are
    arrays (weights, decays, learning rates) are read on the host: on another device they are waited for.

    pool: "serial", "own" (std::thread) or "openmp" (the libgomp that the process has loaded, PyTorch's).
    threads: 0 for as many as the pool has. Results are the same bits for all of them.
    copies: write to copies of parameters and states instead.

    Raises BackendError where the compiled core is missing, TypeError for arrays of other libraries, ValueError for
    arrays that do not fit; nothing has been written then.
    """

    def __init__(self, pool: str = "own", threads: int = 0, copies: bool = False) -> None:
        if pool not in ("serial", "own", "openmp"):
            raise ValueError(f"pool={pool!r}: must be 'serial', 'own' or 'openmp'")
        self._threads: dict[str, Any] = {"pool": pool, "threads": threads}
        self._copies = copies
        self._native = native()

    def statistics(
        self,
        accumulates: Accumulates,
        tensors: ModelTensors,
        decays: Decays | None,
        gradient_clip: Array | float | None = None,
    ) -> Statistics:
        counts = Averages(accumulates.momenta, accumulates.second_moments, 0)
        _check_library(tensors)
        call = _Call(tensors, counts)
        columns = _statistics_columns(counts)
        rows = np.empty((len(tensors), _STATISTICS_ALONE + 2 * (counts[0] + counts[1])))
        if call.refused:
            some = Reference.statistics(accumulates, tensors.select(call.refused), decays, gradient_clip)
            for values, column in zip(some, columns, strict=True):
                rows[call.refused, column] = _numbers(values)
        if call.taken:
            found = np.empty((len(call.taken), rows.shape[1]))
            rates = ([0.0] * counts[0], [0.0] * counts[1], []) if decays is None else _rates(decays, counts)
            self._native.statistics(
                rates=rates, moved=decays is not None, tensors=call.table, out=found.ctypes.data,
                **_gradient_rule(tensors, gradient_clip), **self._threads,
            )  # fmt: skip
            rows[call.taken] = found
        return Statistics(*(_as_array(rows[:, column], tensors.params) for column in columns))

    def element_mlp(
        self,
        spec: ElementMlp,
        tensors: ModelTensors,
        decays: Decays,
        weights: Weights,
        multiplier: Array | None = None,
        gradient_clip: Array | float | None = None,
        steps_only: bool = False,
    ) -> Result:
        counts = Averages.of(spec)
        tensors = self._written(tensors)
        outputs, mode = _outputs(tensors, steps_only)
        by_matrix = spec.normalise_over == "matrix"
        call = _Call(tensors, counts, outputs, by_matrix, refuse_all=unsupported(spec) is not None)
        messages = np.empty((len(tensors), spec.messages))
        if call.refused:
            result = Reference.element_mlp(
                spec, tensors.select(call.refused), decays,
                Weights(tuple(_some(w, 3, call.refused) for w in weights.w),
                        tuple(_some(b, 2, call.refused) for b in weights.b)),
                None if multiplier is None else multiplier[call.refused], gradient_clip, steps_only,
            )  # fmt: skip
            if spec.messages:
                messages[call.refused] = _numbers(result.messages)
        if call.taken:
            found = np.empty((len(call.taken), spec.messages))
            layers = [
                (_rows_of(w, 3, call, f"w[{i}]"), _rows_of(b, 2, call, f"b[{i}]"))
                for i, (w, b) in enumerate(zip(weights.w, weights.b, strict=True))
            ]
            factors = None if multiplier is None else _rows_of(multiplier, 1, call, "multiplier")
            self._native.element_mlp(
                spec=_kernel_spec(spec), rates=_rates(decays, counts), layers=[_layer(w, b) for w, b in layers],
                tensors=call.table, multipliers=0 if factors is None else factors.ctypes.data, output=mode,
                messages=found.ctypes.data, **_gradient_rule(tensors, gradient_clip), **self._threads,
            )  # fmt: skip
            messages[call.taken] = found
        if call.refused:
            call.place(result, outputs)
        _tell_autograd(tensors, mode)
        return Result(outputs, tensors.states, _as_array(messages, tensors.params) if spec.messages else None)

    def adam(
        self, tensors: ModelTensors, scalars: AdamScalars, gradient_clip: Array | float | None = None
    ) -> Result:
        tensors = self._written(tensors)
        outputs, mode = _outputs(tensors)
        call = _Call(tensors, Averages.of(ADAM_AVERAGES), outputs)
        if call.refused:
            some = AdamScalars(*(x[call.refused] for x in scalars))
            result = Reference.adam(tensors.select(call.refused), some, gradient_clip)
        if call.taken:
            columns = [
                _rows_of(x, 1, call, f"scalars.{name}")
                for name, x in zip(scalars._fields, scalars, strict=True)
            ]
            numbers = np.stack(columns, axis=-1)
            self._native.adam(
                tensors=call.table, scalars=numbers.ctypes.data, output=mode,
                **_gradient_rule(tensors, gradient_clip), **self._threads,
            )  # fmt: skip
        if call.refused:
            call.place(result, outputs)
        _tell_autograd(tensors, mode)
        return Result(outputs, tensors.states)

    def _written(self, tensors: ModelTensors) -> ModelTensors:
        """The tensors with the arrays that are to be written."""
        _check_library(tensors)
        if self._copies:
            return replace(
                tensors,
                params=[_copy(p) for p in tensors.params] if tensors.apply else tensors.params,
                states=[TensorState(*map(_copy, state)) for state in tensors.states],
            )
        for i, (p, state) in enumerate(zip(tensors.params, tensors.states, strict=True)):
            written = [("params", p)] if tensors.apply else []
            for name, a in (*written, *state._asdict().items()):
                if isinstance(a, np.ndarray) and a.size and not a.flags.writeable:
                    raise ValueError(f"{name} of tensor {i} is read-only: pass a copy, or use copies=True")
        return tensors


_Stack: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides, in elements, of averages of one kind that follow each other in memory."""


class _Layout(NamedTuple):
    """How a parameter that the kernels take lies in memory, and how its state does."""

    itemsize: int
    kernel: tuple[Any, ...]
    """(is float64, loops, elements that share normalisers), see csrc/operations_python.cc"""
    state: tuple[_Stack | None, ...]
    """Of each array of `_STATE`; they may be further apart. None where there is none."""


class _Call:
    """The tensors of one call: those that the kernels take, as they take them, and the others."""

    def __init__(
        self,
        tensors: ModelTensors,
        counts: Averages,
        outputs: Sequence[Array] | None = None,
        by_matrix: bool = False,
        refuse_all: bool = False,
    ) -> None:
        self.tensors = tensors
        self.taken: list[int] = []
        self.refused: list[int] = []
        self.table: list[tuple[Any, ...]] = []
        for i, (p, g, state) in enumerate(zip(tensors.params, tensors.grads, tensors.states, strict=True)):
            entry = "" if refuse_all else _entry(p, g, state, counts, by_matrix)
            if isinstance(entry, str):
                self.refused.append(i)
                continue
            kernel, addresses, strides = entry
            output = 0 if outputs is None else _address(outputs[i])
            self.taken.append(i)
            self.table.append((kernel, (*addresses[:2], output, *addresses[2:]), strides,
                               float(tensors.lr[i]), float(tensors.weight_decay[i])))  # fmt: skip

    def place(self, result: Result, outputs: list[Array]) -> None:
        """Copies what the definitions gave for the refused tensors to where the kernels would have written it."""
        for i, output, state in zip(self.refused, result.outputs, result.states, strict=True):
            _assign(outputs[i], output)
            for to, values in zip(self.tensors.states[i], state, strict=True):
                _assign(to, values)


def _entry(
    p: Array, g: Array, state: TensorState, counts: Averages, by_matrix: bool
) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[int, ...]] | str:
    """(layout, addresses of parameter, gradient and state, distances of the averages of each kind), or why not."""
    if problem := _unusual(p) or _unusual(g):
        return problem
    memory = _memory(p)
    if isinstance(memory, str):
        return memory
    shape, strides, dtype, address = memory
    layout = _layout(shape, strides, dtype, counts, by_matrix)
    if isinstance(layout, str):
        return layout
    memory = _memory(g)
    if isinstance(memory, str):
        return memory
    g_shape, g_strides, g_dtype, g_address = memory
    if (
        g_shape != shape
        or g_dtype != dtype
        or (g_strides != strides and not _same(shape, g_strides, strides))
    ):
        return "the gradient does not lie in memory as the parameter, in its type"
    addresses, distances, together = [address, g_address], [], address | g_address
    for name, a, expected in zip(_STATE, state, layout.state, strict=False):
        if expected is None:
            addresses.append(0)
            distances.append(0)
            continue
        memory = _memory(a)
        if isinstance(memory, str):
            return f"{name}: {memory}"
        a_shape, a_strides, a_dtype, address = memory
        e_shape, e_strides = expected
        same = a_strides == e_strides or _same(e_shape[1:], a_strides[1:], e_strides[1:])
        if a_dtype != dtype or a_shape != e_shape or not same:
            return f"{name} is not {e_shape} in the parameter's type and order in memory"
        if e_shape[0] > 1 and a_strides[0] < e_strides[0]:
            return f"the averages of {name} overlap"
        addresses.append(address)
        distances.append(a_strides[0])
        together |= address
    if together % layout.itemsize:
        return "an array is not aligned to its item size"
    return layout.kernel, tuple(addresses), tuple(distances)


@lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, counts: Averages, by_matrix: bool
) -> _Layout | str:
    itemsize = {"float32": 4, "float64": 8}.get(str(dtype).removeprefix("torch."))
    if itemsize is None:
        return "the kernels take float32 and float64"
    shape = tuple(shape)
    order = memory_order(strides, shape)
    if not _same(shape, strides, dense_strides(shape, order)):
        return "the parameter has gaps in memory"
    in_c_order = _same(shape, strides, dense_strides(shape, range(len(shape))))
    normalised_over = 0
    if by_matrix and len(shape) > 2:
        if not in_c_order:
            return "normalised by matrix, the parameter must lie in memory in the order of its axes"
        normalised_over = math.prod(shape[-2:])

    def state(count: int, of: tuple[int, ...], without: int | None = None) -> _Stack | None:
        kept = [axis for axis in range(len(shape)) if axis != without]
        inner = dense_strides(of, [kept.index(axis) for axis in order if axis != without])
        return ((count, *of), (math.prod(of), *inner)) if count else None

    n_m, n_r, n_f = counts
    d1, d0 = factored_dims(shape) or (None, None)
    return _Layout(
        itemsize,
        (itemsize == 8, astuple(loops(shape, order)), normalised_over),
        (
            state(n_m, shape),
            state(n_r, shape),
            state(n_f, shape if d0 is None else row_shape(shape), d0),
            None if d0 is None else state(n_f, column_shape(shape), d1),
        ),
    )


def _same(shape: Sequence[int], strides: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether strides of an array of this shape agree where they matter."""
    return strides == expected or 0 in shape or all(
        n == 1 or a == b for n, a, b in zip(shape, strides, expected, strict=True)
    )  # fmt: skip


# ---- what differs between NumPy and PyTorch ----


def _check_library(tensors: ModelTensors) -> None:
    if not len(tensors):
        raise ValueError("there are no tensors")
    for i, p in enumerate(tensors.params):
        if not isinstance(p, np.ndarray) and not hasattr(p, "data_ptr"):
            raise TypeError(
                f"params[{i}] is a {type(p).__name__}: NumPy arrays and PyTorch tensors are taken"
            )


def _memory(a: Array) -> tuple[tuple[int, ...], tuple[int, ...], Any, int] | str:
    """(shape, strides in elements, type, address), or the reason why there is no such memory."""
    if isinstance(a, np.ndarray):
        if not a.flags.aligned:
            return "an array is not aligned to its item size"
        return a.shape, tuple([s // a.itemsize for s in a.strides]), a.dtype, _address(a)
    if not a.is_cpu:
        return f"a tensor is on {a.device}"
    return a.shape, a.stride(), a.dtype, a.data_ptr()


def _unusual(a: Array) -> str | None:
    """None, or the reason why the memory of `a` does not hold its elements."""
    if isinstance(a, np.ndarray):
        return None
    if a.layout is not sys.modules["torch"].strided:
        return f"a tensor has layout {a.layout}"
    return "a tensor is lazily negated" if a.is_neg() else None


def _address(a: Array) -> int:
    return a.__array_interface__["data"][0] if isinstance(a, np.ndarray) else a.data_ptr()


def _copy(a: Array) -> Array:
    return np.copy(a, order="K") if isinstance(a, np.ndarray) else a.detach().clone()


def _assign(to: Array, values: Array) -> None:
    if isinstance(to, np.ndarray):
        np.copyto(to, values)
    else:
        to.detach().copy_(values)


def _numbers(a: Array) -> np.ndarray:
    """On the host, float64."""
    if hasattr(a, "detach"):
        a = a.detach().cpu().numpy()
    return np.ascontiguousarray(a, np.float64)


def _as_array(values: np.ndarray, params: Sequence[Array]) -> Array:
    """In the library and the widest type of the parameters."""
    types = {p.dtype for p in params}
    if isinstance(params[0], np.ndarray):
        return values.astype(np.result_type(*types))
    torch = sys.modules["torch"]
    widest = types.pop()
    for dtype in types:
        widest = torch.promote_types(widest, dtype)
    return torch.asarray(np.ascontiguousarray(values), dtype=widest, device=params[0].device)


def _outputs(tensors: ModelTensors, steps_only: bool = False) -> tuple[list[Array], str]:
    """Where results go, and what they are."""
    if tensors.apply and not steps_only:
        return list(tensors.params), "parameter"
    mode = "step" if steps_only else "delta"
    if isinstance(tensors.params[0], np.ndarray):
        return [np.empty_like(p) for p in tensors.params], mode
    return [sys.modules["torch"].empty_like(p) for p in tensors.params], mode


def _tell_autograd(tensors: ModelTensors, mode: str) -> None:
    """That the parameters have changed."""
    if mode == "parameter" and not isinstance(tensors.params[0], np.ndarray):
        sys.modules["torch"].autograd.graph.increment_version(tensors.params)


# ---- arguments of the kernels ----


@lru_cache(maxsize=64)
def _kernel_spec(spec: ElementMlp) -> Any:
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


def _rows_of(a: Array, ndim: int, call: _Call, name: str) -> np.ndarray:
    """The numbers of the tensors that the kernels take: with `ndim` axes the first is over the tensors."""
    values = _numbers(a)
    if values.ndim != ndim:
        if values.ndim != ndim - 1 or ndim == 1:
            raise ValueError(f"{name} has shape {values.shape}: {ndim} axes are expected")
        return values
    if len(values) != len(call.tensors):
        raise ValueError(f"{name} has shape {values.shape} for {len(call.tensors)} tensors")
    return np.ascontiguousarray(values[call.taken]) if call.refused else values


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


def _statistics_columns(counts: Averages) -> list[int | slice]:
    """Where the kernel's result holds each field of `Statistics`."""
    n_m, n_r, first = counts[0], counts[1], _STATISTICS_ALONE
    ends = np.cumsum([first, n_m, n_m, n_r, n_r]).tolist()
    return [0, 1, 2, 3, 4, *(slice(a, b) for a, b in pairwise(ends))]
