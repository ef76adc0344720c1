"""The thread pools of csrc/pool.cc, seen through the kernel: the same bits whoever does the tasks, and no hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import random_theta

from lopt_fast import backends, native
from lopt_fast.spec import Spec

_module, _reason = backends._import_native()
pytestmark = pytest.mark.skipif(_module is None, reason=f"no compiled kernels: {_reason}")

SPEC = Spec()
THETA = random_theta(SPEC)
SHAPES = [(300, 200), (70_001,), *[(13, 7)] * 40, (2, 3, 40, 50), (0,), ()]

PROLOGUE = """
import os, sys, threading
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import test_pool
def check(pool, threads):
    assert test_pool.same(test_pool.run(pool, threads), expected)
expected = test_pool.run("serial", 1)
"""


def run(pool: str, threads: int, steps: int = 2) -> list[np.ndarray]:
    """Parameters and state after some steps with clipping, which sums over all tensors."""
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape, np.float32) for shape in SHAPES]
    params = [np.asarray(p, np.float32).reshape(shape) for p, shape in zip(params, SHAPES, strict=True)]
    states = [native.init_state(SPEC, p) for p in params]
    for t in range(steps):
        grads = [np.asarray(rng.standard_normal(p.shape), np.float32) for p in params]
        native.small_fc_step(
            SPEC, THETA, params, grads, states, t=t, max_grad_norm=1.0, pool=pool, threads=threads
        )
    return [*params, *(array for state in states for array in state)]


def same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    assert all(np.isfinite(b).all() for b in expected)
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def in_new_process(code: str, timeout: float = 120) -> str:
    """Output of `code` after PROLOGUE; fails if it hangs or fails."""
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, __file__],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    return run("serial", 1)


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("pool", ["own", "openmp"])
def test_same_bits_for_any_pool(expected: list[np.ndarray], pool: str, threads: int) -> None:
    assert same(run(pool, threads), expected)


def test_several_callers_at_once(expected: list[np.ndarray]) -> None:
    outcomes: list[bool] = []
    callers = [
        threading.Thread(target=lambda n=n: outcomes.extend(same(run("own", n), expected) for _ in range(5)))
        for n in (2, 2, 3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert outcomes == [True] * 15


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("pool", ["own", "openmp"])
def test_children_of_a_fork(pool: str) -> None:
    framework = "import torch; torch.ones(100_000).sum()" if pool == "openmp" else ""
    if framework:
        pytest.importorskip("torch")
    in_new_process(f"""
{framework}
check({pool!r}, 2)
stop = False
def work():
    while not stop: check({pool!r}, 2)
worker = threading.Thread(target=work); worker.start()  # forks happen in the middle of its runs
for _ in range(5):
    child = os.fork()
    if not child:
        code = 1
        try:
            check({pool!r}, 2); code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop = True
worker.join()
check({pool!r}, 2)
""")


@pytest.mark.parametrize("seconds", [0, 0.1])
def test_exit_with_workers_that_spin_or_sleep(seconds: float) -> None:
    in_new_process(f"import time; check('own', 2); check('own', 3); time.sleep({seconds})")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_workers_are_as_many_as_asked_and_leave_signals_alone() -> None:
    out = in_new_process("""
from pathlib import Path
before = set(os.listdir("/proc/self/task"))
check("own", 3); check("own", 3); check("own", 1)
for task in sorted(set(os.listdir("/proc/self/task")) - before):
    status = Path("/proc/self/task", task, "status").read_text()
    print(next(line for line in status.splitlines() if line.startswith("SigBlk")))
""")
    masks = [int(line.split()[1], 16) for line in out.splitlines()]
    assert len(masks) == 2
    assert all(mask >> (2 - 1) & 1 and mask >> (15 - 1) & 1 for mask in masks)  # SIGINT, SIGTERM


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_openmp_is_that_of_torch() -> None:
    """One thread pool in the process, PyTorch's, and torch.set_num_threads counts."""
    pytest.importorskip("torch")
    out = in_new_process("""
import torch
def tasks(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
x = torch.ones(4_000_000); (x + x).sum()
before = tasks()
check("openmp", 3); check("openmp", 0)
print(before, tasks())
""")
    before, after = map(int, out.split())
    if before < 3:
        pytest.skip("this PyTorch does not use OpenMP")
    assert after == before


@pytest.mark.parametrize(("pool", "threads"), [("serial", 1), ("own", 2), ("own", 4), ("openmp", 2)])
def test_a_task_that_throws(expected: list[np.ndarray], pool: str, threads: int) -> None:
    """The caller gets the exception, whichever task throws it, and the pool works as before."""
    for i in range(300):
        tasks, failing = (1, 2, 7, 40)[i % 4], (0, 1, 3, 39)[i % 4] if i % 8 else 0
        with pytest.raises(MemoryError):
            _module.pool_test(pool=pool, threads=threads, tasks=tasks, failing=min(failing, tasks - 1))
        assert _module.pool_test(pool=pool, threads=threads, tasks=tasks, failing=-1) == tasks
    assert same(run(pool, threads), expected)


def test_openmp_with_tasks_that_throw() -> None:
    """On the threads of PyTorch's OpenMP."""
    pytest.importorskip("torch")
    in_new_process("""
import torch
torch.ones(100_000).sum()
module = test_pool._module
for i in range(200):
    try:
        module.pool_test(pool="openmp", threads=3, tasks=20, failing=i % 20)
    except MemoryError:
        pass
    else:
        raise AssertionError(i)
check("openmp", 3)
""")


# What a step allocates besides its arrays is all had before the first of them is written: with less memory than that,
# nothing has changed. The tall matrix needs some 30 MB, the small tensors come before it.
OUT_OF_MEMORY = """
import resource
import numpy as np
from lopt_fast import native

def with_little_memory(step, arrays):
    step()  # what the first call sets up
    before = [a.copy() for a in arrays()]
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 10_000_000, limits[1]))
    try:
        step()
    except MemoryError:
        print("out of memory")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert test_pool.same(arrays(), before)
    step()
    assert not np.array_equal(arrays()[0], before[0])
"""
needs_limits = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc")


@needs_limits
@pytest.mark.parametrize(("pool", "threads"), [("serial", 1), ("own", 2)])
def test_out_of_memory_changes_nothing(pool: str, threads: int) -> None:
    out = in_new_process(f"""{OUT_OF_MEMORY}
spec, rng = test_pool.SPEC, np.random.default_rng(0)
params = [rng.standard_normal(s, np.float32) for s in [(7, 9)] * 5 + [(300, 300), (1_000_000, 1)]]
states = [native.init_state(spec, p) for p in params]
def step():
    native.small_fc_step(
        spec, test_pool.THETA, params, params, states, t=0, pool={pool!r}, threads={threads}
    )
with_little_memory(step, lambda: [*params, *(s.second_moment for s in states)])
""")
    assert out == "out of memory\n"


@needs_limits
def test_out_of_memory_changes_nothing_in_torch() -> None:
    """Of an architecture, whose steps are several operations; the number of the step included."""
    pytest.importorskip("torch")
    out = in_new_process(f"""{OUT_OF_MEMORY}
import torch
from lopt_fast.torch import LearnedOptimizer
params = [torch.nn.Parameter(torch.randn(s)) for s in [(7, 9)] * 5 + [(300, 300), (1_000_000, 1)]]
optimizer = LearnedOptimizer(params, "celo", backend="cpu", num_steps=10)
for p in params:
    p.grad = torch.randn_like(p)
def arrays():
    state = optimizer.state_dict()
    shared = state["param_groups"][0].get("shared", {{}})
    kept = [shared[k] for k in sorted(shared) if k != "num_steps"]
    for one in state["state"].values():
        kept += [one[k] for k in sorted(one)]
    return [*(p.detach().numpy() for p in params), *map(np.asarray, kept)]
with_little_memory(lambda: optimizer.step(loss=1.0), arrays)
""")
    assert out == "out of memory\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_first_step_in_the_child_of_a_fork() -> None:
    """Of a process in which PyTorch has used OpenMP, and lopt_fast no pool: nothing of it but the import."""
    pytest.importorskip("torch")
    in_new_process("""
import time
import torch
from lopt_fast.torch import LearnedOptimizer
torch.set_num_threads(2)
torch.ones(4_000_000).sum()
params = [torch.nn.Parameter(torch.ones(90, 100)) for _ in range(20)]  # small: PyTorch itself hangs in such a child
for p in params:
    p.grad = torch.ones(90, 100)
optimizer = LearnedOptimizer(params)
child = os.fork()
if not child:
    code = 1
    try:
        optimizer.step(); code = 0
    finally:
        os._exit(code)
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    raise AssertionError("the step hangs")
assert os.waitstatus_to_exitcode(status) == 0
""")
