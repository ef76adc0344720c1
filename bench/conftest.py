"""Contenders for the pytest-benchmark suites: the ones that `lopt-fast bench` times, verified first."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from lopt_fast.benchmark import contenders, records, workloads
from lopt_fast.benchmark.contenders import Config, Contender, Framework, Kind


@cache
def _verified(framework: Framework, kind: Kind, config: Config) -> float:
    build = contenders.builder(framework, kind, config)
    return contenders.verify(build, contenders.oracle(kind, config))


@pytest.fixture
def make_contender() -> Callable[..., Contender]:
    """(framework, kind, workload label, width, statistics) -> contender, or a skipped test with the reason."""

    def make(
        framework: Framework, kind: Kind, workload: str, width: int = 4, statistics: str = "exact"
    ) -> Contender:
        pytest.importorskip(framework)
        config = Config(width=width, statistics=statistics, threads=records.available_threads())
        parsed = workloads.parse(workload)
        if contenders.temporary_bytes(kind, config, parsed.parameters) > records.memory_available() // 2:
            pytest.skip("the temporaries of this framework code do not fit the memory")
        _verified(framework, kind, config)
        return contenders.builder(framework, kind, config)(*parsed.values)

    return make


@pytest.fixture
def time_step(benchmark) -> Callable[[Contender], None]:
    """Time single steps, with fresh gradients before each one."""

    def time(contender: Contender, rounds: int = 15) -> None:
        benchmark.extra_info["contender"] = contender.name
        benchmark.pedantic(
            lambda: contender.run(1), setup=lambda: contender.prepare(1), rounds=rounds, warmup_rounds=2
        )
        contenders.check_finite(contender)

    return time
