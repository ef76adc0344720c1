"""Gradient estimators on a problem whose meta-gradient is known exactly: what they expect, how much they vary, their
memory, resets, masks and the sign variant; and on recorded outputs of another implementation."""

from __future__ import annotations

import re
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
jnp = jax.numpy

from typer.testing import CliRunner  # noqa: E402

from lopt_fast.benchmark import estimators as benchmark  # noqa: E402
from lopt_fast.benchmark import records  # noqa: E402
from lopt_fast.benchmark.cli import app as bench  # noqa: E402
from lopt_fast.meta import estimators  # noqa: E402
from lopt_fast.meta.estimators import EstimatorError, Truncation, make  # noqa: E402
from lopt_fast.verify import verify  # noqa: E402

NAMES = ("full_es", "truncated_es", "pes", "nres")

# The problem: x <- DECAY x + theta, loss |x|^2 after the step. The loss is quadratic in all perturbations, so that
# smoothing it leaves its gradient as it is, and estimators that are unbiased have exactly that as their expectation.
DECAY = 0.6
START = np.array([1.0, -0.5])
THETA = np.array([0.3, 0.2])
STD = 0.1
REPLICATES = 20_000
PAIRS = 4


def gain(steps: np.ndarray | int) -> Any:
    """How far theta has moved x after so many steps with it."""
    return (1 - DECAY ** np.asarray(steps)) / (1 - DECAY)


def gradient_at(age: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(..., 2): of the loss after step `age` of an unroll, for a theta that had acted in its last `seen` steps only."""
    x = DECAY ** np.asarray(age)[..., None] * START + gain(age)[..., None] * THETA
    return 2 * gain(seen)[..., None] * x


class Pairs(NamedTuple):
    x: jax.Array
    """(pairs, 2, 2): sign, coordinate."""
    age: jax.Array
    done: jax.Array


def begin(pairs: int) -> Pairs:
    return Pairs(
        jnp.broadcast_to(START.astype(np.float32), (pairs, 2, 2)),
        jnp.zeros(pairs, int),
        jnp.zeros(pairs, bool),
    )


def advance(
    state: Pairs, perturbation: jax.Array, lengths: jax.Array, steps: int, inside: Any = False
) -> tuple[Pairs, Truncation]:
    """One truncation. Where `inside`, a step after the last one of an unroll is a reset, as in the real loop."""
    theta = jnp.stack([THETA + perturbation, THETA - perturbation], axis=1).astype(jnp.float32)
    fresh = begin(len(perturbation))

    def step(state: Pairs, _: None) -> tuple[Pairs, Truncation]:
        age = state.age + 1
        moved = Pairs(DECAY * state.x + theta, age, (age >= lengths) & inside)
        loss, mask = jnp.where(state.done[:, None], 0.0, (moved.x**2).sum(-1)), ~state.done
        state = choose(state.done, fresh, moved)
        return state, Truncation(loss[:, 0], loss[:, 1], state.done, mask)

    return jax.lax.scan(step, state, length=steps)


def choose(where: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(
        lambda a, b: jnp.where(where.reshape(where.shape + (1,) * (a.ndim - 1)), a, b), yes, no
    )


@partial(jax.jit, static_argnames=("estimator", "truncations", "steps", "pairs"))
def run(
    estimator: estimators.Estimator,
    keys: jax.Array,
    truncations: int,
    steps: int,
    pairs: int,
    lengths: Any,
    inside: jax.Array,
) -> jax.Array:
    """(replicates, truncations, 2) gradients, each replicate from `pairs` pairs that start afresh."""
    theta = jnp.asarray(THETA, jnp.float32)

    def one(key: jax.Array) -> jax.Array:
        def truncation(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            state, memory = carry
            now, later = (jax.random.split(k, pairs) for k in jax.random.split(key))
            perturbation = estimator.perturb(now, theta, memory)
            state, seen = advance(state, perturbation, lengths, steps, inside)
            estimate = estimator.estimate(seen, memory, perturbation)
            ended = (state.age >= lengths) & ~inside
            after = choose(ended, (begin(pairs), estimator.init(later, theta)), (state, estimate.memory))
            return after, estimate.gradient

        first, *rest = jax.random.split(key, truncations + 1)
        memory = estimator.init(jax.random.split(first, pairs), theta)
        return jax.lax.scan(truncation, (begin(pairs), memory), jnp.stack(rest))[1]

    return jax.vmap(one)(keys)


@cache
def sample(
    name: str, truncations: int, steps: int, lengths: Any = (10**6,) * PAIRS, inside: bool = False
) -> np.ndarray:
    """(replicates, truncations, 2) independent estimates, each the mean of `PAIRS` pairs."""
    keys = jax.random.split(jax.random.key(0), REPLICATES)
    found = run(make(name, STD), keys, truncations, steps, PAIRS, jnp.asarray(lengths), jnp.asarray(inside))
    return np.asarray(found, np.float64)


def assert_expects(estimates: np.ndarray, exact: np.ndarray, within: float = 0.05) -> None:
    """The mean of (replicates, ...) within 5 standard errors of `exact`, which must be few per cent of it."""
    error = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    assert (5 * error <= within * np.abs(exact).max()).all(), "too few replicates to tell"
    assert (np.abs(estimates.mean(0) - exact) <= 5 * error).all(), (estimates.mean(0), exact, error)


# Expectation and variance

TRUNCATIONS, STEPS = 4, 3
AGES = np.arange(1, TRUNCATIONS * STEPS + 1)
WHOLE = gradient_at(AGES, AGES).mean(0)


@cache
def horizon(name: str) -> np.ndarray:
    """(replicates, 2) estimates of the gradient of the mean loss over the whole unroll."""
    whole = make(name).whole_unroll
    return sample(name, *((1, len(AGES)) if whole else (TRUNCATIONS, STEPS))).mean(1)


def test_the_problem_is_what_it_says() -> None:
    """The closed form against a difference quotient, exact for a quadratic."""

    def loss(theta: np.ndarray) -> float:
        x, total = START, 0.0
        for _ in AGES:
            x = DECAY * x + theta
            total += (x**2).sum() / len(AGES)
        return total

    slope = [(loss(THETA + e) - loss(THETA - e)) / 2 for e in np.eye(2)]
    np.testing.assert_allclose(WHOLE, slope, rtol=1e-12)


@pytest.mark.parametrize("name", ["full_es", "pes", "nres"])
def test_unbiased_for_the_whole_unroll(name: str) -> None:
    assert_expects(horizon(name), WHOLE)


def test_truncated_es_expects_the_truncated_gradient() -> None:
    estimates, truncated = horizon("truncated_es"), gradient_at(AGES, (AGES - 1) % STEPS + 1).mean(0)
    assert_expects(estimates, truncated)
    assert (truncated < 0.75 * WHOLE).all()  # towards short horizons
    with pytest.raises(AssertionError):
        assert_expects(estimates, WHOLE, within=np.inf)


def test_each_truncation_of_pes_and_nres_is_unbiased_for_its_losses() -> None:
    exact = gradient_at(AGES, AGES).reshape(TRUNCATIONS, STEPS, 2).mean(1)
    for name in ("pes", "nres"):
        assert_expects(sample(name, TRUNCATIONS, STEPS), exact, within=0.1)


def parts() -> np.ndarray:
    """(truncations, truncations, 2): how a truncation's mean loss changes with theta in each truncation up to it."""
    out = np.zeros((TRUNCATIONS, TRUNCATIONS, 2))
    for age in AGES:
        last = (age - 1) // STEPS
        reach = [gain(max(0, age - STEPS * j)) for j in range(TRUNCATIONS)]  # of theta from truncation j on
        for j in range(last + 1):
            since = reach[j] - (reach[j + 1] if j < last else 0.0)
            out[last, j] += gradient_at(age, age) / gain(age) * since / STEPS
    return out


def exact_covariance(name: str) -> np.ndarray:
    """(truncations, truncations): covariances, summed over coordinates, of the estimates of one pair.

    A difference of losses is linear in the perturbations here, u = sum_j G_j e_j, and an estimate is u times S, the
    sum of those that the unroll has seen. For normal variables E[u u' S S'] has three terms (Isserlis).
    """
    g, count = parts(), np.arange(1, TRUNCATIONS + 1)
    if name == "pes":
        seen = np.minimum(count[:, None], count)
        crossed = np.array(
            [[g[k, : min(k, m) + 1].sum(0) for m in range(TRUNCATIONS)] for k in range(TRUNCATIONS)]
        )
        return np.einsum("kji,mji->km", g, g) * 2 * seen + np.einsum("kmi,mki->km", crossed, crossed)
    if name == "nres":
        return (2 + 1) * g.sum(1) @ g.sum(1).T
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["pes", "nres"])
def test_variance_is_what_it_should_be(name: str) -> None:
    """Of each truncation, and of the mean over an unroll; 20,000 estimates tell a variance to about 3%."""
    exact = exact_covariance(name)
    found = sample(name, TRUNCATIONS, STEPS).var(0, ddof=1).sum(-1) * PAIRS
    np.testing.assert_allclose(found, np.diag(exact), rtol=0.15)
    np.testing.assert_allclose(horizon(name).var(0, ddof=1).sum() * PAIRS, exact.mean(), rtol=0.15)


def test_variance_of_the_estimators() -> None:
    """A truncation's estimate: NRES varies less than PES, truncated ES less still. The mean of an unroll's estimates:
    NRES is full ES, while those of PES depend less on each other."""
    one = {n: sample(n, TRUNCATIONS, STEPS).var(0, ddof=1).sum(-1) for n in ("truncated_es", "pes", "nres")}
    assert (one["nres"][2:] < 0.85 * one["pes"][2:]).all()
    assert (one["truncated_es"][1:] < 0.8 * one["nres"][1:]).all()
    assert one["pes"][-1] > 2 * one["pes"][0]
    whole = {n: float(horizon(n).var(0, ddof=1).sum()) for n in ("full_es", "pes", "nres")}
    assert abs(whole["nres"] / whole["full_es"] - 1) <= 0.15
    assert whole["pes"] < 0.8 * whole["nres"]


def test_nres_in_pieces_is_full_es() -> None:
    """With the same perturbation the mean over truncations is the estimate of the whole unroll, to rounding."""
    theta, lengths = jnp.asarray(THETA, jnp.float32), jnp.full(5, 10**6)
    nres, full = make("nres", STD), make("full_es", STD)
    memory = nres.init(jax.random.split(jax.random.key(3), 5), theta)
    state, gradients = begin(5), []
    for _ in range(TRUNCATIONS):
        state, truncation = advance(state, memory, lengths, STEPS)
        gradients.append(nres.estimate(truncation, memory, memory).gradient)
    _, whole = advance(begin(5), memory, lengths, TRUNCATIONS * STEPS)
    expected = full.estimate(whole, (), memory).gradient
    np.testing.assert_allclose(np.mean(gradients, axis=0), expected, rtol=1e-5)


# Ends of unrolls


@pytest.mark.parametrize("name", ["pes", "nres"])
def test_staggered_ends_between_truncations(name: str) -> None:
    """Pairs end one after the other; each counts for the steps of its own unroll."""
    lengths = (3, 6, 9, 12)
    ages = np.stack([(AGES - 1) % length + 1 for length in lengths], axis=1)
    exact = gradient_at(ages, ages).mean(1).reshape(TRUNCATIONS, STEPS, 2).mean(1)
    assert_expects(sample(name, TRUNCATIONS, STEPS, lengths=lengths), exact, within=0.1)


@pytest.mark.parametrize("name", ["pes", "truncated_es"])
def test_resets_inside_truncations(name: str) -> None:
    """What follows an end, and the last step before it, is credited to this truncation's perturbation only."""
    steps, truncations, lengths = STEPS, TRUNCATIONS, (2, 3, 5, 7)
    exact = np.zeros((truncations, len(lengths), 2))
    for pair, length in enumerate(lengths):
        age, begun = 0, 0
        for i in range(truncations):
            finished, terms = False, []
            for t in range(steps):
                if age == length:  # a reset
                    age, begun = 0, i
                    continue
                age += 1
                finished |= age == length
                since = min(age, t + 1)
                whole = name == "pes" and not finished
                terms.append(gradient_at(np.array(age), np.array(age if whole else since)))
            assert begun <= i
            exact[i, pair] = np.mean(terms, axis=0)
    found = sample(name, truncations, steps, lengths=lengths, inside=True)
    assert_expects(found, exact.mean(1), within=0.1)


def test_memory() -> None:
    """PES: the sum, or what a new unroll has seen of it. NRES: the perturbation, for good. The others: none."""
    truncation, first, second = random_truncation()
    never = np.zeros((5, 3), bool)
    ends = never.copy()
    ends[1, 2] = True
    for name in NAMES:
        estimator = make(name, std=0.2)
        memory = {"pes": jax.tree.map(np.zeros_like, first), "nres": first}.get(name, ())
        memory = compiled(estimator, truncation, memory, first).memory
        perturbation = estimator.perturb(None, None, memory) if name == "nres" else second
        memory = compiled(estimator, truncation._replace(is_done=ends), memory, perturbation).memory
        if name == "pes":
            np.testing.assert_array_equal(memory["b"][:2], (first["b"] + second["b"])[:2])
            np.testing.assert_array_equal(memory["b"][2], second["b"][2])
        elif name == "nres":
            jax.tree.map(np.testing.assert_array_equal, (perturbation, memory), (first, first))
        else:
            assert memory == ()


def test_perturbations_are_normal_and_belong_to_their_keys() -> None:
    theta = {"a": jnp.zeros(20), "b": jnp.zeros((5, 4))}
    keys = jax.random.split(jax.random.key(0), 5000)
    drawn = make("pes", std=0.3).perturb(keys, theta, ())
    for leaf in drawn.values():
        np.testing.assert_allclose(np.asarray(leaf).mean(0), 0.0, atol=0.3 * 5 / np.sqrt(5000))
        np.testing.assert_allclose(np.asarray(leaf).std(0), 0.3, rtol=0.06)
    part = make("full_es", std=0.3).perturb(keys[17:19], theta, ())
    assert (part["b"] == drawn["b"][17:19]).all()  # a pair draws the same on whatever device it is


# One estimate


def random_truncation(seed: int = 0) -> tuple[Truncation, dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    losses = rng.uniform(1, 2, (2, 5, 3)).astype(np.float32)
    mask = np.ones((5, 3), bool)
    mask[3:, 0] = mask[2, 1] = False
    trees = [{"a": rng.standard_normal((3, 2)), "b": rng.standard_normal((3, 1, 4))} for _ in range(2)]
    memory, perturbation = jax.tree.map(lambda x: np.asarray(x, np.float32), trees)
    return Truncation(losses[0], losses[1], np.zeros((5, 3), bool), mask), memory, perturbation


def estimate(name: str, truncation: Truncation, sign: float | None = None, seed: int = 0) -> Any:
    _, memory, perturbation = random_truncation(seed)
    return compiled(make(name, std=0.2, sign=sign), truncation, memory if name == "pes" else (), perturbation)


@partial(jax.jit, static_argnames="estimator")
def compiled(estimator: estimators.Estimator, truncation: Truncation, memory: Any, perturbation: Any) -> Any:
    return estimator.estimate(truncation, memory, perturbation)


@pytest.mark.parametrize("sign", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_formula(name: str, sign: float | None) -> None:
    """The mean over a pair's own steps, or their sign, times what it has seen; in float64, written out."""
    truncation, memory, perturbation = random_truncation()
    found = estimate(name, truncation, sign)
    positive, negative, _, mask = (np.asarray(x, np.float64) for x in truncation)
    delta = (positive - negative) * mask
    weight = delta.sum(0) / mask.sum(0) if sign is None else sign * np.sign(delta.sum(0))
    for leaf, gradient in found.gradient.items():
        seen = np.asarray(perturbation[leaf] + (memory[leaf] if name == "pes" else 0), np.float64)
        expected = np.mean([w * e for w, e in zip(weight, seen, strict=True)], axis=0) / (2 * 0.2**2)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    loss = (((positive + negative) * mask).sum(0) / mask.sum(0)).mean() / 2
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    if sign is not None:
        assert set(np.abs(found.delta_losses).ravel().tolist()) == {sign}


@pytest.mark.parametrize("name", NAMES)
def test_mask(name: str) -> None:
    """What was not a step has no influence, whatever its value; what was has, NaN too."""
    truncation, _, _ = random_truncation()
    expected = estimate(name, truncation)
    wild = [np.where(truncation.mask, x, np.float32(np.nan)) for x in truncation[:2]]
    found = estimate(name, truncation._replace(positive_loss=wild[0], negative_loss=wild[1]))
    for a, b in zip(jax.tree.leaves(expected.gradient), jax.tree.leaves(found.gradient), strict=True):
        np.testing.assert_array_equal(a, b)
    assert expected.loss == found.loss
    broken = np.array(truncation.positive_loss)
    broken[0, 0] = np.nan
    found = estimate(name, truncation._replace(positive_loss=broken))
    assert np.isnan(found.gradient["a"]).all()
    assert np.isnan(found.loss)
    # A pair without a single step says nothing.
    nothing = estimate(name, truncation._replace(mask=truncation.mask & (np.arange(3) != 1)))
    assert np.isfinite(nothing.gradient["a"]).all()


def test_sign_does_not_see_the_size_of_losses() -> None:
    truncation, _, _ = random_truncation()
    larger = truncation._replace(
        positive_loss=1e6 * truncation.positive_loss, negative_loss=1e6 * truncation.negative_loss
    )
    for name in NAMES:
        a, b = estimate(name, truncation, sign=1.0), estimate(name, larger, sign=1.0)
        np.testing.assert_array_equal(a.gradient["b"], b.gradient["b"])


# Names and errors


def test_names() -> None:
    assert set(NAMES) < set(estimators.ESTIMATORS)
    for name in NAMES:
        estimator = make(name, std=0.5, sign=2.0)
        assert (estimator.name, estimator.std, estimator.sign) == (name, 0.5, 2.0)
    assert make("es_single") == make("nres")
    assert [n for n in NAMES if make(n).whole_unroll] == ["full_es"]
    assert [n for n in NAMES if make(n).resets_inside] == ["truncated_es", "pes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "esp"}, "estimator 'esp': must be one of full_es, truncated_es, pes, nres"),
        ({"name": "pes", "depth": 3}, r"estimator pes: unknown options \['depth'\]; known are std, sign"),
        ({"name": "nres", "std": 0.0}, "std=0.0: must be positive"),
        ({"name": "nres", "std": float("nan")}, "std=nan: must be positive"),
        ({"name": "pes", "sign": -1.0}, "sign=-1.0: must be positive"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EstimatorError, match=message):
        make(**arguments)


# Recorded outputs


@pytest.mark.parametrize("case", ["last", "mid", "none", "sign", "sign_half", "twice"])
def test_recorded_outputs(shared: Path, case: str) -> None:
    """float64 within 1e-12 of the largest gradient, float32 within its rounding."""
    report = verify(shared / "golden" / f"pes_unit_{case}.npz", "jax")
    assert report.passed, report
    gradients = [row for row in report.rows if row.tensor.startswith("grad/")]
    assert {row.note for row in gradients} == {"float64", "float32"}
    for row in gradients:
        assert row.note != "float64" or row.error <= 1e-14


# The benchmark of variances


def test_variances_of_a_known_process() -> None:
    """Independent truncations average out; equal ones do so between unrolls only; a steady mean adds nothing."""
    rng = np.random.default_rng(0)
    count, steps, n = 20_000, 4, 3
    steady = rng.standard_normal((steps, n))
    independent = steady + rng.standard_normal((count, steps, n))
    same = steady + rng.standard_normal((count, 1, n))
    m = np.arange(1, 4 * steps + 1)
    np.testing.assert_allclose(benchmark.variances(independent), n / m, rtol=0.05)
    found = benchmark.variances(same)
    assert abs(found[0] - n) <= 0.1
    # Two outer steps in a row, from each of 4 truncations: of one unroll three times, of two unrolls once.
    assert abs(found[1] / found[0] - (3 * 1 + 0.5) / 4) <= 1e-12
    # 16 of them: squares of how many belong to each unroll.
    parts = ([4, 4, 4, 4], [3, 4, 4, 4, 1], [2, 4, 4, 4, 2], [1, 4, 4, 4, 3])
    assert abs(found[15] / found[0] - np.mean([sum(k * k for k in p) for p in parts]) / 16**2) <= 1e-12


def test_squared_norms_have_no_bias() -> None:
    rng = np.random.default_rng(0)
    mean, other = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.0])
    norms, distances = [], []
    for _ in range(2000):
        x, y = (m + 3 * rng.standard_normal((8, 3)) for m in (mean, other))
        norms.append(benchmark._squared_norm(x))
        distances.append(benchmark._distance(x, y))
    for found, exact in ((norms, mean @ mean), (distances, (mean - other) @ (mean - other))):
        assert abs(np.mean(found) - exact) <= 5 * np.std(found) / np.sqrt(len(found))


def test_benchmark_measures_by_the_code_of_the_outer_loop() -> None:
    pytest.importorskip("sklearn")
    problem = benchmark.Problem(unroll=4, pairs=3)
    found = benchmark.measure("nres", 2, problem)
    assert found.shape == (3, 2, 197)
    assert np.isfinite(found).all()
    # A pair's estimates are multiples of its perturbation: of one direction.
    first, second = found[:, 0], found[:, 1]
    cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1.0, rtol=1e-5)
    assert np.abs(first[0] @ first[1]) < 0.5 * np.linalg.norm(first[0]) * np.linalg.norm(first[1])


def test_benchmark_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From estimates to table, record and plot."""
    pytest.importorskip("matplotlib")

    def measure(name: str, steps: int, problem: benchmark.Problem) -> np.ndarray:
        rng = np.random.default_rng(steps)
        noise = rng.standard_normal((problem.pairs, problem.unroll // steps, 5))
        return np.arange(1.0, 6.0) * (0.5 if name == "truncated_es" else 1.0) + noise

    monkeypatch.setattr(benchmark, "measure", measure)
    file = tmp_path / "out" / "estimators.json"
    arguments = [
        "estimators",
        "--unroll",
        "4",
        "--truncations",
        "1,2",
        "--pairs",
        "4000",
        "--json",
        str(file),
    ]
    result = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = records.read(file)
    assert [(r["estimator"], r["truncation"], r["inner_steps"]) for r in record["results"]] == [
        ("full_es", 4, 8), *((n, s, 2 * s) for n in ("truncated_es", "pes", "nres") for s in (1, 2)),
    ]  # fmt: skip
    for r in record["results"]:
        count = 4 // r["truncation"]
        assert len(r["variances"]) == 4 * count
        assert abs(r["signal"] / 55 - 1) <= 0.01
        for ratio in (r["outer_step_vs_full_es"], r["unroll_vs_full_es"]):
            assert abs(ratio["value"] * count - 1) <= 5 * ratio["standard_error"] * count + 1e-12
            assert (ratio["standard_error"] > 0) == (r["estimator"] != "full_es")
            assert ratio["standard_error"] <= 0.02
        assert (r["bias"] is not None) == (r["estimator"] == "truncated_es")
    assert re.search(
        r"\| truncated_es \| 2 \| 0\.5\d ± 0\.01 \| 0\.\d\d ± 0\.01 \| 50% \| 0\.09 \|", result.output
    )
    assert result.output.count("| 50% |") == 2
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(bench, ["report", str(file)]).output.startswith("| estimator | truncation |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--truncations", "30"], "truncation 30: must divide the unroll of 200"),
        (["--truncations", "many"], "--truncations 'many'"),
        (["--estimator", "esp"], "estimators ['esp']: choose from full_es"),
        (["--pairs", "1"], "pairs=1: a variance needs at least 2"),
        (["--unroll", "0"], "unroll=0: must be positive"),
        (["--checkpoint", "no_such_weights"], "no_such_weights"),
        (["--std", "0"], "std"),
    ],
)
def test_benchmark_errors(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, ["estimators", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
