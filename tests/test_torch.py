"""`LearnedOptimizer` keeps what `torch.optim` promises: one contract, for the kernels and for the reference."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import assert_update_close, random_theta

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounter  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from lopt_fast import backends, reference  # noqa: E402
from lopt_fast.architectures import ARCHITECTURES  # noqa: E402
from lopt_fast.checkpoint import Checkpoint, CheckpointError  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402
from lopt_fast.torch import LearnedOptimizer, state  # noqa: E402

HAVE_KERNELS = backends._import_native()[0] is not None
SPEC = Spec(
    hidden_size=16, step_mult=0.01
)  # wide enough for the reference to multiply matrices, which is faster
CHECKPOINT = Checkpoint(SPEC, random_theta(SPEC))
SHAPES = [(), (1,), (5,), (3, 4), (8, 8), (0, 3), (6, 3, 3, 2), (300,)]


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu" and not HAVE_KERNELS:
        pytest.skip(f"no compiled kernels: {backends._import_native()[1]}")
    before = torch.get_num_threads()
    torch.set_num_threads(2 if request.param == "cpu" else 1)
    yield request.param
    torch.set_num_threads(before)


def make_parameters(shapes: list[Any] = SHAPES, dtype: Any = torch.float32, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def set_gradients(params: list[Any], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def run(optimizer: Any, params: list[Any], steps: range) -> None:
    for t in steps:
        set_gradients(params, t)
        optimizer.step()


def values(params: list[Any]) -> list[Any]:
    return [p.detach().clone() for p in params]


def assert_same(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y), f"differ by {(x - y).abs().max()}"
        assert torch.isfinite(x).all()


def assert_moved(a: list[Any], b: list[Any]) -> None:
    assert all(not torch.equal(x, y) for x, y in zip(a, b, strict=True) if x.numel())


def snapshot(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def assert_untouched(before: Any, optimizer: Any) -> None:
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for key, entries in before["state"].items():
        assert entries.keys() == after["state"][key].keys()
        for name, value in entries.items():
            assert torch.equal(value, after["state"][key][name]), name


# ---- the numbers ----


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_follows_the_float64_reference(backend: str, statistics: str) -> None:
    params = [*make_parameters(), *make_parameters(dtype=torch.float64, seed=1)]
    optimizer = LearnedOptimizer(
        params, CHECKPOINT, lr=0.5, weight_decay=0.1, statistics=statistics, backend=backend
    )
    spec = replace(CHECKPOINT.spec, statistics=statistics)
    theta = {k: v.astype(np.float64) for k, v in CHECKPOINT.theta.items()}
    states = [reference.init_state(spec, p.detach().numpy().astype(np.float64)) for p in params]
    for t in range(5):
        set_gradients(params, t)
        before = [p.detach().numpy().astype(np.float64) for p in params]
        optimizer.step()
        for i, p in enumerate(params):
            g = p.grad.numpy().astype(np.float64)
            delta, states[i] = reference.update(
                spec, theta, before[i], g, states[i], t, lr=0.5, weight_decay=0.1
            )
            dtype = str(p.dtype).removeprefix("torch.")
            assert_update_close(
                p.detach().numpy() - before[i], delta, before[i], dtype, f"{i} {tuple(p.shape)}"
            )
            if p.numel():
                assert optimizer.state[p]["step"].item() == t + 1


def test_float32_and_float64_shapes_of_state(backend: str) -> None:
    p = torch.nn.Parameter(torch.randn(4, 7, 2, dtype=torch.float64))
    optimizer = LearnedOptimizer([p], CHECKPOINT, statistics="lagged", backend=backend)
    run(optimizer, [p], range(1))
    shapes = {name: tuple(x.shape) for name, x in optimizer.state[p].items()}
    assert shapes == {
        "step": (),
        "momentum": (3, 4, 7, 2),
        "second_moment": (1, 4, 7, 2),
        "factored_row": (3, 4, 2),
        "factored_column": (3, 7, 2),
        "mean_squares": (28,),
    }
    assert optimizer.state[p]["step"].dtype == torch.int64
    assert all(x.dtype == p.dtype for name, x in optimizer.state[p].items() if name != "step")


def test_weight_decay_is_decoupled(backend: str) -> None:
    results = []
    for weight_decay in (0.0, 0.25):
        params = make_parameters(dtype=torch.float64)
        start = values(params)
        run(
            LearnedOptimizer(params, CHECKPOINT, lr=0.5, weight_decay=weight_decay, backend=backend),
            params,
            range(1),
        )
        results.append(values(params))
    for p, without, decayed in zip(start, *results, strict=True):
        torch.testing.assert_close(decayed - without, -0.5 * 0.25 * p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
@pytest.mark.parametrize("grad_scale", [1.0, 1024.0])
def test_max_grad_norm_is_clip_grad_norm(backend: str, max_norm: float, grad_scale: float) -> None:
    """One norm over all groups and types; the gradients themselves stay as they are."""

    def make(**options: Any) -> tuple[list[Any], Any]:
        params = [*make_parameters(), *make_parameters(dtype=torch.float64, seed=1)]
        groups = [{"params": params[:5]}, {"params": params[5:], "lr": 0.1}]
        return params, LearnedOptimizer(groups, CHECKPOINT, backend=backend, **options)

    (clipped, a), (plain, b) = make(max_grad_norm=max_norm), make()
    for t in range(3):
        set_gradients(clipped, t, grad_scale)
        kept = [p.grad.clone() for p in clipped]
        a.grad_scale = torch.tensor(grad_scale)
        a.step()
        assert_same([p.grad for p in clipped], kept)
        set_gradients(plain, t)
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in plain))
        for p in plain:
            p.grad *= min(1.0, max_norm / (norm + 1e-6))
        b.step()
        for x, y in zip(clipped, plain, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_max_grad_norm_can_be_changed(backend: str) -> None:
    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend, max_grad_norm=1.0)
    run(optimizer, params, range(1))
    optimizer.max_grad_norm = -1.0
    before, state = values(params), snapshot(optimizer)
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        optimizer.step()
    assert_same(before, values(params))
    assert_untouched(state, optimizer)
    optimizer.max_grad_norm = None
    optimizer.step()


def test_not_finite_gradients_stay_in_their_tensor(backend: str) -> None:
    params = make_parameters([(3, 4), (5,), (6, 2)])
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    run(optimizer, params, range(2))
    set_gradients(params, 2)
    params[1].grad[0] = math.nan
    optimizer.step()
    assert torch.isfinite(params[0]).all()
    assert torch.isnan(params[1]).any()
    assert torch.isfinite(params[2]).all()


def test_state_of_one_optimizer_mixes_kernels_and_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with parameters on several devices: one norm over both shares, and both are updated."""
    if not HAVE_KERNELS:
        pytest.skip("no compiled kernels")
    real = state.choose

    def choose(spec: Spec, device_type: str, dtype_name: str, backend: str, **options: Any) -> str:
        return "reference" if dtype_name == "float64" else real(spec, device_type, dtype_name, backend)

    results = []
    for mixed in (False, True):
        if mixed:
            monkeypatch.setattr(state, "choose", choose)
        params = [*make_parameters(), *make_parameters(dtype=torch.float64, seed=1)]
        optimizer = LearnedOptimizer(params, CHECKPOINT, max_grad_norm=0.5, weight_decay=0.1)
        run(optimizer, params, range(2))
        params[0].grad = params[9].grad = None
        optimizer.step()
        run(optimizer, params, range(3, 5))
        results.append((params, optimizer))
    for p, q in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert results[0][1].state[p]["step"] == results[1][1].state[q]["step"]
    params, optimizer = results[1]
    params[-1].grad = params[-1].grad.to_sparse()
    before = values(params)
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert_same(before, values(params))


# ---- groups, learning rates, schedules ----


def test_groups_have_their_own_hyperparameters(backend: str) -> None:
    together, alone = make_parameters(), make_parameters()
    grouped = LearnedOptimizer(
        [{"params": together[:4], "lr": 0.1, "weight_decay": 0.3}, {"params": together[4:]}],
        CHECKPOINT, lr=0.7, backend=backend,
    )  # fmt: skip
    first = LearnedOptimizer(alone[:4], CHECKPOINT, lr=0.1, weight_decay=0.3, backend=backend)
    second = LearnedOptimizer(alone[4:], CHECKPOINT, lr=0.7, backend=backend)
    for t in range(3):
        set_gradients(together, t)
        set_gradients(alone, t)
        grouped.step()
        first.step()
        second.step()
    assert_same(together, alone)


def test_added_group_starts_at_its_own_first_step(backend: str) -> None:
    params, late, fresh = make_parameters(), make_parameters(seed=5), make_parameters(seed=5)
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    run(optimizer, params, range(3))
    optimizer.add_param_group({"params": late, "lr": 0.3})
    run(optimizer, late, range(2))
    run(LearnedOptimizer(fresh, CHECKPOINT, lr=0.3, backend=backend), fresh, range(2))
    assert_same(late, fresh)
    assert optimizer.state[late[0]]["step"] == 2


def test_parameters_without_gradient_are_skipped(backend: str) -> None:
    params, twins = make_parameters(), make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, weight_decay=0.1, backend=backend)
    optimizer.step()  # nobody has one
    assert not optimizer.state
    set_gradients(params, 0)
    params[3].grad = params[7].grad = None
    optimizer.step()
    kept = values([params[3], params[7]])
    assert_same(kept, [twins[3], twins[7]])
    assert params[3] not in optimizer.state
    run(optimizer, params, range(1, 3))  # parameter 3 appears later, with its own step count
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3, 3, 2, 3, 3, 3, 2]
    run(LearnedOptimizer([twins[3]], CHECKPOINT, weight_decay=0.1, backend=backend), [twins[3]], range(0))
    alone = LearnedOptimizer([twins[3]], CHECKPOINT, weight_decay=0.1, backend=backend)
    for t in (1, 2):
        set_gradients(twins, t)
        alone.step()
    assert_same([params[3]], [twins[3]])


def test_zero_gradients_are_gradients(backend: str) -> None:
    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    run(optimizer, params, range(1))
    optimizer.zero_grad(set_to_none=False)
    before = values(params)
    optimizer.step()
    assert_moved(before, params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    before = values(params)
    optimizer.step()
    assert_same(before, values(params))


def test_learning_rate_as_tensor_and_schedulers(backend: str) -> None:
    schedules: list[Callable[[Any], Any]] = [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, 10, cycle_momentum=False),
    ]
    for schedule in schedules:
        results = []
        for lr in (0.5, torch.tensor(0.5, dtype=torch.float64)):
            params = make_parameters()
            optimizer = LearnedOptimizer(params, CHECKPOINT, lr=lr, backend=backend)
            scheduler, used = schedule(optimizer), []
            for t in range(5):
                used.append(float(optimizer.param_groups[0]["lr"]))
                run(optimizer, params, range(t, t + 1))
                scheduler.step()
            assert len(set(used)) > 1
            results.append(params)
        assert_same(*results)
        params = make_parameters()
        optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
        for t, lr in enumerate(used):
            optimizer.param_groups[0]["lr"] = lr
            run(optimizer, params, range(t, t + 1))
        assert_same(results[0], params)


# ---- saving, loading, copying ----


def _through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "through", [lambda s: s, copy.deepcopy, _through_file], ids=["same", "deepcopy", "file"]
)
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_state_dict_round_trip(backend: str, statistics: str, through: Any) -> None:
    """The same bits afterwards, on another number of threads too, and the two optimizers share no memory."""
    params = make_parameters([*SHAPES, (300, 301)] if backend == "cpu" else SHAPES)
    options = {"statistics": statistics, "backend": backend}
    optimizer = LearnedOptimizer(params, CHECKPOINT, lr=0.5, weight_decay=0.1, **options)
    run(optimizer, params, range(3))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(others, CHECKPOINT, **options)
    other.load_state_dict(through(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.5
    run(optimizer, params, range(3, 6))
    if backend == "cpu":  # torch's own sums, in the reference, do depend on the threads
        torch.set_num_threads(1)
    run(other, others, range(3, 6))
    assert_same(params, others)


def test_state_dict_loads_into_another_memory_order(backend: str) -> None:
    params = make_parameters([(6, 4, 3, 3), (5, 7)], dtype=torch.float64)
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    run(optimizer, params, range(2))
    others = [
        torch.nn.Parameter(params[0].detach().clone(memory_format=torch.channels_last)),
        torch.nn.Parameter(params[1].detach().t().contiguous().t()),
    ]
    other = LearnedOptimizer(others, CHECKPOINT, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, params, range(2, 4))
    run(other, others, range(2, 4))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies(backend: str, how: Any) -> None:
    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, lr=0.5, backend=backend, max_grad_norm=2.0, num_steps=7)
    run(optimizer, params, range(2))
    others, other = how((params, optimizer))
    assert (other.max_grad_norm, other.num_steps, other.backend) == (2.0, 7, backend)
    assert other.param_groups[0]["params"][0] is others[0]
    run(optimizer, params, range(2, 4))
    run(other, others, range(2, 4))
    assert_same(params, others)


def test_float32_state_loads_into_float64_parameters(backend: str) -> None:
    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    run(optimizer, params, range(2))
    others = [torch.nn.Parameter(p.detach().double()) for p in params]
    other = LearnedOptimizer(others, CHECKPOINT, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[others[3]]["momentum"].dtype == torch.float64
    run(other, others, range(2, 3))


def test_unusable_states_are_refused(backend: str) -> None:
    params = make_parameters([(3, 4), (5,)])
    optimizer = LearnedOptimizer(
        [("encoder.weight", params[0]), ("encoder.bias", params[1])], CHECKPOINT, backend=backend
    )
    run(optimizer, params, range(2))
    good = optimizer.state_dict()

    def refused(match: str, change: Callable[[Any], Any]) -> None:
        state = copy.deepcopy(good)
        change(state)
        before, kept = snapshot(optimizer), values(params)
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
        assert_untouched(before, optimizer)
        assert_same(kept, values(params))

    refused("encoder.weight.*missing.*momentum", lambda s: s["state"][0].pop("momentum"))
    refused("encoder.bias.*step", lambda s: s["state"][1].pop("step"))
    refused(
        "encoder.bias.*'momentum' is .*expected shape",
        lambda s: s["state"][1].update(momentum=torch.zeros(3, 6)),
    )
    refused("encoder.weight.*'step'", lambda s: s["state"][0].update(step=torch.tensor(-1)))
    refused("encoder.weight.*'step'", lambda s: s["state"][0].update(step=torch.tensor(math.nan)))
    refused("encoder.weight.*'momentum' is list", lambda s: s["state"][0].update(momentum=[1.0]))
    refused("encoder.bias.*exp_avg", lambda s: s["state"].update({1: {"exp_avg": torch.zeros(5)}}))
    refused("statistics", lambda s: [e.update(mean_squares=torch.zeros(28)) for e in s["state"].values()])
    refused("lr=-1", lambda s: s["param_groups"][0].update(lr=-1.0))
    refused("no 'lr'", lambda s: s["param_groups"][0].pop("lr"))
    refused("doesn't match the size", lambda s: s["param_groups"][0]["params"].append(2))
    optimizer.load_state_dict(good)
    run(optimizer, params, range(2, 3))
    lagged = LearnedOptimizer(
        make_parameters([(3, 4), (5,)]), CHECKPOINT, statistics="lagged", backend=backend
    )
    with pytest.raises(ValueError, match=r"mean_squares.*statistics='lagged'"):
        lagged.load_state_dict(good)


# ---- closures, hooks, mixed precision, autograd, compilation, threads ----


def test_closure_and_loss(backend: str) -> None:
    params = make_parameters([(3, 4)])
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    before = values(params)
    loss = optimizer.step(closure)
    torch.testing.assert_close(loss, (before[0] ** 2).sum())
    assert_moved(before, params)
    assert optimizer.step() is None
    assert optimizer.step(loss=1.5) == 1.5
    with pytest.raises(ValueError, match="closure or a loss"):
        optimizer.step(closure, loss=1.0)


def test_hooks_and_profiler(backend: str) -> None:
    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global")),
    ]
    set_gradients(params, 0)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert calls == ["pre", "post", "global"]
    assert any(e.key == "Optimizer.step#LearnedOptimizer.step" for e in profile.key_averages())
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 3


def test_grad_scaler(backend: str) -> None:
    """Scaled by a power of two: the same bits. A gradient that is not finite: no step at all, no count."""
    results = []
    for enabled in (False, True):
        params = make_parameters()
        optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**10, growth_interval=2)
        scaler.scale(torch.zeros(()))  # makes its tensors
        for t in range(4):
            set_gradients(params, t, scaler.get_scale())
            if t % 2 and enabled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append(params)
    assert_same(*results)
    assert scaler.get_scale() > 2.0**10
    before, state = values(params), snapshot(optimizer)
    set_gradients(params, 9)
    params[3].grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same(before, values(params))
    assert_untouched(state, optimizer)
    fresh = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    scaler.step(fresh)
    assert not fresh.state


def test_parameters_know_that_they_changed(backend: str) -> None:
    params = make_parameters([(3, 4)])
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    set_gradients(params, 0)
    loss = (params[0] ** 2).sum()
    version = params[0]._version
    optimizer.step()
    assert params[0]._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(backend: str) -> None:
    params, twins = make_parameters(), make_parameters()
    optimizer, twin = (LearnedOptimizer(x, CHECKPOINT, backend=backend) for x in (params, twins))
    run(optimizer, params, range(2))
    run(twin, twins, range(2))
    set_gradients(params, 2)
    with torch.inference_mode():
        optimizer.step()
    run(twin, twins, range(2, 3))
    assert_same(params, twins)


def test_default_device_and_type(backend: str) -> None:
    """Where new tensors go by default is not where state goes."""
    params, twins = make_parameters(), make_parameters()
    optimizer, twin = (LearnedOptimizer(x, CHECKPOINT, backend=backend) for x in (params, twins))
    set_gradients(params, 0)
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            torch.set_default_dtype(torch.float32)
    run(twin, twins, range(1))
    assert_same(params, twins)
    assert all(x.device.type == "cpu" for s in optimizer.state.values() for x in s.values())


def test_autocast_does_not_reach_the_step(backend: str) -> None:
    results = []
    for enabled in (False, True):
        params = make_parameters()
        optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            run(optimizer, params, range(2))
        results.append(params)
    assert_same(*results)


@pytest.mark.parametrize("compiled", ["step", "train"])
def test_compile(backend: str, compiled: str) -> None:
    """The same numbers as without, and nothing is compiled again after the second call."""
    torch._dynamo.reset()
    results = []
    for use in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).double()
        optimizer = LearnedOptimizer(model.parameters(), CHECKPOINT, backend=backend)
        x = torch.randn(16, 4, dtype=torch.float64)

        def train(x: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = optimizer.step
        if use:
            counter = CompileCounter()
            if compiled == "train":
                train = torch.compile(train, backend=counter)
            else:
                optimizer.step = torch.compile(step, backend=counter)
        for t in range(4):
            train(x)
            if use and t == 1:
                frames = counter.frame_count
        results.append(values(list(model.parameters())))
    assert counter.frame_count == frames
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(optimizer.state[p]["step"] == 4 for p in model.parameters())


def test_two_optimizers_in_two_threads(backend: str) -> None:
    def work(seed: int, into: list[Any]) -> None:
        params = make_parameters([*SHAPES, (200, 200)], seed=seed)
        run(LearnedOptimizer(params, CHECKPOINT, backend=backend), params, range(5))
        into.extend(values(params))

    alone: list[list[Any]] = [[], []]
    together: list[list[Any]] = [[], []]
    for seed in (0, 1):
        work(seed, alone[seed])
    workers = [threading.Thread(target=work, args=(seed, together[seed])) for seed in (0, 1)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert_same(alone[0] + alone[1], together[0] + together[1])


@pytest.mark.parametrize("name", ["small_fc_lopt", "adamw"])
def test_one_optimizer_in_two_threads(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, whatever computes the step; nothing of the refused call happens, and the next one works."""
    params = make_parameters([(3, 4)])
    checkpoint = CHECKPOINT if name == "small_fc_lopt" else Checkpoint(ARCHITECTURES[name](), {})
    optimizer = LearnedOptimizer(params, checkpoint, backend=backend, lr=0.01)
    run(optimizer, params, range(1))
    entered, leave = threading.Event(), threading.Event()
    real = optimizer._plan.step

    def slow(*arguments: Any) -> bool:
        entered.set()
        assert leave.wait(20)
        return real(*arguments)

    before, state = values(params), snapshot(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._plan, "step", slow)
        worker = threading.Thread(target=optimizer.step)
        worker.start()
        assert entered.wait(20)
        for call in (optimizer.step, lambda: optimizer.load_state_dict(state)):
            with pytest.raises(RuntimeError, match="another thread is in step"):
                call()
        assert_same(before, values(params))
        leave.set()
        worker.join()
    assert_moved(before, values(params))
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    run(optimizer, params, range(1))
    optimizer.load_state_dict(state)


def test_one_optimizer_for_each_parameter_in_backward(backend: str) -> None:
    """The pattern that frees each gradient at once."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    for p in model.parameters():
        optimizer = LearnedOptimizer([p], CHECKPOINT, backend=backend)

        def hook(p: Any, optimizer: Any = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    before = values(list(model.parameters()))
    model(torch.randn(16, 4)).sum().backward()
    assert_moved(before, list(model.parameters()))


def test_cycles_are_collected(backend: str) -> None:
    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    run(optimizer, params, range(1))
    params[0].optimizer = optimizer
    alive = weakref.ref(optimizer), weakref.ref(params[0])
    del params, optimizer
    gc.collect()
    assert [a() for a in alive] == [None, None]


# ---- memory: strides, swaps, moves ----


def _channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last)


def _transposed(x: Any) -> Any:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _strided(x: Any) -> Any:
    base = torch.full([2 * n + 1 for n in x.shape], 7.0, dtype=x.dtype)
    view = base[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view.copy_(x)
    return view


MEMORY = [torch.clone, _channels_last, _transposed, _strided]


@pytest.mark.parametrize("of_gradient", MEMORY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("of_parameter", MEMORY, ids=lambda f: f.__name__)
def test_strides(backend: str, of_parameter: Any, of_gradient: Any) -> None:
    plain = make_parameters([(6, 4, 3, 5)], dtype=torch.float64)
    strided = [torch.nn.Parameter(of_parameter(p.detach())) for p in plain]
    a, b = (LearnedOptimizer(x, CHECKPOINT, backend=backend) for x in (plain, strided))
    for t in range(3):
        set_gradients(plain, t)
        for p, q in zip(plain, strided, strict=True):
            q.grad = of_gradient(p.grad)
        a.step()
        b.step()
    torch.testing.assert_close(plain, strided, rtol=1e-12, atol=1e-13)
    if of_parameter is _strided:
        strided[0].detach().fill_(7.0)  # as everything between the elements
        whole = torch.empty(0, dtype=torch.float64).set_(strided[0].untyped_storage())
        assert whole.numel() > strided[0].numel()
        assert bool((whole == 7.0).all())


def test_expanded_and_negated_gradients(backend: str) -> None:
    plain, lazy = make_parameters([(6, 4)]), make_parameters([(6, 4)])
    a, b = (LearnedOptimizer(x, CHECKPOINT, backend=backend) for x in (plain, lazy))
    for t in range(4):
        g = torch.randn(6, 1, generator=torch.Generator().manual_seed(t)).expand(6, 4)
        plain[0].grad = g.contiguous() * (-1 if t % 2 else 1)
        lazy[0].grad = torch._neg_view(g) if t % 2 else g
        a.step()
        b.step()
    assert_same(plain, lazy)


def test_swapped_and_moved_parameters(backend: str) -> None:
    """p.data = other, model.to(memory_format), model.double(): noticed, and the trajectory goes on."""
    plain, swapped = make_parameters([(6, 4, 3, 3), (5,)]), make_parameters([(6, 4, 3, 3), (5,)])
    a, b = (LearnedOptimizer(x, CHECKPOINT, backend=backend, statistics="lagged") for x in (plain, swapped))
    for t, swap in enumerate([torch.clone, torch.clone, _channels_last, _strided, torch.clone]):
        set_gradients(plain, t)
        set_gradients(swapped, t)
        swapped[0].data = swap(swapped[0].data)
        a.step()
        b.step()
        torch.testing.assert_close(plain, swapped, rtol=1e-5, atol=1e-6)
    for p in swapped:
        p.data, p.grad = p.data.double(), None
    set_gradients(swapped, 5)
    b.step()
    assert b.state[swapped[0]]["momentum"].dtype == torch.float64
    assert b.state[swapped[0]]["step"] == 6


def test_state_that_users_change_is_noticed(backend: str) -> None:
    def fresh() -> tuple[list[Any], Any]:
        params = make_parameters([(3, 4), (5,)])
        optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
        run(optimizer, params, range(2))
        return params, optimizer

    (p, a), (q, b), (r, c), (s, d) = fresh(), fresh(), fresh(), fresh()
    a.state[p[0]]["momentum"] = torch.zeros(3, 3, 4)
    b.state[q[0]]["momentum"].data = torch.zeros(3, 3, 4)
    c.state[r[0]] = {**c.state[r[0]], "momentum": torch.zeros(3, 3, 4)}
    d.state[s[0]]["momentum"].zero_()
    for params, optimizer in ((p, a), (q, b), (r, c), (s, d)):
        run(optimizer, params, range(2, 4))
    assert_same(p, q)
    assert_same(p, r)
    assert_same(p, s)
    a.state.clear()
    run(a, p, range(1))
    assert a.state[p[0]]["step"] == 1
    a.state[p[0]]["momentum"] = torch.zeros(2)
    before = values(p)
    with pytest.raises(ValueError, match="momentum"):
        a.step()
    assert_same(before, values(p))


@pytest.mark.parametrize(
    "name", ["momentum", "second_moment", "factored_row", "factored_column", "mean_squares", "step"]
)
def test_every_entry_of_state_may_be_swapped_through_data(backend: str, name: str) -> None:
    """As if the entry were another tensor; if it has no memory any more, an error before anything is written."""
    results = []
    for through_data in (False, True):
        params = make_parameters([(4, 4), (5,), (3, 4, 4)])
        optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend, statistics="lagged")
        run(optimizer, params, range(2))
        for p in (params[0], params[2]):
            entries = optimizer.state[p]
            other = torch.tensor(7) if name == "step" else entries[name] * 0.5
            if through_data:
                entries[name].data = other
            else:
                entries[name] = other
        run(optimizer, params, range(2, 4))
        if name != "step":
            for p in (params[0], params[2]):
                entries = optimizer.state[p]
                turned = entries[name].data.transpose(-1, -2) if name == "momentum" else entries[name] + 1.0
                if through_data:
                    entries[name].data = turned
                else:
                    entries[name] = turned.clone()
            run(optimizer, params, range(4, 6))
        results.append((params, optimizer))
    (params, optimizer), (others, other_optimizer) = results
    assert_same(params, others)
    for p, q in zip(params, others, strict=True):
        a, b = optimizer.state[p], other_optimizer.state[q]
        assert_same([*a.values()], [*b.values()])
    assert other_optimizer.state[others[0]]["step"] == (9 if name == "step" else 6)
    other_optimizer.state[others[0]][name].untyped_storage().resize_(0)
    set_gradients(others, 6)
    before = values(others)
    with pytest.raises(ValueError, match=f"parameter 0 of group 0.*'{name}' has no memory"):
        other_optimizer.step()
    assert_same(before, values(others))


def test_parameters_that_share_one_buffer(backend: str) -> None:
    flat = torch.randn(40, generator=torch.Generator().manual_seed(0))
    views = [torch.nn.Parameter(flat[:12].view(3, 4)), torch.nn.Parameter(flat[13:40])]
    copies = [torch.nn.Parameter(v.detach().clone()) for v in views]
    between = flat[12].clone()
    for params in (views, copies):
        run(LearnedOptimizer(params, CHECKPOINT, backend=backend), params, range(3))
    assert_same(views, copies)
    assert flat[12] == between


# ---- errors ----


def test_unusable_arguments() -> None:
    params = make_parameters()
    for match, options in (
        ("lr=-1", {"lr": -1.0}),
        ("lr=nan", {"lr": math.nan}),
        ("lr=", {"lr": "fast"}),
        ("lr=", {"lr": torch.ones(2)}),
        ("weight_decay=inf", {"weight_decay": math.inf}),
        ("max_grad_norm=0", {"max_grad_norm": 0.0}),
        ("max_grad_norm=nan", {"max_grad_norm": math.nan}),
        ("statistics='late'", {"statistics": "late"}),
        ("empty parameter list", {"params": []}),
        ("no-such-weights", {"optimizer": "no-such-weights"}),
    ):
        arguments = {"params": params, "optimizer": CHECKPOINT, **options}
        with pytest.raises(ValueError, match=match):
            LearnedOptimizer(**arguments)
    with pytest.raises(CheckpointError):
        LearnedOptimizer(params, 3)
    with pytest.raises(backends.BackendError, match="gpu-farm"):
        LearnedOptimizer(params, CHECKPOINT, backend="gpu-farm")


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.complex64, torch.int64, torch.bool], ids=str)
def test_types_that_are_not_supported(backend: str, dtype: Any) -> None:
    bad = torch.zeros(3, dtype=dtype)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 \(shape \(3,\)\) is torch"):
        LearnedOptimizer([torch.zeros(2), bad], CHECKPOINT, backend=backend)
    optimizer = LearnedOptimizer([torch.zeros(2)], CHECKPOINT, backend=backend)
    with pytest.raises(ValueError, match="float32, float64, bfloat16 and float16"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_cannot_be_written(backend: str) -> None:
    for match, params in (
        ("overlaps itself", [torch.zeros(1).expand(5)]),
        ("layout", [torch.zeros(3, 3).to_sparse()]),
    ):
        with pytest.raises(ValueError, match=match):
            LearnedOptimizer(params, CHECKPOINT, backend=backend)
    flat = torch.zeros(10)
    for match, params in (
        ("parameter 1 of group 0.*parameter 0 of group 0.*share memory", [flat[:6], flat[5:]]),
        ("share memory", [torch.nn.Parameter(flat), torch.nn.Parameter(flat)]),
    ):
        with pytest.raises(ValueError, match=match):
            LearnedOptimizer(params, CHECKPOINT, backend=backend)
    p = torch.nn.Parameter(torch.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="given twice"):
            LearnedOptimizer([p, p], CHECKPOINT, backend=backend)


def test_unusable_gradients_change_nothing(backend: str) -> None:
    """Named, and neither the other parameters nor any state is touched, at the first step and later."""

    def wrong_shape(p: Any) -> None:
        p.grad = torch.zeros(5)
        p.data = torch.zeros(4)

    def wrong_type(p: Any) -> None:
        p.data = p.data.double()

    def sparse(p: Any) -> None:
        p.grad = torch.zeros(5).to_sparse()

    def overlapping(p: Any) -> None:
        p.data = torch.zeros(1).expand(5)

    def imaginary(p: Any) -> None:
        p.grad = None
        p.data = p.data.to(torch.complex64)
        p.grad = torch.zeros(5, dtype=torch.complex64)

    for steps in (0, 2):
        for match, spoil in (
            ("'bias'.*shape", wrong_shape),
            ("'bias'.*type torch.float32, the parameter torch.float64", wrong_type),
            ("'bias'.*sparse", sparse),
            ("'bias'.*overlaps", overlapping),
            ("'bias'.*complex64", imaginary),
        ):
            params = make_parameters([(3, 4), (5,), (2, 2)])
            named = list(zip(["weight", "bias", "other"], params, strict=True))
            optimizer = LearnedOptimizer(named, CHECKPOINT, backend=backend)
            run(optimizer, params, range(steps))
            set_gradients(params, steps)
            spoil(params[1])
            before, state = values(params), snapshot(optimizer)
            with pytest.raises(ValueError, match=match):
                optimizer.step()
            assert_same(before, values(params))
            assert_untouched(state, optimizer)


def test_unusable_learning_rate_changes_nothing(backend: str) -> None:
    params = make_parameters()
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend=backend)
    run(optimizer, params, range(1))
    for lr in (math.nan, -0.1, torch.tensor(math.inf)):
        optimizer.param_groups[0]["lr"] = lr
        before = values(params)
        with pytest.raises(ValueError, match="lr="):
            optimizer.step()
        assert_same(before, values(params))
    assert optimizer.state[params[0]]["step"] == 1


def test_fallback_warns_once_and_force_refuses() -> None:
    spec = Spec(feature_set="m_rms", hidden_size=3)
    checkpoint = Checkpoint(spec, random_theta(spec))
    backends._warned.clear()
    params = make_parameters()
    with pytest.warns(backends.BackendWarning, match="feature_set"):
        optimizer = LearnedOptimizer(params, checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, params, range(2))
        LearnedOptimizer(make_parameters(), checkpoint, backend="reference")
    assert "factored_row" not in optimizer.state[params[3]]
    assert "momentum" in optimizer.state[params[3]]
    with pytest.raises(backends.BackendError, match="cpu"):
        LearnedOptimizer(make_parameters(), checkpoint, backend="cpu")
    with pytest.raises(backends.BackendError, match="meta"):
        LearnedOptimizer([torch.zeros(3, device="meta")], CHECKPOINT, backend="cpu")


@pytest.mark.skipif(not HAVE_KERNELS, reason="no compiled kernels")
def test_a_pytorch_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_parameters()
    before = [p.detach().clone() for p in params]
    optimizer = LearnedOptimizer(params, CHECKPOINT, backend="cpu")
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    with pytest.raises(backends.BackendError, match=r"PyTorch .* has no DLPack exchange in C"):
        run(optimizer, params, range(1))
    assert all(map(torch.equal, params, before))


def test_repr_and_defaults() -> None:
    optimizer = LearnedOptimizer([torch.zeros(2)], CHECKPOINT, weight_decay=0.5)
    assert "lr: 1.0" in repr(optimizer)
    assert "weight_decay: 0.5" in repr(optimizer)
    assert optimizer.spec is CHECKPOINT.spec
