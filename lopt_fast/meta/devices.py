"""Devices and processes of a meta-training run: one mesh axis, over which the antithetic pairs are sharded.

A run is one process with all its devices, or several processes (on one host or many) that run the same program and
meet through `jax.distributed` (processes.py). `setup` comes first, then `mesh`; `guard` surrounds everything that
communicates.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import __version__
from .processes import LOST_STATUS, DeviceError, LostProcess, check_arguments, guard, join

__all__ = [
    "LOST_STATUS", "PAIRS", "DeviceError", "LostProcess", "any_process", "check_same", "gather", "guard", "is_first",
    "mesh", "replicate", "setup", "shard", "usable_cores",
]  # fmt: skip

PAIRS = "pairs"
"""Name of the mesh axis."""
Pytree: TypeAlias = Any

_devices: int | None = None
"""How many of this process `setup` asked for; None for all."""


def usable_cores() -> int:
    """Cores that this process may run on, which taskset, Slurm or a container may have limited."""
    return len(os.sched_getaffinity(0))


def setup(
    devices: int | None = None,
    coordinator: str | None = None,
    processes: int = 1,
    process_id: int = 0,
    *,
    start_timeout: int = 300,
    heartbeat_timeout: int = 30,
) -> None:
    """Set the number of devices and join the other processes. To be called once, before anything is computed in JAX.

    devices: how many of this process to use: by default all GPUs, or one CPU device for each usable core.
    coordinator: HOST:PORT at which process 0 can be reached by all; "auto" where JAX detects the processes by itself
    (Slurm, Open MPI, Kubernetes). Needed with several processes alone; process_id counts from 0.
    start_timeout: seconds to wait for the others. heartbeat_timeout: seconds after which a silent process is lost.

    Raises DeviceError for arguments that make no sense, a port in use or a coordinator that is not there, RuntimeError
    if JAX has begun to compute. If not all processes arrive, this process ends with a message and status 1.
    """
    global _devices
    if devices is not None and devices < 1:
        raise DeviceError(f"the number of devices is {devices}: at least one is needed")
    check_arguments(coordinator, processes, process_id)
    _be_patient()
    try:
        jax.config.update("jax_num_cpu_devices", usable_cores() if devices is None else devices)
    except RuntimeError as error:
        raise RuntimeError("devices.setup must be called before anything is computed in JAX") from error
    _devices = devices
    if devices is not None and coordinator != "auto":  # which has JAX choose the GPUs, too
        for option in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(option, ",".join(map(str, range(devices))))
    if coordinator is not None:
        join(coordinator, processes, process_id, start_timeout, heartbeat_timeout)
        # Connections are made at the first collective over the devices, where the runtime waits 30 s at most. Let that
        # be here, where all processes are, and not where one compiles or reads for longer than another.
        with guard():
            check_same("the version of lopt_fast or JAX", f"{__version__} {jax.__version__}")


def mesh() -> Mesh:
    """All devices of all processes, those of a process side by side, along the axis `PAIRS`."""
    count = len(jax.local_devices())
    if _devices not in (None, count):
        raise DeviceError(f"{_devices} devices asked for, but process {jax.process_index()} has {count}")
    return Mesh(np.array(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))), (PAIRS,))


def is_first() -> bool:
    """Whether this is the process that writes files and reports."""
    return jax.process_index() == 0


def replicate(mesh: Mesh, tree: Pytree) -> Pytree:
    """`tree` on every device. Leaves are host values, the same in all processes."""
    return _place(tree, NamedSharding(mesh, PartitionSpec()))


def shard(mesh: Mesh, tree: Pytree) -> Pytree:
    """`tree` cut along the leading axis of each leaf, a slice on each device. Host values, the same in all processes.

    Raises DeviceError if a leading axis cannot be cut into equal slices.
    """
    for leaf in jax.tree.leaves(tree):
        if np.ndim(leaf) == 0 or len(leaf) % mesh.size != 0:
            shape = np.shape(leaf)
            raise DeviceError(
                f"an array of shape {shape} cannot be cut into {mesh.size} equal slices along its first axis: "
                "the number of devices of all processes must divide the number of pairs (see --devices)"
            )
    return _place(tree, NamedSharding(mesh, PartitionSpec(PAIRS)))


def gather(tree: Pytree) -> Pytree:
    """NumPy arrays of the whole of `tree`, in every process. All processes must call this together."""
    return jax.tree.map(_gather_leaf, tree)


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process. All processes must call this together; they get the same answer."""
    return flag if jax.process_count() == 1 else bool(_of_all_processes(np.array(flag)).any())


def check_same(what: str, value: str) -> None:
    """Raise DeviceError, naming `what`, unless all processes give the same value. All must call this together."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = _of_all_processes(digest)
    differ = (digests != digests[0]).any(axis=1).nonzero()[0]
    if differ.size:
        raise DeviceError(
            f"{what} of process {differ[0]} and of process 0 differ: all processes of a run need the same"
        )


def _be_patient() -> None:
    """Devices of a CPU may wait for each other as long as they need; the runtime would abort after a minute."""
    flags = os.environ.get("XLA_FLAGS", "")
    for name, seconds in (("warn_stuck_timeout_seconds", 600), ("terminate_timeout_seconds", 86_400)):
        if name not in flags:
            flags += f" --xla_cpu_collective_call_{name}={seconds}"
    os.environ["XLA_FLAGS"] = flags.strip()


def _place(tree: Pytree, sharding: NamedSharding) -> Pytree:
    def place(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def _of_all_processes(value: np.ndarray) -> np.ndarray:
    """(processes, *shape), the values that the processes gave."""
    used = mesh()
    rows = jax.make_array_from_callback(
        (used.size, *value.shape), NamedSharding(used, PartitionSpec(PAIRS)), lambda _: value[None]
    )
    _, first = np.unique([d.process_index for d in used.devices], return_index=True)
    return gather(rows)[first]


def _gather_leaf(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
