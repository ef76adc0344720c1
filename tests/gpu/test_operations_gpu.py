"""The CUDA kernels of the operations on a GPU against their definitions: tests/test_gpu_operations.py on the device.
Skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from lopt_fast import backends

reason = backends._cuda_missing(0)
if reason:
    pytest.skip(f"CUDA: {reason}", allow_module_level=True)

from tests import test_gpu_operations as emulated  # noqa: E402

EMULATED_ALONE = {"test_learned_optimizer", "test_the_choice"}
for _name, _test in vars(emulated).items():
    if _name.startswith("test_") and callable(_test) and _name not in EMULATED_ALONE:
        globals()[_name] = _test


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "DEVICE", "cuda")
    monkeypatch.setattr(emulated, "BACKEND", "cuda")
