"""Steps over sharded parameters, in a process with four devices: CPUs, or GPUs that the emulator plays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lopt_fast import backends

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
_module, _reason = backends._import_native()


@pytest.mark.skipif(_module is None, reason=f"no compiled kernels: {_reason}")
@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="explicit sharding is partitioned from JAX 0.9 on")
@pytest.mark.parametrize("file", ["jax_on_four_devices.py", "jax_gpu_on_four_devices.py"])
def test_on_four_devices(root: Path, file: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    path = Path(__file__).with_name(file)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout
