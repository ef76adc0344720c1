"""The Triton kernels of small_fc_lopt on a GPU: steps against the reference, capture, repeatability, autotuned blocks,
many elements. Each width, type and kind of shape takes Triton seconds to compile: few of them together."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from triton_problem import Problem  # noqa: E402

from lopt_fast.spec import Spec  # noqa: E402
from lopt_fast.torch import triton as driver  # noqa: E402

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)

SHAPES = [
    (),
    (1,),
    (1, 7),
    (5, 1),
    (48, 48),
    (3, 4, 5),
    (64, 32, 3, 3),
    (3, 3, 16, 40),
    (0, 3),
    (70_001,),
    (1000, 264),
]
TWO_KINDS = [(1000, 264), (70_001,)]


@pytest.fixture(autouse=True)
def _there_is_a_gpu(backend: str) -> None: ...


def problem(spec: Spec, shapes: list[Any] = SHAPES, **options: Any) -> Problem:
    return Problem(spec, shapes, device="cuda", **options)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_steps(statistics: Any) -> None:
    steps = problem(Spec(statistics=statistics))
    for _ in range(3):
        steps.step(max_norm=1e6)


@pytest.mark.parametrize(("width", "layers"), [(2, 2), (4, 1), (8, 1), (16, 2), (32, 1), (64, 2)])
def test_widths(width: int, layers: int) -> None:
    # Of 16 units on its own, Triton takes 10 s to compile each kind.
    steps = problem(Spec(hidden_size=width, hidden_layers=layers), TWO_KINDS[: 1 if width == 16 else 2])
    for _ in range(2):
        steps.step(max_norm=1e6)


@pytest.mark.parametrize("precision", [None, "ieee"])
def test_precision_of_products(precision: str | None) -> None:
    problem(Spec(hidden_size=16), TWO_KINDS, variant="matmul", precision=precision).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype: Any) -> None:
    problem(
        Spec(), [*TWO_KINDS, (64, 32, 3, 3)], param_dtype=dtype, state_dtype=torch.bfloat16, started=True
    ).step()


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_nan_spreads(max_norm: float | None) -> None:
    """Through a tensor without clipping, through all with it. The interpreter's maximum keeps NaN in any case."""
    steps = problem(Spec(), [(3, 9), (5,), (4,)])
    grads = steps.gradients()
    grads[0][1, 2] = float("nan")
    steps.kernel.step(grads, lrs=[1.0], weight_decays=[0.0], max_norm=max_norm)
    spread = [bool(t.param.isnan().all()) for t in steps.tensors]
    assert spread == ([True] * 3 if max_norm else [True, False, False])


def test_the_same_bits_every_time() -> None:
    def run() -> list[Any]:
        steps = problem(Spec(statistics="lagged"), TWO_KINDS, state_dtype=torch.bfloat16)
        for _ in range(3):
            steps.kernel.step(steps.gradients(), lrs=[1.0], weight_decays=[0.1], max_norm=0.1)
            steps.t += 1
        return [t.param for t in steps.tensors] + [a for t in steps.tensors for a in t.state.values()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_autotuned_blocks_give_the_same_bits() -> None:
    problems = [problem(Spec(), TWO_KINDS, autotune=tune) for tune in (False, True)]
    for steps in problems:
        steps.kernel.step(steps.gradients(), lrs=[1.0], weight_decays=[0.0])
    k, kernel = driver.kernels(), problems[0].kernel
    for layout in kernel._layouts:
        for choice in k.choices(layout, kernel._network):
            other = problem(Spec(), TWO_KINDS, autotune=False)
            constants, options = k.instance("apply", layout, kernel._network)
            other.kernel._instances["apply", layout] = k.KERNELS["apply"], constants | options | choice
            other.kernel.step(other.gradients(), lrs=[1.0], weight_decays=[0.0])
            problems.append(other)
    for steps in problems[1:]:
        for a, b in zip(problems[0].tensors, steps.tensors, strict=True):
            assert torch.equal(a.param, b.param), a.name


def test_captured_steps_advance() -> None:
    lr = torch.tensor(1.0, device="cuda")
    problems = [problem(Spec(), [(64, 48), (33,)]) for _ in range(2)]
    grads = problems[0].gradients()
    numbers: dict[str, Any] = {"lrs": [lr], "weight_decays": [0.1], "max_norm": 1.0}
    eager, captured = (p.kernel for p in problems)
    for kernel in (eager, captured):
        kernel.step(grads, **numbers)
    static = [g.clone() for g in grads]  # other addresses than in the steps before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(static, **numbers)
    for factor in (1.0, 0.5):
        lr.fill_(factor)
        for g, s in zip(grads, static, strict=True):
            g.mul_(1.5)
            s.copy_(g)
        eager.step(grads, **numbers)
        graph.replay()
    for a, b in zip(problems[0].tensors, problems[1].tensors, strict=True):
        assert torch.equal(a.param, b.param)
        assert int(b.step) == 3


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_a_graph_keeps_its_gradients_and_numbers(statistics: Any) -> None:
    """Steps and another graph between its replays have other gradients, rates and clipping: the bits of eager."""
    problems = [problem(Spec(statistics=statistics), [(64, 48), (33,)]) for _ in range(2)]
    eager, mixed = (p.kernel for p in problems)
    grads = problems[0].gradients()
    # Gradients and numbers of each kind; "known" is what the device has when the others are captured.
    kinds: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "known": (grads, {"lrs": [0.5], "weight_decays": [0.1]}),
        "graph": (grads, {"lrs": [0.5], "weight_decays": [0.1], "max_norm": 1.0}),
        "other graph": (grads, {"lrs": [0.25], "weight_decays": [0.0]}),
        "step": ([-3.0 * g for g in grads], {"lrs": [0.25], "weight_decays": [0.0]}),
    }
    graphs = {kind: torch.cuda.CUDAGraph() for kind in ("graph", "other graph")}

    def step(kernel: Any, kind: str) -> None:
        kernel.step(kinds[kind][0], **kinds[kind][1])

    for kernel in (eager, mixed):
        step(kernel, "known")
    for kind, graph in graphs.items():
        with torch.cuda.graph(graph):
            step(mixed, kind)
    for kind in ("step", "graph", "step", "other graph", "known", "graph", "graph"):
        graphs[kind].replay() if kind in graphs else step(mixed, kind)
        step(eager, kind)
    for a, b in zip(problems[0].tensors, problems[1].tensors, strict=True):
        assert torch.equal(a.param, b.param), a.name
        assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
        assert int(b.step) == 8


def test_none_is_made_in_a_capture() -> None:
    steps = problem(Spec(), [(3, 9)])
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        driver.TritonStep(steps.spec, steps.theta, steps.tensors)


def test_nothing_on_the_host_waits() -> None:
    steps = problem(Spec(), [(64, 48), (33,)])
    options: dict[str, Any] = {
        "lrs": [torch.tensor(1.0, device="cuda")],
        "weight_decays": [0.1],
        "max_norm": 1.0,
    }
    steps.kernel.step(steps.gradients(), **options)
    grads = steps.gradients()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.kernel.step(grads, found_inf=torch.zeros(1, device="cuda"), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_elements_than_32_bits_count() -> None:
    """The last elements of a tensor of 2^31 + 2^16 follow the reference's rule for equal gradients: all move alike."""
    n = (1 << 31) + (1 << 16)
    if torch.cuda.mem_get_info()[0] < 16 * n:
        pytest.skip("too little memory")
    p = torch.ones(n // 64, 64, device="cuda", dtype=torch.bfloat16)
    steps = Problem(
        Spec(step_mult=1.0), [tuple(p.shape)], params=[p], device="cuda", state_dtype=torch.bfloat16
    )
    steps.kernel.step([torch.ones_like(p)], lrs=[1.0], weight_decays=[0.0])
    assert torch.isfinite(p[-1]).all()
    assert not torch.equal(p[-1], torch.ones_like(p[-1]))
    assert torch.equal(p[-1], p[0])
    assert bool((p == p[0, 0]).all())
