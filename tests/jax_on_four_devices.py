"""Steps over sharded parameters: test_jax_sharded.py runs these tests in a process with four devices."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_parameter_close, random_theta
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_fast.jax as lopt
from lopt_fast.jax import sharded
from lopt_fast.spec import Spec

SHAPES = {
    "w": (512, 256), "square": (300, 300), "conv": (2, 256, 160, 1), "stack": (4, 130, 140), "v": (70_000,),
    "small": (64, 32), "scalar": (), "replicated": (300, 400), "empty": (0, 4),
}  # fmt: skip
SPECS = {
    "w": P("a", "b"), "square": P(("b", "a")), "conv": P(None, None, ("a", "b")), "stack": P("a", None, "b"),
    "v": P("b"), "small": P("a"), "scalar": P(), "replicated": P(), "empty": P(),
}  # fmt: skip
THETA = random_theta(Spec())
STEPS = 3


def mesh(explicit: bool = False) -> Mesh:
    if explicit:
        return jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    return Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))


def arrays(seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: np.asarray(0.1 * rng.standard_normal(s), np.float32).astype(dtype) for k, s in SHAPES.items()}


PARAMS, GRADS = arrays(0), [arrays(i + 1) for i in range(STEPS)]


def put(tree: Any, on: Mesh, specs: dict[str, P] = SPECS) -> Any:
    return {k: jax.device_put(a, NamedSharding(on, specs[k])) for k, a in tree.items()}


def optimizer(**options: Any) -> Any:
    options = {"learning_rate": 0.5, "weight_decay": 0.01, "backend": "cpu"} | options
    statistics = options.pop("statistics", "exact")
    return lopt.learned_optimizer(Spec().with_statistics(statistics), theta=THETA, **options)


def trajectory(tx: Any, params: Any, grads: list[Any], state: Any = None, way: str = "step") -> list[Any]:
    """(parameters, state) after each step."""

    def by_update(p: Any, s: Any, g: Any) -> Any:
        updates, s = tx.update(g, s, p)
        return optax.apply_updates(p, updates), s

    step = jax.jit((lambda p, s, g: tx.step(g, s, p)) if way == "step" else by_update)
    found, state = [], tx.init(params) if state is None else state
    for g in grads:
        # Devices of a CPU share threads: XLA's collectives may wait for each other for ever where steps overlap.
        params, state = jax.block_until_ready(step(params, state, g))
        found.append((params, state))
    return found


def assert_same(found: list[Any], expected: list[Any], begin: Any = PARAMS) -> None:
    """Trajectories agree within the bound of the kernels, and so do states."""
    before = begin
    for t, ((p, state), (e, wanted)) in enumerate(zip(found, expected, strict=True)):
        for k in begin:
            exact, old = np.asarray(e[k], np.float64), np.asarray(before[k], np.float64)
            assert_parameter_close(np.asarray(p[k]), old, exact - old, f"{k} step {t}")
        before = e
        for dtype, packed in state.packed.items():
            a, b = np.asarray(packed, np.float64), np.asarray(wanted.packed[dtype], np.float64)
            assert np.all(np.abs(a - b) <= 1e-4 * np.abs(b) + 1e-7), f"packed {dtype} step {t}"
        for k, own in state.moments.items():
            assert (own is None) == (wanted.moments[k] is None)
            for i in range(0 if own is None else len(own)):
                a, b = (np.asarray(of.moments[k][i], np.float64) for of in (state, wanted))
                assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max(), f"moments of {k}, {i}, step {t}"


def collectives(compiled: Any) -> dict[str, list[int]]:
    """Elements of the results of each kind of collective in a program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found: dict[str, list[int]] = {}
    for shape, kind in re.findall(rf"= \w+\[([\d,]*)\]\S* ({kinds})\(", compiled.as_text()):
        found.setdefault(kind, []).append(int(np.prod([int(n) for n in shape.split(",") if n])))
    return found


def test_there_are_four() -> None:
    assert jax.device_count() == 4


@pytest.mark.parametrize(
    ("statistics", "max_grad_norm", "way"),
    [("exact", None, "step"), ("exact", 0.5, "update"), ("lagged", None, "update"), ("lagged", 0.5, "step")],
)
def test_sharded_is_whole(statistics: str, max_grad_norm: float | None, way: str) -> None:
    tx, on = optimizer(statistics=statistics, max_grad_norm=max_grad_norm), mesh()
    expected = trajectory(tx, PARAMS, GRADS, way=way)
    found = trajectory(tx, put(PARAMS, on), [put(g, on) for g in GRADS], way=way)
    assert_same(found, expected)
    params, state = found[-1]
    for k in ("w", "square", "conv", "stack", "v"):
        assert params[k].sharding.is_equivalent_to(NamedSharding(on, SPECS[k]), params[k].ndim), k
        own = state.moments[k]
        assert own.sharding.is_equivalent_to(NamedSharding(on, P(None, *SPECS[k])), own.ndim), k


def test_nothing_large_is_gathered() -> None:
    """Two all-reduces of rows, columns and normalisers; a third one for the norm; small parameters are gathered."""
    on = mesh()
    params, grads = put(PARAMS, on), put(GRADS[0], on)
    for options, count in (({}, 2), ({"max_grad_norm": 1.0}, 3), ({"statistics": "lagged"}, 3)):
        tx = optimizer(**options)
        step = jax.jit(lambda p, s, g, tx=tx: tx.step(g, s, p))
        found = collectives(step.lower(params, tx.init(params), grads).compile())
        assert found.keys() <= {"all-reduce", "all-gather"}, found
        assert len(found["all-reduce"]) <= count + 1, found
        assert max(found["all-reduce"]) < 10_000, found
        assert max(found["all-gather"]) <= 64 * 32, found


def test_the_reference_is_partitioned_by_xla() -> None:
    """It gathers rows and columns for the packed state, and nothing of the size of a parameter."""
    on, shapes = mesh(), ("w", "v")
    params, grads = ({k: t[k] for k in shapes} for t in (PARAMS, GRADS[0]))
    cut_params, cut_grads = (put(t, on, SPECS) for t in (params, grads))
    tx = optimizer(backend="reference")
    step = (
        jax.jit(lambda p, s, g: tx.step(g, s, p)).lower(cut_params, tx.init(cut_params), cut_grads).compile()
    )
    assert all(max(found) <= 3 * 512 for found in collectives(step).values()), collectives(step)
    found = [step(cut_params, tx.init(cut_params), cut_grads)]
    assert_same(found, trajectory(optimizer(), params, [grads]), params)
    assert found[0][1].moments["w"].sharding.is_equivalent_to(NamedSharding(on, P(None, "a", "b")), 3)


def test_state_alone_is_sharded() -> None:
    """Parameters and gradients on every device, momentum and second moment cut: they stay so."""
    tx, on = optimizer(), mesh()
    everywhere = {k: P() for k in SHAPES}
    state = tx.init(PARAMS)
    own = {
        k: None if a is None else jax.device_put(a, NamedSharding(on, P(None, *SPECS[k])))
        for k, a in state.moments.items()
    }
    found = trajectory(
        tx, put(PARAMS, on, everywhere), [put(g, on, everywhere) for g in GRADS], state._replace(moments=own)
    )
    assert_same(found, trajectory(tx, PARAMS, GRADS))
    moments = found[-1][1].moments["w"]
    assert moments.sharding.is_equivalent_to(NamedSharding(on, P(None, "a", "b")), moments.ndim)


def test_gradients_lie_otherwise() -> None:
    tx, on = optimizer(), mesh()
    other = SPECS | {"w": P("b", None), "square": P(None, "a"), "v": P(), "stack": P(None, "a", None)}
    found = trajectory(tx, put(PARAMS, on), [put(g, on, other) for g in GRADS])
    assert_same(found, trajectory(tx, PARAMS, GRADS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_types(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        kind = jnp.dtype(dtype)
        params, grads = arrays(0, kind), [arrays(i + 1, kind) for i in range(2)]
        tx, on = optimizer(max_grad_norm=0.5), mesh()
        found = trajectory(tx, put(params, on), [put(g, on) for g in grads])
        expected = trajectory(tx, params, grads)
        for (p, _), (e, _) in zip(found, expected, strict=True):
            for k in SHAPES:
                a, b = np.asarray(p[k], np.float64), np.asarray(e[k], np.float64)
                # bfloat16: another order of sums may round a parameter the other way.
                bound = {"bfloat16": 2.0**-7, "float64": 1e-12}[dtype] * np.abs(b) + 1e-12
                assert np.all(np.abs(a - b) <= bound), k


def test_vectors_alone() -> None:
    """No tensor has rows and columns: there are no sums along them."""
    tx, on = optimizer(), mesh()
    params, grads = {"v": PARAMS["v"]}, [{"v": g["v"]} for g in GRADS]
    cut = {"v": P(("a", "b"))}
    found = trajectory(tx, put(params, on, cut), [put(g, on, cut) for g in grads])
    assert_same(found, trajectory(tx, params, grads), params)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_scan_and_donation(statistics: str) -> None:
    tx, on = optimizer(statistics=statistics), mesh()
    stacked = {k: np.stack([g[k] for g in GRADS]) for k in SHAPES}

    def run(params: Any, state: Any, grads: Any) -> Any:
        def body(carry: Any, g: Any) -> Any:
            return tx.step(g, carry[1], carry[0]), None

        return jax.lax.scan(body, (params, state), grads)[0]

    params = put(PARAMS, on)
    grads = {k: jax.device_put(a, NamedSharding(on, P(None, *SPECS[k]))) for k, a in stacked.items()}
    compiled = jax.jit(run, donate_argnums=(0, 1)).lower(params, tx.init(params), grads).compile()
    found = compiled(params, tx.init(params), grads)
    assert_same([found], [trajectory(tx, PARAMS, GRADS)[-1]])


def test_memory_of_one_device() -> None:
    """A device has its part of a large parameter and its state, and nothing else of that size."""
    on, shape = mesh(), (2048, 1024)
    tx = optimizer()
    params = {"w": jax.device_put(jnp.ones(shape), NamedSharding(on, P("a", "b")))}
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    analysis = step.lower(params, tx.init(params), params).compile().memory_analysis()
    part = 4 * shape[0] * shape[1] // 4
    assert analysis.argument_size_in_bytes < 6.2 * part
    assert analysis.temp_size_in_bytes < 0.5 * part


def test_explicit_sharding() -> None:
    on = mesh(explicit=True)
    tx = optimizer()
    expected = trajectory(tx, PARAMS, GRADS)
    with jax.set_mesh(on):
        params = put(PARAMS, on)
        state = jax.jit(tx.init)(params)
        assert state.moments["w"].sharding.spec == P(None, "a", "b")
        found = trajectory(tx, params, [put(g, on) for g in GRADS], state)
        assert found[-1][1].moments["w"].sharding.spec == P(None, "a", "b")
    assert_same(found, expected)


def test_vmap() -> None:
    """A population of meta-parameters over parameters that are sharded, and over the devices."""
    on = mesh()
    thetas = jax.tree.map(
        lambda *x: jnp.stack([jnp.asarray(a, jnp.float32) for a in x]), THETA, random_theta(Spec(), 1)
    )
    params, grads = ({k: t[k] for k in ("w", "small")} for t in (PARAMS, GRADS[0]))

    def member(theta: Any, p: Any, g: Any) -> Any:
        tx = lopt.learned_optimizer(Spec(), theta=theta, backend="cpu")
        return tx.step(g, tx.init(p), p)[0]

    expected = [member(jax.tree.map(lambda a, i=i: a[i], thetas), params, grads) for i in range(2)]
    cut = {k: SPECS[k] for k in params}
    for by in (thetas, jax.tree.map(lambda a: jax.device_put(a, NamedSharding(on, P("a"))), thetas)):
        many = jax.jit(jax.vmap(member, in_axes=(0, None, None)))(
            by, put(params, on, cut), put(grads, on, cut)
        )
        for i, one in enumerate(expected):
            for k in params:
                np.testing.assert_allclose(many[k][i], one[k], rtol=0, atol=1e-6)


def test_inside_shard_map() -> None:
    """Statistics are those of the shard, as if it were the parameter."""
    tx, on = optimizer(), mesh()
    w, g = PARAMS["w"], GRADS[0]["w"]
    step = jax.shard_map(
        lambda p, g: tx.step(g, tx.init(p), p)[0], mesh=on, in_specs=P("a"), out_specs=P("a")
    )
    found = jax.jit(step)({"w": w}, {"w": g})["w"]
    for rows in (slice(0, 256), slice(256, 512)):
        alone = {"w": w[rows]}
        expected = tx.step({"w": g[rows]}, tx.init(alone), alone)[0]["w"]
        np.testing.assert_allclose(found[rows], expected, rtol=0, atol=1e-7)


def test_wrappers_and_missing_gradients() -> None:
    on = mesh()
    tx = optax.chain(optax.clip_by_global_norm(0.5), optimizer())
    expected = trajectory(tx, PARAMS, GRADS, way="update")[-1][0]
    found = trajectory(tx, put(PARAMS, on), [put(g, on) for g in GRADS], way="update")[-1][0]
    for k in SHAPES:
        np.testing.assert_allclose(found[k], expected[k], rtol=0, atol=1e-6)
    tx = optimizer()
    without = [g | {"w": None} for g in GRADS]
    sharded = [{k: None if a is None else put({k: a}, on)[k] for k, a in g.items()} for g in without]
    found, whole = trajectory(tx, put(PARAMS, on), sharded), trajectory(tx, PARAMS, without)
    assert_same(found, whole)
    assert np.array_equal(found[-1][0]["w"], PARAMS["w"])


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("table", property(lambda leaf: [0, 0, 0, 1]), "the table of parts has the wrong size"),
        (
            "table",
            property(lambda leaf: [2, 0, 1, 1, 64, 32, 64, 32]),
            "table of parts|wrong size|the loops do not",
        ),
        (
            "begin",
            property(lambda leaf: [jnp.int32(10**6)] * max(len(leaf.cut), 1)),
            "does not lie in the whole",
        ),
        ("sums", 3, "wrong size"),
    ],
)
def test_handler_refuses_calls_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, error: str
) -> None:
    jax.clear_caches()
    monkeypatch.setattr(sharded._Local, name, wrong)
    with pytest.raises(Exception, match=f"lopt_fast small_fc_phase: .*({error})"):
        jax.block_until_ready(trajectory(optimizer(), put(PARAMS, mesh()), [put(GRADS[0], mesh())]))
    jax.clear_caches()
