"""The share of parameters that are DTensors: steps over parts of tensors (csrc/core.h) on the CPU kernels.

Each process updates its parts. What needs the whole of a tensor, means over its rows, columns and elements, is added
up over all processes of its mesh: a buffer of numbers, small beside the gradients, twice a step (with lagged statistics
once), by an all-reduce along each dimension of the mesh.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from ..backends import native
from ..native import arithmetic, flat_theta, kernel_spec
from ..spec import Spec
from . import device
from .dtensors import groups_of, has_memory, is_dtensor, local
from .shares import Numbers, Planned, Share, State
from .state import Options, dtype_name


class ShardedShare(Share):
    """All parameters that are DTensors. Its meshes come one after the other, in the order of the parameters, which is
    the same in all processes."""

    on_host = True

    def __init__(
        self, options: Options[Spec], memory: device.Memory, everything: list[Planned], state: State
    ) -> None:
        self._state = state
        self._parameters = [p for _, _, p, _ in everything]
        self._group_sizes = Counter(group for group, *_ in everything)
        mine = [_Member(planned, state) for planned in everything if is_dtensor(planned[2])]
        meshes: dict[Any, list[_Member]] = {}
        for member in mine:
            meshes.setdefault(member.parameter.device_mesh, []).append(member)
        kernels = _Kernels(options.spec, memory)
        self._members = mine
        self._meshes = [_Mesh(kernels, mesh, members) for mesh, members in meshes.items()]

    def begin(self, parameter_lists: list[Any], state: State) -> bool:
        """No process waits for another here: each may find by itself that it needs a new plan."""
        found = list(chain.from_iterable(parameter_lists))
        sizes = {i: len(parameters) for i, parameters in enumerate(parameter_lists) if parameters}
        same = state is self._state and sizes == self._group_sizes
        if same and all(map(is_, found, self._parameters)) and all(m.begin(state) for m in self._members):
            return True
        self.end()
        return False

    def gradient_squares(self) -> float:
        """Sum of the squares of all gradients, each element of a parameter counted once. All processes must call it."""
        return sum(mesh.gradient_squares() for mesh in self._meshes)

    def run(self, numbers: Numbers) -> list[torch.Tensor]:
        updated: list[torch.Tensor] = []
        scale = float(numbers.grad_scale)
        scalars = [
            (float(lr), float(decay), scale)
            for lr, decay in zip(numbers.lrs, numbers.weight_decays, strict=True)
        ]
        for mesh in self._meshes:
            updated += mesh.run(scalars)
        return updated

    def end(self) -> None:
        for member in self._members:
            member.end()


class _Kernels:
    """The phases of a step for one specification."""

    def __init__(self, spec: Spec, memory: device.Memory) -> None:
        self.lagged = spec.statistics == "lagged"
        self._theta = flat_theta(spec, memory.theta)  # kept alive: addresses are given
        self._given = {
            "spec": kernel_spec(spec),
            "theta_float32": self._theta["float32"].ctypes.data,
            "theta_float64": self._theta["float64"].ctypes.data,
            "pool": "openmp",
        }

    def phase(self, name: str, rows: list[_Row], factors: torch.Tensor, squares: torch.Tensor) -> None:
        if not rows:
            return
        records, parts, params, grads, numbers = map(list, zip(*rows, strict=True))
        native().small_fc_phase(
            phase=name,
            records=records,
            parts=parts,
            params=params,
            grads=grads,
            numbers=numbers,
            factors=factors.data_ptr(),
            squares=squares.data_ptr(),
            threads=torch.get_num_threads(),
            **self._given,
        )


class _Mesh:
    """The parameters of one mesh, and the numbers that its processes add up."""

    def __init__(self, kernels: _Kernels, mesh: Any, members: list[_Member]) -> None:
        self._kernels, self._members = kernels, members
        self._groups, self._processes = groups_of(mesh), mesh.size()
        # Room for all parameters, so that processes that do not agree which ones have a gradient still add up
        # equally many numbers, and find out.
        lengths = [len(members), sum(m.sums for m in members), len(members) * native().part_squares]
        self._numbers = torch.zeros(sum(lengths), dtype=torch.float64)
        self._has_gradient, self._factors, self._squares = self._numbers.split(lengths)

    def gradient_squares(self) -> float:
        total = 0.0
        for member in self._members:
            if member.has_gradient:
                norm = torch.linalg.vector_norm(member.gradient(), dtype=torch.float64).item()
                total += norm * norm / member.copies
        numbers = torch.tensor([total], dtype=torch.float64)
        self._add_up(numbers)
        return numbers.item()

    def run(self, scalars: list[_Scalars]) -> list[torch.Tensor]:
        """One step. Raises ValueError if some processes have a gradient of a parameter and others none: before anything
        is written, but for lagged statistics, which need nothing of other processes before."""
        active = [m for m in self._members if m.has_gradient]
        if self._kernels.lagged:
            active.sort(key=lambda m: m.steps > 0)  # those at their first step have their sums in front
        rows = [m.row(scalars) for m in active]
        fresh = [row for row, m in zip(rows, active, strict=True) if m.steps == 0 or not self._kernels.lagged]
        self._numbers.zero_()
        if fresh or not self._kernels.lagged:
            self._phase("factor_sums", fresh)
            self._add_up_and_check()
            self._phase("feature_sums", fresh)
            self._add_up(self._squares)
        self._phase("apply", rows)
        if self._kernels.lagged:
            self._add_up_and_check()
            self._phase("finish", rows)
        if active:
            torch._foreach_add_([m.step for m in active], 1)
        return [tensor for m in active for tensor in m.updated()]

    def _phase(self, name: str, rows: list[_Row]) -> None:
        self._kernels.phase(name, rows, self._factors, self._squares)

    def _add_up(self, numbers: torch.Tensor) -> None:
        for group in self._groups:
            dist.all_reduce(numbers, group=group)

    def _add_up_and_check(self) -> None:
        mine = torch.tensor([m.has_gradient for m in self._members], dtype=torch.float64)
        self._has_gradient.copy_(mine)
        self._add_up(self._numbers)
        wrong = (self._has_gradient != mine * self._processes).tolist()
        if any(wrong):
            member = self._members[wrong.index(True)]
            raise ValueError(
                f"{member.name} is a DTensor with a gradient in some processes of its mesh and none in others: where "
                "a process does not use it, set p.grad to zeros, or to None in all processes"
            )


_Address: TypeAlias = tuple[int, Any, str]
_Scalars: TypeAlias = tuple[float, float, float]
"""Learning rate, weight decay, factor of gradients."""
_Row: TypeAlias = tuple[Any, Any, _Address, _Address, tuple[float, float, float, int]]
"""What the kernels take of a parameter: record, part, where parameter and gradient lie, numbers."""


class _Member:
    """A parameter: what stays equal from step to step, and the step in progress."""

    def __init__(self, planned: Planned, state: State) -> None:
        self._group, self.name, self.parameter, home = planned
        p: Any = self.parameter
        self._placement = home.placement(p)
        assert self._placement.part is not None
        self.copies = self._placement.part.copies
        self._part = self._placement.native_part()
        self.sums: int = self._part.sums(factored=self._placement.loops.factored)
        self._mesh, self._placements, self._shape = p.device_mesh, p.placements, p.shape
        self._lies = _lies(local(p))
        self._views: dict[Any, tuple[Any, str]] = {}
        self._state: dict[str, Any] | None = state.get(p) or None
        if self._state is not None:
            arrays = {key: local(a) if is_dtensor(a) else a for key, a in self._state.items()}
            self._held, self._arrays = list(self._state.values()), list(arrays.values())
            self._addresses = [a.data_ptr() for a in self._arrays]
            self._record = self._placement.record(
                arithmetic(dtype_name(p)), {key: a.data_ptr() for key, a in arrays.items()}
            )
        self._given: Any = None
        self._gradient: torch.Tensor | None = None
        self._here: torch.Tensor | None = None
        self.steps = 0

    def begin(self, state: State) -> bool:
        """Whether the plan fits the parameter, its gradient and its state."""
        p: Any = self.parameter
        g = self._given = p.grad
        if g is None:
            return True
        kept = self._state
        if kept is None or state.get(p) is not kept or len(kept) != len(self._held):
            return False
        if not all(map(is_, kept.values(), self._held)):
            return False
        if [a.data_ptr() for a in self._arrays] != self._addresses:
            return False
        self.steps = kept["step"].item()
        here = self._here = local(p)
        if p.device_mesh is not self._mesh or p.placements != self._placements or _lies(here) != self._lies:
            return False
        if not isinstance(g, DTensor) or g.shape != self._shape or g.device_mesh != self._mesh:
            return False
        there = local(g)
        return (
            (there.dtype, there.device, there.layout) == (here.dtype, here.device, here.layout)
            and (there.shape == here.shape or g.placements != self._placements)
            and not here.is_neg()
            and has_memory(here)
            and has_memory(there)
        )

    def end(self) -> None:
        self._given = self._gradient = self._here = None

    @property
    def has_gradient(self) -> bool:
        return self._given is not None

    def gradient(self) -> torch.Tensor:
        """This process's part of the gradient, brought to where the parameter lies: all processes must ask for it."""
        if self._gradient is None:
            g = self._given
            if g.placements != self._placements:  # of a replicated parameter, it may be a sum not yet taken
                g = g.redistribute(placements=self._placements)
            self._gradient = local(g).resolve_neg()
        return self._gradient

    def row(self, scalars: list[_Scalars]) -> _Row:
        """scalars: of each parameter group."""
        assert self._here is not None
        numbers = (*scalars[self._group], self.steps)
        return self._record, self._part, self._address(self._here), self._address(self.gradient()), numbers

    def _address(self, tensor: torch.Tensor) -> _Address:
        lies = tensor.stride(), tensor.dtype
        if lies not in self._views:
            self._views[lies] = self._placement.strides_of_view(lies[0]), dtype_name(tensor)
        return tensor.data_ptr(), *self._views[lies]

    def updated(self) -> list[torch.Tensor]:
        """What the step has written."""
        assert self._here is not None
        return [self.parameter, self._here]

    @property
    def step(self) -> torch.Tensor:
        """The counter in the state."""
        assert self._state is not None
        counter: torch.Tensor = self._state["step"]
        return counter


def _lies(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
