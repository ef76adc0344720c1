"""Which implementation of an operation runs where: the registry, and the reasons for what is missing.

An operation (a fused update) has up to four implementations, tried in the order CUDA, Triton, CPU, reference. The
reference is plain array code, runs on every device and takes every specification.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .spec import Spec

if TYPE_CHECKING:
    from .architectures import Architecture
    from .operations import ElementMlp


class BackendError(UserError, RuntimeError):
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


@cache
def _import_cuda() -> tuple[Any, str]:
    core, reason = _import_native()
    if core is None:
        return None, reason
    try:
        return import_module("lopt_fast._cuda"), ""
    except ImportError as error:
        built = getattr(core, "cuda_build", None)
        if built == "":
            return None, f"lopt_fast._cuda was built, but cannot be imported ({error})"
        return None, (
            f"lopt_fast._cuda was not built ({built or error}): reinstall lopt_fast with nvcc on the PATH, "
            "pip install . in the source folder"
        )


def cuda() -> Any:
    """The module with the CUDA kernels. Raises BackendError with the reason where it is missing."""
    module, reason = _import_cuda()
    if module is None:
        raise BackendError(reason)
    return module


@cache
def _cuda_missing(ordinal: int) -> str | None:
    module, reason = _import_cuda()
    if module is None:
        return reason
    problem: str | None = module.problem(ordinal)
    return problem


def _has_gpu_driver() -> bool:
    """Without importing PyTorch, which takes seconds."""
    try:
        return Path("/dev/kfd").exists() or bool(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return False


@cache
def _triton_missing(ordinal: int) -> str | None:
    if reason := _import_native()[1]:
        return reason
    for package in ("triton", "torch"):
        if find_spec(package) is None:
            return f"{package} is not installed: pip install {package}"
    if not _has_gpu_driver() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no driver of an NVIDIA or AMD GPU was found (libcuda.so.1, /dev/kfd)"
    try:
        driver = import_module("lopt_fast.torch.triton")
    except ImportError as error:
        return f"it needs PyTorch, which cannot be imported ({error})"
    problem: str | None = driver.available()
    version = driver.torch.version
    if problem and version.cuda is None and version.hip is None:
        return f"this PyTorch ({version.__version__}) was built without CUDA and ROCm"
    return problem


def _cpu_missing(ordinal: int) -> str | None:
    return _import_native()[1] or None


def _cpu_operations_missing(ordinal: int) -> str | None:
    core, reason = _import_native()
    if core is not None and not hasattr(core, "element_mlp"):
        return "the compiled core lopt_fast._native is older than these kernels: reinstall lopt_fast"
    return reason or None


def _nothing_missing(ordinal: int) -> str | None:
    return None


def _any_spec(spec: Any, dtype_name: str) -> str | None:
    return None


def _dtype_refused(dtype_name: str, dtype_names: tuple[str, ...]) -> str | None:
    if dtype_name in dtype_names:
        return None
    return f"it takes {', '.join(dtype_names[:-1])} and {dtype_names[-1]}, not {dtype_name}"


def _cpu_types() -> tuple[str, ...]:
    from .native import STORAGE_TYPES  # not at the top: it imports this module

    return STORAGE_TYPES


def _cpu_supports(spec: Spec, dtype_name: str) -> str | None:
    return _kernel_supports(spec, dtype_name, _cpu_types())


def _cpu_supports_any(spec: Any, dtype_name: str) -> str | None:
    return _dtype_refused(dtype_name, _cpu_types())  # of half types the operations get copies in float32


def _cpu_supports_mlp(spec: ElementMlp, dtype_name: str) -> str | None:
    from .native_operations import unsupported  # not at the top: it imports this module

    return unsupported(spec) or _cpu_supports_any(spec, dtype_name)


def _gpu_supports(spec: Spec, dtype_name: str) -> str | None:
    if spec.hidden_size > 64:
        return f"it takes hidden_size 2 to 64, not {spec.hidden_size}"
    return _kernel_supports(spec, dtype_name, ("float32", "bfloat16", "float16"))


def _gpu_supports_any(spec: Any, dtype_name: str) -> str | None:
    return _dtype_refused(dtype_name, ("float32", "bfloat16", "float16"))


def _cuda_supports_mlp(spec: ElementMlp, dtype_name: str) -> str | None:
    from .native_operations import unsupported_on_gpus  # not at the top: it imports this module

    return unsupported_on_gpus(spec) or _gpu_supports_any(spec, dtype_name)


def _gpu_supports_mlp(spec: ElementMlp, dtype_name: str) -> str | None:
    from .torch.triton_operations import unsupported  # it needs PyTorch and Triton

    return unsupported(spec) or _gpu_supports_any(spec, dtype_name)


def _kernel_supports(spec: Spec, dtype_name: str, dtype_names: tuple[str, ...]) -> str | None:
    if reason := _dtype_refused(dtype_name, dtype_names):
        return reason
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
    missing: Callable[[int], str | None]
    """None, or the reason why it cannot be used on this machine, on the device of this number."""
    supports: Callable[[Any, str], str | None]
    """None, or the reason why it cannot compute this specification in this dtype."""

    def refusal(self, spec: Any, device_type: str, dtype_name: str, ordinal: int = 0) -> str | None:
        """None if it can run, else the reason why not."""
        if self.devices and device_type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, these arrays are on {device_type}"
        return self.missing(ordinal) or self.supports(spec, dtype_name)


OPERATIONS: dict[str, tuple[Backend, ...]] = {
    "small_fc_lopt": (
        Backend("cuda", ("cuda",), _cuda_missing, _gpu_supports),
        Backend("triton", ("cuda", "rocm"), _triton_missing, _gpu_supports),
        Backend("cpu", ("cpu",), _cpu_missing, _cpu_supports),
        Backend("reference", (), _nothing_missing, _any_spec),
    ),
    "element_mlp": (
        Backend("cuda", ("cuda",), _cuda_missing, _cuda_supports_mlp),
        Backend("triton", ("cuda", "rocm"), _triton_missing, _gpu_supports_mlp),
        Backend("cpu", ("cpu",), _cpu_operations_missing, _cpu_supports_mlp),
        Backend("reference", (), _nothing_missing, _any_spec),
    ),
    "adam": (
        Backend("cuda", ("cuda",), _cuda_missing, _gpu_supports_any),
        Backend("triton", ("cuda", "rocm"), _triton_missing, _gpu_supports_any),
        Backend("cpu", ("cpu",), _cpu_operations_missing, _cpu_supports_any),
        Backend("reference", (), _nothing_missing, _any_spec),
    ),
    "statistics": (
        Backend("cuda", ("cuda",), _cuda_missing, _gpu_supports_any),
        Backend("triton", ("cuda", "rocm"), _triton_missing, _gpu_supports_any),
        Backend("cpu", ("cpu",), _cpu_operations_missing, _cpu_supports_any),
        Backend("reference", (), _nothing_missing, _any_spec),
    ),
}
"""Implementations of each operation, best first. Its specification: `Spec` for small_fc_lopt, `ElementMlp` for
element_mlp, None for the others."""

BACKENDS: tuple[str, ...] = ("auto", *(b.name for b in OPERATIONS["small_fc_lopt"]))
"""What a `backend` argument may be."""

_warned: set[str] = set()


def refusal(
    backend: str,
    spec: Any,
    device_type: str,
    dtype_name: str,
    *,
    ordinal: int = 0,
    operation: str = "small_fc_lopt",
) -> str | None:
    """None if this implementation of `operation` can be used, else the reason why not; arguments as of `choose`."""
    device = "cuda" if device_type == "gpu" else device_type
    found = next(b for b in OPERATIONS[operation] if b.name == backend)
    return found.refusal(spec, device, dtype_name, ordinal)


def operations_refusal(
    backend: str, architecture: Architecture, device_type: str, dtype_name: str, *, ordinal: int = 0
) -> str | None:
    """None if `backend` can compute the operations of `architecture`, else the reason why not; as `refusal`."""
    if not architecture.has_kernels:
        return f"{architecture.NAME} is plain array code, with these hyperparameters at least"
    from .operations import ElementMlp  # not at the top: it imports this module

    mlp = getattr(architecture, "mlp", None)
    operation = "element_mlp" if isinstance(mlp, ElementMlp) else "adam"
    return refusal(backend, mlp, device_type, dtype_name, ordinal=ordinal, operation=operation)


def choose(
    spec: Any,
    device_type: str,
    dtype_name: str,
    backend: str = "auto",
    *,
    ordinal: int = 0,
    operation: str = "small_fc_lopt",
) -> str:
    """Name of the implementation of `operation` to use for this specification of it.

    `device_type` is PyTorch's or JAX's name ("cpu", "cuda", "gpu", "tpu", ...), `dtype_name` as "float32" that of the
    parameters, `ordinal` the number of the device.
    Raises BackendError if `backend` is unknown or cannot be used. With "auto" it takes the first that can, and
    warns (BackendWarning, once for each reason) where that is the reference.
    """
    names = ("auto", *(b.name for b in OPERATIONS[operation]))
    if backend not in names:
        raise BackendError(f"backend={backend!r}: must be one of {', '.join(names)}")
    device = "cuda" if device_type == "gpu" else device_type
    refused: dict[str, str] = {}
    for candidate in OPERATIONS[operation]:
        reason = candidate.refusal(spec, device, dtype_name, ordinal)
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
        Row(operation, b.name, ", ".join(b.devices) or "all", b.missing(0))
        for operation, backends in OPERATIONS.items()
        for b in backends
    ]
