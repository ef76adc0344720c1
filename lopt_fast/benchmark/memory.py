"""`lopt-fast bench memory`: what a step allocates beyond parameters, gradients and state.

A subprocess for each framework, contender and size resets the high-water mark of its resident set
(/proc/self/clear_refs), takes a step and reads it again. malloc is told to return every large block, so that one that
an earlier step left behind cannot hide this step's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import BenchmarkError, contenders
from .contenders import Config, Framework, Kind
from .workloads import Workload, parse

MEASURED_STEPS = 4
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/self/status has no {field}")


def peak_increase(step: Callable[[], object]) -> int:
    """Bytes by which the resident set exceeded its size before `step()`, at its highest. Linux alone: raises
    BenchmarkError elsewhere."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError) as error:
        raise BenchmarkError(f"peak memory is read from Linux's /proc and glibc: {error}") from error
    step()
    return max(0, _status("VmHWM") - before)


def probe(step: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    """Largest increase of a few steps, each after `prepare`; two before them may allocate state and thread pools."""
    for _ in range(2):
        prepare()
        step()
    increases = []
    for _ in range(MEASURED_STEPS):
        prepare()
        increases.append(peak_increase(step))
    return max(increases)


def in_subprocess(module: str, request: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What `python -m module` prints as its last line, JSON, when it is given `request`. Its malloc returns large
    blocks. Raises BenchmarkError with `what` if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(request)],
        env=os.environ | _MALLOC,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BenchmarkError(f"{what}: {last[0]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _probe_in_subprocess(framework: Framework, kind: Kind, config: Config, workload: Workload) -> int:
    request = {"framework": framework, "kind": kind, "config": asdict(config), "workload": workload.label}
    found = in_subprocess(__name__, request, f"memory of {framework}/{kind} at {workload.label}")
    return int(found["bytes"])


def _main(request: str) -> None:
    from .records import limit_threads

    asked = json.loads(request)
    config = Config(**asked["config"])
    limit_threads(config.threads)
    contender = contenders.builder(asked["framework"], asked["kind"], config)(
        *parse(asked["workload"]).values
    )
    print(json.dumps({"bytes": probe(lambda: contender.run(1), lambda: contender.prepare(1))}))


def run(
    workloads: Sequence[Workload],
    chosen: Sequence[tuple[Framework, Kind]],
    config: Config,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """For each contender the increase at each size, and the slope between the smallest and the largest in bytes per
    parameter: 0 where no temporary grows with the number of parameters."""
    if len({w.parameters for w in workloads}) < 2:
        raise BenchmarkError("memory is compared between sizes: give at least two different ones")
    ordered = sorted(workloads, key=lambda w: w.parameters)
    results = []
    for framework, kind in chosen:
        increases = []
        for workload in ordered:
            say(f"peak memory of {framework}/{kind} at {workload.label}")
            increases.append(_probe_in_subprocess(framework, kind, config, workload))
        slope = (increases[-1] - increases[0]) / (ordered[-1].parameters - ordered[0].parameters)
        results.append(
            {
                "name": f"{framework}/{kind}",
                "width": config.width,
                "statistics": config.statistics,
                "donate_gradients": config.donate_gradients,
                "increase_bytes": {w.label: n for w, n in zip(ordered, increases, strict=True)},
                "temporary_bytes_per_parameter": slope,
            }
        )
    return results


if __name__ == "__main__":
    _main(sys.argv[1])
