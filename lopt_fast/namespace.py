"""Which library's functions an array is computed with."""

from __future__ import annotations

from typing import Any

import array_api_compat

_known: dict[type, Any] = {}


def array_namespace(a: Any) -> Any:
    """`array_api_compat.array_namespace` of one array, remembered by its type: where arrays are small, and the caches
    cold after a pass over all parameters, asking each time is a tenth of what the tensor level costs."""
    kind = type(a)
    if kind not in _known:
        _known[kind] = array_api_compat.array_namespace(a)
    return _known[kind]
