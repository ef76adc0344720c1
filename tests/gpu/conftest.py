"""What needs a GPU. Every test here skips, with the reason, where there is none; `make gpu` refuses to run then."""

from __future__ import annotations

import os

# JAX would take three quarters of the memory when it starts, and PyTorch's tests run in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
