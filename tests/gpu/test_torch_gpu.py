"""`LearnedOptimizer` with small_fc_lopt on a GPU, through CUDA and through Triton; test_architectures_gpu.py has the
other architectures, and published trajectories of all."""

from __future__ import annotations

import copy
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
from helpers import random_theta

torch = pytest.importorskip("torch")

from lopt_fast import backends  # noqa: E402
from lopt_fast.checkpoint import Checkpoint  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402
from lopt_fast.torch import LearnedOptimizer  # noqa: E402

DEVICE = "cuda"
SPEC = Spec(step_mult=0.01)
CHECKPOINT = Checkpoint(SPEC, random_theta(SPEC))
SHAPES = [(), (1,), (5,), (3, 4), (8, 8), (0, 3), (6, 3, 3, 2), (300,), (257, 129), (1023, 512), (70_001,)]
MODEL = [
    (1024, 768),
    (768, 2304),
    (2304,),
    (768, 768),
    (768,),
    (768, 3072),
    (3072,),
    (3072, 768),
    (64, 3, 7, 7),
]


def make(
    shapes: list[Any] = SHAPES, dtype: Any = torch.float32, seed: int = 0, device: Any = DEVICE
) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    return [torch.nn.Parameter(x) for x in tensors]


def set_gradients(params: list[Any], seed: int, scale: float = 1.0) -> None:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def run(optimizer: Any, params: list[Any], steps: range) -> None:
    for t in steps:
        set_gradients(params, t)
        optimizer.step()


def assert_same(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y), f"{tuple(x.shape)} differ by {(x - y).abs().max()}"
        assert torch.isfinite(x).all()


def assert_near(a: list[Any], b: list[Any], rtol: float = 1e-5, atol: float = 1e-5) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach().cpu().float(), y.detach().cpu().float(), rtol=rtol, atol=atol)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the numbers ----


SIZES = [
    *product(["cuda"], ["exact", "lagged"], [2, 4, 8, 16, 32, 64]),
    *[
        ("triton", "exact", 4),
        ("triton", "lagged", 4),
        ("triton", "exact", 32),
    ],  # each takes seconds to compile
]


@pytest.mark.parametrize(("backend", "statistics", "hidden_size"), SIZES, indirect=["backend"])
def test_as_the_cpu_kernels(backend: str, statistics: str, hidden_size: int) -> None:
    """Groups, clipping, weight decay, parameters without a gradient, a group that comes later."""
    spec = Spec(hidden_size=hidden_size, step_mult=0.01)
    checkpoint = Checkpoint(spec, random_theta(spec))
    results = []
    for device, chosen in ((DEVICE, backend), ("cpu", "cpu")):
        params, late = make(device=device), make([(40, 30), (7,)], seed=5, device=device)
        optimizer = LearnedOptimizer(
            [{"params": params[:5], "lr": 0.5, "weight_decay": 0.1}, {"params": params[5:]}],
            checkpoint, statistics=statistics, max_grad_norm=5.0, backend=chosen,
        )  # fmt: skip
        run(optimizer, params, range(2))
        params[3].grad = params[8].grad = None
        optimizer.step()
        optimizer.add_param_group({"params": late, "lr": 0.3})
        run(optimizer, [*params, *late], range(3, 5))
        assert [optimizer.state[p]["step"].item() for p in params] == [5, 5, 5, 4, 5, 5, 5, 5, 4, 5, 5]
        results.append([*params, *late])
    assert_near(*results)


VARIANTS = [
    *product(["cuda"], ["elementwise", "matmul", "matmul_bfloat16"], [4, 32]),
    *[("triton", "elementwise", 4), ("triton", "matmul", 32)],
]


@pytest.mark.parametrize(("backend", "mlp", "hidden_size"), VARIANTS, indirect=["backend"])
def test_variants_of_the_network(backend: str, mlp: str, hidden_size: int) -> None:
    spec = Spec(hidden_size=hidden_size, step_mult=0.01)
    checkpoint = Checkpoint(spec, random_theta(spec))
    results = []
    for device, chosen, variant in ((DEVICE, backend, mlp), ("cpu", "cpu", "automatic")):
        params = make(device=device)
        run(LearnedOptimizer(params, checkpoint, backend=chosen, mlp=variant), params, range(3))
        results.append(params)
    tolerance = 2e-3 if mlp == "matmul_bfloat16" else 1e-5
    assert_near(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_half_types(backend: str, dtype: Any, state_dtype: Any) -> None:
    """As float32 parameters that are rounded after each step."""
    params, twins = make(dtype=dtype), make(dtype=dtype)
    twins = [torch.nn.Parameter(p.detach().float().cpu()) for p in twins]
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend, state_dtype=state_dtype)
    twin = LearnedOptimizer(twins, CHECKPOINT, backend="cpu")
    for t in range(3):
        set_gradients(params, t)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.float().cpu()
        optimizer.step()
        twin.step()
        for q in twins:
            q.data = q.data.to(dtype).float()
    eps = float(torch.finfo(dtype).eps)
    assert_near(params, twins, rtol=4 * eps, atol=1e-4 if state_dtype is None else 5e-3)
    assert optimizer.state[params[3]]["momentum"].dtype == (state_dtype or torch.float32)
    assert optimizer.state[params[3]]["factored_row"].dtype == torch.float32


def test_memory_order(backend: str) -> None:
    """Other strides of parameters and gradients, offsets that are not aligned, negated and expanded gradients."""
    plain = make([(6, 4, 3, 5), (6, 4, 3, 5), (6, 4, 3, 5), (33,)])
    strided = [
        plain[0].detach().clone().contiguous(memory_format=torch.channels_last),
        torch.empty(12, 4, 3, 5, device=DEVICE)[::2].copy_(plain[1].detach()),
        plain[2].detach().clone(),
        torch.empty(40, device=DEVICE)[3:36].copy_(plain[3].detach()),
    ]
    params = [torch.nn.Parameter(x) for x in strided]
    a, b = (LearnedOptimizer(x, CHECKPOINT, backend=backend) for x in (plain, params))
    for t in range(3):
        set_gradients(plain, t)
        plain[0].grad = plain[0].grad[:, :1].expand(6, 4, 3, 5)
        for p, q in zip(plain, params, strict=True):
            q.grad = p.grad.clone()
        params[0].grad = plain[0].grad
        params[1].grad = plain[1].grad.contiguous(memory_format=torch.channels_last)
        params[2].grad = torch._neg_view(-plain[2].grad)
        a.step()
        b.step()
    assert_near(plain, params)


# ---- the same bits ----


def test_two_runs_give_the_same_bits(backend: str) -> None:
    results = []
    for schedule in ("automatic", "automatic", "single_launch", "phased"):
        params = make(MODEL)
        optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend, max_grad_norm=1.0)
        optimizer._schedule = schedule
        run(optimizer, params, range(3))
        results.append([*params, *(x for p in params for x in optimizer.state[p].values())])
    for other in results[1:]:
        assert_same(results[0], other)


def test_side_streams(backend: str) -> None:
    results = []
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            params = make(MODEL)
            optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
            for t in range(3):
                set_gradients(params, t)
                torch.cuda._sleep(10_000_000)  # what follows on another stream would be too early
                for p in params:
                    p.grad.mul_(2.0)
                optimizer.step()
            kept = [p.detach().clone() for p in params]
        stream.synchronize()
        results.append(kept)
    assert_same(*results)


def test_state_dicts(backend: str) -> None:
    """To the CPU and back: the same bits as without."""
    params = make()
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    run(optimizer, params, range(3))
    on_cpu = [torch.nn.Parameter(p.detach().cpu().clone()) for p in params]
    host = LearnedOptimizer(on_cpu, CHECKPOINT)
    host.load_state_dict(optimizer.state_dict())
    assert host.state[on_cpu[3]]["step"].device.type == "cpu"
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(others, CHECKPOINT, backend=backend)
    other.load_state_dict(copy.deepcopy(host.state_dict()))
    assert other.state[others[3]]["step"].device == others[3].device
    for o, group in ((optimizer, params), (other, others), (host, on_cpu)):
        run(o, group, range(3, 5))
    assert_same(params, others)
    assert_near(params, on_cpu)
    again, copied = copy.deepcopy((params, optimizer))
    run(optimizer, params, range(5, 6))
    run(copied, again, range(5, 6))
    assert_same(params, again)


# ---- nothing waits, graphs ----


def test_a_step_does_not_wait(backend: str) -> None:
    params = make()
    lr = torch.tensor(0.5, device=DEVICE)
    optimizer = LearnedOptimizer(params, CHECKPOINT, lr=lr, backend=backend, max_grad_norm=1.0)
    run(optimizer, params, range(1))
    set_gradients(params, 1, 8.0)
    optimizer.grad_scale = torch.tensor(8.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
    with no_waiting():
        optimizer.step()
        lr.mul_(0.5)
        optimizer.step()
    twins = make(device="cpu")
    twin = LearnedOptimizer(twins, CHECKPOINT, lr=0.5, backend="cpu", max_grad_norm=1.0)
    run(twin, twins, range(2))
    twin.param_groups[0]["lr"] = 0.25
    twin.step()
    assert_near(params, twins)


def test_grad_scaler(backend: str) -> None:
    params, twins = make(), make()
    optimizer, twin = (LearnedOptimizer(x, CHECKPOINT, backend=backend) for x in (params, twins))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2)
    scaler.scale(torch.zeros((), device=DEVICE))
    for t in range(4):
        set_gradients(params, t, scaler.get_scale())
        if t == 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        set_gradients(twins, t)
        twin.step()
    assert_same(params, twins)
    set_gradients(params, 9)
    params[3].grad[0, 0] = math.inf
    state = copy.deepcopy(optimizer.state_dict()["state"])
    scaler.step(optimizer)
    scaler.update()
    assert_same(params, twins)
    for i, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(x, state[i][key]) for key, x in entries.items())
    assert scaler.get_scale() < 2.0**12


def _warm_up(optimizer: Any, params: list[Any]) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(optimizer, params, range(1))
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_captured_steps_advance(backend: str, statistics: str) -> None:
    """Step counter, learning rate, clipping and found_inf of a replay are those of its own time: the bits of eager."""
    (params, twins), lrs = (make(MODEL), make(MODEL)), [torch.tensor(0.5, device=DEVICE) for _ in range(2)]
    optimizer, twin = (
        LearnedOptimizer(
            x, CHECKPOINT, lr=lr, backend=backend, max_grad_norm=100.0, statistics=statistics,
        )
        for x, lr in zip((params, twins), lrs, strict=True)
    )  # fmt: skip
    found = [torch.tensor(0.0, device=DEVICE) for _ in range(2)]
    optimizer.found_inf, twin.found_inf = found
    _warm_up(optimizer, params)
    run(twin, twins, range(1))
    static = [p.grad for p in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for t in range(1, 6):
        set_gradients(twins, t, float(10.0 ** (t - 3)))  # clipped and not
        for g, p in zip(static, twins, strict=True):
            g.copy_(p.grad)
        for lr, inf in zip(lrs, found, strict=True):
            lr.mul_(0.9)
            inf.fill_(1.0 if t == 3 else 0.0)
        graph.replay()
        twin.step()
        assert_same(params, twins)
    assert all(optimizer.state[p]["step"] == 5 for p in params)
    run(optimizer, params, range(6, 7))  # eager again
    run(twin, twins, range(6, 7))
    assert_same(params, twins)


def test_captured_training(backend: str) -> None:
    """Forward, backward and step in one graph, gradients from the memory of the graph."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)).cuda()
        optimizer = LearnedOptimizer(model.parameters(), CHECKPOINT, backend=backend)
        x = torch.randn(32, 64, device=DEVICE)

        def train(model: Any = model, optimizer: Any = optimizer, x: Any = x) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                train()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train()
            train = graph.replay
        for _ in range(4):
            train()
        results.append([p.detach().clone() for p in model.parameters()])
    assert_near(*results)


def test_first_step_cannot_be_captured(backend: str) -> None:
    params = make([(3, 4)])
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    set_gradients(params, 0)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capture the first step"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    assert not optimizer.state
    optimizer.step()


def test_compile(backend: str) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).cuda()
        optimizer = LearnedOptimizer(model.parameters(), CHECKPOINT, backend=backend)
        x = torch.randn(16, 4, device=DEVICE)

        def train(x: Any, model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        step = torch.compile(train, backend="aot_eager") if compiled else train
        for _ in range(4):
            step(x)
        results.append(list(model.parameters()))
    assert_near(*results)


# ---- devices ----


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_cpu_and_gpu_in_one_optimizer(backend: str) -> None:
    results = []
    for device in (DEVICE, "cpu"):
        params = [*make(device=device), *make(seed=1, device="cpu")]
        optimizer = LearnedOptimizer(params, CHECKPOINT, max_grad_norm=5.0)
        run(optimizer, params, range(3))
        results.append(params)
    assert_near(*results)


def test_several_devices(backend: str) -> None:
    """One norm over all of them, and the host does not wait."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only: this needs two")
    results = []
    for devices in (("cuda:0", "cuda:1"), ("cuda:0", "cuda:0")):
        params = [*make(MODEL, device=devices[0]), *make(MODEL, seed=1, device=devices[1])]
        optimizer = LearnedOptimizer(params, CHECKPOINT, max_grad_norm=5.0, backend=backend)
        run(optimizer, params, range(1))
        for t in (1, 2):
            set_gradients(params, t)
            with no_waiting():
                optimizer.step()
        assert torch.cuda.current_device() == 0
        results.append(params)
    assert_near(*results)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_float64_goes_to_the_reference(backend: str) -> None:
    backends._warned.clear()
    params, twins = make(dtype=torch.float64), make(dtype=torch.float64, device="cpu")
    with pytest.warns(backends.BackendWarning, match="not float64"):
        optimizer = LearnedOptimizer(params, CHECKPOINT, max_grad_norm=1.0)
    run(optimizer, params, range(2))
    run(LearnedOptimizer(twins, CHECKPOINT, max_grad_norm=1.0), twins, range(2))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-9, atol=1e-10)


def test_more_than_2_to_the_31_elements(backend: str) -> None:
    """All rows alike, so each must move as the rows of a small tensor do."""
    rows, columns = 46_341, 46_342
    needed = rows * columns * 2 * 7 + (2 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    generator = torch.Generator(DEVICE).manual_seed(0)
    row, gradient = torch.randn(2, 1, columns, device=DEVICE, generator=generator).to(torch.bfloat16)
    results = []
    for count in (16, rows):
        p = torch.nn.Parameter(row.repeat(count, 1))
        p.grad = gradient.repeat(count, 1)
        optimizer = LearnedOptimizer([p], CHECKPOINT, backend=backend, state_dtype=torch.bfloat16)
        optimizer.step()
        torch.cuda.synchronize()
        results.append(p.detach())
        momentum = optimizer.state[p]["momentum"]
        for first in (momentum[0, 0], momentum[2, -1]):
            assert torch.isfinite(first).all()
            assert bool((first != 0).any())
        del optimizer, momentum
        p.grad = None
    small, big = results
    assert bool((small[0] != row[0]).any())
    for start in range(0, rows, 4096):
        part = big[start : start + 4096].float()
        assert bool(((part - small[:1].float()).abs() <= 0.02 * small[:1].float().abs() + 1e-3).all())


SANITIZED = """
import torch
from lopt_fast.torch import LearnedOptimizer
shapes = [(), (5,), (33, 17), (4, 3, 3, 2), (300,), (70, 130)]
params = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in shapes]

def steps(schedule, *arguments, **options):
    optimizer = LearnedOptimizer(params, *arguments, max_grad_norm=1.0, backend={backend!r}, **options)
    optimizer._schedule = schedule
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step(loss=1.0)

for statistics in ("exact", "lagged"):
    for schedule in ("single_launch", "phased"):
        steps(schedule, statistics=statistics)
for name in ("celo", "rnn_fc_lopt", "nn_adam"):
    steps("automatic", name, num_steps=10)
torch.cuda.synchronize()
assert all(torch.isfinite(p).all() for p in params)
"""


# Barriers and shared memory of Triton's kernels are its compiler's.
TOOLS = [*product(["cuda"], ["memcheck", "racecheck", "synccheck"]), ("triton", "memcheck")]


@pytest.mark.parametrize(("backend", "tool"), TOOLS, indirect=["backend"])
def test_compute_sanitizer(backend: str, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("no compute-sanitizer: it comes with the CUDA toolkit, put it on the PATH")
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5",
        sys.executable, "-c", SANITIZED.format(backend=backend),
    ]  # fmt: skip
    # PyTorch's blocks of memory would hide what is read beyond a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
