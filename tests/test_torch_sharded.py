"""`LearnedOptimizer` on parameters that are DTensors: several processes together do what one does with whole tensors.

Each test runs one of the functions `check_...` in all processes of a pool, which start once. There an optimizer of
whole tensors, the twin, gets the same gradients.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
dist = torch.distributed
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(),
    reason="PyTorch without process groups on the CPU",
)

from helpers import assert_update_close, random_theta  # noqa: E402

from lopt_fast.architectures import ARCHITECTURES  # noqa: E402
from lopt_fast.backends import BackendError, _import_native  # noqa: E402
from lopt_fast.checkpoint import Checkpoint  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402
from lopt_fast.torch import LearnedOptimizer, dtensors  # noqa: E402

if _import_native()[0] is None:
    pytest.skip("no compiled kernels", allow_module_level=True)

PROCESSES = 4
TIMEOUT = 60.0
"""Seconds that processes wait for each other."""


# ---- processes ----


class Pool:
    """Processes that run what they are told to, in groups of any size."""

    def __init__(self, folder: Path) -> None:
        context = torch.multiprocessing.get_context("forkserver")  # what takes long to import is so once
        context.set_forkserver_preload(["lopt_fast.torch", "torch._dynamo", "torch.distributed.fsdp"])
        self.folder, self.groups, self.broken = folder, 0, False
        self.pipes, self.processes = [], []
        for _ in range(PROCESSES):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there,), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, check: Callable[..., None], *args: Any, size: int = PROCESSES) -> None:
        """`check` in `size` processes. Once one has failed no more is run: others may still wait for it."""
        if self.broken:
            pytest.skip("the processes have failed in another test")
        self.groups += 1
        for rank in range(size):
            self.pipes[rank].send((rank, size, str(self.folder / str(self.groups)), check.__name__, args))
        failures = []
        for rank in range(size):
            answer = self.pipes[rank].recv() if self.pipes[rank].poll(2 * TIMEOUT) else "no answer"
            failures += [f"process {rank}: {answer}"] if answer else []
        self.broken = bool(failures)
        assert not failures, "\n".join(failures)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def work(pipe: Any) -> None:
    """What a process of a pool runs."""
    torch.set_num_threads(1)
    while True:
        rank, size, file, name, args = pipe.recv()
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{file}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=TIMEOUT),
            )
            globals()[name](*args)
            dist.destroy_process_group()
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    found = Pool(tmp_path_factory.mktemp("processes"))
    yield found
    found.close()


# ---- what runs in the processes ----


def mesh_of(*shape: int) -> Any:
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])


def placed(text: str) -> list[Any]:
    """ "0r" is [Shard(0), Replicate()]."""
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if kind == "r" else Shard(int(kind)) for kind in text]


def sharded(tensor: Any, mesh: Any, text: str) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, placed(text))


def weights(statistics: str = "exact") -> Checkpoint:
    spec = Spec().with_statistics(statistics)
    return Checkpoint(spec, random_theta(spec))


def whole(p: Any) -> Any:
    p = p.detach()
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).clone()


def numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy()


HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Together:
    """An optimizer of DTensors (and others), and its twin with whole tensors."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        checkpoint = weights(options.pop("statistics", "exact"))
        self.params = [p for group in groups for p in group["params"]]
        self.twins = [torch.nn.Parameter(whole(p)) for p in self.params]
        twins = iter(self.twins)
        twin_groups = [{**group, "params": [next(twins) for _ in group["params"]]} for group in groups]
        self.optimizer = LearnedOptimizer(groups, checkpoint, **options)
        self.twin = LearnedOptimizer(twin_groups, checkpoint, **options)
        self.generator = torch.Generator().manual_seed(1)

    def gradients(self, without: tuple[int, ...] = (), scale: float = 1.0) -> None:
        """The same in all processes."""
        for i, p in enumerate(self.params):
            g = torch.randn(p.shape, generator=self.generator) * scale * 0.1 ** (i % 3)
            p.grad = None
            if i not in without:
                g = torch.empty_like(whole(p)).copy_(g)
                p.grad = sharded(g, p.device_mesh, _text(p)) if hasattr(p, "full_tensor") else g

    def step(self, what: str, **how: Any) -> None:
        """One step of both with the gradients of the parameters; then the twin takes over the parameters."""
        before = [whole(p) for p in self.params]
        versions = [p._version for p in self.params]
        for p, twin in zip(self.params, self.twins, strict=True):
            twin.grad = None if p.grad is None else whole(p.grad)
        self.optimizer.step(**how)
        self.twin.step(**how)
        for i, (p, twin, old) in enumerate(zip(self.params, self.twins, before, strict=True)):
            now, name = whole(p), f"{what}, parameter {i} {p.dtype}{tuple(p.shape)}"
            assert now.dtype == twin.dtype
            assert p.grad is None or p._version > versions[i], name
            if p.dtype in HALF_ULP:
                error = (numpy(now) - numpy(twin)).__abs__()
                assert (error <= 2.1 * HALF_ULP[p.dtype] * abs(numpy(twin)) + 1e-6).all(), name
            else:
                dtype = str(p.dtype).removeprefix("torch.")
                moved = numpy(twin) - numpy(old)
                assert_update_close(numpy(now) - numpy(old), moved, numpy(old), dtype, name)
                assert p.grad is None or not moved.size or np.abs(moved).max() > 0, name
            with torch.no_grad():
                twin.copy_(now)
        self.compare_state(what)

    def compare_state(self, what: str) -> None:
        for i, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            mine, others = self.optimizer.state[p], self.twin.state[twin]
            assert mine.keys() == others.keys()
            for key, a in mine.items():
                found, expected = numpy(whole(a)), numpy(others[key])
                name = f"{what}, {key} of parameter {i} {tuple(p.shape)}"
                assert found.shape == expected.shape, name
                if found.size:
                    bound = 1e-4 * np.abs(expected).max()
                    assert np.abs(found - expected).max() <= bound, name


def _text(p: Any) -> str:
    return "".join("r" if kind.is_replicate() else str(kind.dim) for kind in p.placements)


def parameter(tensor: Any) -> Any:
    return torch.nn.Parameter(tensor)


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(shape, generator=generator) for shape in shapes]


def model() -> Any:
    """Few rows, so that some processes hold no part of some parameters."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = torch.nn.Embedding(11, 16)
            self.conv = torch.nn.Conv2d(1, 5, 3)
            self.norm = torch.nn.LayerNorm(20)
            self.linear = torch.nn.Linear(20, 7)
            self.out = torch.nn.Linear(7, 2)

        def forward(self, tokens: Any) -> Any:
            image = self.embedding(tokens).reshape(-1, 1, 4, 4)
            return self.out(self.linear(self.norm(self.conv(image).flatten(1))).tanh())

    return Model()


def backward(net: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net.zero_grad()
    net(torch.randint(11, (6,))).square().sum().backward()


def check_fully_shard(statistics: str) -> None:
    from torch.distributed.fsdp import fully_shard

    net = model()
    for layer in (net.conv, net.linear):
        fully_shard(layer, mesh=mesh_of(4))
    fully_shard(net, mesh=mesh_of(4))
    params = list(net.parameters())
    assert any(p.to_local().numel() == 0 for p in params) or dist.get_rank() < 2
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "lr": 0.3}]
    both = Together(groups, max_grad_norm=0.5, statistics=statistics)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (both.optimizer, both.twin)]
    for step in range(4):
        backward(net, step)
        both.step(f"{statistics} step {step}")
        for scheduler in schedulers:
            scheduler.step()


MIXED = [
    ((12, 8), "0r"), ((5, 9), "r1"), ((6, 10), "01"), ((9, 4), "00"), ((3, 4), "rr"), ((7,), "00"), ((3,), "0r"),
    ((5, 4, 3), "20"), ((), "rr"), ((1, 3), "01"), ((0, 5), "0r"), ((8, 6, 3, 3), "10"), ((700, 500), "10"),
]  # fmt: skip


def check_meshes(statistics: str, max_grad_norm: float | None) -> None:
    """Two meshes, all kinds of placements, plain tensors beside; a gradient that is missing, and then comes."""
    square, line = mesh_of(2, 2), mesh_of(4)
    found = tensors(*(shape for shape, _ in MIXED))
    params = [sharded(t, square, text) for t, (_, text) in zip(found, MIXED, strict=True)]
    exact = (
        torch.float64 if max_grad_norm is None else torch.float32
    )  # the twin's norm is not as exact as float64
    transposed, images, half, double, halves, plain, long = tensors(
        (10, 6), (4, 3, 3, 6), (20, 6), (6, 5), (9,), (6, 7), (13, 5), seed=1
    )
    params += [
        sharded(transposed.T, square, "01"),
        sharded(images.permute(0, 3, 1, 2), square, "01"),
        sharded(half.bfloat16(), square, "10"),
        sharded(double.to(exact), square, "0r"),
        plain,
        sharded(halves.half(), square, "r0"),
        sharded(long, line, "0"),
    ]
    assert params[13].stride() == (1, 6)
    params = [parameter(p) for p in params]
    both = Together(
        [{"params": params, "weight_decay": 0.01}], statistics=statistics, max_grad_norm=max_grad_norm
    )
    for step, (without, scale) in enumerate([((1, 17), 1.0), ((), 20.0), ((0, 17), 0.1), ((), 1.0)]):
        both.gradients(without, scale)
        both.step(f"{statistics} step {step}")
    assert [int(both.optimizer.state[params[i]]["step"]) for i in (0, 1, 2, 17)] == [3, 3, 4, 2]
    order = both.optimizer.state[params[14]]["momentum"].to_local().stride()
    assert order[2] == 1, "the state is to lie in the order of the parameter's axes"


def check_parts_that_do_not_lie_densely() -> None:
    from torch.distributed.tensor import DTensor

    (values,) = tensors((8, 12))
    mesh, rank = mesh_of(4), dist.get_rank()
    mine = torch.zeros(12, 2).T.copy_(values[2 * rank : 2 * rank + 2])
    p = parameter(DTensor.from_local(mine, mesh, placed("0"), shape=values.shape, stride=values.stride()))
    assert p.to_local().stride() == (1, 2)
    assert p.stride() == (12, 1)
    both = Together([{"params": [p]}])
    for step in range(2):
        both.gradients()
        both.step(f"step {step}")


def check_tensor_parallel() -> None:
    """fully_shard of what tensor parallelism has cut along the same axis, and along another."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of(2, 2)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
    parallelize_module(net, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(net, mesh=mesh["outer"])
    assert "_StridedShard" in str(net[0].bias.placements)
    both = Together([{"params": list(net.parameters())}], max_grad_norm=0.1)
    for step in range(3):
        net.zero_grad()
        net(torch.ones(4, 6) * (step + 1)).square().sum().backward()
        both.step(f"step {step}")


def check_gradients_that_lie_elsewhere() -> None:
    from torch.distributed.tensor import DTensor, Partial

    mesh, rank = mesh_of(4), dist.get_rank()
    values = tensors((6, 5), (6, 5), (9,))
    both = Together(
        [{"params": [parameter(sharded(t, mesh, text)) for t, text in zip(values, "r0r", strict=True)]}]
    )
    for step in range(2):
        both.gradients()
        a, b, c = both.params
        g = DTensor.from_local(tensors((6, 5), seed=rank + 10 * step)[0], mesh, [Partial()])
        a.grad = g
        b.grad = g.redistribute(placements=placed("1"))
        c.grad = sharded(whole(c.grad), mesh, "0")
        both.step(f"step {step}")


def check_scaler() -> None:
    """An overflow in one process is one everywhere."""
    from torch.distributed.tensor import DTensor

    mesh, rank = mesh_of(4), dist.get_rank()
    both = Together([{"params": [parameter(sharded(t, mesh, "0")) for t in tensors((6, 5), (9,))]}])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        both.gradients()
        if step == 1:
            before = [whole(p) for p in both.params]
            local = both.params[0].grad.to_local().clone()
            local.fill_(float("inf")) if rank == 1 else None
            grad = DTensor.from_local(local, mesh, placed("0"), shape=(6, 5), stride=(5, 1))
            both.params[0].grad = grad
        scale = scaler.scale(torch.ones(()))
        for p in both.params:
            p.grad = p.grad * float(scale)
        for p, twin in zip(both.params, both.twins, strict=True):
            twin.grad = whole(p.grad) / float(scale)
        scaler.step(both.optimizer)
        scaler.update()
        if step != 1:
            both.twin.step()
            before = [t.detach() for t in both.twins]
        for p, old in zip(both.params, before, strict=True):
            torch.testing.assert_close(whole(p), old, rtol=1e-5, atol=1e-6)
        assert int(both.optimizer.state[both.params[0]]["step"]) == (1, 1, 2)[step]
    assert scaler.get_scale() == 4.0
    # Without GradScaler: what one process says holds for all.
    both.gradients()
    both.optimizer.found_inf = torch.tensor(float(rank == 2))
    before = [whole(p) for p in both.params]
    both.optimizer.step()
    assert all(torch.equal(whole(p), old) for p, old in zip(both.params, before, strict=True))


def check_state(statistics: str) -> None:
    """How it lies, and its ways: copies, pickles, state of whole tensors."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = mesh_of(2, 2)
    shapes = ((6, 10), (7,), (4, 3, 2))
    params = [
        parameter(sharded(t, mesh, x)) for t, x in zip(tensors(*shapes), ("01", "0r", "1r"), strict=True)
    ]
    both = Together([{"params": params}], statistics=statistics)
    both.gradients()
    both.step("first step")
    for p in params:
        state = both.optimizer.state[p]
        cut = tuple(Replicate() if x.is_replicate() else Shard(x.dim + 1) for x in p.placements)
        kept_whole = (Replicate(), Replicate())
        assert state["momentum"].placements == state["second_moment"].placements == cut
        assert state["factored_row"].placements == (kept_whole if p.dim() > 1 else cut)
        for key in {"factored_column", "mean_squares"} & state.keys():
            assert state[key].placements == kept_whole
        assert not isinstance(state["step"], DTensor)
        assert state["momentum"].shape == (3, *p.shape)
        assert state["momentum"].to_local().shape == (3, *p.to_local().shape)

    def goes_on_as(other: Any, others: list[Any], what: str) -> None:
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad if isinstance(q, DTensor) else whole(p.grad)
        other.step()
        for p, q, old in zip(params, others, start, strict=True):
            moved = numpy(whole(p)) - numpy(old)
            assert_update_close(numpy(whole(q)) - numpy(old), moved, numpy(old), "float32", what)

    def fresh() -> tuple[list[Any], LearnedOptimizer]:
        others = [parameter(p.detach().clone()) for p in params]
        return others, LearnedOptimizer(others, both.optimizer.checkpoint, statistics=statistics)

    ready = []
    copied, copied_params = copy.deepcopy((both.optimizer, params))
    ready.append((copied, copied_params, "deepcopy"))
    saved = io.BytesIO()
    torch.save(both.optimizer.state_dict(), saved)
    saved.seek(0)
    others, loaded = fresh()
    loaded.load_state_dict(torch.load(saved, weights_only=False))
    ready.append((loaded, others, "torch.save"))
    others, loaded = fresh()
    loaded.load_state_dict(both.twin.state_dict())
    ready.append((loaded, others, "state of whole tensors"))
    assert not any(
        a.untyped_storage().data_ptr() == b.to_local().untyped_storage().data_ptr()
        for p, q in zip(both.twins, others, strict=True)
        for a, b in zip(both.twin.state[p].values(), loaded.state[q].values(), strict=True)
        if isinstance(b, DTensor)
    )
    start = [whole(p) for p in params]
    both.gradients()
    both.step("second step")
    for other, others, what in ready:
        goes_on_as(other, others, what)

    # State may be changed between steps: in place, by another tensor, and by one that lies otherwise.
    both.gradients()
    for p, twin in zip(params, both.twins, strict=True):
        state, twin_state = both.optimizer.state[p], both.twin.state[twin]
        state["momentum"].to_local().mul_(2)
        twin_state["momentum"].mul_(2)
        state["second_moment"] = state["second_moment"] * 3
        twin_state["second_moment"].mul_(3)
        state["factored_row"] = whole(state["factored_row"])
    both.step("after changes")

    # A parameter may go to another group.
    for optimizer in (both.optimizer, both.twin):
        group = optimizer.param_groups[0]
        optimizer.param_groups.append({**group, "params": [group["params"].pop()], "lr": 0.2})
    both.gradients()
    both.step("after a change of groups")


def check_pickled_optimizer() -> None:
    import pickle

    mesh = mesh_of(4)
    params = [parameter(sharded(t, mesh, "0")) for t in tensors((6, 10), (7,))]
    both = Together([{"params": params}])
    both.gradients()
    both.step("first step")
    other = pickle.loads(pickle.dumps(both.optimizer))
    others = [p for group in other.param_groups for p in group["params"]]
    both.gradients()
    for p, q in zip(params, others, strict=True):
        q.grad = sharded(whole(p.grad), q.device_mesh, "0")
    other.step()
    both.step("second step")
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=0, atol=0)


def check_saving(folder: str, statistics: str) -> None:
    """Two steps, a checkpoint, two more steps whose results are kept."""
    from torch.distributed import checkpoint as saver
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    net = model()
    fully_shard(net, mesh=mesh_of(4))
    optimizer = LearnedOptimizer(net.parameters(), weights(statistics), lr=0.5)
    for step in range(4):
        if step == 2:
            state = {
                "model": get_model_state_dict(net),
                "optimizer": get_optimizer_state_dict(net, optimizer),
            }
            saver.save(state, checkpoint_id=folder)
        backward(net, step)
        optimizer.step()
    parameters = {name: whole(p) for name, p in net.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(parameters, Path(folder) / "expected")
    dist.barrier()


def check_going_on(folder: str, statistics: str, kind: str) -> None:
    from torch.distributed import checkpoint as saver
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        get_state_dict,
        set_optimizer_state_dict,
        set_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    net = model()
    if kind != "whole":
        fully_shard(net, mesh=mesh_of(2))
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    optimizer = LearnedOptimizer(net.parameters(), weights(statistics), lr=0.1)
    of_model, of_optimizer = get_state_dict(net, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    saver.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if kind in ("gathered", "broadcast"):  # all of the state in each process, or in one, and cut again
        gathered = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
        assert not any(hasattr(a, "placements") for of in gathered["state"].values() for a in of.values())
        optimizer = LearnedOptimizer(net.parameters(), weights(statistics), lr=0.1)
        broadcast = kind == "broadcast"
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        here = gathered if not broadcast or dist.get_rank() == 0 else {}
        set_optimizer_state_dict(net, optimizer, here, options=options)
    start = {name: whole(p) for name, p in net.named_parameters()}
    for step in (2, 3):
        backward(net, step)
        optimizer.step()
    expected = torch.load(Path(folder) / "expected")
    for name, p in net.named_parameters():
        moved = numpy(expected[name]) - numpy(start[name])
        error = np.abs(numpy(whole(p)) - numpy(expected[name])).max()
        assert np.abs(moved).max() > 0
        assert error <= 1e-6 * np.abs(numpy(start[name])).max() + 1e-3 * np.abs(moved).max(), name
    assert optimizer.param_groups[0]["lr"] == 0.5


def check_errors() -> None:
    from torch.distributed.tensor import DeviceMesh, DTensor, Partial
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, rank = mesh_of(4), dist.get_rank()

    def made(**options: Any) -> tuple[Any, LearnedOptimizer]:
        p = parameter(sharded(tensors((6, 5))[0], mesh, "0"))
        return p, LearnedOptimizer([("weight", p)], weights(), **options)

    for backend in ("reference", "cuda", "triton"):
        with pytest.raises(BackendError, match=r"'weight'.*DTensor.*'auto'"):
            made(backend=backend)
    p, optimizer = made(backend="cpu")
    assert optimizer.backends == {"cpu float32": "cpu"}
    with pytest.raises(BackendError, match=r"'weight'.*bfloat16"):
        made(state_dtype=torch.bfloat16)
    with pytest.raises(BackendError, match=r"'weight'.*DTensor.*small_fc_lopt"):
        LearnedOptimizer([("weight", p)], Checkpoint(ARCHITECTURES["adamw"](), {}))
    unusual = replace(Spec(), rms_decays=(0.9, 0.99, 0.999))
    with pytest.raises(BackendError, match=r"'weight'.*3 momentum"):
        LearnedOptimizer([("weight", p)], Checkpoint(unusual, random_theta(unusual)))
    meta = DTensor.from_local(torch.empty(2, 5, device="meta"), mesh, placed("0"))
    with pytest.raises(BackendError, match=r"'weight'.*on meta.*offload_policy"):
        LearnedOptimizer([("weight", parameter(meta))], weights())

    def refused(p: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            LearnedOptimizer([("weight", parameter(p))], weights())

    refused(DTensor.from_local(torch.ones(6, 5), mesh, [Partial()]), r"'weight'.*Partial.*redistribute")
    no_backend = mock.Mock()
    no_backend._get_backend.side_effect = RuntimeError("no backend for this device")
    with mock.patch.object(dtensors, "groups_of", return_value=[no_backend]):
        refused(sharded(torch.ones(6, 5), mesh, "0"), r"'weight'.*cpu:gloo")
    strided = _StridedShard(0, split_factor=2)
    refused(DTensor.from_local(torch.ones(6, 5), mesh, [strided]), r"'weight'.*StridedShard.*redistribute")
    uneven = torch.ones(2 + (rank == 0), 5)
    wrong = DTensor.from_local(uneven, mesh, placed("0"), shape=(8, 5), stride=(5, 1))
    if rank == 0:
        refused(wrong, r"'weight'.*\(3, 5\).*\(2, 5\).*distribute_tensor")
    refused(sharded(torch.ones(6, 5, dtype=torch.complex64), mesh, "0"), r"'weight'.*complex64")
    smaller = DeviceMesh("cpu", [0, 1])
    if rank > 1:
        refused(DTensor.from_local(torch.ones(0), smaller, placed("0")), r"'weight'.*without this process")

    # Of gradients: nothing is written.
    p, optimizer = made()
    before = whole(p)

    def refused_gradient(g: Any, match: str) -> None:
        p.grad = g
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        assert torch.equal(whole(p), before)

    other_mesh = mesh_of(2, 2)
    refused_gradient(sharded(torch.ones(6, 5), other_mesh, "0r"), r"'weight'.*on the mesh of p")
    fitting = sharded(torch.ones(6, 5), mesh, "0")
    refused_gradient(fitting if rank else None, r"'weight'.*some processes.*zeros")
    lagged_p, lagged = made(statistics="lagged")
    lagged_p.grad = fitting if rank else None
    with pytest.raises(ValueError, match=r"'weight'.*some processes"):
        lagged.step()
    refused_gradient(torch.ones(6, 5), r"'weight'.*not a DTensor.*distribute_tensor")
    p.grad = fitting
    optimizer.step()
    assert not torch.equal(whole(p), before)

    # Of state.
    saved = optimizer.state_dict()
    _, other = made()

    def refused_state(key: str, value: Any, match: str) -> None:
        entries = {**saved["state"][0], key: value}
        with pytest.raises(ValueError, match=match):
            other.load_state_dict({**saved, "state": {0: entries}})
        assert not other.state

    refused_state("momentum", torch.ones(3, 6, 4), r"'weight'.*'momentum' is \(3, 6, 4\)")
    refused_state(
        "momentum", saved["state"][0]["momentum"].redistribute(placements=placed("2")), "checkpoint"
    )
    refused_state("momentum", 3.0, r"'weight'.*'momentum' is float")
    twin = parameter(before)
    with pytest.raises(ValueError, match=r"'momentum' is DTensor"):
        LearnedOptimizer([twin], weights()).load_state_dict(saved)
    other.load_state_dict(saved)
    assert other.state


# ---- tests ----


def test_import_leaves_dtensors_alone() -> None:
    code = "import sys, lopt_fast.torch; sys.exit('torch.distributed.tensor' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_fully_shard(pool: Pool, statistics: str) -> None:
    pool.run(check_fully_shard, statistics)


@pytest.mark.parametrize(("statistics", "max_grad_norm"), [("exact", 0.5), ("lagged", None)])
def test_meshes_and_placements(pool: Pool, statistics: str, max_grad_norm: float | None) -> None:
    pool.run(check_meshes, statistics, max_grad_norm)


def test_parts_that_do_not_lie_densely(pool: Pool) -> None:
    pool.run(check_parts_that_do_not_lie_densely)


def test_tensor_parallel(pool: Pool) -> None:
    pool.run(check_tensor_parallel)


def test_gradients_that_lie_elsewhere(pool: Pool) -> None:
    pool.run(check_gradients_that_lie_elsewhere)


def test_scaler(pool: Pool) -> None:
    pool.run(check_scaler)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_state(pool: Pool, statistics: str) -> None:
    pool.run(check_state, statistics)


def test_pickled_optimizer(pool: Pool) -> None:
    pool.run(check_pickled_optimizer)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_checkpoint_onto_fewer_processes(pool: Pool, statistics: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    pool.run(check_saving, folder, statistics)
    for kind in ("sharded", "gathered", "broadcast", "whole"):
        pool.run(check_going_on, folder, statistics, kind, size=2)


def test_what_is_refused(pool: Pool) -> None:
    pool.run(check_errors)
