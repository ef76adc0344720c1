"""What the GPU passes of `small_fc_lopt` should take at best, from bytes and operations per parameter.

A pass takes as long as the slowest of four things: its bytes at the memory's bandwidth, its arithmetic on the float32
units, its tensor-core products, and its instructions at one a cycle and scheduler. Real kernels overlap them
imperfectly and stay somewhat above. `lopt-fast bench predict` prints the table; kernels/small_fc_lopt/GPU.md has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .report import digits, table

Variant = Literal["elementwise", "matmul", "matmul_bfloat16"]
VARIANTS: tuple[Variant, ...] = ("elementwise", "matmul", "matmul_bfloat16")
WIDTHS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Device:
    """Public figures of a GPU (manufacturer's data sheets; dense tensor-core rates)."""

    name: str
    multiprocessors: int
    clock: float
    """Hz, boost."""
    float32_lanes: int
    """Float32 units of a multiprocessor; each does a multiply-add a cycle."""
    bandwidth: float
    """Bytes a second."""
    tf32: float
    """Operations a second, a multiply-add being two."""
    bfloat16: float
    warp_share: float
    """Part of the tensor-core rate that instructions of one warp (mma.sync) reach; the rest needs newer ones, of
    several warps and on larger matrices."""

    @property
    def float32(self) -> float:
        """Multiply-adds a second."""
        return self.multiprocessors * self.float32_lanes * self.clock

    @property
    def issue(self) -> float:
        """Instructions a second, counted for each thread: four schedulers, 32 threads."""
        return self.multiprocessors * 128 * self.clock


DEVICES = (
    Device("A100 80 GB SXM", 108, 1.41e9, 64, 2.04e12, 156e12, 312e12, 1.0),
    # Hopper: mma.sync at 62 % (Luo et al., arXiv 2501.12084). Blackwell: assumed to be as fast a multiprocessor.
    Device("H100 SXM", 132, 1.98e9, 128, 3.35e12, 495e12, 989e12, 0.62),
    Device("H200 SXM", 132, 1.98e9, 128, 4.8e12, 495e12, 989e12, 0.62),
    Device("B200", 148, 1.965e9, 128, 8.0e12, 1.125e15, 2.25e15, 0.31),
)


@dataclass(frozen=True)
class Storage:
    """Bytes of a number in memory: parameter, gradient, state."""

    parameter: int = 4
    gradient: int = 4
    state: int = 4


@dataclass(frozen=True)
class Cost:
    """For one parameter. A multiply-add is one operation."""

    bytes: float
    float32: float
    """Multiply-adds, multiplications and additions."""
    other: float
    """Every other instruction: comparisons, conversions, loads, stores."""
    tensor: float = 0.0
    """Multiply-adds on tensor cores, padding included."""
    tensor_bfloat16: bool = False

    def seconds(self, device: Device) -> tuple[float, str]:
        """Time for a parameter, and what it is bound by: memory, float32, tensor or issue."""
        rate = (device.bfloat16 if self.tensor_bfloat16 else device.tf32) / 2 * device.warp_share
        # One instruction of a warp does 1,024 (tf32) or 2,048 (bfloat16) products.
        mma = self.tensor / (64 if self.tensor_bfloat16 else 32)
        times = {
            "memory": self.bytes / device.bandwidth,
            "float32": self.float32 / device.float32,
            "tensor": self.tensor / rate,
            "issue": (self.float32 + self.other + mma) / device.issue,
        }
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound


STATES = 4  # three momenta and the second moment


def factor_statistics(storage: Storage = Storage()) -> Cost:
    """Pass 1: reads g; g^2 into a row sum and a column sum."""
    return Cost(storage.gradient, float32=4, other=2)


def feature_statistics(storage: Storage = Storage()) -> Cost:
    """Pass 2: reads g, p, m, v; moves m and v on, sums the squares of 16 features."""
    read = storage.gradient + storage.parameter + STATES * storage.state
    moved = 2 * STATES + 2  # averages, scaled gradient, its square
    return Cost(read, float32=moved + 3 + 10 + 12 + 16, other=10)


def apply(
    width: int, layers: int = 2, variant: Variant = "elementwise", storage: Storage = Storage()
) -> Cost:
    """Pass 3: reads g, p, m, v; features, network; writes p, m, v."""
    moved = storage.gradient + 2 * storage.parameter + 2 * STATES * storage.state
    features = 2 * STATES + 2 + 3 + 9  # averages, ratios, factored features
    around = features + 4  # the step itself
    memory = 12  # loads, stores and addresses, some for several parameters
    hidden = (layers - 1) * width * width
    if variant == "elementwise":
        float32 = around + width + 16 * width + hidden + 2 * width
        return Cost(moved, float32, other=memory + 2 + layers * width)
    units = max(width, 8)
    products = 16 * units + (layers - 1) * units * units
    inputs = 16 + (layers - 1) * units  # what is split, or rounded to bfloat16
    staged = 16 + 16 / 4 + products / 64  # through shared memory: features; weights, shared by 32 parameters
    biases = units
    activations = layers * units
    if variant == "matmul":
        float32 = around + biases + inputs + 2 * activations + 2 * units
        return Cost(
            moved,
            float32,
            other=memory + staged + 4 * inputs + 16 + activations + biases,
            tensor=3 * products,
        )
    float32 = around + biases + 2 * units
    other = memory + staged + inputs / 2 + activations + biases
    return Cost(moved, float32, other, tensor=products, tensor_bfloat16=True)


def crossing(device: Device, layers: int = 2) -> int | None:
    """Smallest width from which on `matmul` is predicted to be faster than `elementwise`; None: at none."""
    faster = [
        apply(w, layers, "matmul").seconds(device)[0] < apply(w, layers).seconds(device)[0] for w in WIDTHS
    ]
    for i, width in enumerate(WIDTHS):
        if all(faster[i:]):
            return width
    return None


def render(storage: Storage = Storage(), layers: int = 2, devices: Sequence[Device] = DEVICES) -> str:
    """Markdown: picoseconds for a parameter on each device, and what binds."""
    costs = [
        ("1 factor statistics", factor_statistics(storage)),
        ("2 feature statistics", feature_statistics(storage)),
    ]
    for variant in VARIANTS:
        costs += [(f"3 apply, {variant}, width {w}", apply(w, layers, variant, storage)) for w in WIDTHS]
    costs.append(
        ("AdamW", Cost(storage.gradient + 2 * storage.parameter + 4 * storage.state, float32=12, other=10))
    )
    rows = []
    for name, cost in costs:
        counts = (cost.bytes, cost.float32, cost.other, cost.tensor)
        rows.append([name, *(f"{n:,.0f}" for n in counts), *(in_picoseconds(cost, d) for d in devices)])
    header = ["pass", "bytes", "float32", "other", "tensor", *(f"{d.name}, ps" for d in devices)]
    wins = ", ".join(f"{d.name} {crossing(d, layers) or 'none'}" for d in devices)
    return f"{table(header, rows)}\n\nSmallest width from which on `matmul` is faster than `elementwise`: {wins}."


def in_picoseconds(cost: Cost, device: Device) -> str:
    seconds, bound = cost.seconds(device)
    return f"{digits(1e12 * seconds)} {bound}"
