"""What the tests of the GPU drivers of the operations share, CUDA's and Triton's: where the kernels run, and how
results are compared with the definitions in float64.

The same tests run everywhere: without a GPU through the emulator and Triton's interpreter, on PyTorch's CPU tensors,
and in tests/gpu on a GPU. `Target.in_use` says where, and the functions here follow it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from lopt_fast import backends
from lopt_fast.architectures import ARCHITECTURES, Architecture
from lopt_fast.checkpoint import Checkpoint
from lopt_fast.native_operations import unsupported_on_gpus
from lopt_fast.operations import Decays, ElementMlp, ModelTensors, Operations, Reference, Result, Weights
from lopt_fast.reference import TensorState
from lopt_fast.spec import Spec
from lopt_fast.torch import LearnedOptimizer, architecture_plan, operands, operations, triton_operations
from lopt_fast.verify import load, verify
from tests.helpers import gpu_on_cpu
from tests.test_native_operations import (
    SPECS,
    assert_result_close,
    in_float64,
    random_decays,
    random_tensors,
    random_weights,
)

# ---- where the kernels run ----


def has_kernels(spec: Spec | Architecture) -> bool:
    return isinstance(spec, Spec) or spec.has_kernels


@dataclass(frozen=True)
class Target:
    """Kernels, and the device that they run on."""

    backend: str
    """ "cuda", "triton", or "emulator": the CUDA kernels by csrc/gpu_emulator.cc."""
    device: str = "cuda"
    """PyTorch's name. "cpu": the emulator, or Triton's interpreter where TRITON_INTERPRET is set."""

    def asked(self, spec: Spec | Architecture) -> str:
        """The `backend` to ask for in order to get these kernels, or the reference where there are none."""
        return self.backend if self.device != "cpu" and has_kernels(spec) else "auto"

    def used(self, spec: Spec | Architecture) -> str:
        """The backend that is used then."""
        return self.backend if has_kernels(spec) else "reference"

    def unsupported(self, spec: ElementMlp) -> str | None:
        """None, or why the kernels cannot compute this specification."""
        return (triton_operations.unsupported if self.backend == "triton" else unsupported_on_gpus)(spec)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """From here on tests use this one. CPU tensors are then as if the host could not read them, and optimizers take
        the kernels first."""
        with ExitStack() as stack:
            if self.device == "cpu":
                stack.enter_context(gpu_on_cpu(self.backend))
                for patch in self._in_the_place_of_a_gpu():
                    stack.enter_context(patch)
            _in_use.append(self)
            stack.callback(_in_use.pop)
            yield

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Whatever makes the host wait for the device is an error; on the CPU, whatever reads a tensor."""
        if self.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return

        def read(*_: Any) -> Any:
            raise AssertionError("a step waits for the device")

        with ExitStack() as stack:
            for name in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu"):
                stack.enter_context(mock.patch.object(torch.Tensor, name, read))
            yield

    def _in_the_place_of_a_gpu(self) -> Iterator[Any]:
        """What makes `LearnedOptimizer` choose for CPU tensors as for those on a GPU."""
        yield mock.patch.object(architecture_plan, "HOST", frozenset())
        if self.backend == "triton":
            yield mock.patch.object(operations, "TRITON_DEVICES", ["cpu"])
            return
        there = {
            name: tuple(
                replace(b, devices=("cpu",), missing=lambda ordinal: None) if b.name == "cuda" else b
                for b in found
            )
            for name, found in backends.OPERATIONS.items()
        }
        yield mock.patch.object(backends, "OPERATIONS", there)
        refusals = {"emulator" if name == "cuda" else name: f for name, f in operations.REFUSALS.items()}
        yield mock.patch.object(operations, "REFUSALS", refusals)


EMULATOR, INTERPRETER = Target("emulator", "cpu"), Target("triton", "cpu")

_in_use = [EMULATOR]


def target() -> Target:
    """The one in use."""
    return _in_use[-1]


# ---- arrays, there and back ----


def to_torch(a: Any) -> torch.Tensor:
    """A copy in float32 on the device."""
    return torch.tensor(np.asarray(a), dtype=torch.float32, device=target().device)


def to_numpy(a: torch.Tensor) -> np.ndarray:
    """In float64."""
    return np.asarray(a.detach().cpu().double().numpy())


def tensors_of(arrays: ModelTensors, dtype: torch.dtype = torch.float32) -> ModelTensors:
    """Copies on the device; state in float32."""
    return replace(
        arrays,
        params=[to_torch(p).to(dtype) for p in arrays.params],
        grads=[to_torch(g).to(dtype) for g in arrays.grads],
        states=[TensorState(*map(to_torch, s)) for s in arrays.states],
    )


def arrays_of(result: Result) -> Result:
    return Result(
        [to_numpy(p) for p in result.outputs],
        [TensorState(*map(to_numpy, state)) for state in result.states],
        None if result.messages is None else to_numpy(result.messages),
    )


# ---- the operations ----


def kernels(found_inf: torch.Tensor | None = None) -> Operations:
    """The operations on the device."""
    return operations.implementation(
        target().backend, None if found_inf is None else found_inf.to(target().device)
    )


def run(
    spec: ElementMlp, tensors: ModelTensors, decays: Decays, weights: Weights, multiplier: Any = None,
    found_inf: torch.Tensor | None = None, **options: Any,
) -> Result:  # fmt: skip
    """`element_mlp` on the device, of arrays that need not be there but for `tensors`."""
    return kernels(found_inf).element_mlp(
        spec,
        tensors,
        Decays(*map(to_torch, decays)),
        Weights(tuple(map(to_torch, weights.w)), tuple(map(to_torch, weights.b))),
        None if multiplier is None else to_torch(multiplier),
        **options,
    )


def check(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    per_tensor: tuple[bool, bool],
    apply: bool = True,
    **options: Any,
) -> None:
    """`element_mlp` of SPECS[name] against the definition, and by the kernels unless they refuse the specification.

    per_tensor: as `random_weights` takes it. options: of `element_mlp`.
    """
    spec = SPECS[name]
    arrays = random_tensors(spec, shapes, "float32", apply=apply)
    arguments = random_decays(spec), random_weights(spec, len(shapes), per_tensor)
    multiplier = 1.0 + np.arange(len(shapes)) / 7 if per_tensor[0] else None
    expected = Reference.element_mlp(spec, in_float64(arrays), *arguments, multiplier, **options)
    by_kernels = target().unsupported(spec) is None and spec.normalise_over == "tensor"
    with mock.patch.object(operands, "Reference", None if by_kernels else Reference):
        actual = run(spec, tensors_of(arrays), *arguments, multiplier, **options)
    shown = replace(arrays, apply=apply and not options.get("steps_only", False))
    assert_result_close(arrays_of(actual), expected, shown, "float32", name)


# ---- whole optimizers ----

NAMES = [name for name, kind in ARCHITECTURES.items() if issubclass(kind, Architecture)]
"""Those that are made of operations, and plain array code."""


def random_checkpoint(name: str) -> Checkpoint:
    """Initial meta-parameters, moved a little, so that none is zero."""
    architecture: Any = ARCHITECTURES[name]()
    rng = np.random.default_rng(0)
    theta = architecture.init_theta()
    return Checkpoint(architecture, {k: a + 0.05 * rng.standard_normal(a.shape) for k, a in theta.items()})


def make_optimizer(checkpoint: Checkpoint, params: Sequence[Any], **options: Any) -> LearnedOptimizer:
    named = [(f"weight{i}", p) for i, p in enumerate(params)]
    return LearnedOptimizer(named, checkpoint, lr=0.5, weight_decay=0.1, num_steps=10, **options)


SHAPES: list[tuple[int, ...]] = [(6, 4), (5,), (3, 2, 2)]


def make_parameters(dtype: torch.dtype = torch.float32, device: str | None = None) -> list[Any]:
    """The same numbers everywhere, exact in float32; the last one lies in another order of axes."""
    rng = np.random.default_rng(0)
    starts = [torch.tensor(rng.standard_normal(s).astype(np.float32)) for s in SHAPES]
    starts[2] = starts[2].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return [torch.nn.Parameter(p.to(device or target().device, dtype)) for p in starts]


def set_gradients(params: Sequence[Any], t: int) -> None:
    """The same numbers everywhere."""
    rng = np.random.default_rng(1000 + t)
    for p in params:
        p.grad = torch.tensor(rng.standard_normal(p.shape).astype(np.float32)).to(p.device, p.dtype)


def take_steps(optimizer: Any, params: Sequence[Any], steps: range) -> None:
    for t in steps:
        set_gradients(params, t)
        optimizer.step(loss=1.0 / (t + 1))


def assert_follow(params: Sequence[Any], expected: Sequence[Any]) -> None:
    """float32 parameters that began as `make_parameters` against those of a float64 run: how far they have moved."""
    for p, q, start in zip(params, expected, make_parameters(torch.float64, "cpu"), strict=True):
        moved = to_numpy(q) - to_numpy(start)
        largest = float(np.abs(moved).max())
        error = float(np.abs(to_numpy(p) - to_numpy(q)).max())
        assert error <= 2e-4 * largest + 1e-6, f"{tuple(p.shape)}: off by {error:.2e}, moved by {largest:.2e}"
        assert largest > 0


def check_learned_optimizer(name: str) -> None:
    """Two steps through the public interface, against the definitions in float64; then one that finds an infinity."""
    checkpoint = random_checkpoint(name)
    expected, params = make_parameters(torch.float64, "cpu"), make_parameters()
    take_steps(make_optimizer(checkpoint, expected, backend="reference"), expected, range(2))
    optimizer = make_optimizer(checkpoint, params, backend=target().asked(checkpoint.spec))
    take_steps(optimizer, params, range(2))
    assert set(optimizer.backends.values()) == {target().used(checkpoint.spec)}
    assert_follow(params, expected)

    before, state = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.found_inf, optimizer.grad_scale = (torch.ones(1, device=target().device) for _ in range(2))
    params[0].grad[0, 0] = np.inf
    optimizer.step(loss=1.0)
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)
    for i, entries in optimizer.state_dict()["state"].items():
        for key, a in entries.items():
            assert torch.equal(a, state[i][key]), key


def check_no_waiting(name: str) -> None:
    """The host runs ahead, with the loss, the rate and what torch.amp.GradScaler gives on the device."""
    checkpoint, params = random_checkpoint(name), make_parameters()
    optimizer = make_optimizer(checkpoint, params, backend=target().asked(checkpoint.spec), max_grad_norm=1.0)
    number = torch.ones(1, device=target().device)
    loss, found_inf, grad_scale, lr = (x[0] for x in (0.5 * number, 0.0 * number, 2.0 * number, 0.3 * number))
    take_steps(optimizer, params, range(1))  # makes the state
    optimizer.param_groups[0]["lr"], optimizer.grad_scale, optimizer.found_inf = lr, grad_scale, found_inf
    optimizer.step(loss=loss)  # copies constants to the device
    set_gradients(params, 2)
    before = [p.detach().clone() for p in params]
    with target().no_waiting():
        optimizer.step(loss=loss)
    for p, q in zip(params, before, strict=True):
        assert torch.isfinite(p).all()
        assert not torch.equal(p, q)


def check_state_moves(name: str) -> None:
    """To the CPU, on by the definitions, and back: as without. A deep copy goes on with the same bits."""
    checkpoint = random_checkpoint(name)
    asked = target().asked(checkpoint.spec)
    params, on_cpu, back = make_parameters(), make_parameters(torch.float64, "cpu"), make_parameters()
    optimizer = make_optimizer(checkpoint, params, backend=asked)
    take_steps(optimizer, params, range(2))
    host = make_optimizer(checkpoint, on_cpu, backend="reference")
    other = make_optimizer(checkpoint, back, backend=asked)
    with torch.no_grad():
        for p, q, r in zip(params, on_cpu, back, strict=True):
            q.copy_(p)
            r.copy_(p)
    host.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(host.state_dict())
    for a, q in ((host, on_cpu[0]), (other, back[0])):
        assert all(x.device == q.device for x in a.state[q].values())
        assert a.param_groups[0]["shared"]["step"].device == q.device
    copied, again = copy.deepcopy((optimizer, params))
    for a, group in ((optimizer, params), (host, on_cpu), (other, back), (copied, again)):
        take_steps(a, group, range(2, 4))
    assert_follow(params, on_cpu)
    for p, r, s in zip(params, back, again, strict=True):
        assert torch.equal(p, r)
        assert torch.equal(p, s)


def check_golden(path: Path) -> None:
    """A published trajectory, in float32."""
    at, spec = target(), load(path).replays[0].spec
    report = verify(path, "torch", at.asked(spec), "float32", at.device)
    assert report.rows
    assert all(row.passed and row.error <= row.tolerance for row in report.rows), report.rows
    assert report.backend == at.used(spec)
