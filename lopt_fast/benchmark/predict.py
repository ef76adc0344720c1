"""What the GPU passes of the operations should take at best, from bytes and operations per parameter.

A pass takes as long as the slowest of four things: its bytes at the memory's bandwidth, its arithmetic on the float32
units, its tensor-core products, and its instructions at one a cycle and scheduler. Real kernels overlap them
imperfectly and stay somewhat above. `lopt-fast bench predict` prints the tables; kernels/small_fc_lopt/GPU.md and
kernels/element_mlp/CUDA.md have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..architectures.celo import Celo
from ..architectures.fc_lopt import FcLopt
from ..architectures.rnn_fc_lopt import RnnFcLopt
from ..operations import ElementMlp
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


# ---- the operations of other optimizers (kernels/element_mlp/CUDA.md), of factored tensors, float32 ----


def adam() -> Cost:
    """Reads g, p, m, v, writes p, m, v. A root and a quotient, correctly rounded, are eight operations each."""
    return Cost(28, float32=14 + 8 + 8, other=12)


def spreads(momenta: int, second_moments: int, elements: int = 4) -> Cost:
    """`statistics`: reads g, p and the averages. Of each quantity mean and squared distances of a thread's elements,
    merged with those before in shared memory: two quotients, products and sums, five accesses.
    """
    averages = momenta + second_moments
    quantities = 3 + averages
    merge = 2 * 8 + 8
    return Cost(
        4 * (2 + averages),
        float32=2 * averages + 4 + quantities * (3 + merge / elements),
        other=4 + quantities * 8 / elements,
    )


def _columns(mlp: ElementMlp, elements: int) -> tuple[float, float, float]:
    """(columns, operations, other instructions) of an element for the input of its network. Of a row's columns, which
    `elements` share, a part.
    """
    m, v, f = mlp.momenta, mlp.second_moments, mlp.factored_moments
    count = {"g": 1, "clip_g": 1, "p": 1, "log_abs_p": 1, "m": m, "rms": v, "rsqrt_rms": v, "g_rsqrt_rms": v,
             "m_rsqrt_rms": m, "fac_g": f, "fac_m": f}  # fmt: skip
    axes = sum(
        group in ("fac_row", "rsqrt_fac_row", "fac_column", "rsqrt_fac_column") for group in mlp.groups
    )
    columns = sum(count.get(group, 0) for group in mlp.groups) + f * axes / 2 * (1 + 1 / elements)
    products = sum(
        count[group] for group in ("g_rsqrt_rms", "m_rsqrt_rms", "fac_g", "fac_m") if group in mlp.groups
    )
    moved = 2 * (m + v) + 3  # averages, the square, the scaled and bounded gradient
    roots = v + 2 * f * (1 + 1 / elements)
    branches = 4 * (len(mlp.groups) * max(m, v, f)) / elements  # which groups there are, for each member
    loads = (2 + m + v + f) / elements
    return columns, moved + products + 2 * roots, roots + branches + 2 * loads


def factor_sums() -> Cost:
    """Pass 1 of element_mlp: reads g; g^2 to shared memory, from there to a row sum and a column sum."""
    return Cost(4, float32=5, other=8)


def column_sums(mlp: ElementMlp) -> Cost:
    """Pass 2: reads g, p and the averages; squares of the columns, of four elements at once, to sums."""
    columns, float32, other = _columns(mlp, 4)
    return Cost(
        4 * (2 + mlp.momenta + mlp.second_moments),
        float32=float32 + columns * (1 + 1 / 4),
        other=other + columns * 3 / 4,
    )


def element_mlp_apply(mlp: ElementMlp) -> Cost:
    """Pass 3: the same, through the network; writes p and the averages. Weights come from shared memory, four at once,
    for as many elements as a thread has.
    """
    width = next(width for width in (4, 8, 32) if mlp.hidden_size <= width)
    elements = {4: 4, 8: 2, 32: 1}[width]
    columns, float32, other = _columns(mlp, elements)
    averages = mlp.momenta + mlp.second_moments
    products = width * (columns + (mlp.hidden_layers - 1) * width + 2)
    hidden = mlp.hidden_layers * width  # rectified; of messages summed as well
    return Cost(
        4 * (2 + averages) + 4 * (1 + averages),
        float32=float32 + products + 4 + (width if mlp.messages else 0),
        other=other
        + products / 4 / elements
        + hidden
        + (1 + averages) / elements
        + (2 * width if mlp.messages else 0),
    )


def operations() -> list[tuple[str, Cost]]:
    """The passes of usual models, factored tensors (rnn_fc_lopt and fc_lopt keep no factored moments)."""
    costs = [("`factor_sums`", factor_sums())]
    for name, mlp in (("Celo", Celo().mlp), ("fc_lopt", FcLopt().mlp), ("rnn_fc_lopt", RnnFcLopt().mlp)):
        costs += [(f"`column_sums`, {name}", column_sums(mlp)), (f"`apply`, {name}", element_mlp_apply(mlp))]
    return [*costs, ("`adam`", adam()), ("`spreads`, averages 5 / 5", spreads(5, 5))]


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
    wins = ", ".join(f"{d.name} {crossing(d, layers) or 'none'}" for d in devices)
    text = _table(costs, devices)
    return f"{text}\n\nSmallest width from which on `matmul` is faster than `elementwise`: {wins}."


def render_operations(devices: Sequence[Device] = DEVICES) -> str:
    """Markdown: the same of the passes of `operations`."""
    return _table(operations(), devices)


def _table(costs: Sequence[tuple[str, Cost]], devices: Sequence[Device]) -> str:
    rows = []
    for name, cost in costs:
        counts = (cost.bytes, cost.float32, cost.other, cost.tensor)
        rows.append([name, *(f"{n:,.0f}" for n in counts), *(in_picoseconds(cost, d) for d in devices)])
    header = ["pass", "bytes", "float32", "other", "tensor", *(f"{d.name}, ps" for d in devices)]
    return table(header, rows)


def in_picoseconds(cost: Cost, device: Device) -> str:
    seconds, bound = cost.seconds(device)
    return f"{digits(1e12 * seconds)} {bound}"
