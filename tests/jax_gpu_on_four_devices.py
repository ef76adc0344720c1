"""Tests of jax_on_four_devices.py, and others, with the GPU's custom calls, which compute in the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jax_on_four_devices
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax_on_four_devices import (  # noqa: F401  (tests run here again)
    GRADS,
    PARAMS,
    SPECS,
    assert_same,
    mesh,
    optimizer,
    put,
    test_inside_shard_map,
    test_memory_of_one_device,
    test_nothing_large_is_gathered,
    test_there_are_four,
    test_vectors_alone,
    trajectory,
)
from test_jax_gpu_call import redirected

from lopt_fast.jax import sharded, transformation


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever asks for the CPU kernels gets the GPU's, as if the four devices were GPUs."""
    monkeypatch.setattr(transformation, "resolve", redirected(transformation.resolve))
    monkeypatch.setattr(sharded, "device_count", lambda platform: jax.device_count())
    jax.clear_caches()  # of programs with the CPU kernels
    yield
    jax.clear_caches()


@pytest.mark.parametrize(("statistics", "way"), [("exact", "update"), ("lagged", "step")])
def test_sharded_is_whole(statistics: str, way: str) -> None:
    jax_on_four_devices.test_sharded_is_whole(statistics, 0.5, way)


def test_bfloat16() -> None:
    jax_on_four_devices.test_other_types("bfloat16")


def test_the_emulator_is_used() -> None:
    tx, on = optimizer(), mesh()
    params = put(PARAMS, on)
    step = jax.jit(lambda p, s, g: tx.step(g, s, p))
    text = step.lower(params, tx.init(params), params).compile().as_text()
    assert text.count('custom_call_target="lopt_fast_small_fc_phase_gpu"') == 3
    assert 'custom_call_target="lopt_fast_small_fc_step' not in text
    assert 'custom_call_target="lopt_fast_small_fc_phase"' not in text


def test_scalars_in_float64() -> None:
    """With x64 learning rate and bound are float64, the sums float32."""
    with jax.enable_x64(True):
        tx, on = optimizer(max_grad_norm=0.5), mesh()
        params, cut = {k: PARAMS[k] for k in ("v", "small")}, {"v": P("b"), "small": P("a")}
        grads = [{k: g[k] for k in params} for g in GRADS]
        found = trajectory(tx, put(params, on, cut), [put(g, on, cut) for g in grads])
        assert_same(found, trajectory(tx, params, grads), params)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_state_in_bfloat16(statistics: str) -> None:
    """Momenta of parts are rounded at random, with other bits than those of the whole."""
    tx, on = optimizer(statistics=statistics, backend="cuda", state_dtype=jnp.bfloat16), mesh()
    keys = ("w", "v")
    params, grads = {k: PARAMS[k] for k in keys}, [{k: g[k] for k in keys} for g in GRADS]
    cut = {k: SPECS[k] for k in keys}
    found = trajectory(tx, put(params, on, cut), [put(g, on, cut) for g in grads])
    expected = trajectory(tx, params, grads)
    own = found[-1][1].moments["w"]
    assert own.dtype == jnp.bfloat16
    assert own.sharding.is_equivalent_to(NamedSharding(on, P(None, "a", "b")), own.ndim)
    for k in keys:
        step = np.abs(np.asarray(expected[-1][0][k]) - params[k]).max()
        assert np.abs(np.asarray(found[-1][0][k]) - np.asarray(expected[-1][0][k])).max() <= 0.02 * step, k
