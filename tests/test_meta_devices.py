"""Devices and processes of meta-training: placing, gathering, and what happens when a process is lost.

The processes of the tests run this file as a program: see `main` at its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from lopt_fast.meta import devices  # noqa: E402

STEPS = 200
"""Of the program, about 0.02 s each."""


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def launch(processes: int, *extra: str, only: Sequence[int] | None = None) -> Iterator[list[Any]]:
    """The processes of a run of `main`, or those numbered in `only`. None outlives the block."""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, __file__, f"localhost:{port}", str(processes), str(i), *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for i in (range(processes) if only is None else only)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def until_running(process: Any) -> None:
    assert "step 0\n" in iter(process.stdout.readline, ""), process.communicate()[1]


def end(process: Any) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)"""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_processes_that_differ_are_refused() -> None:
    with launch(2, "--same", "0") as pair:
        results = [end(process) for process in pair]
    for status, _, err in results:
        assert status == 1
        assert "DeviceError: the configuration of process 1 and of process 0 differ" in err


def test_one_process_places_and_gathers() -> None:
    mesh = devices.mesh()
    assert mesh.axis_names == (devices.PAIRS,)
    assert mesh.size == jax.device_count()
    tree = {"a": np.arange(2 * mesh.size, dtype=np.float32), "b": [np.ones((mesh.size, 3), np.int32)]}
    for placed in (devices.replicate(mesh, tree), devices.shard(mesh, tree)):
        back = devices.gather(placed)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert type(x) is np.ndarray
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)
    assert devices.gather({"number": 3.5, "list": [True]}) == {"number": 3.5, "list": [True]}
    assert devices.is_first()
    assert devices.any_process(True)
    assert not devices.any_process(False)
    devices.check_same("the configuration", "a")


def test_one_process_keeps_its_exceptions() -> None:
    with pytest.raises(ValueError, match="UNAVAILABLE"), devices.guard():
        raise ValueError("UNAVAILABLE")
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "at least one"),
        ({"processes": 2}, "2 processes need --coordinator"),
        ({"coordinator": "localhost:1234", "processes": 2, "process_id": 2}, "goes from 0 to 1"),
        ({"coordinator": "localhost:1234", "processes": 2, "process_id": -1}, "goes from 0 to 1"),
        ({"coordinator": "localhost", "processes": 2}, "must be HOST:PORT"),
        ({"coordinator": "localhost:99999", "processes": 2}, "must be HOST:PORT"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(devices.DeviceError, match=message):
        devices.setup(**arguments)
    assert not jax.distributed.is_initialized()


def test_port_in_use() -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(devices.DeviceError, match=f"cannot listen at port {port} .*choose another port"):
            devices.setup(None, f"localhost:{port}", 2, 0)


def test_flags_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=5 --xla_dump_to=x")
    with pytest.raises(RuntimeError, match="before"):
        devices.setup(jax.device_count() + 1)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_cpu_collective_call_terminate_timeout_seconds=5", "--xla_dump_to=x"]
    assert [flag.partition("=")[0] for flag in flags[2:]] == [
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds"
    ]


def test_setup_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(RuntimeError, match="must be called before anything is computed"):
        devices.setup(jax.device_count() + 1)


def test_uneven_population_names_the_remedy() -> None:
    mesh = devices.mesh()
    with pytest.raises(devices.DeviceError, match=r"\(\) cannot be cut .* --devices"):
        devices.shard(mesh, np.float32(1))


def test_two_processes_compute_the_bits_of_one() -> None:
    with launch(2, "--devices", "1", "--steps", "5") as pair:
        results = [end(process) for process in pair]
    with launch(1, "--devices", "2", "--steps", "5") as single:
        results += [end(process) for process in single]
    for status, _, err in results:
        assert status == 0, err
    first, second, alone = (json.loads(out.splitlines()[-1]) for _, out, _ in results)
    assert first.pop("is_first")
    assert not second.pop("is_first")
    assert alone.pop("is_first")
    assert first == second == alone
    assert np.isfinite(first["sum"])


def test_stop_in_one_process_stops_all_at_the_same_step() -> None:
    with launch(2) as (first, second):
        until_running(first)
        until_running(second)
        second.send_signal(signal.SIGTERM)
        results = [end(first), end(second)]
    steps = {out.splitlines()[-2] for _, out, _ in results}
    assert [status for status, _, _ in results] == [0, 0], results
    assert len(steps) == 1
    assert steps.pop().startswith("stopped at ")


def test_killed_process_ends_the_other_with_a_message() -> None:
    with launch(2) as (first, second):
        until_running(first)
        second.kill()
        began = time.monotonic()
        status, _, err = end(first)
    assert status == devices.LOST_STATUS, err
    assert "LostProcess: process 1 was lost" in err
    assert "Start again with --resume" in err
    assert time.monotonic() - began <= 20


def test_killed_coordinator_ends_the_other_with_a_message() -> None:
    with launch(2) as (first, second):
        until_running(first)
        until_running(second)
        first.kill()
        status, _, err = end(second)
    assert status == devices.LOST_STATUS, err
    assert "process 0, the coordinator, was lost" in err
    assert "Start again with --resume" in err


def test_silent_process_ends_the_other_with_a_message() -> None:
    with launch(2, "--heartbeat-timeout", "5") as (first, second):
        until_running(first)
        until_running(second)
        second.send_signal(signal.SIGSTOP)
        status, _, err = end(first)
    assert status == devices.LOST_STATUS, err
    assert "because another one was lost" in err
    assert "Start again with --resume" in err


def test_error_of_one_process_is_told_to_the_other() -> None:
    with launch(2, "--fail-in", "1") as (first, second):
        results = [end(first), end(second)]
    (first_status, _, first_err), (second_status, _, second_err) = results
    assert second_status == 1
    assert "OSError: disk is full" in second_err
    assert first_status == devices.LOST_STATUS, first_err
    assert "process 1 ended with OSError: disk is full" in first_err


@pytest.mark.parametrize(
    ("present", "message"),
    [(0, "did not find each other within 2 s. Start them all"), (1, "process 0 did not answer at localhost")],
)
def test_process_that_never_comes(present: int, message: str) -> None:
    with launch(2, "--start-timeout", "2", only=[present]) as (process,):
        status, _, err = end(process)
    assert status == 1
    assert message in err


def main() -> None:
    """A run of `STEPS` sums over the pairs; prints what it computed as JSON."""
    import argparse

    from jax.sharding import PartitionSpec

    parser = argparse.ArgumentParser()
    parser.add_argument("coordinator")
    parser.add_argument("processes", type=int)
    parser.add_argument("process_id", type=int)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--fail-in", type=int, default=-1)
    parser.add_argument("--same", type=int, default=1)
    parser.add_argument("--start-timeout", type=int, default=30)
    parser.add_argument("--heartbeat-timeout", type=int, default=20)
    options = parser.parse_args()
    coordinator = options.coordinator if options.processes > 1 else None
    devices.setup(
        options.devices,
        coordinator,
        options.processes,
        options.process_id,
        start_timeout=options.start_timeout,
        heartbeat_timeout=options.heartbeat_timeout,
    )
    assert jax.distributed.is_initialized() == (options.processes > 1)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    with devices.guard():
        devices.check_same("the configuration", "a" if options.same else str(options.process_id))
        mesh = devices.mesh()
        key = devices.replicate(mesh, jax.random.key_data(jax.random.key(3)))
        numbers = devices.shard(mesh, np.arange(4 * mesh.size))
        x = devices.shard(mesh, np.linspace(0, 1, 4 * mesh.size, dtype=np.float32))
        each, whole = PartitionSpec(devices.PAIRS), PartitionSpec()

        @jax.jit
        @partial(jax.shard_map, mesh=mesh, in_specs=(whole, each, each), out_specs=(each, whole))
        def step(key: Any, numbers: Any, x: Any) -> tuple[Any, Any]:
            draw = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(jax.random.wrap_key_data(key), i)))
            x = 0.9 * x + draw(numbers)
            return x, jax.lax.psum(x.sum(), devices.PAIRS)

        for i in range(options.steps):
            x, total = step(key, numbers, x)
            jax.block_until_ready(total)
            if i == 0:
                print("step 0", flush=True)
            if options.process_id == options.fail_in:
                raise OSError("disk is full")
            if devices.any_process(bool(stop)):
                print(f"stopped at {i}")
                break
            time.sleep(0.02)
        result = devices.gather({"x": x, "sum": total})
        record = {"x": result["x"].tolist(), "sum": float(result["sum"]), "is_first": devices.is_first()}
        print(json.dumps(record))


if __name__ == "__main__":
    main()
