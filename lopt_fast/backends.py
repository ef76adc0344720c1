"""Which implementation of an operation runs where: the registry, and the reasons for what is missing.

An operation (a fused update) has up to four implementations, tried in the order CUDA, Triton, CPU, reference. The
reference is plain array code, runs on every device and takes every specification.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from .spec import Spec


class BackendError(RuntimeError):
    """A backend that was asked for cannot be used; says why, and which ones can."""


class BackendWarning(UserWarning):
    """`backend="auto"` fell back to the reference implementation, which is slow; given once for each reason."""


@cache
def _import_native() -> tuple[Any, str]:
    try:
        return import_module("lopt_fast._native"), ""
    except ImportError as error:
        return None, (
            f"the compiled core lopt_fast._native cannot be imported ({error}); "
            "build it by reinstalling: pip install . in the source folder, with a C++17 compiler"
        )


def native() -> Any:
    """The compiled core. Raises BackendError with the reason where it is missing."""
    module, reason = _import_native()
    if module is None:
        raise BackendError(reason)
    return module


def _any_spec(spec: Spec, dtype_name: str) -> str | None:
    return None


def _cpu_supports(spec: Spec, dtype_name: str) -> str | None:
    if dtype_name not in ("float32", "float64"):
        return f"it takes float32 and float64, not {dtype_name}"
    if spec.feature_set != "default":
        return f"it takes feature_set 'default', not {spec.feature_set!r}"
    counts = len(spec.momentum_decays), len(spec.rms_decays), len(spec.adafactor_decays)
    if counts != (3, 1, 3):
        return "it takes 3 momentum, 1 second-moment and 3 factored decays, not {}, {} and {}".format(*counts)
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation."""

    name: str
    devices: tuple[str, ...]
    """Device types that it runs on; empty: all."""
    available: Callable[[], str | None]
    """None, or the reason why it cannot be used on this machine."""
    supports: Callable[[Spec, str], str | None]
    """None, or the reason why it cannot compute this specification in this dtype."""

    def refusal(self, spec: Spec, device_type: str, dtype_name: str) -> str | None:
        """None if it can run, else the reason why not."""
        if reason := self.available():
            return reason
        if self.devices and device_type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, these arrays are on {device_type}"
        return self.supports(spec, dtype_name)


def _not_built() -> str:
    return "not built in this version"


OPERATIONS: dict[str, tuple[Backend, ...]] = {
    "small_fc_lopt": (
        Backend("cuda", ("cuda",), _not_built, _any_spec),
        Backend("triton", ("cuda", "rocm"), _not_built, _any_spec),
        Backend("cpu", ("cpu",), lambda: _import_native()[1] or None, _cpu_supports),
        Backend("reference", (), lambda: None, _any_spec),
    ),
}
"""Implementations of each operation, best first."""

BACKENDS: tuple[str, ...] = ("auto", *(b.name for b in OPERATIONS["small_fc_lopt"]))
"""What a `backend` argument may be."""

_warned: set[str] = set()


def choose(
    spec: Spec, device_type: str, dtype_name: str, backend: str = "auto", *, operation: str = "small_fc_lopt"
) -> str:
    """Name of the implementation of `operation` to use.

    `device_type` is PyTorch's or JAX's name ("cpu", "cuda", "gpu", "tpu", ...), `dtype_name` as "float32".
    Raises BackendError if `backend` is unknown or cannot be used. With "auto" it takes the first that can, and
    warns (BackendWarning, once for each reason) where that is the reference.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    device = "cuda" if device_type == "gpu" else device_type
    refused: dict[str, str] = {}
    for candidate in OPERATIONS[operation]:
        reason = candidate.refusal(spec, device, dtype_name)
        if backend == "auto" and reason is None:
            if candidate.name == "reference":
                _warn_once(operation, device, refused)
            return candidate.name
        if backend == candidate.name:
            if reason is not None:
                raise BackendError(
                    f"backend={backend!r} of {operation} cannot be used: {reason}. "
                    "Use backend='auto' to take the best that can, backend='reference' for plain array code."
                )
            return candidate.name
        if reason is not None:
            refused[candidate.name] = reason
    raise BackendError(f"no implementation of {operation} for {device_type}: {refused}")


def _warn_once(operation: str, device: str, refused: dict[str, str]) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    message = (
        f"{operation} on {device} uses the reference implementation, which is slow ({reasons}). "
        "backend='reference' chooses it without this warning."
    )
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, BackendWarning, stacklevel=4)


@dataclass(frozen=True)
class Row:
    """One line of `lopt-fast info`."""

    operation: str
    backend: str
    devices: str
    reason: str | None
    """Why it is missing on this machine; None where it is available."""


def table() -> list[Row]:
    """Every operation and implementation, with the reason for each one that is missing on this machine."""
    return [
        Row(operation, b.name, ", ".join(b.devices) or "all", b.available())
        for operation, backends in OPERATIONS.items()
        for b in backends
    ]
