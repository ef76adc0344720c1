"""The GPU kernels, run by the emulator on the processor: the same source as on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from helpers import assert_update_close, random_theta
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_fast import reference
from lopt_fast.native import Placement, flat_theta, kernel_spec
from lopt_fast.spec import Spec

_native = pytest.importorskip("lopt_fast._native")

HARD_SHAPES: list[tuple[int, ...]] = [
    (), (1,), (5,), (300,), (5, 1), (1, 7), (6, 6), (9, 130), (33, 65), (4, 3, 5), (5, 5, 5), (3, 3, 4, 8),
    (16, 8, 3, 3), (7, 7, 3, 16), (2, 3, 2, 3, 2), (1, 1), (0, 4), (2, 900),
]  # fmt: skip


def float_bits(x: np.ndarray, storage: str) -> np.ndarray:
    """Values as the bits of a storage type, to nearest even."""
    if storage == "float32":
        return x.astype(np.float32)
    if storage == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def from_bits(x: np.ndarray, storage: str) -> np.ndarray:
    if storage == "float32":
        return x
    if storage == "float16":
        return x.view(np.float16).astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)


def place(x: np.ndarray, offset: int = 0) -> np.ndarray:
    """A flat copy that begins `offset` elements after an address that is a multiple of 64 bytes."""
    base = np.zeros(x.size * x.itemsize + 128 + offset * x.itemsize, np.uint8)
    begin = -base.ctypes.data % 64 + offset * x.itemsize
    flat = base[begin : begin + x.size * x.itemsize].view(x.dtype)
    flat[...] = x.reshape(-1)
    return flat


class Device:
    """The tensors of a model in the emulator's memory, all of them in C order."""

    def __init__(
        self,
        spec: Spec,
        theta: Any,
        params: Sequence[np.ndarray],
        *,
        parameter: str = "float32",
        gradient: str = "float32",
        state: str = "float32",
        offset: int = 0,
        stride_padding: int | None = None,
    ) -> None:
        self.spec, self.types, self.offset = spec, (parameter, gradient, state), offset
        self.theta = flat_theta(spec, theta)["float32"]
        self.shapes = [p.shape for p in params]
        self.params = [place(float_bits(p, parameter), offset) for p in params]
        self.placements = [Placement.of(p.shape, p.strides) for p in params]
        self.states: list[dict[str, np.ndarray]] = []
        self.padding = stride_padding
        for placement in self.placements:
            arrays = {}
            for name, (shape, _strides) in placement.state_layouts(spec).items():
                kind = state if name in ("momentum", "second_moment") else "float32"
                size = int(np.prod(shape))
                if name == "momentum":
                    size = 3 * self.momentum_stride(placement)
                arrays[name] = place(np.zeros(size, np.float32 if kind == "float32" else np.uint16), offset)
            self.states.append(arrays)
        self.t = 0
        self.counts = np.zeros(len(params), np.int64)
        self.scratch = np.zeros(0, np.uint8)

    def momentum_stride(self, placement: Placement) -> int:
        if self.padding is None:
            return placement.momentum_stride
        return int(np.prod(placement.shape)) + self.padding

    def tensors(
        self, grads: Sequence[np.ndarray], outputs: Sequence[np.ndarray], **options: Any
    ) -> list[Any]:
        parameter, gradient, state = self.types
        found = []
        for i, placement in enumerate(self.placements):
            s = {name: a.ctypes.data for name, a in self.states[i].items()}
            arguments = {
                "loops": astuple(placement.loops), "parameter": parameter, "gradient": gradient, "state": state,
                "param": self.params[i].ctypes.data, "grad": grads[i].ctypes.data,
                "output": outputs[i].ctypes.data, "apply": True, "momentum": s["momentum"],
                "second_moment": s["second_moment"], "row": s["factored_row"],
                "column": s.get("factored_column", 0), "mean_squares": s.get("mean_squares", 0),
                "momentum_stride": self.momentum_stride(placement), "theta": self.theta.ctypes.data, "lr": 1.0,
                "weight_decay": 0.0, "t": self.t, "step": self.counts[i:].ctypes.data, "clip_group": -1,
            }  # fmt: skip
            arguments |= {k: v[i] if isinstance(v, list) else v for k, v in options.items()}
            found.append(_native.GpuTensor(**arguments))
        return found

    def step(
        self,
        grads: Sequence[np.ndarray],
        *,
        max_norms: Sequence[Any] = (),
        schedule: str = "single_launch",
        variant: str = "elementwise",
        grad_scale: Any = 1.0,
        divide: bool = False,
        found_inf: np.ndarray | None = None,
        outputs: Sequence[np.ndarray] | None = None,
        **options: Any,
    ) -> None:
        memory = [place(float_bits(g, self.types[1]), self.offset) for g in grads]
        tensors = self.tensors(memory, self.params if outputs is None else outputs, **options)
        spec = kernel_spec(self.spec)
        size = _native.gpu_scratch_bytes(spec, tensors, len(max_norms))
        # What a step finds in its scratch memory must not matter; what lies behind it must stay.
        base = np.full(size + 512, 0xFF, np.uint8)
        begin = -base.ctypes.data % 256
        _native.gpu_step(
            _native.gpu_emulator(), spec=spec, tensors=tensors, max_norms=list(max_norms),
            grad_scale=grad_scale, divide=divide, found_inf=0 if found_inf is None else found_inf.ctypes.data,
            variant=variant, schedule=schedule, scratch=base[begin:].ctypes.data,
        )  # fmt: skip
        assert (base[begin + size :] == 0xFF).all()
        assert (base[:begin] == 0xFF).all()
        self.t += 1

    def values(self) -> list[np.ndarray]:
        return [
            np.array(from_bits(p, self.types[0])).reshape(shape)
            for p, shape in zip(self.params, self.shapes, strict=True)
        ]

    def state(self, i: int) -> dict[str, np.ndarray]:
        """State of a tensor in the reference's layout (C order)."""
        found = {}
        for name, (shape, strides) in self.placements[i].state_layouts(self.spec).items():
            kind = self.types[2] if name in ("momentum", "second_moment") else "float32"
            flat = from_bits(self.states[i][name], kind)
            if name == "momentum":
                strides = (self.momentum_stride(self.placements[i]), *strides[1:])
            view = np.lib.stride_tricks.as_strided(flat, shape, [s * flat.itemsize for s in strides])
            found[name] = np.array(view)
        return found

    def bits(self) -> list[np.ndarray]:
        return [np.array(a) for a in (*self.params, *(x for s in self.states for x in s.values()))]


def normal(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    return np.asarray(scale * rng.standard_normal(shape), np.float32)


class Case:
    """The emulated kernels next to the float64 reference, both going on from what the kernels left."""

    def __init__(
        self, spec: Spec, shapes: Sequence[tuple[int, ...]], theta: Any = None, **options: Any
    ) -> None:
        self.spec = spec
        self.theta = random_theta(spec) if theta is None else theta
        self.shapes = list(shapes)
        self.device = Device(spec, self.theta, [normal(s, i) for i, s in enumerate(shapes)], **options)
        self.exact = [reference.init_state(spec, np.zeros(s)) for s in shapes]

    def gradients(self) -> list[np.ndarray]:
        t = self.device.t
        return [
            normal(s, 1000 * (t + 1) + i, float(np.exp(np.sin(i + t)))) for i, s in enumerate(self.shapes)
        ]

    def step(
        self,
        grads: Sequence[np.ndarray] | None = None,
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        grad_scale: float = 1.0,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        grads = self.gradients() if grads is None else list(grads)
        before = [p.astype(np.float64) for p in self.device.values()]
        t = self.device.t
        scale = grad_scale
        if max_grad_norm is not None:
            norm = np.sqrt(
                sum(
                    float((np.float64(grad_scale) * g.astype(np.float64) ** 2 * grad_scale).sum())
                    for g in grads
                )
            )
            scale *= min(1.0, max_grad_norm / (norm + reference.CLIP_EPSILON))
            options |= {"max_norms": [max_grad_norm], "clip_group": 0}
        self.device.step(grads, lr=lr, weight_decay=weight_decay, grad_scale=grad_scale, **options)
        for i, (p, g) in enumerate(zip(before, grads, strict=True)):
            delta, self.exact[i] = reference.update(
                self.spec, self.theta, p, g.astype(np.float64), self.exact[i], t,
                lr=lr, weight_decay=weight_decay, grad_scale=scale,
            )  # fmt: skip
            after = self.device.values()[i].astype(np.float64)
            what = f"shape {self.shapes[i]}, step {t}"
            assert_update_close(after - p, delta, p, "float32", what)
            for name, actual in self.device.state(i).items():
                expected = np.asarray(getattr(self.exact[i], name), np.float64)
                assert actual.shape == expected.shape, f"{what} {name}"
                if expected.size:
                    error, largest = np.abs(actual - expected).max(), np.abs(expected).max()
                    assert error <= 1e-4 * largest, f"{what} {name}: off by {error:.3e} of {largest:.3e}"


SCHEDULES = ["single_launch", "phased"]
STATISTICS: list[Any] = ["exact", "lagged"]


def equal(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.fixture(autouse=True)
def _emulator() -> Any:
    old = _native.set_emulator()
    yield
    _native.set_emulator(**old)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("statistics", STATISTICS)
def test_hard_shapes(statistics: Any, schedule: str) -> None:
    case = Case(Spec(statistics=statistics), HARD_SHAPES)
    for _ in range(3):
        case.step(schedule=schedule)
    assert (case.device.counts == 3).all()


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("width", [2, 3, 4, 8, 16, 32, 64])
def test_widths(width: int, layers: int, statistics: Any) -> None:
    """3 is padded to 4. Vectors of four elements and single ones, with and without a batch axis inside."""
    spec = Spec(hidden_size=width, hidden_layers=layers, statistics=statistics)
    case = Case(spec, [(12, 16), (9, 130), (5, 4, 3), (16, 8, 3, 3), (33,), (260,)])
    for _ in range(2):
        case.step()


@pytest.mark.parametrize("statistics", STATISTICS)
def test_large_tensors_are_cut(statistics: Any) -> None:
    """Several tiles along both axes, several segments of them, and tensors of few and of very long rows."""
    shapes = [(3000, 520), (3, 20_000), (20_000, 3), (70_001,), (65_536,), (40, 31, 40), (512, 16, 3, 3)]
    case = Case(Spec(statistics=statistics), shapes)
    for _ in range(2):
        case.step()


@pytest.mark.parametrize("statistics", STATISTICS)
def test_many_tensors(statistics: Any) -> None:
    """More than one table holds; empty ones among them."""
    shapes = [[(), (3,), (4, 6), (0, 2), (5, 3)][i % 5] for i in range(300)]
    case = Case(Spec(statistics=statistics), shapes)
    before = _native.emulator_launches()
    for _ in range(2):
        case.step()
    assert _native.emulator_launches() - before >= 2 * 3
    assert (case.device.counts == 2).all()


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_addresses(offset: int, statistics: Any) -> None:
    case = Case(Spec(statistics=statistics), [(12, 16), (64,), (9, 5)], offset=offset)
    for _ in range(2):
        case.step()


@pytest.mark.parametrize("padding", [0, 4, 5])
def test_momenta_apart(padding: int) -> None:
    case = Case(Spec(), [(12, 16), (64,), (9, 5)], stride_padding=padding)
    for _ in range(2):
        case.step()


@pytest.mark.parametrize("statistics", STATISTICS)
def test_the_same_bits_in_any_order(statistics: Any) -> None:
    """Neither the schedule nor the grid nor the order in which blocks finish changes a bit."""
    shapes = [(300, 301), (20_001,), (3, 4000), (4000, 3), (64, 64, 3, 3), *HARD_SHAPES]
    spec = Spec(statistics=statistics)
    results = []
    for multiprocessors, l2_bytes, seed, schedule in [
        (8, 1 << 20, 0, "phased"), (8, 1 << 20, 0, "single_launch"), (1, 1 << 10, 0, "single_launch"),
        (200, 1 << 30, 5, "single_launch"), (16, 1 << 16, 6, "single_launch"), (16, 1 << 16, 7, "phased"),
    ]:  # fmt: skip
        _native.set_emulator(multiprocessors=multiprocessors, l2_bytes=l2_bytes, seed=seed)
        device = Device(spec, random_theta(spec), [normal(s, i) for i, s in enumerate(shapes)])
        for t in range(2):
            grads = [normal(s, 100 * t + i) for i, s in enumerate(shapes)]
            device.step(grads, max_norms=[1.0], clip_group=0, schedule=schedule)
        results.append(device.bits())
    assert all(np.isfinite(from_bits(a, "float32")).all() for a in results[0])
    for other in results[1:]:
        equal(results[0], other)


def test_a_tensor_does_not_depend_on_its_neighbours() -> None:
    spec = Spec()
    alone = Device(spec, random_theta(spec), [normal((33, 65))])
    among = Device(spec, random_theta(spec), [normal((7,)), normal((33, 65)), normal((200, 30))])
    alone.step([normal((33, 65), 1)])
    among.step([normal((7,), 2), normal((33, 65), 1), normal((200, 30), 3)])
    equal([alone.params[0]], [among.params[1]])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scalars_of_a_step(schedule: str) -> None:
    for options in (
        {"lr": 0.3},
        {"lr": 0.0, "weight_decay": 0.5},
        {"lr": 2.0, "weight_decay": 0.1},
        {"grad_scale": 1 / 1024},
        {"max_grad_norm": 0.7},
        {"max_grad_norm": 1e6},
        {"max_grad_norm": 0.7, "grad_scale": 0.01, "weight_decay": 0.1, "lr": 0.5},
    ):
        case = Case(Spec(statistics="lagged"), [(6, 5), (50,), (0, 4), (3, 3, 4, 8)])
        for _ in range(3):
            case.step(**options, schedule=schedule)  # type: ignore[arg-type]


@pytest.mark.parametrize("t", [1, 10, 99_999, 3_000_000_000])
def test_time(t: int) -> None:
    case = Case(Spec(), [(6, 5), (9,)])
    case.device.t = t
    case.step()


@pytest.mark.parametrize("statistics", STATISTICS)
def test_scale_by_the_parameters(statistics: Any) -> None:
    case = Case(Spec(statistics=statistics, scale="parameter_rms", scale_epsilon=1e-9), HARD_SHAPES)
    for _ in range(3):
        case.step()


@pytest.mark.parametrize("offset", [-0.8, 0.23, 0.5])
def test_decays(offset: float) -> None:
    """Decays close to 1 and to 0 (clipped for second moments)."""
    spec = Spec()
    theta = random_theta(spec)
    for name in theta:
        if name.endswith("_decays"):
            theta[name] = np.full_like(
                theta[name], min(offset, 0.22) if name == "momentum_decays" else offset
            )
    case = Case(spec, [(12, 16), (9, 5), (21,)], theta)
    for _ in range(4):
        case.step()


TYPES = {
    "float32": np.float32, "float64": np.float64, "int32": np.int32, "int64": np.int64,
}  # fmt: skip


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("real", ["float32", "float64"])
@pytest.mark.parametrize("count", ["float32", "int32", "int64"])
def test_numbers_on_the_device(count: str, real: str, statistics: Any) -> None:
    """As a captured graph reads them: the same as numbers of the host, the first step included."""
    spec = Spec(statistics=statistics)
    shapes = [(12, 16), (9, 5), (21,)]
    numbers = {"lr": 0.5, "weight_decay": 0.125, "grad_scale": 4.0, "norm": 0.75}
    cells = {name: np.array([value], TYPES[real]) for name, value in numbers.items()}
    now = np.zeros(1, TYPES[count])
    host, device = (
        Device(spec, random_theta(spec), [normal(s, i) for i, s in enumerate(shapes)]) for _ in "ab"
    )

    def cell(name: str) -> tuple[int, str]:
        return cells[name].ctypes.data, real

    for t in range(3):
        grads = [normal(s, 100 * t + i) for i, s in enumerate(shapes)]
        host.step(
            grads, lr=0.5, weight_decay=0.125, grad_scale=4.0, divide=True, max_norms=[0.75], clip_group=0
        )
        now[0] = t
        device.step(
            grads, lr=cell("lr"), weight_decay=cell("weight_decay"), grad_scale=cell("grad_scale"),
            divide=True, max_norms=[cell("norm")], clip_group=0, t=(now.ctypes.data, count),
        )  # fmt: skip
        equal(host.bits(), device.bits())


def test_few_items_go_over_many_tiles_where_steps_are_counted_on_the_device() -> None:
    """The first lagged step, and those that need no passes 1 and 2; batches and convolutions are gathered."""
    spec = Spec(statistics="lagged")
    shapes = [(300, 301), (70_001,), (9, 40, 130), (64, 64, 3, 3), (3, 3, 120, 64)]
    host, device = (
        Device(spec, random_theta(spec), [normal(s, i) for i, s in enumerate(shapes)]) for _ in "ab"
    )
    now = np.zeros(1, np.int64)
    for t, schedule in enumerate(["single_launch", "phased", "single_launch"]):
        grads = [normal(s, 100 * t + i) for i, s in enumerate(shapes)]
        host.step(grads)
        now[0] = t
        device.step(grads, t=(now.ctypes.data, "int64"), schedule=schedule)
        equal(host.bits(), device.bits())


@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_transformer_is_one_launch(statistics: Any) -> None:
    """Tensors in the order of GPT-2: 50 matrices of two tiles, 98 vectors among them. One more for the counters."""
    spec = Spec(statistics=statistics)
    layer = [(30,), (30,), (70, 64), (20,), (70, 64), (20,), (30,), (30,), (70, 64), (20,), (70, 64), (20,)]
    shapes: list[tuple[int, ...]] = [(70, 64), (70, 64), *layer * 12, (30,), (30,)]
    device = Device(spec, random_theta(spec), [normal(s, i) for i, s in enumerate(shapes)])
    now = np.zeros(1, np.int64)
    before = _native.emulator_launches()
    device.step([normal(s, i) for i, s in enumerate(shapes)], t=(now.ctypes.data, "int64"))
    assert _native.emulator_launches() - before == 2
    assert (device.counts == 1).all()


def test_the_step_counter_may_be_the_number_of_steps() -> None:
    """Each tensor's own counter, read by the step that adds to it."""
    spec = Spec(statistics="lagged")
    shapes = [(12, 16), (9,)]
    host, device = (
        Device(spec, random_theta(spec), [normal(s, i) for i, s in enumerate(shapes)]) for _ in "ab"
    )
    for t in range(3):
        grads = [normal(s, 100 * t + i) for i, s in enumerate(shapes)]
        host.step(grads)
        device.step(grads, t=[(device.counts[i:].ctypes.data, "int64") for i in range(2)])
        equal(host.bits(), device.bits())
        assert device.counts.tolist() == [t + 1, t + 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("statistics", STATISTICS)
def test_found_inf(statistics: Any, schedule: str) -> None:
    """Nothing is written, nothing counted; with 0 it is a step like any other."""
    spec = Spec(statistics=statistics)
    device = Device(spec, random_theta(spec), [normal((12, 16)), normal((9,))])
    grads = [np.full((12, 16), np.inf, np.float32), normal((9,))]
    before = device.bits()
    device.step(grads, found_inf=np.ones(1, np.float32), max_norms=[1.0], clip_group=0, schedule=schedule)
    equal(before, device.bits())
    assert (device.counts == 0).all()
    device.t = 0
    good = [normal((12, 16), 1), normal((9,), 2)]
    device.step(good, found_inf=np.zeros(1, np.float32), schedule=schedule)
    other = Device(spec, random_theta(spec), [normal((12, 16)), normal((9,))])
    other.step(good)
    equal(other.bits(), device.bits())
    assert (device.counts == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-30, 0.0])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_extreme_gradients(value: float, statistics: Any) -> None:
    """NaN and infinities come out where the float32 reference has them."""
    spec, theta = Spec(statistics=statistics), random_theta(Spec(), dtype="float32")
    shapes = [(5, 7), (8, 12), (20,), ()]
    start = [normal(s, i) for i, s in enumerate(shapes)]
    device = Device(spec, theta, start)
    exact = [reference.init_state(spec, p) for p in start]
    q = [p.copy() for p in start]
    for t in range(3):
        grads = [normal(s, 10 * t + i) for i, s in enumerate(shapes)]
        if t == 1:
            for g in grads:
                g.reshape(-1)[:1] = value
        device.step(grads)
        for i, actual in enumerate(device.values()):
            with np.errstate(all="ignore"):
                delta, exact[i] = reference.update(spec, theta, q[i], grads[i], exact[i], t)
                q[i] = q[i] + delta
            np.testing.assert_array_equal(np.isnan(actual), np.isnan(q[i]))
            if np.isfinite(q[i]).all():
                np.testing.assert_allclose(actual, q[i], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_output_elsewhere(statistics: Any, apply: bool) -> None:
    """The parameters stay as they are. The output may be the gradient itself."""
    spec, theta = Spec(statistics=statistics), random_theta(Spec())
    shapes = [(6, 5), (12, 16), (2, 3, 4, 5), (9,)]
    start = [normal(s, i) for i, s in enumerate(shapes)]
    device, inside = Device(spec, theta, start), Device(spec, theta, start)
    for t in range(2):
        grads = [normal(s, 10 * t + i) for i, s in enumerate(shapes)]
        outputs = [place(np.full(s, np.nan, np.float32)) for s in shapes]
        device.step(grads, outputs=outputs, apply=apply, weight_decay=0.125)
        for p, q in zip(start, device.values(), strict=True):
            np.testing.assert_array_equal(p, q)
        memory = [place(g) for g in grads]
        tensors = inside.tensors(memory, memory, apply=apply, weight_decay=0.125)
        scratch = place(np.zeros(_native.gpu_scratch_bytes(kernel_spec(spec), tensors, 0) + 256, np.uint8))
        scratch = scratch[-scratch.ctypes.data % 256 :]
        _native.gpu_step(
            _native.gpu_emulator(), spec=kernel_spec(spec), tensors=tensors, scratch=scratch.ctypes.data
        )
        inside.t += 1
        equal(outputs, memory)
        other = Device(spec, theta, start)
        if t == 0:
            other.step(grads, weight_decay=0.125)
            for p, q, out in zip(start, other.values(), outputs, strict=True):
                expected = q if apply else q.astype(np.float64) - p
                np.testing.assert_allclose(out.reshape(p.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("parameter", ["bfloat16", "float16"])
def test_narrow_parameters_and_gradients(parameter: str, gradient: str) -> None:
    """What is stored is the float32 result rounded to nearest; arithmetic is in float32."""
    spec, shapes = Spec(), [(12, 16), (9, 5), (21,), (64,)]
    theta = random_theta(spec)
    start = [from_bits(float_bits(normal(s, i), parameter), parameter) for i, s in enumerate(shapes)]
    grads = [from_bits(float_bits(normal(s, 9 + i), gradient), gradient) for i, s in enumerate(shapes)]
    narrow = Device(spec, theta, start, parameter=parameter, gradient=gradient)
    wide = Device(spec, theta, start)
    narrow.step(grads)
    wide.step(grads)
    for actual, expected in zip(narrow.params, wide.values(), strict=True):
        np.testing.assert_array_equal(actual, float_bits(expected.reshape(-1), parameter))
    for a, b in zip(narrow.states, wide.states, strict=True):
        equal(list(a.values()), list(b.values()))


@pytest.mark.parametrize("statistics", STATISTICS)
def test_bfloat16_state(statistics: Any) -> None:
    """Rounded to a neighbour, the same one each time, and right on average."""
    spec, theta, shape = Spec(statistics=statistics), random_theta(Spec()), (128, 256)
    results = []
    for _ in range(2):
        device = Device(spec, theta, [normal(shape)], state="bfloat16")
        device.step([normal(shape, 1)])
        results.append(device)
    equal(results[0].bits(), results[1].bits())
    exact = Device(spec, theta, [normal(shape)])
    exact.step([normal(shape, 1)])
    equal([results[0].params[0]], [exact.params[0]])  # the step itself uses what was not rounded yet
    for name in ("momentum", "second_moment"):
        rounded, value = results[0].state(0)[name], exact.state(0)[name]
        spacing = 2.0 ** (np.floor(np.log2(np.abs(value))) - 7)
        error = (rounded.astype(np.float64) - value) / spacing
        assert np.abs(error).max() < 1.0
        # 32,768 errors within one spacing, of a standard deviation of about 0.41.
        assert abs(error.mean()) < 5 * 0.41 / np.sqrt(value[0].size)
        assert (error != 0).mean() > 0.9
    for _ in range(2):
        results[0].step([normal(shape, 2)])
    assert np.isfinite(results[0].values()[0]).all()


def test_second_moments_in_bfloat16_do_not_stand_still() -> None:
    """With decay 0.999 nearest rounding would stop at half of the limit or before."""
    spec, theta = Spec(), random_theta(Spec())
    device = Device(spec, theta, [normal((64, 64))], state="bfloat16")
    for _ in range(300):
        device.step([np.ones((64, 64), np.float32)])
    d = float(device.theta[-4])
    expected = 1 - (1 - d) ** 300
    assert abs(device.state(0)["second_moment"].mean() - expected) < 0.02 * expected


def test_infinities_in_bfloat16_state() -> None:
    device = Device(Spec(), random_theta(Spec()), [normal((8, 4))], state="bfloat16")
    g = normal((8, 4), 1)
    g[0, 0], g[0, 1] = np.inf, np.nan
    device.step([g])
    second = device.state(0)["second_moment"][0]
    assert np.isinf(second[0, 0])
    assert np.isnan(second[0, 1])
    assert np.isfinite(second[1:]).all()


class TestRefusals:
    """Unusable input is named, and nothing is written."""

    def check(self, match: str, spec: Spec | None = None, **options: Any) -> None:
        device = Device(Spec(), random_theta(Spec()), [normal((4, 5)), normal((3,))])
        before = device.bits()
        if spec is not None:
            device.spec = spec
        with pytest.raises(ValueError, match=match):
            device.step([normal((4, 5)), normal((3,))], **options)
        equal(before, device.bits())

    def test_all(self) -> None:
        self.check("hidden_size 65", spec=Spec(hidden_size=65))
        self.check("tensor 1: clip group", clip_group=[-1, 0])
        self.check("tensor 0: a pointer is null", momentum=0)
        self.check("tensor 0: momenta overlap", momentum_stride=3)
        self.check("tensor 0: parameters and gradients", state="float16")
        self.check(
            "tensor 1: not factored", loops=[(1, 4, 1, 5, 1, True, True), (1, 3, 1, 1, 1, True, False)]
        )
        self.check("tensor 0: negative size", loops=(1, -4, 1, 5, 1, True, True))
        self.check("variant", variant="other")
        self.check("schedule", schedule="other")


SIZES = st.integers(1, 9)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_shapes(data: Any) -> None:
    shapes = data.draw(
        st.lists(
            st.one_of(
                st.lists(SIZES, max_size=5).map(tuple),
                st.tuples(st.integers(1, 400), st.integers(1, 400)),
                st.tuples(st.integers(0, 5000)),
            ),
            min_size=1,
            max_size=5,
        )
    )
    statistics = data.draw(st.sampled_from(["exact", "lagged"]))
    width = data.draw(st.sampled_from([2, 4, 7, 8]))
    _native.set_emulator(
        multiprocessors=data.draw(st.integers(1, 50)), l2_bytes=data.draw(st.integers(1, 1 << 22)),
        seed=data.draw(st.integers(0, 9)),
    )  # fmt: skip
    case = Case(Spec(hidden_size=width, statistics=statistics), shapes, offset=data.draw(st.integers(0, 4)))
    for _ in range(2):
        case.step(schedule=data.draw(st.sampled_from(SCHEDULES)))
