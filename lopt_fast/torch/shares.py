"""The shares of a step: the parameters that one backend updates on one device.

A step begins all shares, which checks them, before it runs any. The kernels' shares hold a plan of csrc/plan.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch

from .. import reference
from ..backends import BackendError, native
from ..native import arithmetic, flat_theta, kernel_spec
from ..spec import Spec
from . import device
from .dtensors import is_dtensor
from .scalars import Number, moved
from .state import Home, Options, dtype_name

State: TypeAlias = dict[Any, dict[str, Any]]
Planned: TypeAlias = tuple[int, str, torch.Tensor, Home]
"""Index of the group, name for messages, parameter, home of its state."""

_SCALAR_TYPES = {torch.float32: 0, torch.float64: 1, torch.int32: 2, torch.int64: 3}  # csrc/gpu.h ScalarType
_VARIANTS = {"automatic": 0, "elementwise": 1, "matmul": 2, "matmul_bfloat16": 3}  # MlpVariant
_SCHEDULES = {"automatic": 0, "single_launch": 1, "phased": 2}  # GpuSchedule

MLP_VARIANTS = tuple(_VARIANTS)


@dataclass(frozen=True)
class Numbers:
    """What may change from step to step. Where one share is on the host all of them are floats."""

    lrs: list[Number]
    weight_decays: list[Number]
    grad_scale: Number
    divide: bool
    """Gradients are divided by `grad_scale`, not multiplied."""
    max_grad_norm: float | None
    found_inf: torch.Tensor | None
    """Where it is not 0 nothing is written."""


class Share:
    """What every share does; `native` is its plan."""

    on_host: ClassVar[bool]
    """Needs its numbers on the host."""
    native: Any

    def begin(self, parameter_lists: list[Any], state: State) -> bool:
        """Check and collect what the step needs. False if a new plan is needed; then there is nothing to end."""
        return bool(self.native.begin(parameter_lists, state))

    def run(self, numbers: Numbers) -> list[torch.Tensor]:
        """Update (or enqueue that) all parameters with a gradient; returns those that PyTorch must be told of."""
        raise NotImplementedError

    def end(self) -> None:
        self.native.end()


def _fill(plan: Any, everything: Iterable[Planned], mine: Callable[[Planned], bool], state: State) -> None:
    """Add all parameters of the optimizer to a plan of csrc/plan.h, in order."""
    kinds = native().Storage
    for planned in everything:
        group, _, p, home = planned
        if not mine(planned):
            plan.add_foreign(p, group)
        elif not state.get(p):
            plan.add_idle(p, group)
        else:
            tensors, placement = state[p], home.placement(p)
            plan.add(
                parameter=p,
                group=group,
                record=placement.record(
                    arithmetic(dtype_name(p)), {k: v.data_ptr() for k, v in tensors.items()}
                ),
                order=placement.order,
                state=tensors,
                memory=[v.untyped_storage() for v in tensors.values()],
                step=tensors["step"].data_ptr(),
                state_type=kinds.bfloat16 if home.averages == torch.bfloat16 else kinds.float32,
            )


def _exchange() -> dict[str, Any]:
    """Raises BackendError for a PyTorch that is too old for the kernels."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        raise BackendError(
            f"PyTorch {torch.__version__} has no DLPack exchange in C, which the kernels need: install a newer one, "
            "or take backend='reference'"
        )
    return {
        "exchange": torch.Tensor.__dlpack_c_exchange_api__,
        "is_negated": torch.Tensor.is_neg,
    }


class CpuShare(Share):
    """The CPU kernels, on what this process alone holds."""

    on_host = True

    def __init__(
        self, options: Options[Spec], memory: device.Memory, everything: list[Planned], state: State
    ) -> None:
        self._theta = flat_theta(options.spec, memory.theta)  # the plan holds their addresses
        self.native = native().Plan(
            spec=kernel_spec(options.spec),
            theta_float32=self._theta["float32"].ctypes.data,
            theta_float64=self._theta["float64"].ctypes.data,
            state=state,
            **_exchange(),
        )
        _fill(self.native, everything, lambda p: p[3].backend == "cpu" and not is_dtensor(p[2]), state)

    def run(self, numbers: Numbers) -> list[torch.Tensor]:
        updated: list[torch.Tensor] = self.native.run(
            numbers.lrs,
            numbers.weight_decays,
            numbers.grad_scale,
            numbers.max_grad_norm,
            torch.get_num_threads(),
        )
        return updated


class GpuShare(Share):
    """Kernels behind csrc/gpu.h on one device."""

    on_host = False

    def __init__(
        self,
        options: Options[Spec],
        memory: device.Memory,
        everything: list[Planned],
        state: State,
        backend: str,
        where: torch.device,
    ) -> None:
        self._memory, self._where = memory, where
        self._variant = _VARIANTS[options.mlp]
        self._schedule = _SCHEDULES[options.schedule]
        self.native = native().GpuPlan(
            spec=kernel_spec(options.spec),
            device=device.KERNELS[backend](),
            ordinal=where.index or 0,
            theta=memory.flat_theta(where).data_ptr(),
            state=state,
            dense=_dense,
            copy=torch.Tensor.copy_,
            **_exchange(),
        )
        _fill(self.native, everything, lambda p: p[3].backend == backend and p[2].device == where, state)

    def run(self, numbers: Numbers) -> list[torch.Tensor]:
        alive: list[torch.Tensor] = []  # until all is enqueued
        with device.guard(self._where):
            stream = device.stream(self._where)

            def scratch(size: int) -> int:
                alive.append(self._memory.scratch(self._where, stream, size))
                return alive[-1].data_ptr()

            found_inf = numbers.found_inf
            if found_inf is not None:
                found_inf = found_inf.to(self._where, torch.float32, non_blocking=True)
                alive.append(found_inf)
            norm = numbers.max_grad_norm
            updated: list[torch.Tensor] = self.native.run(
                lrs=[self._scalar(x, alive) for x in numbers.lrs],
                weight_decays=[self._scalar(x, alive) for x in numbers.weight_decays],
                grad_scale=self._scalar(numbers.grad_scale, alive),
                divide=numbers.divide,
                max_grad_norm=None if norm is None else (norm, 0, 1),
                found_inf=0 if found_inf is None else found_inf.data_ptr(),
                variant=self._variant,
                schedule=self._schedule,
                scratch=scratch,
                stream=stream,
            )
        return updated

    def _scalar(self, value: Number, alive: list[torch.Tensor]) -> tuple[float, int, int]:
        """GpuPlan::Scalar: the value, or the address where it lies on the device."""
        if not isinstance(value, torch.Tensor):
            return value, 0, 1
        dtype = value.dtype if value.dtype in _SCALAR_TYPES else torch.float32
        value = value.detach().to(self._where, dtype, non_blocking=True)
        alive.append(value)
        return 0.0, value.data_ptr(), _SCALAR_TYPES[dtype]


def _dense(tensor: torch.Tensor, strides: list[int]) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class TritonShare(Share):
    """The Triton kernels on one device."""

    on_host = False

    def __init__(
        self,
        options: Options[Spec],
        memory: device.Memory,
        everything: list[Planned],
        state: State,
        where: torch.device,
    ) -> None:
        self._options, self._memory, self._state, self._where = options, memory, state, where
        self._planned = {
            id(planned[2]): planned
            for planned in everything
            if planned[3].backend == "triton" and planned[2].device == where
        }
        self._built: tuple[list[tuple[int, int]], Any] = ([], None)
        self.native = native().ListPlan(spec=kernel_spec(options.spec), state=state, **_exchange())
        _fill(self.native, everything, lambda planned: id(planned[2]) in self._planned, state)

    def begin(self, parameter_lists: list[Any], state: State) -> bool:
        if not super().begin(parameter_lists, state):
            return False
        try:
            self._prepare([p for p, _ in self.native.run()])
        except BaseException:
            self.end()
            raise
        return True

    def _prepare(self, parameters: list[torch.Tensor]) -> None:
        """Have a `TritonStep` for these parameters."""
        from . import triton

        key = [(id(p), p.data_ptr()) for p in parameters]
        if not parameters or self._built[0] == key:
            return
        if device.capturing(self._where):
            raise RuntimeError(
                "other parameters have a gradient than in the step before: run one such step before the capture"
            )
        tensors = [
            triton.TritonTensor(
                name=self._planned[id(p)][1],
                param=p.detach(),
                state={k: v for k, v in self._state[p].items() if k != "step"},
                step=self._state[p]["step"],
                group=self._planned[id(p)][0],
            )
            for p in parameters
        ]
        variant = "auto" if self._options.mlp == "automatic" else self._options.mlp
        self._built = (
            key,
            triton.TritonStep(self._options.spec, self._memory.theta, tensors, variant=variant),
        )

    def run(self, numbers: Numbers) -> list[torch.Tensor]:
        found = self.native.run()
        if not found:
            return []
        step = self._built[1]
        if device.capturing(self._where):
            self._memory.captured.append(step)
        step.step(
            [g for _, g in found],
            lrs=[moved(x, self._where) for x in numbers.lrs],
            weight_decays=[moved(x, self._where) for x in numbers.weight_decays],
            grad_scale=moved(numbers.grad_scale, self._where),
            divide=numbers.divide,
            found_inf=None if numbers.found_inf is None else moved(numbers.found_inf, self._where),
            max_norm=numbers.max_grad_norm,
        )
        return [p for p, _ in found]


class ReferenceShare(Share):
    """Plain array code, one parameter after the other; half types are computed in float32."""

    on_host = True

    def __init__(
        self, options: Options[Spec], memory: device.Memory, everything: list[Planned], state: State
    ) -> None:
        self._spec, self._memory, self._state = options.spec, memory, state
        self._planned = [planned for planned in everything if planned[3].backend == "reference"]

    def begin(self, parameter_lists: list[Any], state: State) -> bool:
        """`plan.prepare` has checked everything."""
        for where in {planned[2].device for planned in self._planned}:
            if device.capturing(where):
                raise RuntimeError("a step of backend='reference' cannot be captured into a CUDA graph")
        return True

    def end(self) -> None:
        pass

    def run(self, numbers: Numbers) -> list[torch.Tensor]:
        for group, _, p, home in self._planned:
            if p.grad is not None:
                self._update(
                    p, home.sums, numbers.lrs[group], numbers.weight_decays[group], numbers.grad_scale
                )
        return []

    def _update(
        self, p: torch.Tensor, dtype: torch.dtype, lr: Number, weight_decay: Number, grad_scale: Number
    ) -> None:
        tensors = self._state[p]
        assert p.grad is not None
        unused = torch.zeros(0, dtype=dtype, device=p.device)
        old = reference.TensorState(*(tensors.get(name, unused) for name in reference.TensorState._fields))
        kind = p.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            delta, new = reference.update(
                self._spec,
                self._memory.named_theta(p.device, dtype),
                p.detach().to(dtype),
                p.grad.to(dtype),
                old,
                int(tensors["step"]),
                lr=lr,
                weight_decay=weight_decay,
                grad_scale=grad_scale,
            )
        p.add_(delta)
        for name, updated in new._asdict().items():
            if name in tensors:
                tensors[name].copy_(updated)
        tensors["step"] += 1
