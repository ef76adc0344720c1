"""The Triton kernels in Triton's interpreter against the reference, on CPU tensors; tests/test_triton.py runs this file
in a process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from helpers import random_problem
from recorded_graph import RecordedGraph
from triton.runtime import interpreter
from triton_problem import Problem

from lopt_fast import reference
from lopt_fast.spec import Spec
from lopt_fast.torch.triton import TritonStep, fastest, kernels

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton.py"


@pytest.fixture(scope="module", autouse=True)
def patch_each_module_once():
    """The interpreter patches triton.language at every launch, and again at every call of a device function: a third
    of its time. Once for each module that such functions are in is enough."""
    call, seen = interpreter.InterpretedFunction.__call__, set()

    def patched(function, *args, **kwargs):
        module = id(function.fn.__globals__)
        if module in seen:
            return function.rewrite()(*args, **kwargs)
        seen.add(module)
        return call(function, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", patched)
        yield


HARD_SHAPES = [
    (),
    (1,),
    (1, 7),
    (5, 1),
    (6, 6),
    (3, 4, 5),
    (4, 3, 2, 2),
    (2, 3, 2, 4),
    (0, 3),
    (70,),
    (5, 40, 2),
]


def test_hard_shapes():
    problem = Problem(Spec(), HARD_SHAPES, groups=[i % 2 for i in range(len(HARD_SHAPES))], started=True)
    problem.step(lrs=(0.7, 1.3, 9.0), weight_decays=(0.05, 0.0, 9.0))  # of the last group no tensor is here


def test_several_tiles_and_chunks():
    # 3 x 2 tiles; accumulators of 150, 300 and 20 x 2 x 9 entries: several chunks of both kinds.
    Problem(Spec(hidden_layers=1), [(150, 70), (300, 3), (18, 2, 17, 2), (4100,)]).step()


@pytest.mark.parametrize("width", [2, 3, 8])
def test_narrow_widths_elementwise(width):
    Problem(Spec(hidden_size=width, scale="parameter_rms", scale_epsilon=1e-3), [(6, 40), (9,)]).step()


@pytest.mark.parametrize(("width", "layers"), [(16, 2), (24, 1), (32, 2), (64, 1)])
def test_wide_widths_by_matrix_products(width, layers):
    problem = Problem(
        Spec(hidden_size=width, hidden_layers=layers), [(3, 40), (9,), (4, 3, 2)], variant="matmul"
    )
    problem.step()


def test_width_16_elementwise():
    Problem(Spec(hidden_size=16), [(3, 20)], variant="elementwise").step()


@pytest.mark.parametrize("width", [4, 16])
def test_lagged_statistics(width):
    shapes = [(6, 40), (9,), (4, 3, 2, 2)] if width == 4 else [(3, 40), (5,)]
    problem = Problem(
        Spec(hidden_size=width, statistics="lagged", scale="parameter_rms"), shapes,
        variant="elementwise" if width == 4 else "matmul",
    )  # fmt: skip
    problem.step()
    problem.step([1e3 * g for g in problem.gradients()])  # a spike: columns are clipped
    problem.step()


def test_clipping_and_numbers_on_the_device():
    problem = Problem(Spec(), [(4, 9), (7,), (3,)], groups=[0, 1, 1], clip=[True, True, False])
    grads = problem.gradients()
    norm = float(torch.sqrt(sum((0.5 * g.double()).square().sum() for g in grads[:2])))
    factor = 0.3 * norm / (norm + reference.CLIP_EPSILON)
    lr = torch.tensor(0.4, dtype=torch.float64)
    problem.step(
        grads, lrs=(lr, 1.0), weight_decays=(0.1, torch.tensor(0.2)), grad_scale=torch.tensor(2.0), divide=True,
        max_norm=torch.tensor(0.3 * norm), scale=[0.5 * factor, 0.5 * factor, 0.5],
    )  # fmt: skip
    lr.fill_(0.9)  # what a captured graph sees at its next replay
    problem.step(lrs=(lr, 1.0), weight_decays=(0.1, torch.tensor(0.2)), grad_scale=1.0, max_norm=1e6)
    problem.step(lrs=(0.5, 1.0), weight_decays=(0.0, 0.0))


def test_nothing_is_written_where_infinities_were_found():
    problem = Problem(Spec(statistics="lagged"), [(4, 9), (7,)])
    problem.step()
    before = [(t.param.clone(), {n: a.clone() for n, a in t.state.items()}) for t in problem.tensors]
    numbers = {"lrs": [1.0], "weight_decays": [0.0], "max_norm": 1.0}
    problem.kernel.step(problem.gradients(), found_inf=torch.tensor([1.0]), **numbers)
    for tensor, (p, state) in zip(problem.tensors, before, strict=True):
        assert torch.equal(tensor.param, p)
        assert int(tensor.step) == 1
        assert all(torch.equal(a, state[n]) for n, a in tensor.state.items())
    problem.step(found_inf=torch.tensor([0.0]))


def test_nan_spreads_as_in_the_reference():
    problem = Problem(Spec(), [(3, 9), (5,), (4,)])
    grads = problem.gradients()
    grads[0][1, 2] = float("nan")
    grads[1][0] = float("inf")
    expected = [problem.reference(i, g, 1.0, 0.0, 1.0)[0] for i, g in enumerate(grads)]
    problem.kernel.step(grads, lrs=[1.0], weight_decays=[0.0])
    for tensor, update in zip(problem.tensors, expected, strict=True):
        assert np.array_equal(np.isnan(tensor.param.numpy()), np.isnan(update)), tensor.name
    assert np.isnan(expected[0]).all()
    assert np.isfinite(problem.tensors[2].param.numpy()).all()


@pytest.mark.parametrize(
    ("param", "grad", "state"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_sixteen_bit_storage(param, grad, state):
    types = {"param_dtype": param, "grad_dtype": grad, "state_dtype": state}
    Problem(Spec(), [(3, 40), (9,)], started=True, **types).step()


def test_state_in_bfloat16_is_right_on_average_and_repeatable():
    def run():
        problem = Problem(Spec(hidden_size=2), [(64, 64)], state_dtype=torch.bfloat16)
        g = torch.full((64, 64), 1.0 + 2.0**-10)  # a tenth of it lies between two numbers of bfloat16
        problem.kernel.step([g], lrs=[1.0], weight_decays=[0.0])
        return problem, g

    problem, g = run()
    rates = reference.decay_complements(np, problem.spec, problem.theta)[0]
    for k in range(3):
        found = problem.tensors[0].state["momentum"][k].double()
        exact = float(rates[k]) * float(g[0, 0])
        spacing = 2.0 ** (np.floor(np.log2(exact)) - 7)
        assert set(np.unique(found.numpy())) <= {
            np.floor(exact / spacing) * spacing,
            np.ceil(exact / spacing) * spacing,
        }
        assert abs(float(found.mean()) - exact) < 4 * spacing / np.sqrt(12 * 4096) + 1e-6 * exact
    again = run()[0].tensors[0]
    assert torch.equal(again.param, problem.tensors[0].param)
    assert all(torch.equal(a, again.state[n]) for n, a in problem.tensors[0].state.items())


def test_strides_of_parameters_and_gradients():
    base = torch.randn(8, 24)
    params = [
        torch.randn(5, 4, 2, 2).to(memory_format=torch.channels_last),
        torch.randn(9, 6).T,
        base[:, ::3],  # not dense: goes through a copy
    ]
    others = base.clone()
    problem = Problem(Spec(), [tuple(p.shape) for p in params], params=params)
    grads = problem.gradients()
    grads[0] = grads[0].contiguous()
    grads[2] = grads[2].T.contiguous().T
    problem.step(grads)
    mask = torch.ones(24, dtype=torch.bool)
    mask[::3] = False
    assert torch.equal(base[:, mask], others[:, mask]), "elements between those of the parameter were written"


def test_axis_orders_give_the_same_update():
    p, g = random_problem((4, 3, 5), 1)
    updates = []
    for order in [(0, 1, 2), (2, 0, 1), (1, 2, 0)]:
        q = torch.tensor(p).float().permute(order).contiguous().permute(np.argsort(order).tolist())
        problem = Problem(Spec(hidden_size=2), [(4, 3, 5)], params=[q])
        problem.step([torch.tensor(g[0]).float()])
        updates.append(q.numpy() - p)
    for update in updates[1:]:
        assert (
            np.abs(update - updates[0]).max()
            <= 1e-4 * np.abs(updates[0]).max() + 4 * 2.0**-23 * np.abs(p).max()
        )


def test_output_apart_from_the_parameter():
    problem = Problem(Spec(hidden_size=2), [(3, 9), (5,)], outputs=True)
    problem.step()


def test_one_tensor_gets_the_same_bits_in_any_company():
    alone = Problem(Spec(hidden_size=2), [(5, 9)])
    among = Problem(Spec(hidden_size=2), [(5, 9), (7,), (4, 4)])
    for problem in (alone, among):
        problem.step()
    assert torch.equal(alone.tensors[0].param, among.tensors[0].param)


def test_other_blocks_of_the_last_pass_give_the_same_bits():
    problems = [Problem(Spec(hidden_size=2), [(20, 16)]) for _ in range(2)]
    problems[0].step()
    (layout,) = problems[1].kernel._layouts
    k = kernels()
    for choice in k.choices(layout, problems[1].kernel._network)[1:2]:
        constants, options = k.instance("apply", layout, problems[1].kernel._network)
        problems[1].kernel._instances["apply", layout] = k.KERNELS["apply"], constants | options | choice
    problems[1].step()
    assert torch.equal(problems[0].tensors[0].param, problems[1].tensors[0].param)


def test_autotuning_takes_the_fastest_block(monkeypatch):
    monkeypatch.setattr(kernels(), "example_shape", lambda layout: (20, 16))
    monkeypatch.setattr(
        TritonStep, "_seconds", lambda self, launch: self._instances["apply", launch[1]][1]["ROWS"]
    )
    problem = Problem(Spec(hidden_size=2), [(20, 16)], autotune=True)
    (layout,) = problem.kernel._layouts
    least = min(choice["ROWS"] for choice in kernels().choices(layout, problem.kernel._network))
    assert problem.kernel._instances["apply", layout][1]["ROWS"] == least
    problem.step()


def test_fastest_takes_the_smallest_time():
    times = {1: 3.0, 2: 1.0, 4: 1.0}
    assert fastest([{"ROWS": r} for r in times], lambda choice: times[choice["ROWS"]]) == {"ROWS": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": torch.tensor(0, dtype=torch.int32)}, "int64"),
        ({"param": torch.zeros(3, 9, dtype=torch.float64)}, "float64"),
        ({"output": torch.zeros(9, 3)}, "output"),
        ({"state": {}}, "momentum"),
    ],
)
def test_bad_tensors_are_refused_by_name(change, message):
    problem = Problem(Spec(hidden_size=2), [(3, 9)])
    bad = dataclasses.replace(problem.tensors[0], name="weird", **change)
    with pytest.raises(ValueError, match=f"(?s)weird.*{message}"):
        TritonStep(problem.spec, problem.theta, [bad])


def test_bad_gradients_are_refused_by_name():
    problem = Problem(Spec(hidden_size=2), [(3, 9)])
    with pytest.raises(ValueError, match=r"0 \(3, 9\)"):
        problem.kernel.step([torch.zeros(9, 3)], lrs=[1.0], weight_decays=[0.0])
    with pytest.raises(ValueError, match="2 gradients for 1"):
        problem.kernel.step([torch.zeros(3, 9)] * 2, lrs=[1.0], weight_decays=[0.0])
    with pytest.raises(ValueError, match="1 learning rates and 0 weight decays for 1"):
        problem.kernel.step([torch.zeros(3, 9)], lrs=[1.0], weight_decays=[])
    with pytest.raises(ValueError, match="found_inf"):
        problem.kernel.step([torch.zeros(3, 9)], lrs=[1.0], weight_decays=[0.0], found_inf=torch.zeros(2))
    assert int(problem.tensors[0].step) == 0


# ---- captured graphs ----


def everything(problem):
    return [a for t in problem.tensors for a in (t.param, t.step, *t.state.values())]


def assert_same(problem, twin):
    for a, b in zip(everything(problem), everything(twin), strict=True):
        assert torch.equal(a, b)


SMALL = Spec(hidden_size=2, hidden_layers=1)
SMALL_LAGGED = dataclasses.replace(SMALL, statistics="lagged")


def test_a_graph_keeps_its_gradients_and_numbers():
    """Steps between replays have other gradients and rates, and graphs of the same step too."""
    problem, twin = (Problem(SMALL, [(6, 9)]) for _ in range(2))
    static, others = [[g * scale for g in problem.gradients()] for scale in (1.0, -3.0)]
    strided = [static[0].T.contiguous().T]  # goes through a copy
    device_lr = torch.tensor(0.3)
    kinds = {
        "one": (strided, {"lrs": [1.0], "weight_decays": [0.1], "max_norm": 1.0}),
        "two": (static, {"lrs": [0.25], "weight_decays": [0.1], "grad_scale": 2.0}),
        "device": (others, {"lrs": [device_lr], "weight_decays": [0.1], "max_norm": 5.0}),
        "eager": (others, {"lrs": [0.5], "weight_decays": [0.0]}),
        "as two": (others, {"lrs": [0.25], "weight_decays": [0.1], "grad_scale": 2.0}),
    }
    graphs = {}

    def step(kernel, kind):
        grads, numbers = kinds[kind]
        kernel.step(grads, **numbers)

    def capture(kind):
        graphs[kind] = RecordedGraph()
        with graphs[kind].capture():
            step(problem.kernel, kind)
        assert_same(problem, twin)

    def both(kind):
        graphs[kind].replay() if kind in graphs else step(problem.kernel, kind)
        step(twin.kernel, kind)
        assert_same(problem, twin)

    capture("one")  # before any step
    both("one")
    both("eager")
    both("one")
    capture("two")
    both("as two")  # nothing of the graph has run
    capture("device")
    device_lr.fill_(0.6)
    others[0].mul_(2.0)
    for kind in ("device", "two"):
        both(kind)


def test_none_is_made_in_a_capture():
    problem = Problem(SMALL, [(3, 9)])
    with RecordedGraph().capture(), pytest.raises(RuntimeError, match="before the capture"):
        TritonStep(problem.spec, problem.theta, problem.tensors)


# ---- lagged statistics: launches ----


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels since the last look."""
    names, launch = [], TritonStep._launch

    def patched(self, kernel, *arguments):
        names.append(kernel)
        launch(self, kernel, *arguments)

    def look():
        found = names.copy()
        names.clear()
        return found

    monkeypatch.setattr(TritonStep, "_launch", patched)
    return look


FIRST_STEPS = ["find_first_steps", "factor_statistics", "feature_statistics"]
SMALL_AND_ONE_PASS = [
    "move_accumulators:before", "fold_factors", "fold_network", "apply", "move_accumulators:after", "keep_statistics",
]  # fmt: skip


def test_steady_lagged_steps_take_one_pass(launched):
    problem = Problem(SMALL_LAGGED, [(6, 9)])
    grads = problem.gradients()
    numbers = {"lrs": [1.0], "weight_decays": [0.0]}

    def kernels_of_a_step(**options):
        launched()
        problem.kernel.step(grads, **numbers, **options)
        return sorted(name for name in launched() if name != "set_addresses")

    both, one = sorted(FIRST_STEPS + SMALL_AND_ONE_PASS), sorted(SMALL_AND_ONE_PASS)
    assert kernels_of_a_step(found_inf=torch.ones(1)) == both
    assert kernels_of_a_step(found_inf=torch.zeros(1)) == both  # the host has not seen that it counted
    assert kernels_of_a_step() == both
    assert kernels_of_a_step() == one
    assert kernels_of_a_step(found_inf=torch.ones(1)) == one
    graph = RecordedGraph()
    with graph.capture():
        problem.kernel.step(grads, **numbers)
    launched()
    graph.replay()  # may come after the counters were set back
    assert sorted(name for name in launched() if name != "set_addresses") == both
    problem.tensors[0].step.fill_(0)
    assert kernels_of_a_step() == both
    assert kernels_of_a_step() == one


def test_a_tensor_may_start_again():
    """In place, between steps and between replays, as state is set back after a warm-up."""
    problem, twin = (Problem(SMALL_LAGGED, [(6, 9)]) for _ in range(2))
    grads, numbers = problem.gradients(), {"lrs": [1.0], "weight_decays": [0.1]}
    start = [a.clone() for a in everything(problem)]
    for _ in range(2):
        twin.kernel.step(grads, **numbers)
        problem.kernel.step([3.0 * g for g in grads], **numbers)
    graph = RecordedGraph()
    with graph.capture():
        problem.kernel.step(grads, **numbers)
    for run in (graph.replay, lambda: problem.kernel.step(grads, **numbers)):
        for a, b in zip(everything(problem), start, strict=True):
            a.copy_(b)
        run()
        run()
        assert_same(problem, twin)
