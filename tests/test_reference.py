"""The oracle itself: against published trajectories, against formulas written out by hand, and across libraries."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    Golden,
    assert_states_close,
    assert_update_close,
    random_problem,
    random_theta,
    run_reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_fast import reference
from lopt_fast.layout import factored_dims
from lopt_fast.spec import FEATURE_SETS, LAGGED_CLIP, TIMESCALES, Spec

SHAPES = [(), (1,), (7,), (5, 1), (1, 6), (10, 10), (6, 9), (2, 3, 4), (3, 3, 4, 8), (2, 1, 3, 2, 2)]
GOLDEN = (
    "h4_init", "h4_mini", "h4_scalar", "h4_matmul", "h4_l1", "h8_decays", "h8_negdecay", "h16", "h32", "h32_l1", "tie",
)  # fmt: skip


def spec_for(feature_set: str, **values: Any) -> Spec:
    """A specification that the feature set takes, with unequal numbers of decays where it may."""
    if feature_set == "union":
        values = {"rms_decays": (0.9, 0.99, 0.999), **values}
    return Spec(feature_set=feature_set, **values)


# ---- published trajectories ----


@pytest.mark.parametrize("case", GOLDEN)
def test_published_trajectories(shared: Path, case: str) -> None:
    golden = Golden(shared / "golden" / f"adafac_{case}.npz")
    spec, theta = golden.spec(), golden.theta()
    for name, p0 in golden.params0.items():
        p = p0.astype(np.float64)
        expected, index = golden.expected64(name)
        updates, _ = run_reference(spec, theta, p, golden.grads[name].astype(np.float64))
        assert len(updates) == len(expected)
        before = p.reshape(-1) if index is None else p.reshape(-1)[index]
        for t, (delta, after) in enumerate(zip(updates, expected, strict=True)):
            flat = delta.reshape(-1) if index is None else delta.reshape(-1)[index]
            assert_update_close(flat, after - before, after, "float64", f"{case} {name} step {t}")
            before = after


def test_every_adafac_file_is_replayed(shared: Path) -> None:
    found = {p.stem.removeprefix("adafac_") for p in (shared / "golden").glob("adafac_*.npz")}
    assert found - {"features"} == set(GOLDEN)


def test_published_columns(shared: Path) -> None:
    with np.load(shared / "golden/adafac_features.npz") as file:
        meta = json.loads(str(file["meta"]))
        expected = {k.split("/", 1)[1]: file[k] for k in file.files if k.startswith("features64/")}
    with np.load(shared / "golden" / meta["inputs"]) as file:
        inputs = {k: file[k] for k in file.files if "/" in k}
    assert len(expected) >= 7
    spec = Spec()
    theta = {k: np.array(meta[k], np.float64) for k in ("momentum_decays", "rms_decays", "adafactor_decays")}
    complements = reference.decay_complements(np, spec, theta)
    for name, steps in expected.items():
        p = inputs[f"params0/{name}"].astype(np.float64)
        shape = p.shape or (1,)
        p = p.reshape(shape)
        state = reference.init_state(spec, p)
        for t in range(len(steps)):
            g = inputs[f"grads/{name}"][t].astype(np.float64).reshape(shape)
            state = reference.accumulate(spec, complements, g, state)
            normalised, _ = reference.normalise(spec, reference.columns(spec, p, g, state, state), state, t)
            found = [*normalised, *reference.time_columns(np, t, p)]
            assert len(found) == 39
            for k, column in enumerate(found):
                wanted = steps[t].reshape(*shape, 39)[..., k]
                error = float(np.abs(np.broadcast_to(column, shape) - wanted).max())
                # They were read out as parameter differences, so their rounding is that of the parameter.
                assert error <= 1e-9 * max(1.0, float(np.abs(wanted).max())), (
                    f"{name} step {t} column {k}: {error}"
                )


# ---- formulas written out ----


def step_by_hand(
    spec: Spec, theta: dict[str, np.ndarray], p: np.ndarray, gradients: np.ndarray
) -> list[np.ndarray]:
    """Updates of a matrix (rows < columns) with the default columns, one scalar formula after the other."""
    rows, cols = p.shape
    assert rows < cols
    decay = {
        k: 1 - (1 - np.array(getattr(spec, k))) * np.exp(10 * theta[k])
        for k in ("momentum_decays", "rms_decays")
    }
    beta_f = np.clip(1 - (1 - np.array(spec.adafactor_decays)) * np.exp(10 * theta["adafactor_decays"]), 0, 1)
    beta_m, beta_v = decay["momentum_decays"], np.clip(decay["rms_decays"], 0, 1)
    m, v = np.zeros((3, rows, cols)), np.zeros((rows, cols))
    row, column = np.zeros((3, rows)), np.zeros((3, cols))
    kept_squares: list[float] = []
    updates = []
    for t, g in enumerate(gradients):
        row_before, column_before = row.copy(), column.copy()
        for i in range(3):
            m[i] = beta_m[i] * m[i] + (1 - beta_m[i]) * g
            row[i] = beta_f[i] * row[i] + (1 - beta_f[i]) * (g**2 + 1e-30).mean(axis=1)
            column[i] = beta_f[i] * column[i] + (1 - beta_f[i]) * (g**2 + 1e-30).mean(axis=0)
        v = beta_v[0] * v + (1 - beta_v[0]) * g**2
        lagged = spec.statistics == "lagged" and t > 0
        shown_row, shown_column = (row_before, column_before) if lagged else (row, column)
        r = [1 / np.sqrt(np.maximum(x / (x.mean() + 1e-9), 1e-9)) for x in shown_row]
        c = [1 / np.sqrt(np.maximum(x, 1e-9)) for x in shown_column]
        full_row = [np.repeat(x[:, None], cols, axis=1) for x in shown_row]
        full_column = [np.repeat(x[None, :], rows, axis=0) for x in shown_column]
        raw = [g, p, *m, v, *(x / np.sqrt(v + 1e-6) for x in m), 1 / np.sqrt(v + 1e-6)]
        raw += [g * np.outer(r[i], c[i]) for i in range(3)]
        raw += full_row + full_column
        raw += [1 / np.sqrt(x + 1e-8) for x in full_row] + [1 / np.sqrt(x + 1e-8) for x in full_column]
        raw += [m[i] * np.outer(r[i], c[i]) for i in range(3)]
        squares = [float((x**2).mean()) for x in raw]
        per_parameter = [not 13 <= k < 25 for k in range(28)]
        inputs = []
        for k, x in enumerate(raw):
            used = kept_squares[k] if lagged and per_parameter[k] else squares[k]
            x = x / np.sqrt(used + 1e-5)
            inputs.append(
                np.clip(x, -LAGGED_CLIP, LAGGED_CLIP)
                if spec.statistics == "lagged" and per_parameter[k]
                else x
            )
        inputs += [np.full(p.shape, np.tanh(t / x - 1)) for x in TIMESCALES]
        scale = 1.0
        if spec.scale == "parameter_rms":
            scale = np.sqrt((kept_squares[1] if lagged else squares[1]) + spec.scale_epsilon)
        kept_squares = squares
        delta = np.zeros(p.shape)
        for y, x in np.ndindex(p.shape):
            hidden = np.array([column[y, x] for column in inputs])
            for layer in range(spec.hidden_layers):
                hidden = np.maximum(hidden @ theta[f"w{layer}"] + theta[f"b{layer}"], 0)
            direction, magnitude = hidden @ theta[f"w{spec.hidden_layers}"] + theta[f"b{spec.hidden_layers}"]
            delta[y, x] = -spec.step_mult * direction * np.exp(spec.exp_mult * magnitude) * scale
        updates.append(delta)
        p = p + delta
    return updates


@pytest.mark.parametrize("scale", ["none", "parameter_rms"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_against_formulas_written_out(statistics: Any, scale: Any) -> None:
    spec = Spec(hidden_size=5, step_mult=0.1, exp_mult=0.1, statistics=statistics, scale=scale)
    theta = random_theta(spec, seed=2)
    p, gradients = random_problem((4, 6), steps=4, seed=1)
    gradients[2] *= 100.0  # lagged: columns are clipped
    updates, _ = run_reference(spec, theta, p, gradients)
    for t, (delta, expected) in enumerate(zip(updates, step_by_hand(spec, theta, p, gradients), strict=True)):
        assert_update_close(delta, expected, p, "float64", f"step {t}")


@pytest.mark.parametrize("shape", SHAPES)
def test_first_lagged_step_is_exact_where_nothing_is_clipped(shape: tuple[int, ...]) -> None:
    p, gradients = random_problem(shape, steps=2, seed=4)
    exact, lagged = Spec(), Spec(statistics="lagged")
    theta = random_theta(exact)
    (first, second), _ = run_reference(exact, theta, p, gradients)
    (lagged_first, lagged_second), states = run_reference(lagged, theta, p, gradients)
    np.testing.assert_array_equal(lagged_first, first)
    assert not np.array_equal(lagged_second, second)
    per_parameter = [c.kind == "element" or len(shape) < 2 for c in lagged.normalised_columns]
    assert ((states[0].mean_squares > 0) == per_parameter).all()


def test_lagged_columns_are_clipped() -> None:
    spec = Spec(statistics="lagged")
    p = np.zeros(50)
    g = np.zeros(50)
    g[0], p[3] = 1e4, 1.0
    state = reference.init_state(spec, p)
    raw = [g] * len(spec.normalised_columns)
    normalised, _ = reference.normalise(spec, raw, state, 1)
    for x in normalised:
        assert (x[0], x[1]) == (LAGGED_CLIP, 0.0)
    normalised, _ = reference.normalise(spec, [-x for x in raw], state, 1)
    assert normalised[0][0] == -LAGGED_CLIP


# ---- libraries, dtypes, methods ----


def to_library(library: str, values: Any, dtype: str) -> Any:
    if library == "torch":
        torch = pytest.importorskip("torch")
        return torch.tensor(np.asarray(values), dtype=getattr(torch, dtype))
    jnp = pytest.importorskip("jax.numpy")
    return jnp.asarray(np.asarray(values), dtype=dtype)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_libraries_agree_with_numpy(library: str, dtype: str, statistics: Any) -> None:
    if library == "jax" and dtype == "float64":
        with pytest.importorskip("jax").enable_x64(True):
            check_library(library, dtype, statistics)
    else:
        check_library(library, dtype, statistics)


def check_library(library: str, dtype: str, statistics: Any) -> None:
    spec = Spec(step_mult=0.1, exp_mult=0.1, statistics=statistics)
    theta = {k: v.astype(np.float32).astype(np.float64) for k, v in random_theta(spec, seed=5).items()}
    theta_there = {k: to_library(library, v, dtype) for k, v in theta.items()}
    shapes, update = [(), (7,), (1, 6), (6, 9), (2, 3, 4)], reference.update
    if library == "jax":
        shapes, update = [(), (6, 9)], pytest.importorskip("jax").jit(reference.update, static_argnums=0)
    for shape in shapes:
        p, gradients = random_problem(shape, steps=3, seed=6)
        expected, states = run_reference(spec, theta, p, gradients)
        found, states_there = run_reference(
            spec, theta_there, to_library(library, p, dtype), to_library(library, gradients, dtype), update
        )
        for t in range(3):
            assert str(found[t].dtype).removeprefix("torch.") == dtype
            assert_update_close(found[t], expected[t], p, dtype, f"{library} {shape} step {t}")
        assert_states_close(states_there[-1], states[-1], dtype, f"{library} {shape}")


def test_jax_traces_step_number_and_meta_parameters() -> None:
    jax = pytest.importorskip("jax")
    spec = Spec(statistics="lagged", scale="parameter_rms")
    theta = random_theta(spec, dtype="float32")
    p, gradients = random_problem((6, 9), steps=3, dtype="float32")

    @jax.jit
    def step(theta: Any, p: Any, g: Any, state: Any, t: Any) -> Any:
        return reference.update(spec, theta, p, g, state, t)

    expected, _ = run_reference(spec, {k: v.astype(np.float64) for k, v in theta.items()}, p.astype(np.float64),
                                gradients.astype(np.float64))  # fmt: skip
    state = reference.init_state(spec, jax.numpy.asarray(p))
    for t in range(3):
        delta, state = step(theta, p, gradients[t], state, t)
        assert_update_close(delta, expected[t], p, "float32", f"step {t}")
        p = p + np.asarray(delta)
    assert step._cache_size() == 1


@pytest.mark.parametrize("feature_set", FEATURE_SETS)
def test_elementwise_is_matmul(feature_set: str) -> None:
    for shape, layers in itertools.product([(7,), (6, 9), (2, 3, 4)], [1, 2]):
        spec = spec_for(feature_set, hidden_layers=layers)
        theta = random_theta(spec, seed=7)
        p, gradients = random_problem(shape, steps=2, seed=8)
        a, _ = run_reference(spec, theta, p, gradients, method="elementwise")
        b, _ = run_reference(spec, theta, p, gradients, method="matmul")
        assert_update_close(a[-1], b[-1], p, "float64", f"{feature_set} {shape} {layers}")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("width", [2, 3, 4, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("feature_set", FEATURE_SETS)
def test_every_configuration_runs(feature_set: str, width: int, layers: int) -> None:
    spec = spec_for(feature_set, hidden_size=width, hidden_layers=layers)
    theta = random_theta(spec, seed=9)
    for shape in [(), (4,), (3, 4)]:
        p, gradients = random_problem(shape, steps=2, seed=10)
        updates, states = run_reference(spec, theta, p, gradients)
        for delta in updates:
            assert delta.shape == shape
            assert np.isfinite(delta).all()
            assert (delta != 0).any()
        for now, start in zip(states[-1], reference.init_state(spec, p), strict=True):
            assert now.shape == start.shape
            assert now.dtype == start.dtype


def test_decays_of_any_number() -> None:
    spec = Spec(feature_set="m_rms", momentum_decays=(0.1, 0.5, 0.9, 0.99, 0.999), rms_decays=(0.95,))
    p, gradients = random_problem((3, 4), steps=2)
    updates, states = run_reference(spec, random_theta(spec), p, gradients)
    assert np.isfinite(updates[-1]).all()
    assert states[-1].momentum.shape == (5, 3, 4)


def test_float32_arithmetic_stays_within_the_bound_of_kernels() -> None:
    spec = Spec(step_mult=0.01, exp_mult=0.1)
    theta = random_theta(spec, dtype="float32")
    for shape in SHAPES:
        p, gradients = random_problem(shape, steps=4, seed=11, dtype="float32")
        low, _ = run_reference(spec, theta, p, gradients)
        wide = {k: v.astype(np.float64) for k, v in theta.items()}
        high, _ = run_reference(spec, wide, p.astype(np.float64), gradients.astype(np.float64))
        for t in range(4):
            assert low[t].dtype == np.float32
            assert_update_close(low[t], high[t], p, "float32", f"{shape} step {t}")


# ---- axes and strides ----


def dims_without_ties(shape: tuple[int, ...]) -> bool:
    """Whether d1 and d0 do not depend on the order of the axes."""
    sizes = sorted(shape)
    return len(sizes) < 2 or (sizes[-1] != sizes[-2] and (len(sizes) < 3 or sizes[-2] != sizes[-3]))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4).filter(lambda s: dims_without_ties(tuple(s))),
    st.data(),
)
def test_order_of_the_axes_does_not_matter(sizes: list[int], data: st.DataObject) -> None:
    shape = tuple(sizes)
    axes = tuple(data.draw(st.permutations(range(len(shape)))))
    statistics: Any = data.draw(st.sampled_from(["exact", "lagged"]))
    spec = Spec(statistics=statistics)
    theta = random_theta(spec)
    p, gradients = random_problem(shape, steps=2, seed=12)
    straight, _ = run_reference(spec, theta, p, gradients)
    permuted, _ = run_reference(
        spec, theta, np.transpose(p, axes), np.transpose(gradients, (0, *(a + 1 for a in axes)))
    )
    assert_update_close(permuted[-1], np.transpose(straight[-1], axes), p, "float64", f"{shape} as {axes}")


def test_square_matrices_know_their_rows() -> None:
    """On a tie the axes are not interchangeable (d1 is the first one): FORMAT.md 2.2."""
    spec = Spec()
    p, gradients = random_problem((5, 5), steps=1)
    assert factored_dims((5, 5)) == (0, 1)
    (straight,), _ = run_reference(spec, random_theta(spec), p, gradients)
    (turned,), _ = run_reference(spec, random_theta(spec), p.T, gradients.transpose(0, 2, 1))
    assert np.abs(turned.T - straight).max() > 1e-6 * np.abs(straight).max()


def test_batch_axes_are_factored_apart_and_normalised_together() -> None:
    spec = Spec()
    p, gradients = random_problem((2, 3, 4), steps=2)
    _, states = run_reference(spec, random_theta(spec), p, gradients)
    for i in range(2):
        _, alone = run_reference(spec, random_theta(spec), p[i], gradients[:, i])
        np.testing.assert_allclose(states[-1].factored_row[:, i], alone[-1].factored_row, rtol=1e-12)
        np.testing.assert_allclose(states[-1].factored_column[:, i], alone[-1].factored_column, rtol=1e-12)


def test_strides_do_not_matter() -> None:
    spec = Spec()
    theta = random_theta(spec)
    p, gradients = random_problem((6, 9), steps=2)
    plain, _ = run_reference(spec, theta, p, gradients)
    spread_p, spread_g = np.zeros((12, 27)), np.zeros((2, 12, 27))
    spread_p[::2, ::3], spread_g[:, ::2, ::3] = p, gradients
    strided, _ = run_reference(spec, theta, spread_p[::2, ::3], spread_g[:, ::2, ::3])
    assert_update_close(strided[-1], plain[-1], p, "float64")


# ---- step sizes, edges ----


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(SHAPES),
    st.floats(-3, 3).filter(lambda x: x == 0 or abs(x) > 1e-3),
    st.floats(0, 1),
    st.floats(1e-3, 10),
)
def test_learning_rate_weight_decay_and_gradient_scale(
    shape: tuple[int, ...], lr: float, weight_decay: float, grad_scale: float
) -> None:
    spec = Spec(step_mult=0.1)
    theta = random_theta(spec)
    p, (g,) = random_problem(shape, steps=1, seed=13)
    state = reference.init_state(spec, p)
    plain, after = reference.update(spec, theta, p, g * grad_scale, state, 0)
    found, scaled_after = reference.update(
        spec, theta, p, g, state, 0, lr=lr, weight_decay=weight_decay, grad_scale=grad_scale
    )
    expected = lr * (plain - weight_decay * p)
    assert_update_close(found, expected, p, "float64", f"{shape}")
    assert_states_close(scaled_after, after, "float64")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_is_proportional_to_its_multiplier(shape: tuple[int, ...]) -> None:
    spec = Spec(step_mult=0.125, exp_mult=0.1)
    theta = random_theta(spec)
    p, gradients = random_problem(shape, steps=1, seed=14)
    (once,), _ = run_reference(spec, theta, p, gradients)
    (twice,), _ = run_reference(replace(spec, step_mult=0.25), theta, p, gradients)
    np.testing.assert_array_equal(twice, 2 * once)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_rms_scales_the_step(shape: tuple[int, ...]) -> None:
    spec = Spec(step_mult=0.1, scale_epsilon=0.25)
    theta = random_theta(spec)
    p, gradients = random_problem(shape, steps=1, seed=15)
    (plain,), _ = run_reference(spec, theta, p, gradients)
    (scaled,), _ = run_reference(replace(spec, scale="parameter_rms"), theta, p, gradients)
    assert_update_close(scaled, plain * np.sqrt(np.mean(p * p) + 0.25), p, "float64")


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_gradients_and_parameters_give_finite_steps(shape: tuple[int, ...], statistics: Any) -> None:
    spec = Spec(statistics=statistics)
    for dtype in ("float32", "float64"):
        p = np.zeros(shape, dtype)
        updates, _ = run_reference(spec, random_theta(spec, dtype=dtype), p, np.zeros((3, *shape), dtype))
        assert all(np.isfinite(delta).all() for delta in updates)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_empty_tensors_are_left_alone(shape: tuple[int, ...]) -> None:
    spec = Spec(statistics="lagged")
    p = np.zeros(shape)
    state = reference.init_state(spec, p)
    delta, after = reference.update(spec, random_theta(spec), p, p, state, 0)
    assert delta.shape == shape
    for old, new in zip(state, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_scalar_is_a_vector_of_one() -> None:
    for statistics in ("exact", "lagged"):
        spec = Spec(statistics=statistics)  # type: ignore[arg-type]
        theta = random_theta(spec)
        p, gradients = random_problem((), steps=3)
        scalar, scalar_states = run_reference(spec, theta, p, gradients)
        vector, vector_states = run_reference(spec, theta, p.reshape(1), gradients.reshape(3, 1))
        for t in range(3):
            assert scalar[t].shape == ()
            assert float(scalar[t]) == float(vector[t][0])
        for a, b in zip(scalar_states[-1], vector_states[-1], strict=True):
            np.testing.assert_array_equal(a.reshape(-1), b.reshape(-1))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(7,), (6, 9), (2, 3, 4)])
def test_bad_gradients_show(shape: tuple[int, ...], bad: float) -> None:
    """One NaN or Inf makes NaN in the update, and stays in the accumulators of its own place alone."""
    spec = Spec()
    p, gradients = random_problem(shape, steps=2, seed=16)
    gradients[0].reshape(-1)[3] = bad
    updates, states = run_reference(spec, random_theta(spec), p, gradients)
    assert np.isnan(updates[0]).any()
    momentum = states[-1].momentum.reshape(3, -1)
    assert not np.isfinite(momentum[:, 3]).any()
    assert np.isfinite(np.delete(momentum, 3, axis=1)).all()
