"""The CUDA kernels of the operations on a GPU against their definitions: tests/test_gpu_operations.py on the device."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from tests import test_gpu_operations as emulated
from tests.helpers import repeated

pytestmark = [
    pytest.mark.usefixtures("on_the_device"),
    pytest.mark.parametrize("backend", ["cuda"], indirect=True),
]
globals().update(repeated(emulated))
