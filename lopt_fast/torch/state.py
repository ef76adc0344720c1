"""State of `LearnedOptimizer`: which backend a parameter gets, and in which types, order and place its state lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch

from ..architectures import Architecture
from ..backends import BackendError, choose
from ..native import Placement, arithmetic
from ..spec import Accumulates, Spec
from . import dtensors
from .operations import operations_backend

Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides in elements, type."""

_GPU_STATE = (torch.float32, torch.bfloat16)


S = TypeVar("S", bound=Spec | Architecture, covariant=True)


class Options(NamedTuple, Generic[S]):
    """What decides the backend of a parameter, how its state lies and how kernels are called; compared at each step."""

    spec: S
    backend: str = "auto"
    state_dtype: torch.dtype | None = None
    mlp: str = "automatic"
    schedule: str = "automatic"


def dtype_name(p: torch.Tensor) -> str:
    """As the registry calls it: "float32"."""
    return str(p.dtype).removeprefix("torch.")


def backend_of(options: Options[Spec | Architecture], p: torch.Tensor) -> str:
    """Name of the backend that updates `p`. Raises BackendError if a forced one cannot."""
    if not isinstance(options.spec, Spec):
        return operations_backend(options.spec, p.device.type, dtype_name(p), options.backend)
    return choose(options.spec, p.device.type, dtype_name(p), options.backend, ordinal=p.device.index or 0)


@dataclass(frozen=True)
class Home:
    """Where the state of a parameter lies, and in which types: a matter of the backend that updates it."""

    backend: str
    on_gpu: bool
    """Laid out for GPU kernels, the step counter on the device."""
    averages: torch.dtype
    """Of momentum and second moment."""
    sums: torch.dtype
    """Of all other accumulators."""

    @classmethod
    def of(cls, options: Options[Spec | Architecture], name: str, p: torch.Tensor) -> Home:
        """Raises BackendError, naming the parameter, if its backend does not take `state_dtype` or `mlp`."""
        backend, wanted = backend_of(options, p), options.state_dtype
        if backend == "triton" and options.mlp == "matmul_bfloat16":
            raise BackendError(
                f"mlp={options.mlp!r}: {name} is updated by backend 'triton', which does not have it"
            )
        on_gpu = backend not in ("cpu", "reference")
        if on_gpu and not isinstance(options.spec, Spec) and wanted not in (None, torch.float32):
            raise BackendError(
                f"state_dtype={wanted}: {options.spec.NAME} on backend {backend!r} keeps the state of {name} in "
                "torch.float32"
            )
        if on_gpu:
            return cls(backend, True, wanted or torch.float32, torch.float32)
        dtype = torch.float64 if arithmetic(dtype_name(p)) == "float64" else torch.float32
        if wanted not in (None, dtype):
            raise BackendError(
                f"state_dtype={wanted}: {name} is updated by backend {backend!r}, which keeps its state in {dtype}; "
                "the backends cuda and triton take torch.float32 and torch.bfloat16"
            )
        return cls(backend, False, dtype, dtype)

    def placement(self, p: torch.Tensor) -> Placement:
        """Of what this process holds of `p`."""
        if dtensors.is_dtensor(p):
            return dtensors.placement(p)
        return Placement.of(p.shape, p.stride(), self.on_gpu)

    def layouts(self, spec: Accumulates, p: torch.Tensor) -> dict[str, Layout]:
        """Of each accumulator of `p`, as far as this process holds it."""
        averages = ("momentum", "second_moment")
        return {
            key: (shape, strides, self.averages if key in averages else self.sums)
            for key, (shape, strides) in self.placement(p).state_layouts(spec).items()
        }

    def step_device(self, p: torch.Tensor) -> torch.device:
        return p.device if self.on_gpu else torch.device("cpu")


def check_state_dtype(dtype: Any) -> None:
    """Raise ValueError unless it is a type in which state can be kept, or None."""
    if dtype is not None and dtype not in _GPU_STATE:
        raise ValueError(f"state_dtype={dtype!r}: must be torch.float32, torch.bfloat16 or None")


def initial_state(spec: Spec, home: Home, p: torch.Tensor) -> dict[str, Any]:
    """Zero accumulators in the memory order of `p`, and no step taken."""
    zeros = {
        key: torch.empty_strided(shape, strides, dtype=dtype, device=p.device).zero_()
        for key, (shape, strides, dtype) in home.layouts(spec, p).items()
    }
    arrays = dtensors.as_state(spec, p, zeros) if dtensors.is_dtensor(p) else zeros
    return {"step": torch.zeros((), dtype=torch.int64, device=home.step_device(p)), **arrays}


def checked_state(
    spec: Spec, home: Home, name: str, p: torch.Tensor, state: Mapping[str, Any], copy: bool = False
) -> dict[str, Any]:
    """`state` with every tensor in its type, device and memory order; itself reused where it is, but for `copy`.

    Raises ValueError, naming the parameter and the entry, if entries are missing, unknown or of wrong shapes.
    """
    layouts = home.layouts(spec, p)
    expected = {"step", *layouts}
    hint = "load a state that was saved with the same weights, architecture and statistics"
    if expected ^ state.keys() == {"mean_squares"}:
        hint = f"it was not saved with statistics={spec.statistics!r}; pass the statistics it was saved with"
    what = f"state of {name}"
    check_keys(what, expected, state, hint)
    step = checked_step(what, state["step"], home.step_device(p), copy)
    if not dtensors.is_dtensor(p):
        return {"step": step, **checked_arrays(what, layouts, p.device, state, copy)}
    parts = dtensors.parts_of_state(what, spec, p, state)
    checked = checked_arrays(what, layouts, p.device, parts, copy)
    arrays = dtensors.as_state(spec, p, checked)
    for key in arrays:
        if dtensors.is_dtensor(state[key]) and checked[key] is parts[key]:
            arrays[key] = state[key]
    return {"step": step, **arrays}


def check_keys(what: str, expected: Iterable[str], state: Mapping[str, Any], hint: str) -> None:
    """Raise ValueError unless `state` has exactly the entries `expected`."""
    missing, extra = sorted(set(expected) - state.keys()), sorted(map(str, state.keys() - set(expected)))
    if missing or extra:
        raise ValueError(f"{what}: missing {missing}, unknown {extra}: {hint}")


def checked_arrays(
    what: str, layouts: Mapping[str, Layout], device: torch.device, state: Mapping[str, Any], copy: bool
) -> dict[str, torch.Tensor]:
    """Those entries of `state` that `layouts` names, as it says and on `device`; see `checked_state`."""
    result = {}
    for key, (shape, strides, dtype) in layouts.items():
        value = state[key]
        if (found := _misfit(value, shape, dtype, device)) is not None:
            raise ValueError(
                f"{what}: {key!r} is {found}, expected shape {shape}: "
                "load a state that was saved for the same model and weights"
            )
        check_memory(what, key, value)
        laid_out = all(n <= 1 or a == b for n, a, b in zip(shape, value.stride(), strides, strict=True))
        if copy or value.dtype != dtype or value.device != device or not (laid_out or value.numel() == 0):
            value = torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(value)
        result[key] = value
    return result


def _misfit(value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """None if numbers of this shape, and of a kind that `dtype` can hold, can be copied from it to `device`; else what
    it is."""
    if not isinstance(value, torch.Tensor) or dtensors.is_dtensor(value):
        return type(value).__name__
    if (
        not _readable(value, device)
        or value.is_complex()
        or value.is_floating_point() != dtype.is_floating_point
    ):
        return f"{value.dtype}, {value.layout}, on {value.device}"
    return None if tuple(value.shape) == shape else str(tuple(value.shape))


def _readable(value: torch.Tensor, device: torch.device) -> bool:
    """Whether it can be copied to `device`. A tensor without values serves a parameter without values."""
    return value.layout == torch.strided and (not value.is_meta or device.type == "meta")


def check_memory(what: str, key: str, value: torch.Tensor) -> None:
    """Raise ValueError if there is nothing to read."""
    if value.numel() and value.device.type in ("cpu", "cuda") and value.data_ptr() == 0:
        raise ValueError(
            f"{what}: {key!r} has no memory (its storage was freed): load a state, or delete that of the parameter, "
            "which then starts afresh"
        )


def checked_step(what: str, step: Any, device: torch.device, copy: bool) -> torch.Tensor:
    """A number of steps as an int64 tensor on `device`; itself reused where it is, but for `copy`."""
    if isinstance(step, torch.Tensor) and _readable(step, device):
        check_memory(what, "step", step)
    in_place = (
        isinstance(step, torch.Tensor)
        and step.dtype == torch.int64
        and step.dim() == 0
        and step.device == device
        and not copy
    )
    if in_place and device.type != "cpu":
        return step  # not read: that would wait for the device
    is_one = isinstance(step, torch.Tensor) and step.numel() == 1 and _readable(step, device)
    count = step.item() if is_one else step
    is_count = isinstance(count, (int, float)) and 0 <= count < 2**62 and count == int(count)
    if not is_count or isinstance(count, bool):
        raise ValueError(f"{what}: 'step' must be one number of steps, not {step!r}")
    return step if in_place else torch.tensor(int(count), device=device)
