"""What a step of `LearnedOptimizer` does: checks, state in the memory order of its parameter, kernels or reference.

Kernels run through the plans of csrc/plan.h, which hold addresses and notice cheaply when they no longer fit; then a
new `Plan` is built here, and whatever is wrong raises an error before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..architectures import Architecture
from ..native import STORAGE_TYPES, overlaps
from ..spec import Spec
from . import device, dtensors
from .dtensors import is_dtensor
from .scalars import Groups, Number, clip_factor, hyperparameters, moved, on_host
from .shares import CpuShare, GpuShare, Numbers, Planned, ReferenceShare, Share, State, TritonShare
from .state import Home, Options, checked_state, dtype_name, initial_state


def named_parameters(groups: Groups) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(index of the group, name for messages, parameter) of every parameter, in order."""
    for i, group in enumerate(groups):
        names = group.get("param_names")
        for j, p in enumerate(group["params"]):
            name = f"{names[j]!r}" if names else f"{j} of group {i}"
            yield i, f"parameter {name} (shape {tuple(p.shape)})", p


def check_parameters(options: Options[Spec | Architecture], groups: Groups) -> list[Planned]:
    """Raise ValueError or BackendError, naming the parameter, unless all of them can be optimized."""
    seen: set[int] = set()
    memory: list[tuple[int, int, str]] = []
    found: list[Planned] = []
    for group, name, p in named_parameters(groups):
        if id(p) in seen:
            raise ValueError(f"{name} is given twice: give each parameter once")
        seen.add(id(p))
        if dtype_name(p) not in STORAGE_TYPES:
            types = f"{', '.join(STORAGE_TYPES[:-1])} and {STORAGE_TYPES[-1]}"
            raise ValueError(f"{name} is {p.dtype}: {types} are supported so far, convert it first")
        if is_dtensor(p):
            dtensors.check_dtensor(options.spec, options.backend, name, p)
        here = dtensors.local(p) if is_dtensor(p) else p
        if is_traceable_wrapper_subclass(here):
            raise ValueError(f"{name} is a {type(here).__name__}, a tensor made of others: not supported yet")
        if here.layout != torch.strided:
            raise ValueError(f"{name} has layout {here.layout}: only dense tensors can be optimized")
        if overlaps(here.shape, here.stride()):
            raise ValueError(f"{name} overlaps itself in memory (strides {here.stride()}): use p.clone()")
        if here.is_neg():
            raise ValueError(f"{name} is a lazily negated view: use p.resolve_neg()")
        found.append((group, name, p, Home.of(options, name, p)))
        extent = sum((n - 1) * stride for n, stride in zip(here.shape, here.stride(), strict=True)) + 1
        if p.device.type in ("cpu", "cuda") and here.data_ptr() and extent == here.numel():
            memory.append((here.data_ptr(), here.data_ptr() + extent * p.element_size(), name))
    for (_, end, one), (begin, _, other) in pairwise(sorted(memory)):
        if begin < end:
            raise ValueError(f"{other} and {one} share memory: give one of them, or clone the other")
    return found


def check_gradient(name: str, p: torch.Tensor) -> None:
    """Raise ValueError unless `p` has a gradient that can be used."""
    g = p.grad
    assert g is not None
    if g.layout != torch.strided:
        raise ValueError(
            f"the gradient of {name} is sparse ({g.layout}): make it dense, p.grad = p.grad.to_dense()"
        )
    if is_dtensor(p):
        dtensors.check_dgradient(name, p)
    p_here, g_here = (dtensors.local(p), dtensors.local(g)) if is_dtensor(p) else (p, g)
    if is_traceable_wrapper_subclass(g_here):
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
    if p.device.type in ("cpu", "cuda") and not (dtensors.has_memory(p_here) and dtensors.has_memory(g_here)):
        raise ValueError(
            f"{name} or its gradient has no memory (a fake tensor, or one whose storage was freed)"
        )


def prepare(options: Options[Spec], groups: Groups, state: State) -> list[Planned]:
    """Check parameters, gradients and state, then create and move state where that is needed.

    Raises ValueError or BackendError, with nothing written, if a check fails.
    """
    found, spec = check_parameters(options, groups), options.spec
    moved = {}
    for _, name, p, home in found:
        if p.grad is not None:
            check_gradient(name, p)
        if state.get(p):
            moved[p] = checked_state(spec, home, name, p, state[p])
    for _, _, p, home in found:
        if p.grad is not None and p.grad.is_neg():
            p.grad = p.grad.resolve_neg()
        if p in moved:
            state[p].update(moved[p])
        elif p.grad is not None:
            state[p] = initial_state(spec, home, p)
    return found


class Plan:
    """Everything that a step needs and that stays equal from step to step, in shares by backend and device.

    Building one checks all parameters and gradients, and then creates the state of parameters that have their first
    gradient and moves state whose parameter has moved. Raises ValueError, with nothing written, if a check fails.
    """

    def __init__(self, options: Options[Spec], memory: device.Memory, groups: Groups, state: State) -> None:
        for where in {p.device for _, _, p in named_parameters(groups)}:
            if device.capturing(where):
                raise RuntimeError(
                    "a CUDA graph cannot capture the first step, nor the first one after parameters, state or options "
                    "have changed: run a step before the capture, as the example of torch.cuda.CUDAGraph does"
                )
        self.options = options
        everything = prepare(options, groups, state)
        self._known = _identity(everything)
        self._shares: list[Share] = []
        for backend, where in dict.fromkeys((home.backend, p.device) for _, _, p, home in everything):
            if backend == "triton":
                self._shares.append(TritonShare(options, memory, everything, state, where))
            elif backend in device.KERNELS:
                self._shares.append(GpuShare(options, memory, everything, state, backend, where))
        backends = {home.backend for _, _, _, home in everything}
        if any(home.backend == "cpu" and not is_dtensor(p) for _, _, p, home in everything):
            self._shares.append(CpuShare(options, memory, everything, state))
        self._sharded = None
        if any(is_dtensor(p) for _, _, p, _ in everything):
            from .sharded import ShardedShare  # not at the top: it imports torch.distributed.tensor

            self._sharded = ShardedShare(options, memory, everything, state)
            self._shares.append(self._sharded)
        self._has_reference = "reference" in backends
        if self._has_reference:
            self._shares.append(ReferenceShare(options, memory, everything, state))

    @staticmethod
    def check(options: Options[Spec], groups: Groups) -> None:
        """Raise ValueError or BackendError, naming the parameter, unless all of them can be optimized."""
        check_parameters(options, groups)

    @staticmethod
    def loaded(
        options: Options[Spec], memory: device.Memory, groups: Groups, state: State
    ) -> tuple[Groups, State]:
        """Groups and state as loaded, checked and copied. Raises ValueError, naming the parameter."""
        copies = {
            p: checked_state(options.spec, Home.of(options, name, p), name, p, state[p], copy=True)
            for _, name, p in named_parameters(groups)
            if state.get(p)
        }
        return groups, {**state, **copies}

    def step(
        self,
        groups: Groups,
        state: State,
        grad_scale: Any,
        found_inf: Any,
        max_grad_norm: float | None,
        loss: Any,
        num_steps: int | None,
    ) -> bool:
        """One step over all parameters that have a gradient. False, with nothing written, if a new plan is needed.

        Gradients are divided by `grad_scale`, a number or a tensor of one element or None; nothing happens where
        `found_inf` is not 0. `loss` and `num_steps` are not used. Raises ValueError, with nothing written, for values
        out of range.
        """
        host = any(share.on_host for share in self._shares)
        if found_inf is not None and (host or on_host(found_inf)):
            if float(found_inf) > 0.0:
                return True
            found_inf = None
        lrs, weight_decays = hyperparameters(groups, read_devices=host)
        scale, divide = 1.0 if grad_scale is None else grad_scale, True
        if host or on_host(scale):
            scale, divide = 1.0 / float(scale), False
        numbers = Numbers(lrs, weight_decays, scale, divide, max_grad_norm, found_inf)

        if self._has_reference and _identity(prepare(self.options, groups, state)) != self._known:
            return False
        lists = [group["params"] for group in groups]
        begun: list[Share] = []
        updated: list[torch.Tensor] = []
        try:
            for share in self._shares:
                if not share.begin(lists, state):
                    return False
                begun.append(share)
            if max_grad_norm is not None and (len(begun) > 1 or self._has_reference or self._sharded):
                squares = self._sharded.gradient_squares() if self._sharded else 0.0
                numbers = _clipped(groups, numbers, max_grad_norm, host, squares)
            for share in begun:
                updated += share.run(numbers)
        finally:
            for share in begun:
                share.end()
        if updated:
            torch.autograd.graph.increment_version(updated)
        return True


def _clipped(groups: Groups, numbers: Numbers, max_grad_norm: float, host: bool, squares: float) -> Numbers:
    """Clipping as a part of `grad_scale`: each share sees only its own gradients, the norm is that of all.

    squares: sum of the squares of all gradients that are DTensors.
    """
    parameters = [p for _, _, p in named_parameters(groups) if p.grad is not None]
    if not parameters:
        return numbers
    gradients = [p.grad for p in parameters if not is_dtensor(p)]
    scale: Number = 1.0 / numbers.grad_scale if numbers.divide else numbers.grad_scale
    factor = clip_factor(gradients, scale, max_grad_norm, squares)
    if isinstance(factor, torch.Tensor):
        factor, scale = (float(factor), scale) if host else (factor, moved(scale, factor.device))
    return replace(numbers, grad_scale=scale * factor, divide=False, max_grad_norm=None)


def _identity(everything: list[Planned]) -> list[tuple[int, int, Home]]:
    return [(group, id(p), home) for group, _, p, home in everything]
