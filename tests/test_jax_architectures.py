"""`lopt_fast.jax.learned_optimizer` for every architecture: against NumPy, JAX's transformations, optax, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from array_api_compat import array_namespace  # noqa: E402

import lopt_fast.jax as lopt  # noqa: E402
from lopt_fast.architectures import ARCHITECTURES, Architecture, initial_theta  # noqa: E402
from lopt_fast.architectures.base import Inputs, Update  # noqa: E402
from lopt_fast.backends import BackendError, BackendWarning  # noqa: E402
from lopt_fast.checkpoint import Checkpoint  # noqa: E402
from lopt_fast.jax import call, grouped, operations  # noqa: E402
from lopt_fast.jax.grouped import Grouped  # noqa: E402
from lopt_fast.operations import AdamScalars, Decays, ElementMlp, ModelTensors, Reference, Weights  # noqa: E402
from lopt_fast.operations.accumulators import initial_state  # noqa: E402
from lopt_fast.operations.adam import ADAM_AVERAGES  # noqa: E402
from lopt_fast.spec import SpecError  # noqa: E402

SHAPES = {"a": (3, 4), "b": (4,), "c": (3, 4), "d": (), "e": (4,), "empty": (0, 2), "embed": (3, 4)}
NAMES = [name for name, kind in ARCHITECTURES.items() if issubclass(kind, Architecture)]
ONE_EACH = {"momentum_decays": [0.9], "rms_decays": [0.9], "adafactor_decays": [0.9]}
SMALL: dict[str, dict[str, Any]] = {
    "celo": {**ONE_EACH, "hidden_size": 2, "lstm_size": 8, "mixture": 2},
    "celo2": {**ONE_EACH, "hidden_size": 2, "hidden_layers": 1},
    "fc_lopt": {"momentum_decays": [0.9], "hidden_layers": 1},
    "velo": {**ONE_EACH, "hidden_size": 2, "lstm_size": 8, "mixture": 3},
    "rnn_fc_lopt": {"decays": [0.9], "hidden_layers": 1},
    "recurrent_transformer": {
        "decays": [0.9], "hidden_layers": 1, "width": 8, "layers": 1, "heads": 2, "key_size": 4,
    },
}  # fmt: skip
"""Hyperparameters that make the tests fast."""


@dataclass(frozen=True)
class Probe(Architecture):
    """Adam whose learning rate depends on theta, time, the loss, and how often it has seen each tensor."""

    NAME: ClassVar[str] = "probe"
    needs_loss: ClassVar[bool] = True
    needs_num_steps: ClassVar[bool] = True
    names_seen: ClassVar[list[tuple[str, ...]]] = []

    @property
    def theta_shapes(self):
        return {"rate": (2,)}

    def init_theta(self, seed=0):
        return {"rate": np.random.default_rng(seed).uniform(0.1, 0.2, 2).astype(np.float32)}

    def accumulates(self, name, shape):
        return ADAM_AVERAGES

    def init_rows(self, theta, shapes):
        xp = array_namespace(theta["rate"])
        return {"seen": xp.zeros((len(shapes),), dtype=theta["rate"].dtype)}

    def init_shared(self, theta):
        return {"loss": theta["rate"][0] * 0.0}

    def step(self, operations, theta, tensors, rows, shared, inputs):
        xp = array_namespace(theta["rate"])
        self.names_seen.append(tuple(tensors.names))
        loss = 0.5 * shared["loss"] + 0.5 * inputs.loss
        left = 1.0 - xp.astype(inputs.t, theta["rate"].dtype) / inputs.num_steps
        rate = (theta["rate"][0] + theta["rate"][1] * left + 0.1 * loss) / (1.0 + rows["seen"])
        scalars = AdamScalars.of(rate, beta1=0.9, beta2=0.99, scale=rate, epsilon=1e-3)
        outputs, states, *_ = operations.adam(tensors, scalars)
        return Update(outputs, states, {"seen": rows["seen"] + 1.0}, {"loss": loss})

    def observe_validation(self, theta, shared, loss):
        return {"loss": shared["loss"] + loss}


THETA = Probe().init_theta()


def arrays(shapes=SHAPES, seed=0, dtype=jnp.float32, batch=()):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.standard_normal((*batch, *s)), dtype) for n, s in shapes.items()}


def probe(theta=THETA, num_steps=10, backend="reference", **options):
    return lopt.learned_optimizer(Probe(), theta=theta, num_steps=num_steps, backend=backend, **options)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, equal_nan=False), a, b)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


def pick(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def losses(steps=3):
    return [jnp.asarray(2.0 / (t + 1)) for t in range(steps)]


def run(tx, params, grads):
    state = tx.init(params)
    for g, loss in zip(grads, losses(len(grads)), strict=True):
        params, state = tx.step(g, state, params, value=loss)
    return params, state


def numpy_run(spec, theta, params, grads, lr, weight_decay, max_grad_norm):
    """The definition in float64; the arrays that are not empty, in the order of JAX's trees."""
    names = sorted(n for n, p in params.items() if p.size)
    p = [np.asarray(params[n], np.float64) for n in names]
    theta = {n: np.asarray(a, np.float64) for n, a in theta.items()}
    states = [initial_state(spec.accumulates(n, a.shape), a) for n, a in zip(names, p, strict=True)]
    rows, shared = spec.init_rows(theta, [a.shape for a in p]), spec.init_shared(theta)
    for t, (grad, loss) in enumerate(zip(grads, losses(len(grads)), strict=True)):
        g = [np.asarray(grad[n], np.float64) for n in names]
        norm = np.sqrt(sum((a * a).sum() for a in g))
        tensors = ModelTensors(
            p, g, states, [lr] * len(p), [weight_decay] * len(p), names=names, apply=True,
            grad_scale=min(1.0, max_grad_norm / (norm + 1e-6)),
        )  # fmt: skip
        inputs = Inputs(np.asarray(t), 10.0, np.asarray(loss, np.float64))
        p, states, rows, shared = spec.step(Reference, theta, tensors, rows, shared, inputs)
    return dict(zip(names, p, strict=True)), rows, shared


# ---- the step ----


@pytest.mark.parametrize("name", NAMES)
def test_can_be_compiled(name):
    spec = ARCHITECTURES[name]()
    tx = lopt.learned_optimizer(spec, theta=initial_theta(spec), num_steps=10, backend="reference")
    params = arrays()
    state = tx.init(params)
    after = jax.eval_shape(partial(tx.step, value=1.0), params, state, params)
    before = params, state
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("celo", "rnn_fc_lopt")])
def test_follows_the_definition(name):
    """In float64, operation by operation: a program of each would take long to compile.

    Not celo and rnn_fc_lopt: velo and recurrent_transformer are made of the same operations.
    """
    spec = ARCHITECTURES[name].from_dict(SMALL.get(name, {}))
    theta = initial_theta(spec)
    options = {"weight_decay": 0.1, "max_grad_norm": 2.0}
    shapes = {n: SHAPES[n] for n in ("a", "b", "c", "empty")}
    with jax.enable_x64(True), jax.disable_jit():
        params, *grads = (arrays(shapes, seed, jnp.float64) for seed in range(3))
        tx = lopt.learned_optimizer(spec, 0.5, theta=theta, num_steps=10, backend="reference", **options)
        found, state = run(tx, params, grads)
        expected, rows, shared = numpy_run(spec, theta, params, grads, 0.5, **options)
        assert state.count == 2
        for n, p in expected.items():
            moved = np.abs(p - np.asarray(params[n])).max()
            assert moved > 0
            assert np.abs(np.asarray(found[n]) - p).max() <= 1e-9 * moved, n
        np.testing.assert_array_equal(found["empty"], params["empty"])
        assert_close(dict(state.rows), dict(rows), rtol=1e-9, atol=1e-12)
        assert_close(dict(state.shared), dict(shared), rtol=1e-9, atol=1e-12)


def test_compiled_and_by_name(tmp_path):
    """A checkpoint in float32, jitted, with `update` and with `step`."""
    spec = ARCHITECTURES["nn_adam"]()
    path = Checkpoint(spec, initial_theta(spec)).save(tmp_path / "mine.safetensors")
    params, grads = arrays(), [arrays(seed=t + 1) for t in range(3)]
    tx = lopt.learned_optimizer(path, 0.5, 0.1, max_grad_norm=2.0, backend="reference")
    update, state, current = jax.jit(tx.update), tx.init(params), params
    for g in grads:
        updates, state = update(g, state, current)
        current = optax.apply_updates(current, updates)
    expected, *_ = numpy_run(spec, initial_theta(spec), params, grads, 0.5, 0.1, 2.0)
    for n, p in expected.items():
        moved = np.abs(p - np.asarray(params[n])).max()
        limit = 4 * np.finfo(np.float32).eps * np.abs(p).max() + 1e-4 * moved
        assert np.abs(np.asarray(current[n]) - p).max() <= limit, n
    assert_close(run(tx, params, grads)[0], current)
    assert update._cache_size() == 1
    baseline = lopt.learned_optimizer("adamw", backend="reference")  # no meta-parameters
    assert np.abs(run(baseline, params, grads)[0]["a"] - params["a"]).max() > 0


@pytest.mark.parametrize("batched_size", [2**16, 0], ids=["at once", "one after the other"])
def test_grouped_operations_are_the_definitions(monkeypatch, batched_size):
    """Tensors of one shape together and one by one: weights, multipliers, rates and messages of each are its own."""
    monkeypatch.setattr(grouped, "BATCHED_SIZE", batched_size)
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (3,), (2, 3), (3,)]
    n = len(shapes)
    spec = ElementMlp(("g", "p", "m"), 1, 0, 0, 2, 1, 0.1, 0.1, messages=1)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = [normal(*shape) for shape in shapes]
    tensors = ModelTensors(
        params, [normal(*shape) for shape in shapes], [initial_state(spec, p) for p in params],
        [normal() for _ in shapes], [0.1 * i for i in range(n)], grad_scale=0.5,
    )  # fmt: skip
    decays = Decays.constant(params[0], [0.9])
    (first, hidden), (_, out) = spec.layer_sizes
    weights = Weights((normal(n, first, hidden), normal(hidden, out)), (normal(hidden), normal(n, out)))
    per_tensor = normal(n)
    scalars = AdamScalars.of(per_tensor, beta1=per_tensor, beta2=0.9, scale=0.1, epsilon=1.0)
    for each in (Grouped, Reference):
        found = (
            each.element_mlp(spec, tensors, decays, weights, per_tensor, 0.3),
            each.statistics(spec, tensors, decays),
        )
        with_v = replace(tensors, states=[initial_state(ADAM_AVERAGES, p) for p in params])
        found = *found, each.adam(with_v, scalars, 0.3)
        if each is Grouped:
            mapped = found
    assert_close(mapped, found)


def test_names_reach_the_architecture():
    Probe.names_seen.clear()
    params = {"layer": {"w": jnp.ones((7, 3)), "none": jnp.zeros((0,))}, "list": [jnp.ones(2)]}
    tx = probe()
    tx.step(params, tx.init(params), params, value=1.0)
    assert Probe.names_seen[-1] == ("layer/w", "list/0")


def test_missing_gradients_leave_parameter_and_state():
    params, g, tx = arrays(), arrays(seed=1), probe(weight_decay=0.1)
    _, start = tx.step(g, tx.init(params), params, value=1.0)
    updates, state = jax.jit(tx.update)({**g, "b": None}, start, params, value=1.0)
    assert_equal(updates["b"], jnp.zeros(4))
    both, both_state = tx.update(g, start, params, value=1.0)
    assert_close(updates["a"], both["a"])
    filled = [n for n in sorted(params) if params[n].size]
    at = filled.index("b")
    np.testing.assert_array_equal(state.rows["seen"], [1.0 if i == at else 2.0 for i in range(len(filled))])
    np.testing.assert_array_equal(both_state.rows["seen"], np.full(len(filled), 2.0))
    assert_equal(state.accumulators.momentum["b"], start.accumulators.momentum["b"])
    assert_close(state.accumulators.momentum["a"], both_state.accumulators.momentum["a"])
    stepped, _ = tx.step({**g, "b": None}, start, params, value=1.0)
    assert_equal(stepped["b"], params["b"])
    nothing = dict.fromkeys(params)
    updates, state = tx.update(nothing, start, params, value=1.0)
    assert state.count == 2
    assert all(not u.any() for u in updates.values())


def test_trees_without_parameters():
    tx = probe()
    for empty in ({}, {"a": None}, {"e": jnp.zeros((0, 3))}):
        updates, state = tx.update(empty, tx.init(empty), empty, value=1.0)
        assert jax.tree.structure(updates) == jax.tree.structure(empty)
        assert state.count == 1


def test_observe_validation():
    params, tx = arrays(), probe()
    state = tx.init(params)
    observed = jax.jit(tx.observe_validation)(state, 3.0)
    assert observed.shared["loss"] == 3.0
    assert_equal(observed._replace(shared=state.shared), state)
    plain = lopt.learned_optimizer()
    start = plain.init(params)
    assert plain.observe_validation(start, 3.0) is start


def test_float64_beside_float32():
    with jax.enable_x64(True):
        params = {"single": jnp.ones(3), "double": jnp.ones(3, jnp.float64)}
        params["single"] = params["single"].astype(jnp.float32)
        tx = probe(max_grad_norm=1.0)
        new, state = jax.jit(tx.step)(params, tx.init(params), params, value=1.0)
        assert {n: a.dtype.name for n, a in new.items()} == {"single": "float32", "double": "float64"}
        assert {n: a.dtype.name for n, a in state.accumulators.momentum.items()} == {
            "single": "float32",
            "double": "float64",
        }
        assert state.rows["seen"].dtype == jnp.float64
        np.testing.assert_allclose(new["single"], new["double"], rtol=1e-6)


# ---- JAX's transformations ----


def test_horizon_is_an_operand():
    """One program serves several lengths of training, and a changed length on resuming stretches the schedule."""
    params, g = arrays(), arrays(seed=1)

    @jax.jit
    def step(num_steps, state, params):
        return probe(num_steps=num_steps).step(g, state, params, value=1.0)

    state = probe().init(params)._replace(count=jnp.asarray(5, jnp.int32))
    for num_steps in (10, 20):
        found, _ = step(num_steps, state, params)
        at_this_fraction = state._replace(count=jnp.asarray(500 // num_steps, jnp.int32))
        expected, _ = probe(num_steps=100).step(g, at_this_fraction, params, value=1.0)
        assert_close(found, expected)
    assert step._cache_size() == 1


def test_scan_and_eager():
    params, grads, tx = arrays(), [arrays(seed=t + 1) for t in range(3)], probe(weight_decay=0.01)

    @jax.jit
    def unroll(params, grads, losses):
        def body(carry, x):
            return tx.step(x[0], carry[1], carry[0], value=x[1]), None

        return jax.lax.scan(body, (params, tx.init(params)), (grads, losses))[0]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    assert_close(unroll(params, stacked, jnp.stack(losses())), run(tx, params, grads))


def test_donated_state_is_overwritten_in_place():
    params, g, tx = arrays(), arrays(seed=1), probe()
    state = jax.tree.map(jnp.copy, tx.init(params))
    expected = run(tx, params, [g])
    step = jax.jit(lambda g, s, p: tx.step(g, s, p, value=losses()[0]), donate_argnums=(1, 2))
    params = jax.tree.map(jnp.copy, params)
    old = [leaf for leaf in jax.tree.leaves((state.accumulators, params)) if leaf.size]
    found = step(g, state, params)
    assert all(leaf.is_deleted() for leaf in old)
    assert_close(found, expected)


AXES = {
    "everything": (0, 0, 0, 0, 0, 0),
    "parameters": (None, None, 0, 0, None, None),
    "meta-parameters": (0, None, None, None, None, None),
    "loss": (None, None, None, None, None, 0),
    "horizon": (None, 0, None, None, None, None),
}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_vmap_is_a_loop(axes):
    n, shapes = 3, {"w": (2, 3), "v": (2, 3), "b": (3,)}

    def step(theta, num_steps, params, grads, state, loss):
        return probe(theta, num_steps).step(grads, state, params, value=loss)

    start = probe().init(arrays(shapes))._replace(count=jnp.asarray(2, jnp.int32))
    values = (dict(THETA), jnp.float32(10.0), arrays(shapes), arrays(shapes, 1), start, jnp.float32(1.0))

    def batched(tree, axis):
        members = [
            jax.tree.map(lambda x, i=i: x + i if x.dtype == jnp.int32 else x * (1 + 0.1 * i) + 0.01 * i, tree)
            for i in range(n)
        ]
        return tree if axis is None else jax.tree.map(lambda *x: jnp.stack(x), *members)

    stacked = [batched(v, a) for v, a in zip(values, axes, strict=True)]
    found = jax.jit(jax.vmap(step, in_axes=axes))(*stacked)
    for i in range(n):
        member = [v if a is None else pick(v, i) for v, a in zip(stacked, axes, strict=True)]
        assert_close(pick(found, i), step(*member))


def test_nested_vmap_in_scan():
    """As meta-training does it: a population of meta-parameters times a batch of unrolls, each of its own length."""
    shapes, sigmas, tasks, steps = {"w": (2, 3), "b": (3,)}, 2, 3, 3
    thetas = {"rate": jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.3, (sigmas, 2)), jnp.float32)}
    grads, params = arrays(shapes, 1, batch=(steps, tasks)), arrays(shapes, 2, batch=(tasks,))
    lengths, seen = jnp.asarray([3, 10, 100]), jnp.linspace(1.0, 2.0, steps)

    def unroll(theta, length, params, grads):
        tx = probe(theta, length)

        def body(carry, x):
            return tx.step(x[0], carry[1], carry[0], value=x[1]), None

        return jax.lax.scan(body, (params, tx.init(params)), (grads, seen))[0]

    over_tasks = jax.vmap(unroll, in_axes=(None, 0, 0, 1))
    found = jax.jit(jax.vmap(over_tasks, in_axes=(0, None, None, None)))(thetas, lengths, params, grads)
    single = jax.jit(unroll)
    for s in range(sigmas):
        for k in range(tasks):
            g = pick(grads, (slice(None), k))
            expected = single(pick(thetas, s), lengths[k], pick(params, k), g)
            assert_close(pick(found, (s, k)), expected)


def test_can_be_differentiated():
    params, g = {"w": jnp.ones(3)}, {"w": jnp.full(3, 0.5)}

    def total(theta):
        tx = probe(theta)
        return jnp.sum(tx.step(g, tx.init(params), params, value=1.0)[0]["w"])

    gradient = jax.grad(total)(jax.tree.map(jnp.asarray, dict(THETA)))["rate"]
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).min() > 0


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np, sys
    from jax.sharding import PartitionSpec as P
    sys.path.insert(0, {tests!r})
    from test_jax_architectures import arrays, probe, assert_close, THETA
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    shapes = {{"w": (4, 6), "b": (9,)}}
    params, grads, loss = arrays(shapes), arrays(shapes, 1, batch=(2,)), jnp.asarray([1.0, 3.0])
    tx = probe(weight_decay=0.1, max_grad_norm=1.0)
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    expected = jax.tree.map(np.asarray, jax.jit(lambda: tx.step(mean, tx.init(params), params, value=2.0))())

    def data_parallel(params, grads, loss):
        def body(carry, _):
            params, state = carry
            g, l = jax.tree.map(lambda a: jax.lax.pmean(a[0], "x"), (grads, loss))
            return tx.step(g, state, params, value=l), None
        return jax.lax.scan(body, (params, tx.init(params)), None, length=1)[0]

    one = jax.jit(jax.shard_map(data_parallel, mesh=mesh, in_specs=(P(), P("x"), P("x")), out_specs=P()))
    assert_close(jax.tree.map(np.asarray, one(params, grads, loss)), expected)

    def population(thetas, params, g):  # meta-parameters of its own on each device
        def member(theta):
            tx = probe(theta)
            def body(carry, _):
                return tx.step(g, carry[1], carry[0], value=1.0), None
            varying = jax.lax.pcast(params, "x", to="varying")
            return jax.lax.scan(body, (varying, tx.init(varying)), None, length=2)[0][0]
        return jax.vmap(member)(thetas)
    thetas = {{"rate": jnp.arange(8.0).reshape(4, 2) / 10}}
    sharded = jax.shard_map(population, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P("x"))
    many = jax.tree.map(np.asarray, jax.jit(sharded)(thetas, params, mean))
    for s in range(4):
        tx = probe({{"rate": thetas["rate"][s]}})
        p, state = params, tx.init(params)
        for _ in range(2):
            p, state = tx.step(mean, state, p, value=1.0)
        assert_close(jax.tree.map(lambda x: x[s], many), jax.tree.map(np.asarray, p))

    # plain jit on a sharded parameter
    tx = probe(weight_decay=0.1, max_grad_norm=1.0)
    rows = dict(params, w=jax.device_put(params["w"], jax.sharding.NamedSharding(mesh, P("x"))))
    found = jax.jit(lambda p, g: tx.step(g, tx.init(p), p, value=2.0))(rows, mean)
    assert_close(jax.tree.map(np.asarray, found), expected)
    print("finished")
"""


def test_two_devices():
    """Replicated and over a population inside shard_map, and plain jit on sharded arrays."""
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
    root = Path(__file__).resolve().parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
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


# ---- optax ----


def test_is_an_optax_transformation():
    params, tx = arrays(), probe()
    state = tx.init(params)
    assert isinstance(state, lopt.ArchitectureState)
    assert optax.tree_utils.tree_get(state, "count") == 0
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + 2, state, transform_non_params=lambda x: x)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert doubled.count == 0
    assert (doubled.accumulators.momentum["a"] == 2.0).all()


def test_schedule_and_inject_hyperparams():
    params, g = arrays(), arrays(seed=1)
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    tx = optax.inject_hyperparams(lopt.learned_optimizer)(
        Probe(), learning_rate=schedule, weight_decay=0.1, theta=dict(THETA), max_grad_norm=0.5, num_steps=10,
        backend="reference",
    )  # fmt: skip
    scheduled = probe(learning_rate=schedule, weight_decay=0.1, max_grad_norm=0.5)
    step, state, other = jax.jit(tx.update), tx.init(params), scheduled.init(params)
    for t in range(2):
        bare = probe(learning_rate=1.0 - 0.25 * t, weight_decay=0.1, max_grad_norm=0.5)
        expected, _ = bare.update(g, state.inner_state, params, value=1.0)
        updates, state = step(g, state, params, value=1.0)
        assert_close(updates, expected)
        updates, other = scheduled.update(g, other, params, value=1.0)
        assert_close(updates, expected)
    assert step._cache_size() == 1
    state.hyperparams["num_steps"] = jnp.asarray(1000)
    changed, _ = step(g, state, params, value=1.0)
    assert np.abs(changed["a"] - updates["a"]).max() > 1e-3


def test_chain_masked_and_multi_steps():
    params, g, bare = arrays(), arrays(seed=1), probe()
    expected, _ = bare.update(g, bare.init(params), params, value=1.0)
    doubled, _ = bare.update(jax.tree.map(lambda x: 2 * x, g), bare.init(params), params, value=1.0)
    chained = optax.chain(optax.scale(2.0), bare, optax.scale(0.5))
    updates, _ = chained.update(g, chained.init(params), params, value=1.0)
    assert_close(updates, jax.tree.map(lambda x: 0.5 * x, doubled))
    mask = {n: n in ("a", "d") for n in params}
    masked = optax.masked(bare, mask)
    updates, _ = masked.update(g, masked.init(params), params, value=1.0)
    for n in params:
        assert_close(updates[n], expected[n] if mask[n] else g[n])
    several = optax.MultiSteps(bare, every_k_schedule=2)
    step, state = jax.jit(several.update), several.init(params)
    for each in (jax.tree.map(jnp.zeros_like, g), jax.tree.map(lambda x: 2 * x, g)):
        updates, state = step(each, state, params, value=1.0)
    assert_close(updates, expected)


# ---- errors ----


def test_bad_input_is_named():
    params, tx = {"layer": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}}, probe()
    state, other = tx.init(params), {"w": jnp.ones(3)}
    step = partial(tx.update, value=1.0)
    cases = [
        (lambda: step(params, state), r"call update\(grads, state, params\)"),
        (lambda: tx.update(params, state, params), "probe looks at the training loss: pass value=loss"),
        (lambda: tx.update(params, state, params, value=jnp.ones(2)), "value="),
        (lambda: step({"layer": {"w": jnp.ones((3, 4))}}, state, params), r"\['b'\] is in only one"),
        (lambda: step({"layer": {**params["layer"], "b": jnp.ones(5)}}, state, params), r"grads\['layer'\]"),
        (lambda: step(params, (), params), "state is tuple, not an ArchitectureState"),
        (lambda: step(other, state, other), r"state\.accumulators.*init\(params\)"),
        (lambda: step(params, state._replace(rows={}), params), r"state\.rows\['seen'\] is missing"),
        (
            lambda: step(params, tx.init({"layer": {"w": jnp.ones((3, 5)), "b": jnp.ones(4)}}), params),
            r"state\.accumulators\.momentum\['layer'\]\['w'\] is float32\(1, 3, 5\), expected",
        ),
        (lambda: tx.init({"w": jnp.ones(3, "int32")}), r"params\['w'\] is int32"),
        (lambda: tx.observe_validation((), 1.0), "ArchitectureState"),
        (lambda: probe(num_steps=None), "probe needs num_steps"),
        (lambda: probe(num_steps=0), "num_steps=0"),
        (lambda: probe(num_steps="long"), "num_steps"),
        (lambda: probe(theta={}), "rate"),
        (lambda: probe(statistics="lagged"), "statistics='lagged': probe has 'exact' alone"),
        (lambda: lopt.learned_optimizer(Probe(), num_steps=10), "Probe has no meta-parameters"),
    ]
    for act, message in cases:
        with pytest.raises(ValueError, match=message):
            act()
    with pytest.raises(SpecError):
        lopt.learned_optimizer(Probe(), num_steps=10)
    for backend in ("cuda", "triton", "gpu"):
        unusable = probe(backend=backend)
        with pytest.raises(BackendError, match=f"'{backend}'"):
            unusable.update(params, state, params, value=1.0)


def test_reference_in_place_of_missing_kernels_warns_once(monkeypatch):
    monkeypatch.setattr(operations, "_refusal", lambda *_: "refused for the test")
    call.warn_once.cache_clear()
    params, tx = {"w": jnp.ones(3)}, probe(backend="auto")
    with pytest.warns(BackendWarning, match="probe on cpu uses the reference.*refused for the test"):
        found = tx.step(params, tx.init(params), params, value=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(tx.step(params, tx.init(params), params, value=1.0), found)
