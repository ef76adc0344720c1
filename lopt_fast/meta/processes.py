"""Several processes in one run: how they meet, and how all of them end when one is lost.

All processes compute every outer step together, so none can go on without the others. What the runtime does when one is
gone depends on how it noticed: an exception from a broken connection, an abort of the process when heartbeats stay out
or the coordinator (process 0) is gone, and at exit a wait for those that are gone. `guard` and `join` turn all that
into a message and an exit status. docs/meta-training-hosts.md says what the user sees.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # for the key-value store, which has no public name

from ..errors import UserError

LOST_STATUS = os.EX_TEMPFAIL
"""Exit status (75) of a process that ends because another one was lost: the same command with --resume continues."""

_REPORT_SECONDS = 2.0
"""How long process 0 waits for the others' reports after a loss or an error."""
_LOSS = ("Gloo", "NCCL", "coordination service", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
"""What the runtime's errors say when a collective failed."""
_ENDS = "lopt_fast/ends/"
"""Where each process that ends before its time leaves the reason, in the key-value store of process 0."""


class LostProcess(UserError, RuntimeError):
    """Another process of the run is gone, so that this one cannot continue."""


class DeviceError(UserError, ValueError):
    """Devices or processes that cannot run together as asked; names the option and the remedy."""


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Around everything that communicates: raises `LostProcess` where the runtime fails since another process is gone.

    After any exception this process ends without the runtime's own shutdown, which would wait for processes that
    are gone, or that wait for this one. Does nothing in a run of one process. Enter it right after `devices.setup`.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, ValueError | RuntimeError) and any(word in str(error) for word in _LOSS):
            _leave_at_exit(LOST_STATUS)
            raise LostProcess(_loss_message(_who_is_lost(), str(error).splitlines()[0])) from error
        _leave_at_exit(1)
        if _report_end(f"ended with {type(error).__name__}: {error}") and jax.process_index() == 0:
            _let_others_end()
        raise


def check_arguments(coordinator: str | None, processes: int, process_id: int) -> None:
    """Raise DeviceError, naming the option, for arguments that make no sense and for a port in use."""
    if coordinator == "auto":
        return
    if coordinator is None and processes != 1:
        raise DeviceError(f"{processes} processes need --coordinator HOST:PORT, the address of process 0")
    if not 0 <= process_id < processes:
        raise DeviceError(
            f"--process-id is {process_id}: with --processes {processes} it goes from 0 to {processes - 1}"
        )
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise DeviceError(
                f"--coordinator is {coordinator!r}: it must be HOST:PORT, the address of process 0"
            )
        if process_id == 0:
            _check_port_is_free(int(port))


def join(
    coordinator: str, processes: int, process_id: int, start_timeout: int, heartbeat_timeout: int
) -> None:
    """Meet the other processes: `jax.distributed.initialize` with clear ends. Arguments as in `devices.setup`."""
    arguments: dict[str, Any] = {}
    if coordinator != "auto":
        if process_id != 0:
            _wait_for(coordinator, start_timeout)
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    # JAX's own handler of SIGTERM would replace that of the run.
    jax.config.update("jax_enable_preemption_service", False)
    message = (
        f"the processes of the run did not find each other within {start_timeout} s. Start them all, with the same "
        "--coordinator and --processes, each with its own --process-id"
    )
    _end_on_abort(lambda: (1, message))
    # The runtime's own time limit ends in an abort, or is not kept.
    late = threading.Timer(start_timeout, _leave, (1, message))
    late.start()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=2 * start_timeout, heartbeat_timeout_seconds=heartbeat_timeout
        )
    except ValueError as error:
        raise DeviceError(
            f"--coordinator {coordinator}: JAX could not start the processes: {error}"
        ) from error
    finally:
        late.cancel()
    _end_on_abort(lambda: (LOST_STATUS, _loss_message(_who_is_silent(), "the lines above say more")))


def _check_port_is_free(port: int) -> None:
    # With a port in use the runtime crashes, or shares it with the other program.
    dual = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        ).close()
    except OSError as error:
        raise DeviceError(
            f"process 0 cannot listen at port {port} ({os.strerror(error.errno or 0)}): choose another port for "
            "--coordinator, and let no two processes be --process-id 0"
        ) from error


def _connect_to(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()


def _wait_for(coordinator: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _connect_to(coordinator)
        except OSError as error:
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"process 0 did not answer at {coordinator} within {seconds:g} s ({error}): start it with the "
                    "same --coordinator, and see that this host may connect to that port"
                ) from error
        time.sleep(0.2)


_abort_handler: Any = None
"""Kept alive as long as the C library may call it."""


def _end_on_abort(end: Callable[[], tuple[int, str]]) -> None:
    """Let an abort of the runtime end with the exit status and message of `end()`.

    When heartbeats stay out, or the coordinator is gone, a thread of the runtime aborts the process. There is no
    exception and Python's own signal handlers do not run, so the handler is the C library's.
    """
    global _abort_handler

    def on_abort(_: int) -> None:
        _leave(*end())

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    c_library = ctypes.CDLL(None)
    c_library.signal.argtypes, c_library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    c_library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    _abort_handler = handler


def _leave(status: int, message: str | None = None) -> NoReturn:
    """End this process at once, without waiting for any other."""
    with contextlib.suppress(Exception):
        if message is not None:
            print(f"\nlopt-fast: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _leave_at_exit(status: int) -> None:
    # Functions registered last run first: before JAX's, which waits.
    atexit.register(_leave, status)


def _loss_message(who: str, why: str) -> str:
    return (
        f"{who} ({why}). Start again with --resume, with any number of processes: the run continues from its last "
        "checkpoint."
    )


def _report_end(reason: str) -> bool:
    """Leave the reason why this process ends. Whether process 0 could be told."""
    try:
        distributed.global_state.client.key_value_set(f"{_ENDS}{jax.process_index()}", reason)
    except Exception:  # whatever the runtime makes of a lost connection: there is nobody to tell
        return False
    return True


def _let_others_end() -> None:
    """Wait a little for the others to end by themselves, as all do that found the same error.

    They lose their runtime with process 0, and would then report a loss in place of the error.
    """
    deadline = time.monotonic() + _REPORT_SECONDS
    while time.monotonic() < deadline and len(_ends()) < jax.process_count():
        time.sleep(0.05)


def _ends() -> dict[str, str]:
    """The reasons that processes have left, by their keys."""
    try:
        return dict(distributed.global_state.client.key_value_dir_get(_ENDS))
    except Exception:  # whatever the runtime makes of a lost connection
        return {}


def _who_is_lost() -> str:
    """Says which processes are gone. One loss breaks the collectives of all, and all but the lost report their end."""
    if not _report_end(""):
        return "process 0, the coordinator, was lost"
    if jax.process_index() != 0:
        return "another process was lost, process 0 says which"
    time.sleep(_REPORT_SECONDS)
    ends = _ends()
    if not ends:  # not even its own
        return "another process was lost"
    reasons = {i: ends.get(f"{_ENDS}{i}", "was lost") for i in range(jax.process_count())}
    gone = [f"process {i} {reason}" for i, reason in reasons.items() if reason]
    return ", ".join(gone) or "a connection was lost"


def _who_is_silent() -> str:
    """Says who is gone when the runtime has noticed by itself: the coordinator, or one that the coordinator names."""
    if distributed.global_state.process_id != 0:
        try:
            _connect_to(distributed.global_state.coordinator_address)
        except OSError:
            return "process 0, the coordinator, was lost"
    return "JAX ended this process, most likely because another one was lost"
