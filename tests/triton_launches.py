"""What a `TritonStep` launches, bound as a launch on a GPU binds it, by a driver that only names the device and without
the compiler behind it; tests/test_triton.py runs this file in a process of its own. Prints a JSON object: names of the
kernels that were compiled when the steps were made, and of those that captured steps would compile.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch

from lopt_fast.spec import Spec
from lopt_fast.torch import device
from lopt_fast.torch import triton as driver
from tests.triton_operations_launches import Driver
from tests.triton_problem import Problem


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
    compiled: list[str] = []

    def compile_(source: Any, target: Any, options: Any, **more: Any) -> Any:
        compiled.append(source.fn.__name__)
        return mock.Mock()

    with (
        mock.patch("triton.compiler.compile", compile_),
        mock.patch.object(triton.JITFunction, "__getitem__", lambda f, grid: _Bound(f, grid)),
        mock.patch.object(driver, "available", return_value=None),
        mock.patch.object(driver, "interpreted", return_value=True),
    ):
        shapes = [(6, 8), (5, 7), (9,), (8, 4, 3, 3)]  # one address more than a launch of set_addresses takes
        problems = [
            Problem(Spec(statistics=statistics), [*shapes, *shapes, (16,)])
            for statistics in ("exact", "lagged")
        ]
        made = compiled.copy()
        compiled.clear()
        with mock.patch.object(device, "capturing", return_value=True):
            for problem in problems:
                grads, numbers = problem.gradients(), {"lrs": [0.1], "weight_decays": [0.2]}
                problem.kernel.step(grads, **numbers, max_norm=1.0)
                # Elsewhere, not aligned; not dense either.
                grads = [torch.empty(g.numel() + 1)[1:].view(g.shape) for g in grads]
                grads[0] = grads[0].T.contiguous().T
                lr, found_inf = torch.tensor(0.1), torch.zeros(3)[1]
                problem.kernel.step(grads, lrs=[lr], weight_decays=[0.2], found_inf=found_inf, grad_scale=2.0)
    print(json.dumps({"made": made, "captured": compiled}))


class _Bound:
    """A kernel with its number of programs, which is bound and not launched."""

    def __init__(self, function: Any, grid: Any) -> None:
        self._function, self._grid = function, grid

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self._function.warmup(*arguments, grid=self._grid, **options)


if __name__ == "__main__":
    main()
