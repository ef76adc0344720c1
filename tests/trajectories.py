"""Short trajectories of architectures on random gradients: in NumPy in float64, the yardstick, and in frameworks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lopt_fast.architectures.base import Architecture, Inputs
from lopt_fast.operations import ModelTensors, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.reference import TensorState

NUM_STEPS = 100.0
STEPS = 4

Step = Callable[..., Any]
Trajectory = list[list[np.ndarray]]
"""What each step adds to each parameter."""


def problem(
    shapes: Sequence[tuple[int, ...]], seed: int = 1
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """(parameters, gradients of each step), exact in float32."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape), np.float32).astype(np.float64)

    return [draw(s) for s in shapes], [[draw(s) for s in shapes] for _ in range(STEPS)]


def run(
    architecture: Architecture,
    theta: Mapping[str, np.ndarray],
    params: Sequence[np.ndarray],
    grads: Sequence[Sequence[np.ndarray]],
    array: Callable[[np.ndarray], Any] = lambda x: np.asarray(x, np.float64),
    compiled: Callable[[Step], Step] = lambda step: step,
) -> Trajectory:
    """The trajectory of an architecture that has no tensor-level state. array: into what is to be tried."""
    meta_parameters = {name: array(a) for name, a in theta.items()}
    current = [array(p) for p in params]
    states = [initial_state(architecture.accumulates("", p.shape), p) for p in current]

    def step(params: Any, grads: Any, states: Any, t: Any) -> Any:
        tensors = ModelTensors(
            params, grads, [TensorState(*s) for s in states], [1.0] * len(params), [0.0] * len(params)
        )
        inputs = Inputs(t, NUM_STEPS, None)
        update = architecture.step(Reference(), meta_parameters, tensors, {}, {}, inputs)
        return update.outputs, update.states

    advance = compiled(step)
    added = []
    for t, gradients in enumerate(grads):
        clock = array(np.asarray(t))
        outputs, states = advance(current, [array(g) for g in gradients], states, clock)
        current = [p + delta for p, delta in zip(current, outputs, strict=True)]
        added.append([np.asarray(delta, np.float64) for delta in outputs])
    return added


def in_torch(architecture: Architecture, theta: Mapping[str, np.ndarray], *problem: Any) -> Trajectory:
    """In float32."""
    return run(architecture, theta, *problem, lambda x: torch.asarray(x.tolist(), dtype=torch.float32))


def in_jax(architecture: Architecture, theta: Mapping[str, np.ndarray], *problem: Any) -> Trajectory:
    """In float32, compiled."""

    def array(x: np.ndarray) -> jax.Array:
        # Bound to a device as results are, or the second step would be compiled anew.
        return jnp.asarray(x, jnp.float32, device=jax.devices()[0])

    return run(architecture, theta, *problem, array, jax.jit)


def error(found: Trajectory, expected: Trajectory) -> float:
    """The largest, relative to the largest element of a tensor's step; infinite where there is a NaN."""
    worst = 0.0
    for step, wanted in zip(found, expected, strict=True):
        for a, b in zip(step, wanted, strict=True):
            assert a.shape == b.shape
            relative = np.abs(a - b).max() / np.abs(b).max()
            worst = max(worst, relative) if np.isfinite(relative) else np.inf
    return worst
