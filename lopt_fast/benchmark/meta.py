"""`lopt-fast bench meta`: inner steps a second of the meta-training loop, and seconds to compile it.

The workload is that of `lopt_fast.meta.throughput`. Each row is measured in a process of its own, since the number of
CPU devices is fixed when JAX starts, and so that each compiles anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import BenchmarkError
from .timing import summarise

_MEASURE = """
import dataclasses, json, sys
pairs, truncation, count = map(int, sys.argv[1:4])
from lopt_fast.meta import devices
devices.setup(count)
from lopt_fast.meta.throughput import measure
print(json.dumps(dataclasses.asdict(measure(pairs, truncation, seconds=float(sys.argv[4])))))
"""


def run(
    pairs: Sequence[int], devices: Sequence[int], truncation: int, seconds: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each population and number of devices that divides it. Raises BenchmarkError if one fails."""
    rows = []
    for population in pairs:
        for count in devices:
            if population % count:
                say(f"{population} pairs cannot be shared by {count} devices: left out")
                continue
            say(f"{population} pairs, {count} devices")
            command = [sys.executable, "-c", _MEASURE, *map(str, (population, truncation, count, seconds))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BenchmarkError(f"{population} pairs on {count} devices: {done.stderr.strip()[-500:]}")
            found = json.loads(done.stdout)
            rows.append(
                {
                    "pairs": population,
                    "devices": count,
                    "truncation": truncation,
                    "inner_steps_per_second": found["inner_steps_per_second"],
                    "compile_seconds": found["compile_seconds"],
                    "outer_step": summarise(found["outer_step_seconds"]).to_dict(),
                }
            )
    return rows
