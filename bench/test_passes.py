"""Each pass alone, as shares of real steps: `pytest bench/test_passes.py`.

The native module times the passes, so that pytest-benchmark shows the whole call; the numbers of the passes are in
its `extra_info`, and in `lopt-fast bench passes`.
"""

from __future__ import annotations

import pytest

from lopt_fast.backends import BackendError
from lopt_fast.benchmark import BenchmarkError, passes, records, workloads
from lopt_fast.benchmark.contenders import Config


@pytest.mark.parametrize("workload", ["1024", "4096", "300:1000"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("width", [4, 32])
def test_passes(benchmark, workload, statistics, width) -> None:
    try:
        passes.native_hook()
    except (BackendError, BenchmarkError) as error:
        pytest.skip(str(error))
    config = Config(threads=records.available_threads())
    benchmark.group = f"passes, {workload}"
    found = benchmark.pedantic(
        lambda: passes.run([workloads.parse(workload)], [width], [statistics], config, rounds=3), rounds=1
    )
    benchmark.extra_info["passes"] = found[0]["passes"]
    benchmark.extra_info["copy_gb_per_second"] = found[0]["copy_gb_per_second"]
