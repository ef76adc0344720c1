"""`lopt-fast bench gpu`: everything that is measured on a GPU, in one run of a few minutes, as one table.

Each section runs in a process of its own with a share of the time: what is over time, does not fit the memory or
fails (a kernel that faults takes its process along) is a note in the record, and the others go on. A rehearsal runs
the same code on tiny tensors on the processor, with the emulator in the place of the GPU: its times mean nothing.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..spec import Statistics
from . import BenchmarkError

Say = Callable[[str], None]

SHARES: dict[str, float] = {
    "update": 0.18, "passes": 0.07, "widths": 0.13, "framework": 0.05, "peers": 0.06, "jax": 0.07, "training": 0.14,
    "pes": 0.15, "compiled": 0.15,
}  # fmt: skip
"""Name: share of the time. What a section leaves goes to those behind it."""

SECONDS = 330.0
"""Of the whole run, by default."""

START_SECONDS = 10.0
"""A process that imports PyTorch or JAX and finds the GPU."""


def _in_process(name: str, rehearse: bool, seconds: float, say: Say) -> list[dict[str, Any]]:
    """What a section emits, run in a process of its own, which ends after about `seconds`."""
    request = json.dumps({"section": name, "rehearse": rehearse, "seconds": seconds})
    limit = START_SECONDS + 1.5 * seconds + 10.0
    with tempfile.TemporaryFile("w+") as out:
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, request],
                stdout=out,
                timeout=limit,
                env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
                check=False,
            )
            problem = f"its process ended with status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
        out.seek(0)
        emitted = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
    if problem:
        say(f"{name}: {problem}")
        emitted.append({"skipped": {"section": name, "what": "what is missing of it", "reason": problem}})
    return emitted


def run(
    *,
    rehearse: bool = False,
    sections: Sequence[str] = tuple(SHARES),
    seconds: float = SECONDS,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """The results of the sections: {"rows": [...], "skipped": [...], "findings": [...], "seconds": {section: s}}.

    Raises BenchmarkError without a GPU (unless it is a rehearsal), and for an unknown section.
    """
    from .gpu_contenders import find_place

    if unknown := sorted(set(sections) - SHARES.keys()):
        raise BenchmarkError(f"--sections {', '.join(unknown)}: choose from {', '.join(SHARES)}")
    find_place(rehearse)
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    took: dict[str, float] = {}
    whole = sum(SHARES[name] for name in sections)
    planned = 0.0
    for name in sections:
        planned += seconds * SHARES[name] / whole
        begin = time.monotonic()
        left = start + planned - begin
        if left < START_SECONDS and not rehearse:
            skipped.append({"section": name, "what": "all", "reason": "out of time"})
            continue
        for item in _in_process(name, rehearse, max(1.0, left - START_SECONDS), say):
            if "row" in item:
                rows.append(item["row"])
            else:
                skipped.append(item["skipped"])
        took[name] = round(time.monotonic() - begin, 1)
    return {"rows": rows, "skipped": skipped, "findings": findings(rows), "seconds": took}


def findings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the project asks of a GPU: name, measured value (None: not measured), limit, met or not."""

    def ratio(
        section: str, contender: str, baseline: str, width: int, statistics: Statistics = "exact"
    ) -> float | None:
        for r in rows:
            found = (r["section"], r["workload"], r["contender"], r["width"], r["statistics"])
            if found == (section, "GPT-2 124M", contender, width, statistics) and baseline in r["ratios"]:
                return float(r["ratios"][baseline]["median"])
        return None

    apply = next(
        (r for r in rows if (r["section"], r["contender"], r["width"]) == ("passes", "apply", 4)), None
    )
    pylo = ratio("peers", "cuda_exact", "pylo", 32)
    list_: list[tuple[str, float | None, str, float | None]] = [
        (
            "apply pass, width 4: share of the measured copy",
            apply["share_of_copy"]["median"] if apply and apply["share_of_copy"] else None,
            "at least",
            0.8,
        ),
        (
            "GPT-2 124M, width 4, exact: times AdamW fused",
            ratio("update", "cuda_exact", "adamw_fused", 4),
            "at most",
            2.5,
        ),
        (
            "GPT-2 124M, width 4, lagged: times AdamW fused",
            ratio("update", "cuda_lagged", "adamw_fused", 4, "lagged"),
            "at most",
            1.8,
        ),
        ("GPT-2 124M, width 32: times faster than PyLO", 1.0 / pylo if pylo else None, "at least", 10.0),
        ("matmul faster than element-wise from this width on", crossing(rows), "", None),
    ]
    return [
        {
            "name": name,
            "value": value,
            "limit": f"{word} {limit}" if limit is not None else "",
            "met": None
            if value is None or limit is None
            else (value >= limit if word == "at least" else value <= limit),
        }
        for name, value, word, limit in list_
    ]


def crossing(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The smallest width from which on the matmul variant is faster than the element-wise one at every width; None
    where it is nowhere, or was not measured."""
    seconds: dict[str, dict[int, float]] = {"kernel_elementwise": {}, "kernel_matmul": {}}
    for r in rows:
        if r["section"] == "widths" and r["contender"] in seconds:
            seconds[r["contender"]][r["width"]] = r["seconds"]["median"]
    both = sorted(seconds["kernel_elementwise"].keys() & seconds["kernel_matmul"].keys())
    found: float | None = None
    for width in reversed(both):
        if seconds["kernel_matmul"][width] >= seconds["kernel_elementwise"][width]:
            break
        found = float(width)
    return found


def describe() -> str:
    """The GPU and the backends to be measured. Raises BenchmarkError where there is no GPU, or no CUDA kernels."""
    from .. import backends
    from .gpu_contenders import find_place

    place = find_place(rehearse=False)
    if "cuda" not in place.backends:
        backends.cuda()  # raises, with the reason
    return f"{device(False)['name']}: {', '.join(place.backends)}"


def device(rehearse: bool) -> dict[str, Any]:
    """What the record says of the GPU."""
    if rehearse:
        return {"name": "emulator (a rehearsal: times mean nothing)", "driver": None}
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "driver": _nvidia_smi("driver_version"),
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "power_limit": _nvidia_smi("power.limit"),
        "largest_clocks": _nvidia_smi("clocks.max.sm,clocks.max.mem"),
    }


def _nvidia_smi(query: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def file_name(description: Mapping[str, Any]) -> str:
    """By device and time, for a folder of results."""
    name = re.sub(r"[^a-z0-9]+", "-", str(description["name"]).lower()).strip("-")
    return f"{name}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M}.json"


def _main(request: str) -> None:
    from .gpu_contenders import find_place
    from .gpu_sections import run_section

    asked = json.loads(request)

    def emit(item: Mapping[str, Any]) -> None:
        print(json.dumps(item, allow_nan=False), flush=True)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    place = find_place(asked["rehearse"])
    run_section(asked["section"], place, asked["seconds"], emit, say)


if __name__ == "__main__":
    _main(sys.argv[1])
