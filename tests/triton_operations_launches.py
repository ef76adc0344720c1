"""What the operations launch, bound as a launch on a GPU binds it, by a driver that only names the device and without
the compiler behind it; tests/test_triton_operations.py runs this file in a process of its own. Prints a JSON object:
of each kernel the types of its arguments.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch

from lopt_fast.operations import AdamScalars, Decays, Weights
from lopt_fast.operations.adam import ADAM_AVERAGES
from lopt_fast.torch import triton_operations
from tests.operations_on_devices import tensors_of, to_torch
from tests.test_native_operations import SPECS, random_decays, random_scalars, random_tensors, random_weights


class Driver:
    """Of a device that is not there."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
    seen: dict[str, dict[str, str]] = {}

    def compiled(source: Any, target: Any, options: Any, **more: Any) -> Any:
        seen[source.fn.__name__] = source.signature
        return mock.Mock()

    def launch(
        call: Any, kernel: Any, programs: int, constants: Any, *arguments: Any, warps: int = 4
    ) -> None:
        chosen, options = triton_operations.common().launched(kernel, constants, warps)
        kernel.warmup(call.table, *arguments, grid=(programs,), **chosen, **options)

    with (
        mock.patch("triton.compiler.compile", compiled),
        mock.patch.object(triton_operations._Call, "launch", launch),
        mock.patch.object(triton_operations, "available", return_value=None),
        mock.patch.object(triton_operations, "interpreted", return_value=True),
    ):
        operations = triton_operations.TritonOperations()
        for name, shapes in (("celo", [(6, 8), (8,), (2, 8, 3, 4)]), ("rnn_fc_lopt", [(6, 8)])):
            spec = SPECS[name]
            tensors = tensors_of(random_tensors(spec, shapes, "float32", apply=True))
            decays = Decays(*map(to_torch, random_decays(spec)))
            weights = random_weights(spec, len(shapes), (False, False))
            operations.element_mlp(
                spec, tensors, decays, Weights(*(tuple(map(to_torch, x)) for x in weights))
            )
            operations.statistics(spec, tensors, decays, torch.tensor(1.0))
        tensors = tensors_of(random_tensors(ADAM_AVERAGES, [(6, 8)], "float32"))
        operations.adam(tensors, AdamScalars(*map(to_torch, random_scalars(1))))
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
