"""Pass 3 with the network on tensor cores, emulated on the processor: kernels/small_fc_lopt/gpu_matmul.h."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import random_theta
from test_gpu_core import Case, Device, _native, equal, from_bits, normal

from lopt_fast import reference
from lopt_fast.spec import Spec

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (5, 1), (1, 7), (1, 1), (0, 4), (300,), (9, 130), (33, 65), (3, 5, 7), (8, 4, 3, 3), (2, 3, 2, 3, 2),
]  # fmt: skip
LARGE: list[tuple[int, ...]] = [*SHAPES, (64, 96), (3, 3, 4, 8), (2, 900)]
STATISTICS: list[Any] = ["exact", "lagged"]


@pytest.fixture(autouse=True)
def _emulator() -> Any:
    old = _native.set_emulator()
    yield
    _native.set_emulator(**old)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("schedule", ["single_launch", "phased"])
def test_hard_shapes(schedule: str, statistics: Any) -> None:
    case = Case(Spec(statistics=statistics), LARGE)
    for _ in range(3):
        case.step(variant="matmul", schedule=schedule, weight_decay=0.1)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("width", [2, 3, 8, 16, 32, 64])
def test_widths(width: int, layers: int, statistics: Any) -> None:
    """Widths below 8 are filled up with units that are zero."""
    spec = Spec(hidden_size=width, hidden_layers=layers, statistics=statistics)
    case = Case(spec, [(), (5, 1), (1, 7), (33,), (9, 33), (3, 5, 7), (8, 4, 3, 3)])
    for _ in range(2):
        case.step(variant="matmul")


@pytest.mark.parametrize("statistics", STATISTICS)
def test_several_tiles(statistics: Any) -> None:
    case = Case(Spec(statistics=statistics), [(130, 70), (3, 5000), (5000, 3), (9001,), (40, 31, 10)])
    for _ in range(2):
        case.step(variant="matmul", max_grad_norm=0.5)


def absolute_bound(spec: Spec, theta: Any, shape: tuple[int, ...], delta: np.ndarray) -> float:
    """What bfloat16 products may do to an update: 2^-7 per layer (mma.h) of terms twice as large."""
    return 2 * spec.hidden_layers * 1.01 * 2.0**-7 * float(np.abs(delta).max())


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("width", [4, 8, 16, 32, 64])
def test_bfloat16(width: int, layers: int, statistics: Any) -> None:
    """State as with any variant, updates near the exact ones but not as near as float32 would be."""
    spec = Spec(hidden_size=width, hidden_layers=layers, statistics=statistics)
    theta = random_theta(spec)
    shapes = [(9, 33), (130,), (3, 5, 7), (8, 4, 3, 3)]
    device, plain = (Device(spec, theta, [normal(s, i) for i, s in enumerate(shapes)]) for _ in "ab")
    exact = [reference.init_state(spec, np.zeros(s)) for s in shapes]
    worst = 0.0
    for t in range(2):
        grads = [normal(s, 100 * t + i) for i, s in enumerate(shapes)]
        before = [p.astype(np.float64) for p in device.values()]
        device.step(grads, variant="matmul_bfloat16")
        for i, g in enumerate(grads):
            delta, exact[i] = reference.update(spec, theta, before[i], g.astype(np.float64), exact[i], t)
            error = np.abs(device.values()[i] - before[i] - delta).max()
            assert error <= absolute_bound(spec, theta, shapes[i], delta), (shapes[i], t, error)
            worst = max(worst, float(error / np.abs(delta).max()))
        if t == 0:
            plain.step(grads)
            for i in range(len(shapes)):
                for name, value in device.state(i).items():
                    np.testing.assert_allclose(value, plain.state(i)[name], rtol=1e-5, atol=1e-7)
    assert worst > 1e-4, "more accurate than bfloat16 can be: not what was meant"


@pytest.mark.parametrize("variant", ["matmul", "matmul_bfloat16"])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_the_same_bits_in_any_order(statistics: Any, variant: str) -> None:
    shapes = [(70, 90), (5001,), (3, 700), *SHAPES]
    spec = Spec(statistics=statistics)
    results = []
    for multiprocessors, seed, schedule in [
        (8, 0, "phased"),
        (1, 0, "single_launch"),
        (16, 5, "single_launch"),
    ]:
        _native.set_emulator(multiprocessors=multiprocessors, seed=seed)
        device = Device(spec, random_theta(spec), [normal(s, i) for i, s in enumerate(shapes)])
        for t in range(2):
            grads = [normal(s, 100 * t + i) for i, s in enumerate(shapes)]
            device.step(grads, variant=variant, schedule=schedule)
        results.append(device.bits())
    assert all(np.isfinite(from_bits(a, "float32")).all() for a in results[0])
    for other in results[1:]:
        equal(results[0], other)


@pytest.mark.parametrize("variant", ["matmul", "matmul_bfloat16"])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("shape", [(37,), (9, 33), (8, 4, 3, 3)])
def test_nan(shape: tuple[int, ...], statistics: Any, variant: str) -> None:
    """NaN where the element-wise network has it, in its own tensor alone."""
    spec = Spec(statistics=statistics)
    found = []
    for chosen in ("elementwise", variant):
        device = Device(spec, random_theta(spec), [normal(shape), normal((6, 5))])
        for t in range(2):
            g = normal(shape, t + 1)
            if t == 1:
                g.flat[5] = np.nan
            device.step([g, normal((6, 5), t)], variant=chosen)
        found.append([np.isnan(p) for p in device.values()])
    assert found[0][0].flat[5]
    assert not found[1][1].any()
    for expected, actual in zip(*found, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("parameter", ["float32", "bfloat16", "float16"])
def test_storage_types(parameter: str, state: str) -> None:
    """State bit for bit that of the element-wise variant, which rounds it in the same way."""
    spec = Spec()
    shapes = [(9, 33), (12, 16), (37,)]
    found = []
    for variant in ("elementwise", "matmul"):
        device = Device(
            spec, random_theta(spec), [normal(s, i) for i, s in enumerate(shapes)],
            parameter=parameter, gradient=parameter, state=state,
        )  # fmt: skip
        device.step([normal(s, 100 + i) for i, s in enumerate(shapes)], variant=variant)
        found.append(device)
    for i in range(len(shapes)):
        for key in ("momentum", "second_moment"):
            equal([found[0].states[i][key]], [found[1].states[i][key]])
        a, b = (d.values()[i].astype(np.float64) for d in found)
        eps = {"float32": 1e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}[parameter]
        assert (np.abs(a - b) <= eps * np.abs(a) + 1e-4).all()


@pytest.mark.parametrize(("capability", "width"), [(75, 16), (86, 64), (120, 64)])
def test_without_tensor_cores(capability: int, width: int) -> None:
    """Refused where there are none, or too little shared memory, before anything is written."""
    _native.set_emulator(compute_capability=capability)
    spec = Spec(hidden_size=width)
    device = Device(spec, random_theta(spec), [normal((9, 33))])
    before = device.bits()
    for variant in ("matmul", "matmul_bfloat16"):
        with pytest.raises(ValueError, match="compute capability"):
            device.step([normal((9, 33), 1)], variant=variant)
    equal(before, device.bits())
    device.step([normal((9, 33), 1)], variant="automatic")


def test_scratch_is_enough_for_every_variant() -> None:
    """`Device.step` looks at what lies behind it."""
    for width in (2, 4, 16):
        spec = Spec(hidden_size=width)
        device = Device(spec, random_theta(spec), [normal((9, 33)), normal((40,))])
        for variant in ("elementwise", "matmul", "matmul_bfloat16"):
            device.step([normal((9, 33), 1), normal((40,), 1)], variant=variant)
