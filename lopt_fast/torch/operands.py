"""What the GPU drivers of the operations share: which tensors kernels can take, checks of operands, outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..layout import Loops
from ..native import Placement
from ..operations import AdamScalars, Decays, ElementMlp, ModelTensors, Reference, Result, Statistics, Weights
from ..reference import Array
from ..spec import Averages
from .triton import FLOATS

_STATE = ("momentum", "second_moment", "factored_row", "factored_column")

# ---- tensors as they lie in memory ----


class Tensor(NamedTuple):
    """How a tensor that the kernels take lies in memory."""

    loops: Loops
    dtype: str
    aligned: bool
    """All distances of averages are multiples of 32 bytes."""


class Lies(NamedTuple):
    """How an array lies in memory, but for where."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    problem: str | None


def lies(a: torch.Tensor) -> Lies:
    """How `a` lies."""
    if a.layout is not torch.strided:
        return Lies(tuple(a.shape), (), a.dtype, a.device, f"a tensor has layout {a.layout}")
    return Lies(a.shape, a.stride(), a.dtype, a.device, "a tensor is lazily negated" if a.is_neg() else None)


@lru_cache(maxsize=8192)
def accepted(
    p: Lies, g: Lies, state: tuple[Lies, ...], counts: Averages, by_matrix: bool, where: torch.device
) -> Tensor | str:
    """How a tensor lies that GPU kernels take, or why they do not take it.

    state: the first arrays of `TensorState`. counts: of the averages that an operation reads. by_matrix: columns are
    normalised over the last two axes alone. where: all arrays must be on this device.
    """
    if reason := _not_on(p, where) or _not_on(g, where):
        return reason
    dtype = str(p.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        return f"the kernels take {', '.join(FLOATS)}, not {dtype}"
    if by_matrix and len(p.shape) > 2:
        return "normalisers for each matrix of a stack"
    placement = Placement.of(p.shape, p.strides, on_gpu=True)
    loops = placement.loops
    if placement.strides_of_view(p.strides) is not None:
        return "the parameter has gaps in memory"
    if g.dtype != p.dtype or g.shape != p.shape or placement.strides_of_view(g.strides) is not None:
        return "the gradient does not lie in memory as the parameter, in its type"
    layouts, aligned = placement.state_layouts(counts), True
    for name, a in zip(_STATE, state, strict=True):
        if name not in layouts:
            continue
        shape, strides = layouts[name]
        if reason := _not_on(a, where):
            return f"{name}: {reason}"
        if a.dtype != torch.float32 or a.shape != shape:
            return f"{name} is {a.dtype} {tuple(a.shape)}, the kernels take float32 {shape}"
        if any(n > 1 and s != t for n, s, t in zip(shape[1:], a.strides[1:], strides[1:], strict=True)):
            return f"{name} does not lie in memory as the parameter"
        if shape[0] > 1 and a.strides[0] < math.prod(shape[1:]):
            return f"the averages of {name} overlap"
        if name in ("momentum", "second_moment") or not loops.factored:
            aligned = aligned and (shape[0] == 1 or a.strides[0] % 8 == 0)
    return Tensor(loops, dtype, aligned)


def _not_on(a: Lies, where: torch.device) -> str | None:
    if a.device != where:
        return f"a tensor is on {a.device}, the first one on {where}"
    return a.problem


# ---- numbers ----


def upload(a: torch.Tensor, where: torch.device) -> torch.Tensor:
    """`a` on the device; the host does not wait."""
    return a.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else a.to(where)


def rates(decays: Decays, counts: Averages) -> torch.Tensor:
    """1 - decay of the averages that an operation reads: momenta, second moments, factored moments."""
    parts = [x.reshape(-1).float() for x, count in zip(decays, counts, strict=True) if count]
    return torch.cat(parts) if parts else torch.zeros(0)


def check_decays(decays: Decays, counts: Averages) -> None:
    for name, values, count in zip(decays._fields, decays, counts, strict=True):
        if count and values.numel() != count:
            raise ValueError(f"decays.{name} has {values.numel()} numbers, expected {count}")


def check_weights(spec: ElementMlp, tensors: int, weights: Weights, multiplier: torch.Tensor | None) -> None:
    layers = spec.layer_sizes
    if len(weights.w) != len(layers) or len(weights.b) != len(layers):
        raise ValueError(f"{len(weights.w)} weights and {len(weights.b)} biases for {len(layers)} layers")
    for i, (n_in, n_out) in enumerate(layers):
        # The last layer may have outputs that nothing reads.
        for name, a, shape in ((f"w[{i}]", weights.w[i], (n_in, n_out)), (f"b[{i}]", weights.b[i], (n_out,))):
            found = tuple(a.shape)
            of_tensors, layer = found[: len(found) - len(shape)], found[len(found) - len(shape) :]
            last = i == len(layers) - 1
            fits = layer[:-1] == shape[:-1] and (layer[-1:] >= shape[-1:] if last else layer == shape)
            if of_tensors not in ((), (tensors,)) or len(layer) != len(shape) or not fits:
                raise ValueError(f"weights.{name} has shape {found}, expected {shape} or {(tensors, *shape)}")
    if multiplier is not None and tuple(multiplier.shape) != (tensors,):
        raise ValueError(f"multiplier has shape {tuple(multiplier.shape)}, expected ({tensors},)")


def some_weights(weights: Weights, indices: list[int]) -> Weights:
    """Those of some tensors."""
    return Weights(
        tuple(w[indices] if w.ndim == 3 else w for w in weights.w),
        tuple(b[indices] if b.ndim == 2 else b for b in weights.b),
    )


def check_scalars(scalars: AdamScalars, tensors: int) -> None:
    for name, x in zip(scalars._fields, scalars, strict=True):
        if tuple(x.shape) != (tensors,):
            raise ValueError(f"scalars.{name} has shape {tuple(x.shape)}, expected ({tensors},)")


# ---- what the definitions take, and outputs ----


def for_definitions(tensors: ModelTensors, indices: list[int]) -> ModelTensors:
    """Some tensors, in float32 where they are in 16 bits."""

    def wide(a: torch.Tensor) -> torch.Tensor:
        return a.detach().float() if a.dtype.itemsize == 2 else a.detach()

    some = tensors.select(indices)
    return replace(some, params=[wide(p) for p in some.params], grads=[wide(g) for g in some.grads])


def refused_statistics(
    tensors: ModelTensors,
    refused: list[int],
    counts: Averages,
    decays: Decays | None,
    gradient_clip: Array | float | None,
    taken: list[int],
    found: torch.Tensor | None,
) -> Statistics:
    """Of all tensors: those of the refused ones from the definitions, `found` of those that kernels take, a row each
    with the fields behind one another."""
    sizes = [1] * 5 + [counts.momenta] * 2 + [counts.second_moments] * 2
    dtype = torch.float32
    for p in tensors.params:
        dtype = torch.promote_types(dtype, p.dtype)
    rows = torch.empty((len(tensors), sum(sizes)), dtype=dtype, device=tensors.params[0].device)
    if refused:
        some = Reference.statistics(counts, for_definitions(tensors, refused), decays, gradient_clip)
        # The definitions show all averages that there are.
        fields = zip(some[: len(sizes)], sizes, strict=True)
        parts = [a.reshape(len(refused), -1)[:, :n] for a, n in fields if a is not None]
        rows[refused] = torch.cat(parts, dim=1).to(dtype)
    if found is not None:
        rows[taken if refused else slice(None)] = found.to(dtype)
    alone, several = rows[:, :5].unbind(1), rows[:, 5:].split(sizes[5:], dim=1)
    return Statistics(*alone, *several)


def refused_mlp(
    spec: ElementMlp,
    tensors: ModelTensors,
    refused: list[int],
    decays: Decays,
    weights: Weights,
    multiplier: torch.Tensor | None,
    gradient_clip: Array | float | None,
    steps_only: bool,
) -> Result:
    """`element_mlp` of the refused tensors by the definition; nothing is written."""
    return Reference.element_mlp(
        spec, for_definitions(tensors, refused), decays, some_weights(weights, refused),
        None if multiplier is None else multiplier[refused], gradient_clip, steps_only,
    )  # fmt: skip


def refused_adam(
    tensors: ModelTensors, refused: list[int], scalars: AdamScalars, gradient_clip: Array | float | None
) -> Result:
    """The same of `adam`."""
    some = AdamScalars(*(x[refused] for x in scalars))
    return Reference.adam(for_definitions(tensors, refused), some, gradient_clip)


def make_outputs(tensors: ModelTensors, steps_only: bool = False) -> tuple[list[torch.Tensor], str]:
    """Where results go, and what they are (OUTPUT)."""
    if tensors.apply and not steps_only:
        return list(tensors.params), "parameter"
    return [torch.empty_like(p) for p in tensors.params], "step" if steps_only else "delta"


def place(
    tensors: ModelTensors,
    refused: Sequence[int],
    result: Result,
    outputs: Sequence[torch.Tensor],
    found_inf: torch.Tensor | None,
) -> None:
    """Copies what the definitions gave for the refused tensors to where the kernels would have written it."""
    for i, output, state in zip(refused, result.outputs, result.states, strict=True):
        pairs = [(outputs[i], output), *zip(tensors.states[i], state, strict=True)]
        for to, values in pairs:
            if found_inf is not None:
                values = torch.where(found_inf.reshape(()) != 0.0, to, values.to(to.dtype))
            to.detach().copy_(values)


def tell_autograd(tensors: ModelTensors, mode: str) -> None:
    """That the parameters have changed."""
    if mode == "parameter":
        torch.autograd.graph.increment_version(tensors.params)


def guard(where: torch.device) -> AbstractContextManager[Any]:
    """Makes `where` the current device."""
    return torch.cuda.device(where) if where.type == "cuda" else nullcontext()
