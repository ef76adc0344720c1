"""Fast learned optimizers for PyTorch (`lopt_fast.torch`) and JAX (`lopt_fast.jax`).

Importing this package imports neither framework, and does not fail where the compiled core is missing: the first
use of it explains. `lopt-fast info` lists what works on this machine.
"""

from __future__ import annotations

from .backends import BackendError
from .checkpoint import Checkpoint, CheckpointError, load, names
from .spec import Spec, SpecError

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Checkpoint",
    "CheckpointError",
    "Spec",
    "SpecError",
    "__version__",
    "load",
    "names",
]
