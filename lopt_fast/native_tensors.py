"""The tensors of a model as the CPU kernels of the operations take them: addresses, and how their memory lies."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .layout import column_shape, dense_strides, factored_dims, loops, memory_order, row_shape
from .operations import ModelTensors, Result
from .reference import Array, TensorState
from .spec import Accumulates, Averages

_STATE = ("momentum", "second_moment", "factored_row", "factored_column")
_PARAMETER, _GRADIENT, _OUTPUT, _COLUMNS = 9, 10, 11, 20
"""Places in a row of a table, and how many there are: see csrc/operations_python.cc."""


def refusal(
    p: Array, g: Array, state: TensorState, accumulates: Accumulates, by_matrix: bool = False
) -> str | None:
    """None, or the reason why the kernels cannot take this tensor as it lies in memory.

    accumulates: the averages that the operation reads. by_matrix: columns are normalised over the last two axes alone.
    """
    found = _row(p, g, state, Averages.of(accumulates), by_matrix)
    return found if isinstance(found, str) else None


_Stack: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides, in elements, of averages of one kind that follow each other in memory."""


class _Layout(NamedTuple):
    """How a parameter that the kernels take lies in memory, and how its state does."""

    itemsize: int
    kernel: tuple[int, ...]
    """(is float64, loops..., elements that share normalisers), see csrc/operations_python.cc"""
    state: tuple[_Stack | None, ...]
    """Of each array of `_STATE`; they may be further apart. None where there is none."""


class Table:
    """Those tensors that the kernels take, as they take them, and which are left to the definitions.

    Raises ValueError if there is none or (`written`) an array cannot be written to, TypeError for other libraries.
    """

    def __init__(
        self,
        tensors: ModelTensors,
        counts: Averages,
        *,
        written: bool = False,
        by_matrix: bool = False,
        refuse_all: bool = False,
    ) -> None:
        check_library(tensors)
        if written:
            _check_writable(tensors)
        self.taken: list[int] = []
        self.refused: list[int] = []
        rows = []
        for i, (p, g, state) in enumerate(zip(tensors.params, tensors.grads, tensors.states, strict=True)):
            row = "" if refuse_all else _row(p, g, state, counts, by_matrix)
            if isinstance(row, str):
                self.refused.append(i)
            else:
                self.taken.append(i)
                rows.append(row)
        self.widest = _widest(tensors.params)
        self._params, self._states = [*tensors.params], [*tensors.states]
        self._rows = np.array(rows, np.int64).reshape(len(rows), _COLUMNS)
        self._itemsize = 4 + 4 * self._rows[:, 0]
        self._rates = np.empty((len(rows), 2))

    def __len__(self) -> int:
        return len(self._params)

    def filled(self, tensors: ModelTensors, outputs: Sequence[Array] | None = None) -> tuple[int, int, int]:
        """Those taken, with all that may change from call to call: (number, addresses of rows and of rates), which are
        valid as long as this table. outputs: None for the parameters themselves."""
        parameters = self._rows[:, _PARAMETER]
        self._rows[:, _OUTPUT] = parameters if outputs is None else self._addresses(outputs)
        self._rates[:, 0] = [float(tensors.lr[i]) for i in self.taken]
        self._rates[:, 1] = [float(tensors.weight_decay[i]) for i in self.taken]
        return len(self.taken), address_of(self._rows), address_of(self._rates)

    def fits(self, tensors: ModelTensors) -> bool:
        """Whether these are the same parameters and states, as objects; then it has the new gradients' addresses."""
        same = len(tensors) == len(self) and all(map(is_, tensors.params, self._params))
        if not same or not all(map(is_, tensors.states, self._states)):
            return False
        gradients = self._rows[:, _GRADIENT]
        gradients[:] = self._addresses(tensors.grads)
        return not (gradients % self._itemsize).any()

    def _addresses(self, arrays: Sequence[Array]) -> list[int]:
        """Of those that are taken."""
        return [address_of(arrays[i]) for i in self.taken]

    def place(self, result: Result, outputs: Sequence[Array]) -> None:
        """Copies what the definitions gave for the refused tensors to where the kernels would have written it."""
        for i, output, state in zip(self.refused, result.outputs, result.states, strict=True):
            _assign(outputs[i], output)
            for to, values in zip(self._states[i], state, strict=True):
                _assign(to, values)


class Kept:
    """Tables that are kept from call to call.

    Whoever passes one to `CpuOperations` promises that parameters and states, where they are the same objects, are the
    same memory, and that gradients have the type, shape and order in memory that they had in the first call.
    """

    def __init__(self) -> None:
        self._tables: dict[Any, Table] = {}

    def table(self, tensors: ModelTensors, counts: Averages, **how: bool) -> Table:
        """As `Table`."""
        key = counts, *how.items()
        if key not in self._tables or not self._tables[key].fits(tensors):
            self._tables[key] = Table(tensors, counts, **how)
        return self._tables[key]


def _row(p: Array, g: Array, state: TensorState, counts: Averages, by_matrix: bool) -> list[int] | str:
    """A row of a table, without an output; or why not."""
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
    return [*layout.kernel, *addresses[:2], 0, *addresses[2:], *distances]


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
        (itemsize == 8, *astuple(loops(shape, order)), normalised_over),
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


def check_library(tensors: ModelTensors) -> None:
    if not len(tensors):
        raise ValueError("there are no tensors")
    for i, p in enumerate(tensors.params):
        if not isinstance(p, np.ndarray) and not hasattr(p, "data_ptr"):
            raise TypeError(
                f"params[{i}] is a {type(p).__name__}: NumPy arrays and PyTorch tensors are taken"
            )


def _check_writable(tensors: ModelTensors) -> None:
    for i, (p, state) in enumerate(zip(tensors.params, tensors.states, strict=True)):
        written = [("params", p)] if tensors.apply else []
        for name, a in (*written, *state._asdict().items()):
            if isinstance(a, np.ndarray) and a.size and not a.flags.writeable:
                raise ValueError(f"{name} of tensor {i} is read-only: pass a copy, or use copies=True")


def _widest(params: Sequence[Array]) -> Any:
    """The widest type, of the parameters' library."""
    types = {p.dtype for p in params}
    if isinstance(params[0], np.ndarray):
        return np.result_type(*types)
    widest = types.pop()
    for dtype in types:
        widest = sys.modules["torch"].promote_types(widest, dtype)
    return widest


def _memory(a: Array) -> tuple[tuple[int, ...], tuple[int, ...], Any, int] | str:
    """(shape, strides in elements, type, address), or the reason why there is no such memory."""
    if isinstance(a, np.ndarray):
        if not a.flags.aligned:
            return "an array is not aligned to its item size"
        return a.shape, tuple([s // a.itemsize for s in a.strides]), a.dtype, address_of(a)
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


def address_of(a: Array) -> int:
    """Of the first element."""
    return a.__array_interface__["data"][0] if isinstance(a, np.ndarray) else a.data_ptr()


def _assign(to: Array, values: Array) -> None:
    if isinstance(to, np.ndarray):
        np.copyto(to, values)
    else:
        to.detach().copy_(values)
