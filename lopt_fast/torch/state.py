"""State of `LearnedOptimizer`: which backend a parameter gets, and in which types, order and place its state lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from ..backends import BackendError, choose
from ..native import Placement
from ..spec import Spec

Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides in elements, type."""

_HALF = (torch.bfloat16, torch.float16)
_GPU_STATE = (torch.float32, torch.bfloat16)


class Options(NamedTuple):
    """What decides the backend of a parameter, how its state lies and how kernels are called; compared at each step."""

    spec: Spec
    backend: str = "auto"
    state_dtype: torch.dtype | None = None
    mlp: str = "automatic"
    schedule: str = "automatic"


def dtype_name(p: torch.Tensor) -> str:
    """As the registry calls it: "float32"."""
    return str(p.dtype).removeprefix("torch.")


def backend_of(options: Options, p: torch.Tensor) -> str:
    """Name of the backend that updates `p`. Raises BackendError if a forced one cannot."""
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
    def of(cls, options: Options, name: str, p: torch.Tensor) -> Home:
        """Raises BackendError, naming the parameter, if its backend does not take `state_dtype` or `mlp`."""
        backend, wanted = backend_of(options, p), options.state_dtype
        if backend == "triton" and options.mlp == "matmul_bfloat16":
            raise BackendError(
                f"mlp={options.mlp!r}: {name} is updated by backend 'triton', which does not have it"
            )
        if backend not in ("cpu", "reference"):
            return cls(backend, True, wanted or torch.float32, torch.float32)
        dtype = torch.float32 if p.dtype in _HALF else p.dtype
        if wanted not in (None, dtype):
            raise BackendError(
                f"state_dtype={wanted}: {name} is updated by backend {backend!r}, which keeps its state in {dtype}; "
                "the backends cuda and triton take torch.float32 and torch.bfloat16"
            )
        return cls(backend, False, dtype, dtype)

    def placement(self, p: torch.Tensor) -> Placement:
        return Placement.of(p.shape, p.stride(), self.on_gpu)

    def layouts(self, spec: Spec, p: torch.Tensor) -> dict[str, Layout]:
        """Of each array of the state of `p`, but for `step`."""
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
    return {"step": torch.zeros((), dtype=torch.int64, device=home.step_device(p)), **zeros}


def checked_state(
    spec: Spec, home: Home, name: str, p: torch.Tensor, state: Mapping[str, Any], copy: bool = False
) -> dict[str, Any]:
    """`state` with every tensor in its type, device and memory order; itself reused where it is, but for `copy`.

    Raises ValueError, naming the parameter and the entry, if entries are missing, unknown or of wrong shapes.
    """
    layouts = home.layouts(spec, p)
    expected = {"step", *layouts}
    if state.keys() != expected:
        missing, extra = sorted(expected - state.keys()), sorted(map(str, state.keys() - expected))
        hint = "load a state that was saved with the same weights, architecture and statistics"
        if {*missing, *extra} == {"mean_squares"}:
            hint = (
                f"it was not saved with statistics={spec.statistics!r}; pass the statistics it was saved with"
            )
        raise ValueError(f"state of {name}: missing {missing}, unknown {extra}: {hint}")
    result: dict[str, Any] = {"step": _checked_step(name, state["step"], home.step_device(p), copy)}
    for key, (shape, strides, dtype) in layouts.items():
        value = state[key]
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"state of {name}: {key!r} is {found}, expected shape {shape}: "
                "load a state that was saved for the same model and weights"
            )
        laid_out = all(n <= 1 or a == b for n, a, b in zip(shape, value.stride(), strides, strict=True))
        if copy or value.dtype != dtype or value.device != p.device or not (laid_out or value.numel() == 0):
            value = torch.empty_strided(shape, strides, dtype=dtype, device=p.device).copy_(value)
        result[key] = value
    return result


def _checked_step(name: str, step: Any, device: torch.device, copy: bool) -> torch.Tensor:
    in_place = (
        isinstance(step, torch.Tensor)
        and step.dtype == torch.int64
        and step.dim() == 0
        and step.device == device
        and not copy
    )
    if in_place and device.type != "cpu":
        return step  # not read: that would wait for the device
    count = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    is_count = isinstance(count, (int, float)) and 0 <= count < 2**62 and count == int(count)
    if not is_count or isinstance(count, bool):
        raise ValueError(f"state of {name}: 'step' must be one number of steps, not {step!r}")
    return step if in_place else torch.tensor(int(count), device=device)
