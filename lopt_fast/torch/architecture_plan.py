"""What a step of `LearnedOptimizer` does for an `Architecture`: all that is not `small_fc_lopt` (plan.py).

The running averages of a parameter lie in `optimizer.state`, in the order of axes of the parameter, and with them its
row of each tensor-level array. What the whole model shares is in `optimizer.param_groups[0]["shared"]`, which goes
where state goes: into `state_dict` and into what torch.distributed.checkpoint saves. All parameters must be on one
device; the tensor level is computed there, in float64 if any of them is float64. With the CPU kernels it is computed
in NumPy, on the memory of PyTorch's tensors: a small operation of PyTorch costs several times as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np
import torch

from ..architectures import Architecture
from ..architectures.base import Inputs, Update
from ..backends import BackendError, native
from ..layout import dense_strides
from ..native_operations import Kept
from ..operations import ModelTensors
from ..reference import Array, TensorState
from . import device
from .operations import implementation
from .plan import check_gradient, check_parameters
from .scalars import HOST, Groups, Number, clip_factor, hyperparameters, moved, number_of, on_host
from .shares import Planned, State
from .state import Layout, Options, check_keys, checked_arrays, checked_step

SHARED = "shared"
"""Key of the first parameter group: a dict of the arrays of `Architecture.init_shared`, `step` (int64, the steps taken)
and `num_steps` (a number, that of the last step)."""

ONE_THREAD = 1 << 19
"""Multiply-adds of a matrix product that NumPy (OpenBLAS) computes in the thread that calls it. For larger ones it
wakes others, which do not heed PyTorch's number of threads and spin for 26 ms afterwards, while the kernels run."""

_HINT = "load a state that was saved with the same weights, architecture and parameter names"


def check_num_steps(architecture: Architecture, num_steps: Any) -> None:
    """Raise ValueError unless it is a number of steps, or None where the architecture does not need one."""
    if num_steps is None:
        if architecture.needs_num_steps:
            raise ValueError(
                f"{architecture.NAME} knows how long the training is: give num_steps, its number of steps"
            )
    elif isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}: must be a number of steps, at least 1, or None")


def check_loss(architecture: Architecture, loss: Any, groups: Groups) -> bool:
    """Raise ValueError if the architecture needs a loss and there is none. Returns whether there is a step to do.

    torch.distributed.checkpoint has optimizers create their state by a step without a loss, with zero gradients and
    zero learning rates. That is done, and no step is taken.
    """
    if not architecture.needs_loss:
        return True
    if loss is None:
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if gradients and not any(group["lr"] for group in groups) and not any(g.any() for g in gradients):
            return False
        raise ValueError(
            f"{architecture.NAME} looks at the training loss: call step(loss=loss) with the one that these "
            "gradients come from, or step(closure)"
        )
    check_number(loss)
    return True


def check_number(loss: Any) -> None:
    """Raise ValueError unless it is a number or a tensor of one element, which is not read."""
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(f"loss is {loss.dtype} of shape {tuple(loss.shape)}: must be one real number")
        return
    if number_of(loss) is None:
        raise ValueError(f"loss={loss!r}: must be one real number")


def _check_not_captured(architecture: Architecture, devices: Iterable[torch.device]) -> None:
    """Raise RuntimeError while a CUDA graph is captured: a replay would read the numbers of this step, from memory
    that is then another's. Before anything that a capture does not allow."""
    if any(map(device.capturing, devices)):
        raise RuntimeError(f"a step of {architecture.NAME} cannot be captured into a CUDA graph")


class Level(NamedTuple):
    """Where the tensor level is computed, in which type, and by what."""

    device: torch.device
    dtype: torch.dtype
    in_numpy: bool
    """On the memory of PyTorch's tensors."""

    @classmethod
    def of(cls, architecture: Architecture, everything: Sequence[Planned]) -> Level:
        """Raises ValueError, naming a parameter, if there are several devices."""
        places = {p.device: f"{name} is on {p.device}" for _, name, p, _ in everything}
        if len(places) > 1:
            raise ValueError(
                f"{', '.join(places.values())}: {architecture.NAME} sees all parameters together, and takes those of "
                "one device so far; give each device its own optimizer"
            )
        dtypes = {home.sums for _, _, _, home in everything}
        where = next(iter(places), torch.device("cpu"))  # no parameters yet
        return cls(
            where,
            torch.float64 if torch.float64 in dtypes else torch.float32,
            {home.backend for _, _, _, home in everything} == {"cpu"}
            and _has_small_network(architecture, len(everything)),
        )

    def array(self, a: torch.Tensor) -> Array:
        """The same memory as an array that is computed with."""
        return a.numpy() if self.in_numpy else a

    def number(self, value: Any) -> Array:
        """A number or a tensor of one element as one () of this level, without a wait for the device."""
        if self.in_numpy:
            return np.asarray(
                value.item() if isinstance(value, torch.Tensor) else float(value),
                str(self.dtype).removeprefix("torch."),
            )
        if isinstance(value, torch.Tensor):
            return value.detach().reshape(()).to(self.device, self.dtype, non_blocking=True)
        return torch.full((), float(value), dtype=self.dtype, device=self.device)


def _has_small_network(architecture: Architecture, tensors: int) -> bool:
    """Whether there is one, and NumPy computes its largest matrix product in one thread."""
    sizes = [math.prod(shape) for shape in architecture.theta_shapes.values()]
    rows = tensors if architecture.sees_tensors else 1
    return bool(sizes) and rows * max(sizes) < ONE_THREAD


class _Member(NamedTuple):
    """A parameter that is not empty."""

    name: str
    """"" where parameters have no names."""
    planned: Planned
    strides: tuple[int, ...]
    """Of the parameter, if it were dense in its memory order."""
    accumulators: dict[str, Layout]
    initial_rows: dict[str, torch.Tensor]
    row_layouts: dict[str, Layout]


class _Model:
    """The parameters of an optimizer, and how their state looks."""

    def __init__(self, options: Options[Architecture], memory: device.Memory, groups: Groups) -> None:
        self.architecture = options.spec
        self.everything = check_parameters(options, groups)
        self.level = Level.of(self.architecture, self.everything)
        self.theta = memory.named_theta(self.level.device, self.level.dtype)
        names = [name for group in groups for name in group.get("param_names", ())]
        self.named = bool(names)
        filled = [i for i, (_, _, p, _) in enumerate(self.everything) if p.numel()]
        shapes = [tuple(self.everything[i][2].shape) for i in filled]
        rows = self.architecture.init_rows(self.theta, shapes) if filled else {}
        self.members: list[_Member] = []
        for row, i in enumerate(filled):
            _, _, p, home = planned = self.everything[i]
            name = names[i] if names else ""
            initial = {key: a[row] for key, a in rows.items()}
            self.members.append(
                _Member(
                    name,
                    planned,
                    dense_strides(p.shape, home.placement(p).order),
                    home.layouts(self.architecture.accumulates(name, p.shape), p),
                    initial,
                    {key: _layout(a) for key, a in initial.items()},
                )
            )

    def checked_state(self, member: _Member, entries: Mapping[str, Any], copy: bool) -> dict[str, Any]:
        """`state.checked_state` of a parameter."""
        what = f"state of {member.planned[1]}"
        check_keys(what, [*member.accumulators, *member.row_layouts], entries, _HINT)
        p = member.planned[2]
        return {
            **checked_arrays(what, member.accumulators, p.device, entries, copy),
            **checked_arrays(what, member.row_layouts, self.level.device, entries, copy),
        }

    def initial_state(self, member: _Member) -> dict[str, Any]:
        p = member.planned[2]
        zeros = {
            key: torch.empty_strided(shape, strides, dtype=dtype, device=p.device).zero_()
            for key, (shape, strides, dtype) in member.accumulators.items()
        }
        return zeros | {key: a.clone() for key, a in member.initial_rows.items()}

    def initial_shared(self, num_steps: int | None) -> dict[str, Any]:
        arrays = self.architecture.init_shared(self.theta)
        step = torch.zeros((), dtype=torch.int64, device=self.level.device)
        return {"step": step, "num_steps": num_steps} | {key: a.clone() for key, a in arrays.items()}

    def checked_shared(self, groups: Groups, copy: bool) -> dict[str, Any]:
        """The shared state of `groups`, as `checked_state`. Raises ValueError if it is missing or does not fit."""
        what, found = f"{SHARED!r} of parameter group 0", groups[0].get(SHARED)
        if not isinstance(found, dict):
            raise ValueError(
                f"{what} is missing: a state of {self.architecture.NAME} has it; was this one saved by another "
                "optimizer?"
            )
        arrays = self.architecture.init_shared(self.theta)
        check_keys(what, ["step", "num_steps", *arrays], found, _HINT)
        try:
            check_num_steps(self.architecture, found["num_steps"])
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        layouts = {key: _layout(a) for key, a in arrays.items()}
        return {
            "step": checked_step(what, found["step"], self.level.device, copy),
            "num_steps": found["num_steps"],
            **checked_arrays(what, layouts, self.level.device, found, copy),
        }


class ArchitecturePlan:
    """Everything that a step needs and that stays equal from step to step; see `plan.Plan`, whose interface it has."""

    def __init__(
        self, options: Options[Architecture], memory: device.Memory, groups: Groups, state: State
    ) -> None:
        self.options = options
        _check_not_captured(options.spec, {p.device for group in groups for p in group["params"]})
        self._model = model = _Model(options, memory, groups)
        for _, name, p, _ in model.everything:
            if p.grad is not None:
                check_gradient(name, p)
        shared = model.checked_shared(groups, copy=False)
        kept = [
            model.checked_state(m, state[m.planned[2]], copy=False) if state.get(m.planned[2]) else None
            for m in model.members
        ]
        # All is checked; from here on things are written.
        groups[0][SHARED].update(shared)
        for member, entries in zip(model.members, kept, strict=True):
            p = member.planned[2]
            if p.grad is not None and p.grad.is_neg():
                p.grad = p.grad.resolve_neg()
            if entries is not None:
                state[p].update(entries)
            elif p.grad is not None:
                state[p] = model.initial_state(member)
        self._members = [m for m in model.members if m.planned[2].grad is not None]
        self._collect(groups, state)
        self._seen = _Seen(groups, state)

    def _collect(self, groups: Groups, state: State) -> None:
        """What operations take, and the arrays of the tensor level."""
        members, level = self._members, self._model.level
        backends = {home.backend for _, _, _, home in self._model.everything}
        self._backend = backends.pop() if len(backends) == 1 else "reference"
        self._host = level.device.type in HOST
        self._kept = Kept()
        self._params = [m.planned[2] for m in members]
        self._targets = [p.detach() for p in self._params]
        self._group_of = [m.planned[0] for m in members]
        self._names = [m.name for m in members] if self._model.named else []
        self._strides = [m.strides for m in members]
        self._converted = any(
            p.dtype != m.planned[3].sums for m, p in zip(members, self._params, strict=True)
        )
        self._params_fit = self._fit(self._targets)
        self._gradients_fit = self._fit([p.grad for p in self._params])
        self._keys = [list(m.accumulators) for m in members]
        self._states = []
        for m, p in zip(members, self._params, strict=True):
            unused = torch.zeros(0, dtype=m.planned[3].sums, device=p.device)
            found = {key: state[p][key] for key in m.accumulators}
            self._states.append(TensorState(*(found.get(key, unused) for key in TensorState._fields)))
        self._theta = {key: level.array(a) for key, a in self._model.theta.items()}
        self._rows = {key: level.array(a) for key, a in self._stacked_rows(state).items()}
        shared = {key: a for key, a in groups[0][SHARED].items() if key != "num_steps"}
        self._shared = {key: level.array(a) for key, a in shared.items()}
        self._step = self._shared.pop("step")

    def _stacked_rows(self, state: State) -> dict[str, torch.Tensor]:
        """The rows of all tensors, one behind the other; from now on those in `state` are views of them."""
        stacked: dict[str, torch.Tensor] = {}
        for key in self._members[0].row_layouts if self._members else ():
            stacked[key] = torch.stack([state[p][key] for p in self._params])
            for i, p in enumerate(self._params):
                state[p][key] = stacked[key][i]
        return stacked

    @staticmethod
    def check(options: Options[Architecture], groups: Groups) -> None:
        """Raise ValueError or BackendError, naming the parameter, unless all of them can be optimized."""
        Level.of(options.spec, check_parameters(options, groups))

    @staticmethod
    def loaded(
        options: Options[Architecture], memory: device.Memory, groups: Groups, state: State
    ) -> tuple[Groups, State]:
        """Groups and state as loaded, checked and copied. Raises ValueError, naming the parameter."""
        model = _Model(options, memory, groups)
        shared = model.checked_shared(groups, copy=True)
        copies = {
            m.planned[2]: model.checked_state(m, state[m.planned[2]], copy=True)
            for m in model.members
            if state.get(m.planned[2])
        }
        return [{**groups[0], SHARED: shared}, *groups[1:]], {**state, **copies}

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
        """As `plan.Plan.step`; `loss` and `num_steps` as `LearnedOptimizer` takes them."""
        _check_not_captured(self._model.architecture, (self._model.level.device,))
        gradients = self._seen.gradients(groups, state)
        if gradients is None:
            return False
        lrs, weight_decays = hyperparameters(groups, read_devices=self._host)
        if found_inf is not None:
            if (self._host or on_host(found_inf)) and float(found_inf) > 0.0:
                return True
            found_inf = None if self._host or on_host(found_inf) else found_inf.to(self._model.level.device)
        if not self._members:
            return True
        scale = self._gradient_factor(gradients, grad_scale, max_grad_norm)
        architecture, level = self._model.architecture, self._model.level

        def for_each(values: Sequence[Number]) -> list[Number]:
            here = [_scalar(value, level.device) for value in values]
            return [here[group] for group in self._group_of]

        tensors = ModelTensors(
            params=self._operands(self._targets, self._params_fit),
            grads=self._operands(gradients, self._gradients_fit),
            states=self._states,
            lr=for_each(lrs),
            weight_decay=for_each(weight_decays),
            names=self._names,
            grad_scale=scale,
            apply=True,
        )
        inputs = Inputs(
            self._step,
            None if num_steps is None else level.number(num_steps),
            level.number(loss) if architecture.needs_loss else None,
        )
        # Copies, as a new array may be an old one of another name.
        rows, shared = _copies(self._rows), _copies(self._shared)
        with _no_autocast(level.device.type), np.errstate(all="ignore"):
            update = architecture.step(
                implementation(self._backend, found_inf, self._kept, level.in_numpy),
                self._theta, tensors, rows, shared, inputs,
            )  # fmt: skip
        self._write(update, found_inf)
        groups[0][SHARED]["num_steps"] = num_steps
        return True

    def _fit(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether operations take them as they are."""
        dense = self._backend == "reference" or [*map(torch.Tensor.stride, tensors)] == self._strides
        return dense and not self._converted

    def _operands(self, tensors: list[torch.Tensor], fit: bool) -> list[torch.Tensor]:
        """One for each member, or copies: in the type that is computed in, for kernels dense in the memory order of
        the parameter."""
        if fit:
            return tensors
        return [self._operand(m, a.detach()) for m, a in zip(self._members, tensors, strict=True)]

    def _operand(self, member: _Member, a: torch.Tensor) -> torch.Tensor:
        _, _, p, home = member.planned
        if self._backend != "reference" and a.stride() != member.strides:
            return torch.empty_strided(p.shape, member.strides, dtype=home.sums, device=p.device).copy_(a)
        return a if a.dtype == home.sums else a.to(home.sums)

    def _gradient_factor(
        self, gradients: Sequence[Any], grad_scale: Any, max_grad_norm: float | None
    ) -> Number:
        """What gradients are multiplied by: loss scaling undone, norm clipped."""
        scale: Number = 1.0
        if isinstance(grad_scale, torch.Tensor) and not (self._host or on_host(grad_scale)):
            scale = grad_scale.to(self._model.level.device).reshape(()).reciprocal()
        elif grad_scale is not None:
            scale = 1.0 / float(grad_scale)
        if max_grad_norm is None:
            return scale
        return scale * clip_factor(gradients, scale, max_grad_norm)

    def _write(self, update: Update, found_inf: torch.Tensor | None) -> None:
        """Where `found_inf` is 0; not what operations have written in place."""
        pairs: list[tuple[Any, Any]] = [
            (old, new) for old, new in zip(self._targets, update.outputs, strict=True) if new is not old
        ]
        for keys, before, after in zip(self._keys, self._states, update.states, strict=True):
            if after is not before:
                pairs += [(getattr(before, key), getattr(after, key)) for key in keys]
        level = [(self._step, self._step + 1)]
        level += [(a, update.rows[key]) for key, a in self._rows.items()]
        level += [(a, update.shared[key]) for key, a in self._shared.items()]
        if self._model.level.in_numpy:
            for old, new in level:
                old[...] = new
        else:
            pairs += level
        pairs = [(old, new) for old, new in pairs if new is not old]
        if found_inf is not None:
            stay = found_inf.reshape(()) > 0
            pairs = [(old, torch.where(stay, old, new.to(old.dtype))) for old, new in pairs]
        if pairs:
            torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])


class _Seen:
    """What a plan was built for, and whether a step still meets that: as cheap for each tensor as can be."""

    def __init__(self, groups: Groups, state: State) -> None:
        self._objects = _objects(groups, state)  # kept, so that no other object gets their ids
        self._ids = [[*map(id, kind)] for kind in self._objects]
        params = self._objects[0]
        self._tensors = params + [a for a in self._objects[-1] if isinstance(a, torch.Tensor)]
        self._places = _described(self._tensors)
        present = [p for p in params if p.grad is not None]
        self._has_gradient = [p.grad is not None for p in params]
        self._gradients_lie = _described([p.grad for p in present])[1]
        self._filled = [p.numel() > 0 for p in present]
        self._real = np.array([p.numel() > 0 and p.device.type != "meta" for p in present], bool)

    def gradients(self, groups: Groups, state: State) -> list[torch.Tensor] | None:
        """Those of the parameters that have one and are not empty; None if the plan does not fit."""
        objects = _objects(groups, state)
        if [[*map(id, kind)] for kind in objects] != self._ids or _described(self._tensors) != self._places:
            return None
        gradients = [p.grad for p in objects[0]]
        if [g is not None for g in gradients] != self._has_gradient:
            return None
        present = [g for g in gradients if g is not None]
        addresses, lie = _described(present)
        if lie != self._gradients_lie or any(map(torch.Tensor.is_neg, present)):
            return None
        if not np.frombuffer(addresses, np.int64)[self._real].all():
            return None  # its memory was freed
        return [*compress(present, self._filled)]


def _described(tensors: list[Any]) -> tuple[bytes, Any]:
    """Addresses of tensors as int64, 0 where there is no memory, and all else about how they lie in it: to be compared
    with those of another time."""
    found = _in_native_code(tensors)
    if found is None:
        lie = [
            (t.layout, t.dtype, t.device, t.shape, t.layout is torch.strided and t.stride()) for t in tensors
        ]
        addresses = [t.data_ptr() if t.layout is torch.strided else 0 for t in tensors]
        return np.array(addresses, np.int64).tobytes(), lie
    return found


def _in_native_code(tensors: list[Any]) -> tuple[bytes, bytes] | None:
    """None without the compiled core or with an older one, and for what DLPack does not have: sparse tensors, some
    types of devices."""
    try:
        found: tuple[bytes, bytes] | None = native().described(
            tensors, torch.Tensor.__dlpack_c_exchange_api__
        )
    except (BackendError, AttributeError):
        return None
    return found


def _objects(groups: Groups, state: State) -> tuple[list[Any], ...]:
    """Parameters; those that have state, their dicts, the keys of these, and what is in them.

    No look-up: a tensor's hash is a function in Python.
    """
    params = [p for group in groups for p in group["params"]]
    shared = {key: a for key, a in groups[0].get(SHARED, {}).items() if key != "num_steps"}
    entries = [*state.values()]
    both = [shared, *entries]
    return params, [*state], entries, [*chain.from_iterable(both)], [a for e in both for a in e.values()]


def _copies(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {key: a.copy() if isinstance(a, np.ndarray) else a.clone() for key, a in arrays.items()}


def observe_validation(
    options: Options[Architecture], memory: device.Memory, groups: Groups, loss: torch.Tensor | float
) -> None:
    """Tell the architecture a loss on validation data."""
    model = _Model(options, memory, groups)
    shared = model.checked_shared(groups, copy=False)
    arrays = {key: a.clone() for key, a in shared.items() if key not in ("step", "num_steps")}
    number = model.level._replace(in_numpy=False).number(loss)
    arrays = model.architecture.observe_validation(model.theta, arrays, number)
    groups[0][SHARED].update(shared)
    for key, a in arrays.items():
        shared[key].copy_(a)


def create_shared(
    options: Options[Architecture], memory: device.Memory, groups: Groups, num_steps: int | None
) -> None:
    """Put the state of the whole model before the first step into the first group."""
    groups[0][SHARED] = _Model(options, memory, groups).initial_shared(num_steps)


def _layout(a: torch.Tensor) -> Layout:
    a = a.contiguous()
    return tuple(a.shape), a.stride(), a.dtype


def _scalar(value: Number, where: torch.device) -> Number:
    """A number, or a tensor () on this device."""
    return moved(value.detach().reshape(()), where) if isinstance(value, torch.Tensor) else value


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()
