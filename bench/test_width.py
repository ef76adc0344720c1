"""One step over the width of the MLP, a group for each width: `pytest bench/test_width.py`."""

from __future__ import annotations

import pytest

from lopt_fast.benchmark.update import JAX_ELEMENTWISE_WIDTH
from lopt_fast.benchmark.width import WIDTHS


@pytest.mark.parametrize("width", [int(w) for w in WIDTHS.split(",")])
@pytest.mark.parametrize("kind", ["lopt_fast", "matmul", "elementwise"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_width(benchmark, make_contender, time_step, framework, kind, width) -> None:
    if framework == "jax" and kind == "elementwise" and width > JAX_ELEMENTWISE_WIDTH:
        pytest.skip("XLA runs out of memory compiling it")
    benchmark.group = f"width {width}, {framework}"
    time_step(make_contender(framework, kind, "256", width=width), rounds=15 if kind == "lopt_fast" else 3)
