"""Records of results: where, with what and when they were measured; JSON, written atomically."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import backends
from ..files import write_atomically
from . import BenchmarkError

SCHEMA = 1
BENCHMARKS = (
    "update", "passes", "width", "memory", "peers", "gpu", "estimators", "meta", "architectures", "scaling",
    "tradeoff",
)  # fmt: skip
_PACKAGES = ("lopt_fast", "torch", "triton", "jax", "jaxlib", "optax", "numpy")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def available_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(threads: int) -> None:
    """Keep this process on `threads` processors. To be called before a framework is imported: XLA takes the size of
    its thread pool from there. Raises BenchmarkError where there are fewer."""
    available = available_threads()
    if not 1 <= threads <= available:
        raise BenchmarkError(f"--threads {threads}: this process may use 1 to {available} processors")
    if threads < available:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def cache_bytes() -> int:
    """Size of the largest cache of the first processor; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = _UNITS.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes)


def memory_available() -> int:
    """Bytes that can be allocated without swapping; a large number where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**62


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instruction_set() -> str | None:
    """What the CPU kernels use; None where they are not built."""
    try:
        return str(backends.native().instruction_set())
    except backends.BackendError:
        return None


def machine(threads: int) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": instruction_set(),
        "cache_bytes": cache_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Commit of the source tree that the package is imported from, `-dirty` with changes; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-dirty" if git("status", "--porcelain", "--", "lopt_fast", "kernels", "csrc") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command as it can be typed again: without the path of the program."""
    program, *rest = sys.argv if arguments is None else arguments
    return shlex.join([Path(program).name, *rest])


def record(
    benchmark: str,
    results: Sequence[Mapping[str, Any]],
    *,
    threads: int,
    options: Mapping[str, Any],
    load_average: float | None = None,
    device: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One record: what `--json` writes and `report` reads. `load_average` is that before the run; `device` describes
    the GPU where there is one."""
    where = machine(threads)
    if load_average is not None:
        where["load_average"] = round(load_average, 2)
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command_line(),
        "machine": where,
        **({} if device is None else {"device": dict(device)}),
        "versions": versions(),
        "options": dict(options),
        "results": [dict(r) for r in results],
    }


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON to a temporary file beside `path` and rename it: never half a file, and NaN is refused."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def read(path: Path) -> dict[str, Any]:
    """Raises BenchmarkError for what is not a record of this version."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BenchmarkError(f"{path}: {error}") from error
    if (
        not isinstance(value, dict)
        or value.get("schema") != SCHEMA
        or value.get("benchmark") not in BENCHMARKS
    ):
        raise BenchmarkError(f"{path}: not a benchmark record of schema {SCHEMA}; write it again with --json")
    return value
