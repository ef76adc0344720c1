"""The tensor-core variant of the network (kernels/small_fc_lopt/mma.h), instruction by instruction on the processor."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import RELATIVE

from lopt_fast import backends

native = backends._import_native()[0]
pytestmark = pytest.mark.skipif(native is None, reason=f"no compiled kernels: {backends._import_native()[1]}")

WIDTHS = (2, 4, 8, 16, 32, 64)
BFLOAT16 = pytest.mark.parametrize("bfloat16", [False, True], ids=["split", "bfloat16"])
NETWORKS = [(h, layers, features) for h in WIDTHS for layers in (1, 2) for features in (16, 22)]


class Network(NamedTuple):
    """A folded network: weights [inputs, units], `w_out` [units, 2]."""

    w0: np.ndarray
    w1: np.ndarray
    b1: np.ndarray
    w_out: np.ndarray
    b_out: np.ndarray
    layers: int


def random_network(hidden: int, layers: int, features: int, seed: int = 0) -> Network:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    return Network(
        w0=normal(features, hidden),
        w1=normal(hidden, hidden),
        b1=0.3 * normal(hidden),
        w_out=normal(hidden, 2),
        b_out=normal(2),
        layers=layers,
    )


def random_inputs(hidden: int, features: int, count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Features of all magnitudes, (features, count), and pre-activations without them, (count, hidden)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((features, count)) * np.exp(1.5 * rng.standard_normal((features, count)))
    return x.astype(np.float32), rng.standard_normal((count, hidden)).astype(np.float32)


def kernel(network: Network, x: np.ndarray, start: np.ndarray, bfloat16: bool) -> np.ndarray:
    """(2, count) direction and exponent of the kernel."""
    features, hidden = network.w0.shape
    w0 = np.zeros((22, hidden), np.float32)
    w0[:features] = network.w0
    # As struct Folded of kernels/small_fc_lopt/gpu.h has it.
    parts = (w0, np.full(hidden, np.nan), network.w1.T, network.b1, network.w_out.T, network.b_out)
    folded = np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)
    x, start = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(start, np.float32)
    out = np.full((2, x.shape[1]), np.nan, np.float32)
    native.gpu_test_matmul(
        hidden_size=hidden, bfloat16=bfloat16, factored=features == 16, layers=network.layers, count=x.shape[1],
        folded=folded.ctypes.data, features=x.ctypes.data, start=start.ctypes.data, out=out.ctypes.data,
    )  # fmt: skip
    return out


def exact(network: Network, x: np.ndarray, start: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
    """(2, count) in plain NumPy; ReLU keeps NaN."""
    w = Network(*(np.asarray(a, dtype) for a in network[:-1]), network.layers)

    def relu(a: np.ndarray) -> np.ndarray:
        return np.where(a < 0, dtype(0), a)

    with np.errstate(invalid="ignore", over="ignore"):
        h = relu(start.astype(dtype) + x.T.astype(dtype) @ w.w0)
        if w.layers == 2:
            h = relu(h @ w.w1 + w.b1)
        return (h @ w.w_out + w.b_out).T


def magnitude(network: Network, x: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(2, count): the same network of absolute values, to which the error is proportional."""
    absolute = Network(*(np.abs(a) for a in network[:-1]), network.layers)
    return exact(absolute, np.abs(x), np.abs(start))


@BFLOAT16
@pytest.mark.parametrize(("hidden", "layers", "features"), NETWORKS)
def test_error_bound(hidden: int, layers: int, features: int, bfloat16: bool) -> None:
    """The bounds that mma.h states, for every element and both outputs."""
    network = random_network(hidden, layers, features)
    x, start = random_inputs(hidden, features, count=161)
    error = np.abs(kernel(network, x, start, bfloat16) - exact(network, x, start))
    bound = layers * native.gpu_test_matmul_errors[bfloat16] * magnitude(network, x, start)
    assert (error <= bound).all(), f"{np.max(error / bound)} of the bound"
    assert not bfloat16 or (error > 1e-3 * bound).any(), (
        "more accurate than bfloat16 can be: not what was meant"
    )


@pytest.mark.parametrize(("hidden", "layers", "features"), NETWORKS)
def test_split_products_keep_the_float32_bound(hidden: int, layers: int, features: int) -> None:
    """A tenth of the project's bound on an update, so that there is room for everything else."""
    network = random_network(hidden, layers, features, seed=2)
    x, start = random_inputs(hidden, features, count=333, seed=3)
    direction, exponent = kernel(network, x, start, bfloat16=False).astype(np.float64)
    expected, expected_exponent = exact(network, x, start)
    update, expected_update = (
        direction * np.exp2(1e-3 * exponent),
        expected * np.exp2(1e-3 * expected_exponent),
    )
    error = np.abs(update - expected_update).max() / np.abs(expected_update).max()
    assert error <= 0.1 * RELATIVE["float32"]


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("count", [1, 31, 32, 33])
def test_every_element_has_its_own_slot(hidden: int, count: int) -> None:
    """One element differs: no other result may change, and its own must."""
    network = random_network(hidden, 2, 16)
    x, start = random_inputs(hidden, 16, count)
    x, start = 0.03 * x, start + 4  # most units are alive
    before = kernel(network, x, start, bfloat16=False)
    for element in {0, count // 2, count - 1}:
        changed = x.copy()
        changed[:, element] += 1
        different = (kernel(network, changed, start, bfloat16=False) != before).any(axis=0)
        assert different[element]
        assert different.sum() == 1


@pytest.mark.parametrize(("hidden", "features"), [(2, 16), (8, 22), (32, 22), (64, 16)])
def test_every_weight_counts(hidden: int, features: int) -> None:
    """One weight at a time set to 1, all others 0: which input reaches which unit, without any rounding."""
    x = np.arange(1, features * 32 + 1, dtype=np.float32).reshape(features, 32) % 128
    start = np.zeros((32, hidden), np.float32)
    rng = np.random.default_rng(0)
    for _ in range(40):
        feature, unit, other = rng.integers(features), rng.integers(hidden), rng.integers(hidden)
        network = Network(*(np.zeros_like(a) for a in random_network(hidden, 2, features)[:-1]), layers=2)
        network.w0[feature, unit] = network.w1[unit, other] = 1
        network.w_out[other] = (1, 2)
        for bfloat16 in (False, True):
            out = kernel(network, x, start, bfloat16)
            np.testing.assert_array_equal(out, [x[feature], 2 * x[feature]])


@BFLOAT16
@pytest.mark.parametrize("hidden", [4, 32])
@pytest.mark.parametrize("layers", [1, 2])
def test_nan_and_infinity_as_in_float32(hidden: int, layers: int, bfloat16: bool) -> None:
    network = random_network(hidden, layers, 16)
    x, start = random_inputs(hidden, 16, 96)
    rng = np.random.default_rng(5)
    for value in (np.nan, np.inf, -np.inf):
        for element in rng.integers(0, 96, 8):
            x[rng.integers(16), element] = value
    start[95, hidden - 1] = np.nan
    start[94, 0] = np.inf
    out, expected = kernel(network, x, start, bfloat16), exact(network, x, start, np.float32)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(out), np.isinf(expected))
    np.testing.assert_array_equal(np.sign(out[np.isinf(out)]), np.sign(expected[np.isinf(expected)]))
    assert np.isnan(expected).any()
    assert np.isfinite(expected).any()


@BFLOAT16
def test_largest_and_smallest_numbers(bfloat16: bool) -> None:
    """Neither splitting nor rounding overflows or loses a number that float32 has."""
    network = Network(*(np.zeros_like(a) for a in random_network(2, 1, 16)[:-1]), layers=1)
    network.w0[0, 0] = network.w_out[0, 0] = 1
    values = np.float32([0, 1e-32, 1e-20, 1, 1e30, 3.38e38])
    x = np.zeros((16, values.size), np.float32)
    x[0] = values
    out = kernel(network, x, np.zeros((values.size, 2), np.float32), bfloat16)[0]
    np.testing.assert_allclose(out, values, rtol=2.0**-8 if bfloat16 else 2.0**-19)


def test_unknown_width() -> None:
    with pytest.raises(ValueError, match="hidden_size 12"):
        native.gpu_test_matmul(
            hidden_size=12,
            bfloat16=False,
            factored=True,
            layers=1,
            count=0,
            folded=0,
            features=0,
            start=0,
            out=0,
        )
