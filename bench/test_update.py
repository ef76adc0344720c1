"""One step of each contender, a group for each workload: `pytest bench/test_update.py`."""

from __future__ import annotations

import pytest

WORKLOADS = ("256", "1024", "4096", "300:1000", "300:25x40")
FAST = [("torch", "adamw_fused"), ("torch", "adamw_foreach"), ("torch", "lopt_fast")]
FAST += [
    ("jax", "adamw"),
    ("jax", "lopt_fast"),
    ("jax", "lopt_fast_step"),
    ("jax", "lopt_fast_loop"),
    ("jax", "dispatch"),
]
CODE = [("torch", "matmul"), ("torch", "elementwise"), ("jax", "matmul"), ("jax", "elementwise")]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize(("framework", "kind"), FAST)
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_step(benchmark, make_contender, time_step, workload, framework, kind, statistics) -> None:
    if statistics == "lagged" and "lopt_fast" not in kind:
        pytest.skip(f"{kind} has no statistics")
    benchmark.group = f"step, {workload}"
    time_step(make_contender(framework, kind, workload, statistics=statistics))


@pytest.mark.parametrize("workload", ["256", "300:1000"])
@pytest.mark.parametrize(("framework", "kind"), CODE)
def test_framework_code(benchmark, make_contender, time_step, workload, framework, kind) -> None:
    if framework == "jax" and workload.startswith("300"):
        pytest.skip("XLA compiles framework code for 300 tensors for minutes")
    benchmark.group = f"step, {workload}"
    time_step(make_contender(framework, kind, workload), rounds=5)
