"""What needs a GPU. Every test here skips where there is none, or something to use it with is missing, and says what;
`make gpu` refuses to run without one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from lopt_fast import backends

# JAX would take three quarters of the memory when it starts, and PyTorch's tests run in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _skip_without(backend: str) -> None:
    """Skips unless these kernels can run, with the reason."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("triton: it runs in its interpreter here; unset TRITON_INTERPRET")
    if reason := {row.backend: row.reason for row in backends.table()}[backend]:
        pytest.skip(f"{backend}: {reason}")


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each kind of kernels, in PyTorch."""
    torch = pytest.importorskip("torch")
    _skip_without(request.param)
    if not torch.cuda.is_available():
        pytest.skip(
            f"PyTorch {torch.__version__} finds no GPU: install the build for yours, see https://pytorch.org/get-started"
        )
    return str(request.param)


@pytest.fixture
def on_the_device(backend: str) -> Iterator[None]:
    """The tests that tests/operations_on_devices.py describes run there."""
    from tests.operations_on_devices import Target

    with Target(backend).in_use():
        yield


@pytest.fixture
def jax_on_the_device() -> None:
    """JAX finds the GPU, and CUDA kernels for it."""
    jax: Any = pytest.importorskip("jax")
    _skip_without("cuda")
    if (found := jax.default_backend()) != "gpu":
        pytest.skip(
            f"JAX {jax.__version__} finds no GPU, its default backend is {found}: pip install 'jax[cuda13]' "
            "('jax[cuda12]' for a driver older than 580); JAX_PLATFORMS must not be set to cpu"
        )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was not tested, each reason once: the list of tests behind `-ra` is long."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("not tested here")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count} tests: {reason}")
