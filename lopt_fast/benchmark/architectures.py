"""`lopt-fast bench architectures`: a step of every architecture in PyTorch, and how much of it is its tensor level.

A step consists of operations on all parameters (kernels) and of the rest: the network over tensors, checks, state.
Both are measured in the same steps, by a clock around each operation. AdamW takes turns with each architecture.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np

from ..architectures import ARCHITECTURES, Architecture, initial_theta
from ..checkpoint import Checkpoint
from ..operations import Operations
from . import BenchmarkError, workloads
from .timing import no_garbage_collection, paired_ratio, summarise

PERCEPTRON = (768, 256, 256, 10)
WORKLOADS: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "perceptron": tuple(shape for n_in, n_out in pairwise(PERCEPTRON) for shape in ((n_in, n_out), (n_out,))),
}
"""Shapes of the tensors, by name: 768-256-256-10, 264,970 parameters."""
NUM_STEPS = 10_000


def names() -> tuple[str, ...]:
    """Those that can be measured."""
    return tuple(ARCHITECTURES)


def shapes_of(text: str) -> tuple[tuple[int, ...], ...]:
    """A name of `WORKLOADS`, or as `workloads.parse`. Raises BenchmarkError."""
    if text in WORKLOADS:
        return WORKLOADS[text]
    workload = workloads.parse(text)
    return (workload.shape,) * workload.count


def run(
    chosen: Sequence[str],
    sizes: Sequence[str],
    *,
    threads: int,
    seconds: float,
    backend: str,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each workload and architecture. Raises BenchmarkError for unknown ones."""
    for name in chosen:
        if name not in ARCHITECTURES:
            raise BenchmarkError(f"architecture {name!r}: must be one of {', '.join(names())}")
    try:
        import torch
    except ImportError as error:
        raise BenchmarkError(
            f"PyTorch cannot be imported ({error}): pip install 'lopt-fast[torch]'"
        ) from error
    torch.set_num_threads(threads)
    rows = []
    for size in sizes:
        shapes = shapes_of(size)
        for name in chosen:
            say(f"{name}, {size}")
            rows.append({"workload": size, "architecture": name} | _row(name, shapes, seconds, backend))
    return rows


def _row(name: str, shapes: Sequence[tuple[int, ...]], seconds: float, backend: str) -> dict[str, Any]:
    import torch

    from ..torch import LearnedOptimizer

    spec = ARCHITECTURES[name]()
    params = _parameters(shapes)
    optimizer = LearnedOptimizer(
        params,
        Checkpoint(spec, initial_theta(spec)),
        lr=1e-3,
        num_steps=NUM_STEPS if isinstance(spec, Architecture) else None,
        backend=backend,
    )
    rival = torch.optim.AdamW(_parameters(shapes), lr=1e-3, fused=True)
    loss = torch.tensor(2.0)
    clock = Clock()
    with clock.around_operations(), no_garbage_collection():
        whole, operations, adamw = [], [], []
        began = time.perf_counter()
        for round_ in range(10_000):
            clock.seconds = 0.0
            start = time.perf_counter()
            optimizer.step(loss=loss)
            between = time.perf_counter()
            rival.step()
            end = time.perf_counter()
            if round_ >= 3:  # the first ones create state
                whole.append(between - start)
                operations.append(clock.seconds)
                adamw.append(end - between)
            if len(whole) >= 5 and end - began > seconds:
                break
    parameters = sum(math.prod(shape) for shape in shapes)
    measured = min(operations) > 0.0  # not where an architecture uses none
    return {
        "parameters": parameters,
        "tensors": len(shapes),
        "backend": ", ".join(sorted(set(optimizer.backends.values()))),
        "step": summarise(whole).to_dict(),
        "ns_per_parameter": summarise(whole).median / parameters * 1e9,
        "adamw": summarise(adamw).to_dict(),
        "vs_adamw": paired_ratio(whole, adamw).to_dict(),
        "operations": summarise(operations).to_dict() if measured else None,
        "vs_operations": paired_ratio(whole, operations).to_dict() if measured else None,
    }


def _parameters(shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Parameters with gradients, the same for each call."""
    import torch

    rng = np.random.default_rng(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape, np.float32) * np.float32(0.02)))
        p.grad = torch.from_numpy(rng.standard_normal(shape, np.float32) * np.float32(0.01))
        params.append(p)
    return params


class Clock:
    """Seconds spent in operations."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def around_operations(self) -> Iterator[None]:
        """Inside, every operation that `LearnedOptimizer` calls is measured. Those of the CPU return when they are
        done."""
        from ..torch.operations import implementation

        where = "lopt_fast.torch.architecture_plan.implementation"
        with patch(where, lambda *arguments: self._timed(implementation(*arguments))):
            yield

    def _timed(self, operations: Operations) -> Any:
        def timed(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                start = time.perf_counter()
                result = method(*arguments, **more)
                self.seconds += time.perf_counter() - start
                return result

            return call

        return _Timed(*(timed(getattr(operations, name)) for name in ("statistics", "element_mlp", "adam")))


class _Timed:
    """Implements `Operations`."""

    def __init__(self, *methods: Callable[..., Any]) -> None:
        self.statistics, self.element_mlp, self.adam = methods
