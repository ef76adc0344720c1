"""`lopt-fast bench passes`: each of the three passes alone, against a measured copy in the same run.

The native module times them inside real steps:

    lopt_fast._native.time_passes(
        spec: KernelSpec,             # lopt_fast.native.kernel_spec
        loops: tuple[int, int, int, int, int, bool, bool],  # fields of lopt_fast.layout.Loops, in order
        count: int,                   # tensors with these loops
        theta: int,                   # address of (theta_size,) float32, lopt_fast.reference.flatten_theta
        pool: str,                    # as in small_fc_step
        threads: int,
        steps: int,
    ) -> dict[str, list[float]]

It makes float32 parameters and gradients (not all equal) and zero state, takes one step untimed, then `steps` timed
ones. Every list has `steps` entries, in seconds: "step" is the wall time of a step; "factor_statistics",
"feature_statistics" and "apply" are the time spent in that pass, summed over the threads and divided by their number
(blocks of different tensors may be in different passes at the same time), 0 for a pass that lagged statistics leave
out. It raises ValueError for arguments that a step would not take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from .. import backends, native
from ..layout import loops
from ..spec import Statistics
from . import BenchmarkError, timing
from .contenders import Config, Contender, meta_parameters
from .workloads import READ_BYTES, STATE_BYTES, Workload

TimePasses = Callable[..., dict[str, list[float]]]

PASS_BYTES = {"factor_statistics": 4.0, "feature_statistics": READ_BYTES, "apply": STATE_BYTES}
"""Bytes per float32 parameter that each pass reads and writes."""

COPY_BYTES = 8.0
COPY_PARAMETERS = 1 << 25
"""Elements of the copy: 128 MiB to 128 MiB, from memory to memory."""

STEPS = 3


def native_hook() -> TimePasses:
    """`_native.time_passes`. Raises BackendError without the compiled module, BenchmarkError without the hook."""
    hook = getattr(backends.native(), "time_passes", None)
    if hook is None:
        raise BenchmarkError(
            "this build of lopt_fast._native has no time_passes: passes cannot be timed alone"
        )
    return hook


def _copy(threads: int, parameters: int) -> Contender:
    try:
        from .torch_contenders import copy_contender
    except ImportError:
        source, target = np.ones(parameters, np.float32), np.zeros(parameters, np.float32)

        def run(steps: int) -> None:
            for _ in range(steps):
                np.copyto(target, source)

        return Contender("numpy", "copy", lambda steps: None, run, lambda: [target])
    return copy_contender(parameters, threads)


def run(
    workloads: Sequence[Workload],
    widths: Sequence[int],
    statistics: Sequence[Statistics],
    config: Config,
    *,
    rounds: int = 7,
    time_passes: TimePasses | None = None,
    copy_parameters: int = COPY_PARAMETERS,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Medians over `rounds`, in each of which the copy and a few steps follow each other."""
    hook = native_hook() if time_passes is None else time_passes
    copy = _copy(config.threads, copy_parameters)
    timing.warm_up(copy)
    results = []
    for workload in workloads:
        for width in widths:
            for mode in statistics:
                chosen = replace(config, width=width, statistics=mode)
                say(f"time the passes: {workload.label}, width {width}, {mode}")
                results.append(_measure(hook, copy, workload, chosen, rounds, copy_parameters))
    return results


def _measure(
    hook: TimePasses, copy: Contender, workload: Workload, config: Config, rounds: int, copy_parameters: int
) -> dict[str, Any]:
    spec = config.spec
    theta = native.flat_theta(spec, meta_parameters(spec))["float32"]
    schedule = timing.Plan({copy.name: 1}, {copy.name: 1})
    copies: list[float] = []
    samples: dict[str, list[float]] = {}
    for _ in range(rounds):
        copies += timing.alternate([copy], schedule)[copy.name]
        measured = hook(
            spec=native.kernel_spec(spec),
            loops=astuple(loops(workload.shape)),
            count=workload.count,
            theta=theta.ctypes.data,
            pool="own" if copy.framework == "numpy" else "openmp",
            threads=config.threads,
            steps=STEPS,
        )
        for name, values in measured.items():
            samples.setdefault(name, []).extend(values)
    copy_rate = COPY_BYTES * copy_parameters / timing.summarise(copies).median / 1e9
    passes = []
    for name in [*PASS_BYTES, "step"]:
        seconds = timing.summarise(samples[name])
        if seconds.median == 0.0:  # lagged statistics have one pass
            continue
        size = PASS_BYTES.get(name)
        rate = None if size is None else size * workload.parameters / seconds.median / 1e9
        passes.append(
            {
                "name": name,
                "seconds": seconds.to_dict(),
                "ns_per_parameter": seconds.median / workload.parameters * 1e9,
                "bytes_per_parameter": size,
                "gb_per_second": rate,
                "share_of_copy": None if rate is None else rate / copy_rate,
            }
        )
    return {
        "workload": workload.label,
        "parameters": workload.parameters,
        "width": config.width,
        "statistics": config.statistics,
        "copy_gb_per_second": copy_rate,
        "copy_with": copy.framework,
        "passes": passes,
    }
