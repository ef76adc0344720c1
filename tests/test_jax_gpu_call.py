"""The custom call for GPUs, without one: JAX's whole path with the emulator in the place of the device.

The handler is registered for the CPU under the name that the CUDA handler has on a GPU, so device addresses are the
processor's. tests/gpu/test_jax_gpu.py repeats these tests on a GPU.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
import test_jax  # noqa: E402
from jax.sharding import Mesh, PartitionSpec  # noqa: E402
from test_jax import (  # noqa: E402, F401  (these run here again, through the emulator)
    THETA,
    arrays,
    assert_close,
    assert_equal,
    assert_follows,
    make_theta,
    numpy_steps,
    optimizer,
    pick,
    run_steps,
    test_chain,
    test_donation_updates_in_place,
    test_eager_jit_and_fused_agree,
    test_kernel_follows_the_reference,
    test_large_tensors_have_their_own_state,
    test_missing_gradients_leave_parameter_and_state,
    test_nested_vmap_in_scan,
    test_not_finite_gradients_behave_as_in_the_reference,
    test_one_compilation,
    test_reference_backend_has_the_same_state,
    test_scan,
    test_schedule,
    test_vmap_is_a_loop,
    test_vmapped_step_is_one_call,
    test_without_donation_nothing_is_overwritten,
)
from test_jax_golden import FILES, check, needs_golden  # noqa: E402

from lopt_fast import backends  # noqa: E402
from lopt_fast.backends import BackendError, BackendWarning, native  # noqa: E402
from lopt_fast.jax import call, custom_call, sharded, transformation  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402

pytestmark = pytest.mark.skipif(
    backends.choose(Spec(), "cpu", "float32", "auto") != "cpu", reason="the compiled core is missing"
)


@cache
def register():
    handler = native().xla_handlers()["emulator"]
    jax.ffi.register_ffi_target(call.TARGETS["cuda"], handler, platform="cpu")
    handler = native().xla_phase_handlers()["emulator"]
    jax.ffi.register_ffi_target(call.PHASE_TARGETS["cuda"], handler, platform="cpu")


def redirected(resolve):
    """`resolve` for which the CPU kernel, where it was asked for, is the GPU's custom call."""
    register()

    def choose(spec, dtypes, backend, state_dtype=None):
        if backend not in ("cpu", "cuda"):
            return resolve(spec, dtypes, backend, state_dtype)
        resolve(spec, ["float32" if d in ("bfloat16", "float16") else d for d in dtypes], "cpu")
        return call.Choice(("cuda",), False)

    return choose


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    """Whoever asks for the CPU kernel gets the GPU's custom call, which computes in the emulator."""
    monkeypatch.setattr(transformation, "resolve", redirected(transformation.resolve))
    jax.clear_caches()  # of programs with the CPU kernel
    yield
    jax.clear_caches()


def test_the_emulator_is_used():
    params, tx = arrays(), optimizer(backend="cpu")
    text = jax.jit(lambda p: tx.step(p, tx.init(p), p)).lower(params).as_text()
    assert "@lopt_fast_small_fc_step_gpu" in text
    assert "@lopt_fast_small_fc_step(" not in text


@pytest.mark.parametrize(
    "spec",
    [Spec(hidden_size=h, hidden_layers=k) for h in (2, 8, 16, 32, 64) for k in (1, 2)]
    + [Spec(hidden_size=7), Spec(scale="parameter_rms")],
    ids=str,
)
def test_specifications(spec):
    theta, params, grads = make_theta(spec), arrays(), [arrays(seed=t + 1) for t in range(2)]
    found, _ = run_steps(optimizer(spec, theta, learning_rate=30.0, backend="cuda"), params, grads)
    assert_follows(found, numpy_steps(params, grads, spec, theta, lr=30.0), params)


@needs_golden
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_golden(file):
    check(file, "cpu", "float32")


def test_scalars_in_float64():
    """With x64 the scalars are float64 while the parameters may be float32."""
    params, grads = arrays(), [arrays(seed=t + 1) for t in range(2)]
    with jax.enable_x64(True):
        options = {"learning_rate": 0.3, "weight_decay": 0.1, "max_grad_norm": 0.5}
        found, _ = run_steps(optimizer(**options, backend="cuda"), params, grads)
        expected = numpy_steps(params, grads, lr=0.3, weight_decay=0.1, max_grad_norm=0.5)
        assert_follows(found, expected, params)


def test_two_devices_run_at_once(monkeypatch):
    """Inside shard_map, in another process: scratch memory varies over the mesh as everything else."""
    script = """
    import sys
    sys.path.insert(0, {tests!r})
    from lopt_fast.jax import transformation
    from test_jax_gpu_call import redirected
    transformation.resolve = redirected(transformation.resolve)
"""
    monkeypatch.setattr(test_jax, "SHARDED", script + test_jax.SHARDED)
    test_jax.test_two_devices()


def test_vmapped_clipping_is_for_each_member():
    shapes, n = {"w": (6, 9), "b": (9,)}, 3
    params, grads = arrays(shapes, batch=(n,)), arrays(shapes, 1, batch=(n,))
    bounds = jnp.asarray([0.1, 1.0, 1e6])

    def step(bound, p, g):
        tx = optimizer(max_grad_norm=bound, backend="cuda")
        return tx.step(g, tx.init(p), p)

    found = jax.jit(jax.vmap(step))(bounds, params, grads)
    single = jax.jit(step)
    for i in range(n):
        assert_equal(pick(found, i), single(bounds[i], pick(params, i), pick(grads, i)))
    assert_equal(pick(found, 2), jax.jit(partial(step, jnp.float32(1e9)))(pick(params, 2), pick(grads, 2)))


def test_scratch_of_a_batch_is_enough():
    """What one member needs, times the members, is what the call brings under vmap."""
    shapes = {"w": (70, 90), "b": (3,), "conv": (3, 3, 20, 30), "long": (5000,)}
    for n in (1, 2, 17):
        params = arrays(shapes, batch=(n,))
        tx = optimizer(backend="cuda", max_grad_norm=1.0)
        out, _ = jax.jit(jax.vmap(lambda p, tx=tx: tx.step(p, tx.init(p), p)))(params)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(out))


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_phases_on_one_device(monkeypatch, statistics):
    """What each of several devices runs for sharded parameters, on one that holds all; jax_gpu_on_four_devices.py has
    the rest."""
    mesh = Mesh(jax.devices()[:1], ("a",))
    used = []

    def step_on(platform, step, operands):
        used.append(platform)
        leaves = step.layout.leaves
        cuts = [(("a",) if leaf.own is not None else (), *((),) * (len(leaf.shape) - 1)) for leaf in leaves]
        program = partial(sharded._on_device, platform, step, mesh, cuts)
        return jax.shard_map(
            program, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )(operands)

    spec = Spec().with_statistics(statistics)
    shapes = {"w": (300, 301), "conv": (3, 90, 5, 60), "long": (70_000,), "b": (9,), "small": (6, 4, 5)}
    params, grads = arrays(shapes), [arrays(shapes, seed=t + 1) for t in range(3)]
    options = {"learning_rate": 0.3, "weight_decay": 0.1, "max_grad_norm": 0.5, "backend": "cuda"}
    expected, wanted = run_steps(optimizer(spec, **options), params, grads)
    monkeypatch.setattr(call, "step_on", step_on)
    jax.clear_caches()
    found, state = run_steps(optimizer(spec, **options), params, grads)
    assert set(used) == {"cuda"}
    assert_follows(found, [{n: np.asarray(a, np.float64) for n, a in p.items()} for p in expected], params)
    assert_close(state, wanted, rtol=1e-4)


def test_state_that_is_not_aliased_is_copied(monkeypatch):
    params, grads = arrays({"w": (300, 301), "b": (9,)}), arrays({"w": (300, 301), "b": (9,)}, 1)
    expected = run_steps(optimizer(backend="cuda"), params, [grads, grads])
    plain = jax.ffi.ffi_call
    monkeypatch.setattr(jax.ffi, "ffi_call", lambda *a, input_output_aliases, **options: plain(*a, **options))
    jax.clear_caches()
    assert_equal(run_steps(optimizer(backend="cuda"), params, [grads, grads]), expected)


def test_too_little_scratch_is_an_error(monkeypatch):
    core = native()
    short = SimpleNamespace(
        **{n: getattr(core, n) for n in dir(core)} | {"xla_gpu_scratch_bytes": lambda **_: 8}
    )
    monkeypatch.setattr(custom_call, "native", lambda: short)
    params, tx = {"w": jnp.ones((3, 5))}, optimizer(backend="cuda")
    with pytest.raises(Exception, match="lopt_fast small_fc_step: too little scratch memory"):
        jax.block_until_ready(jax.jit(lambda p: tx.update(p, tx.init(p), p))(params))


def test_other_operands_are_an_error(monkeypatch):
    monkeypatch.setattr(custom_call, "_FORMAT", 99)
    params, tx = {"w": jnp.ones((3, 5))}, optimizer(backend="cuda")
    with pytest.raises(Exception, match="lopt_fast small_fc_step: this call was written for another version"):
        jax.block_until_ready(jax.jit(lambda p: tx.update(p, tx.init(p), p))(params))


# ---- Which backend is chosen ----


@pytest.fixture
def with_gpu(monkeypatch):
    """As in a process with a GPU, as far as a program can be lowered: resolve() is the real one."""
    monkeypatch.undo()
    jax.clear_caches()
    real = backends.refusal

    def refusal(backend, spec, device, dtype):
        if backend == "cuda":
            return "it takes float32, not float64" if dtype == "float64" else None
        return real(backend, spec, device, dtype)

    monkeypatch.setattr(call, "known_platforms", lambda: ["cuda", "cpu"])
    monkeypatch.setattr(call, "refusal", refusal)
    failure = call.registration_failure
    monkeypatch.setattr(call, "registration_failure", lambda name: None if name == "cuda" else failure(name))


def lowered(tx, params, platform):
    step = jax.jit(lambda p: tx.step(p, tx.init(p), p))
    return step.trace(params).lower(lowering_platforms=(platform,)).as_text()


def test_each_platform_takes_its_kernel(with_gpu):
    tx, params = optimizer(), {"w": jnp.ones((3, 2))}
    on_gpu, on_cpu, on_tpu = (lowered(tx, params, platform) for platform in ("cuda", "cpu", "tpu"))
    assert "@lopt_fast_small_fc_step_gpu(" in on_gpu
    assert "@lopt_fast_small_fc_step(" in on_cpu
    assert "lopt_fast_small_fc_step_gpu" not in on_cpu
    assert "custom_call" not in on_tpu
    assert "exponential" in on_tpu


def test_float64_on_a_gpu_takes_the_reference(with_gpu):
    with jax.enable_x64(True):
        params = {"w": jnp.ones((3, 2), jnp.float64), "b": jnp.ones(3, jnp.float32)}
        tx = optimizer()
        assert "lopt_fast_small_fc_step" not in lowered(tx, params, "cuda")
        assert "@lopt_fast_small_fc_step(" in lowered(tx, params, "cpu")
        forced = optimizer(backend="cuda")
        with pytest.raises(BackendError, match="float64"):
            forced.step(params, forced.init(params), params)


def test_backend_by_name(with_gpu):
    params = {"w": jnp.ones((3, 2))}
    assert "@lopt_fast_small_fc_step_gpu(" in lowered(optimizer(backend="cuda"), params, "cuda")
    assert "@lopt_fast_small_fc_step(" in lowered(optimizer(backend="cpu"), params, "cpu")
    assert "custom_call" not in lowered(optimizer(backend="reference"), params, "cuda")
    triton = optimizer(backend="triton")
    with pytest.raises(BackendError, match="triton"):
        triton.step(params, triton.init(params), params)


def test_gpu_without_a_kernel_warns_once(with_gpu, monkeypatch):
    """A GPU on which only Triton can run: nothing for JAX."""
    monkeypatch.setattr(call, "refusal", lambda *_: "no CUDA module for the test")
    call.warn_once.cache_clear()
    with pytest.warns(BackendWarning, match="no CUDA module for the test"):
        text = lowered(optimizer(), {"w": jnp.ones((3, 2))}, "cuda")
    assert "lopt_fast_small_fc_step" not in text


def test_without_a_gpu_the_backend_explains(monkeypatch):
    monkeypatch.undo()
    params, tx = {"w": jnp.ones((3, 2))}, optimizer(backend="cuda")
    with pytest.raises(BackendError, match="cuda"):
        tx.step(params, tx.init(params), params)


# ---- What the handler tells XLA ----


class Extension(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("type", ctypes.c_int32), ("next", ctypes.c_void_p))


class Metadata(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("version_size", ctypes.c_size_t),
        ("version_extensions", ctypes.c_void_p),
        ("major", ctypes.c_int32),
        ("minor", ctypes.c_int32),
        ("traits", ctypes.c_uint32),
    )


class MetadataExtension(ctypes.Structure):
    _fields_ = (("base", Extension), ("metadata", ctypes.POINTER(Metadata)))


def traits_of(capsule):
    """Of the handler in a capsule: asked as XLA asks, with a call frame that has the metadata extension alone."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    metadata = Metadata(minor=-1, traits=99)
    extension = MetadataExtension(
        Extension(ctypes.sizeof(MetadataExtension), 1, None), ctypes.pointer(metadata)
    )
    frame = (ctypes.c_size_t * 64)()
    frame[1] = ctypes.addressof(extension)
    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address(capsule, b"xla._CUSTOM_CALL_TARGET"))
    assert handler(ctypes.addressof(frame)) is None
    assert metadata.minor >= 1
    return metadata.traits


def test_traits():
    """1: may be captured into a command buffer."""
    for handlers in (native().xla_handlers(), native().xla_phase_handlers()):
        assert {name: traits_of(handler) for name, handler in handlers.items()} == {
            "cpu": 0,
            "cuda": 1,
            "emulator": 0,
        }
