"""The CPU kernels on NumPy arrays, in place, and what bindings share: how a tensor and its state lie in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from .backends import choose, native
from .layout import Loops, Part, dense_strides, factored_dims, loops, memory_order
from .reference import TensorState, flatten_theta
from .spec import Accumulates, Spec

DTYPES = ("float32", "float64")
"""Names of the types that the kernels compute and keep state in."""

HALF_TYPES = ("bfloat16", "float16")
"""Names of the types that parameters and gradients may have as well."""

STORAGE_TYPES = (*DTYPES, *HALF_TYPES)


def arithmetic(dtype_name: str) -> str:
    """Name of the type in which a parameter of this type is updated, and has its state."""
    return "float32" if dtype_name in HALF_TYPES else dtype_name


def kernel_spec(spec: Spec) -> Any:
    """`spec` as the kernels take it; `backends.choose` tells whether they can."""
    return native().KernelSpec(
        hidden_size=spec.hidden_size,
        hidden_layers=spec.hidden_layers,
        step_mult=spec.step_mult,
        exp_mult=spec.exp_mult,
        parameter_rms=spec.scale == "parameter_rms",
        scale_epsilon=spec.scale_epsilon,
        lagged=spec.statistics == "lagged",
    )


@dataclass(frozen=True)
class Placement:
    """How a tensor and its state lie in memory: the parameter's axes from the outermost to the innermost."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    on_gpu: bool = False
    part: Part | None = None
    """Of a larger tensor, whose row and column accumulators are kept whole."""

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[int], on_gpu: bool = False) -> Placement:
        return cls(tuple(shape), memory_order(strides, shape), on_gpu)

    @property
    def whole(self) -> tuple[int, ...]:
        return self.shape if self.part is None else self.part.whole

    @property
    def loops(self) -> Loops:
        return loops(self.shape, self.order, self.whole)

    def in_memory_order(self, per_axis: Sequence[int]) -> tuple[int, ...]:
        return tuple(per_axis[axis] for axis in self.order)

    def strides_of_view(self, strides: Sequence[int]) -> tuple[int, ...] | None:
        """Strides in memory order for a kernel; None where the elements lie densely in that order."""
        dense = dense_strides(self.shape, self.order)
        if 0 in self.shape or all(
            n == 1 or a == b for n, a, b in zip(self.shape, strides, dense, strict=True)
        ):
            return None
        return self.in_memory_order(strides)

    @property
    def momentum_stride(self) -> int:
        """Elements from one momentum to the next. On a GPU a multiple of 16 bytes, the size of its loads. On the CPU
        the momenta of a large tensor are kept a little apart: at a distance of a power of two they would compete for
        the same memory banks (a tenth of the last pass)."""
        n = math.prod(self.shape)
        if self.on_gpu:
            return -(-n // 8) * 8
        return n + 1040 if n >= 1 << 18 else n

    def state_layouts(self, spec: Accumulates) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """(shape, strides in elements) of each array of `TensorState` that `spec` and the shape use.

        The decays outermost, then the parameter's memory order without the axis that is averaged away. Dense, but for
        the distance of the momenta: see `momentum_stride`.
        """

        def layout(count: int, without: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
            kept = [axis for axis in range(len(self.shape)) if axis != without]
            shape = tuple((self.shape if without is None else self.whole)[axis] for axis in kept)
            order = [kept.index(axis) for axis in self.order if axis != without]
            return (count, *shape), (math.prod(shape), *dense_strides(shape, order))

        found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        if spec.momenta:
            shape, strides = layout(spec.momenta)
            found["momentum"] = shape, (self.momentum_stride, *strides[1:])
        if spec.second_moments:
            found["second_moment"] = layout(spec.second_moments)
        if spec.factored_moments:
            d1, d0 = factored_dims(self.whole) or (None, None)
            found["factored_row"] = layout(spec.factored_moments, without=d0)
            if d0 is not None:
                found["factored_column"] = layout(spec.factored_moments, without=d1)
        if isinstance(spec, Spec) and spec.statistics == "lagged":
            found["mean_squares"] = (len(spec.normalised_columns),), (1,)
        return found

    def record(self, dtype: str, addresses: Mapping[str, int]) -> Any:
        """The tensor as the kernels know it; `addresses` of the state by its names in `TensorState`, which is of type
        `dtype`, as the arithmetic."""
        return native().Record(
            dtype=dtype,
            loops=astuple(self.loops),
            sizes=self.in_memory_order(self.shape),
            momentum=addresses["momentum"],
            second_moment=addresses["second_moment"],
            row=addresses["factored_row"],
            column=addresses.get("factored_column", 0),
            mean_squares=addresses.get("mean_squares", 0),
            momentum_stride=self.momentum_stride,
        )

    def native_part(self) -> Any:
        """The part as the kernels know it; a tensor that lies in one place alone is a part as well."""
        part = self.part or Part(self.shape, self.shape, (0,) * len(self.shape))
        dims = factored_dims(self.whole)
        x_axis, y_axis = sorted(map(self.order.index, dims)) if dims else (0, 0)
        in_order = map(self.in_memory_order, (part.shape, part.whole, part.begin))
        sizes, whole, begin = ((1,), (1,), (0,)) if not self.shape else in_order
        return native().Part(
            sizes=sizes, whole=whole, begin=begin, x_axis=x_axis, y_axis=y_axis, copies=part.copies
        )


def overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements may share memory: an axis does not step over all that the axes inside it reach."""
    if 0 in shape:
        return False
    reach = 0
    axes = [(abs(stride), n) for n, stride in zip(shape, strides, strict=True) if n != 1]
    for stride, n in sorted(axes):
        if stride <= reach:
            return True
        reach += (n - 1) * stride
    return False


def flat_theta(spec: Spec, theta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The meta-parameters as the kernels take them, a flat array for each type; rounded once, from float64."""
    flat = flatten_theta(spec, {name: np.asarray(a, np.float64) for name, a in theta.items()})
    return {name: np.ascontiguousarray(flat, name) for name in DTYPES}


def init_state(spec: Spec, p: np.ndarray) -> TensorState:
    """Zero accumulators for the array `p`, in the memory order of `p`; float32 where it is bfloat16 or float16. What is
    not used has size 0."""
    dtype = np.dtype(arithmetic(p.dtype.name))
    arrays = {name: np.zeros(0, dtype) for name in TensorState._fields}
    for name, (shape, strides) in Placement.of(p.shape, p.strides).state_layouts(spec).items():
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        base = np.zeros(max(extent, 0), dtype)
        arrays[name] = np.lib.stride_tricks.as_strided(base, shape, [s * dtype.itemsize for s in strides])
    return TensorState(**arrays)


def small_fc_step(
    spec: Spec,
    theta: Mapping[str, Any],
    params: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    states: Sequence[TensorState],
    *,
    t: int,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    max_grad_norm: float | None = None,
    outputs: Sequence[np.ndarray] | None = None,
    apply: bool = True,
    pool: str = "own",
    threads: int = 1,
) -> None:
    """One step of the kernel over all `params`, in place.

    Args:
        theta: named meta-parameters (`Spec.theta_shapes`).
        params, grads: equal shapes, float32, float64, float16 or bfloat16 (of the package ml_dtypes), any strides; a
            parameter may not overlap itself. A gradient may have another type than its parameter, but for float64.
            Arithmetic is in float32 for the half types, and results are rounded to the nearest: a step below half of
            the last bit of a parameter is lost, as with any optimizer.
        states: accumulators in the layouts of `init_state`; overwritten.
        t: steps taken before.
        max_grad_norm: bound on the norm of all gradients together, None for none.
        outputs: where results go, of the parameters' shapes, types as of gradients; default: the parameters themselves.
        apply: the result is the new parameter; if False, what is to be added to it.
        pool: "serial", "own" (std::thread) or "openmp" (the libgomp that the process has loaded).

    Raises:
        BackendError: the compiled module is missing, or its kernels do not have the columns of `spec`.
        SpecError: `theta` does not fit `spec`.
        ValueError: an array that cannot be used, named by its position. Nothing has been written then.
    """
    choose(spec, "cpu", DTYPES[0], backend="cpu")
    flat = flat_theta(spec, theta)
    if not (math.isfinite(lr) and math.isfinite(weight_decay)):
        raise ValueError(f"lr={lr}, weight_decay={weight_decay}: must be finite")
    if t < 0 or (max_grad_norm is not None and not max_grad_norm > 0):
        raise ValueError(
            f"t={t}, max_grad_norm={max_grad_norm}: t is a number of steps, the norm positive or None"
        )
    results = params if outputs is None else outputs
    if not len(params) == len(grads) == len(states) == len(results):
        raise ValueError("params, grads, states and outputs must be equally many")
    records, addresses = [], []
    for i, (p, g, state, result) in enumerate(zip(params, grads, states, results, strict=True)):
        placement = Placement.of(p.shape, p.strides)
        computed = np.dtype(arithmetic(p.dtype.name))
        for name, array, written in (("params", p, True), ("grads", g, False), ("outputs", result, True)):
            if array.dtype.name not in STORAGE_TYPES or not array.dtype.isnative:
                raise ValueError(
                    f"{name}[{i}] has type {array.dtype}: the kernel takes {', '.join(STORAGE_TYPES)} in the byte "
                    "order of the processor"
                )
            if array.shape != p.shape or arithmetic(array.dtype.name) != computed.name:
                raise ValueError(f"{name}[{i}] is {array.dtype}{array.shape}, params[{i}] {p.dtype}{p.shape}")
            if not array.flags.aligned or any(s % array.itemsize for s in array.strides):
                raise ValueError(f"{name}[{i}] is not aligned to its item size: pass a copy")
            if written and (overlaps(array.shape, array.strides) or not array.flags.writeable):
                raise ValueError(f"{name}[{i}] overlaps itself or is read-only: pass a copy")
        layouts = placement.state_layouts(spec)
        for name, array in zip(TensorState._fields, state, strict=True):
            shape, strides = layouts.get(name, ((0,), (1,)))
            found = tuple(s // computed.itemsize for s in array.strides)
            same = all(n <= 1 or a == b for n, a, b in zip(shape, found, strides, strict=False))
            if array.shape != shape or array.dtype != computed or (not same and 0 not in shape):
                raise ValueError(
                    f"states[{i}].{name} is {array.dtype}{array.shape} with strides {found}, expected "
                    f"{computed}{shape} with strides {strides}: use init_state(spec, params[{i}])"
                )
        records.append(
            placement.record(computed.name, {n: a.ctypes.data for n, a in state._asdict().items()})
        )
        addresses.append(
            [
                (
                    a.ctypes.data,
                    placement.strides_of_view([s // a.itemsize for s in a.strides]),
                    a.dtype.name,
                )
                for a in (p, g, result)
            ]
        )
    native().small_fc_step(
        spec=kernel_spec(spec),
        theta_float32=flat["float32"].ctypes.data,
        theta_float64=flat["float64"].ctypes.data,
        records=records,
        params=[a[0] for a in addresses],
        grads=[a[1] for a in addresses],
        outputs=[a[2] for a in addresses],
        apply=apply,
        lr=lr,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        t=t,
        max_grad_norm=max_grad_norm,
        pool=pool,
        threads=threads,
    )
