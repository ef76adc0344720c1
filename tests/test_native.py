"""The CPU kernels, without any framework, against the float64 reference: shapes, strides, widths, instruction sets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import assert_parameter_close, assert_states_close, assert_update_close, random_theta

from lopt_fast import backends, native, reference
from lopt_fast.spec import Spec

_module, _reason = backends._import_native()
pytestmark = pytest.mark.skipif(_module is None, reason=f"no compiled kernels: {_reason}")
INSTRUCTION_SETS = _module.available_instruction_sets() if _module else []

DTYPES = ("float32", "float64")
HARD_SHAPES = [
    (), (1,), (2,), (7,), (8,), (15,), (17,), (64,), (129,),
    (1, 1), (5, 1), (1, 6), (10, 10), (16, 32), (31, 33), (3, 257), (258, 5), (2, 1000), (1000, 2),
    (4, 4, 4), (6, 3, 5), (1, 7, 1), (8, 8, 3, 3), (3, 3, 8, 8), (3, 5, 2, 4), (2, 3, 2, 4, 5), (2, 2, 2, 2, 2),
]  # fmt: skip


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _module.instruction_set()
    _module.set_instruction_set(request.param)
    yield request.param
    _module.set_instruction_set(before)


class Case:
    """Parameters, gradients and kernel states of several tensors, and the same in float64 for the reference."""

    def __init__(self, spec: Spec, arrays: list[np.ndarray], seed: int = 0) -> None:
        self.spec, self.theta = spec, random_theta(spec, seed)
        self.rng = np.random.default_rng(seed)
        self.params = arrays
        self.states = [native.init_state(spec, p) for p in arrays]
        self.exact = [reference.init_state(spec, np.array(p, np.float64)) for p in arrays]
        self.t = 0

    def gradients(self) -> list[np.ndarray]:
        """Of the parameters' types, mixed scales, exactly representable in float32."""
        scale = math.exp(self.rng.standard_normal())
        return [
            np.asarray(scale * self.rng.standard_normal(p.shape), np.float32).astype(p.dtype)
            for p in self.params
        ]

    def step(self, grads: list[np.ndarray], **options: Any) -> None:
        """One step of both, in place, and compare what was added to the parameters, and the states."""
        kernel = {k: options.pop(k) for k in ("threads", "pool") if k in options}
        before = [np.array(p, np.float64) for p in self.params]
        scale = options.get("grad_scale", 1.0) * self.clip(grads, options)
        native.small_fc_step(
            self.spec, self.theta, self.params, grads, self.states, t=self.t, **options, **kernel
        )
        for i, (p, p0, g) in enumerate(zip(self.params, before, grads, strict=True)):
            delta, self.exact[i] = reference.update(
                self.spec, self.theta, p0, np.array(g, np.float64), self.exact[i], self.t,
                lr=options.get("lr", 1.0), weight_decay=options.get("weight_decay", 0.0), grad_scale=scale,
            )  # fmt: skip
            what = f"tensor {i} {p.dtype}{p.shape} step {self.t}"
            assert_parameter_close(p, p0, delta, what)
            assert_states_close(self.states[i], self.exact[i], native.arithmetic(p.dtype.name), what)
        self.t += 1

    @staticmethod
    def clip(grads: list[np.ndarray], options: dict[str, Any]) -> float:
        limit = options.get("max_grad_norm")
        if limit is None:
            return 1.0
        squares = sum(float(np.square(g, dtype=np.float64).sum()) for g in grads)
        norm = abs(options.get("grad_scale", 1.0)) * math.sqrt(squares)
        return min(1.0, limit / (norm + 1e-6))


def normal(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.array(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype: str, statistics: str) -> None:
    case = Case(Spec(statistics=statistics), [normal(s, dtype, i) for i, s in enumerate(HARD_SHAPES)])
    for _ in range(5):
        case.step(case.gradients(), threads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("width", [2, 3, 4, 5, 8, 16, 32, 33, 64, 256])
def test_widths(width: int, layers: int, dtype: str) -> None:
    for scale, statistics in (("none", "exact"), ("parameter_rms", "exact"), ("parameter_rms", "lagged")):
        spec = Spec(
            hidden_size=width, hidden_layers=layers, scale=scale, statistics=statistics, step_mult=0.01
        )
        case = Case(spec, [normal((7, 20), dtype), normal((37,), dtype), normal((3, 2, 4, 5), dtype)])
        for _ in range(4):
            case.step(case.gradients())


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(instruction_set: str, dtype: str, statistics: str) -> None:
    assert _module.instruction_set() == instruction_set
    shapes = (
        [(n,) for n in range(1, 36)] + [(3, n) for n in range(1, 36, 3)] + [(n, 5) for n in (9, 17, 33, 300)]
    )
    for width, layers in ((4, 2), (32, 2), (5, 1)):
        spec = Spec(hidden_size=width, hidden_layers=layers, statistics=statistics)
        case = Case(spec, [normal(s, dtype, i) for i, s in enumerate(shapes)])
        for _ in range(3):
            case.step(case.gradients())


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize(
    "shape",
    [
        (50_003,),
        (16_384,),
        (16_385,),
        (3, 66_000),
        (66_000, 3),
        (1, 70_001),
        (70_001, 1),
        (300, 301),
        (20, 30, 60, 2),
    ],
    ids=str,
)
def test_sizes_across_tiles(shape: tuple[int, ...], statistics: str) -> None:
    case = Case(Spec(statistics=statistics), [normal(shape, "float32"), normal((5, 3), "float32")])
    for _ in range(3):
        case.step(case.gradients(), threads=2)


def _axes_swapped(p: np.ndarray) -> np.ndarray:
    return np.array(p.T, order="C").T  # same values, the opposite order in memory


def _channels_last(p: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(p, 1, -1)), -1, 1)


def _every_other(p: np.ndarray) -> np.ndarray:
    base = np.full([2 * n + 1 for n in p.shape], 7.0, p.dtype)
    view = base[tuple(slice(1, 2 * n + 1, 2) for n in p.shape)]
    view[...] = p
    return view


def _backwards(p: np.ndarray) -> np.ndarray:
    return np.array(p[::-1])[::-1]


def _misaligned(p: np.ndarray) -> np.ndarray:
    base = np.zeros(p.size + 3, p.dtype)
    view = base[3:].reshape(p.shape)
    view[...] = p
    return view


LAYOUTS = [np.array, _axes_swapped, _channels_last, _every_other, _backwards, _misaligned]


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_parameters_and_gradients(layout: Any, statistics: str) -> None:
    shapes = [(5, 9), (40, 33), (8, 8, 3, 3), (6, 4, 3, 2), (3, 5, 7)]
    case = Case(Spec(statistics=statistics), [layout(normal(s, "float32")) for s in shapes])
    for grad_layout in LAYOUTS:
        case.step([grad_layout(g) for g in case.gradients()])


@pytest.mark.parametrize("layout", [_axes_swapped, _channels_last], ids=lambda f: f.__name__)
def test_an_order_of_axes_changes_nothing_but_rounding(layout: Any) -> None:
    """Factored axes go by size, not by place in memory: the double results agree to the last digits."""
    plain = Case(Spec(), [normal((6, 4, 3, 2), "float64")])
    other = Case(Spec(), [layout(normal((6, 4, 3, 2), "float64"))])
    for _ in range(3):
        g = plain.gradients()
        plain.step(g)
        other.step(g)
    np.testing.assert_allclose(plain.params[0], other.params[0], rtol=1e-13, atol=1e-15, equal_nan=False)


def test_broadcast_gradient() -> None:
    case = Case(Spec(), [normal((6, 5), "float32"), normal((7,), "float32"), normal((), "float64")])
    for _ in range(3):
        g = case.gradients()
        case.step([np.broadcast_to(g[0][:1], (6, 5)), np.broadcast_to(g[1][:1], (7,)), g[2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_of_a_step(dtype: str) -> None:
    shapes = [(6, 5), (50,), (0, 4), (3, 3, 4, 8)]
    for options in (
        {"lr": 0.3},
        {"lr": 0.0, "weight_decay": 0.5},
        {"lr": 2.0, "weight_decay": 0.1},
        {"grad_scale": 1 / 1024},
        {"max_grad_norm": 0.7},
        {"max_grad_norm": 1e6},
        {"max_grad_norm": 0.7, "grad_scale": 0.01, "weight_decay": 0.1, "lr": 0.5},
    ):
        case = Case(Spec(statistics="lagged"), [normal(s, dtype, i) for i, s in enumerate(shapes)])
        for _ in range(3):
            case.step(case.gradients(), **options)


@pytest.mark.parametrize("t", [1, 10, 99_999, 3_000_000_000])
def test_time(t: int) -> None:
    case = Case(Spec(), [normal((6, 5), "float64")])
    case.t = t
    case.step(case.gradients())


@pytest.mark.parametrize("apply", [True, False])
def test_output_elsewhere(apply: bool) -> None:
    """The parameters stay as they are; strided outputs are filled, and nothing between their elements."""
    spec = Spec()
    theta = random_theta(spec)
    for dtype in DTYPES:
        params = [normal((6, 5), dtype), _every_other(normal((4, 7), dtype)), normal((9,), dtype)]
        grads = [normal(p.shape, dtype, 1) for p in params]
        kept = [p.copy() for p in params]
        bases = [np.full([2 * n for n in p.shape], 7.0, dtype) for p in params]
        outputs = [b[tuple(slice(0, None, 2) for _ in b.shape)] for b in bases]
        states = [native.init_state(spec, p) for p in params]
        native.small_fc_step(
            spec, theta, params, grads, states, t=0, weight_decay=0.1, outputs=outputs, apply=apply
        )
        for p, k, g, out, base in zip(params, kept, grads, outputs, bases, strict=True):
            np.testing.assert_array_equal(p, k)
            p64 = np.array(p, np.float64)
            delta, _ = reference.update(
                spec,
                theta,
                p64,
                np.array(g, np.float64),
                reference.init_state(spec, p64),
                0,
                weight_decay=0.1,
            )
            assert_update_close(np.array(out, np.float64) - (p64 if apply else 0.0), delta, p64, dtype)
            out[...] = 7.0
            assert (base == 7.0).all()


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("width", [4, 32])
def test_same_bits_for_any_threads_and_pool(width: int, statistics: str) -> None:
    shapes = [(300, 301), (70_001,), (3, 40_000), (40_000, 3), (64, 64, 3, 3), *HARD_SHAPES]
    spec = Spec(hidden_size=width, statistics=statistics)
    theta = random_theta(spec)
    results = []
    for pool, threads in [("serial", 1), ("own", 1), ("own", 2), ("own", 3), ("own", 7), ("openmp", 2)]:
        params = [normal(s, "float32", i) for i, s in enumerate(shapes)]
        states = [native.init_state(spec, p) for p in params]
        for t in range(2):
            grads = [normal(s, "float32", 100 * t + i) for i, s in enumerate(shapes)]
            native.small_fc_step(
                spec, theta, params, grads, states, t=t, max_grad_norm=1.0, pool=pool, threads=threads
            )
        results.append([*params, *(a for state in states for a in state)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(a).all() for a in results[0])


def test_a_tensor_does_not_depend_on_its_neighbours() -> None:
    spec, theta = Spec(), random_theta(Spec())
    p, g = normal((33, 65), "float32"), normal((33, 65), "float32", 1)
    alone, among = [p.copy()], [normal((7,), "float32"), p.copy(), normal((200, 300), "float32")]
    native.small_fc_step(spec, theta, alone, [g], [native.init_state(spec, p)], t=0)
    grads = [normal((7,), "float32"), g, normal((200, 300), "float32")]
    native.small_fc_step(
        spec, theta, among, grads, [native.init_state(spec, x) for x in among], t=0, threads=2
    )
    np.testing.assert_array_equal(alone[0], among[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-30, 0.0])
@pytest.mark.parametrize("shape", [(5, 7), (20,), ()])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_extreme_gradients(value: float, shape: tuple[int, ...], statistics: str) -> None:
    """NaN and infinities come out where the float32 reference has them."""
    spec, theta = Spec(statistics=statistics), random_theta(Spec(), dtype="float32")
    p = normal(shape, "float32")
    state, exact, q = native.init_state(spec, p), reference.init_state(spec, p), p.copy()
    for t in range(3):
        g = normal(shape, "float32", t)
        if t == 1:
            g.reshape(-1)[:1] = value
        with np.errstate(all="ignore"):
            delta, exact = reference.update(spec, theta, q, g, exact, t)
        native.small_fc_step(spec, theta, [p], [g], [state], t=t)
        q = q + delta
        np.testing.assert_array_equal(np.isnan(p), np.isnan(q))
        if np.isfinite(q).all():
            np.testing.assert_allclose(p, q, rtol=2e-6, atol=2e-6)


def test_empty_and_nothing() -> None:
    spec, theta = Spec(), random_theta(Spec())
    native.small_fc_step(spec, theta, [], [], [], t=0)
    params = [np.zeros((0,), "float32"), np.zeros((3, 0, 2), "float64")]
    native.small_fc_step(spec, theta, params, params, [native.init_state(spec, p) for p in params], t=0)


class TestRefusals:
    """Unusable input is named, and nothing is written."""

    def check(self, error: type[Exception], match: str, **changes: Any) -> None:
        spec = changes.pop("spec", Spec())
        p = normal((4, 5), "float32")
        good = {"params": [p.copy(), p.copy()], "grads": [p.copy(), p.copy()]}
        states = [native.init_state(spec, p), native.init_state(spec, p)]
        arguments = {**good, "states": states, "theta": random_theta(spec), "t": 0, **changes}
        arrays = [*arguments["params"], *(a for s in arguments["states"] for a in s)]
        kept = [np.array(a) for a in arrays]
        with pytest.raises(error, match=match):
            native.small_fc_step(spec, **arguments)
        for a, k in zip(arrays, kept, strict=True):
            np.testing.assert_array_equal(a, k)

    def test_arrays(self) -> None:
        p = normal((4, 5), "float32")
        self.check(ValueError, r"grads\[1\]", grads=[p, p.T])
        self.check(ValueError, r"grads\[0\]", grads=[p.astype("float64"), p])
        self.check(ValueError, "equally many", grads=[p])
        self.check(ValueError, r"outputs\[1\]", outputs=[p.copy(), p[:, :4]])
        odd = np.zeros(81, np.uint8)[1:].view(np.float32).reshape(4, 5)
        self.check(ValueError, r"grads\[0\] is not aligned", grads=[odd, p])
        self.check(ValueError, r"params\[0\] has type int32", params=[p.astype("int32"), p])
        self.check(ValueError, r"grads\[1\] has type >f4", grads=[p, p.astype(">f4")])
        self.check(ValueError, r"outputs\[0\] is float64", outputs=[p.astype("float64"), p.copy()])
        self.check(ValueError, r"overlaps itself", params=[np.broadcast_to(p[:1], (4, 5)), p])
        self.check(
            ValueError, r"states\[1\].momentum", states=[native.init_state(Spec(), a) for a in (p, p.T)]
        )

    def test_scalars(self) -> None:
        for name in ("lr", "weight_decay", "max_grad_norm"):
            self.check(ValueError, f"{name}=nan", **{name: math.nan})
        self.check(ValueError, "t=-1", t=-1)
        self.check(ValueError, "pool", pool="none")

    def test_specifications_without_kernel(self) -> None:
        self.check(
            backends.BackendError, "union", spec=Spec(feature_set="union", rms_decays=(0.9, 0.99, 0.999))
        )

    def test_theta(self) -> None:
        theta = random_theta(Spec())
        del theta["b1"]
        self.check(ValueError, "b1", theta=theta)

    def test_instruction_set(self) -> None:
        before = _module.instruction_set()
        with pytest.raises(ValueError, match="x86-64-v9"):
            _module.set_instruction_set("x86-64-v9")
        assert _module.instruction_set() == before
