"""The custom calls of the operations and every architecture in JAX on a GPU: tests/test_jax_gpu_operations.py on the
device."""

from __future__ import annotations

from pathlib import Path

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from lopt_fast.architectures.celo import Celo  # noqa: E402
from lopt_fast.jax import gpu_operations, operations  # noqa: E402
from tests import test_jax_gpu_operations as emulated  # noqa: E402
from tests.helpers import repeated  # noqa: E402
from tests.test_verify import IN_JAX, public_files  # noqa: E402

globals().update(repeated(emulated, but={"test_golden_files", "test_implementation"}))


@pytest.fixture(autouse=True)
def _here(jax_on_the_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_operations.registration_failure() is None
    monkeypatch.setattr(emulated, "PLATFORM", "cuda")


@pytest.mark.parametrize("path", public_files(*(name for name in IN_JAX if "adafac" not in name)))
def test_golden_files(path: Path) -> None:
    emulated.check_golden(path)


def test_they_are_chosen() -> None:
    assert isinstance(operations.implementation(Celo(), "cuda"), gpu_operations.GpuCalls)
    chosen = operations.implementation(Celo(), "auto")
    assert isinstance(chosen, gpu_operations.ByPlatform)
    assert "cuda" in chosen.kernels


def test_a_device_that_is_not_the_first() -> None:
    if len(jax.devices()) < 2:
        pytest.skip("one GPU only: this needs two")
    with jax.default_device(jax.devices()[1]):
        emulated.test_architectures_follow_their_definitions("celo")
