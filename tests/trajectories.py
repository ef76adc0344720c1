"""Short trajectories of architectures on random gradients: in NumPy in float64, the yardstick, and in frameworks.

Steps are compared as what is added to a parameter, so that its size plays no part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from array_api_compat import array_namespace

from lopt_fast.architectures.base import Architecture, Inputs
from lopt_fast.operations import ModelTensors, Operations, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.reference import TensorState

NUM_STEPS = 100.0
STEPS = 4

Step = Callable[..., Any]
Trajectory = list[list[np.ndarray]]
"""What each step adds to each parameter."""


def problem(
    shapes: Sequence[tuple[int, ...]], seed: int = 1, smallest: float = 0.0
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """(parameters, gradients of each step), exact in float32. smallest: how far from 0 the parameters are at least."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape), np.float32).astype(np.float64)

    params, grads = [draw(s) for s in shapes], [[draw(s) for s in shapes] for _ in range(STEPS)]
    nearest = float(np.float32(smallest))
    return [np.where(np.abs(p) < nearest, np.copysign(nearest, p), p) for p in params], grads


def names(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def stepper(architecture: Architecture, count: int, operations: Operations = Reference) -> Step:
    """A step of so many parameters as a function of arrays alone, which can be compiled."""

    def step(
        theta: Any, params: Any, grads: Any, states: Any, rows: Any, shared: Any, t: Any, loss: Any
    ) -> Any:
        states = [TensorState(*state) for state in states]
        tensors = ModelTensors(params, grads, states, [1.0] * count, [0.0] * count, names=names(count))
        inputs = Inputs(t, NUM_STEPS, loss)
        return tuple(architecture.step(operations, theta, tensors, rows, shared, inputs))

    return step


def run(
    architecture: Architecture,
    theta: Mapping[str, np.ndarray],
    params: Sequence[np.ndarray],
    grads: Sequence[Sequence[np.ndarray]],
    array: Callable[[np.ndarray], Any] = lambda x: np.asarray(x, np.float64),
    step: Step | None = None,
) -> Trajectory:
    """array: makes an array of the framework and type to be tried. step: a compiled `stepper`; None: as it is."""
    step = step or stepper(architecture, len(params))
    theta = {name: array(a) for name, a in theta.items()}
    current = [array(p) for p in params]
    states = [
        initial_state(architecture.accumulates(name, p.shape), p)
        for name, p in zip(names(len(params)), current, strict=True)
    ]
    rows = architecture.init_rows(theta, [tuple(p.shape) for p in current])
    shared = architecture.init_shared(theta)
    clock = array_namespace(*current).asarray
    added = []
    for t, gradients in enumerate(grads):
        outputs, states, rows, shared = step(
            theta, current, [array(g) for g in gradients], states, rows, shared, clock(t),
            array(np.asarray(2.0 / (1 + t))),
        )  # fmt: skip
        current = [p + delta for p, delta in zip(current, outputs, strict=True)]
        added.append([np.asarray(delta, np.float64) for delta in outputs])
    return added


def float32_tensor(x: np.ndarray) -> torch.Tensor:
    return torch.asarray(x.tolist(), dtype=torch.float32)


def float32_jax(x: np.ndarray) -> jax.Array:
    # Bound to a device as the state is, or the second step would be compiled anew.
    return jnp.asarray(x, jnp.float32, device=jax.devices()[0])


def in_torch(architecture: Architecture, theta: Mapping[str, np.ndarray], *problem: Any) -> Trajectory:
    """In float32."""
    return run(architecture, theta, *problem, float32_tensor)


def in_jax(
    architecture: Architecture, theta: Mapping[str, np.ndarray], params: Any, grads: Any
) -> Trajectory:
    """In float32, compiled."""
    return run(architecture, theta, params, grads, float32_jax, jax.jit(stepper(architecture, len(params))))


def error(found: Trajectory, expected: Trajectory, of_all_steps: bool = False) -> float:
    """The largest, relative to the largest element of a tensor's step; infinite where there is a NaN.

    of_all_steps: relative to the largest of all steps of the tensor. In a tensor of one element that of a single step
    may be the difference of two large numbers.
    """
    worst = 0.0
    for steps, wanted in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
        sizes = [float(np.abs(b).max()) for b in wanted]
        for a, b, size in zip(steps, wanted, sizes, strict=True):
            assert a.shape == b.shape
            relative = np.abs(a - b).max() / (max(sizes) if of_all_steps else size)
            worst = max(worst, relative) if np.isfinite(relative) else np.inf
    return worst
