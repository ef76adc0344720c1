"""`lopt-fast bench architectures`: a step of every architecture in PyTorch, and how much of it is its tensor level.

A step consists of operations on all parameters (kernels) and of the rest: the network over tensors, checks, state.
Both are measured in the same steps, by a clock around each operation. AdamW takes turns with each architecture.
Newton-Schulz iterations (celo2) count as an operation, and are given by themselves as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np

from ..architectures import ARCHITECTURES, Architecture, initial_theta
from ..checkpoint import Checkpoint
from ..errors import install
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


def check(chosen: Sequence[str]) -> None:
    """Raise BenchmarkError for an unknown architecture."""
    for name in chosen:
        if name not in ARCHITECTURES:
            raise BenchmarkError(f"architecture {name!r}: must be one of {', '.join(names())}")


def use_torch(threads: int) -> None:
    """Set PyTorch's number of threads. Raises BenchmarkError without PyTorch."""
    try:
        import torch
    except ImportError as error:
        raise BenchmarkError(f"PyTorch cannot be imported ({error}): {install('torch')}") from error
    torch.set_num_threads(threads)


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
    check(chosen)
    use_torch(threads)
    rows = []
    for size in sizes:
        shapes = shapes_of(size)
        for name in chosen:
            say(f"{name}, {size}")
            rows.append({"workload": size, "architecture": name} | _row(name, shapes, seconds, backend))
    return rows


def _row(name: str, shapes: Sequence[tuple[int, ...]], seconds: float, backend: str) -> dict[str, Any]:
    spec = ARCHITECTURES[name]()
    optimizer = learned(Checkpoint(spec, initial_theta(spec)), shapes, backend)
    return {"backend": backend_of(optimizer)} | measure(step_of(optimizer), shapes, seconds=seconds)


def learned(checkpoint: Checkpoint, shapes: Sequence[tuple[int, ...]], backend: str) -> Any:
    """A `LearnedOptimizer` of tensors of these shapes, which have gradients."""
    from ..torch import LearnedOptimizer

    return LearnedOptimizer(
        parameters(shapes),
        checkpoint,
        lr=1e-3,
        num_steps=NUM_STEPS if isinstance(checkpoint.spec, Architecture) else None,
        backend=backend,
    )


def backend_of(optimizer: Any) -> str:
    """What computes the steps of a `LearnedOptimizer`."""
    return ", ".join(sorted(set(optimizer.backends.values())))


def step_of(optimizer: Any) -> Callable[[], object]:
    """A step of a `LearnedOptimizer`, with a loss."""
    import torch

    return partial(optimizer.step, loss=torch.tensor(2.0))


class TooSlow(BenchmarkError):
    """A step that takes longer than was allowed."""


def measure(
    step: Callable[[], object],
    shapes: Sequence[tuple[int, ...]],
    *,
    seconds: float,
    rounds: int = 5,
    slowest_step: float = math.inf,
) -> dict[str, Any]:
    """Times of `step`, of an optimizer of tensors of these shapes, and of AdamW (fused) in turns; at least `rounds` of
    each. Raises TooSlow if the first step takes more than `slowest_step` seconds."""
    import torch

    rival = torch.optim.AdamW(parameters(shapes), lr=1e-3, fused=True)
    clock = Clock()
    with clock.around_operations(), no_garbage_collection():
        whole, operations, newton_schulz, adamw = [], [], [], []
        began = time.perf_counter()
        for round_ in range(10_000):
            clock.seconds = clock.newton_schulz = 0.0
            start = time.perf_counter()
            step()
            between = time.perf_counter()
            rival.step()
            end = time.perf_counter()
            if between - start > slowest_step and not round_:
                raise TooSlow(f"a step takes {between - start:.1f} s, more than {slowest_step:g} s")
            if round_ >= 3:  # the first ones create state
                whole.append(between - start)
                operations.append(clock.seconds)
                newton_schulz.append(clock.newton_schulz)
                adamw.append(end - between)
            if len(whole) >= rounds and end - began > seconds:
                break
    number = sum(math.prod(shape) for shape in shapes)
    measured = min(operations) > 0.0  # not where an architecture uses none
    return {
        "parameters": number,
        "tensors": len(shapes),
        "step": summarise(whole).to_dict(),
        "ns_per_parameter": summarise(whole).median / number * 1e9,
        "adamw": summarise(adamw).to_dict(),
        "vs_adamw": paired_ratio(whole, adamw).to_dict(),
        "operations": summarise(operations).to_dict() if measured else None,
        "vs_operations": paired_ratio(whole, operations).to_dict() if measured else None,
        "newton_schulz": summarise(newton_schulz).to_dict() if min(newton_schulz) > 0.0 else None,
    }


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[Any]:
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
    """Seconds spent in operations, and of these in Newton-Schulz iterations."""

    def __init__(self) -> None:
        self.seconds = self.newton_schulz = 0.0

    @contextmanager
    def around_operations(self) -> Iterator[None]:
        """Inside, every operation that `LearnedOptimizer` calls is measured. Those of the CPU return when they are
        done."""
        from ..operations.orthogonalise import newton_schulz
        from ..torch.operations import implementation

        def of_backend(*arguments: Any) -> _Timed:
            operations = implementation(*arguments)
            names = ("statistics", "element_mlp", "adam")
            return _Timed(*(self._timed(getattr(operations, name)) for name in names))

        def iterations(*arguments: Any) -> Any:
            before = self.seconds
            result = self._timed(newton_schulz)(*arguments)
            self.newton_schulz += self.seconds - before
            return result

        with (
            patch("lopt_fast.torch.architecture_plan.implementation", of_backend),
            patch("lopt_fast.architectures.celo2.newton_schulz", iterations),
        ):
            yield

    def _timed(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            start = time.perf_counter()
            result = operation(*arguments, **more)
            self.seconds += time.perf_counter() - start
            return result

        return call


class _Timed:
    """Implements `Operations`."""

    def __init__(self, *methods: Callable[..., Any]) -> None:
        self.statistics, self.element_mlp, self.adam = methods
