"""The JAX optimizer: one step against the NumPy reference, JAX's transformations, optax's wrappers, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import lopt_fast.jax as lopt  # noqa: E402
from lopt_fast import backends, reference  # noqa: E402
from lopt_fast.architectures import small_fc_lopt  # noqa: E402
from lopt_fast.backends import BackendError, BackendWarning  # noqa: E402
from lopt_fast.jax import call, custom_call  # noqa: E402
from lopt_fast.spec import Spec, SpecError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

needs_kernel = pytest.mark.skipif(
    backends.choose(Spec(), "cpu", "float32", "auto") != "cpu", reason="the compiled core is missing"
)

SPEC = Spec(step_mult=0.01, exp_mult=0.1)
SHAPES = {
    "matrix": (6, 9),
    "bias": (9,),
    "scalar": (),
    "conv": (2, 3, 4, 5),
    "empty": (0, 4),
    "column": (5, 1),
}


def make_theta(spec: Spec = SPEC, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    theta = small_fc_lopt.init_theta(spec, seed)
    return {n: a + scale * 0.05 * rng.standard_normal(a.shape).astype(np.float32) for n, a in theta.items()}


THETA = make_theta()


def arrays(shapes=SHAPES, seed=0, dtype=jnp.float32, scale=1.0, batch=()):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(scale * rng.standard_normal((*batch, *s)), dtype) for n, s in shapes.items()}


def numpy_steps(params, grads, spec=SPEC, theta=THETA, lr=1.0, weight_decay=0.0, max_grad_norm=None):
    """Parameters after each step, by the reference in float64."""
    p = {n: np.asarray(a, np.float64) for n, a in params.items()}
    theta = {n: np.asarray(a, np.float64) for n, a in theta.items()}
    state = {n: reference.init_state(spec, a) for n, a in p.items()}
    history = []
    for t, g in enumerate(grads):
        g = {n: np.asarray(a, np.float64) for n, a in g.items()}
        scale = 1.0
        if max_grad_norm is not None:
            scale = min(1.0, max_grad_norm / (np.sqrt(sum((a * a).sum() for a in g.values())) + 1e-6))
        for n in p:
            delta, state[n] = reference.update(
                spec, theta, p[n], g[n], state[n], t, lr=lr, weight_decay=weight_decay, grad_scale=scale
            )
            p[n] = p[n] + delta
        history.append(dict(p))
    return history


def assert_follows(found, expected, start):
    """DESIGN.md section 6 for float32: 4 eps max|p| + 1e-4 max|change|, per tensor and step."""
    before = {n: np.asarray(a, np.float64) for n, a in start.items()}
    for t, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for n, b in theirs.items():
            if b.size == 0:
                continue
            a = np.asarray(mine[n], np.float64)
            change = np.abs(b - before[n]).max()
            limit = 4 * np.finfo(np.float32).eps * np.abs(b).max() + 1e-4 * change
            assert change > 0
            assert np.abs(a - b).max() <= limit, f"{n}, step {t}"
        before = theirs


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, equal_nan=False), a, b)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


def pick(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def optimizer(spec=SPEC, theta=THETA, **options):
    return lopt.learned_optimizer(spec, theta=theta, **options)


def run_steps(tx, params, grads, jit=True, fused=True):
    def one(params, grads, state):
        if fused:
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    step = jax.jit(one) if jit else one
    state, history = tx.init(params), []
    for g in grads:
        params, state = step(params, g, state)
        history.append(params)
    return history, state


def check_in_place(tx, params, grads, expected, fused, assert_same):
    """Donated steps: what is new lies where the old was, which is gone. Returns the jitted step."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        if fused:
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def pointers(*trees):
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(trees)]

    state = jax.tree.map(jnp.copy, tx.init(params))
    before = pointers(params, state.packed, state.moments)
    for after in expected:
        old = params, state
        params, state = step(params, state, grads)
        assert pointers(params, state.packed, state.moments) == before
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert_same(params, after)
    return step


# ---- one step ----


OPTIONS = {
    "plain": {},
    "decay_and_rate": {"learning_rate": 0.3, "weight_decay": 0.1},
    "clipped": {"max_grad_norm": 0.5},
    "not_clipped": {"max_grad_norm": 1e6},
    "lagged": {"statistics": "lagged"},
}


@needs_kernel
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("fused", [True, False])
def test_kernel_follows_the_reference(options, fused):
    params = arrays()
    grads = [arrays(seed=t + 1, scale=10.0**-t) for t in range(3)]
    found, state = run_steps(optimizer(**options, backend="cpu"), params, grads, fused=fused)
    plain = dict(options)
    spec = Spec.from_dict({**SPEC.to_dict(), "statistics": plain.pop("statistics", "exact")})
    assert_follows(
        found, numpy_steps(params, grads, spec, lr=plain.pop("learning_rate", 1.0), **plain), params
    )
    assert state.count == 3
    assert state.count.dtype == jnp.int32


@needs_kernel
@pytest.mark.parametrize(
    "spec", [Spec(hidden_size=7), Spec(hidden_size=16, hidden_layers=1), Spec(scale="parameter_rms")], ids=str
)
def test_other_specifications(spec):
    theta, params, grads = make_theta(spec), arrays(), [arrays(seed=t + 1) for t in range(2)]
    found, _ = run_steps(optimizer(spec, theta, learning_rate=30.0, backend="cpu"), params, grads)
    assert_follows(found, numpy_steps(params, grads, spec, theta, lr=30.0), params)


@needs_kernel
def test_large_tensors_have_their_own_state():
    shapes = {"large": (300, 301), "long": (70_000,), "small": (3, 4), "conv": (3, 3, 90, 110)}
    params, grads = arrays(shapes), [arrays(shapes, seed=t + 1) for t in range(2)]
    found, state = run_steps(optimizer(backend="cpu"), params, grads)
    assert jax.tree.map(jnp.shape, state.moments) == {
        "large": (4, 300, 301), "long": (7, 70_000), "small": None, "conv": (4, 3, 3, 90, 110),
    }  # fmt: skip
    assert_follows(found, numpy_steps(params, grads), params)


@needs_kernel
def test_reference_backend_has_the_same_state():
    """Both backends read and write the same state, so that training may go on elsewhere."""
    spec = Spec(hidden_size=16, statistics="lagged")
    theta, shapes = make_theta(spec), {"matrix": (3, 4), "long": (66_000,), "empty": (0,)}
    params, grads = arrays(shapes), [arrays(shapes, seed=t) for t in (1, 2)]
    options = {"weight_decay": 0.1, "max_grad_norm": 0.5}
    found, state = run_steps(optimizer(spec, theta, **options, backend="reference"), params, grads)
    assert_follows(found, numpy_steps(params, grads, spec, theta, **options), params)
    _, other = run_steps(optimizer(spec, theta, **options, backend="cpu"), params, grads)
    assert_close(state, other, rtol=1e-4, atol=1e-7)


@needs_kernel
def test_eager_jit_and_fused_agree():
    params, grads = arrays(), [arrays(seed=1), arrays(seed=2)]
    tx = optimizer(backend="cpu", weight_decay=0.01)
    reference_run = run_steps(tx, params, grads)
    assert_equal(reference_run, run_steps(tx, params, grads, jit=False))
    assert_close(reference_run, run_steps(tx, params, grads, fused=False), rtol=1e-6)


@needs_kernel
def test_float64_and_mixed():
    shapes = {"a": (4, 6), "b": (300, 300), "c": (5,)}
    with jax.enable_x64(True):
        single, double = arrays(shapes), arrays(shapes, dtype=jnp.float64)
        params = {"single": single, "double": double}
        grads = {"single": arrays(shapes, 1), "double": arrays(shapes, 1, dtype=jnp.float64)}
        tx = optimizer(learning_rate=0.1, weight_decay=0.01, max_grad_norm=0.7, backend="cpu")
        (found,), state = run_steps(tx, params, [grads])
        assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params)
        assert {n: a.dtype.name for n, a in state.packed.items()} == {
            "float32": "float32",
            "float64": "float64",
        }
        flat = {f"{kind}/{n}": a for kind, tree in params.items() for n, a in tree.items()}
        flat_grads = {f"{kind}/{n}": a for kind, tree in grads.items() for n, a in tree.items()}
        (expected,) = numpy_steps(flat, [flat_grads], lr=0.1, weight_decay=0.01, max_grad_norm=0.7)
        for n in shapes:
            change = np.abs(expected[f"double/{n}"] - np.asarray(double[n])).max()
            assert np.abs(np.asarray(found["double"][n]) - expected[f"double/{n}"]).max() <= 1e-9 * change
        assert_follows(
            [{f"single/{n}": a for n, a in found["single"].items()}],
            [{n: a for n, a in expected.items() if n.startswith("single")}],
            flat,
        )


def test_trees():
    tx = optimizer()
    for empty in ({}, (), {"a": None, "b": ()}):
        updates, state = tx.update(empty, tx.init(empty), empty)
        assert jax.tree.structure(updates) == jax.tree.structure(empty)
        assert state.count == 1
    only_empty = {"e": jnp.zeros((0, 3))}
    updates, _ = jax.jit(tx.update)(only_empty, tx.init(only_empty), only_empty)
    assert updates["e"].shape == (0, 3)


@needs_kernel
def test_missing_gradients_leave_parameter_and_state():
    params, tx = arrays({"a": (3, 4), "b": (5,)}), optimizer(backend="cpu", weight_decay=0.1)
    g = arrays({"a": (3, 4), "b": (5,)}, seed=1)
    _, start = tx.step(g, tx.init(params), params)
    updates, state = jax.jit(tx.update)({"a": g["a"], "b": None}, start, params)
    assert_equal(optax.apply_updates(params, updates)["b"], params["b"])
    both, both_state = tx.update(g, start, params)
    assert_equal(updates["a"], both["a"])
    changed = np.asarray(state.packed["float32"]) != np.asarray(both_state.packed["float32"])
    assert 0 < changed.sum() <= 35  # the state of b alone
    stepped, _ = tx.step({"a": g["a"], "b": None}, start, params)
    assert_equal(stepped["b"], params["b"])


@needs_kernel
def test_not_finite_gradients_behave_as_in_the_reference():
    params, g = arrays({"a": (3, 4), "b": (5,)}), arrays({"a": (3, 4), "b": (5,)}, seed=1)
    g["a"] = g["a"].at[1, 2].set(jnp.nan)
    found, _ = optimizer(backend="cpu").step(g, optimizer().init(params), params)
    assert np.isnan(found["a"]).any()
    assert np.isfinite(found["b"]).all()
    clipped = optimizer(backend="cpu", max_grad_norm=1.0)
    found, _ = clipped.step(g, clipped.init(params), params)
    assert np.isnan(found["b"]).all()


# ---- JAX's transformations ----


@needs_kernel
@pytest.mark.parametrize("fused", [True, False])
def test_donation_updates_in_place(fused):
    shapes = {"a": (200, 200), "b": (400, 300), "c": (50,)}
    params, grads, tx = arrays(shapes), arrays(shapes, 1), optimizer(backend="cpu")
    expected, _ = run_steps(tx, params, [grads, grads])
    step = check_in_place(tx, params, grads, expected, fused, partial(assert_close, rtol=1e-6))
    assert step._cache_size() == 1


@needs_kernel
def test_a_training_step_copies_nothing():
    """Gradients are computed from the parameters that the same program then overwrites."""
    shapes = {"w": (300, 400), "b": (400,)}
    params, x, tx = arrays(shapes), jnp.ones((7, 300)), optimizer(backend="cpu")

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state):
        grads = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2))(params)
        return tx.step(grads, state, params)

    compiled = train.lower(params, tx.init(params)).compile()
    large = [line for line in compiled.as_text().splitlines() if " copy(" in line and "300" in line]
    assert not large
    assert (
        compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * 300 * 400
    )  # the gradient, and what it is made of


@needs_kernel
def test_without_donation_nothing_is_overwritten():
    params, grads, tx = arrays(), arrays(seed=1), optimizer(backend="cpu")
    state = tx.init(params)
    copies = jax.tree.map(np.array, (params, grads, state))
    run_steps(tx, params, [grads])
    tx.step(grads, state, params)
    assert_equal(jax.tree.map(np.asarray, (params, grads, state)), copies)


@needs_kernel
def test_one_compilation():
    params, tx = arrays(), optimizer(backend="cpu", learning_rate=optax.linear_schedule(1.0, 0.1, 10))
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    state = tx.init(params)
    for t in range(3):
        _, state = step(arrays(seed=t), state, params)
    assert step._cache_size() == 1


@needs_kernel
def test_scan():
    params, grads, tx = arrays(), [arrays(seed=t + 1) for t in range(4)], optimizer(backend="cpu")

    @jax.jit
    def unroll(params, grads):
        def body(carry, g):
            params, state = carry
            params, state = tx.step(g, state, params)
            return (params, state), params

        return jax.lax.scan(body, (params, tx.init(params)), grads)

    (_, state), history = unroll(params, jax.tree.map(lambda *x: jnp.stack(x), *grads))
    expected, expected_state = run_steps(tx, params, grads)
    assert_equal(jax.tree.map(lambda *x: jnp.stack(x), *expected), history)
    assert_equal(state, expected_state)


def meta_step(theta, lr, params, grads, state, **options):
    return optimizer(theta=theta, learning_rate=lr, max_grad_norm=3.0, backend="cpu", **options).step(
        grads, state, params
    )


BATCHED = {
    "everything": (0, 0, 0, 0, 0),
    "parameters": (None, None, 0, 0, 0),
    "meta-parameters": (0, None, None, None, None),
    "learning rate": (None, 0, None, None, None),
    "gradients": (None, None, None, 0, None),
    "trailing axes": (-1, 0, None, -1, None),
}


@needs_kernel
@pytest.mark.parametrize("axes", BATCHED.values(), ids=BATCHED)
def test_vmap_is_a_loop(axes):
    n, shapes = 3, {"w": (6, 9), "b": (9,), "s": ()}
    state = optimizer().init(arrays(shapes))
    state = state._replace(
        packed=jax.tree.map(lambda x: jnp.abs(jnp.sin(jnp.arange(x.size) * 1.0)), state.packed)
    )
    values = (THETA, jnp.float32(0.5), arrays(shapes), arrays(shapes, 1), state)

    def batched(tree, axis):
        if axis is None:
            return tree
        members = [
            jax.tree.map(lambda x, i=i: x + i if x.dtype == jnp.int32 else x * (1 + 0.1 * i), tree)
            for i in range(n)
        ]
        return jax.tree.map(lambda *x: jnp.stack(x, axis), *members)

    stacked = [batched(v, a) for v, a in zip(values, axes, strict=True)]
    found = jax.jit(jax.vmap(meta_step, in_axes=axes))(*stacked)
    for i in range(n):
        member = [
            v if a is None else pick(v, (..., i) if a == -1 else i)
            for v, a in zip(stacked, axes, strict=True)
        ]
        assert_equal(pick(found, i), jax.jit(meta_step)(*member))


@needs_kernel
def test_nested_vmap_in_scan():
    """As meta-training does it: a population of perturbed meta-parameters times a batch of tasks."""
    shapes, sigmas, tasks, steps = {"w": (6, 9), "b": (9,)}, 2, 3, 3
    thetas = jax.tree.map(lambda *x: jnp.stack(x), *[make_theta(seed=s) for s in range(sigmas)])
    grads = arrays(shapes, 1, batch=(steps, tasks))
    params = arrays(shapes, 2, batch=(tasks,))

    def unroll(theta, params, grads):
        tx = optimizer(theta=theta, backend="cpu")

        def body(carry, g):
            return tx.step(g, carry[1], carry[0]), None

        return jax.lax.scan(body, (params, tx.init(params)), grads)[0]

    over_tasks = jax.vmap(unroll, in_axes=(None, 0, 1))
    found = jax.jit(jax.vmap(over_tasks, in_axes=(0, None, None)))(thetas, params, grads)
    single = jax.jit(unroll)
    for s in range(sigmas):
        for k in range(tasks):
            expected = single(pick(thetas, s), pick(params, k), pick(grads, (slice(None), k)))
            assert_equal(pick(found, (s, k)), expected)


@needs_kernel
def test_vmapped_step_is_one_call():
    params = arrays(batch=(5,))
    text = jax.jit(jax.vmap(lambda p: optimizer(backend="cpu").step(p, optimizer().init(p), p))).lower(params)
    assert text.as_text().count("stablehlo.custom_call @lopt_fast") == 1


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np, sys
    from jax.sharding import PartitionSpec as P
    sys.path.insert(0, {tests!r})
    from test_jax import arrays, optimizer, make_theta, assert_equal, assert_close, THETA
    assert jax.device_count() == 2
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    # large enough that the core hands tasks to XLA's threads on both devices at once
    shapes = {{"w": (300, 400), "b": (9,), "v": (64, 100)}}
    params, grads = arrays(shapes), arrays(shapes, 1, batch=(2,))
    tx = optimizer(backend="cpu", weight_decay=0.1)
    expected = jax.jit(lambda p, g: tx.step(g, tx.init(p), p))(params, jax.tree.map(lambda g: g.mean(0), grads))

    def data_parallel(params, grads):
        def body(carry, _):
            params, state = carry
            g = jax.tree.map(lambda a: jax.lax.pmean(a[0], "x"), grads)
            return tx.step(g, state, params), None
        return jax.lax.scan(body, (params, tx.init(params)), None, length=1)[0]

    one = jax.jit(jax.shard_map(data_parallel, mesh=mesh, in_specs=(P(), P("x")), out_specs=P()))
    for _ in range(5):
        assert_equal(jax.tree.map(np.asarray, one(params, grads)), jax.tree.map(np.asarray, expected))

    # a population over the devices: meta-parameters batched, parameters the same for all
    thetas = jax.tree.map(lambda *x: jnp.stack(x), *[make_theta(seed=s) for s in range(4)])
    def member(theta, params, g):
        tx = optimizer(theta=theta, backend="cpu")
        def body(carry, _):
            return tx.step(g, carry[1], carry[0]), None
        return jax.lax.scan(body, (params, tx.init(params)), None, length=2)[0][0]
    def population(thetas, params, g):
        params = jax.lax.pcast(params, "x", to="varying")
        return jax.vmap(member, in_axes=(0, None, None))(thetas, params, g)
    small = {{"w": (6, 9), "b": (9,)}}
    p, g = arrays(small), arrays(small, 1)
    many = jax.jit(jax.shard_map(population, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P("x")))(thetas, p, g)
    for s in range(4):
        alone = jax.jit(member)(jax.tree.map(lambda x: x[s], thetas), p, g)
        assert_equal(jax.tree.map(lambda x: np.asarray(x[s]), many), jax.tree.map(np.asarray, alone))

    # plain jit on a sharded parameter
    rows = dict(params, w=jax.device_put(params["w"], jax.sharding.NamedSharding(mesh, P("x"))))
    found = jax.jit(lambda p, g: tx.step(g, tx.init(p), p))(rows, jax.tree.map(lambda g: g.mean(0), grads))
    assert_close(jax.tree.map(np.asarray, found[0]), jax.tree.map(np.asarray, expected[0]))
    print("finished")
"""


@needs_kernel
def test_two_devices():
    """Replicated and over a population inside shard_map, and plain jit on sharded arrays; must not hang."""
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    script = textwrap.dedent(SHARDED.format(tests=str(Path(__file__).parent)))
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "finished" in result.stdout


def test_reference_can_be_differentiated():
    spec = Spec(
        hidden_size=16, hidden_layers=1
    )  # from 9 on the reference multiplies matrices: compiles faster
    params, g = {"w": jnp.ones(3)}, {"w": jnp.full(3, 0.5)}

    def loss(theta):
        tx = optimizer(spec, theta, backend="reference")
        return sum(jnp.sum(a) for a in jax.tree.leaves(tx.step(g, tx.init(params), params)[0]))

    gradient = jax.grad(loss)(jax.tree.map(jnp.asarray, make_theta(spec)))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))
    assert np.abs(gradient["w1"]).max() > 0


@needs_kernel
def test_other_platforms_take_the_reference(monkeypatch):
    """The choice is made when a program is lowered: the kernel on CPU, the reference elsewhere."""
    monkeypatch.setattr(call, "known_platforms", lambda: ["cpu", "tpu"])
    spec = Spec(hidden_size=16)
    params, tx = {"w": jnp.ones((3, 2))}, optimizer(spec, make_theta(spec))
    step = jax.jit(lambda p: tx.step(p, tx.init(p), p))
    assert "lopt_fast_small_fc_step" in step.trace(params).lower(lowering_platforms=("cpu",)).as_text()
    elsewhere = step.trace(params).lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" not in elsewhere
    assert "exponential" in elsewhere
    forced = optimizer(spec, make_theta(spec), backend="cpu")
    assert_equal(step(params), jax.jit(lambda p: forced.step(p, tx.init(p), p))(params))
    batch = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    vmapped = jax.jit(jax.vmap(lambda p: tx.step(p, tx.init(p), p)))(batch)
    assert_equal(pick(vmapped, 0), step(params))


# ---- optax ----


@needs_kernel
def test_is_an_optax_transformation():
    tx = optimizer()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    params = arrays()
    state = init(params)
    assert optax.tree_utils.tree_get(state, "count") == 0
    state = optax.tree_utils.tree_set(state, count=jnp.asarray(7, jnp.int32))
    _, state = update(params, state, params, value=jnp.float32(1.0), grad=params, value_fn=None)
    assert state.count == 8
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: 2 * x, state, transform_non_params=lambda x: x)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


@needs_kernel
def test_schedule():
    params, grads = arrays(), [arrays(seed=t) for t in range(3)]
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 0.5})
    found, _ = run_steps(optimizer(learning_rate=schedule, backend="cpu"), params, grads)
    tx = [optimizer(learning_rate=rate, backend="cpu") for rate in (1.0, 0.5, 0.25)]
    state = tx[0].init(params)
    for t in range(3):
        params, state = tx[t].step(grads[t], state, params)
        assert_close(found[t], params)


@needs_kernel
def test_chain():
    params, g = arrays(), arrays(seed=1)
    tx = optax.chain(optax.scale(2.0), optimizer(backend="cpu"), optax.scale(0.5))
    updates, _ = jax.jit(tx.update)(g, tx.init(params), params, value=1.0)
    bare = optimizer(backend="cpu")
    expected, _ = bare.update(jax.tree.map(lambda x: 2 * x, g), bare.init(params), params)
    assert_close(updates, jax.tree.map(lambda x: 0.5 * x, expected))


@needs_kernel
def test_masked_and_partition():
    params, g = arrays(), arrays(seed=1)
    bare = optimizer(backend="cpu")
    expected, _ = bare.update(g, bare.init(params), params)
    mask = {n: n in ("matrix", "scalar") for n in params}
    tx = optax.masked(bare, mask)
    updates, state = jax.jit(tx.update)(g, tx.init(params), params)
    for n in params:
        assert_equal(updates[n], expected[n] if mask[n] else g[n])
    updates, state = jax.jit(tx.update)(g, state, params)
    tx = optax.partition(
        {"ours": bare, "sgd": optax.sgd(0.1)}, {n: "ours" if mask[n] else "sgd" for n in params}
    )
    updates, _ = jax.jit(tx.update)(g, tx.init(params), params)
    for n in params:
        assert_close(updates[n], expected[n] if mask[n] else -0.1 * g[n])


@needs_kernel
def test_inject_hyperparams():
    params, g = arrays(), arrays(seed=1)
    tx = optax.inject_hyperparams(lopt.learned_optimizer)(
        SPEC, learning_rate=optax.linear_schedule(1.0, 0.0, 4), weight_decay=0.1, theta=THETA, max_grad_norm=0.5,
        backend="cpu", num_steps=100,
    )  # fmt: skip
    step, state = jax.jit(tx.update), tx.init(params)
    for t in range(2):
        updates, new_state = step(g, state, params)
        bare = optimizer(learning_rate=1.0 - 0.25 * t, weight_decay=0.1, max_grad_norm=0.5, backend="cpu")
        expected, _ = bare.update(g, state.inner_state, params)
        assert_close(updates, expected)
        state = new_state
    state.hyperparams["weight_decay"] = jnp.float32(0.0)
    changed, _ = step(g, state, params)
    assert np.abs(changed["matrix"] - updates["matrix"]).max() > 1e-3
    assert step._cache_size() == 1


@needs_kernel
def test_multi_steps():
    params, grads = arrays(), [arrays(seed=t) for t in range(4)]
    tx = optax.MultiSteps(optimizer(backend="cpu"), every_k_schedule=2)
    step, state, current = jax.jit(tx.update), tx.init(params), params
    for g in grads:
        updates, state = step(g, state, current)
        current = optax.apply_updates(current, updates)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *grads[i : i + 2]) for i in (0, 2)]
    expected, _ = run_steps(optimizer(backend="cpu"), params, means)
    assert_close(current, expected[-1])


# ---- errors ----


def test_bad_input_is_named():
    params, tx = {"layer": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}}, optimizer()
    state, w, b = tx.init(params), jnp.ones((3, 4)), jnp.ones(4)

    def given(**grads):
        return tx.update({"layer": grads}, state, params)

    cases = [
        (lambda: tx.update(params, state), r"call update\(grads, state, params\)"),
        (lambda: given(w=w), r"params\['layer'\]\['b'\] is in only one"),
        (lambda: given(w=w, b=b, c=b), r"grads\['layer'\]\['c'\] is in only"),
        (lambda: given(w=w.T, b=b), r"grads\['layer'\]\['w'\] is float32\(4, 3\)"),
        (lambda: given(w=w, b=b.astype("bfloat16")), r"\['b'\] is bfloat16"),
        (lambda: given(w=w, b="no"), r"grads\['layer'\]\['b'\] is str"),
        (lambda: tx.update(params, state.packed, params), "not a LearnedOptimizerState"),
        (lambda: tx.update(params, tx.init({"w": w}), params), "state.moments is not a tree like params"),
        (
            lambda: tx.update(params, tx.init({"layer": {"w": jnp.ones((40, 40)), "b": b}}), params),
            "state.packed",
        ),
        (lambda: tx.update(params, optimizer(statistics="lagged").init(params), params), "state.packed"),
        *[
            (lambda d=d: tx.init({"layer": {"w": jnp.ones(3, d)}}), rf"params\['layer'\]\['w'\] is {d}")
            for d in ("float8_e5m2", "int32", "bool", "complex64")
        ],
        (lambda: tx.init({"name": "resnet"}), r"params\['name'\] is str"),
        (lambda: optimizer(learning_rate=float("nan")), "learning_rate"),
        (lambda: optimizer(learning_rate="fast"), "learning_rate"),
        (lambda: optimizer(learning_rate=-1), "learning_rate=-1: must be finite and not negative"),
        (lambda: optimizer(learning_rate=np.float32(-0.5)), "learning_rate"),
        (lambda: optimizer(weight_decay=jnp.ones(2)), "weight_decay"),
        (lambda: optimizer(weight_decay=-0.1), "weight_decay=-0.1: must be finite and not negative"),
        (lambda: optimizer(weight_decay=np.array(np.inf)), "weight_decay"),
        (lambda: lopt.learned_optimizer("adamw", -1e-3), "learning_rate=-0.001: must be finite and not"),
        (lambda: optimizer(max_grad_norm=0.0), "max_grad_norm"),
        (lambda: lopt.learned_optimizer("no_such_weights"), "no_such_weights"),
        (lambda: lopt.learned_optimizer(SPEC), "theta"),
        (lambda: optimizer(theta={n: a for n, a in THETA.items() if n != "w1"}), "w1"),
        (lambda: optimizer(statistics="approximate"), "statistics"),
    ]
    for act, message in cases:
        with pytest.raises(ValueError, match=message):
            act()
    with pytest.raises(SpecError):
        lopt.learned_optimizer(SPEC)
    for backend in ("triton", "gpu"):
        unusable = optimizer(backend=backend)
        with pytest.raises(BackendError, match=backend):
            unusable.update(params, state, params)


@needs_kernel
def test_errors_at_trace_time():
    tx = optimizer()
    bad = {"w": jnp.ones(3, jnp.int32)}
    with pytest.raises(ValueError, match=r"params\['w'\] is int32"):
        jax.jit(lambda p: tx.update(p, tx.init(p), p)).lower(bad)
    forced = optimizer(Spec(feature_set="m"), make_theta(Spec(feature_set="m")), backend="cpu")
    params = {"w": jnp.ones(3)}
    with pytest.raises(BackendError, match="feature_set"):
        jax.jit(lambda p: forced.update(p, forced.init(p), p)).lower(params)


@needs_kernel
def test_handler_refuses_calls_that_do_not_fit(monkeypatch):
    """What Python does not check reaches XLA as an error that names the kernel."""
    monkeypatch.setattr(custom_call, "_FORMAT", 99)
    params, tx = {"w": jnp.ones((3, 5))}, optimizer(backend="cpu")
    with pytest.raises(Exception, match="lopt_fast small_fc_step: this call was written for another version"):
        jax.block_until_ready(jax.jit(lambda p: tx.update(p, tx.init(p), p))(params))


def test_refused_handler_falls_back_once(monkeypatch):
    """A handler that JAX rejects costs a warning, not JAX."""
    monkeypatch.setattr(call, "refusal", lambda *_: None)
    monkeypatch.setattr(call, "registration_failure", lambda *_: "rejected for the test")
    call.warn_once.cache_clear()
    spec = Spec(hidden_size=16)
    params, theta = {"w": jnp.ones(3)}, make_theta(spec)
    tx, forced = optimizer(spec, theta), optimizer(spec, theta, backend="cpu")
    with pytest.warns(BackendWarning, match="rejected for the test"):
        found, _ = tx.step(params, tx.init(params), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.step(params, tx.init(params), params)
    assert_follows([found], numpy_steps(params, [params], spec, theta), params)
    with pytest.raises(BackendError, match="rejected for the test"):
        forced.step(params, forced.init(params), params)
