"""Which implementation of the operations of an `Architecture` runs where in PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch

from ..architectures import Architecture
from ..backends import BACKENDS, BackendError, BackendWarning, operations_refusal
from ..native_operations import CpuOperations, Kept
from ..operations import ElementMlp, Operations, Reference
from . import device, triton_operations
from .cuda_operations import CudaOperations
from .triton import FLOATS, available
from .triton_operations import TritonOperations

TRITON_DEVICES = ["cuda"]
"""Types of devices that the Triton kernels run on, ROCm's among them: PyTorch calls them so."""

_warned: set[str] = set()


def operations_backend(
    architecture: Architecture, device_type: str, dtype_name: str, backend: str = "auto"
) -> str:
    """Name of the implementation of the operations of `architecture` to use; arguments as those of `backends.choose`.

    Raises BackendError if `backend` is unknown or cannot be used. With "auto" it warns (BackendWarning, once for each
    reason) where there is nothing but the reference.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return backend
    reasons = {}
    for name in REFUSALS if backend == "auto" else (backend,):
        if reason := REFUSALS[name](architecture, device_type, dtype_name):
            reasons[name] = reason
        else:
            return name
    if backend != "auto":
        raise BackendError(
            f"backend={backend!r} of {architecture.NAME} cannot be used: {reasons[backend]}. "
            "Use backend='auto' to take the best that can, backend='reference' for plain array code."
        )
    message = (
        f"{architecture.NAME} on {device_type} uses the reference implementation, which is slow "
        f"({'; '.join(f'{name}: {reason}' for name, reason in reasons.items())}). "
        "backend='reference' chooses it without this warning."
    )
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, BackendWarning, stacklevel=4)
    return "reference"


def implementation(
    backend: str, found_inf: torch.Tensor | None = None, kept: Kept | None = None, in_numpy: bool = False
) -> Operations:
    """The operations of a backend, as of now: the number of threads is PyTorch's.

    found_inf: on a GPU, see `CudaOperations`; the others do not read it.
    kept, in_numpy: of the CPU kernels, see `CpuOperations`.
    """
    if backend in device.KERNELS:
        return CudaOperations(found_inf, backend)
    if backend == "triton":
        return TritonOperations(found_inf)
    return (
        CpuOperations("openmp", torch.get_num_threads(), kept=kept, in_numpy=in_numpy)
        if backend == "cpu"
        else Reference()
    )


def _triton_refusal(architecture: Architecture, device_type: str, dtype_name: str) -> str | None:
    """As `backends.operations_refusal`, but PyTorch calls ROCm's devices "cuda" too."""
    if device_type not in TRITON_DEVICES:
        return f"it runs on {' and '.join(TRITON_DEVICES)}, these arrays are on {device_type}"
    if not architecture.has_kernels:
        return f"{architecture.NAME} is plain array code, with these hyperparameters at least"
    if reason := available():
        return reason
    if dtype_name not in FLOATS:
        return f"it takes {', '.join(FLOATS)}, not {dtype_name}"
    mlp = getattr(architecture, "mlp", None)
    return triton_operations.unsupported(mlp) if isinstance(mlp, ElementMlp) else None


REFUSALS: dict[str, Callable[[Architecture, str, str], str | None]] = {
    "cuda": partial(operations_refusal, "cuda"),
    "triton": _triton_refusal,
    "cpu": partial(operations_refusal, "cpu"),
}
"""What says why a backend cannot be used; the best first."""
