"""`LearnedOptimizer` with bfloat16 and float16 parameters on the CPU, by the kernels and by the reference."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import HALF

torch = pytest.importorskip("torch")

import test_torch_architectures as architectures  # noqa: E402
from test_torch import (  # noqa: E402
    CHECKPOINT,
    MEMORY,
    assert_moved,
    assert_same,
    assert_untouched,
    backend,
    make_parameters,
    run,
    set_gradients,
    snapshot,
    values,
)
from torch._dynamo.testing import CompileCounter  # noqa: E402

from lopt_fast import backends, reference  # noqa: E402
from lopt_fast.torch import LearnedOptimizer  # noqa: E402

__all__ = ["backend"]  # a fixture

TYPES = (torch.bfloat16, torch.float16)
half = pytest.mark.parametrize("dtype", TYPES, ids=str)
CLOSE = {torch.bfloat16: {"rtol": 2.0**-7, "atol": 1e-6}, torch.float16: {"rtol": 2.0**-10, "atol": 1e-6}}
"""The last bit: where the order of sums in float32 may differ, what is rounded may lie on two sides of a tie."""


def exact(x: Any) -> np.ndarray:
    """The values in float64."""
    return x.detach().double().numpy().copy()


def assert_rounded(p: Any, expected: np.ndarray, before: np.ndarray) -> None:
    """`p` is `expected` within float32 arithmetic and the rounding of its type."""
    if not p.numel():
        return
    relative, least = HALF[str(p.dtype).removeprefix("torch.")]
    computed = 4 * np.finfo(np.float32).eps * np.abs(before).max() + 1e-4 * np.abs(expected - before).max()
    excess = np.abs(exact(p) - expected) - (relative * np.abs(expected) + least + 1.01 * computed)
    assert excess.max() <= 0, f"{tuple(p.shape)}: off by {excess.max():.3e} more than allowed"


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_follows_the_float64_reference(backend: str, statistics: Any) -> None:
    """One norm over all types; state and steps of each in float32."""
    params = [p for dtype in (*TYPES, torch.float32) for p in make_parameters(dtype=dtype)]
    options = {"lr": 0.5, "weight_decay": 0.1}
    optimizer = LearnedOptimizer(params, CHECKPOINT, statistics=statistics, backend=backend, **options)
    spec = replace(CHECKPOINT.spec, statistics=statistics)
    states = [reference.init_state(spec, exact(p)) for p in params]
    for t in range(5):
        set_gradients(params, t)
        before = [exact(p) for p in params]
        optimizer.step()
        for i, p in enumerate(params):
            delta, states[i] = reference.update(
                spec, CHECKPOINT.theta, before[i], exact(p.grad), states[i], t, **options
            )
            if p.dtype != torch.float32:
                assert_rounded(p, before[i] + delta, before[i])
            if p.numel():
                assert optimizer.state[p]["step"].item() == t + 1
    for p in params:
        entries = optimizer.state[p].items()
        assert all(x.dtype == (torch.int64 if name == "step" else torch.float32) for name, x in entries)


@half
def test_a_model_uses_the_kernels_without_a_warning(dtype: Any) -> None:
    if backends._import_native()[0] is None:
        pytest.skip("no compiled kernels")
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(dtype)
    x = torch.randn(32, 8, dtype=dtype)
    y = x[:, :4].float() * 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = LearnedOptimizer(model.parameters())
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(x).float() - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert optimizer.backends == {f"cpu {str(dtype).removeprefix('torch.')}": "cpu"}
    assert losses[-1] <= 0.5 * losses[0]


@half
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping(backend: str, dtype: Any, max_norm: float) -> None:
    """The norm is that of the gradients as they are stored, formed in float32."""
    params, twins = make_parameters(dtype=dtype), make_parameters(dtype=dtype)
    clipped = LearnedOptimizer(params, CHECKPOINT, backend=backend, max_grad_norm=max_norm)
    scaled = LearnedOptimizer(twins, CHECKPOINT, backend=backend)
    for t in range(2):
        set_gradients(params, t)
        set_gradients(twins, t)
        norm = float(sum(exact(p.grad).__pow__(2).sum() for p in params)) ** 0.5
        scaled.grad_scale = torch.tensor(max(1.0, (norm + 1e-6) / max_norm), dtype=torch.float64)
        clipped.step()
        scaled.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("of_gradient", MEMORY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("of_parameter", MEMORY, ids=lambda f: f.__name__)
@half
def test_strides(backend: str, dtype: Any, of_parameter: Any, of_gradient: Any) -> None:
    """channels_last, transposed, with gaps: as dense, but for the order of sums in float32."""
    plain = make_parameters([(6, 4, 3, 5)], dtype=dtype)
    strided = [torch.nn.Parameter(of_parameter(p.detach())) for p in plain]
    a, b = (LearnedOptimizer(x, CHECKPOINT, backend=backend) for x in (plain, strided))
    for t in range(2):
        set_gradients(plain, t)
        strided[0].grad = of_gradient(plain[0].grad)
        start, before = values(plain), exact(strided[0])
        a.step()
        b.step()
        assert_rounded(strided[0], exact(plain[0]), before)
        assert_moved(start, plain)
        with torch.no_grad():
            strided[0].copy_(plain[0])


@half
def test_parameters_without_gradient_are_skipped(backend: str, dtype: Any) -> None:
    params = make_parameters(dtype=dtype)
    optimizer = LearnedOptimizer(params, CHECKPOINT, weight_decay=0.1, backend=backend)
    set_gradients(params, 0)
    params[3].grad = None
    kept = values([params[3]])
    optimizer.step()
    assert_same(kept, [params[3]])
    run(optimizer, params, range(1, 3))
    assert [optimizer.state[p]["step"].item() for p in params if p.numel()] == [3, 3, 3, 2, 3, 3, 3]


@half
def test_grad_scaler(backend: str, dtype: Any) -> None:
    """Scaled by a power of two: the same bits. A gradient that is not finite: no step at all."""
    results = []
    for enabled in (False, True):
        params = make_parameters(dtype=dtype)
        optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**10, growth_interval=100)
        scaler.scale(torch.zeros(()))  # makes its tensors
        for t in range(3):
            set_gradients(params, t, scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        results.append(params)
    assert_same(*results)
    before, state = values(params), snapshot(optimizer)
    set_gradients(params, 9)
    params[3].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert_same(before, values(params))
    assert_untouched(state, optimizer)


@half
def test_compile(backend: str, dtype: Any) -> None:
    torch._dynamo.reset()
    results = []
    for use in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 8).to(dtype)
        optimizer = LearnedOptimizer(model.parameters(), CHECKPOINT, backend=backend)
        x = torch.randn(16, 4, dtype=dtype)

        def train(model: Any = model, optimizer: Any = optimizer, x: Any = x) -> None:
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()

        counter = CompileCounter()
        call = torch.compile(train, backend=counter) if use else train
        for t in range(3):
            call()
            if t == 1:
                frames = counter.frame_count
        assert counter.frame_count == frames
        results.append(values(list(model.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@half
def test_parameters_that_change_their_type(backend: str, dtype: Any) -> None:
    """p.data = p.data.half() and back: noticed, and the state, float32 all along, goes on."""
    params, twins = make_parameters(), make_parameters()
    a, b = (LearnedOptimizer(x, CHECKPOINT, backend=backend) for x in (params, twins))
    for t, now in enumerate([torch.float32, dtype, dtype, torch.float32]):
        for p in params:
            p.grad, p.data = None, p.data.to(now)
        for p, q in zip(params, twins, strict=True):
            q.data.copy_(p.data)
        set_gradients(params, t)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
        for p, q in zip(params, twins, strict=True):
            assert p.dtype == now
            torch.testing.assert_close(p.float(), q.to(now).float())
            if p.numel():
                assert a.state[p]["momentum"].dtype == torch.float32
                torch.testing.assert_close(a.state[p]["momentum"], b.state[q]["momentum"])
    for p in params:
        p.grad, p.data = None, p.data.double()
    set_gradients(params, 5)
    a.step()
    assert a.state[params[3]]["momentum"].dtype == torch.float64
    assert a.state[params[3]]["step"] == 5


@half
def test_state_dict(backend: str, dtype: Any) -> None:
    """The same bits afterwards; into float32 parameters and back as well, and through deepcopy."""
    params = make_parameters(dtype=dtype)
    optimizer = LearnedOptimizer(params, CHECKPOINT, lr=0.5, backend=backend)
    run(optimizer, params, range(2))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(others, CHECKPOINT, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    floats = [torch.nn.Parameter(p.detach().float()) for p in params]
    wide = LearnedOptimizer(floats, CHECKPOINT, backend=backend)
    wide.load_state_dict(optimizer.state_dict())
    copies, copied = copy.deepcopy((params, optimizer))
    halves = [torch.nn.Parameter(p.detach().to(dtype)) for p in floats]
    back = LearnedOptimizer(halves, CHECKPOINT, lr=0.5, backend=backend)
    back.load_state_dict(wide.state_dict())
    assert_untouched(snapshot(optimizer), back)
    run(optimizer, params, range(2, 4))
    run(other, others, range(2, 4))
    run(copied, copies, range(2, 4))
    assert_same(params, others)
    assert_same(params, copies)


@half
def test_what_is_refused(backend: str, dtype: Any) -> None:
    bad = torch.zeros(3, dtype=dtype)
    with pytest.raises(
        backends.BackendError, match=r"parameter 0 of group 0.*keeps its state in torch.float32"
    ):
        LearnedOptimizer([bad], CHECKPOINT, backend=backend, state_dtype=torch.bfloat16)
    optimizer = LearnedOptimizer([bad], CHECKPOINT, backend=backend, state_dtype=torch.float32)
    assert optimizer.backends == {f"cpu {str(dtype).removeprefix('torch.')}": backend}


@half
def test_parameters_beyond_the_range(backend: str, dtype: Any) -> None:
    """What is not finite stays in its element: an overflow is an infinity, as PyTorch's own optimizers have it."""
    largest = torch.finfo(dtype).max
    p = torch.nn.Parameter(torch.tensor([largest, 1.0, -largest, 0.5], dtype=dtype))
    checkpoint = replace(CHECKPOINT, spec=replace(CHECKPOINT.spec, step_mult=0.0))
    optimizer = LearnedOptimizer([p], checkpoint, lr=1.0, weight_decay=2.5, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), torch.tensor([-torch.inf, -1.5, torch.inf, -0.75], dtype=dtype))


@half
@pytest.mark.parametrize("name", architectures.SOME)
def test_other_architectures_compute_in_float32(backend: str, name: str, dtype: Any) -> None:
    """The same bits as with float32 parameters, rounded to the nearest; mixed types, any strides."""
    if backend == "cpu" and not hasattr(backends._import_native()[0], "element_mlp"):
        pytest.skip("no compiled kernels")
    params = make_parameters(architectures.SHAPES, dtype=dtype)
    params[3] = torch.nn.Parameter(MEMORY[2](params[3].detach()))  # transposed
    params[5] = torch.nn.Parameter(MEMORY[3](params[5].detach()))  # with gaps
    params[2] = torch.nn.Parameter(params[2].detach().float())
    twins = [torch.nn.Parameter(torch.empty_like(p, dtype=torch.float32)) for p in params]
    a, b = (
        architectures.make(name, x, backend=backend, weight_decay=0.1, max_grad_norm=2.0)
        for x in (params, twins)
    )
    assert set(a.backends.values()) == {backend}
    for t in range(3):
        set_gradients(params, t)
        for p, q in zip(params, twins, strict=True):
            q.data.copy_(p.data)
            q.grad = p.grad.float()
        before = values(params)
        a.step(loss=torch.tensor(2.0 - t))
        b.step(loss=torch.tensor(2.0 - t))
        assert_moved(before, values(params))
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.float(), q.to(p.dtype).float(), **CLOSE[dtype])
            for key, value in a.state[p].items():
                torch.testing.assert_close(value, b.state[q][key], rtol=1e-5, atol=1e-7)
