"""`lopt-fast bench update`: one step against AdamW and framework code, paired within one run.

One comparison is one workload, width and statistics: AdamW and lopt_fast of both frameworks alternate in one
process. Each kind of framework code is a comparison of its own with AdamW and lopt_fast beside it, so that no more
than one of them is in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..spec import Spec, Statistics
from . import BenchmarkError, contenders, records, timing
from .contenders import BASELINES, Config, Contender, Framework, Kind
from .workloads import Workload

Say = Callable[[str], None]

JAX_ELEMENTWISE_WIDTH = 8
"""XLA's CPU compiler takes more than 12 GB for the expanded products of 16 units (jax 0.10.2)."""

JAX_CODE_TENSORS = 16


@dataclass(frozen=True)
class Budget:
    """How long. `seconds` for each contender of a comparison; a step that would take longer than `slowest_step` is
    left out, with the reason in the record."""

    seconds: float = 1.5
    slowest_step: float = 60.0
    min_rounds: int = 15
    rounds: int | None = None
    burst: int | None = None


@dataclass
class Session:
    """What comparisons of one command share: the budget, verified errors, and the pace of slow contenders."""

    budget: Budget = field(default_factory=Budget)
    say: Say = lambda text: None
    verified: dict[tuple[str, Kind, Config], float] = field(default_factory=dict)
    pace: dict[tuple[str, Kind, int], float] = field(default_factory=dict)
    """Seconds per parameter of framework code at the last workload, by (framework, kind, width)."""

    def verify(self, framework: Framework, kind: Kind, config: Config) -> float:
        # The baselines do not depend on the width and the statistics of the learned optimizer.
        key = framework, kind, Config(threads=config.threads) if kind.startswith("adamw") else config
        if key not in self.verified:
            self.say(f"verify {framework}/{kind}, width {config.width}, {config.statistics}")
            build = contenders.builder(framework, kind, config)
            self.verified[key] = contenders.verify(build, contenders.oracle(kind, config))
        return self.verified[key]

    def reason_to_skip(
        self, framework: Framework, kind: Kind, config: Config, workload: Workload
    ) -> str | None:
        needed, free = (
            contenders.temporary_bytes(kind, config, workload.parameters),
            records.memory_available(),
        )
        if needed > free // 2:
            return f"needs about {needed / 1e9:.0f} GB of temporaries, {free / 1e9:.0f} GB are free"
        if framework == "jax" and kind == "elementwise" and config.width > JAX_ELEMENTWISE_WIDTH:
            return f"XLA runs out of memory compiling the expanded products of more than {JAX_ELEMENTWISE_WIDTH} units"
        if framework == "jax" and kind in ("matmul", "elementwise") and workload.count > JAX_CODE_TENSORS:
            return f"XLA compiles framework code for {workload.count} tensors for minutes"
        step = self._seconds_per_parameter(framework, kind, config.width) * workload.parameters
        if step > self.budget.slowest_step:
            return f"one step would take about {step:.0f} s"
        return None

    def _seconds_per_parameter(self, framework: Framework, kind: Kind, width: int) -> float:
        """From the widest run so far that is not wider, in proportion to the MLP's products; 0 if there is none."""
        known = [w for f, k, w in self.pace if (f, k) == (framework, kind) and w <= width]
        if not known:
            return 0.0
        wide, narrow = (sum(a * b for a, b in Spec(hidden_size=w).layer_sizes) for w in (width, max(known)))
        return self.pace[framework, kind, max(known)] * wide / narrow

    def compare(
        self, chosen: Sequence[tuple[Framework, Kind]], config: Config, workload: Workload
    ) -> dict[str, Any]:
        """One comparison: verify, build, warm up, alternate. Raises BenchmarkError for a wrong result."""
        skipped: dict[str, str] = {}
        errors: dict[str, float] = {}
        built: list[Contender] = []
        kinds: dict[str, tuple[Framework, Kind]] = {}
        for framework, kind in chosen:
            name = f"{framework}/{kind}"
            if reason := self.reason_to_skip(framework, kind, config, workload):
                skipped[name] = reason
                continue
            errors[name] = self.verify(framework, kind, config)
            built.append(contenders.builder(framework, kind, config)(*workload.values))
            kinds[name] = framework, kind
        self.say(f"time {workload.label}, width {config.width}, {config.statistics}: {', '.join(errors)}")
        steps = {}
        for contender in built:
            slow = contender.kind in ("matmul", "elementwise")
            steps[contender.name] = timing.warm_up(contender, steps=2 if slow else 3)
            if slow:
                framework, kind = kinds[contender.name]
                self.pace[framework, kind, config.width] = steps[contender.name] / workload.parameters
        schedule = timing.plan(
            steps,
            seconds=self.budget.seconds,
            min_rounds=self.budget.min_rounds,
            rounds=self.budget.rounds,
            burst=self.budget.burst,
        )
        samples = timing.alternate(built, schedule)
        for contender in built:
            contenders.check_finite(contender)
        built.clear()
        gc.collect()
        cache = records.cache_bytes()
        models = {
            name: contenders.bytes_per_parameter(framework, kind, config, workload, cache)
            for name, (framework, kind) in kinds.items()
        }
        described = [
            describe(name, samples, schedule, workload.parameters, models[name], errors[name])
            for name in samples
        ]
        return comparison(config, workload, described, skipped)


def comparison(
    config: Config, workload: Workload, described: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """One entry of a record's `results`."""
    return {
        "workload": workload.label,
        "parameters": workload.parameters,
        "width": config.width,
        "statistics": config.statistics,
        "contenders": list(described),
        "skipped": dict(skipped),
    }


def describe(
    name: str,
    samples: Mapping[str, Sequence[float]],
    schedule: timing.Plan,
    parameters: int,
    bytes_per_parameter: float | None,
    error: float,
) -> dict[str, Any]:
    """The numbers of one contender: times, the byte model's bandwidth, ratios to the baselines of the same run."""
    seconds = timing.summarise(samples[name])
    bandwidth = (
        None if bytes_per_parameter is None else bytes_per_parameter * parameters / seconds.median / 1e9
    )
    return {
        "name": name,
        "seconds": seconds.to_dict(),
        "burst": schedule.bursts[name],
        "ns_per_parameter": seconds.median / parameters * 1e9,
        "bytes_per_parameter": bytes_per_parameter,
        "gb_per_second": bandwidth,
        "ratios": {
            other: timing.paired_ratio(samples[name], samples[other]).to_dict()
            for other in BASELINES
            if other != name and other in samples
        },
        "error_over_tolerance": error,
    }


def run(
    workloads: Sequence[Workload],
    widths: Sequence[int],
    statistics: Sequence[Statistics],
    frameworks: Sequence[Framework],
    config: Config,
    *,
    framework_code: bool = True,
    session: Session | None = None,
) -> list[dict[str, Any]]:
    """All comparisons, as the `results` of a record."""
    if not frameworks:
        raise BenchmarkError("no framework to measure: choose torch, jax or both")
    session = session or Session()
    results = []
    baselines: list[tuple[Framework, Kind]] = [
        (f, k) for f in frameworks for k in contenders.KINDS[f] if k.startswith("adamw")
    ]
    ours: list[tuple[Framework, Kind]] = [
        (f, k)
        for f in frameworks
        for k in contenders.KINDS[f]
        if k.startswith("lopt_fast") or k == "dispatch"
    ]
    code: tuple[Kind, ...] = ("matmul", "elementwise")
    for workload in workloads:
        for width in widths:
            for mode in statistics:
                chosen = replace(config, width=width, statistics=mode)
                pairs = sorted(baselines + ours, key=lambda pair: frameworks.index(pair[0]))
                results.append(session.compare(pairs, chosen, workload))
            exact = replace(config, width=width, statistics="exact")
            for framework in frameworks if framework_code else ():
                for kind in code:
                    if reason := session.reason_to_skip(framework, kind, exact, workload):
                        results.append(comparison(exact, workload, [], {f"{framework}/{kind}": reason}))
                        continue
                    adamw: Kind = "adamw_fused" if framework == "torch" else "adamw"
                    chosen_kinds: list[Kind] = [adamw, "lopt_fast", kind]
                    results.append(session.compare([(framework, k) for k in chosen_kinds], exact, workload))
    return results
