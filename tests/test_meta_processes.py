"""`lopt-fast meta-train` in two processes, one of which is killed; a single process resumes to the end.

The weights are those of a run in one process. Other ways to end: test_meta_devices.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

STEPS = 100
KILLED_AT = 20
CONFIG = f"""
[estimator]
name = "pes"
pairs = 4
[truncation]
steps = 2
min_steps = 4
max_steps = 20
[outer]
steps = {STEPS}
warmup = 3
[[task]]
kind = "mlp"
datasets = ["digits"]
image_size = 8
hidden = [4]
batch_size = 8
[evaluation]
every = 0
[checkpoint]
every = 1
"""


@contextlib.contextmanager
def meta_train(config: Path, out: Path, *options: str, processes: int = 1) -> Iterator[list[Any]]:
    """The processes of a run, which do not outlive the block."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", "from lopt_fast.cli import main; main()", "meta-train", str(config)]
    several = ["--coordinator", f"localhost:{port}", "--processes", str(processes)] if processes > 1 else []
    running = [
        subprocess.Popen(
            [*command, "--out", str(out), *options, *several, *(["--process-id", str(i)] if several else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for i in range(processes)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def end(process: Any) -> tuple[int, str]:
    """(exit status, output), the output on one line."""
    out, _ = process.communicate(timeout=300)
    return process.returncode, " ".join(out.split())


def state(out: Path) -> dict[str, np.ndarray]:
    """The numbers of the last checkpoint."""
    with np.load(out / "state.npz") as file:
        return {name: file[name] for name in file.files if file[name].dtype.kind in "biuf"}


def outer_step(out: Path) -> int:
    with contextlib.suppress(OSError, BadZipFile):
        return int(state(out)[".outer_step"])
    return 0


def wait_for_step(out: Path, step: int, processes: list[Any]) -> None:
    deadline = time.monotonic() + 300
    while outer_step(out) < step:
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes), [end(p) for p in processes]
        time.sleep(0.05)


def assert_same_end(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Within rounding, which `STEPS` outer steps have amplified; on one machine they are the same bits."""
    assert actual.keys() == expected.keys()
    assert actual[".outer_step"] == expected[".outer_step"] == STEPS
    for name in (".theta", ".average"):
        assert actual[name].size == expected[name].size > 0
        error = np.abs(actual[name] - expected[name]).max()
        assert error <= 1e-4 * np.abs(expected[name]).max(), name


def test_killed_and_resumed_run_ends_with_the_weights_of_one_process(tmp_path: Path) -> None:
    config, out, alone = tmp_path / "toy.toml", tmp_path / "run", tmp_path / "alone"
    config.write_text(CONFIG)
    with meta_train(config, out, "--devices", "1", processes=2) as pair:
        wait_for_step(out, KILLED_AT, pair)
        pair[1].kill()
        status, text = end(pair[0])
    assert status == 75, text
    assert "process 1 was lost" in text
    assert "Start again with --resume, with any number of processes" in text
    assert KILLED_AT <= outer_step(out) < STEPS
    for folder, options in ((out, ["--resume"]), (alone, [])):
        with meta_train(config, folder, "--devices", "2", *options) as (process,):
            status, text = end(process)
        assert status == 0, text
    assert_same_end(state(out), state(alone))
