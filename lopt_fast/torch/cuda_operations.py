"""`Operations` of the CUDA kernels (kernels/*/cuda.cu), in place: on PyTorch's tensors on one NVIDIA GPU.

Each operation is a handful of launches on the current stream, each over all tensors (csrc/gpu_operations.cc makes
them), and a few of PyTorch's own that bring the numbers of the step together. The host waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache
from typing import Any

import torch

from ..backends import native
from ..native_operations import mlp_spec, unsupported_on_gpus
from ..operations import AdamScalars, Decays, ElementMlp, ModelTensors, Result, Statistics, Weights
from ..operations.adam import ADAM_AVERAGES, adam_between_statistics
from ..reference import Array, TensorState
from ..spec import Accumulates, Averages
from . import device, operands


class CudaOperations:
    """The operations (`lopt_fast.operations.Operations`) on PyTorch's tensors on one GPU.

    States are written in place and returned; so are parameters with `ModelTensors.apply`, else outputs are new tensors.
    Parameters and gradients are float32, bfloat16 or float16; states, and all arithmetic, float32. A tensor that the
    kernels refuse (`refusal`) goes through the definitions and is copied into place.

    found_inf: float32 on the device, one element; where it is not 0 nothing is written, and what is returned besides
    parameters and states has no meaning. None: always written.
    backend: of `lopt_fast.torch.device.KERNELS`, what runs the launches.

    Results are the same bits in every run on the same device.

    Raises BackendError where the kernels are missing, ValueError for arrays that do not fit; nothing has been written
    then.
    """

    def __init__(self, found_inf: torch.Tensor | None = None, backend: str = "cuda") -> None:
        self._kernels = device.KERNELS[backend]()
        self._found_inf = None if found_inf is None else found_inf.reshape(1).to(torch.float32)

    def statistics(
        self,
        accumulates: Accumulates,
        tensors: ModelTensors,
        decays: Decays | None,
        gradient_clip: Array | float | None = None,
        before: bool = False,
    ) -> Statistics:
        decays = None if before else decays
        counts = Averages(accumulates.momenta, accumulates.second_moments, 0)
        call = _Call(tensors, counts, decays, gradient_clip)
        found = None
        if call.taken:
            width = 5 + 2 * (counts.momenta + counts.second_moments)
            found = call.empty(len(call.taken), width)
            self._run("statistics", call, results=found, moved=decays is not None)
        return operands.refused_statistics(
            tensors, call.refused, counts, decays, gradient_clip, call.taken, found
        )

    def element_mlp(
        self,
        spec: ElementMlp,
        tensors: ModelTensors,
        decays: Decays,
        weights: Weights,
        multiplier: Array | None = None,
        gradient_clip: Array | float | None = None,
        steps_only: bool = False,
        column_mean_square: Array | None = None,
    ) -> Result:
        operands.check_weights(spec, len(tensors), weights, multiplier)
        outputs, mode = operands.make_outputs(tensors, steps_only)
        refuse_all = unsupported_on_gpus(spec) is not None
        by_matrix = spec.normalise_over == "matrix"
        call = _Call(
            tensors, Averages.of(spec), decays, gradient_clip, outputs, multiplier, by_matrix, refuse_all
        )
        messages = call.empty(len(tensors), spec.messages)
        if call.refused:
            result = operands.refused_mlp(
                spec, tensors, call.refused, decays, weights, multiplier, gradient_clip, steps_only
            )
        if call.taken:
            found = call.empty(len(call.taken), spec.messages)
            mine = operands.some_weights(weights, call.taken) if call.refused else weights
            layers = [(call.owned(w), call.owned(b)) for w, b in zip(mine.w, mine.b, strict=True)]
            self._run(
                "element_mlp", call, results=found, output=mode, spec=mlp_spec(spec),
                layers=[_layer(w, b) for w, b in layers], multiplied=multiplier is not None,
            )  # fmt: skip
            messages[call.chosen] = found
        if call.refused:
            if result.messages is not None:
                messages[call.refused] = result.messages.to(messages.dtype)
            operands.place(tensors, call.refused, result, outputs, self._found_inf)
        operands.tell_autograd(tensors, mode)
        return Result(outputs, tensors.states, messages if spec.messages else None)

    def adam(
        self,
        tensors: ModelTensors,
        scalars: AdamScalars,
        gradient_clip: Array | float | None = None,
        statistics: bool = False,
    ) -> Result:
        if statistics:
            return adam_between_statistics(self, tensors, scalars, gradient_clip)
        operands.check_scalars(scalars, len(tensors))
        outputs, mode = operands.make_outputs(tensors)
        own = torch.stack([x.float() for x in scalars], dim=1)
        call = _Call(tensors, Averages.of(ADAM_AVERAGES), None, gradient_clip, outputs, own)
        if call.refused:
            result = operands.refused_adam(tensors, call.refused, scalars, gradient_clip)
        if call.taken:
            self._run("adam", call, output=mode)
        if call.refused:
            operands.place(tensors, call.refused, result, outputs, self._found_inf)
        operands.tell_autograd(tensors, mode)
        return Result(outputs, tensors.states)

    def _run(
        self, operation: str, call: _Call, *, results: torch.Tensor | None = None, **options: Any
    ) -> None:
        launches = native().GpuOperation(
            operation,
            tensors=call.table,
            averages=call.counts,
            numbers=call.numbers.data_ptr(),
            found_inf=0 if self._found_inf is None else self._found_inf.data_ptr(),
            results=0 if results is None else results.data_ptr(),
            **options,
        )
        with operands.guard(call.device):
            # Freed before the launches have run: memory is reused in the order of the stream.
            scratch = call.empty(launches.scratch_bytes() // 4 + 64)
            start = scratch.data_ptr()
            launches.run(self._kernels, scratch=start + -start % 256, stream=device.stream(call.device))


class _Call:
    """The tensors of one call: those that the kernels take, as they take them, and the others."""

    def __init__(
        self,
        tensors: ModelTensors,
        counts: Averages,
        decays: Decays | None,
        gradient_clip: Array | float | None,
        outputs: Sequence[torch.Tensor] | None = None,
        own: torch.Tensor | None = None,
        by_matrix: bool = False,
        refuse_all: bool = False,
    ) -> None:
        """own: numbers of the operation's own, (tensors, ...)."""
        if not len(tensors):
            raise ValueError("there are no tensors")
        if decays is not None:
            operands.check_decays(decays, counts)
        self.counts, self.device = counts, tensors.params[0].device
        self.taken: list[int] = []
        self.refused: list[int] = []
        self.table: list[tuple[Any, ...]] = []
        self._owned: list[torch.Tensor] = []
        for i, (p, g, state) in enumerate(zip(tensors.params, tensors.grads, tensors.states, strict=True)):
            lies = operands.lies(p), operands.lies(g), tuple(map(operands.lies, state[:4]))
            found = "" if refuse_all else operands.accepted(*lies, counts, by_matrix, self.device)
            if isinstance(found, str):
                self.refused.append(i)
                continue
            self.taken.append(i)
            output = 0 if outputs is None else outputs[i].data_ptr()
            addresses = p.data_ptr(), g.data_ptr(), output, *(a.data_ptr() for a in state[:4])
            strides = [a.stride(0) if a.ndim else 0 for a in state[:4]]
            self.table.append((found.dtype, astuple(found.loops), addresses, strides))
        self.chosen = self.taken if self.refused else slice(None)
        """Those that the kernels take, as an index."""
        if self.taken:
            rates = self.zeros(sum(counts)) if decays is None else operands.rates(decays, counts)
            parts = [rates, self._step_numbers(tensors, gradient_clip)]
            if own is not None:
                parts.append(own[self.chosen].reshape(-1))
            self.numbers = torch.cat([part.to(self.device, torch.float32) for part in parts])

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def owned(self, a: torch.Tensor) -> torch.Tensor:
        """`a` as the kernels take weights; a copy stays as long as this call."""
        self._owned.append(a.detach().to(self.device, torch.float32).contiguous())
        return self._owned[-1]

    def _step_numbers(self, tensors: ModelTensors, gradient_clip: Array | float | None) -> torch.Tensor:
        """Scale and bound of gradients, then learning rates and weight decays, on the device."""
        values = [
            tensors.grad_scale, math.inf if gradient_clip is None else gradient_clip,
            *(tensors.lr[i] for i in self.taken), *(tensors.weight_decay[i] for i in self.taken),
        ]  # fmt: skip
        host = torch.tensor([0.0 if isinstance(v, torch.Tensor) else float(v) for v in values])
        numbers = operands.upload(host, self.device)
        arrays = {id(v): v for v in values if isinstance(v, torch.Tensor)}
        if not arrays:
            return numbers
        # Parameters share their numbers: each is read once.
        parts = [
            a.detach().to(self.device, torch.float32, non_blocking=True).reshape(1) for a in arrays.values()
        ]
        place = {key: len(values) + k for k, key in enumerate(arrays)}
        places = tuple(place.get(id(v), i) for i, v in enumerate(values))
        return torch.cat([numbers, *parts])[_index(places, self.device)]


@lru_cache(maxsize=64)
def _index(places: tuple[int, ...], where: torch.device) -> torch.Tensor:
    return operands.upload(torch.tensor(places), where)


def _layer(w: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    """csrc/gpu_operations_python.cc, LayerTuple."""
    return (
        w.data_ptr(), b.data_ptr(), w.shape[-2], w.shape[-1],
        w.stride(0) if w.ndim == 3 else 0, b.stride(0) if b.ndim == 2 else 0,
    )  # fmt: skip


def refusal(
    p: torch.Tensor, g: torch.Tensor, state: TensorState, accumulates: Accumulates, by_matrix: bool = False
) -> str | None:
    """None, or the reason why the kernels cannot take this tensor.

    accumulates: the averages that the operation reads. by_matrix: columns are normalised over the last two axes alone.
    """
    lies = operands.lies(p), operands.lies(g), tuple(map(operands.lies, state[:4]))
    found = operands.accepted(*lies, Averages.of(accumulates), by_matrix, p.device)
    return found if isinstance(found, str) else None
