"""The Triton kernels of the operations on a GPU against their definitions: tests/triton_operations_interpreter.py on
the device. Most of the time is Triton's, which compiles for each specification and kind of shape."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from tests import triton_operations_interpreter as interpreted
from tests.helpers import repeated

# Whole optimizers: test_architectures_gpu.py.
ELSEWHERE = {"test_learned_optimizer", "test_state_moves_between_devices"}

pytestmark = [
    pytest.mark.usefixtures("on_the_device"),
    pytest.mark.parametrize("backend", ["triton"], indirect=True),
]
globals().update(repeated(interpreted, but=ELSEWHERE))
