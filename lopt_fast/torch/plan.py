"""What a step of `LearnedOptimizer` does: checks, state in the memory order of its parameter, kernel or reference.

The CPU kernels run through `lopt_fast._native.Plan` (csrc/plan.h), which holds addresses and notices cheaply when
they no longer fit; then a new `Plan` is built here, and whatever is wrong raises an error before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import reference
from ..backends import choose, native
from ..native import DTYPES, Placement, flat_theta, kernel_spec, overlaps
from ..spec import Spec

Groups = list[dict[str, Any]]


def named_parameters(groups: Groups) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(index of the group, name for messages, parameter) of every parameter, in order."""
    for i, group in enumerate(groups):
        names = group.get("param_names")
        for j, p in enumerate(group["params"]):
            name = f"{names[j]!r}" if names else f"{j} of group {i}"
            yield i, f"parameter {name} (shape {tuple(p.shape)})", p


def _dtype_name(p: torch.Tensor) -> str:
    return str(p.dtype).removeprefix("torch.")


def check_parameters(spec: Spec, backend: str, groups: Groups) -> None:
    """Raise ValueError or BackendError, naming the parameter, unless all of them can be optimized."""
    seen: set[int] = set()
    memory: list[tuple[int, int, str]] = []
    for _, name, p in named_parameters(groups):
        if id(p) in seen:
            raise ValueError(f"{name} is given twice: give each parameter once")
        seen.add(id(p))
        if is_traceable_wrapper_subclass(p):
            raise ValueError(f"{name} is a {type(p).__name__}, a tensor made of others: not supported yet")
        if p.layout != torch.strided:
            raise ValueError(f"{name} has layout {p.layout}: only dense tensors can be optimized")
        if _dtype_name(p) not in DTYPES:
            raise ValueError(
                f"{name} is {p.dtype}: float32 and float64 are supported so far, convert it first"
            )
        if overlaps(p.shape, p.stride()):
            raise ValueError(f"{name} overlaps itself in memory (strides {p.stride()}): use p.clone()")
        if p.is_neg():
            raise ValueError(f"{name} is a lazily negated view: use p.resolve_neg()")
        choose(spec, p.device.type, _dtype_name(p), backend)
        extent = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True)) + 1
        if p.device.type == "cpu" and p.data_ptr() and extent == p.numel():
            memory.append((p.data_ptr(), p.data_ptr() + extent * p.element_size(), name))
    for (_, end, one), (begin, _, other) in pairwise(sorted(memory)):
        if begin < end:
            raise ValueError(f"{other} and {one} share memory: give one of them, or clone the other")


def check_gradient(name: str, p: torch.Tensor) -> None:
    """Raise ValueError unless `p` has a gradient that can be used."""
    g = p.grad
    assert g is not None
    if g.layout != torch.strided:
        raise ValueError(
            f"the gradient of {name} is sparse ({g.layout}): make it dense, p.grad = p.grad.to_dense()"
        )
    if is_traceable_wrapper_subclass(g):
        raise ValueError(
            f"the gradient of {name} is a {type(g).__name__}, a tensor made of others: not supported yet"
        )
    for what, found, expected in (
        ("shape", tuple(g.shape), tuple(p.shape)),
        ("type", g.dtype, p.dtype),
        ("device", g.device, p.device),
    ):
        if found != expected:
            raise ValueError(f"the gradient of {name} has {what} {found}, the parameter {expected}")
    if p.numel() and p.device.type == "cpu" and (g.data_ptr() == 0 or p.data_ptr() == 0):
        raise ValueError(
            f"{name} or its gradient has no memory (a fake tensor, or one whose storage was freed)"
        )


def checked_state(
    spec: Spec, name: str, p: torch.Tensor, state: Mapping[str, Any], copy: bool = False
) -> dict[str, Any]:
    """`state` with every tensor in the type, device and memory order of `p`; itself reused where it is, but for `copy`.

    Raises ValueError, naming the parameter and the entry, if entries are missing, unknown or of wrong shapes.
    """
    layouts = Placement.of(p.shape, p.stride()).state_layouts(spec)
    expected = {"step", *layouts}
    if state.keys() != expected:
        missing, extra = sorted(expected - state.keys()), sorted(map(str, state.keys() - expected))
        hint = "load a state that was saved with the same weights, architecture and statistics"
        if {*missing, *extra} == {"mean_squares"}:
            hint = (
                f"it was not saved with statistics={spec.statistics!r}; pass the statistics it was saved with"
            )
        raise ValueError(f"state of {name}: missing {missing}, unknown {extra}: {hint}")
    result: dict[str, Any] = {"step": _checked_step(name, state["step"], copy)}
    for key, (shape, strides) in layouts.items():
        value = state[key]
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"state of {name}: {key!r} is {found}, expected shape {shape}: "
                "load a state that was saved for the same model and weights"
            )
        laid_out = all(n <= 1 or a == b for n, a, b in zip(shape, value.stride(), strides, strict=True))
        if copy or value.dtype != p.dtype or value.device != p.device or not (laid_out or value.numel() == 0):
            value = torch.empty_strided(shape, strides, dtype=p.dtype, device=p.device).copy_(value)
        result[key] = value
    return result


def _checked_step(name: str, step: Any, copy: bool) -> torch.Tensor:
    count = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    is_count = isinstance(count, (int, float)) and 0 <= count < 2**62 and count == int(count)
    if not is_count or isinstance(count, bool):
        raise ValueError(f"state of {name}: 'step' must be one number of steps, not {step!r}")
    exact = isinstance(step, torch.Tensor) and step.dtype == torch.int64 and step.dim() == 0
    return (
        step if exact and step.device.type == "cpu" and not copy else torch.tensor(int(count), device="cpu")
    )


def initial_state(spec: Spec, p: torch.Tensor) -> dict[str, Any]:
    """Zero accumulators in the memory order of `p`, and no step taken."""
    layouts = Placement.of(p.shape, p.stride()).state_layouts(spec)
    zeros = {
        key: torch.empty_strided(shape, strides, dtype=p.dtype, device=p.device).zero_()
        for key, (shape, strides) in layouts.items()
    }
    return {"step": torch.tensor(0, device="cpu"), **zeros}


class Plan:
    """Everything that a step needs and that stays equal from step to step.

    Building one checks all parameters and gradients, and then creates the state of parameters that have their first
    gradient and moves state whose parameter has moved. Raises ValueError, with nothing written, if a check fails.
    """

    def __init__(
        self, spec: Spec, theta: Mapping[str, Any], backend: str, groups: Groups, state: dict[Any, Any]
    ) -> None:
        self._spec, self._theta, self._backend = spec, theta, backend
        self._cast_theta: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
        check_parameters(spec, backend, groups)
        _prepare_state(spec, groups, state)
        self._native = None
        parameters = list(named_parameters(groups))
        on_kernel = [choose(spec, p.device.type, _dtype_name(p), backend) == "cpu" for _, _, p in parameters]
        self._foreign = not all(on_kernel)
        if not any(on_kernel):
            return
        self._flat_theta = flat_theta(spec, theta)  # the native plan holds their addresses
        self._native = native().Plan(
            spec=kernel_spec(spec),
            theta_float32=self._flat_theta["float32"].ctypes.data,
            theta_float64=self._flat_theta["float64"].ctypes.data,
            state=state,
            exchange=torch.Tensor.__dlpack_c_exchange_api__,
            is_negated=torch.Tensor.is_neg,
        )
        for (group, _, p), native_one in zip(parameters, on_kernel, strict=True):
            if not native_one:
                self._native.add_foreign(p, group)
            elif not state.get(p):
                self._native.add_idle(p, group)
            else:
                tensors = state[p]
                placement = Placement.of(p.shape, p.stride())
                self._native.add(
                    parameter=p,
                    group=group,
                    record=placement.record(_dtype_name(p), {k: v.data_ptr() for k, v in tensors.items()}),
                    order=placement.order,
                    state=tensors,
                    memory=[v.untyped_storage() for v in tensors.values()],
                    step=tensors["step"].data_ptr(),
                )

    def step(
        self,
        groups: Groups,
        state: dict[Any, Any],
        lrs: list[float],
        weight_decays: list[float],
        grad_scale: float,
        max_grad_norm: float | None,
    ) -> bool:
        """One step over all parameters that have a gradient. False, with nothing written, if a new plan is needed."""
        foreign: list[tuple[int, torch.Tensor]] = []
        if self._foreign:
            check_parameters(self._spec, self._backend, groups)
            _prepare_state(self._spec, groups, state)
            parameters = [(i, p) for i, _, p in named_parameters(groups) if p.grad is not None]
            foreign = [(i, p) for i, p in parameters if self._native is None or self._backend_of(p) != "cpu"]
            if max_grad_norm is not None and foreign:  # the kernels see only their own share of the norm
                grad_scale *= clip_factor([p.grad for _, p in parameters], grad_scale, max_grad_norm)
                max_grad_norm = None
        if self._native is not None:
            lists = [group["params"] for group in groups]
            threads = torch.get_num_threads()
            updated = self._native.step(lists, state, lrs, weight_decays, grad_scale, max_grad_norm, threads)
            if updated is None:
                return False
            if updated:
                torch.autograd.graph.increment_version(updated)
        for group, p in foreign:
            self._reference_step(p, state[p], lrs[group], weight_decays[group], grad_scale)
        return True

    def _backend_of(self, p: torch.Tensor) -> str:
        return choose(self._spec, p.device.type, _dtype_name(p), self._backend)

    def _reference_step(
        self, p: torch.Tensor, tensors: dict[str, Any], lr: float, weight_decay: float, grad_scale: float
    ) -> None:
        key = (p.device, p.dtype)
        if key not in self._cast_theta:
            self._cast_theta[key] = {
                name: torch.tensor(array, dtype=p.dtype, device=p.device)
                for name, array in self._theta.items()
            }
        unused = torch.zeros(0, dtype=p.dtype, device=p.device)
        old = reference.TensorState(*(tensors.get(name, unused) for name in reference.TensorState._fields))
        kind = p.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            delta, new = reference.update(
                self._spec,
                self._cast_theta[key],
                p.detach(),
                p.grad,
                old,
                int(tensors["step"]),
                lr=lr,
                weight_decay=weight_decay,
                grad_scale=grad_scale,
            )
        p.add_(delta)
        for name, value in new._asdict().items():
            if name in tensors:
                tensors[name].copy_(value)
        tensors["step"] += 1


def _prepare_state(spec: Spec, groups: Groups, state: dict[Any, Any]) -> None:
    """Check the gradients and the state of all parameters, then create and move state where that is needed."""
    moved = {}
    for _, name, p in named_parameters(groups):
        if p.grad is not None:
            check_gradient(name, p)
        if state.get(p):
            moved[p] = checked_state(spec, name, p, state[p])
    for _, _, p in named_parameters(groups):
        if p.grad is not None and p.grad.is_neg():
            p.grad = p.grad.resolve_neg()
        if p in moved:
            state[p].update(moved[p])
        elif p.grad is not None:
            state[p] = initial_state(spec, p)


def clip_factor(gradients: list[Any], grad_scale: float, max_grad_norm: float) -> float:
    """min(1, max_grad_norm / (norm + 1e-6)) of the norm of all gradients together, NaN if that is NaN."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64).item() for g in gradients]
    factor = max_grad_norm / (abs(grad_scale) * math.sqrt(sum(n * n for n in norms)) + reference.CLIP_EPSILON)
    return 1.0 if factor >= 1.0 else factor
