"""What the GPU benchmark times in PyTorch: tensors on one device, gradients that stay as they are, and a wait for the
device at the end of a sample. In a rehearsal the device is the processor and the emulator launches the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from .. import backends, native, reference
from ..layout import column_shape, loops, row_shape
from ..spec import Statistics
from . import BenchmarkError
from .contenders import (
    BETA1,
    BETA2,
    EPSILON,
    LR,
    WEIGHT_DECAY,
    Config,
    Contender,
    checkpoint,
    meta_parameters,
)
from .models import Shapes

Tensors = Sequence[Any]

PASSES: dict[str, tuple[str, ...]] = {
    "factor_statistics": ("factor_sums", "axes", "fold"),
    "feature_statistics": ("feature_sums", "network"),
    "apply": ("apply",),
}
"""The three passes as phases of the GPU kernel (enum Phase of kernels/small_fc_lopt/gpu.h)."""


@dataclass(frozen=True)
class Place:
    """Where the contenders run."""

    device: str
    """"cuda", or "cpu" in a rehearsal."""
    backends: tuple[str, ...]
    """Of `LearnedOptimizer`, to be timed."""
    launcher: Any
    """The GpuDevice of the CUDA kernels, a capsule; None where they are missing."""

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    def wait(self) -> None:
        if not self.rehearsal:
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        from .records import memory_available

        return memory_available() if self.rehearsal else int(torch.cuda.mem_get_info()[0])

    def draw(self, shapes: Shapes) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(parameters, gradients), the same in every call on the same device."""
        generator = torch.Generator(self.device).manual_seed(0)

        def values(scale: float) -> list[torch.Tensor]:
            return [scale * torch.randn(s, generator=generator, device=self.device) for s in shapes]

        return values(0.02), values(0.01)


def missing() -> str | None:
    """None where the benchmark can run, else why not, in a line."""
    if not torch.cuda.is_available():
        return f"no GPU: PyTorch {torch.__version__} sees no CUDA device"
    return None


def find_place(rehearse: bool) -> Place:
    """Raises BenchmarkError without a GPU, or without a backend of ours on it."""
    if rehearse:
        return Place("cpu", ("cpu",), backends.native().gpu_emulator())
    if reason := missing():
        raise BenchmarkError(reason)
    usable, refused = [], []
    for name in ("cuda", "triton"):
        try:
            usable.append(backends.choose(Config().spec, "cuda", "float32", name))
        except backends.BackendError as error:
            refused.append(str(error))
    if not usable:
        raise BenchmarkError("; ".join(refused))
    return Place("cuda", tuple(usable), backends.cuda().device() if "cuda" in usable else None)


@dataclass(frozen=True)
class GpuContender(Contender):
    step: Callable[[], object]
    """Enqueues one step."""
    capturable: bool = False
    """Into a CUDA graph."""


def wrap(
    place: Place, kind: str, params: list[Any], step: Callable[[], object], capturable: bool = False
) -> GpuContender:
    def run(steps: int) -> None:
        for _ in range(steps):
            step()
        place.wait()

    def values() -> list[np.ndarray]:
        return [p.detach().cpu().numpy() for p in params]

    return GpuContender("torch", kind, lambda steps: None, run, values, step, capturable)


def _parameters(place: Place, parameters: Tensors, gradients: Tensors) -> list[torch.nn.Parameter]:
    """Copies of the parameters; gradients are shared between contenders, none of which writes them."""
    params = []
    for p, g in zip(parameters, gradients, strict=True):
        param = torch.nn.Parameter(torch.as_tensor(p, device=place.device).clone())
        param.grad = torch.as_tensor(g, device=place.device)
        params.append(param)
    return params


Builder: TypeAlias = Callable[[Tensors, Tensors], GpuContender]


def adamw(place: Place, kind: str) -> Builder:
    """`kind`: "fused", "foreach", or "compiled" (torch.compile around the foreach step)."""

    def build(parameters: Tensors, gradients: Tensors) -> GpuContender:
        params = _parameters(place, parameters, gradients)
        options: dict[str, Any] = {"lr": LR}
        capturable = kind == "fused" and not place.rehearsal  # costs the fused step nothing
        if kind != "compiled":
            options |= {kind: True, "capturable": capturable}
        elif not place.rehearsal:  # on the processor neither is supported under torch.compile
            options |= {"foreach": True, "capturable": True, "lr": torch.tensor(LR, device=place.device)}
        optimizer = torch.optim.AdamW(
            params, **options, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=WEIGHT_DECAY
        )
        step = optimizer.step
        if kind == "compiled":
            torch.compiler.reset()  # else the ninth step would not be compiled
            step = torch.compile(lambda: optimizer.step(), backend="eager" if place.rehearsal else "inductor")
        return wrap(place, f"adamw_{kind}", list(params), step, capturable)

    return build


def learned(place: Place, backend: str, config: Config) -> Builder:
    """`LearnedOptimizer` as users call it."""

    def build(parameters: Tensors, gradients: Tensors) -> GpuContender:
        from ..torch import LearnedOptimizer

        params = _parameters(place, parameters, gradients)
        optimizer = LearnedOptimizer(params, checkpoint(config), backend=backend)
        name = f"{backend}_{config.statistics}"
        return wrap(place, name, list(params), optimizer.step, capturable=not place.rehearsal)

    return build


def framework_code(place: Place, method: str, config: Config) -> Builder:
    """`lopt_fast.reference` under eager PyTorch."""

    def build(parameters: Tensors, gradients: Tensors) -> GpuContender:
        spec = config.spec
        theta = {name: torch.as_tensor(a, device=place.device) for name, a in meta_parameters(spec).items()}
        params = [torch.as_tensor(p, device=place.device).clone() for p in parameters]
        grads = [torch.as_tensor(g, device=place.device) for g in gradients]
        states = [reference.init_state(spec, p) for p in params]
        t = 0

        @torch.no_grad()
        def step() -> None:
            nonlocal t
            for i, p in enumerate(params):
                delta, states[i] = reference.update(
                    spec,
                    theta,
                    p,
                    grads[i],
                    states[i],
                    t,
                    method="matmul" if method == "matmul" else "elementwise",
                )
                p.add_(delta)
            t += 1

        return wrap(place, f"framework_{method}", params, step)

    return build


@dataclass
class RawState:
    """One tensor with its state as the kernels take it, dense in loop order."""

    param: torch.Tensor
    grad: torch.Tensor
    arrays: dict[str, torch.Tensor] = field(default_factory=dict)


def raw(
    place: Place,
    config: Config,
    *,
    variant: str = "automatic",
    schedule: str = "automatic",
    phases: Sequence[str] = (),
    kind: str | None = None,
) -> Builder:
    """The CUDA kernel without LearnedOptimizer: any variant, schedule, or some phases alone (whose result is not a
    step). Exact statistics. Raises BenchmarkError where the kernels are missing."""
    if place.launcher is None:
        raise BenchmarkError("the CUDA kernels are missing: see lopt-fast info")

    def build(parameters: Tensors, gradients: Tensors) -> GpuContender:
        core, spec = backends.native(), config.spec
        flat = native.flat_theta(spec, meta_parameters(spec))["float32"]
        theta = torch.as_tensor(flat, device=place.device)
        step_counter = torch.zeros((), dtype=torch.int64, device=place.device)
        states = [
            _raw_state(place, spec.statistics, p, g) for p, g in zip(parameters, gradients, strict=True)
        ]
        kernel_spec = native.kernel_spec(spec)
        records = [
            core.GpuTensor(
                loops=astuple(loops(tuple(s.param.shape))),
                parameter="float32",
                gradient="float32",
                state="float32",
                param=s.param.data_ptr(),
                grad=s.grad.data_ptr(),
                output=s.param.data_ptr(),
                apply=True,
                **{name: a.data_ptr() if a.numel() else 0 for name, a in s.arrays.items()},
                momentum_stride=0,
                theta=theta.data_ptr(),
                lr=1.0,
                weight_decay=0.0,
                t=(step_counter.data_ptr(), "int64"),
                step=step_counter.data_ptr() if i == len(states) - 1 else 0,
                clip_group=-1,
            )
            for i, s in enumerate(states)
        ]
        size = core.gpu_scratch_bytes(kernel_spec, records, 0)
        scratch = torch.empty(size + 256, dtype=torch.uint8, device=place.device)
        aligned = (scratch.data_ptr() + 255) // 256 * 256
        owners = states, theta, step_counter, scratch  # of the addresses in `records`
        chosen: Sequence[str] = ()  # all: the first step writes what single phases read

        def step(owners: Any = owners) -> None:
            nonlocal chosen
            core.gpu_step(
                place.launcher,
                spec=kernel_spec,
                tensors=records,
                variant=variant,
                schedule=schedule,
                phases=chosen,
                ordinal=0 if place.rehearsal else torch.cuda.current_device(),
                scratch=aligned,
                stream=0 if place.rehearsal else torch.cuda.current_stream().cuda_stream,
            )
            chosen = phases

        return wrap(place, kind or f"kernel_{variant}", [s.param for s in states], step)

    return build


def _raw_state(place: Place, statistics: Statistics, parameter: Any, gradient: Any) -> RawState:
    p = torch.as_tensor(parameter, device=place.device).clone()
    shape = tuple(p.shape)
    state = RawState(p, torch.as_tensor(gradient, device=place.device))

    def zeros(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, device=place.device)

    factored = len(shape) >= 2
    state.arrays = {
        "momentum": zeros(3, *shape),
        "second_moment": zeros(1, *shape),
        "row": zeros(3, *(row_shape(shape) if factored else shape)),
        "column": zeros(3, *column_shape(shape)) if factored else zeros(0),
        "mean_squares": zeros(28) if statistics == "lagged" else zeros(0),
    }
    return state


def pylo(place: Place, config: Config) -> Builder:
    """PyLO's CUDA kernel with our meta-parameters. Raises ImportError where it is not installed."""
    if place.rehearsal:
        raise ImportError("a rehearsal has no CUDA")
    from pylo.optim.AdafacLO_cuda import AdafacLO_CUDA

    from .torch_contenders import pylo_optimizer

    def build(parameters: Tensors, gradients: Tensors) -> GpuContender:
        params = _parameters(place, parameters, gradients)
        optimizer = pylo_optimizer(AdafacLO_CUDA, params, config.spec)
        return wrap(place, "pylo", list(params), optimizer.step)

    return build


def graphed(place: Place, contender: GpuContender) -> GpuContender:
    """The step captured in a CUDA graph: the device's time without the host's. To be called after warm-up. Raises
    BenchmarkError in a rehearsal."""
    if place.rehearsal:
        raise BenchmarkError("a rehearsal has no CUDA graphs")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.step()
    captured = wrap(place, f"{contender.kind} graph", [], graph.replay)
    return replace(captured, parameters=contender.parameters)


def copy(place: Place, elements: int) -> GpuContender:
    """A copy of so many float32 values on the device: 8 bytes moved for each."""
    source = torch.ones(elements, device=place.device)
    target = torch.zeros_like(source)
    return wrap(place, "copy", [target[:1]], lambda: target.copy_(source))
