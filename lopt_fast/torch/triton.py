"""A step of `small_fc_lopt` by the Triton kernels (kernels/small_fc_lopt/triton.py) over tensors of one device.

`TritonStep` builds once what stays equal from step to step: the table of tensors, the tiles, scratch memory of
O(rows + columns); all kernels are compiled and loaded. A step is then a handful of launches, each over all tensors of
one layout, on the current stream; nothing on the host waits for them, and a CUDA graph may capture them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
import torch

from ..layout import Loops, dense_strides
from ..native import Placement
from ..reference import flatten_theta
from ..spec import TIMESCALES, Spec
from . import device as devices

Number: TypeAlias = float | torch.Tensor

FLOATS = ("float32", "bfloat16", "float16")
STATE_FLOATS = ("float32", "bfloat16")
_ALIGNMENT = 16  # bytes
_LARGE_MODEL = 1 << 24  # elements from which autotuning pays
_PIECE = 64  # scratch arrays begin at multiples of so many floats


@cache
def kernels() -> Any:
    """The module of kernels. Raises ImportError where triton is missing."""
    return import_module("lopt_fast.kernels.small_fc_lopt.triton")


@cache
def common() -> Any:
    """What all Triton kernels share. Raises ImportError where triton is missing."""
    return import_module("lopt_fast.kernels.common.triton")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def available() -> str | None:
    """None, or the reason why the Triton kernels cannot run on this machine."""
    try:
        kernels()
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton (Linux)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return None


def supports(spec: Spec, parameter: str, gradient: str | None = None, state: str = "float32") -> str | None:
    """None, or the reason why the kernels cannot compute `spec` with these types ("float32", ...)."""
    if parameter not in FLOATS or (gradient or parameter) not in FLOATS:
        return f"it takes parameters and gradients in {', '.join(FLOATS)}, not {parameter}, {gradient or parameter}"
    if state not in STATE_FLOATS:
        return f"it takes state in {' and '.join(STATE_FLOATS)}, not {state}"
    if spec.feature_set != "default":
        return f"it takes feature_set 'default', not {spec.feature_set!r}"
    counts = len(spec.momentum_decays), len(spec.rms_decays), len(spec.adafactor_decays)
    if counts != (3, 1, 3):
        return "it takes 3 momentum, 1 second-moment and 3 factored decays, not {}, {} and {}".format(*counts)
    if spec.hidden_size > 64:
        return f"it takes hidden_size up to 64, not {spec.hidden_size}"
    return None


@dataclass(frozen=True)
class TritonTensor:
    """One tensor of a step: everything on one device."""

    name: str
    """For messages."""
    param: torch.Tensor
    """Any strides that do not overlap; dense in memory is the fast way."""
    state: Mapping[str, torch.Tensor]
    """As `Placement.state_layouts` has it: momentum and second_moment in float32 or bfloat16, all else in float32."""
    step: torch.Tensor
    """int64, one element: steps taken before; one is added."""
    group: int = 0
    """Index into the learning rates and weight decays."""
    clip: bool = True
    """Whether its gradient counts for the global norm and is clipped."""
    output: torch.Tensor | None = None
    """None: the parameter is updated. Else (shape, type and strides of the parameter) what is to be added to it."""


class TritonStep:
    """The step over a fixed list of tensors. Build a new one when an address of a parameter or of state changes.

    A CUDA graph may capture steps, any number of graphs, with steps outside of graphs before and after. A graph refers
    to memory of this object: keep it as long as the graph.

    Args:
        theta: named meta-parameters (`Spec.theta_shapes`).
        tensors: all on one device; empty ones are allowed.
        gradient: type of the gradients, None: each as its parameter.
        variant: how the network is computed: "elementwise", "matmul" or "auto" (by width).
        precision: of the products of "matmul": "ieee", "tf32x3" or None for what keeps the float32 bound on the device.
        autotune: measure at construction which block of pass 3 is fastest here; results do not depend on it. None: on a
            GPU, for large models (seconds of compiling, once in a process).

    Raises ValueError, naming the tensor, for what cannot be used, and RuntimeError where the kernels cannot run, and
    while a graph is captured.
    """

    def __init__(
        self,
        spec: Spec,
        theta: Mapping[str, Any],
        tensors: Sequence[TritonTensor],
        *,
        gradient: torch.dtype | None = None,
        variant: str = "auto",
        precision: str | None = None,
        autotune: bool | None = None,
    ) -> None:
        if reason := available():
            raise RuntimeError(f"the Triton kernels cannot run: {reason}")
        if variant not in ("auto", "elementwise", "matmul"):
            raise ValueError(f"variant={variant!r}: must be 'auto', 'elementwise' or 'matmul'")
        if not tensors:
            raise ValueError("no tensors: a step needs at least one")
        k = kernels()
        self._spec, self._tensors, self._gradient = spec, tuple(tensors), gradient
        self._device = tensors[0].param.device
        if devices.capturing(self._device):
            raise RuntimeError(
                "a TritonStep cannot be made while a CUDA graph is captured, as it compiles and loads its kernels: "
                "run a step before the capture, as the example of torch.cuda.CUDAGraph does"
            )
        for tensor in tensors:
            self._check(tensor)
        matmul = spec.hidden_size >= k.MATMUL_FROM if variant == "auto" else variant == "matmul"
        backend = "hip" if torch.version.hip else "cuda"
        self._network = k.Network(
            hidden=spec.hidden_size,
            layers=spec.hidden_layers,
            lagged=spec.statistics == "lagged",
            matmul=matmul,
            precision=precision or k.default_precision(backend),
        )
        with devices.guard(self._device):
            self._build(theta)
            if autotune is None:
                autotune = not interpreted() and sum(t.param.numel() for t in tensors) >= _LARGE_MODEL
            if autotune:
                self._tune()
            self._load()

    # ---- what stays equal ----

    def _check(self, tensor: TritonTensor) -> None:
        p, where = tensor.param, f"tensor {tensor.name}"
        state_types = {tensor.state[n].dtype for n in ("momentum", "second_moment") if n in tensor.state}
        if len(state_types) != 1:
            raise ValueError(f"{where}: momentum and second_moment must have one type, found {state_types}")
        names = [_name(p.dtype), _name(self._gradient or p.dtype), _name(state_types.pop())]
        if reason := supports(self._spec, *names):
            raise ValueError(f"{where}: {reason}")
        placement = Placement.of(p.shape, p.stride())
        layouts = placement.state_layouts(self._spec)
        for name, (shape, strides) in layouts.items():
            value = tensor.state.get(name)
            if value is None or tuple(value.shape) != shape or value.device != p.device:
                raise ValueError(f"{where}: state {name!r} is missing or not of shape {shape} on {p.device}")
            if value.numel() and any(
                n > 1 and a != b for n, a, b in zip(shape[1:], value.stride()[1:], strides[1:], strict=True)
            ):
                raise ValueError(f"{where}: state {name!r} has strides {value.stride()}, expected {strides}")
            if name not in ("momentum", "second_moment") and value.dtype != torch.float32:
                raise ValueError(f"{where}: state {name!r} is {value.dtype}, expected float32")
        if tensor.step.dtype != torch.int64 or tensor.step.numel() != 1 or tensor.step.device != p.device:
            raise ValueError(f"{where}: step must be one int64 on {p.device}")
        if p.device != self._device:
            raise ValueError(
                f"{where} is on {p.device}, the others on {self._device}: make a TritonStep for each"
            )
        out = tensor.output
        if out is not None and (out.shape, out.stride(), out.dtype, out.device) != (
            p.shape,
            p.stride(),
            p.dtype,
            p.device,
        ):
            raise ValueError(
                f"{where}: the output must have the shape, strides, type and device of the parameter"
            )

    def _build(self, theta: Mapping[str, Any]) -> None:
        k, device = kernels(), self._device
        flat = flatten_theta(self._spec, {n: np.asarray(a, np.float64) for n, a in theta.items()})
        self._theta = torch.tensor([*flat, *TIMESCALES], dtype=torch.float32, device=device)
        self._placements = [Placement.of(t.param.shape, t.param.stride()) for t in self._tensors]
        # Dense copies of parameters and gradients that are not dense in the parameter's order.
        self._dense_params: dict[int, torch.Tensor] = {}
        self._dense_outputs: dict[int, torch.Tensor] = {}
        self._dense_grads: dict[int, torch.Tensor] = {}
        for i, (tensor, placement) in enumerate(zip(self._tensors, self._placements, strict=True)):
            if placement.strides_of_view(tensor.param.stride()) is not None:
                self._dense_params[i] = _dense(tensor.param, placement)
                if tensor.output is not None:
                    self._dense_outputs[i] = _dense(tensor.param, placement)

        layouts = [self._layout(i) for i in range(len(self._tensors))]
        self._aligned = [layout.aligned for layout in layouts]
        self._layouts = tuple(
            dict.fromkeys(x for x, p in zip(layouts, self._placements, strict=True) if p.loops.size)
        )
        rows: list[_Record] = []
        tiles: list[list[np.ndarray]] = [[] for _ in self._layouts]
        chunks: list[np.ndarray] = []
        slots = chunk = floats = 0
        for i, placement in enumerate(self._placements):
            row = _Record(placement.loops, slots, k)
            rows.append(row)
            slots += row.values["tiles"]
            if row.values["tiles"]:
                tiles[self._layouts.index(layouts[i])].append(tile_map(i, row.values))
            for axis, name in enumerate("xy"):
                made = row.chunk_map(i, axis, chunk)
                row.values[f"{name}_chunk"], row.values[f"{name}_chunks"] = chunk, len(made)
                chunk += len(made)
                chunks.append(made)
            floats = row.take_scratch(floats, self._network.units)
        self._slots, self._chunks = slots, chunk
        sums, norms, statistics = floats, floats + _padded(slots * k.SUMS.value), 0
        statistics = norms + _padded(slots)
        self._scratch = torch.zeros(
            statistics + _padded(chunk * k.CHUNK_STATISTICS.value), dtype=torch.float32, device=device
        )
        self._sums, self._norms = self._scratch[sums:], self._scratch[norms:]
        self._statistics = self._scratch[statistics:]
        table = np.stack([self._record(i, row) for i, row in enumerate(rows)])
        self._table = torch.from_numpy(table).to(device)
        self._chunk_map = torch.from_numpy(_concatenate(chunks, k.CHUNK_FIELDS.value, np.int64)).to(device)
        self._tile_maps = [
            torch.from_numpy(_concatenate(maps, common().TILE_FIELDS.value, np.int32)).to(device)
            for maps in tiles
        ]
        self._groups = 1 + max(t.group for t in self._tensors)
        self._inputs = _Inputs(len(self._tensors), self._groups, device)
        self._clip = torch.ones(2, dtype=torch.float32, device=device)
        self._no_clip = torch.ones(2, dtype=torch.float32, device=device)
        self._zero, self._one = (torch.full((1,), x, dtype=torch.float32, device=device) for x in (0.0, 1.0))
        self._idle = torch.ones(1, dtype=torch.float32, device=device)
        counters = [t.step for t in self._tensors]
        # PyTorch does not count the writes of inference tensors.
        known = self._network.lagged and not any(map(torch.Tensor.is_inference, counters))
        self._counters = counters if known else None
        self._started: list[int] | None = None
        self._instances: dict[tuple[str, Any], tuple[Any, dict[str, Any]]] = {}

    def _layout(self, i: int) -> Any:
        k, tensor, loops = kernels(), self._tensors[i], self._placements[i].loops
        place = "vector" if not loops.factored else "matrix" if loops.batch2 == 1 else "gathered"
        addresses = [tensor.param, tensor.state["momentum"], tensor.state["second_moment"]]
        if tensor.output is not None:
            addresses.append(tensor.output)
        if not loops.factored:
            addresses.append(tensor.state["factored_row"])
        length = loops.y if place != "gathered" else 1
        aligned = (
            length % 8 == 0
            and tensor.state["momentum"].stride(0) % 8 == 0
            and all(a.data_ptr() % _ALIGNMENT == 0 for a in addresses)
        )
        return k.Layout(
            place=place,
            aligned=aligned,
            columns=_columns(loops),
            param=_name(tensor.param.dtype),
            grad=_name(self._gradient or tensor.param.dtype),
            state=_name(tensor.state["momentum"].dtype),
        )

    def _record(self, i: int, row: _Record) -> np.ndarray:
        tensor, v = self._tensors[i], row.values
        scratch = self._scratch.data_ptr()
        for name in row.scratch:
            v[name] = scratch + 4 * row.scratch[name]
        param = self._dense_params.get(i, tensor.param)
        output = tensor.output if tensor.output is None else self._dense_outputs.get(i, tensor.output)
        state = {name: value.data_ptr() for name, value in tensor.state.items()}
        row_accumulator, column_accumulator = state["factored_row"], state.get("factored_column", 0)
        if not row.loops.factored:
            v["diagonal"] = row_accumulator
        elif row.loops.x_is_row:
            v["x_accumulator"], v["y_accumulator"] = row_accumulator, column_accumulator
        else:
            v["x_accumulator"], v["y_accumulator"] = column_accumulator, row_accumulator
        v |= {
            "param": param.data_ptr(),
            "output": (param if output is None else output).data_ptr(),
            "momentum": state["momentum"],
            "momentum_stride": tensor.state["momentum"].stride(0),
            "second_moment": state["second_moment"],
            "x_is_row": int(row.loops.x_is_row),
            "mean_squares": state.get("mean_squares", 0),
            "step": tensor.step.data_ptr(),
            "rates": tensor.group,
            "clip": int(tensor.clip),
            "adds": int(output is not None),
        }
        return np.array([v.get(name, 0) for name in kernels().FIELDS], np.int64)

    def _load(self) -> None:
        """Launch every kernel once, told to do nothing: compiled and loaded. The driver forbids that while a graph is
        captured, and a captured step may be the first that clips or the first that writes addresses."""
        self._inputs.numbers.zero_()
        for kernel, layout, _, arguments in self._launches(
            self._inputs, self._one, clipping=True, steady=False
        ):
            self._launch(kernel, layout, 1, arguments)
        self._set_addresses(self._inputs.gradients, 0, [])

    # ---- one step ----

    def step(
        self,
        grads: Sequence[torch.Tensor],
        *,
        lrs: Sequence[Number],
        weight_decays: Sequence[Number],
        grad_scale: Number = 1.0,
        divide: bool = False,
        found_inf: torch.Tensor | None = None,
        max_norm: Number | None = None,
    ) -> None:
        """Enqueue one step on the current stream.

        Passes 1 and 2 of lagged statistics are needed while a tensor takes its first step. They are left out once this
        object has taken a step without `found_inf`, as no step counter is 0 then; unless PyTorch has since written one.
        A captured step always has them, and the device finds out at each replay whether there is anything to do.

        Args:
            grads: of every tensor, in its shape and in the type said at construction; strides other than the
                parameter's cost a copy.
            lrs, weight_decays: of each group; those of groups behind the last tensor's are not used. Tensors of one
                element on the device are read when the step runs; so are `grad_scale` and `max_norm`. Numbers of a
                captured step, and addresses of gradients, are part of the graph.
            grad_scale: gradients are multiplied by it first, or divided where `divide`.
            found_inf: one number on the device; where it is not 0 nothing is written and no step counted.
            max_norm: bound on the norm of the gradients of all tensors with `clip` together.

        Raises ValueError for a gradient or a `found_inf` that cannot be used, and for another number of gradients or
        groups; nothing has been enqueued then.
        """
        if len(grads) != len(self._tensors):
            raise ValueError(f"{len(grads)} gradients for {len(self._tensors)} tensors")
        for tensor, g in zip(self._tensors, grads, strict=True):
            expected = (tensor.param.shape, self._gradient or tensor.param.dtype, self._device)
            if (g.shape, g.dtype, g.device) != expected:
                raise ValueError(
                    f"the gradient of {tensor.name} is {g.dtype} {tuple(g.shape)} on {g.device}, expected "
                    f"{expected[1]} {tuple(expected[0])} on {expected[2]}"
                )
        if min(len(lrs), len(weight_decays)) < self._groups:
            raise ValueError(
                f"{len(lrs)} learning rates and {len(weight_decays)} weight decays for {self._groups} groups"
            )
        lrs, weight_decays = lrs[: self._groups], weight_decays[: self._groups]
        if found_inf is not None and (found_inf.numel() != 1 or found_inf.device != self._device):
            raise ValueError(
                f"found_inf has shape {tuple(found_inf.shape)} on {found_inf.device}, expected one number on "
                f"{self._device}"
            )
        capturing = devices.capturing(self._device)
        # A graph has its own, which each replay writes: others neither change what it reads nor see what it wrote.
        inputs = _Inputs(len(self._tensors), self._groups, self._device) if capturing else self._inputs
        writes = self._writes()
        steady = writes is not None and writes == self._started and not capturing
        with devices.guard(self._device), torch.no_grad():
            self._take_gradients(inputs, grads, capturing)
            self._take_numbers(inputs, lrs, weight_decays, grad_scale, divide, max_norm)
            stop = self._zero if found_inf is None else found_inf.to(torch.float32)
            for i, dense in self._dense_params.items():
                dense.copy_(self._tensors[i].param)
            for kernel, layout, grid, arguments in self._launches(
                inputs, stop, clipping=max_norm is not None, steady=steady
            ):
                self._launch(kernel, layout, grid, arguments)
            for i, dense in self._dense_params.items():
                tensor = self._tensors[i]
                if tensor.output is None:
                    tensor.param.copy_(dense)
                else:
                    tensor.output.copy_(self._dense_outputs[i])

        if found_inf is None and not capturing:
            self._started = writes

    def _writes(self) -> list[int] | None:
        """How often PyTorch has written each step counter, but for kernels, which only count up; None: unknown."""
        return None if self._counters is None else [*map(attrgetter("_version"), self._counters)]

    def _take_gradients(self, inputs: _Inputs, grads: Sequence[torch.Tensor], capturing: bool) -> None:
        addresses = []
        for i, g in enumerate(grads):
            placement = self._placements[i]
            address = g.data_ptr()
            if placement.strides_of_view(g.stride()) is not None or (
                address % _ALIGNMENT and self._aligned[i]
            ):
                if i not in inputs.dense:
                    inputs.dense[i] = _dense(g, placement)
                address = inputs.dense[i].copy_(g).data_ptr()
            addresses.append(address)
        if addresses == inputs.addresses:
            return
        if capturing or self._device.type != "cuda":
            for first in range(0, len(addresses), 8):
                self._set_addresses(inputs.gradients, first, addresses[first : first + 8])
        else:
            host = torch.tensor(addresses, dtype=torch.int64, pin_memory=True)
            inputs.gradients.copy_(host, non_blocking=True)
        inputs.addresses = addresses

    def _set_addresses(self, to: torch.Tensor, first: int, addresses: list[int]) -> None:
        """Write up to eight addresses without a copy from the host, which a graph would repeat from freed memory."""
        padded = addresses + [0] * (8 - len(addresses))
        self._launch("set_addresses", None, 1, (to, first, len(addresses), *padded))

    def _take_numbers(
        self,
        inputs: _Inputs,
        lrs: Sequence[Number],
        weight_decays: Sequence[Number],
        grad_scale: Number,
        divide: bool,
        max_norm: Number | None,
    ) -> None:
        pairs = [x for pair in zip(lrs, weight_decays, strict=True) for x in pair]
        if divide and not (isinstance(grad_scale, torch.Tensor) and grad_scale.device == self._device):
            grad_scale, divide = 1.0 / float(grad_scale), False
        for i, x in enumerate([grad_scale, 0.0 if max_norm is None else max_norm, *pairs]):
            if isinstance(x, torch.Tensor) and x.device == self._device:
                inputs.numbers[i].copy_(x.detach().reshape(()))
                if i == 0 and divide:
                    inputs.numbers[0].reciprocal_()
                inputs.known[i] = None
            elif inputs.known[i] != (x := float(x)):
                inputs.numbers[i].fill_(x)
                inputs.known[i] = x

    def _launches(
        self, inputs: _Inputs, stop: torch.Tensor, *, clipping: bool, steady: bool
    ) -> Iterator[tuple[str, Any, int, tuple[Any, ...]]]:
        """(kernel, layout, programs, arguments before the constants) of a step, in order.

        stop: where it is not 0 they do nothing. steady: no tensor takes its first step.
        """
        spec, lagged = self._spec, self._network.lagged
        table, grads, numbers, theta = self._table, inputs.gradients, inputs.numbers, self._theta
        clip = self._clip if clipping else self._no_clip
        maps = list(zip(self._layouts, self._tile_maps, strict=True))
        factored = [(layout, tiles) for layout, tiles in maps if layout.place != "vector"]
        exact_passes = not (lagged and steady)
        idle = self._idle if lagged else stop  # passes 1 and 2 do nothing where it is not 0
        if clipping:
            for layout, tiles in maps:
                yield "square_sums", layout, len(tiles), (table, grads, tiles, numbers, self._norms, stop)
            yield "clip_factors", None, 1, (self._norms, self._slots, numbers, clip)
        if lagged and exact_passes:
            yield "find_first_steps", None, 1, (table, len(self._tensors), stop, idle)
        if factored:
            chunk_arguments = (table, self._chunk_map, self._statistics, theta, stop)
            if exact_passes:
                for layout, tiles in factored:
                    yield "factor_statistics", layout, len(tiles), (table, grads, tiles, numbers, clip, idle)
            yield (
                "move_accumulators:" + ("before" if lagged else "exact"),
                None,
                self._chunks,
                chunk_arguments,
            )
            yield "fold_factors", None, self._chunks, chunk_arguments
        everything = (self._sums, theta, numbers, clip)
        if exact_passes:
            for layout, tiles in maps:
                yield "feature_statistics", layout, len(tiles), (table, grads, tiles, *everything, idle)
        rule = (spec.step_mult, spec.exp_mult, spec.scale_epsilon)
        yield "fold_network", None, len(self._tensors), (table, self._sums, theta, numbers, stop, *rule)
        for layout, tiles in maps:
            yield "apply", layout, len(tiles), (table, grads, tiles, *everything, stop)
        if lagged:
            if factored:
                yield "move_accumulators:after", None, self._chunks, chunk_arguments
            yield "keep_statistics", None, len(self._tensors), (table, self._sums, stop)

    def _launch(self, kernel: str, layout: Any, programs: int, arguments: tuple[Any, ...]) -> None:
        if not programs:
            return
        if (kernel, layout) not in self._instances:
            name, _, when = kernel.partition(":")
            constants, options = kernels().instance(name, layout, self._network)
            if when:
                constants["WHEN"] = when
            if name == "fold_network":
                constants["PARAMETER_RMS"] = self._spec.scale == "parameter_rms"
            self._instances[kernel, layout] = kernels().KERNELS[name], constants | options
        function, constants = self._instances[kernel, layout]
        function[(programs,)](*arguments, **constants)

    # ---- autotuning ----

    def _tune(self) -> None:
        """Take the fastest block for pass 3 of every layout. Element by element and without sums its results do not
        depend on the block; all else keeps its own, which decides the order of sums."""
        if self._network.lagged or self._network.matmul:
            return
        for layout in self._layouts:
            key = (self._device, self._network, layout)
            if key not in _tuned:
                _tuned[key] = self._measure(layout)
            constants, options = kernels().instance("apply", layout, self._network)
            self._instances["apply", layout] = (
                kernels().KERNELS["apply"],
                constants | options | _tuned[key],
            )

    def _measure(self, layout: Any) -> dict[str, int]:
        """The best block of pass 3, timed on a tensor of its own with such a layout."""
        shape = kernels().example_shape(layout)
        p = torch.zeros(shape, dtype=getattr(torch, layout.param), device=self._device)
        g = torch.ones(shape, dtype=getattr(torch, layout.grad), device=self._device)
        state = {
            name: torch.empty_strided(
                size,
                strides,
                dtype=getattr(torch, layout.state if name in ("momentum", "second_moment") else "float32"),
                device=self._device,
            ).zero_()
            for name, (size, strides) in Placement.of(shape, p.stride()).state_layouts(self._spec).items()
        }
        step = torch.zeros((), dtype=torch.int64, device=self._device)
        theta = {name: np.zeros(size) for name, size in self._spec.theta_shapes.items()}
        tensor = TritonTensor("example", p, state, step)
        example = TritonStep(
            self._spec, theta, [tensor], gradient=g.dtype, variant="elementwise", autotune=False
        )
        example.step([g], lrs=[1.0], weight_decays=[0.0])
        launches = example._launches(example._inputs, example._zero, clipping=False, steady=True)
        (launch,) = [x for x in launches if x[0] == "apply"]
        function, constants = example._instances["apply", launch[1]]

        def seconds(choice: dict[str, int]) -> float:
            example._instances["apply", launch[1]] = function, constants | choice
            return example._seconds(launch)

        return fastest(kernels().choices(layout, self._network), seconds)

    def _seconds(self, launch: tuple[str, Any, int, tuple[Any, ...]]) -> float:
        """Median time of a launch, after one that compiles it."""
        times = []
        for _ in range(11):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._launch(*launch)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times[1:])[5]


_tuned: dict[Any, dict[str, int]] = {}  # choices made in this process


def fastest(choices: Sequence[dict[str, int]], seconds: Callable[[dict[str, int]], float]) -> dict[str, int]:
    """The choice with the smallest time; the first of equal ones."""
    return min(choices, key=seconds)


class _Inputs:
    """What a step takes from the host, on the device."""

    def __init__(self, tensors: int, groups: int, device: torch.device) -> None:
        self.gradients = torch.empty(tensors, dtype=torch.int64, device=device)
        """Addresses."""
        self.addresses: list[int] = []
        """What `gradients` holds, as far as the host knows."""
        self.numbers = torch.empty(2 + 2 * groups, dtype=torch.float32, device=device)
        """grad_scale, max_norm, then (lr, weight_decay) of each group."""
        self.known: list[float | None] = [None] * (2 + 2 * groups)
        """What `numbers` holds, None where the host does not know."""
        self.dense: dict[int, torch.Tensor] = {}
        """Copies of gradients that do not lie in memory as their parameter."""


def _columns(loops: Loops) -> int:
    columns: int = common().layout_columns(loops.y * loops.batch2)
    return columns


def shape_fields(loops: Loops, first_slot: int) -> dict[str, int]:
    """The fields SHAPE of a record (kernels/common/triton.py). first_slot: number of its first tile among all."""
    n, columns, groups = loops.size, _columns(loops), loops.batch0 * loops.batch1
    x, run = (loops.x, loops.y * loops.batch2) if loops.factored else (-(-n // columns), columns)
    rows = common().rows_per_tile(n, columns)
    x_tiles, run_tiles = -(-x // rows), -(-run // columns)
    return {
        "elements": n,
        "batch0": loops.batch0,
        "x": x,
        "batch1": loops.batch1,
        "run": run,
        "batch2": loops.batch2,
        "x_size": groups * loops.x * loops.batch2 if loops.factored else 0,
        "y_size": groups * run if loops.factored else 0,
        "rows_per_tile": rows,
        "x_tiles": x_tiles,
        "run_tiles": run_tiles,
        "tiles": groups * x_tiles * run_tiles if n else 0,
        "first_slot": first_slot,
    }


def tile_map(tensor: int, fields: Mapping[str, int]) -> np.ndarray:
    """(tiles, TILE_FIELDS) int32 of a tensor that has `shape_fields`, by slot; `tensor`: its place in the table."""
    groups = fields["batch0"] * fields["batch1"]
    grid = np.indices((groups, fields["x_tiles"], fields["run_tiles"])).reshape(3, -1)
    return np.stack([np.full_like(grid[0], tensor), *grid], axis=1).astype(np.int32)


class _Record:
    """Sizes, chunks and scratch of one tensor."""

    def __init__(self, loops: Loops, first_slot: int, k: Any) -> None:
        self.loops, self._k = loops, k
        self.values = shape_fields(loops, first_slot)
        self.scratch: dict[str, int] = {}

    def chunk_map(self, tensor: int, axis: int, first_chunk: int) -> np.ndarray:
        """(chunks, CHUNK_FIELDS) of the accumulator along x (axis 0) or y; see `_chunk` of the kernels."""
        loops, side = self.loops, self._k.SIDE.value
        if not loops.factored or not loops.size:
            return np.zeros((0, self._k.CHUNK_FIELDS.value), np.int64)
        outer, length, inner = (
            (loops.batch0, loops.x, loops.batch1 * loops.batch2)
            if axis == 0
            else (loops.batch0 * loops.batch1, loops.y, loops.batch2)
        )
        on_axis, inside = (side * side, 1) if inner == 1 else (side, side)
        along = -(-length // on_axis)
        o, i, a = np.indices((outer, -(-inner // inside), along)).reshape(3, -1)
        at = np.arange(o.size)
        constant = np.ones_like(o)
        return np.stack(
            [
                tensor * constant,
                axis * constant,
                o,
                a * on_axis,
                i * inside,
                first_chunk + at - a,
                along * constant,
                0 * constant,
            ],
            axis=1,
        ).astype(np.int64)

    def take_scratch(self, used: int, units: int) -> int:
        """Place the scratch arrays of the tensor from float `used` on; the float behind them."""
        v = self.values
        sizes = {"network": self._k.network_at("end", units)}
        for name, tiles in (("x", v["run_tiles"]), ("y", v["x_tiles"])):
            size = v[f"{name}_size"]
            sizes |= {f"{name}_sums": tiles * size, f"{name}_factor": 3 * size, f"{name}_bias": units * size}
        for name, size in sizes.items():
            self.scratch[name] = used
            used += _padded(size)
        return used


def _padded(floats: int) -> int:
    return -(-floats // _PIECE) * _PIECE


def _concatenate(parts: Sequence[np.ndarray], fields: int, dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros((0, fields), dtype), *parts])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense(like: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Memory for a tensor of this shape, dense in the memory order of the placement."""
    strides = dense_strides(placement.shape, placement.order)
    return torch.empty_strided(placement.shape, strides, dtype=like.dtype, device=like.device)
