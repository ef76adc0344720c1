"""The operations' custom call for GPUs, without one: JAX's whole path with the emulator in the place of the device.

The handler is registered for the CPU under the name that the CUDA handler has on a GPU, so device addresses are the
processor's. What is compared with are the definitions in float64. tests/gpu/test_jax_operations_gpu.py repeats these
tests on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

import lopt_fast.jax as lopt  # noqa: E402
from lopt_fast import backends  # noqa: E402
from lopt_fast.architectures import ARCHITECTURES, initial_theta  # noqa: E402
from lopt_fast.architectures.celo import Celo  # noqa: E402
from lopt_fast.backends import BackendError  # noqa: E402
from lopt_fast.jax import call, gpu_operations, operations  # noqa: E402
from lopt_fast.jax.gpu_operations import ByPlatform, GpuCalls  # noqa: E402
from lopt_fast.jax.grouped import Grouped  # noqa: E402
from lopt_fast.operations import AdamScalars, ModelTensors, Reference, Result  # noqa: E402
from lopt_fast.operations.adam import ADAM_AVERAGES  # noqa: E402
from lopt_fast.verify import verify  # noqa: E402
from tests import test_jax_operations  # noqa: E402
from tests.helpers import needs_emulator  # noqa: E402
from tests.test_jax_architectures import NAMES, SMALL, arrays, numpy_run, run  # noqa: E402
from tests.test_jax_operations import in_type, step  # noqa: E402
from tests.test_native_operations import (  # noqa: E402
    SPECS,
    assert_close,
    assert_result_close,
    assert_same_bits,
    in_float64,
    random_decays,
    random_scalars,
    random_tensors,
)
from tests.test_verify import public_files  # noqa: E402

pytestmark = needs_emulator

SHAPES: list[tuple[int, ...]] = [(), (1, 6), (37,), (30, 9), (4, 4, 3, 3), (8, 132), (4300,)]

PLATFORM = "cpu"
"""JAX's name of what the calls are registered for; tests/gpu puts "cuda" here."""


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = backends.native().xla_gpu_operation_handlers()["emulator"]
    jax.ffi.register_ffi_target(gpu_operations.TARGET, handler, platform="cpu")
    monkeypatch.setattr(gpu_operations, "refusal", lambda architecture: None)


def problem(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    given, fixed = test_jax_operations.problem(*arguments)
    given["column_mean_square"] = None  # these kernels do not look at it
    return given, fixed


def expected_step(spec: Any, fixed: dict[str, Any], given: dict[str, Any]) -> Any:
    return step(Reference, spec, fixed, in_type(given, "float64"))


@pytest.mark.parametrize("name", ["celo", "velo", "celo2 tanh", "fc_lopt", "rnn_fc_lopt"])
def test_element_mlp(name: str) -> None:
    shapes = [s for s in SHAPES if len(s) <= 2] if name.startswith("celo2") else SHAPES
    for case in range(3):
        given, fixed = problem(SPECS[name], shapes, "float32", case)
        program = jax.jit(partial(step, GpuCalls(), SPECS[name], fixed))
        assert gpu_operations.TARGET in program.lower(given).as_text()
        expected = expected_step(SPECS[name], fixed, given)
        shown = ModelTensors(
            given["params"], [], [], [], [], apply=fixed["apply"] and not fixed["steps_only"]
        )
        found = jax.tree.map(np.asarray, program(given))
        assert_result_close(found, expected, shown, "float32", f"{name} {case}")


def test_what_has_no_kernel_goes_through_the_definition() -> None:
    for name, dtype in (("all", "float32"), ("celo2", "float32"), ("celo", "bfloat16")):
        given, fixed = problem(SPECS[name], [(5,), (2, 3, 2)], dtype)
        lowered = jax.jit(partial(step, GpuCalls(), SPECS[name], fixed)).lower(given)
        assert gpu_operations.TARGET not in lowered.as_text()


def test_nothing_that_is_not_donated_is_overwritten() -> None:
    given, fixed = problem(SPECS["celo"], SHAPES, "float32", 0)
    given = jax.tree.map(jax.numpy.asarray, given)
    before = jax.tree.map(lambda a: np.array(a), given)
    program = jax.jit(partial(step, GpuCalls(), SPECS["celo"], fixed))
    first, second = program(given), program(given)
    assert_same_bits(first, second)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


def test_donated_and_in_a_scan() -> None:
    """A loop carries parameters and states; those that are donated to it are overwritten where they lie."""
    spec = SPECS["celo"]
    given, fixed = problem(spec, [(64, 48), (48,)], "float32", 0)
    expected = given
    for _ in range(3):
        result = expected_step(spec, fixed, expected)
        expected = {**expected, "params": result.outputs, "states": result.states}

    def three(carried: Any, others: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            result = step(GpuCalls(), spec, fixed, {**others, "params": carry[0], "states": carry[1]})
            return (result.outputs, result.states), None

        return jax.lax.scan(body, carried, None, length=3)[0]

    carried = jax.tree.map(jax.numpy.array, (given["params"], given["states"]))
    others = {name: a for name, a in given.items() if name not in ("params", "states")}
    before = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(carried) if a.size]
    found = jax.jit(three, donate_argnums=0)(carried, others)
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(found) if a.size] == before
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves((expected["params"], expected["states"])), strict=True
    ):
        assert_close(a, b, 1e-4)


def test_vmap_is_a_loop() -> None:
    spec = SPECS["rnn_fc_lopt"]
    problems = [problem(spec, SHAPES[:4], "float32", 1, seed) for seed in range(3)]
    program = partial(step, GpuCalls(), spec, problems[0][1])
    stacked = jax.tree.map(lambda *a: np.stack(a), *(given for given, _ in problems))
    found = jax.jit(jax.vmap(program))(stacked)
    for i, (given, fixed) in enumerate(problems):
        one = jax.tree.map(lambda a, i=i: np.asarray(a)[i], found)
        expected = expected_step(spec, fixed, given)
        shown = ModelTensors(given["params"], [], [], [], [], apply=fixed["apply"])
        assert_result_close(one, expected, shown, "float32", f"model {i}")


@pytest.mark.parametrize("apply", [True, False])
def test_adam(apply: bool) -> None:
    tensors = random_tensors(ADAM_AVERAGES, SHAPES, "float32", apply=apply)
    scalars = random_scalars(len(SHAPES))

    def update(params: Any, grads: Any, states: Any) -> Result:
        given = replace(tensors, params=params, grads=grads, states=states)
        return GpuCalls().adam(given, AdamScalars(*scalars), 1.2, statistics=True)

    found = jax.tree.map(np.asarray, jax.jit(update)(tensors.params, tensors.grads, tensors.states))
    expected = Reference.adam(in_float64(tensors), scalars, 1.2, statistics=True)
    assert_result_close(found, expected, tensors, "float32", "adam")
    wanted = expected.statistics
    assert wanted is not None
    for name, a, e in zip(wanted._fields, found.statistics, wanted, strict=True):
        if e is not None:
            assert_close(a, e, 1e-5, name)


@pytest.mark.parametrize("moved", [True, False])
def test_statistics(moved: bool) -> None:
    spec = SPECS["rnn_fc_lopt"]
    tensors = random_tensors(spec, SHAPES, "float32")
    decays = random_decays(spec) if moved else None

    def look(params: Any, grads: Any, states: Any) -> Any:
        given = replace(tensors, params=params, grads=grads, states=states)
        return GpuCalls().statistics(spec, given, decays, 1.2)

    found = jax.jit(look)(tensors.params, tensors.grads, tensors.states)
    expected = Reference.statistics(spec, in_float64(tensors), decays, 1.2)
    for name, a, e in zip(found._fields, found, expected, strict=True):
        if a is not None:
            assert_close(a, e, 1e-5, name)


# ---- architectures ----


@pytest.mark.parametrize("name", NAMES)
def test_architectures_follow_their_definitions(name: str) -> None:
    """Two steps, against the definition in float64. Those that are plain array code are compiled for the device."""
    spec = ARCHITECTURES[name].from_dict(SMALL.get(name, {}))
    rng = np.random.default_rng(0)
    theta = {
        n: (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32)
        for n, a in initial_theta(spec).items()
    }
    options = {"weight_decay": 0.1, "max_grad_norm": 2.0}
    params, *grads = (arrays({"a": (3, 4), "b": (4,), "c": ()}, seed) for seed in range(3))
    backend = "cuda" if spec.has_kernels else "reference"
    tx = lopt.learned_optimizer(spec, 0.5, theta=theta, num_steps=10, backend=backend, **options)
    if spec.has_kernels:
        traced = jax.make_jaxpr(lambda g, s, p: tx.step(g, s, p, value=1.0))(
            grads[0], tx.init(params), params
        )
        assert gpu_operations.TARGET in str(traced)
    found, _ = run(tx, params, grads)
    expected, *_ = numpy_run(spec, theta, params, grads, 0.5, **options)
    for n, p in expected.items():
        moved = np.abs(p - np.asarray(params[n])).max()
        assert moved > 0
        error = np.abs(np.asarray(found[n]) - p).max()
        assert error <= 2e-4 * moved + 1e-6, f"{n}: off by {error:.2e}, moved by {moved:.2e}"


def test_population_of_optimizers_in_a_scan() -> None:
    """As meta-training does it: each of the batched meta-parameters trains as it would alone."""
    spec = ARCHITECTURES["celo"].from_dict(SMALL["celo"])
    thetas = [initial_theta(spec, seed) for seed in range(2)]
    params, grads = arrays({"a": (3, 4), "b": (4,)}), arrays({"a": (3, 4), "b": (4,)}, 1, batch=(3,))

    def unroll(theta: Any) -> Any:
        tx = lopt.learned_optimizer(spec, theta=theta, num_steps=10, backend="cuda")

        def body(carry: Any, g: Any) -> Any:
            return tx.step(g, carry[1], carry[0], value=jax.numpy.float32(1.0)), None

        return jax.lax.scan(body, (params, tx.init(params)), grads)[0][0]

    found = jax.jit(jax.vmap(unroll))(jax.tree.map(lambda *a: np.stack(a), *thetas))
    single = jax.jit(unroll)
    for i, theta in enumerate(thetas):
        for n, p in single(theta).items():
            assert_close(np.asarray(found[n])[i], p, 1e-5, n)


@pytest.mark.parametrize("path", public_files("celo_real_short", "nnadam_decay"))
def test_golden_files(path: Path) -> None:
    check_golden(path)


def check_golden(path: Path) -> None:
    """A published trajectory, in float32."""
    report = verify(path, "jax", "cuda", "float32")
    assert report.backend == "cuda"
    assert report.rows
    assert all(row.passed and row.error <= row.tolerance for row in report.rows), report.rows


# ---- who gets them ----


def test_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    celo = Celo()
    monkeypatch.setattr(gpu_operations, "refusal", lambda architecture: None)
    assert isinstance(operations.implementation(celo, "cuda"), GpuCalls)
    monkeypatch.setattr(call, "known_platforms", lambda: ["cuda", "cpu"])
    chosen = operations.implementation(celo, "auto")
    assert isinstance(chosen, ByPlatform)
    assert set(chosen.kernels) == {"cuda", "cpu"}
    monkeypatch.setattr(gpu_operations, "refusal", lambda architecture: "it is not there")
    with pytest.raises(BackendError, match="'cuda' of celo cannot be used: it is not there"):
        operations.implementation(celo, "cuda")


def test_each_platform_takes_its_own() -> None:
    """Lowered for this platform: the kernels named for it; for others the definitions."""
    given, fixed = problem(SPECS["celo"], [(5,), (3, 4)], "float32", 1)
    by_platform = ByPlatform({PLATFORM: GpuCalls()})
    program = jax.jit(partial(step, by_platform, SPECS["celo"], fixed))
    assert gpu_operations.TARGET in program.lower(given).as_text()
    assert_same_bits(program(given), jax.jit(partial(step, GpuCalls(), SPECS["celo"], fixed))(given))
    elsewhere = jax.jit(partial(step, ByPlatform({"tpu": GpuCalls()}), SPECS["celo"], fixed))
    plain = jax.jit(partial(step, Grouped, SPECS["celo"], fixed))(given)
    for a, b in zip(elsewhere(given).outputs, plain.outputs, strict=True):
        assert_close(a, b, 1e-6)
