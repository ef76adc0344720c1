"""`LearnedOptimizer` with every architecture but `small_fc_lopt`, for which test_torch.py stands."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_torch import MEMORY, assert_same, make_parameters, set_gradients, values  # noqa: E402

from lopt_fast import backends  # noqa: E402
from lopt_fast.architectures import ARCHITECTURES, Architecture  # noqa: E402
from lopt_fast.architectures.adamw import AdamW  # noqa: E402
from lopt_fast.architectures.base import Inputs, Update  # noqa: E402
from lopt_fast.architectures.nadamw import NAdamW  # noqa: E402
from lopt_fast.checkpoint import Checkpoint  # noqa: E402
from lopt_fast.operations import ModelTensors, Reference  # noqa: E402
from lopt_fast.operations.accumulators import initial_state  # noqa: E402
from lopt_fast.torch import LearnedOptimizer, architecture_plan, operations  # noqa: E402
from lopt_fast.training import TrainConfig, TrainingError, train  # noqa: E402
from lopt_fast.training.choices import parse  # noqa: E402

NAMES = [name for name, kind in ARCHITECTURES.items() if issubclass(kind, Architecture)]
SOME = ["celo", "rnn_fc_lopt", "nn_adam", "celo2", "adamw"]
"""Of each kind of state one."""
SHAPES: list[Any] = [(3, 4), (), (5,), (8, 8), (0, 3), (4, 3, 2, 2)]
LABELS = ["first.weight", "scale", "first.bias", "embed.weight", "nothing", "conv.weight"]
NUM_STEPS = 40

every = pytest.mark.parametrize("name", NAMES)
some = pytest.mark.parametrize("name", SOME)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cpu" and not hasattr(backends._import_native()[0], "element_mlp"):
        pytest.skip(f"no compiled kernels: {backends._import_native()[1]}")
    tried = getattr(request.node, "callspec", None)
    kind = ARCHITECTURES[tried.params["name"]]() if tried and "name" in tried.params else None
    if name == "cpu" and isinstance(kind, Architecture) and not kind.has_kernels:
        pytest.skip(f"{kind.NAME} is plain array code")
    return name


@cache
def checkpoint(name: str) -> Checkpoint:
    """Initial meta-parameters, moved a little, so that none is zero."""
    architecture = ARCHITECTURES[name]()
    assert isinstance(architecture, Architecture)
    rng = np.random.default_rng(0)
    theta = {k: a + 0.05 * rng.standard_normal(a.shape) for k, a in architecture.init_theta().items()}
    return Checkpoint(architecture, theta)


def make(name: str, params: list[Any], **options: Any) -> LearnedOptimizer:
    options = {"num_steps": NUM_STEPS, "backend": "reference", **options}
    labels = [f"late{i}" for i in range(len(params))] if len(params) != len(LABELS) else LABELS
    return LearnedOptimizer(list(zip(labels, params, strict=True)), checkpoint(name), **options)


def loss_at(t: int) -> float:
    return 2.0 + math.sin(t)


def run(optimizer: Any, params: list[Any], steps: range) -> None:
    for t in steps:
        set_gradients(params, t)
        optimizer.step(loss=loss_at(t))


def arrays(optimizer: Any) -> dict[Any, Any]:
    """All state, copied, under names that do not depend on the objects."""
    state = optimizer.state_dict()
    found = {(i, key): a.clone() for i, entries in state["state"].items() for key, a in entries.items()}
    shared = state["param_groups"][0]["shared"]
    return found | {("shared", key): copy.deepcopy(a) for key, a in shared.items()}


def assert_state_same(a: dict[Any, Any], b: dict[Any, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


class Oracle:
    """The definition in float64 NumPy, with the state of each parameter kept apart."""

    def __init__(self, name: str, params: list[Any], labels: list[str]) -> None:
        self.architecture: Any = checkpoint(name).spec
        self.theta = {k: a.astype(np.float64) for k, a in checkpoint(name).theta.items()}
        self.params = [p.detach().double().numpy().copy() for p in params]
        self.labels = labels
        self.kept: dict[int, Any] = {}
        self.shared = self.architecture.init_shared(self.theta)
        self.t = 0

    def step(self, grads: list[Any], loss: float, lr: float, weight_decay: float) -> None:
        chosen = [i for i, g in enumerate(grads) if g is not None and self.params[i].size]
        for i in chosen:
            if i not in self.kept:
                p = self.params[i]
                rows = self.architecture.init_rows(self.theta, [p.shape])
                state = initial_state(self.architecture.accumulates(self.labels[i], p.shape), p)
                self.kept[i] = state, {key: a[0] for key, a in rows.items()}
        rows = {key: np.stack([self.kept[i][1][key] for i in chosen]) for key in self.kept[chosen[0]][1]}
        tensors = ModelTensors(
            [self.params[i] for i in chosen], [grads[i].double().numpy() for i in chosen],
            [self.kept[i][0] for i in chosen], [lr] * len(chosen), [weight_decay] * len(chosen),
            names=[self.labels[i] for i in chosen], apply=True,
        )  # fmt: skip
        inputs = Inputs(np.asarray(self.t), NUM_STEPS, np.asarray(loss))
        update = self.architecture.step(Reference, self.theta, tensors, rows, self.shared, inputs)
        for k, i in enumerate(chosen):
            self.params[i] = update.outputs[k]
            self.kept[i] = update.states[k], {key: a[k] for key, a in update.rows.items()}
        self.shared, self.t = update.shared, self.t + 1


# ---- the numbers ----


@every
@pytest.mark.parametrize("mixed", [False, True], ids=["float64", "mixed"])
def test_follows_the_definition(name: str, backend: str, mixed: bool) -> None:
    """With parameters that get their first gradient late, or none in some step, and several groups."""
    types = [torch.float32 if mixed and i % 2 else torch.float64 for i in range(len(SHAPES))]
    params = [
        torch.nn.Parameter(p.detach().to(dtype))
        for p, dtype in zip(make_parameters(SHAPES), types, strict=True)
    ]
    optimizer = make(name, params, lr=0.5, weight_decay=0.1, backend=backend)
    oracle = Oracle(name, params, LABELS)
    largest = np.zeros(len(params))
    for t in range(5):
        set_gradients(params, t)
        params[3].grad = None if t < 2 else params[3].grad
        params[0].grad = None if t == 3 else params[0].grad
        before = [p.copy() for p in oracle.params]
        oracle.step([p.grad for p in params], loss_at(t), 0.5, 0.1)
        optimizer.step(loss=torch.tensor(loss_at(t), dtype=torch.float64))
        for i, (p, old, new) in enumerate(zip(params, before, oracle.params, strict=True)):
            if not p.numel():
                continue
            moved = np.abs(new - old).max()
            assert (moved > 0) == (p.grad is not None)
            largest[i] = max(largest[i], moved)
            eps = float(torch.finfo(p.dtype).eps)
            bound = (2e-3 if mixed else 1e-9) * largest[i] + 8 * eps * (t + 1) * np.abs(new).max()
            error = np.abs(p.detach().double().numpy() - new).max()
            assert error <= bound, f"step {t} of {LABELS[i]}: {error:.2e}, allowed {bound:.2e}"
    assert optimizer.param_groups[0]["shared"]["step"] == 5
    assert params[4] not in optimizer.state


@some
def test_max_grad_norm(name: str, backend: str) -> None:
    """One norm over all parameters; the gradients themselves stay as they are."""
    clipped, plain = make_parameters(SHAPES), make_parameters(SHAPES)
    a, b = make(name, clipped, backend=backend, max_grad_norm=0.5), make(name, plain, backend=backend)
    for t in range(2):
        set_gradients(clipped, t)
        set_gradients(plain, t)
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in plain))
        for p in plain:
            p.grad *= 0.5 / (norm + 1e-6)
        a.step(loss=1.0)
        b.step(loss=1.0)
        torch.testing.assert_close(clipped, plain, rtol=1e-4, atol=1e-6)
    a.max_grad_norm = -1.0
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        a.step(loss=1.0)


@some
def test_groups_and_rates_as_tensors(name: str) -> None:
    """A scheduler moves a rate that is a tensor as it moves a number; groups have their own."""
    results = []
    for lr in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        params = make_parameters(SHAPES)
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.1, "weight_decay": 0.3}]
        optimizer = LearnedOptimizer(
            groups, checkpoint(name), lr=lr, num_steps=NUM_STEPS, backend="reference"
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for t in range(3):
            run(optimizer, params, range(t, t + 1))
            scheduler.step()
        results.append(params)
    assert_same(*results)


def test_rates_are_those_of_the_group() -> None:
    params, twins = make_parameters([(3, 4), (5,)]), make_parameters([(3, 4), (5,)])
    a = LearnedOptimizer(
        [{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], "adamw", backend="reference"
    )
    b = LearnedOptimizer(twins, "adamw", backend="reference")
    run(a, params, range(2))
    run(b, twins, range(2))
    assert_same(params[:1], twins[:1])
    assert_same(params[1:], make_parameters([(3, 4), (5,)])[1:])


@pytest.mark.parametrize("of_gradient", MEMORY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("of_parameter", MEMORY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["celo", "rnn_fc_lopt"])
def test_strides(name: str, backend: str, of_parameter: Any, of_gradient: Any) -> None:
    plain = make_parameters([(6, 4, 3, 5)], dtype=torch.float64)
    strided = [torch.nn.Parameter(of_parameter(p.detach())) for p in plain]
    a, b = make(name, plain, backend=backend), make(name, strided, backend=backend)
    for t in range(2):
        set_gradients(plain, t)
        for p, q in zip(plain, strided, strict=True):
            q.grad = of_gradient(p.grad)
        a.step(loss=1.0)
        b.step(loss=1.0)
    torch.testing.assert_close(plain, strided, rtol=1e-10, atol=1e-11)


# ---- saving, loading, copying ----


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every
def test_state_dict_round_trip(name: str, backend: str) -> None:
    """The same bits afterwards, with one parameter whose first gradient comes after that; no memory is shared."""
    params = make_parameters(SHAPES)
    optimizer = make(name, params, backend=backend, lr=0.5, weight_decay=0.1)
    for t in range(2):
        set_gradients(params, t)
        params[3].grad = None
        optimizer.step(loss=loss_at(t))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(name, others, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(through_file(optimizer.state_dict()))
    assert_state_same(arrays(optimizer), arrays(other))
    run(optimizer, params, range(2, 4))
    run(other, others, range(2, 4))
    assert_same(params, others)
    assert_state_same(arrays(optimizer), arrays(other))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@some
def test_copies(name: str, how: Callable[[Any], Any]) -> None:
    params = make_parameters(SHAPES)
    optimizer = make(name, params, max_grad_norm=2.0)
    run(optimizer, params, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others, other = how((params, optimizer))
    run(optimizer, params, range(2, 3))
    run(other, others, range(2, 3))
    assert_same(params, others)
    assert_state_same(arrays(optimizer), arrays(other))


@some
def test_added_parameters(name: str) -> None:
    """Their rows are fresh, those of the others go on; and the state can be loaded with all of them there."""
    params, late = make_parameters(SHAPES), make_parameters([(2, 3)], seed=5)
    optimizer = make(name, params)
    run(optimizer, params, range(2))
    before = arrays(optimizer)
    optimizer.add_param_group({"params": [("late", late[0])], "lr": 0.3})
    assert_state_same(before, arrays(optimizer))
    run(optimizer, params + late, range(2, 3))
    fresh = make(name, make_parameters([(2, 3)], seed=5))
    run(fresh, fresh.param_groups[0]["params"], range(1))
    assert optimizer.state[late[0]].keys() == next(iter(fresh.state.values())).keys()
    assert all(torch.isfinite(p).all() for p in params + late)

    others = [torch.nn.Parameter(p.detach().clone()) for p in params + late]
    labels = [*LABELS, "late"]
    other = LearnedOptimizer(
        [
            {"params": list(zip(labels, others, strict=True))[:-1]},
            {"params": list(zip(labels, others, strict=True))[-1:]},
        ],
        checkpoint(name), num_steps=NUM_STEPS, backend="reference",
    )  # fmt: skip
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, params + late, range(3, 4))
    run(other, others, range(3, 4))
    assert_same(params + late, others)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@some
def test_distributed_checkpoint_helpers(name: str, flat: bool) -> None:
    """State goes by the names of parameters, and a fresh optimizer has its state created by a step without a loss."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def model() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    a, b = model(), model()
    first, second = (
        LearnedOptimizer(m.parameters(), checkpoint(name), 0.5, num_steps=NUM_STEPS, backend="reference")
        for m in (a, b)
    )
    run(first, list(a.parameters()), range(2))
    b.load_state_dict(a.state_dict())
    saved = through_file(get_optimizer_state_dict(a, first, options=options))
    set_optimizer_state_dict(b, second, saved, options=options)
    assert_state_same(arrays(first), arrays(second))
    run(first, list(a.parameters()), range(2, 3))
    run(second, list(b.parameters()), range(2, 3))
    assert_same(list(a.parameters()), list(b.parameters()))


def test_types_of_parameters_may_change() -> None:
    """model.double(): state and tensor level follow."""
    params = make_parameters(SHAPES)
    optimizer = make("celo", params)
    run(optimizer, params, range(2))
    for p in params:
        p.data, p.grad = p.data.double(), None
    run(optimizer, params, range(2, 3))
    assert optimizer.state[params[0]]["momentum"].dtype == torch.float64
    assert optimizer.param_groups[0]["shared"]["lstm_cell"].dtype == torch.float64
    assert optimizer.param_groups[0]["shared"]["step"] == 3


def test_meta_parameters_are_not_written() -> None:
    for name in NAMES:
        params = make_parameters([(3, 4)])
        optimizer = make(name, params)
        run(optimizer, params, range(2))
        for key, a in optimizer._memory.named_theta(torch.device("cpu"), torch.float32).items():
            np.testing.assert_array_equal(a.numpy(), checkpoint(name).theta[key], err_msg=f"{name} {key}")


def test_unusable_states_are_refused() -> None:
    params = make_parameters(SHAPES)
    optimizer = make("rnn_fc_lopt", params)
    run(optimizer, params, range(2))
    good = optimizer.state_dict()

    def refused(match: str, change: Callable[[Any], Any]) -> None:
        state = copy.deepcopy(good)
        change(state)
        before, kept = copy.deepcopy(arrays(optimizer)), values(params)
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
        assert_state_same(before, arrays(optimizer))
        assert_same(kept, values(params))

    def shared(state: Any) -> Any:
        return state["param_groups"][0]["shared"]

    refused(r"first\.weight.*missing.*momentum", lambda s: s["state"][0].pop("momentum"))
    refused(r"first\.bias.*missing.*lstm_cell", lambda s: s["state"][2].pop("lstm_cell"))
    refused(
        r"first\.bias.*'lstm_cell' is .*expected shape",
        lambda s: s["state"][2].update(lstm_cell=torch.ones(2)),
    )
    refused(r"conv\.weight.*exp_avg", lambda s: s["state"].update({5: {"exp_avg": torch.zeros(5)}}))
    refused("'shared'.*missing.*summary", lambda s: shared(s).pop("summary"))
    refused("'shared'.*'summary' is .*expected shape", lambda s: shared(s).update(summary=torch.ones(1)))
    refused("'shared'.*'step'", lambda s: shared(s).update(step=-1))
    refused("'shared' of parameter group 0 is missing", lambda s: s["param_groups"][0].pop("shared"))
    refused("lr=-1", lambda s: s["param_groups"][0].update(lr=-1.0))
    optimizer.load_state_dict(good)
    run(optimizer, params, range(2, 3))

    optimizer.state[params[0]]["lstm_cell"] = torch.zeros(2)
    before, kept = arrays(optimizer), values(params)
    with pytest.raises(ValueError, match=r"first\.weight.*lstm_cell"):
        run(optimizer, params, range(1))
    assert_state_same(before, arrays(optimizer))
    assert_same(kept, values(params))


@dataclass(frozen=True)
class Shifting(AdamW):
    """Its shared state has arrays that pass their values on."""

    def init_shared(self, theta: Any) -> Any:
        return {"a": torch.zeros(()), "b": torch.zeros(()), "c": torch.zeros(())}

    def step(
        self, operations: Any, theta: Any, tensors: Any, rows: Any, shared: Any, inputs: Inputs
    ) -> Update:
        shared = {"a": inputs.t + 1.0, "b": shared["a"], "c": shared["b"]}
        return super().step(operations, theta, tensors, rows, shared, inputs)


def test_shared_arrays_may_change_places() -> None:
    params = make_parameters(SHAPES)
    optimizer = LearnedOptimizer(params, Checkpoint(Shifting(), {}), backend="reference")
    run(optimizer, params, range(3))
    shared = optimizer.param_groups[0]["shared"]
    assert [shared[key].item() for key in "abc"] == [3.0, 2.0, 1.0]


# ---- what a plan keeps from step to step ----


@pytest.fixture
def cpu_kernels() -> None:
    if not hasattr(backends._import_native()[0], "element_mlp"):
        pytest.skip(f"no compiled kernels: {backends._import_native()[1]}")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", ["velo", *SOME])
def test_tensor_level_in_numpy_or_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same either way, also from state of the other; and no warning from NumPy about what is not finite."""
    kinds = {"large": 1 << 60, "small": 1}
    results: dict[str, list[Any]] = {kind: make_parameters(SHAPES, dtype=torch.float64) for kind in kinds}
    optimizers = {kind: make(name, params, backend="cpu") for kind, params in results.items()}
    for t in range(4):
        for kind, params in results.items():
            monkeypatch.setattr(architecture_plan, "ONE_THREAD", kinds[kind])
            run(optimizers[kind], params, range(t, t + 1))
            uses_numpy = optimizers[kind]._plan._model.level.in_numpy  # type: ignore[union-attr]
            assert uses_numpy == (kind == "large" and name != "adamw")
        if t == 1:
            state = copy.deepcopy(optimizers["large"].state_dict())
            optimizers["large"].load_state_dict(optimizers["small"].state_dict())
            optimizers["small"].load_state_dict(state)
    torch.testing.assert_close(results["large"], results["small"], rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(architecture_plan, "ONE_THREAD", 1 << 60)
    results["large"][0].grad[0, 0] = math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizers["large"].step(loss=math.inf)


def test_large_networks_leave_threads_to_torch() -> None:
    """By the number of rows of the largest product; a network for the whole model has one."""

    def in_numpy(name: str, tensors: int) -> bool:
        optimizer = make(name, make_parameters([(2, 3)] * tensors), backend="auto")
        run(optimizer, optimizer.param_groups[0]["params"], range(1))
        level: Any = optimizer._plan._model.level  # type: ignore[union-attr]
        return bool(level.in_numpy)

    if make("celo", make_parameters([(2,)]), backend="auto").backends["cpu float32"] != "cpu":
        pytest.skip("no compiled kernels")
    assert in_numpy("nn_adam", 4)
    assert in_numpy("celo_adam", 300)
    assert not in_numpy("velo", 1)
    assert not in_numpy("nn_adam", 300)


def new_state_array(p: Any, optimizer: Any) -> None:
    optimizer.state[p]["second_moment"] = optimizer.state[p]["second_moment"].clone()


def state_through_data(p: Any, optimizer: Any) -> None:
    optimizer.state[p]["second_moment"].data = optimizer.state[p]["second_moment"].clone()


def new_row(p: Any, optimizer: Any) -> None:
    optimizer.state[p]["lstm_hidden"] = optimizer.state[p]["lstm_hidden"].clone()


def new_dicts(p: Any, optimizer: Any) -> None:
    optimizer.state[p] = copy.deepcopy(optimizer.state[p])
    shared = optimizer.param_groups[0]["shared"]
    optimizer.param_groups[0]["shared"] = copy.deepcopy(shared)
    shared["step"].fill_(1000)


def parameter_through_data(p: Any, optimizer: Any) -> None:
    p.data = p.detach().clone()


def other_strides(p: Any, optimizer: Any) -> None:
    p.data = p.detach().t().clone().t()


def strided_gradient(p: Any, optimizer: Any) -> None:
    p.grad = p.grad.t().clone().t()


DISTURBANCES = [
    new_state_array, state_through_data, new_row, new_dicts, parameter_through_data, other_strides, strided_gradient,
]  # fmt: skip


@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
def test_nothing_kept_goes_stale(backend: str, disturb: Callable[[Any, Any], None]) -> None:
    """Parameters, gradients and state may be moved between any two steps."""
    plain, moved = make_parameters(SHAPES), make_parameters(SHAPES)
    a, b = (make("nn_adam", params, backend=backend) for params in (plain, moved))
    for t in range(4):
        set_gradients(plain, t)
        set_gradients(moved, t)
        if t:
            disturb(moved[3], b)
        a.step(loss=1.0)
        b.step(loss=1.0)
        torch.testing.assert_close(plain, moved, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(arrays(b), arrays(a), rtol=1e-4, atol=1e-6)


def test_rows_can_be_written_to(backend: str) -> None:
    """They are views of what the tensor level computes with, and say what it computes with."""
    params, twins = make_parameters(SHAPES), make_parameters(SHAPES)
    a, b = make("nn_adam", params, backend=backend), make("nn_adam", twins, backend=backend)
    run(a, params, range(2))
    run(b, twins, range(2))
    a.state[params[3]]["lr"].fill_(-0.1)
    b.state[twins[3]]["lr"] = torch.full((), -0.1)
    run(a, params, range(2, 4))
    run(b, twins, range(2, 4))
    assert_same(params, twins)
    assert_state_same(arrays(a), arrays(b))
    only_some = through_file(a.state[params[3]])
    assert only_some["lr"] == a.state[params[3]]["lr"]


@some
def test_parameters_come_later(name: str) -> None:
    params, twins = make_parameters(SHAPES), make_parameters(SHAPES)
    optimizer = LearnedOptimizer([{"params": []}], checkpoint(name), num_steps=NUM_STEPS, backend="reference")
    optimizer.step(loss=1.0)
    optimizer.add_param_group({"params": params})
    twin = LearnedOptimizer(twins, checkpoint(name), num_steps=NUM_STEPS, backend="reference")
    run(optimizer, params, range(2))
    run(twin, twins, range(2))
    assert_same(params, twins)


# ---- the length of the training, losses ----


def test_num_steps() -> None:
    params = make_parameters(SHAPES)
    with pytest.raises(ValueError, match=r"celo knows how long.*num_steps"):
        make("celo", params, num_steps=None)
    for bad in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="num_steps="):
            make("celo", params, num_steps=bad)
    make("adamw", params, num_steps=None)

    optimizer = make("celo", params)
    run(optimizer, params, range(2))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    longer = make("celo", others, num_steps=2 * NUM_STEPS)
    with pytest.warns(UserWarning, match="num_steps=80.*num_steps=40.*stretches") as caught:
        longer.load_state_dict(optimizer.state_dict())
    assert len(caught) == 1
    assert longer.num_steps == longer.param_groups[0]["shared"]["num_steps"] == 2 * NUM_STEPS
    optimizer.num_steps = 2 * NUM_STEPS  # the new number is what counts, in both
    run(optimizer, params, range(2, 3))
    run(longer, others, range(2, 3))
    assert_same(params, others)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("started", [False, True])
def test_missing_loss(started: bool) -> None:
    params = make_parameters(SHAPES)
    optimizer = make("celo", params)
    run(optimizer, params, range(2 if started else 0))
    set_gradients(params, 2)
    before, state = values(params), arrays(optimizer)
    for arguments, match in (
        ({}, "celo looks at the training loss: call step.loss=loss."),
        ({"closure": lambda: None}, "looks at the training loss"),
        ({"loss": torch.ones(2)}, "must be one real number"),
        ({"loss": "small"}, "loss='small': must be one real number"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.step(**arguments)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match="looks at the training loss"):
        optimizer.step()  # its gradients are not zero
    assert_same(before, params)
    assert_state_same(state, arrays(optimizer))


def test_losses_in_all_forms() -> None:
    """A number, tensors of one element and what a closure returns; nothing is learned about its graph."""
    results = []
    for form in (float, lambda x: torch.tensor([x], dtype=torch.float64), np.float64, "closure"):
        params = make_parameters(SHAPES)
        optimizer = make("celo", params)
        for t in range(3):
            set_gradients(params, t)
            loss = torch.tensor(1.5 + t, requires_grad=True) * 1.0
            if form == "closure":
                assert optimizer.step(lambda loss=loss: loss) is loss
            else:
                optimizer.step(loss=form(1.5 + t))  # type: ignore[operator]
        results.append(params)
    for other in results[1:]:
        assert_same(results[0], other)


def test_validation_losses(backend: str) -> None:
    """Seen by rnn_fc_lopt as by its definition; others take no notice."""
    params = make_parameters(SHAPES, dtype=torch.float64)
    optimizer = make("rnn_fc_lopt", params, backend=backend)
    oracle = Oracle("rnn_fc_lopt", params, LABELS)
    before = oracle.shared
    for t in range(3):
        set_gradients(params, t)
        oracle.step([p.grad for p in params], loss_at(t), 1.0, 0.0)
        optimizer.step(loss=loss_at(t))
        oracle.shared = oracle.architecture.observe_validation(oracle.theta, oracle.shared, np.asarray(3.0))
        optimizer.observe_validation(torch.tensor(3.0))
    assert any(not np.array_equal(a, oracle.shared[key]) for key, a in before.items())
    for key, a in oracle.shared.items():
        np.testing.assert_allclose(optimizer.param_groups[0]["shared"][key].numpy(), a, rtol=1e-9)
    for p, expected in zip(params, oracle.params, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-9)
    for bad in (torch.ones(3), None, "low"):
        with pytest.raises(ValueError, match="one real number"):
            optimizer.observe_validation(bad)
    quiet = make("celo", make_parameters(SHAPES))
    state = arrays(quiet)
    quiet.observe_validation(3.0)
    assert_state_same(state, arrays(quiet))
    LearnedOptimizer([torch.zeros(2)], backend="reference").observe_validation(3.0)


# ---- mixed precision, compilation, devices ----


@some
def test_grad_scaler(name: str, backend: str) -> None:
    """Scaled by a power of two: the same bits. A gradient that is not finite: no step at all, no count."""
    results = []
    for enabled in (False, True):
        params = make_parameters(SHAPES)
        optimizer = make(name, params, backend=backend)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**10, growth_interval=2)
        scaler.scale(torch.zeros(()))  # makes its tensors
        for t in range(3):
            set_gradients(params, t, scaler.get_scale())
            scaler.step(optimizer, loss=loss_at(t))
            scaler.update()
        results.append(params)
    assert_same(*results)
    before, state = values(params), arrays(optimizer)
    set_gradients(params, 9)
    params[3].grad[0, 0] = math.inf
    scaler.step(optimizer, loss=1.0)
    assert_same(before, params)
    assert_state_same(state, arrays(optimizer))


@some
def test_autocast_and_inference_mode(name: str, backend: str) -> None:
    plain, others = make_parameters(SHAPES), make_parameters(SHAPES)
    a, b = make(name, plain, backend=backend), make(name, others, backend=backend)
    for t in range(3):
        set_gradients(plain, t)
        set_gradients(others, t)
        a.step(loss=loss_at(t))
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(t == 1):
            b.step(loss=loss_at(t))
    assert_same(plain, others)


@some
def test_compile(name: str) -> None:
    """The same numbers as without."""
    torch._dynamo.reset()
    results = []
    for use in (False, True):
        params = make_parameters([(3, 4), (5,)])
        optimizer = make(name, params)
        step = torch.compile(optimizer.step, backend="eager") if use else optimizer.step
        for t in range(3):
            set_gradients(params, t)
            step(loss=torch.tensor(loss_at(t)))
        results.append(params)
    assert_same(*results)


@every
def test_nothing_is_read_from_a_device(name: str) -> None:
    """Tensors of the meta device have no values: reading one raises an error."""
    on = {"device": "meta"}
    params = [
        torch.nn.Parameter(torch.zeros(shape, dtype=dtype, **on))
        for shape, dtype in zip(SHAPES[:3], [torch.float32, torch.bfloat16, torch.float16], strict=True)
    ]
    optimizer = make(name, params, max_grad_norm=1.0)
    optimizer.param_groups[0].update(lr=torch.tensor(0.5, **on), weight_decay=torch.ones(1, **on))
    for t in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.grad_scale = torch.ones(1, **on) if t else None
        optimizer.found_inf = torch.zeros(1, **on) if t else None
        optimizer.step(loss=torch.zeros((), **on))
    optimizer.observe_validation(torch.zeros((), **on))
    assert all(a.is_meta for entries in optimizer.state.values() for a in entries.values())
    assert optimizer.param_groups[0]["shared"]["step"].is_meta


class NumbersBecomeTensors(torch.overrides.TorchFunctionMode):
    """Counts the tensors that are made of Python's numbers: on a device, each would be waited for."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        makers = (torch.asarray, torch.tensor, torch.as_tensor, torch.from_numpy, torch.scalar_tensor)
        if function in makers and not isinstance(args[0], torch.Tensor):
            self.count += 1
        return function(*args, **(kwargs or {}))


@every
def test_nothing_is_copied_to_a_device(name: str) -> None:
    """Once the first step is done."""
    params = make_parameters(SHAPES)
    optimizer = make(name, params, max_grad_norm=1.0)
    run(optimizer, params, range(1))
    set_gradients(params, 1)
    with NumbersBecomeTensors() as mode:
        torch.tensor(1.0)
        assert mode.count == 1  # it does count
        optimizer.step(loss=2.0)
    assert mode.count == 1


def test_found_inf_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read: everything is computed, and nothing changes. Nothing else is read either."""
    from lopt_fast.torch import architecture_plan, optimizer, scalars

    for module in (architecture_plan, scalars):
        monkeypatch.setattr(module, "HOST", set())
    for module in (architecture_plan, optimizer):
        monkeypatch.setattr(module, "on_host", lambda value: not isinstance(value, torch.Tensor))
    params, twins = make_parameters(SHAPES), make_parameters(SHAPES)
    a, b = make("rnn_fc_lopt", params), make("rnn_fc_lopt", twins)
    run(a, params, range(2))
    run(b, twins, range(2))
    a.found_inf, a.grad_scale = torch.ones(1), torch.full((1,), 4.0)
    set_gradients(params, 2)
    params[0].grad[0, 0] = math.nan
    unread_step(a, math.nan)
    assert_state_same(arrays(a), arrays(b))
    assert_same(params, twins)
    a.found_inf = torch.zeros(1)
    set_gradients(params, 2, 4.0)
    set_gradients(twins, 2)
    unread_step(a, 1.0)
    b.step(loss=1.0)
    assert_same(params, twins)
    assert_state_same(arrays(a), arrays(b))


def unread_step(optimizer: Any, loss: float) -> None:
    """A step in which reading a tensor raises an error."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor is read")

    with pytest.MonkeyPatch.context() as patch:
        for reader in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__"):
            patch.setattr(torch.Tensor, reader, refuse)
        optimizer.step(loss=torch.tensor(loss))


# ---- errors ----


def test_unusable_gradients_change_nothing() -> None:
    def sparse(p: Any) -> None:
        p.grad = torch.zeros(5).to_sparse()

    def wrong_type(p: Any) -> None:
        p.data = p.data.double()

    for match, spoil in (
        (r"'first\.bias'.*sparse", sparse),
        (r"'first\.bias'.*type torch.float32, the parameter torch.float64", wrong_type),
    ):
        for steps in (0, 2):
            params = make_parameters(SHAPES)
            optimizer = make("rnn_fc_lopt", params)
            run(optimizer, params, range(steps))
            set_gradients(params, steps)
            spoil(params[2])
            before, state = values(params), arrays(optimizer)
            with pytest.raises(ValueError, match=match):
                optimizer.step(loss=1.0)
            assert_same(before, values(params))
            assert_state_same(state, arrays(optimizer))


def test_fallback_warns_once_and_force_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace()  # a compiled core without these kernels
    monkeypatch.setattr(backends, "_import_native", lambda: (older, ""))
    monkeypatch.setattr(operations, "_warned", set())
    params = make_parameters(SHAPES)
    with pytest.warns(
        backends.BackendWarning, match=r"celo on cpu uses the reference.*older than these kernels"
    ):
        optimizer = make("celo", params, backend="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, params, range(1))
        make("celo", params, backend="auto")
        make("celo", params, backend="reference")
    assert optimizer.backends == {"cpu float32": "reference"}
    with pytest.raises(backends.BackendError, match=r"backend='cpu' of celo cannot be used.*older"):
        make("celo", params, backend="cpu")
    with pytest.warns(backends.BackendWarning, match="arrays are on meta"):
        make("celo", [torch.zeros(3, device="meta")], backend="auto")


def test_unusable_arguments() -> None:
    params = make_parameters(SHAPES)
    for name in NAMES:
        with pytest.raises(ValueError, match=f"statistics='lagged'.*{name}"):
            make(name, params, statistics="lagged")
    with pytest.raises(ValueError, match=r"on cpu.* on meta: celo sees all.*one device"):
        make("celo", [*params[:5], torch.zeros(3, device="meta")])
    with pytest.raises(backends.BackendError, match="must be one of"):
        make("celo", params, backend="gpu-farm")
    with pytest.raises(backends.BackendError, match=r"cuda.*celo"):
        make("celo", params, backend="cuda")
    with pytest.raises(backends.BackendError, match=r"cpu.*sgdm is plain array code"):
        make("sgdm", params, backend="cpu")
    optimizer = make("celo", params)
    with pytest.raises(ValueError, match="one device"):
        optimizer.add_param_group({"params": [("late", torch.zeros(3, device="meta"))]})
    assert len(optimizer.param_groups) == 1
    assert "shared" not in repr(optimizer)
    assert optimizer.backends == {"cpu float32": "reference"}


# ---- lopt-fast train ----


def test_training_runs(tmp_path: Path) -> None:
    """Architectures that need the loss and the number of steps, and one without meta-parameters."""
    path = checkpoint("celo").save(tmp_path / "weights.safetensors")
    result = train(TrainConfig("quadratic", [parse(str(path)), parse("nadamw@lr=10")], 30))
    for entry in result.entries:
        assert len(entry.curve.losses) == 30
        assert np.isfinite(entry.curve.losses).all()
    _, nadamw = result.entries
    assert nadamw.curve.losses[-1] < 0.9 * nadamw.curve.losses[0]
    assert 8 <= nadamw.state_bytes / nadamw.parameters < 9
    with pytest.raises(TrainingError, match="nadamw has 'exact' alone"):
        parse("nadamw@statistics=lagged")
    with pytest.raises(TrainingError, match="celo has 'exact' alone"):
        parse(str(path), statistics="lagged")


@pytest.mark.filterwarnings("ignore::lopt_fast.backends.BackendWarning")
def test_frameworks_train_alike(tmp_path: Path) -> None:
    """By a schedule over the number of steps. That JAX gets the loss is seen by its being required."""
    pytest.importorskip("jax")
    nadamw = Checkpoint(NAdamW(learning_rate=0.1, warmup_fraction=0.3, final_fraction=0.0), {})
    paths = [
        nadamw.save(tmp_path / "nadamw.safetensors"),
        checkpoint("celo").save(tmp_path / "celo.safetensors"),
    ]
    choices = [parse(str(path)) for path in paths]
    results = [train(TrainConfig("quadratic", choices, 10, framework)) for framework in ("torch", "jax")]
    for first, second in zip(*(result.entries for result in results), strict=True):
        np.testing.assert_allclose(first.curve.losses, second.curve.losses, rtol=1e-4)
    losses = results[0].entries[0].curve.losses
    assert losses[-1] < losses[0]
