from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from lopt_fast import backends

ROOT = Path(__file__).resolve().parent.parent

# Most of the time of JAX's tests is compilation, which takes a fifth with these flags. What is computed is the same
# program; `XLA_FLAGS= make test` has it compiled as for users. Not where there is a GPU, for which it matters, nor with
# a jaxlib that may not know a flag, which would end the process.
if not backends._has_gpu_driver() and find_spec("jaxlib") and version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 "
        "--xla_cpu_parallel_codegen_split_count=1",
    )
# Two workers on two cores, each with two threads: those of OpenMP that wait leave the cores to others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


LONGEST = (
    "test_gpu_resources.py", "test_jax_sharded.py", "test_meta_processes.py", "test_torch_sharded.py",
    "test_triton.py", "test_triton_operations.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest single tests first: no worker is to wait for one at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def default_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that the test starts compile as they do for users."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden vectors and data: $LOPT_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("LOPT_SHARED") or ROOT.parent / "shared")
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden vectors: {folder / 'golden'} is not a folder (set LOPT_SHARED)")
    return folder
