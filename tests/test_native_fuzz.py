"""Random shapes, strides, types and gradients: the kernels agree with the reference or refuse, and never crash."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from helpers import assert_parameter_close, assert_states_close, random_theta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

try:
    import ml_dtypes
except ImportError:  # NumPy has no bfloat16 then
    ml_dtypes = None

from lopt_fast import backends, native, reference
from lopt_fast.checkpoint import Checkpoint
from lopt_fast.spec import Spec

pytestmark = pytest.mark.skipif(
    backends._import_native()[0] is None, reason=f"no compiled kernels: {backends._import_native()[1]}"
)
BFLOAT16 = ["bfloat16"] if ml_dtypes else []
FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

SPECS = st.builds(
    Spec,
    hidden_size=st.sampled_from([2, 3, 4, 7, 8, 16, 17]),
    hidden_layers=st.sampled_from([1, 2]),
    statistics=st.sampled_from(["exact", "lagged"]),
    scale=st.sampled_from(["none", "parameter_rms"]),
    step_mult=st.just(0.01),
)
SHAPES = st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 7, 9, 16, 33]), max_size=5).filter(
    lambda s: math.prod(s) <= 3000
)


@st.composite
def layouts(draw: Any, shape: tuple[int, ...]) -> Any:
    """A function that copies an array of `shape` into memory of any order, steps, directions and offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in shape]
    offset = draw(st.integers(0, 5))

    def lay_out(values: np.ndarray) -> np.ndarray:
        spread = [values.shape[axis] * abs(steps[axis]) for axis in order]
        base = np.zeros(math.prod(spread) + offset, values.dtype)[offset:].reshape(spread)
        view = base.transpose(np.argsort(order)) if order else base
        view = view[(..., *(slice(None, None, s) for s in steps))]
        view[...] = values
        return view

    return lay_out


# float64 goes with itself alone.
TYPES = st.one_of(
    st.just(("float64", "float64")),
    st.tuples(*2 * [st.sampled_from(["float32", "float32", "float16", *BFLOAT16])]),
)


@st.composite
def tensors(draw: Any) -> tuple[tuple[int, ...], str, str, Any, Any]:
    """Shape, types of parameter and gradient, what lays them out."""
    shape = tuple(draw(SHAPES))
    return shape, *draw(TYPES), draw(layouts(shape)), draw(layouts(shape))


@FUZZ
@given(
    spec=SPECS,
    cases=st.lists(tensors(), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
)
def test_agrees_with_the_reference(spec: Spec, cases: list[Any], seed: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    theta = random_theta(spec, seed)
    params = [lay(np.array(rng.standard_normal(s), np.float32).astype(d)) for s, d, _, lay, _ in cases]
    states = [native.init_state(spec, p) for p in params]
    exact = [reference.init_state(spec, np.array(p, np.float64)) for p in params]
    for t in range(3):
        before = [np.array(p, np.float64) for p in params]
        grads = [lay(np.array(rng.standard_normal(s), np.float32).astype(d)) for s, _, d, _, lay in cases]
        kept = [g.copy() for g in grads]
        native.small_fc_step(spec, theta, params, grads, states, t=t, weight_decay=0.1, threads=threads)
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            np.testing.assert_array_equal(g, kept[i])
            g64 = np.array(g, np.float64)
            delta, exact[i] = reference.update(spec, theta, before[i], g64, exact[i], t, weight_decay=0.1)
            what = f"{p.dtype}{p.shape} strides {p.strides} gradient {g.dtype} step {t}"
            assert_parameter_close(p, before[i], delta, what)
            assert_states_close(states[i], exact[i], native.arithmetic(p.dtype.name), what)


@FUZZ
@given(
    spec=SPECS,
    case=tensors(),
    seed=st.integers(0, 99),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    when=st.integers(0, 2),
    share=st.sampled_from([0.01, 0.3, 1.0]),
)
def test_not_finite_gradients(
    spec: Spec, case: Any, seed: int, value: float, when: int, share: float
) -> None:
    """NaN and Inf come out exactly where the reference has them, in the same type, now and in later steps."""
    shape, dtype, of_gradient, lay_parameter, lay_gradient = case
    rng = np.random.default_rng(seed)
    computed = native.arithmetic(dtype)
    theta = random_theta(spec, seed, computed)
    q = np.array(rng.standard_normal(shape)).astype(dtype)
    p, exact = lay_parameter(q), reference.init_state(spec, q.astype(computed))
    state = native.init_state(spec, p)
    for t in range(4):
        g = np.array(rng.standard_normal(shape)).astype(of_gradient)
        if t == when:
            g = np.where(rng.random(shape) < share, np.array(value).astype(of_gradient), g)
        with np.errstate(all="ignore"):
            delta, exact = reference.update(spec, theta, q.astype(computed), g.astype(computed), exact, t)
            q = (q.astype(computed) + delta).astype(dtype)
        native.small_fc_step(spec, theta, [p], [lay_gradient(g)], [state], t=t)
        np.testing.assert_array_equal(np.isnan(p), np.isnan(q), err_msg=f"step {t}")
        np.testing.assert_array_equal(np.isinf(p), np.isinf(q), err_msg=f"step {t}")


@FUZZ
@given(
    spec=SPECS,
    case=tensors(),
    seed=st.integers(0, 99),
    exponents=st.tuples(st.integers(-45, 38), st.integers(-45, 38)),
)
def test_extreme_magnitudes_do_not_crash(
    spec: Spec, case: Any, seed: int, exponents: tuple[int, int]
) -> None:
    shape, dtype, of_gradient, lay_parameter, lay_gradient = case
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        p = lay_parameter(np.array(rng.standard_normal(shape) * 10.0 ** exponents[0]).astype(dtype))
        g = lay_gradient(np.array(rng.standard_normal(shape) * 10.0 ** exponents[1]).astype(of_gradient))
    state = native.init_state(spec, p)
    for t in range(2):
        native.small_fc_step(spec, random_theta(spec, seed), [p], [g], [state], t=t, max_grad_norm=1.0)
    if dtype == "float64" and max(exponents) < 20:
        assert np.isfinite(p).all()


@FUZZ
@given(data=st.data())
def test_wrong_arrays_are_refused_and_untouched(data: Any) -> None:
    """One array of a good call replaced by one of another shape, type or layout, or left out."""
    spec = data.draw(SPECS)
    shape, dtype, of_gradient, lay_parameter, lay_gradient = data.draw(tensors())
    p = lay_parameter(np.ones(shape, dtype))
    call: dict[str, Any] = {
        "params": [p, np.ones((2, 3))],
        "grads": [lay_gradient(np.ones(shape, of_gradient)), np.ones((2, 3))],
        "states": [native.init_state(spec, p), native.init_state(spec, np.ones((2, 3)))],
    }
    where = data.draw(st.sampled_from(["params", "grads", "states"]))
    bad_shape = tuple(data.draw(SHAPES.filter(lambda s: tuple(s) != shape)))
    bad_type = data.draw(st.sampled_from([">f4", "int64", "complex64", "bool"]))
    change = data.draw(st.sampled_from(["shape", "type", "missing"]))
    if where == "states":
        field = data.draw(st.sampled_from(["momentum", "second_moment", "factored_row"]))
        good = getattr(call["states"][0], field)
        bad = np.ones((*good.shape, 2), dtype) if change == "shape" else good.astype(bad_type)
        call["states"][0] = call["states"][0]._replace(**{field: bad})
    else:
        call[where][0] = np.ones(bad_shape, dtype) if change == "shape" else p.astype(bad_type)
    if change == "missing":
        call[where].pop()
    before = copy.deepcopy(call)
    with pytest.raises(ValueError, match=r"params|grads|states"):
        native.small_fc_step(spec, random_theta(spec), **call, t=0)
    for name, arrays in call.items():
        for a, b in zip(arrays, before[name], strict=True):
            for x, y in zip(a, b, strict=True) if name == "states" else [(a, b)]:
                np.testing.assert_array_equal(x, y)


@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_torch_refuses_mismatched_state(data: Any) -> None:
    """A state dictionary with one entry dropped, renamed, reshaped or replaced: ValueError, all as before."""
    torch = pytest.importorskip("torch")
    from lopt_fast.torch import LearnedOptimizer

    spec = Spec(statistics=data.draw(st.sampled_from(["exact", "lagged"])))
    params = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5))]
    optimizer = LearnedOptimizer(params, Checkpoint(spec, random_theta(spec)))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    index = data.draw(st.sampled_from([0, 1]))
    entries = state["state"][index]
    name = data.draw(st.sampled_from(sorted(entries)))
    change = data.draw(st.sampled_from(["drop", "rename", "reshape", "replace"]))
    if change == "drop":
        del entries[name]
    elif change == "rename":
        entries["x" + name] = entries.pop(name)
    elif change == "reshape":
        entries[name] = torch.ones(data.draw(st.sampled_from([(0,), (2,), (3, 9), (3, 4, 1)])))
    else:
        entries[name] = data.draw(st.sampled_from([None, "text", [1, 2], math.nan, -1.5]))
    kept, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=rf"parameter {index} of group 0"):
        optimizer.load_state_dict(state)
    for i, expected in kept["state"].items():
        for key, value in expected.items():
            assert torch.equal(value, optimizer.state_dict()["state"][i][key])
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
