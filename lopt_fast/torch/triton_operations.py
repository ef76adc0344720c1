"""`Operations` of the Triton kernels (kernels/*/triton.py), in place: on PyTorch's tensors on one NVIDIA or AMD GPU.

Each operation is a handful of launches on the current stream, each over all tensors that lie in memory in the same way,
and a few of PyTorch's own where numbers for each tensor are combined. The host waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch

from ..layout import Loops
from ..operations import AdamScalars, Decays, ElementMlp, ModelTensors, Result, Statistics, Weights
from ..operations.adam import ADAM_AVERAGES, adam_between_statistics
from ..reference import Array, TensorState
from ..spec import Accumulates, Averages
from . import operands
from .triton import available, common, interpreted, shape_fields, tile_map

_ALIGNMENT = 16  # bytes


@cache
def _kernels(operation: str) -> Any:
    return import_module(f"lopt_fast.kernels.{operation}.triton")


def unsupported(spec: ElementMlp) -> str | None:
    """None, or the reason why the kernels cannot compute this specification for any tensor."""
    reason: str | None = _kernels("element_mlp").unsupported(spec)
    return reason


def refusal(
    p: torch.Tensor, g: torch.Tensor, state: TensorState, accumulates: Accumulates, by_matrix: bool = False
) -> str | None:
    """None, or the reason why the kernels cannot take this tensor.

    accumulates: the averages that the operation reads. by_matrix: columns are normalised over the last two axes alone.
    """
    found = _entry(p, g, state, Averages.of(accumulates), by_matrix, p.device)
    return found if isinstance(found, str) else None


class TritonOperations:
    """The operations (`lopt_fast.operations.Operations`) on PyTorch's tensors on one GPU.

    States are written in place and returned; so are parameters with `ModelTensors.apply`, else outputs are new tensors.
    Parameters and gradients are float32, bfloat16 or float16; states, and all arithmetic, float32. A tensor that the
    kernels refuse (`refusal`) goes through the definitions and is copied into place.

    found_inf: float32 on the device, one element; where it is not 0 nothing is written, and what is returned besides
    parameters and states has no meaning. None: always written.

    Results are the same bits in every run on the same device.

    Raises RuntimeError where the kernels cannot run, ValueError for arrays that do not fit; nothing has been written
    then.
    """

    def __init__(self, found_inf: torch.Tensor | None = None) -> None:
        if reason := available():
            raise RuntimeError(f"the Triton kernels cannot run: {reason}")
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
        k, counts = _kernels("statistics"), Averages(accumulates.momenta, accumulates.second_moments, 0)
        if decays is not None:
            operands.check_decays(decays, counts)
        call = _Call(tensors, counts, gradient_clip, flat=True)
        found = None
        if call.taken:
            width, count = k.width(*counts[:2]), k.quantities(*counts[:2])
            rates = call.zeros(sum(counts)) if decays is None else operands.rates(decays, counts)
            constants = {"MOMENTA": counts[0], "SECOND_MOMENTS": counts[1], "MOVED": decays is not None,
                         "COUNT": count, "WIDTH": width}  # fmt: skip
            sums, totals = call.empty(call.plan.slots * 2 * width), call.empty(len(call.taken), 2, width)
            with operands.guard(call.device):
                call.over_tiles(k.spreads, k.BLOCK, constants, sums, rates, call.numbers)
                call.over_tensors(k.merge, {**constants, "BLOCK": k.MERGE_BLOCK}, sums, totals)
            mean, variance = totals[:, 0, :], totals[:, 1, :]
            momenta, second = slice(2, 2 + counts[0]), slice(2 + counts[0], count)
            found = torch.cat(
                [mean[:, :1], variance[:, :1], mean[:, 1:2], variance[:, 1:2], mean[:, count : count + 1],
                 mean[:, momenta], variance[:, momenta], mean[:, second], variance[:, second]], dim=1
            )  # fmt: skip
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
        counts = Averages.of(spec)
        operands.check_decays(decays, counts)
        operands.check_weights(spec, len(tensors), weights, multiplier)
        outputs, mode = operands.make_outputs(tensors, steps_only)
        call = _Call(tensors, counts, gradient_clip, outputs, spec.normalise_over == "matrix",
                     flat=not spec.factored_moments, refuse_all=unsupported(spec) is not None)  # fmt: skip
        messages = torch.empty((len(tensors), spec.messages), dtype=torch.float32, device=call.device)
        if call.refused:
            result = operands.refused_mlp(
                spec, tensors, call.refused, decays, weights, multiplier, gradient_clip, steps_only
            )
        if call.taken:
            if call.refused:
                weights = operands.some_weights(weights, call.taken)
                multiplier = None if multiplier is None else multiplier[call.taken]
            hidden = self._network_passes(
                spec, call, mode, operands.rates(decays, counts), weights, multiplier
            )
            if spec.messages:
                w, b = weights.w[-1][..., 2 : 2 + spec.messages], weights.b[-1][..., 2 : 2 + spec.messages]
                found = (hidden[:, :, None] * w.float()).sum(1) + b.float()
                messages[call.taken if call.refused else slice(None)] = found
        if call.refused:
            if result.messages is not None:
                messages[call.refused] = result.messages.to(messages.dtype)
            operands.place(tensors, call.refused, result, outputs, self._found_inf)
        operands.tell_autograd(tensors, mode)
        return Result(outputs, tensors.states, messages if spec.messages else None)

    def _network_passes(
        self,
        spec: ElementMlp,
        call: _Call,
        mode: str,
        rates: torch.Tensor,
        weights: Weights,
        multiplier: torch.Tensor | None,
    ) -> torch.Tensor:
        """All launches of `element_mlp`; returns the means of the last hidden units, (tensors, hidden), if wanted."""
        k, plan = _kernels("element_mlp"), call.plan
        width, count = k.width(spec), len(call.taken)
        sums, totals = call.empty(plan.slots * width), call.empty(count, width)

        def constants(layout: Any) -> dict[str, Any]:
            found: dict[str, Any] = k.constants(spec, layout, mode, "hip" if torch.version.hip else "cuda")
            return found

        adding = {"WIDTH": width, "BLOCK": common().ADD_TILES_BLOCK}
        with operands.guard(call.device):
            if plan.pieces is not None:
                call.over_tiles(k.factor_sums, k.FACTOR_BLOCK, constants, call.numbers)
                moving = {"FIRST_RATE": spec.momenta + spec.second_moments, "TILES": k.MOVE_TILES,
                          "FACTORED_MOMENTS": spec.factored_moments, "ENTRIES": k.MOVE_ENTRIES}  # fmt: skip
                call.launch(
                    k.move_factored, len(plan.pieces), moving, plan.pieces, rates, self._stop(call.device)
                )
            call.over_tiles(k.column_sums, k.block(spec, "column_sums"), constants, sums, rates, call.numbers)
            call.over_tensors(common().add_tiles, adding, sums, totals)
            networks = _folded(spec, weights, totals / plan.elements[:, None], plan.elements, multiplier)
            call.over_tiles(
                k.apply, k.block(spec, "apply"), constants,
                sums, rates, call.numbers, networks, self._stop(call.device),
            )  # fmt: skip
            if spec.messages:
                call.over_tensors(common().add_tiles, adding, sums, totals)
        return totals[:, : spec.hidden_size] / plan.elements[:, None]

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
        call = _Call(tensors, Averages.of(ADAM_AVERAGES), gradient_clip, outputs, flat=True)
        if call.refused:
            result = operands.refused_adam(tensors, call.refused, scalars, gradient_clip)
        if call.taken:
            k = _kernels("adam")
            numbers = torch.stack([x.float() for x in scalars], dim=1)
            numbers = numbers[call.taken] if call.refused else numbers
            with operands.guard(call.device):
                call.over_tiles(
                    k.adam, k.BLOCK, {"OUTPUT": mode}, numbers, call.numbers, self._stop(call.device)
                )
        if call.refused:
            operands.place(tensors, call.refused, result, outputs, self._found_inf)
        operands.tell_autograd(tensors, mode)
        return Result(outputs, tensors.states)

    def _stop(self, where: torch.device) -> torch.Tensor:
        return torch.zeros(1, device=where) if self._found_inf is None else self._found_inf


# ---- the tensors of a call ----


class _Call:
    """The tensors of one call: those that the kernels take, in a table on the device, and the others."""

    def __init__(
        self,
        tensors: ModelTensors,
        counts: Averages,
        gradient_clip: Array | float | None,
        outputs: Sequence[torch.Tensor] | None = None,
        by_matrix: bool = False,
        flat: bool = False,
        refuse_all: bool = False,
    ) -> None:
        """flat: elements are taken in their order in memory, whatever the shape."""
        if not len(tensors):
            raise ValueError("there are no tensors")
        self.tensors, self.device = tensors, tensors.params[0].device
        self.taken: list[int] = []
        self.refused: list[int] = []
        kept: list[operands.Tensor] = []
        rows: list[list[int]] = []
        for i, (p, g, state) in enumerate(zip(tensors.params, tensors.grads, tensors.states, strict=True)):
            entry = "" if refuse_all else _entry(p, g, state, counts, by_matrix, self.device)
            if isinstance(entry, str):
                self.refused.append(i)
                continue
            tensor, row = entry
            if outputs is not None:
                row[_OUTPUT] = outputs[i].data_ptr()
                tensor = tensor if row[_OUTPUT] % _ALIGNMENT == 0 else tensor._replace(aligned=False)
            self.taken.append(i)
            kept.append(tensor)
            rows.append(row)
        if not self.taken:
            return
        self.plan = plan = _plan(self.device, tuple(kept), flat)
        self.numbers, places = _numbers(tensors, self.taken, gradient_clip, self.device)
        scratch = self.empty(plan.scratch_size)
        # Stays until the launches that read it are enqueued: memory is then reused in the order of the stream.
        self._scratch = scratch
        table = plan.table.copy()
        of_call = [plan.fields[name] for name in common().OF_CALL]
        table[:, of_call] = [[*row, *pair] for row, pair in zip(rows, places, strict=True)]
        columns = [plan.fields[name] for name in ("x_sums", "y_sums", "means")]
        table[:, columns] = scratch.data_ptr() + 4 * table[:, columns]
        self.table = operands.upload(torch.from_numpy(table), self.device)

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def over_tiles(self, kernel: Any, block: tuple[int, int], constants: Any, *arguments: Any) -> None:
        """Launches over the tiles of each layout that the kernel has work for. block: its elements, and warps.
        constants: a dict, or what gives one for a layout."""
        for layout, tiles in self.plan.tiles.items():
            if (
                layout.place == "vector"
                and "FACTORED" not in kernel.arg_names
                and "GATHER" in kernel.arg_names
            ):
                continue  # for factored tensors alone
            more = constants(layout) if callable(constants) else constants
            self.launch(
                kernel, len(tiles), layout.constants(block[0]) | more, tiles, *arguments, warps=block[1]
            )

    def over_tensors(self, kernel: Any, constants: dict[str, Any], *arguments: Any) -> None:
        """Launches a program for each tensor."""
        self.launch(kernel, len(self.taken), constants, *arguments)

    def launch(
        self, kernel: Any, programs: int, constants: dict[str, Any], *arguments: Any, warps: int = 4
    ) -> None:
        if programs:
            chosen, options = common().launched(kernel, constants, warps)
            kernel[(programs,)](self.table, *arguments, **chosen, **options)


_OUTPUT = 2
"""Place of the output's address in OF_CALL."""


def _entry(
    p: torch.Tensor,
    g: torch.Tensor,
    state: TensorState,
    counts: Averages,
    by_matrix: bool,
    where: torch.device,
) -> tuple[operands.Tensor, list[int]] | str:
    """(how it lies, OF_CALL without an output and numbers), or why the kernels do not take it."""
    if where.type != "cuda" and not interpreted():
        return f"the kernels run on a GPU, the tensor is on {where}"
    found = operands.accepted(
        operands.lies(p), operands.lies(g), tuple(map(operands.lies, state[:4])), counts, by_matrix, where
    )
    if isinstance(found, str):
        return found
    m, v, x, y = state[:4]
    if not found.loops.x_is_row:
        x, y = y, x
    row = [p.data_ptr(), g.data_ptr(), 0]
    for a in (m, v, x, y):
        row += (a.data_ptr(), a.stride(0))
    wide = row[0] | row[1] | row[3] | row[5] | (0 if found.loops.factored else row[7])
    return (found if wide % _ALIGNMENT == 0 else found._replace(aligned=False)), row


@dataclass(frozen=True)
class _Plan:
    """What stays equal from step to step for some tensors."""

    fields: dict[str, int]
    table: np.ndarray
    """(tensors, fields) without addresses; places in scratch memory, in floats."""
    tiles: dict[Any, torch.Tensor]
    """Of each `Layout`: (tiles, TILE_FIELDS)."""
    slots: int
    scratch_size: int
    pieces: torch.Tensor | None
    """(pieces, MOVE_FIELDS), see `move_factored`; None where there are no factored moments."""
    elements: torch.Tensor
    """(tensors,)"""


@lru_cache(maxsize=32)
def _plan(device: torch.device, tensors: tuple[operands.Tensor, ...], flat: bool) -> _Plan:
    c = common()
    fields = {name: i for i, name in enumerate(c.FIELDS)}
    table = np.zeros((len(tensors), len(fields)), np.int64)
    tiles: dict[Any, list[np.ndarray]] = {}
    pieces: list[np.ndarray] = []
    slots = scratch = 0
    for i, tensor in enumerate(tensors):
        loops = tensor.loops
        if flat:
            loops = Loops(1, 1, 1, loops.size, 1, True, False)
        factored, n = loops.factored, loops.size
        row = shape_fields(loops, slots)
        row["operand"] = i
        if factored and n:
            batches = loops.batch0 * loops.batch1 * loops.batch2
            # Room for the means of as many factored moments as an operation may have.
            for name, size in (("x_sums", row["run_tiles"] * row["x_size"]), ("y_sums", row["x_tiles"] * row["y_size"]),
                               ("means", _kernels("element_mlp").MOST_FACTORED * batches)):  # fmt: skip
                row[name] = scratch
                scratch += size
            pieces += _pieces(i, loops)
        for name, value in row.items():
            table[i, fields[name]] = value
        if n:
            place = "vector" if not factored else "matrix" if loops.batch2 == 1 else "gathered"
            layout = c.Layout(
                place=place, x_is_row=loops.x_is_row, columns=c.layout_columns(loops.y * loops.batch2),
                dtype=tensor.dtype, aligned=tensor.aligned and (row["run"] if factored else n) % 8 == 0,
            )  # fmt: skip
            tiles.setdefault(layout, []).append(tile_map(i, row))
        slots += row["tiles"]
    return _Plan(
        fields=fields,
        table=table,
        tiles={layout: torch.from_numpy(np.concatenate(maps)).to(device) for layout, maps in tiles.items()},
        slots=slots,
        scratch_size=scratch,
        pieces=torch.from_numpy(np.concatenate(pieces)).to(device) if pieces else None,
        elements=torch.tensor([t.loops.size for t in tensors], dtype=torch.float32).to(device),
    )


_COLUMN_PIECE = 1024
"""Entries of a column accumulator that one program moves on."""


def _pieces(tensor: int, loops: Loops) -> list[np.ndarray]:
    """Of both accumulators of a factored tensor: (pieces, MOVE_FIELDS), see `move_factored`."""
    axes = (
        (1, loops.batch0, loops.x, loops.batch1 * loops.batch2, loops.x_is_row),
        (0, loops.batch0 * loops.batch1, loops.y, loops.batch2, not loops.x_is_row),
    )
    found = []
    for along_x, outer, length, inner, is_row in axes:
        if is_row:
            o, i = np.indices((outer, inner)).reshape(2, -1)
            first, batch = o * length * inner + i, o * inner + i
            stride, count = np.full_like(first, inner), np.full_like(first, length)
        else:
            size = outer * length * inner
            first = np.arange(0, size, _COLUMN_PIECE)
            stride, batch = np.ones_like(first), np.full_like(first, -1)
            count = np.minimum(size - first, _COLUMN_PIECE)
        same = np.ones_like(first)
        found.append(np.stack([tensor * same, along_x * same, first, stride, count, batch], axis=1))
    return found


# ---- numbers ----


def _numbers(
    tensors: ModelTensors, taken: Sequence[int], gradient_clip: Array | float | None, where: torch.device
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """(scale and bound of gradients, then learning rates and weight decays, on the device; places of each tensor's)."""
    values: list[Any] = [tensors.grad_scale, math.inf if gradient_clip is None else gradient_clip]
    seen: dict[Any, int] = {}

    def place(value: Any) -> int:
        key = id(value) if isinstance(value, torch.Tensor) else float(value)
        if (is_new := (type(key), key)) not in seen:
            seen[is_new] = len(values)
            values.append(value)
        return seen[is_new]

    places = [(place(tensors.lr[i]), place(tensors.weight_decay[i])) for i in taken]
    on_device = [isinstance(v, torch.Tensor) and v.device == where for v in values]
    host = [0.0 if there else float(v) for v, there in zip(values, on_device, strict=True)]
    found = operands.upload(torch.tensor(host, dtype=torch.float32), where)
    if any(on_device):
        found = torch.stack(
            [v.detach().reshape(()).float() if there else f
             for v, there, f in zip(values, on_device, found.unbind(), strict=True)]
        )  # fmt: skip
    return found, places


def _folded(
    spec: ElementMlp,
    weights: Weights,
    mean_squares: torch.Tensor,
    elements: torch.Tensor,
    multiplier: torch.Tensor | None,
) -> torch.Tensor:
    """(tensors, size): the networks as `apply` takes them (`network_at`): normalisers in the first layer, all that
    multiplies the step in the direction's weights. mean_squares: of the columns, then of the parameter."""
    count, inputs = len(elements), spec.layer_sizes[0][0]
    scales = torch.rsqrt(mean_squares[:, :inputs] + spec.epsilons.normaliser)
    w = [a.float() for a in weights.w]
    b = [a.float() for a in weights.b]
    direction = torch.full_like(elements, spec.step_mult)
    if spec.scale == "parameter_rms":
        scale = torch.sqrt(mean_squares[:, inputs] + spec.scale_epsilon)
        if spec.scale_cap is not None:
            scale = torch.minimum(scale, spec.scale_cap * torch.sqrt(elements))
        direction = direction * scale
    if multiplier is not None:
        direction = direction * multiplier.float()
    magnitude = torch.full_like(direction, spec.exp_mult * _kernels("element_mlp").LOG2E)
    factors = torch.stack([direction, magnitude], dim=-1)
    w[0] = w[0] * scales[:, :, None]
    w[-1] = w[-1][..., :2] * factors[:, None, :]
    b[-1] = b[-1][..., :2] * factors
    parts = []
    for i in range(len(w)):
        parts += [w[i].expand(count, *w[i].shape[-2:]).reshape(count, -1), b[i].expand(count, b[i].shape[-1])]
    return torch.cat(parts, dim=1)
