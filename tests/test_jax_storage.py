"""bfloat16 and float16 in JAX: parameters and gradients on every backend, momentum and second moment on GPUs.

Through the CPU kernels, and through the GPU's custom call with the emulator in the place of the device. What the
kernels compute is compared with the reference in float64 on the same rounded numbers, step by step.
tests/gpu/test_jax_gpu.py repeats these tests on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import gpu_on_cpu, needs_emulator

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from test_jax import (  # noqa: E402
    SPEC,
    THETA,
    assert_equal,
    check_in_place,
    make_theta,
    optimizer,
    pick,
    run_steps,
)
from test_jax_gpu_call import redirected  # noqa: E402

import lopt_fast.jax as lopt  # noqa: E402
from lopt_fast import reference  # noqa: E402
from lopt_fast.backends import BackendError  # noqa: E402
from lopt_fast.checkpoint import Checkpoint  # noqa: E402
from lopt_fast.jax import transformation  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402

TYPES = {
    "matrix": ((6, 9), "bfloat16"),
    "bias": ((9,), "float16"),
    "scalar": ((), "bfloat16"),
    "conv": ((2, 3, 4, 5), "float16"),
    "single": ((5, 8), "float32"),
    "empty": ((0, 4), "bfloat16"),
    "large": ((257, 256), "bfloat16"),
    "long": ((66_000,), "float16"),
}
"""Shape and dtype: all of them in one tree."""
SMALL = {n: t for n, t in TYPES.items() if n in ("matrix", "bias", "scalar", "single")}

needs_kernel = needs_emulator  # it lies in the compiled core


def mixed(types=TYPES, seed=0, batch=(), scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(scale * rng.standard_normal((*batch, *s)), d) for n, (s, d) in types.items()}


@pytest.fixture
def emulator(monkeypatch):
    """Who asks for a kernel gets the GPU's custom call, which computes in the emulator."""
    monkeypatch.setattr(transformation, "resolve", redirected(transformation.resolve))
    jax.clear_caches()
    yield "cuda"
    jax.clear_caches()


@pytest.fixture(params=["cpu", "emulator"])
def kernel(request):
    """Name of a backend with kernels."""
    return "cpu" if request.param == "cpu" else request.getfixturevalue("emulator")


def wide(tree):
    return {n: np.asarray(a, np.float64) for n, a in tree.items()}


class Oracle:
    """The reference in float64, each step from the parameters that were found."""

    def __init__(self, params, spec=SPEC, theta=THETA, **options):
        self.spec, self.options = spec, options
        self.theta = wide(theta)
        self.states = {n: reference.init_state(spec, a) for n, a in wide(params).items()}

    def deltas(self, params, grads, t):
        options = dict(self.options)
        bound = options.pop("max_grad_norm", None)
        if bound is not None:
            norm = np.sqrt(sum((g * g).sum() for g in wide(grads).values()))
            options["grad_scale"] = min(1.0, bound / (norm + 1e-6))
        found = {}
        for n, p in wide(params).items():
            found[n], self.states[n] = reference.update(
                self.spec, self.theta, p, wide(grads)[n], self.states[n], t, **options
            )
        return found


def assert_rounded(found, exact, delta, name, loose=0.0):
    """`found` is `exact` rounded once, but for the error that the float32 kernels may make (DESIGN.md section 6)."""
    eps = float(jnp.finfo(found.dtype).eps)
    single = 4 * np.finfo(np.float32).eps
    error = np.abs(np.asarray(found, np.float64) - exact)
    smallest = float(jnp.finfo(found.dtype).smallest_subnormal)
    bound = (eps / 2 + single) * np.abs(exact) + smallest
    if delta.size:
        bound = bound + single * np.abs(exact).max() + (1e-4 + loose) * np.abs(delta).max()
        assert np.abs(delta).max() > 0
    assert (error <= bound).all(), f"{name}: {(error - bound).max()}"


def follow(tx, oracle, params, steps=2, fused=True, loose=0.0):
    """The state after these steps, each compared with the oracle's."""
    state = tx.init(params)
    step = jax.jit(tx.step if fused else tx.update)
    for t in range(steps):
        grads = mixed({n: (p.shape, p.dtype) for n, p in params.items()}, seed=t + 1, scale=4.0**-t)
        deltas = oracle.deltas(params, grads, t)
        found, state = step(grads, state, params)
        for n, p in params.items():
            assert found[n].dtype == p.dtype
            assert found[n].shape == p.shape
            exact = np.asarray(p, np.float64) + deltas[n] if fused else deltas[n]
            assert_rounded(found[n], exact, deltas[n], f"{n}, step {t}", loose)
        params = found if fused else optax.apply_updates(params, found)
    assert state.count == steps
    return state


OPTIONS = {
    "plain": {},
    "decay_rate_and_clipping": {"learning_rate": 0.5, "weight_decay": 0.125, "max_grad_norm": 2.0},
    "lagged": {"statistics": "lagged"},
}


def oracle_of(params, options):
    given = {"lr" if k == "learning_rate" else k: v for k, v in options.items() if k != "statistics"}
    return Oracle(params, SPEC.with_statistics(options.get("statistics")), **given)


@needs_kernel
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("fused", [True, False], ids=["step", "update"])
def test_mixed_tree_follows_the_reference(kernel, options, fused):
    params = mixed()
    state = follow(optimizer(**options, backend=kernel), oracle_of(params, options), params, fused=fused)
    assert {n: a.dtype.name for n, a in state.packed.items()} == {"float32": "float32"}
    assert {n: a.dtype.name for n, a in state.moments.items() if a is not None} == {
        "large": "float32",
        "long": "float32",
    }


@pytest.mark.parametrize(("name", "fused"), [("matrix", True), ("bias", False)])
def test_through_the_reference(name, fused):
    spec = Spec(hidden_size=16, step_mult=0.01, exp_mult=0.1)  # from 9 on XLA compiles it faster
    theta, params = make_theta(spec), mixed({name: SMALL[name]})
    options = {"weight_decay": 0.125, "max_grad_norm": 2.0}
    tx = optimizer(spec, theta, **options, backend="reference")
    state = follow(tx, Oracle(params, spec, theta, **options), params, fused=fused)
    assert list(state.packed) == ["float32"]


@needs_kernel
def test_beside_float64():
    """GPU kernels do not take float64."""
    options = {"max_grad_norm": 2.0}
    with jax.enable_x64(True):
        params = mixed({**SMALL, "double": ((4, 6), "float64")})
        state = follow(optimizer(**options, backend="cpu"), oracle_of(params, options), params)
    assert sorted(state.packed) == ["float32", "float64"]


# ---- JAX's transformations ----


STATE_TYPES = [None, jnp.bfloat16]


@pytest.fixture(params=STATE_TYPES, ids=["float32 state", "bfloat16 state"])
def options(request, kernel):
    if kernel == "cpu" and request.param is not None:
        pytest.skip("state in bfloat16 is for GPUs alone")
    return {"backend": kernel, "state_dtype": request.param, "weight_decay": 0.125}


@needs_kernel
def test_mixed_types_in_scan_and_without_jit(options):
    params, grads, tx = mixed(SMALL), [mixed(SMALL, seed=t + 1) for t in range(3)], optimizer(**options)

    @jax.jit
    def unroll(params, grads):
        def body(carry, g):
            params, state = tx.step(g, carry[1], carry[0])
            return (params, state), params

        return jax.lax.scan(body, (params, tx.init(params)), grads)

    (_, state), history = unroll(params, jax.tree.map(lambda *x: jnp.stack(x), *grads))
    expected, expected_state = run_steps(tx, params, grads)
    assert_equal(jax.tree.map(lambda *x: jnp.stack(x), *expected), history)
    assert_equal(state, expected_state)
    assert_equal(run_steps(tx, params, grads, jit=False), (expected, expected_state))


@needs_kernel
def test_mixed_types_under_vmap(options):
    n = 3
    params, grads = mixed(SMALL, batch=(n,)), [mixed(SMALL, seed=t + 1, batch=(n,)) for t in range(2)]

    def two_steps(lr, params, first, second):
        tx = optimizer(learning_rate=lr, max_grad_norm=2.0, **options)
        params, state = tx.step(first, tx.init(params), params)
        return tx.step(second, state, params)

    rates = jnp.asarray([1.0, 0.5, 0.25])
    found = jax.jit(jax.vmap(two_steps))(rates, params, *grads)
    for i in range(n):
        assert_equal(pick(found, i), jax.jit(two_steps)(rates[i], *(pick(x, i) for x in (params, *grads))))


@needs_kernel
@pytest.mark.parametrize("fused", [True, False], ids=["step", "update"])
def test_mixed_types_are_updated_in_place(options, fused):
    types = {n: TYPES[n] for n in ("matrix", "large", "long", "single")}
    params, grads, tx = mixed(types), mixed(types, seed=1), optimizer(**options)
    expected, _ = run_steps(tx, params, [grads, grads], fused=fused)
    check_in_place(tx, params, grads, expected, fused, assert_equal)


# ---- state in bfloat16 ----


@needs_kernel
def test_state_in_bfloat16(emulator):
    """Of parameters of every type; sums stay in float32."""
    params = mixed()
    tx = optimizer(backend=emulator, state_dtype=jnp.bfloat16)
    assert jax.tree.map(lambda a: a.dtype.name, tx.init(params).packed) == {
        "bfloat16": "bfloat16",
        "float32": "float32",
    }
    state = follow(tx, Oracle(params), params, loose=0.05)
    assert {n: (a.shape, a.dtype.name) for n, a in state.moments.items() if a is not None} == {
        "large": ((4, 257, 256), "bfloat16"),
        "long": ((4, 66_000), "bfloat16"),  # and its factored accumulator in state.packed["float32"]
    }
    small = sum(int(np.prod(s)) for n, (s, _) in TYPES.items() if n not in ("large", "long"))
    assert 4 * small <= state.packed["bfloat16"].size <= 4 * small + 16 * len(TYPES)


@needs_kernel
def test_second_moment_does_not_stand_still(emulator):
    """It moves by less than half of bfloat16's last bit, and would stay at 1 if it were rounded to the nearest."""
    params, tx = (
        {"w": jnp.ones((64, 64))},
        optimizer(backend=emulator, state_dtype="bfloat16", learning_rate=0.0),
    )
    state = tx.init(params)
    flat = state.packed["bfloat16"].at[3 * 4096 :].set(1.0)  # momenta lie before it
    state = state._replace(packed={**state.packed, "bfloat16": flat})
    step = jax.jit(tx.step)
    for _ in range(20):
        _, state = step({"w": jnp.zeros((64, 64))}, state, params)
    rate = float(reference.decay_complements(np, SPEC, THETA)[1][0])
    mean = float(jnp.mean(state.packed["bfloat16"][3 * 4096 :].astype("float32")))
    assert 0 < rate < 2**-9
    assert abs(mean - (1 - rate) ** 20) <= 0.1 * (1 - (1 - rate) ** 20)


def test_state_dtype_errors():
    params = {"layer": {"w": jnp.ones((3, 2), "bfloat16")}}
    for wrong in (jnp.float16, "int8", "narrow", 8.5):
        with pytest.raises(ValueError, match=r"state_dtype=.*must be jnp\.float32, jnp\.bfloat16 or None"):
            optimizer(state_dtype=wrong)
    for backend in ("cpu", "reference"):
        tx = optimizer(state_dtype=jnp.bfloat16, backend=backend)
        with pytest.raises(BackendError, match=f"state_dtype='bfloat16'.*'{backend}' keeps it in float32"):
            tx.update(params, tx.init(params), params)
    if jax.default_backend() == "cpu":
        tx = optimizer(state_dtype=jnp.bfloat16)
        with pytest.raises(BackendError, match="state_dtype='bfloat16' needs the CUDA kernels: "):
            tx.update(params, tx.init(params), params)
    with pytest.raises(BackendError, match="state_dtype='bfloat16': adamw keeps its state in float32"):
        lopt.learned_optimizer("adamw", state_dtype=jnp.bfloat16)
    for other in (None, jnp.bfloat16):
        mine, theirs = optimizer(state_dtype=other), optimizer(state_dtype=None if other else jnp.bfloat16)
        state = theirs.init(params)
        with pytest.raises(ValueError, match=r"state\.packed has .*`init` of the same optimizer"):
            mine.update(params, state, params)
    with jax.enable_x64(True):
        double = {"layer": {"w": jnp.ones(3, "float64")}}
        for dtype in (jnp.float32, jnp.bfloat16):
            with pytest.raises(
                BackendError, match=r"params\['layer'\]\['w'\] is float64.*leave out state_dtype"
            ):
                optimizer(state_dtype=dtype).init(double)


# ---- PyTorch ----


@needs_kernel
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_same_bits_as_pytorch_on_a_gpu(emulator, tmp_path, state_dtype):
    assert_as_pytorch(tmp_path, emulator, "emulator", state_dtype)


@needs_kernel
def test_same_bits_as_pytorch_on_the_cpu(tmp_path):
    assert_as_pytorch(tmp_path, "cpu", "cpu", None)


def assert_as_pytorch(tmp_path: Path, backend: str, theirs: str, state_dtype: str | None) -> None:
    """The kernels are the same, the numbers of the step are exact in float32: so are the results."""
    torch = pytest.importorskip("torch")
    from lopt_fast.torch import LearnedOptimizer

    path = Checkpoint(SPEC, THETA).save(tmp_path / "weights.safetensors")
    types = {n: t for n, t in TYPES.items() if n != "empty"}
    params, grads = mixed(types), [mixed(types, seed=t + 1) for t in range(3)]
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(p, np.float32)).to(getattr(torch, p.dtype.name)))
               for p in params.values()]  # fmt: skip
    tx = lopt.learned_optimizer(path, 0.5, 0.125, backend=backend, state_dtype=state_dtype)
    found, _ = run_steps(tx, params, grads)
    with gpu_on_cpu("emulator") if theirs == "emulator" else nullcontext():
        wanted = None if state_dtype is None else getattr(torch, state_dtype)
        other = LearnedOptimizer(tensors, path, 0.5, 0.125, backend=theirs, state_dtype=wanted)
        assert set(other.backends.values()) == {theirs}
        for mine, gradient in zip(found, grads, strict=True):
            for p, g in zip(tensors, gradient.values(), strict=True):
                p.grad = torch.tensor(np.asarray(g, np.float32)).to(p.dtype)
            other.step()
            for n, p in zip(types, tensors, strict=True):
                np.testing.assert_array_equal(np.asarray(mine[n], np.float32), p.detach().float().numpy(), n)


# ---- other architectures ----


@pytest.mark.parametrize("name", ["adamw", "sgdm", "adafactor"])
def test_other_architectures_round_the_result_in_float32(name):
    """Their array code and kernels see float32 alone."""
    params, grads = mixed(SMALL), mixed(SMALL, seed=1)
    single = partial(jax.tree.map, lambda a: a.astype("float32"))
    tx = lopt.learned_optimizer(name, 0.5, 0.125, max_grad_norm=2.0, backend="auto")
    step = jax.jit(lambda p, s, g: tx.step(g, s, p))
    state = single_state = tx.init(params)
    assert all(a.dtype in (jnp.float32, jnp.int32) for a in jax.tree.leaves(state))
    for _ in range(2):
        found, state = step(params, state, grads)
        expected, single_state = step(single(params), single_state, single(grads))
        assert_equal(found, {n: a.astype(params[n].dtype) for n, a in expected.items()})
        assert_equal(state, single_state)
        params = found
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert {n: u.dtype for n, u in updates.items()} == {n: p.dtype for n, p in params.items()}
