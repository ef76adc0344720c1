"""What every architecture promises: one text for NumPy, PyTorch and JAX, any set of tensors, no order among them.

The yardstick is NumPy in float64 (trajectories.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import torch
import trajectories
from trajectories import STEPS, Trajectory, float32_jax, float32_tensor, run, stepper

from lopt_fast.architectures import ARCHITECTURES
from lopt_fast.architectures.base import Architecture, Inputs
from lopt_fast.architectures.fc_lopt import FcLopt
from lopt_fast.architectures.nn_adam import NNAdam
from lopt_fast.architectures.rnn_fc_lopt import RnnFcLopt
from lopt_fast.architectures.velo import Velo
from lopt_fast.operations import ModelTensors, Operations, Reference, Result, Statistics
from lopt_fast.operations.accumulators import initial_state

KINDS: tuple[type[Architecture], ...] = (FcLopt, RnnFcLopt, NNAdam)
SHAPES = ((6, 4), (), (5,), (1,), (2, 3, 3, 2), (2, 1, 2, 2, 3))

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.NAME)


def random_theta(architecture: Architecture, seed: int = 0) -> dict[str, np.ndarray]:
    """Every meta-parameter away from its initial value, so that each has an influence."""
    rng = np.random.default_rng(seed)
    theta = architecture.init_theta(seed)
    return {
        name: (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32).astype(np.float64)
        for name, a in theta.items()
    }


def problem(shapes: Sequence[tuple[int, ...]]) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """No parameter is near 0, where its logarithm is a matter of rounding."""
    return trajectories.problem(shapes, smallest=0.2)


def error(found: Trajectory, expected: Trajectory) -> float:
    return trajectories.error(found, expected, of_all_steps=True)


@every_kind
def test_is_in_the_registry(kind: type[Architecture]) -> None:
    assert ARCHITECTURES[kind.NAME] is kind
    assert kind.from_dict(kind().to_dict()) == kind()


@every_kind
def test_initial_theta_fits_and_depends_on_the_seed_alone(kind: type[Architecture]) -> None:
    theta, again, other = kind().init_theta(3), kind().init_theta(3), kind().init_theta(4)
    kind().check_theta(theta)
    assert all(a.dtype == np.float32 and np.isfinite(a).all() for a in theta.values())
    assert all(np.array_equal(a, again[name]) for name, a in theta.items())
    assert any(not np.array_equal(a, other[name]) for name, a in theta.items())


@every_kind
def test_torch_in_float32(kind: type[Architecture]) -> None:
    architecture, (params, grads) = kind(), problem(SHAPES)
    theta = random_theta(architecture)
    expected = run(architecture, theta, params, grads)
    assert error(run(architecture, theta, params, grads, float32_tensor), expected) <= 1e-5


@every_kind
def test_jax_in_float32_compiled(kind: type[Architecture]) -> None:
    """And from initial meta-parameters, where most things are 0, each step is finite."""
    shapes = SHAPES[:3]
    architecture, (params, grads) = kind(), problem(shapes)
    theta, step = random_theta(architecture), jax.jit(stepper(architecture, len(shapes)))
    expected = run(architecture, theta, params, grads)
    assert error(run(architecture, theta, params, grads, float32_jax, step), expected) <= 1e-5

    zeros = [np.zeros_like(p) for p in params]
    added = run(architecture, architecture.init_theta(), zeros, [zeros, *grads[1:]], float32_jax, step)
    assert all(np.isfinite(delta).all() for deltas in added for delta in deltas)
    assert any(np.abs(delta).max() > 0 for delta in added[-1])


@every_kind
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5)], ids=str)
def test_one_tensor(kind: type[Architecture], shape: tuple[int, ...]) -> None:
    """On its own, a scalar too; and as one of several it moves."""
    architecture, (params, grads) = kind(), problem([shape])
    theta = random_theta(architecture)
    added = run(architecture, theta, params, grads)
    assert all(delta.shape == shape and np.abs(delta).min() > 0 for (delta,) in added)


@every_kind
def test_order_of_tensors_does_not_matter(kind: type[Architecture]) -> None:
    architecture, (params, grads) = kind(), problem(SHAPES)
    theta = random_theta(architecture)
    order = np.random.default_rng(2).permutation(len(SHAPES))
    expected = run(architecture, theta, params, grads)
    found = run(architecture, theta, [params[i] for i in order], [[g[i] for i in order] for g in grads])
    assert error(found, [[deltas[i] for i in order] for deltas in expected]) <= 1e-12


class InPlace(Reference):
    """Operations that write parameters and running averages where they lie, as those with kernels do."""

    def element_mlp(self, spec: Any, tensors: ModelTensors, *args: Any, **kwargs: Any) -> Result:
        return self._written(tensors, Reference.element_mlp(spec, tensors, *args, **kwargs))

    def adam(self, tensors: ModelTensors, *args: Any, **kwargs: Any) -> Result:
        return self._written(tensors, Reference.adam(tensors, *args, **kwargs))

    @staticmethod
    def _written(tensors: ModelTensors, result: Result) -> Result:
        for p, new in zip(tensors.params, result.outputs, strict=True):
            p[...] = new
        for state, new_state in zip(tensors.states, result.states, strict=True):
            for a, new in zip(state, new_state, strict=True):
                a[...] = new
        return result._replace(outputs=tensors.params, states=tensors.states)


@every_kind
def test_operations_may_write_in_place(kind: type[Architecture]) -> None:
    architecture, (params, grads) = kind(), problem(SHAPES)
    theta = random_theta(architecture)

    def trajectory(operations: Operations) -> list[np.ndarray]:
        current = [p.copy() for p in params]
        states = [initial_state(architecture.accumulates("", p.shape), p) for p in params]
        rows = architecture.init_rows(theta, [p.shape for p in params])
        shared = architecture.init_shared(theta)
        for t in range(STEPS):
            tensors = ModelTensors(
                current, grads[t], states, [1.0] * len(params), [0.0] * len(params), apply=True
            )
            inputs = Inputs(np.asarray(t), 100.0, np.asarray(2.0))
            current, states, rows, shared = architecture.step(
                operations, theta, tensors, rows, shared, inputs
            )
        return current

    for a, b in zip(trajectory(InPlace()), trajectory(Reference()), strict=True):
        np.testing.assert_array_equal(a, b)


class WithoutColumns(Reference):
    """Operations whose statistics tell nothing of columns."""

    def statistics(self, *args: Any, **kwargs: Any) -> Statistics:
        return Reference.statistics(*args, **kwargs)._replace(column_mean_square=None)


@pytest.mark.parametrize("architecture", [RnnFcLopt(), Velo(lstm_size=8, mixture=4)], ids=lambda a: a.NAME)
def test_operations_may_leave_mean_squares_of_columns_out(architecture: Architecture) -> None:
    params, grads = problem(SHAPES)
    theta = random_theta(architecture)
    expected = run(architecture, theta, params, grads)
    step = stepper(architecture, len(params), WithoutColumns())
    assert error(run(architecture, theta, params, grads, step=step), expected) <= 1e-12


@every_kind
def test_state_keeps_its_shapes_and_types(kind: type[Architecture]) -> None:
    """In a state of its own: none of its arrays is one of the meta-parameters."""
    architecture, (params, grads) = kind(), problem(SHAPES)
    theta = {name: float32_tensor(a) for name, a in random_theta(architecture).items()}
    before = {name: a.clone() for name, a in theta.items()}
    rows = architecture.init_rows(theta, [p.shape for p in params])
    shared = architecture.init_shared(theta)
    tensors = ModelTensors(
        [float32_tensor(p) for p in params], [float32_tensor(g) for g in grads[0]],
        [initial_state(architecture.accumulates("", p.shape), float32_tensor(p)) for p in params],
        [1.0] * len(params), [0.0] * len(params),
    )  # fmt: skip
    update = architecture.step(
        Reference, theta, tensors, rows, shared, Inputs(torch.asarray(0), 100.0, torch.asarray(1.0))
    )

    def layout(arrays: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {name: (a.shape, a.dtype) for name, a in arrays.items()}

    assert layout(update.rows) == layout(rows)
    assert layout(update.shared) == layout(shared)
    assert all(a.shape[0] == len(params) for a in rows.values())
    for state, new in zip(tensors.states, update.states, strict=True):
        assert layout(new._asdict()) == layout(state._asdict())
    # State is written to: it shares no memory with theta, nor with constants that are kept.
    kept = {name: a.clone() for name, a in shared.items()}
    for a in [*rows.values(), *shared.values()]:
        a.fill_(7.0)
    assert all(torch.equal(a, before[name]) for name, a in theta.items())
    assert all(torch.equal(a, kept[name]) for name, a in architecture.init_shared(theta).items())
