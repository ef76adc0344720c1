"""The operations as XLA custom calls: the bits of the CPU kernels under every transformation, and who gets them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("lopt_fast._native")
import jax.numpy as jnp  # noqa: E402

import lopt_fast.jax as lopt  # noqa: E402
from lopt_fast.architectures import ARCHITECTURES, Architecture, initial_theta  # noqa: E402
from lopt_fast.architectures.adafactor import Adafactor  # noqa: E402
from lopt_fast.architectures.celo import Celo  # noqa: E402
from lopt_fast.architectures.celo2 import Celo2  # noqa: E402
from lopt_fast.architectures.sgdm import SgdM  # noqa: E402
from lopt_fast.backends import BackendError, BackendWarning, native  # noqa: E402
from lopt_fast.jax import call, gpu_operations, operations  # noqa: E402
from lopt_fast.jax.grouped import Grouped  # noqa: E402
from lopt_fast.jax.operations import CustomCalls, implementation  # noqa: E402
from lopt_fast.operations import AdamScalars, Decays, ElementMlp, ModelTensors, Weights  # noqa: E402
from lopt_fast.operations.adam import ADAM_AVERAGES  # noqa: E402
from lopt_fast.spec import Averages  # noqa: E402
from tests.test_jax_architectures import SMALL, arrays, numpy_run, run  # noqa: E402
from tests.test_native_operations import (  # noqa: E402
    SHAPES,
    SPECS,
    assert_same_bits,
    assert_same_statistics,
    kernels,
    random_decays,
    random_scalars,
    random_tensors,
    random_weights,
)

CALLS = CustomCalls()


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    assert operations.registration_failure() is None


def in_type(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


def problem(
    spec: ElementMlp, shapes: Any, dtype: str, case: int = 0, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays that a program is given, what is fixed) for `step`; nothing but numbers differs between seeds."""
    tensors = random_tensors(spec, shapes, dtype, seed=seed)
    rng = np.random.default_rng(seed)
    own = [(True, True), (False, True), (False, False)][case]
    given = {
        "params": tensors.params,
        "grads": tensors.grads,
        "states": tensors.states,
        "lr": list(rng.uniform(0.5, 1.5, len(shapes))),
        "weight_decay": list(rng.uniform(0.0, 0.1, len(shapes))),
        "grad_scale": rng.uniform(0.5, 0.9),
        "decays": Decays(*(r * rng.uniform(0.5, 1.0) for r in random_decays(spec))),
        "weights": random_weights(spec, len(shapes), own, seed),
        "multiplier": rng.uniform(0.5, 1.5, len(shapes)) if case else None,
        "gradient_clip": rng.uniform(1.0, 2.0) if case else None,
        "column_mean_square": None,
    }
    if case == 1 and spec.normalise_over == "tensor":
        given["column_mean_square"] = rng.uniform(0.5, 1.5, (len(shapes), spec.layer_sizes[0][0]))
    return in_type(given, dtype), {"apply": case != 1, "steps_only": case == 2}


def step(implementation: Any, spec: ElementMlp, fixed: dict[str, Any], given: dict[str, Any]) -> Any:
    fields = ("params", "grads", "states", "lr", "weight_decay", "grad_scale")
    tensors = ModelTensors(**{name: given[name] for name in fields}, apply=fixed["apply"])
    return implementation.element_mlp(
        spec, tensors, given["decays"], Weights(*given["weights"]), given["multiplier"], given["gradient_clip"],
        fixed["steps_only"], given["column_mean_square"],
    )  # fmt: skip


def pick(tree: Any, *index: int) -> Any:
    return jax.tree.map(lambda x: np.asarray(np.asarray(x)[index]), tree)


# ---- the bits of the kernels ----


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SPECS)
def test_element_mlp(name: str, dtype: str) -> None:
    case = list(SPECS).index(name) % 3
    given, fixed = problem(SPECS[name], SHAPES, dtype, case)
    expected = step(kernels(), SPECS[name], fixed, given)
    with jax.enable_x64(dtype == "float64"):
        found = jax.jit(partial(step, CALLS, SPECS[name], fixed))(given)
    assert_same_bits(found, expected)
    if expected.messages is not None:
        assert found.messages.dtype == dtype


def test_both_types_at_once() -> None:
    spec = SPECS["celo"]
    given, fixed = problem(spec, [(5, 6), (7,), (5, 6)], "float64", 1)
    for name in ("params", "grads", "states"):
        given[name][0] = in_type(given[name][0], "float32")
    with jax.enable_x64(True):
        found = jax.jit(partial(step, CALLS, spec, fixed))(given)
    assert_same_bits(found, step(kernels(), spec, fixed, given))
    assert [a.dtype.name for a in found.outputs] == ["float32", "float64", "float64"]


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("apply", [True, False])
def test_adam(apply: bool, statistics: bool) -> None:
    tensors = random_tensors(ADAM_AVERAGES, SHAPES, "float32")
    scalars = in_type(random_scalars(len(SHAPES)), "float32")
    lr = in_type(tensors.lr, "float32")

    def update(calls: Any, params: Any, grads: Any, states: Any, lr: Any, scalars: Any) -> Any:
        given = replace(tensors, params=params, grads=grads, states=states, lr=lr, apply=apply)
        given = replace(given, weight_decay=[np.float32(0.1)] * len(lr), grad_scale=np.float32(0.7))
        return calls.adam(given, AdamScalars(*scalars), np.float32(1.2), statistics=statistics)

    arguments = tensors.params, tensors.grads, tensors.states, lr, scalars
    found, expected = jax.jit(partial(update, CALLS))(*arguments), update(kernels(), *arguments)
    assert_same_bits(found, expected)
    if not statistics:
        assert found.statistics is None
        return
    assert_same_statistics(found.statistics, expected.statistics)
    batched = jax.jit(jax.vmap(partial(update, CALLS), in_axes=(None, 0, None, None, None)))
    found = batched(tensors.params, [np.stack([2 * g, g]) for g in tensors.grads], *arguments[2:])
    assert_same_statistics(pick(found.statistics, 1), expected.statistics)


@pytest.mark.parametrize("name", ["rnn_fc_lopt", "velo", "averages alone"])
@pytest.mark.parametrize("moment", ["before", "after", "no decays"])
def test_statistics(name: str, moment: str) -> None:
    """With mean squares of columns, but for the last of each."""
    spec = SPECS.get(name, Averages(5, 5))
    tensors = random_tensors(spec, SHAPES, "float32")
    decays = in_type(random_decays(spec), "float32") if moment != "no decays" else None

    def seen(calls: Any, params: Any, grads: Any, states: Any, decays: Any, bound: Any) -> Any:
        given = replace(tensors, params=params, grads=grads, states=states, grad_scale=np.float32(0.7))
        return calls.statistics(spec, given, decays, bound, before=moment == "before")

    grads = [np.stack([g, 2 * g, -g]) for g in tensors.grads]
    bounds = np.float32([0.5, 1.0, 2.0])
    batched = jax.vmap(partial(seen, CALLS), in_axes=(None, 0, None, None, 0))
    found = jax.jit(batched)(tensors.params, grads, tensors.states, decays, bounds)
    columns = name != "averages alone" and moment != "no decays"
    assert (found.column_mean_square is not None) == columns
    for i in range(3):
        mine = [np.asarray(g[i]) for g in grads]
        expected = seen(kernels(), tensors.params, mine, tensors.states, decays, bounds[i])
        assert_same_statistics(pick(found, i), expected)


# ---- JAX's transformations ----

HARD: list[tuple[int, ...]] = [(), (5, 1), (10, 10), (3, 3, 4, 6), (37,)]
LARGE: list[tuple[int, ...]] = [(300, 401), (90_001,), (6, 7)]
"""Cut into several tasks."""


@pytest.mark.parametrize(
    ("name", "case", "shapes"), [("velo", 0, HARD), ("rnn_fc_lopt", 1, HARD), ("celo", 2, LARGE)]
)
def test_nested_vmap_over_everything(name: str, case: int, shapes: Any) -> None:
    """One call, in which each model has the bits that it has alone: weights, decays, rates and bounds are its own."""
    spec, (n, m) = SPECS[name], (2, 3)
    _, fixed = problem(spec, shapes, "float32", case)
    models = [[problem(spec, shapes, "float32", case, seed=m * i + j)[0] for j in range(m)] for i in range(n)]
    stacked = jax.tree.map(lambda *x: np.stack(x).reshape(n, m, *np.shape(x[0])), *chain(*models))
    both = jax.jit(jax.vmap(jax.vmap(partial(step, CALLS, spec, fixed))))
    assert both.lower(stacked).as_text().count("stablehlo.custom_call") == 1
    found = both(stacked)
    for i in range(n):
        for j in range(m):
            assert_same_bits(pick(found, i, j), step(kernels(), spec, fixed, models[i][j]))


@pytest.mark.parametrize("over", ["weights", "params", "gradient_clip"])
def test_vmap_over_some(over: str) -> None:
    spec = SPECS["celo"]
    given, fixed = problem(spec, HARD, "float32", 1)
    members = [
        jax.tree.map(lambda x, k=k: np.asarray(x * np.float32(1 + k / 4)), given[over]) for k in range(3)
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *members)
    vmapped = jax.vmap(lambda x: step(CALLS, spec, fixed, {**given, over: x}))
    found = jax.jit(vmapped)(stacked)
    for k, member in enumerate(members):
        assert_same_bits(pick(found, k), step(kernels(), spec, fixed, {**given, over: member}))


def test_donated_and_in_a_scan() -> None:
    """Parameters and states are overwritten where they lie, and a loop carries them without a copy."""
    spec = SPECS["celo"]
    given, fixed = problem(spec, [(64, 48), (48,)], "float32", 0)
    expected = given
    for _ in range(3):
        result = step(kernels(), spec, fixed, expected)
        expected = {**expected, "params": result.outputs, "states": result.states}

    def three(carried: Any, fixed_arrays: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            result = step(CALLS, spec, fixed, {**fixed_arrays, "params": carry[0], "states": carry[1]})
            return (result.outputs, result.states), None

        return jax.lax.scan(body, carried, None, length=3)[0]

    carried = jax.tree.map(jnp.array, (given["params"], given["states"]))
    others = {name: a for name, a in given.items() if name not in ("params", "states")}
    program = jax.jit(three, donate_argnums=0).lower(carried, others).compile()
    assert " copy(f32[64,48]" not in program.as_text()
    before = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(carried) if a.size]
    params, states = program(carried, others)
    assert_same_bits(SimpleNamespace(outputs=params, states=states, messages=None),
                     SimpleNamespace(outputs=expected["params"], states=expected["states"], messages=None))  # fmt: skip
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves((params, states)) if a.size] == before


# ---- architectures ----


@pytest.mark.parametrize("name", ["celo", "velo", "rnn_fc_lopt", "fc_lopt", "nn_adam", "adamw"])
def test_architectures_follow_their_definitions(name: str) -> None:
    spec = ARCHITECTURES[name].from_dict(SMALL.get(name, {}))
    theta = initial_theta(spec)
    options = {"weight_decay": 0.1, "max_grad_norm": 2.0}
    shapes = {"a": (3, 4), "b": (4,), "c": ()}
    with jax.enable_x64(True):
        params, *grads = (arrays(shapes, seed, jnp.float64) for seed in range(3))
        tx = lopt.learned_optimizer(spec, 0.5, theta=theta, num_steps=10, backend="cpu", **options)
        found, state = run(tx, params, grads)
        expected, rows, _ = numpy_run(spec, theta, params, grads, 0.5, **options)
    for n, p in expected.items():
        moved = np.abs(p - np.asarray(params[n])).max()
        assert moved > 0
        assert np.abs(np.asarray(found[n]) - p).max() <= 1e-9 * moved, n
    for n, a in rows.items():
        np.testing.assert_allclose(state.rows[n], a, rtol=1e-9, atol=1e-12)


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np
    from functools import partial
    from jax.sharding import PartitionSpec as P
    from lopt_fast.jax.operations import CustomCalls, registration_failure
    from tests.test_jax_operations import SPECS, pick, problem, step
    assert registration_failure() is None
    spec = SPECS["rnn_fc_lopt"]
    given, fixed = problem(spec, [(5, 6), (7,)], "float32")

    def member(calls, carried, weights, scale):
        params, states = carried
        def body(carry, _):
            now = {**given, "params": carry[0], "states": carry[1], "weights": weights, "grad_scale": scale}
            seen = statistics(calls, now)
            now["multiplier"] = seen.parameter_variance
            now["column_mean_square"] = seen.column_mean_square
            result = step(calls, spec, fixed, now)
            return (result.outputs, result.states), result.messages
        return jax.lax.scan(body, carried, None, length=2)

    def statistics(calls, now):
        from lopt_fast.operations import ModelTensors
        tensors = ModelTensors(now["params"], now["grads"], now["states"], now["lr"], now["weight_decay"])
        return calls.statistics(spec, tensors, now["decays"])

    def population(calls):
        def run(weights, scales):
            carried = jax.lax.pcast((given["params"], given["states"]), "x", to="varying")
            return jax.vmap(partial(member, calls, carried))(weights, scales)
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x")))

    scales = jnp.arange(1.0, 5.0)
    weights = jax.tree.map(lambda a: jnp.stack([a * s for s in scales]), given["weights"])
    found = jax.tree.map(np.asarray, population(CustomCalls())(weights, scales))
    alone = jax.jit(partial(member, CustomCalls(), (given["params"], given["states"])))
    for i in range(4):
        one = alone(jax.tree.map(lambda a: a[i], weights), scales[i])
        jax.tree.map(np.testing.assert_array_equal, pick(found, i), one)

    # Where the program may be lowered for another platform as well, that gets the definitions.
    both = population(CustomCalls(elsewhere=True))
    traced = both.trace(weights, scales)
    assert "lopt_fast_element_mlp" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "lopt_fast" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    jax.tree.map(np.testing.assert_array_equal, both(weights, scales), found)
    print("finished")
"""


def test_sharded_and_for_two_platforms() -> None:
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
    root = Path(__file__).resolve().parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "finished" in result.stdout


# ---- who gets them ----


@pytest.fixture
def _fresh() -> Any:
    call.warn_once.cache_clear()
    operations.registration_failure.cache_clear()
    yield
    operations.registration_failure.cache_clear()


def test_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    call.warn_once.cache_clear()
    celo = Celo()
    assert implementation(celo, "cpu") == CustomCalls()
    assert implementation(celo, "reference") is Grouped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation(celo, "auto") == CustomCalls()
    with pytest.raises(BackendError, match=r"'triton' of celo.*JAX has no kernels for triton"):
        implementation(celo, "triton")
    monkeypatch.setattr(gpu_operations, "refusal", lambda architecture: "there is no GPU")
    with pytest.raises(BackendError, match=r"'cuda' of celo.*there is no GPU"):
        implementation(celo, "cuda")
    with pytest.raises(BackendError, match="'gpu': must be one of auto"):
        implementation(celo, "gpu")
    monkeypatch.setattr(call, "known_platforms", lambda: ["cuda", "cpu"])
    with pytest.warns(BackendWarning, match="celo on cuda uses the reference.*there is no GPU"):
        assert implementation(celo, "auto") == CustomCalls(elsewhere=True)
    assert implementation(celo, "cpu") == CustomCalls()
    monkeypatch.setattr(call, "known_platforms", lambda: ["tpu"])
    with pytest.warns(BackendWarning, match="on tpu"):
        assert implementation(celo, "auto") is Grouped


@pytest.mark.usefixtures("_fresh")
def test_core_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "native", SimpleNamespace)
    with pytest.raises(BackendError, match="older than these custom calls: reinstall"):
        implementation(Celo(), "cpu")
    with pytest.warns(BackendWarning, match="older than these custom calls"):
        assert implementation(Celo(), "auto") is Grouped


@pytest.mark.parametrize(
    "architecture", [SgdM(), Adafactor(), Celo2(bias_correction=True)], ids=lambda a: a.NAME
)
def test_array_code_has_no_backend_with_kernels(architecture: Architecture) -> None:
    """The same answer as in PyTorch."""
    for backend in ("cpu", "cuda"):
        message = f"backend='{backend}' of {architecture.NAME} cannot be used: .* is plain array code"
        with pytest.raises(BackendError, match=message):
            implementation(architecture, backend)
    call.warn_once.cache_clear()
    with pytest.warns(
        BackendWarning, match=f"{architecture.NAME} on cpu uses the reference.*plain array code"
    ):
        assert implementation(architecture, "auto") is Grouped
    assert implementation(architecture, "reference") is Grouped


def test_specification_without_a_kernel() -> None:
    """`auto` computes what it can with the kernels."""
    call.warn_once.cache_clear()
    spec = SPECS["celo"]
    wide = replace(spec, hidden_size=300)
    architecture: Any = SimpleNamespace(NAME="wide", mlp=wide, has_kernels=True)
    with pytest.raises(BackendError, match="hidden_size 1 to 256, not 300"):
        implementation(architecture, "cpu")
    with pytest.warns(BackendWarning, match="hidden_size 1 to 256"):
        assert implementation(architecture, "auto") is Grouped
    given, fixed = problem(wide, [(3,)], "float32")
    program = jax.jit(partial(step, CALLS, wide, fixed)).lower(given)
    assert "lopt_fast_element_mlp" not in program.as_text()


def test_call_that_does_not_fit() -> None:
    spec = SPECS["celo"]
    given, fixed = problem(spec, [(3, 4)], "float32")
    short = given["states"][0]._replace(factored_row=given["states"][0].factored_row[:, :2])
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="lopt_fast element_mlp: an operand has the wrong size"
    ):
        jax.block_until_ready(step(CALLS, spec, fixed, {**given, "states": [short]}))
    assert set(native().xla_operation_handlers()) == {"element_mlp", "adam", "statistics"}
