"""Which implementation of the operations of an `Architecture` runs where in PyTorch."""

from __future__ import annotations

import warnings

import torch

from ..architectures import Architecture
from ..backends import BACKENDS, BackendError, BackendWarning, native
from ..native import DTYPES
from ..native_operations import CpuOperations, unsupported
from ..operations import ElementMlp, Operations, Reference

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
    if backend in ("auto", "cpu"):
        reason = _cpu_refusal(architecture, device_type, dtype_name)
    else:
        reason = "it has no kernels for the operations of this architecture so far"
    if reason is None:
        return "cpu"
    if backend != "auto":
        raise BackendError(
            f"backend={backend!r} of {architecture.NAME} cannot be used: {reason}. "
            "Use backend='auto' to take the best that can, backend='reference' for plain array code."
        )
    message = (
        f"{architecture.NAME} on {device_type} uses the reference implementation, which is slow (cpu: {reason}). "
        "backend='reference' chooses it without this warning."
    )
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, BackendWarning, stacklevel=4)
    return "reference"


def implementation(backend: str) -> Operations:
    """The operations of a backend, as of now: the number of threads is PyTorch's."""
    return CpuOperations("openmp", torch.get_num_threads()) if backend == "cpu" else Reference()


def _cpu_refusal(architecture: Architecture, device_type: str, dtype_name: str) -> str | None:
    """None if the CPU kernels can compute the operations of `architecture`, else the reason why not."""
    if device_type != "cpu":
        return f"it runs on cpu, these arrays are on {device_type}"
    try:
        core = native()
    except BackendError as error:
        return str(error)
    if not hasattr(core, "element_mlp"):
        return "the compiled core lopt_fast._native is older than these kernels: reinstall lopt_fast"
    if dtype_name not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, not {dtype_name}"
    mlp = getattr(architecture, "mlp", None)
    return unsupported(mlp) if isinstance(mlp, ElementMlp) else None
