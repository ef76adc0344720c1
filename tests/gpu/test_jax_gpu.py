"""The JAX optimizer on a GPU, through the CUDA custom call: the tests of the CPU kernel again, and what a GPU adds."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from test_jax import (  # noqa: E402, F401  (these run here again, on the GPU)
    arrays,
    assert_close,
    assert_equal,
    assert_follows,
    make_theta,
    numpy_steps,
    optimizer,
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
from test_jax_golden import FILES, needs_golden  # noqa: E402
from test_jax_gpu_call import (  # noqa: E402, F401
    test_phases_on_one_device,
    test_scalars_in_float64,
    test_scratch_of_a_batch_is_enough,
    test_specifications,
    test_state_that_is_not_aliased_is_copied,
    test_vmapped_clipping_is_for_each_member,
)
from test_jax_storage import (  # noqa: E402, F401
    options,
    test_mixed_tree_follows_the_reference,
    test_mixed_types_are_updated_in_place,
    test_mixed_types_in_scan_and_without_jit,
    test_mixed_types_under_vmap,
    test_second_moment_does_not_stand_still,
    test_state_in_bfloat16,
)

from lopt_fast.backends import BackendWarning  # noqa: E402
from lopt_fast.jax import call, transformation  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402
from lopt_fast.verify import verify  # noqa: E402

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def on_the_gpu(jax_on_the_device, monkeypatch):
    """Whoever asks for the CPU kernel gets the CUDA kernel."""
    resolve = transformation.resolve

    def redirected(spec, dtypes, backend, state_dtype=None):
        return resolve(spec, dtypes, "cuda" if backend == "cpu" else backend, state_dtype)

    monkeypatch.setattr(transformation, "resolve", redirected)
    jax.clear_caches()  # of programs with the CPU kernel
    with jax.default_matmul_precision("highest"):  # of the reference: else tf32
        yield
    jax.clear_caches()


@pytest.fixture
def kernel():
    """Of test_jax_storage.py: the backend with kernels, which takes state in bfloat16."""
    return "cuda"


@pytest.fixture
def emulator(kernel):
    return kernel


def test_the_custom_call_is_accepted_and_chosen():
    assert call.registration_failure("cuda") is None
    params, tx = arrays(), optimizer()
    text = jax.jit(lambda p: tx.step(p, tx.init(p), p)).lower(params).as_text()
    assert "@lopt_fast_small_fc_step_gpu(" in text


@needs_golden
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_golden(file):
    report = verify(file, "jax", "cuda", "float32")
    assert report.rows
    for row in report.rows:
        assert row.passed, row
        assert row.error <= row.tolerance, row


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_the_same_bits_every_time(statistics):
    shapes = {"w": (1000, 777), "conv": (3, 3, 64, 130), "b": (4099,), "small": (5, 7)}
    params, grads = arrays(shapes), [arrays(shapes, seed=t + 1) for t in range(3)]
    tx = optimizer(backend="cuda", statistics=statistics, max_grad_norm=1.0)
    first = run_steps(tx, params, grads)
    for _ in range(3):
        assert_equal(run_steps(tx, params, grads), first)


def test_as_on_the_cpu():
    """The same program on both devices of one process."""
    shapes = {"w": (300, 301), "b": (300,)}
    params, grads, tx = arrays(shapes), arrays(shapes, 1), optimizer()
    cpu = jax.devices("cpu")[0]
    step = jax.jit(lambda g, p: tx.step(g, tx.init(p), p))
    on_gpu, _ = step(grads, params)
    on_cpu, _ = step(*jax.device_put((grads, params), cpu))
    assert jax.tree.leaves(on_cpu)[0].devices() == {cpu}
    assert_follows([jax.device_get(on_gpu)], numpy_steps(params, [grads]), params)
    assert_follows([jax.device_get(on_cpu)], numpy_steps(params, [grads]), params)


def test_float64_takes_the_reference_with_a_warning():
    spec = Spec(hidden_size=5)
    tx = optimizer(spec, make_theta(spec))
    call.warn_once.cache_clear()
    with jax.enable_x64(True):
        params = arrays({"w": (6, 5)}, dtype=jnp.float64)
        state = tx.init(params)
        with pytest.warns(BackendWarning, match="float64"):
            found, _ = tx.step(params, state, params)
    assert np.isfinite(found["w"]).all()


COMMAND_BUFFERS = """
    import sys
    sys.path.insert(0, {tests!r})
    import jax, jax.numpy as jnp, numpy as np
    import lopt_fast.jax as lopt
    from test_jax import arrays, optimizer
    shapes = {{"w": (300, 400), "b": (9,), "v": (64, 100)}}
    tx = {make}

    @jax.jit
    def unroll(params, grads):
        def body(carry, g):
            params, state = carry
            return tx.step(jax.tree.map(lambda a: a * 1.5, g), state, params), None
        return jax.lax.scan(body, (params, tx.init(params)), grads)[0]

    for _ in range(3):  # a command buffer is recorded when a program runs again
        params, state = unroll(arrays(shapes), arrays(shapes, 1, batch=(6,)))
    np.savez({file!r}, *jax.tree.leaves((params, state)))
"""


MADE = {
    "exact": 'optimizer(backend="cuda", max_grad_norm=1.0, statistics="exact")',
    "lagged": 'optimizer(backend="cuda", max_grad_norm=1.0, statistics="lagged")',
    # Without matrix products outside of the kernel, for which XLA may choose another program each time.
    "fc_lopt": 'lopt.learned_optimizer("fc_lopt", backend="cuda")',
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_command_buffers(tmp_path, make):
    """Captured into CUDA graphs by XLA, the custom call gives the same bits as without."""
    results = []
    for i, flags in enumerate(
        [
            "--xla_gpu_enable_command_buffer=",
            "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL,WHILE --xla_gpu_graph_min_graph_size=1",
        ]
    ):
        file = tmp_path / f"{i}.npz"
        code = textwrap.dedent(COMMAND_BUFFERS).format(tests=str(TESTS), file=str(file), make=make)
        environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if "nknown flag" in done.stderr:
            pytest.skip(f"this version of XLA has no such flags: {flags}")
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(np.load(file))
    first, second = results
    assert first.files
    for name in first.files:
        np.testing.assert_array_equal(first[name], second[name])


def test_population_of_tasks():
    """A truncation of meta-training on the GPU: finite, and theta moves."""
    from lopt_fast.meta.throughput import noise_loop

    loop, state = noise_loop(4, 5, jax.devices()[:1])
    before = np.asarray(state.theta)
    after, metrics = loop.step(state, loop.data)
    assert np.isfinite(metrics.tasks[0].loss).all()
    assert np.isfinite(after.theta).all()
    assert np.abs(np.asarray(after.theta) - before).max() > 0
