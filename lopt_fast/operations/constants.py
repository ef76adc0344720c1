"""Numbers as arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from array_api_compat import device, is_torch_array

from ..namespace import array_namespace
from ..reference import Array


def constant(values: Any, like: Array) -> Array:
    """Numbers, or an array, as an array of the library, type and device of `like`; not to be written to.

    Those of PyTorch are made once and kept: to copy numbers to a device, the host waits for all that it has to do.
    """
    if not isinstance(values, (bool, int, float, list, tuple, np.ndarray, np.generic)):
        return array_namespace(like).asarray(values, dtype=like.dtype, device=device(like))
    if isinstance(like, (np.ndarray, np.generic)):
        return np.asarray(values, like.dtype)
    numbers = np.asarray(values)
    if is_torch_array(like):
        return _kept(tuple(numbers.reshape(-1).tolist()), numbers.shape, like.dtype, like.device)
    return array_namespace(like).asarray(numbers.tolist(), dtype=like.dtype, device=device(like))


def new(values: Any, like: Array) -> Array:
    """The same, but an array of its own: for state, which is written to."""
    return constant(values, like) + 0.0


@lru_cache(maxsize=4096)
def _kept(numbers: tuple[float, ...], shape: tuple[int, ...], dtype: Any, where: Any) -> Array:
    import torch

    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=where).reshape(shape)
