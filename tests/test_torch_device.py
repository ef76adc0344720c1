"""`LearnedOptimizer` on a device, without one: CPU tensors as if the host could not read them, GPU kernels emulated.

The contract of test_torch.py is run through GPU kernels, float64 parameters of the same optimizer through the CPU
kernels beside them; then what is particular to devices.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_update_close, gpu_on_cpu, random_theta

torch = pytest.importorskip("torch")

import test_torch  # noqa: E402
from test_torch import (  # noqa: E402
    CHECKPOINT,
    SHAPES,
    assert_moved,
    assert_same,
    assert_untouched,
    make_parameters,
    run,
    set_gradients,
    snapshot,
    values,
)
from test_torch_golden import FILES, SHORT, needs_golden  # noqa: E402
from test_torch_golden import check as check_golden  # noqa: E402

from lopt_fast import backends, reference  # noqa: E402
from lopt_fast.checkpoint import Checkpoint  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402
from lopt_fast.torch import LearnedOptimizer, shares  # noqa: E402
from lopt_fast.verify import verify  # noqa: E402

pytestmark = pytest.mark.skipif(
    not hasattr(backends._import_native()[0], "gpu_emulator"), reason="no compiled kernels, or no emulator"
)

OTHERWISE = {
    "test_types_that_are_not_supported",  # half types are
    "test_unusable_gradients_change_nothing",  # likewise; see test_unusable_gradients
    "test_unusable_learning_rate_changes_nothing",  # a tensor on a device is not read
    "test_grad_scaler",  # found_inf is not read: state is there after a step that was skipped
    "test_state_of_one_optimizer_mixes_kernels_and_reference",  # chooses by itself
    "test_fallback_warns_once_and_force_refuses",
}
for _name, _test in vars(test_torch).items():
    if _name.startswith("test_") and callable(_test) and _name not in OTHERWISE:
        globals()[_name] = _test


@pytest.fixture
def backend() -> Iterator[str]:
    """ "auto": float32 and half types to the emulated device, float64 to the CPU kernels."""
    with gpu_on_cpu("emulator"):
        yield "auto"


def matmul_checkpoint(hidden_size: int = 4, **fields: Any) -> Checkpoint:
    spec = Spec(hidden_size=hidden_size, step_mult=0.01, **fields)
    return Checkpoint(spec, random_theta(spec))


def test_the_contract_is_all_here(backend: str) -> None:
    names = {name for name in vars(test_torch) if name.startswith("test_")}
    assert names >= OTHERWISE
    assert names - OTHERWISE <= globals().keys()
    assert LearnedOptimizer(make_parameters(), CHECKPOINT).backends == {"cpu float32": "emulator"}


# ---- the numbers ----


@needs_golden
@pytest.mark.parametrize("path", SHORT, ids=lambda f: f.stem)
def test_golden_files(backend: str, path: Any) -> None:
    report = verify(path, "torch", "emulator", "float32")
    assert report.backend == "emulator"
    assert report.rows
    assert all(row.passed and row.error <= row.tolerance for row in report.rows), report.rows


@needs_golden
@pytest.mark.parametrize("name", ["adafac_h16", "adafac_h32", "adafac_h8_negdecay"])
def test_golden_files_on_tensor_cores(backend: str, name: str) -> None:
    """Tensors of few elements, whose terms may cancel, are the hardest."""
    path = next(f for f in FILES if f.stem == name)
    check_golden(path, "auto", "float32", largest=200, mlp="matmul")


@pytest.mark.parametrize("schedule", ["single_launch", "phased"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_the_same_bits_for_each_schedule(backend: str, schedule: str, statistics: str) -> None:
    results = []
    for chosen in ("automatic", schedule):
        params = make_parameters([*SHAPES, (70, 90)])
        optimizer = LearnedOptimizer(params, CHECKPOINT, statistics=statistics, max_grad_norm=0.5)
        optimizer._schedule = chosen
        run(optimizer, params, range(3))
        results.append(params + [x for p in params for x in optimizer.state[p].values()])
    assert_same(*results)


@pytest.mark.parametrize("mlp", ["elementwise", "matmul"])
def test_variants_of_the_network(backend: str, mlp: str) -> None:
    params = make_parameters([(5,), (8, 24)])
    optimizer = LearnedOptimizer(params, CHECKPOINT, mlp=mlp)
    _assert_follows_the_oracle(params, optimizer, CHECKPOINT, "float32", steps=2)


def _assert_follows_the_oracle(
    params: list[Any], optimizer: Any, checkpoint: Checkpoint, dtype: str, steps: int, loose: float = 0.0
) -> None:
    """Each step against the float64 reference from the same parameters, state in float64 all along.

    `loose`: additional error allowed, relative to the largest update (storage types).
    """
    theta = {k: v.astype(np.float64) for k, v in checkpoint.theta.items()}
    states = [reference.init_state(checkpoint.spec, p.detach().double().numpy()) for p in params]
    for t in range(steps):
        set_gradients(params, t)
        before = [p.detach().double().numpy() for p in params]
        optimizer.step()
        for i, p in enumerate(params):
            g = p.grad.double().numpy()
            delta, states[i] = reference.update(checkpoint.spec, theta, before[i], g, states[i], t)
            actual = p.detach().double().numpy() - before[i]
            if dtype == "float32" and not loose:
                assert_update_close(actual, delta, before[i], dtype, f"{i} {tuple(p.shape)}")
            elif p.numel():
                eps = float(torch.finfo(p.dtype).eps)
                bound = eps * np.abs(before[i] + delta) + (1e-4 + loose) * np.abs(delta).max() + 1e-7
                assert (np.abs(actual - delta) <= bound).all(), f"{i} {tuple(p.shape)} step {t}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_have_float32_state(backend: str, dtype: Any) -> None:
    params = make_parameters(dtype=dtype)
    optimizer = LearnedOptimizer(params, CHECKPOINT)
    _assert_follows_the_oracle(params, optimizer, CHECKPOINT, "half", steps=3)
    for p in params:
        types = {key: x.dtype for key, x in optimizer.state[p].items()}
        assert types.pop("step") == torch.int64
        assert set(types.values()) == {torch.float32}
    # not rounded to the type of the parameter on the way
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(others, CHECKPOINT)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, params, range(3, 5))
    run(other, others, range(3, 5))
    assert_same(params, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_state(backend: str, dtype: Any) -> None:
    params = make_parameters([(5,), (12, 20)], dtype=dtype)
    optimizer = LearnedOptimizer(params, CHECKPOINT, state_dtype=torch.bfloat16)
    _assert_follows_the_oracle(params, optimizer, CHECKPOINT, "half", steps=3, loose=0.05)
    for p in params:
        types = {key: x.dtype for key, x in optimizer.state[p].items()}
        assert types["momentum"] == types["second_moment"] == torch.bfloat16
        assert types["factored_row"] == torch.float32
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(others, CHECKPOINT, state_dtype=torch.bfloat16)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, range(3, 5))
    run(other, others, range(3, 5))
    assert_same(params, others)  # stochastic rounding, and yet the same bits


def test_state_dtype_needs_gpu_kernels(backend: str) -> None:
    params = make_parameters([(3,)], dtype=torch.float64)
    with pytest.raises(backends.BackendError, match=r"parameter 0 .*backend 'cpu'.*cuda and triton"):
        LearnedOptimizer(params, CHECKPOINT, state_dtype=torch.bfloat16)
    with pytest.raises(backends.BackendError, match="'reference'"):
        LearnedOptimizer(make_parameters(), CHECKPOINT, state_dtype=torch.bfloat16, backend="reference")
    for wrong in (torch.float16, torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match="state_dtype="):
            LearnedOptimizer(make_parameters(), CHECKPOINT, state_dtype=wrong)
    with pytest.raises(ValueError, match="mlp='fast'"):
        LearnedOptimizer(make_parameters(), CHECKPOINT, mlp="fast")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_through_the_reference(backend: str, dtype: Any) -> None:
    params, twins = make_parameters(dtype=dtype), make_parameters(dtype=dtype)
    a = LearnedOptimizer(params, CHECKPOINT, backend="reference")
    b = LearnedOptimizer(twins, CHECKPOINT)
    run(a, params, range(2))
    run(b, twins, range(2))
    assert a.state[params[3]]["momentum"].dtype == torch.float32
    for p, q in zip(params, twins, strict=True):
        eps = float(torch.finfo(dtype).eps)
        torch.testing.assert_close(p, q, rtol=2 * eps, atol=1e-4)


def test_types_of_gradients_and_parameters(backend: str) -> None:
    with pytest.raises(ValueError, match="complex64: float32, float64, bfloat16 and float16 are"):
        LearnedOptimizer([torch.zeros(3, dtype=torch.complex64)], CHECKPOINT)
    with pytest.raises(backends.BackendError, match="float32, bfloat16 and float16, not float64"):
        LearnedOptimizer(make_parameters(dtype=torch.float64), CHECKPOINT, backend="emulator")
    wide = matmul_checkpoint(hidden_size=65)
    with pytest.raises(backends.BackendError, match="hidden_size 2 to 64, not 65"):
        LearnedOptimizer(make_parameters(), wide, backend="emulator")
    assert LearnedOptimizer(make_parameters(), wide).backends == {"cpu float32": "cpu"}


# ---- numbers that lie on the device ----


def _without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing may be read by the host."""

    def read(*_: Any) -> Any:
        raise AssertionError("a step waits for the device")

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, read)


def test_no_step_waits_for_the_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_parameters()
    lr = torch.tensor(0.5)
    optimizer = LearnedOptimizer(params, CHECKPOINT, lr=lr, weight_decay=torch.tensor(0.1), max_grad_norm=0.5)
    run(optimizer, params, range(1))
    set_gradients(params, 1, 8.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    with monkeypatch.context() as patch:
        _without_reading(patch)
        optimizer.step()
        lr.fill_(0.25)
        optimizer.step()
    twins = make_parameters()
    twin = LearnedOptimizer(twins, CHECKPOINT, lr=0.5, weight_decay=0.1, max_grad_norm=0.5, backend="cpu")
    run(twin, twins, range(2))
    twin.param_groups[0]["lr"] = 0.25
    twin.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_types_of_learning_rates(backend: str, dtype: Any) -> None:
    params, twins = make_parameters(), make_parameters()
    run(LearnedOptimizer(params, CHECKPOINT, lr=torch.tensor(2, dtype=dtype)), params, range(2))
    run(LearnedOptimizer(twins, CHECKPOINT, lr=2.0), twins, range(2))
    assert_same(params, twins)
    optimizer = LearnedOptimizer(params, CHECKPOINT)
    optimizer.param_groups[0]["lr"] = torch.ones(2)
    with pytest.raises(ValueError, match="lr of parameter group 0"):
        optimizer.step()
    with pytest.raises(ValueError, match="lr=-1"):
        LearnedOptimizer(params, CHECKPOINT, lr=torch.tensor(-1.0))  # read where nothing is in a hurry


def test_grad_scaler(backend: str) -> None:
    """A gradient that is not finite: nothing is written, no step is counted, without the host knowing."""
    params, twins = make_parameters(), make_parameters()
    optimizer, twin = LearnedOptimizer(params, CHECKPOINT), LearnedOptimizer(twins, CHECKPOINT)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scaler.scale(torch.zeros(()))
    set_gradients(params, 0)
    params[3].grad[0, 0] = math.inf
    before = values(params)
    scaler.step(optimizer)
    scaler.update()
    assert_same(before, values(params))
    assert all(float(x.abs().sum()) == 0 for p in params for x in optimizer.state[p].values())
    for t in range(4):
        set_gradients(params, t, scaler.get_scale())
        if t % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        set_gradients(twins, t)
        twin.step()
    assert_same(params, twins)
    state = snapshot(optimizer)
    set_gradients(params, 9)
    params[0].grad.fill_(math.nan)
    scaler.step(optimizer)
    assert_untouched(state, optimizer)
    assert_same(params, twins)


def test_grad_scaler_with_strided_parameters(backend: str) -> None:
    """What is copied for the step and back stays as it was."""
    p = torch.nn.Parameter(test_torch._strided(torch.randn(5, 6)))
    optimizer = LearnedOptimizer([p], CHECKPOINT)
    set_gradients([p], 0)
    before = p.detach().clone()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(before, p)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert_moved([before], [p])


# ---- several shares ----


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6])
def test_shares_have_one_norm_and_skip_together(backend: str, max_norm: float | None) -> None:
    """Emulated device and CPU kernels beside each other, as the CPU kernels alone."""

    def make(forced: str) -> tuple[list[Any], Any]:
        params = [*make_parameters(), *make_parameters(dtype=torch.float64, seed=1)]
        groups = [{"params": params[:10]}, {"params": params[10:], "lr": torch.tensor(0.25)}]
        return params, LearnedOptimizer(groups, CHECKPOINT, max_grad_norm=max_norm, backend=forced)

    (params, optimizer), (twins, twin) = make("auto"), make("cpu")
    assert optimizer.backends == {"cpu float32": "emulator", "cpu float64": "cpu"}
    for t in range(3):
        for both, o in ((params, optimizer), (twins, twin)):
            set_gradients(both, t, 64.0)
            o.grad_scale, o.found_inf = torch.tensor(64.0), torch.tensor(float(t == 1))
            o.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"] == twin.state[q]["step"] == 2


def test_nothing_is_written_if_one_share_does_not_fit(backend: str) -> None:
    params = [*make_parameters(), *make_parameters(dtype=torch.float64, seed=1)]
    optimizer = LearnedOptimizer(params, CHECKPOINT)
    run(optimizer, params, range(2))
    for i in (3, 11):
        set_gradients(params, 2)
        good, params[i].grad = params[i].grad, params[i].grad.to_sparse()
        before, state = values(params), snapshot(optimizer)
        with pytest.raises(ValueError, match=f"parameter {i} .*sparse|gradient of parameter {i} "):
            optimizer.step()
        assert_same(before, values(params))
        assert_untouched(state, optimizer)
        params[i].grad = good
    run(optimizer, params, range(3))


def test_clipping_without_a_share_on_the_host(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with several devices: one norm over all of them, the factor stays on the device."""
    from lopt_fast.torch import plan

    params, twins = make_parameters(), make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, max_grad_norm=0.5)
    run(optimizer, params, range(1))
    share = optimizer._plan._shares[0]

    class Empty(shares.Share):
        on_host = False

        def begin(self, parameter_lists: Any, state: Any) -> bool:
            return True

        def run(self, numbers: Any) -> list[Any]:
            assert isinstance(numbers.grad_scale, torch.Tensor)
            assert numbers.max_grad_norm is None
            return []

        def end(self) -> None:
            pass

    optimizer._plan._shares = [share, Empty()]
    set_gradients(params, 1, 4.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    with monkeypatch.context() as patch:
        _without_reading(patch)
        optimizer.step()
    assert plan.Plan is type(optimizer._plan)
    run(LearnedOptimizer(twins, CHECKPOINT, max_grad_norm=0.5), twins, range(2))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_parameters_that_change_their_backend(backend: str) -> None:
    """model.double() and back: the state moves, the trajectory goes on."""
    params, twins = make_parameters([(3, 4), (5,)]), make_parameters([(3, 4), (5,)])
    a, b = LearnedOptimizer(params, CHECKPOINT), LearnedOptimizer(twins, CHECKPOINT)
    for t, dtype in enumerate([torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float32]):
        for p in params:
            p.data, p.grad = p.data.to(dtype), None
        set_gradients(params, t)
        a.step()
        set_gradients(twins, t)
        b.step()
        assert a.state[params[0]]["step"] == t + 1
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.02)


def test_backend_can_be_changed(backend: str) -> None:
    results = []
    for sequence in (("emulator",) * 4, ("emulator", "cpu", "reference", "auto")):
        params = make_parameters()
        optimizer = LearnedOptimizer(params, CHECKPOINT, max_grad_norm=1.0)
        for t, name in enumerate(sequence):
            optimizer.backend = name
            run(optimizer, params, range(t, t + 1))
            expected = "emulator" if name == "auto" else name
            assert optimizer.backends == {"cpu float32": expected}
            assert f"cpu float32: {expected}" in repr(optimizer)
        assert all(optimizer.state[p]["step"] == 4 for p in params)
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    optimizer.backend = "gpu-farm"
    with pytest.raises(backends.BackendError, match="gpu-farm"):
        optimizer.step()
    assert "gpu-farm" in repr(optimizer)


@pytest.mark.parametrize("source", ["cpu", "emulator", "reference"])
@pytest.mark.parametrize("target", ["cpu", "emulator"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_state_dicts_go_between_backends(backend: str, source: str, target: str, statistics: str) -> None:
    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=source, statistics=statistics)
    run(optimizer, params, range(3))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(others, CHECKPOINT, backend=target, statistics=statistics)
    other.load_state_dict(test_torch._through_file(optimizer.state_dict()))
    run(optimizer, params, range(3, 5))
    run(other, others, range(3, 5))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- errors, captures, memory ----


def test_unusable_gradients(backend: str) -> None:
    def half(p: Any) -> None:
        p.grad = None
        p.grad = p.detach().half()

    def sparse(p: Any) -> None:
        p.grad = torch.zeros(5).to_sparse()

    def overlapping(p: Any) -> None:
        p.data = torch.zeros(1).expand(5)

    for steps in (0, 2):
        for match, spoil in (("'bias'.*sparse", sparse), ("'bias'.*overlaps", overlapping)):
            params = make_parameters([(3, 4), (5,), (2, 2)])
            named = list(zip(["weight", "bias", "other"], params, strict=True))
            optimizer = LearnedOptimizer(named, CHECKPOINT)
            run(optimizer, params, range(steps))
            set_gradients(params, steps)
            spoil(params[1])
            before, state = values(params), snapshot(optimizer)
            with pytest.raises(ValueError, match=match):
                optimizer.step()
            assert_same(before, values(params))
            assert_untouched(state, optimizer)


def test_no_plan_is_made_in_a_capture(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lopt_fast.torch import device

    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT)
    set_gradients(params, 0)
    with monkeypatch.context() as patch:
        patch.setattr(device, "capturing", lambda _: True)
        with pytest.raises(RuntimeError, match="capture the first step"):
            optimizer.step()
    assert not optimizer.state
    optimizer.step()
    held = dict(optimizer._memory._scratch)
    with monkeypatch.context() as patch:
        patch.setattr(device, "capturing", lambda _: True)
        optimizer.step()  # with memory of the graph
        optimizer.backend = "reference"
        with pytest.raises(RuntimeError, match="capture"):
            optimizer.step()
    assert optimizer._memory._scratch.keys() == held.keys()
    assert all(optimizer._memory._scratch[key] is x for key, x in held.items())
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_kernels_run_on_the_current_stream_of_their_device(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lopt_fast.torch import device

    inside: list[torch.device] = []

    @contextmanager
    def guard(where: torch.device) -> Iterator[None]:
        inside.append(where)
        yield
        inside.pop()

    def stream(where: torch.device) -> int:
        assert inside == [where]
        return 77

    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT)
    monkeypatch.setattr(device, "guard", guard)
    monkeypatch.setattr(device, "stream", stream)
    run(optimizer, params, range(1))
    assert not inside
    assert [handle for _, handle in optimizer._memory._scratch] == [77]  # memory is for one stream


def test_memory_is_kept(backend: str) -> None:
    """What a captured graph refers to does not go with a plan."""
    params = make_parameters([(64, 64)])
    optimizer = LearnedOptimizer(params, CHECKPOINT)
    run(optimizer, params, range(1))
    (theta,) = optimizer._memory._flat.values()
    (scratch,) = optimizer._memory._scratch.values()
    assert scratch.data_ptr() % 256 == 0
    optimizer._plan = None
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, range(1))
    gc.collect()
    assert next(iter(optimizer._memory._flat.values())) is theta
    assert next(iter(optimizer._memory._scratch.values())) is scratch


def test_momenta_are_aligned(backend: str) -> None:
    params = make_parameters([(5,), (3, 11)])
    optimizer = LearnedOptimizer(params, CHECKPOINT, state_dtype=torch.bfloat16)
    run(optimizer, params, range(1))
    assert [optimizer.state[p]["momentum"].stride(0) for p in params] == [8, 40]


def test_many_parameters_in_one_step(backend: str) -> None:
    """More than a table of the kernels holds."""
    params = make_parameters([(3, 2), (4,)] * 350)
    twins = make_parameters([(3, 2), (4,)] * 350)
    run(LearnedOptimizer(params, CHECKPOINT, max_grad_norm=1.0), params, range(2))
    run(LearnedOptimizer(twins, CHECKPOINT, max_grad_norm=1.0, backend="cpu"), twins, range(2))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- Triton ----

TRITON = """
import torch
from helpers import gpu_on_cpu
from test_torch import CHECKPOINT, make_parameters, run, set_gradients
from lopt_fast.torch import LearnedOptimizer

def train(backend, **options):
    params = make_parameters([(5,), (0, 3), (6, 7)])
    optimizer = LearnedOptimizer(
        params, CHECKPOINT, lr=torch.tensor(0.5), weight_decay=0.1, max_grad_norm=0.5, backend=backend, **options
    )
    for t in range(3):
        set_gradients(params, t, 8.0)
        if t == 2:
            params[0].grad = None
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(t == 1))
        optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    return params, optimizer

with gpu_on_cpu("triton"):
    params, optimizer = train("triton")
    assert optimizer.backends == {"cpu float32": "triton"}
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(others, CHECKPOINT, max_grad_norm=0.5, backend="cpu")
    other.load_state_dict(optimizer.state_dict())
    try:
        LearnedOptimizer(params, CHECKPOINT, backend="triton", mlp="matmul_bfloat16")
    except RuntimeError as error:
        assert "matmul_bfloat16" in str(error), error
    else:
        raise AssertionError("Triton has no matmul_bfloat16")
    run(optimizer, params, range(3, 4))
twins, twin = train("cpu")
steps = [optimizer.state[p]["step"].item() for p in params]
assert [twin.state[q]["step"].item() for q in twins] == [1, 2, 2], "found_inf"
assert steps == [2, 3, 3], steps
run(other, others, range(3, 4))
run(twin, twins, range(3, 4))
for p, q, r in zip(params, twins, others, strict=True):
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r, q, rtol=1e-5, atol=1e-6)
print("done")
"""


def test_triton_in_its_interpreter() -> None:
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "done\n"
