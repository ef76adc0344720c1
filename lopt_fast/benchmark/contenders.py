"""What is timed: optimizer steps behind one interface, and the check of their results that comes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from .. import reference
from ..architectures import small_fc_lopt
from ..errors import install
from ..spec import Spec, Statistics
from . import BenchmarkError
from .workloads import ADAMW_BYTES, APPLY_UPDATES_BYTES, Workload

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

Framework = Literal["torch", "jax"]
FRAMEWORKS: tuple[Framework, ...] = ("torch", "jax")

Kind = Literal[
    "lopt_fast",
    "lopt_fast_step",
    "lopt_fast_loop",
    "dispatch",
    "adamw_fused",
    "adamw_foreach",
    "adamw",
    "matmul",
    "elementwise",
]
"""`lopt_fast_step` is JAX's `step`, which writes new parameters in place of updates; `lopt_fast_loop` takes all steps
of a sample in one call, as a training loop under `jit` would. `dispatch` is a call that takes and returns the same
arrays as `lopt_fast_step` and computes nothing. `matmul` and `elementwise` are framework code: `lopt_fast.reference`
under eager PyTorch or `jax.jit`, with concatenated columns and matrix products, or with the products of the MLP
expanded."""

KINDS: dict[Framework, tuple[Kind, ...]] = {
    "torch": ("adamw_fused", "adamw_foreach", "lopt_fast", "matmul", "elementwise"),
    "jax": ("adamw", "lopt_fast", "lopt_fast_step", "lopt_fast_loop", "dispatch", "matmul", "elementwise"),
}
BASELINES = ("torch/adamw_fused", "torch/adamw_foreach", "jax/adamw", "torch/lopt_fast", "jax/lopt_fast")
"""Contenders that the others are divided by, where they are in the same run."""

LR, BETA1, BETA2, EPSILON, WEIGHT_DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2
"""AdamW in both frameworks."""

Arrays: TypeAlias = Sequence[np.ndarray]


@dataclass(frozen=True)
class Config:
    """How the contenders of one comparison are set up."""

    width: int = 4
    statistics: Statistics = "exact"
    threads: int = 1
    backend: str = "auto"
    device: str = "cpu"
    """JAX's name of the platform; PyTorch's contenders on GPUs are in `gpu_contenders`."""
    donate_gradients: bool = True
    """JAX's `lopt_fast` alone: gradients are intermediates of a real training step, so that XLA may reuse their memory.
    With False they are arguments that stay alive, and XLA copies where the custom call would overwrite them."""

    @property
    def spec(self) -> Spec:
        return small_fc_lopt.spec(hidden_size=self.width, statistics=self.statistics)


@dataclass(frozen=True)
class Contender:
    """One optimizer with its parameters, gradients and state.

    `prepare(steps)` writes fresh gradients for that many steps, as a backward pass would have done just before;
    `run(steps)` takes them and returns when they are done; `parameters()` are the present values.
    """

    framework: str
    kind: str
    prepare: Callable[[int], None]
    run: Callable[[int], None]
    parameters: Callable[[], list[np.ndarray]]

    @property
    def name(self) -> str:
        return f"{self.framework}/{self.kind}"


Builder: TypeAlias = Callable[[Arrays, Arrays], Contender]
"""(parameters, gradients) -> contender that has copied both."""


def meta_parameters(spec: Spec) -> dict[str, np.ndarray]:
    """Initial, not meta-trained: no value changes what a step costs. With this seed networks of 2 units move too."""
    return small_fc_lopt.init_theta(spec, seed=5)


def checkpoint(config: Config) -> Checkpoint:
    """`meta_parameters` as a checkpoint."""
    from ..checkpoint import Checkpoint

    spec = config.spec
    return Checkpoint(
        spec=spec,
        theta=meta_parameters(spec),
        name=f"benchmark-width-{config.width}",
        metadata={},
    )


def builder(framework: Framework, kind: Kind, config: Config) -> Builder:
    """Raises BenchmarkError where the framework is not installed or has no such contender."""
    if kind not in KINDS[framework]:
        raise BenchmarkError(
            f"{framework} has no contender {kind!r}: choose from {', '.join(KINDS[framework])}"
        )
    try:
        if framework == "torch":
            from .torch_contenders import build
        else:
            from .jax_contenders import build
    except ImportError as error:
        raise BenchmarkError(
            f"the contenders of {framework} cannot be built ({error}): {install(framework)}, or choose "
            "another --framework"
        ) from error
    return lambda parameters, gradients: build(kind, config, parameters, gradients)


def bytes_per_parameter(
    framework: str, kind: str, config: Config, workload: Workload, cache_bytes: int
) -> float | None:
    """Byte model of a step; None for framework code, which moves as much as it happens to."""
    if kind.startswith("adamw"):
        return ADAMW_BYTES
    if not kind.startswith("lopt_fast"):
        return None
    model = workload.bytes_per_parameter(config.statistics, cache_bytes)
    return model + APPLY_UPDATES_BYTES if (framework, kind) == ("jax", "lopt_fast") else model


def temporary_bytes(kind: str, config: Config, parameters: int) -> int:
    """Memory that one step of framework code takes beyond parameters, gradients and state; generous."""
    columns = config.spec.input_size
    arrays = {"matmul": 3 * columns + 2 * config.width, "elementwise": 2 * columns + 3 * config.width}
    return 4 * parameters * arrays.get(kind, 0)


# --- check of the results -------------------------------------------------------------------------------------

VERIFY_SHAPES: tuple[tuple[int, ...], ...] = ((33, 20), (17,))
VERIFY_STEPS = 2

Oracle: TypeAlias = Callable[[Arrays, Arrays], Iterable[list[np.ndarray]]]
"""(parameters, gradients), float64 -> parameters after each step, without end."""


def adamw_oracle(parameters: Arrays, gradients: Arrays) -> Iterable[list[np.ndarray]]:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in NumPy."""
    state = [(p, np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    t = 0
    while True:
        t += 1
        for i, g in enumerate(gradients):
            p, m, v = state[i]
            m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
            denominator = np.sqrt(v / (1 - BETA2**t)) + EPSILON
            p = p - LR * (m / (1 - BETA1**t) / denominator + WEIGHT_DECAY * p)
            state[i] = p, m, v
        yield [p for p, _, _ in state]


def learned_oracle(config: Config, theta: Mapping[str, np.ndarray] | None = None) -> Oracle:
    """`lopt_fast.reference` in float64 NumPy; `theta` defaults to that of `checkpoint`."""
    spec = config.spec
    theta = meta_parameters(spec) if theta is None else theta
    theta64 = {name: value.astype(np.float64) for name, value in theta.items()}

    def steps(parameters: Arrays, gradients: Arrays) -> Iterable[list[np.ndarray]]:
        values = list(parameters)
        states = [reference.init_state(spec, p) for p in values]
        t = 0
        while True:
            for i, g in enumerate(gradients):
                delta, states[i] = reference.update(
                    spec, theta64, values[i], g, states[i], t, method="matmul"
                )
                values[i] = values[i] + delta
            t += 1
            yield list(values)

    return steps


def idle_oracle(parameters: Arrays, gradients: Arrays) -> Iterable[list[np.ndarray]]:
    """Nothing is done."""
    del gradients
    while True:
        yield list(parameters)


def oracle(kind: str, config: Config) -> Oracle:
    if kind == "dispatch":
        return idle_oracle
    return adamw_oracle if kind.startswith("adamw") else learned_oracle(config)


def verify(
    build: Builder,
    expected: Oracle,
    shapes: Sequence[tuple[int, ...]] = VERIFY_SHAPES,
    limit: float = 1.0,
) -> float:
    """Take a few steps on small tensors; the largest error over what float32 allows (at most `limit`).

    Allowed per tensor and step are 4 eps max|p| + 1e-4 max|update|. Raises BenchmarkError beyond `limit` times that,
    and for NaN.
    """
    rng = np.random.default_rng(1)
    parameters = [(0.1 * rng.standard_normal(s)).astype(np.float32) for s in shapes]
    gradients = [(0.01 * rng.standard_normal(s)).astype(np.float32) for s in shapes]
    contender = build(parameters, gradients)
    before = [p.astype(np.float64) for p in parameters]
    references = iter(expected(before, [g.astype(np.float64) for g in gradients]))
    worst, allowed = 0.0, [0.0] * len(shapes)
    for step in range(VERIFY_STEPS):
        contender.prepare(1)
        contender.run(1)
        after = next(references)
        for i, (got, want) in enumerate(zip(contender.parameters(), after, strict=True)):
            update = float(np.abs(want - before[i]).max())
            if update == 0.0 and expected is not idle_oracle:
                raise BenchmarkError(
                    f"{contender.name} is not timed: the reference does not move a tensor of shape {shapes[i]}, so "
                    "that nothing would be compared"
                )
            allowed[i] += 4 * float(np.finfo(np.float32).eps) * float(np.abs(want).max()) + 1e-4 * update
            error = float(np.abs(got - want).max()) / allowed[i] if got.shape == want.shape else math.inf
            if not error <= limit:
                raise BenchmarkError(
                    f"{contender.name} is not timed: after step {step + 1} on a tensor of shape {shapes[i]} its result "
                    f"is {error:.3g} times the allowed error away from the float64 reference"
                )
            worst = max(worst, error)
        before = after
    return worst


def check_finite(contender: Contender) -> None:
    """Raises BenchmarkError where the timed steps ended in NaN or infinity."""
    if not all(bool(np.isfinite(p).all()) for p in contender.parameters()):
        raise BenchmarkError(
            f"{contender.name} is not reported: its parameters were not finite after the timed steps"
        )


def renamed(contender: Contender, kind: str) -> Contender:
    return replace(contender, kind=kind)
