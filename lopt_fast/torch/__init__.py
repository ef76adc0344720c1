"""Learned optimizers for PyTorch, used like those of `torch.optim`.

from lopt_fast.torch import LearnedOptimizer

optimizer = LearnedOptimizer(model.parameters())
"""

from ..backends import _import_native
from ..errors import install as _install

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    raise ImportError(f"lopt_fast.torch needs PyTorch ({_error}): {_install('torch')}") from _error

from .optimizer import LearnedOptimizer

_import_native()  # now, not at the first step: it must know of forks from here on (csrc/pool.cc)

__all__ = ["LearnedOptimizer"]
