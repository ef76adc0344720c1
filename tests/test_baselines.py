"""Optimizers without meta-parameters, against PyTorch's and Optax's of the same name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from trajectories import error, in_jax, in_torch, problem, run

from lopt_fast.architectures import ARCHITECTURES
from lopt_fast.architectures.adafactor import Adafactor
from lopt_fast.architectures.adamw import AdamW
from lopt_fast.architectures.base import Inputs
from lopt_fast.architectures.baseline import Baseline
from lopt_fast.architectures.nadamw import NAdamW, draw
from lopt_fast.architectures.sgdm import SgdM
from lopt_fast.operations import ModelTensors, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.published import FAMILIES
from lopt_fast.spec import SpecError

SHAPES: list[tuple[int, ...]] = [(6, 4), (), (5,), (4, 6)]


def run_torch(
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], shapes: list[tuple[int, ...]]
) -> list[list[np.ndarray]]:
    """What each step of an optimizer of PyTorch adds to each parameter, in float64."""
    params, grads = problem(shapes)
    tensors = [torch.tensor(p, requires_grad=True) for p in params]
    optimizer = make(tensors)
    added = []
    for gradients in grads:
        before = [p.detach().numpy().copy() for p in tensors]
        for p, g in zip(tensors, gradients, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        added.append([p.detach().numpy() - b for p, b in zip(tensors, before, strict=True)])
    return added


def run_optax(tx: optax.GradientTransformation, shapes: list[tuple[int, ...]]) -> list[list[np.ndarray]]:
    """What each step of an optimizer of Optax adds to each parameter, in float64."""
    with jax.enable_x64(True):
        params, grads = problem(shapes)
        current = [jnp.asarray(p) for p in params]
        state, update = tx.init(current), jax.jit(tx.update)
        added = []
        for gradients in grads:
            updates, state = update([jnp.asarray(g) for g in gradients], state, current)
            current = [p + u for p, u in zip(current, updates, strict=True)]
            added.append([np.asarray(u) for u in updates])
    return added


def ours(architecture: Baseline, shapes: list[tuple[int, ...]]) -> list[list[np.ndarray]]:
    return run(architecture, {}, *problem(shapes))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_that_of_torch(weight_decay: float) -> None:
    expected = run_torch(
        lambda p: torch.optim.AdamW(p, 0.02, (0.8, 0.95), 1e-3, weight_decay=weight_decay), SHAPES
    )
    assert error(ours(AdamW(0.02, 0.8, 0.95, 1e-3, weight_decay), SHAPES), expected) <= 1e-11


def test_adamw_is_that_of_optax() -> None:
    expected = run_optax(optax.adamw(0.02, 0.8, 0.95, 1e-3, weight_decay=0.1), SHAPES)
    assert error(ours(AdamW(0.02, 0.8, 0.95, 1e-3, 0.1), SHAPES), expected) <= 1e-11


def test_adamw_defaults_are_those_of_torch() -> None:
    assert error(ours(AdamW(), SHAPES), run_torch(torch.optim.AdamW, SHAPES)) <= 1e-11


@pytest.mark.parametrize(("nesterov", "l2"), [(False, 0.0), (True, 0.2)])
def test_sgdm_is_that_of_torch(nesterov: bool, l2: float) -> None:
    expected = run_torch(
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=nesterov, weight_decay=l2), SHAPES
    )
    assert error(ours(SgdM(0.1, 0.8, nesterov, l2), SHAPES), expected) <= 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgdm_is_that_of_optax(nesterov: bool) -> None:
    expected = run_optax(optax.sgd(0.1, momentum=0.8, nesterov=nesterov), SHAPES)
    assert error(ours(SgdM(0.1, 0.8, nesterov), SHAPES), expected) <= 1e-12


@pytest.mark.parametrize("learning_rate", [0.01, 0.8], ids=["constant", "falling"])
def test_adafactor_is_that_of_torch(learning_rate: float) -> None:
    expected = run_torch(lambda p: torch.optim.Adafactor(p, learning_rate, weight_decay=0.1), SHAPES)
    architecture = Adafactor(learning_rate, minimum_factored=1, weight_decay=0.1)
    assert error(ours(architecture, SHAPES), expected) <= 1e-11


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {}),
        ({"momentum": 0.9, "clipping": None}, {"momentum": 0.9, "clipping_threshold": None}),
        ({"scale_by_parameter": False, "decay_exponent": 0.5},
         {"multiply_by_parameter_scale": False, "decay_rate": 0.5}),
    ],
    ids=["default", "momentum", "unscaled"],
)  # fmt: skip
def test_adafactor_is_that_of_optax(fields: dict[str, Any], arguments: dict[str, Any]) -> None:
    """With tensors that are factored and others that are not; the exponent of its decay is in float32 there."""
    shapes: list[tuple[int, ...]] = [(6, 4), (2, 6), (5,), (3, 5, 4), ()]
    expected = run_optax(optax.adafactor(0.1, min_dim_size_to_factor=4, **arguments), shapes)
    architecture = Adafactor(0.1, relative_step=False, minimum_factored=4, **fields)
    assert error(ours(architecture, shapes), expected) <= 1e-6


def test_adafactor_keeps_rows_and_columns_alone_of_large_matrices() -> None:
    large, small, vector = (Adafactor().accumulates("", s) for s in ((128, 300), (127, 300), (500,)))
    assert (large.momenta, large.second_moments, large.factored_moments) == (0, 0, 1)
    assert (small.second_moments, small.factored_moments) == (1, 0)
    assert (vector.second_moments, vector.factored_moments) == (1, 0)
    zeros = [np.zeros((3, 2)), np.zeros(4)]
    added = run(Adafactor(minimum_factored=2), {}, [z + 1.0 for z in zeros], [zeros])
    assert all(np.array_equal(delta, zero) for delta, zero in zip(added[0], zeros, strict=True))


@pytest.mark.parametrize(
    "architecture",
    [AdamW(), NAdamW(l2=0.1, weight_decay=0.1, warmup_fraction=0.02, final_fraction=0.1), SgdM(nesterov=True),
     Adafactor(minimum_factored=4, momentum=0.5)],
    ids=lambda architecture: architecture.NAME,
)  # fmt: skip
def test_torch_and_compiled_jax_in_float32(architecture: Baseline) -> None:
    expected = ours(architecture, SHAPES)
    assert error(in_torch(architecture, {}, *problem(SHAPES)), expected) <= 5e-5
    assert error(in_jax(architecture, {}, *problem(SHAPES)), expected) <= 5e-5


def test_nadamw_is_adam_where_all_else_is_off() -> None:
    expected = run_torch(lambda p: torch.optim.AdamW(p, 0.02, (0.8, 0.95), 0.0, weight_decay=0.1), SHAPES)
    architecture = NAdamW(0.02, 0.8, 0.95, 0.0, nesterov=False, weight_decay=0.1)
    assert error(ours(architecture, SHAPES), expected) <= 1e-11


def test_nadamw_adds_l2_to_the_gradient() -> None:
    """As if the loss had l2 / 2 * p^2 in it; the published implementation subtracts it."""
    params, grads = problem(SHAPES)
    for quirks, sign in ((False, 1.0), (True, -1.0)):
        changed = [[g + sign * 0.3 * p for g, p in zip(grads[0], params, strict=True)]]
        expected = run(NAdamW(), {}, params, changed)
        found = run(NAdamW(l2=0.3, published_quirks=quirks), {}, params, grads[:1])
        assert error(found, expected) <= 1e-12


def rates(architecture: NAdamW, num_steps: int, at: list[int]) -> list[float]:
    like = np.asarray(0.0)
    return [float(architecture.rate(np.asarray(t), num_steps, like)) for t in at]


def test_nadamw_schedule() -> None:
    right = NAdamW(2.0, warmup_fraction=0.2, constant_fraction=0.5, final_fraction=0.1)
    close = pytest.approx
    assert rates(right, 20, [0, 1, 3, 4, 9, 10]) == close([0.5, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert rates(right, 20, [15, 20, 50]) == close([1.1, 0.2, 0.2])
    published = replace(right, published_quirks=True)
    assert rates(published, 20, [0, 5, 9, 10, 15, 20]) == close([0.0, 1.0, 1.8, 2.0, 1.1, 0.2])
    constant = NAdamW(2.0, constant_fraction=1.0, final_fraction=0.0)
    assert rates(constant, 20, [0, 20]) == close([2.0, 2.0])


def test_nadamw_needs_the_length_of_the_training_where_it_has_a_schedule() -> None:
    assert not NAdamW().needs_num_steps
    assert not NAdamW(constant_fraction=0.5).needs_num_steps
    assert NAdamW(warmup_fraction=0.1).needs_num_steps
    assert NAdamW(final_fraction=0.0).needs_num_steps
    assert not AdamW().needs_num_steps


def test_nadamw_hyperparameters_may_be_traced() -> None:
    """All of many settings in one batch, the same as one by one."""
    params, grads = problem([(3, 2)])
    settings = draw(4)
    names = [name for name in settings[0].to_dict() if name != "published_quirks"]

    def first_update(values: dict[str, Any]) -> Any:
        architecture = NAdamW(**values, published_quirks=True)
        p, g = jnp.asarray(params[0], jnp.float32), jnp.asarray(grads[0][0], jnp.float32)
        state = initial_state(architecture.accumulates("", p.shape), p)
        tensors = ModelTensors([p], [g], [state], [1.0], [0.0])
        return architecture.step(
            Reference(), {}, tensors, {}, {}, Inputs(jnp.asarray(3), 10.0, None)
        ).outputs[0]

    batch = {name: jnp.asarray([float(getattr(h, name)) for h in settings]) for name in names}
    together = np.asarray(jax.jit(jax.vmap(first_update))(batch))
    for i, h in enumerate(settings):
        alone = np.asarray(first_update({name: getattr(h, name) for name in names}))
        assert np.abs(together[i] - alone).max() <= 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("kind", [AdamW, NAdamW, SgdM, Adafactor], ids=lambda kind: kind.NAME)
def test_no_theta_and_every_type_of_parameter(kind: type[Baseline]) -> None:
    """Parameters of several types in one model keep theirs; a learning rate of the framework multiplies all."""
    assert ARCHITECTURES[kind.NAME] is kind
    architecture = kind()
    assert kind.from_dict(architecture.to_dict()) == architecture
    assert architecture.theta_shapes == architecture.init_theta() == {}
    params = [np.ones((2, 3), np.float32), np.ones(4), np.ones((), np.float32)]
    grads = [np.full_like(p, 0.5) for p in params]
    states = [initial_state(architecture.accumulates("", p.shape), p) for p in params]

    def updated(lr: float) -> list[np.ndarray]:
        tensors = ModelTensors(params, grads, states, [lr] * 3, [0.0] * 3)
        update = architecture.step(Reference(), {}, tensors, {}, {}, Inputs(np.asarray(0), None, None))
        for before, after in zip(states, update.states, strict=True):
            assert [(a.shape, a.dtype) for a in after] == [(a.shape, a.dtype) for a in before]
        return update.outputs

    whole, half = updated(1.0), updated(0.5)
    for p, one, other in zip(params, whole, half, strict=True):
        assert (one.dtype, one.shape) == (p.dtype, p.shape)
        assert (one < 0).all()
        assert np.abs(one - 2 * other).max() <= 1e-7 * np.abs(one).max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(beta1=1.0), "adamw: beta1=1.0"),
        (lambda: AdamW(learning_rate=-1.0), "adamw: learning_rate=-1.0"),
        (lambda: NAdamW(beta2=float("nan")), "nadamw: beta2=nan"),
        (lambda: SgdM(momentum=True), "sgdm: momentum=True"),
        (lambda: Adafactor(clipping=0.0), "adafactor: clipping=0.0"),
        (lambda: Adafactor(minimum_factored=0), "adafactor: minimum_factored=0"),
        (lambda: FAMILIES["nadamw"]({"learning_rate": {"Linear": {}}}, {}), "Linear"),
        (lambda: FAMILIES["nadamw"]({"momentum": 1}, {}), "momentum"),
    ],
)
def test_unusable_hyperparameters_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_published_nadamw_defaults() -> None:
    schedule = {"CosineLearningRateSchedule": {"learning_rate": 1.0}}
    architecture, theta = FAMILIES["nadamw"]({"learning_rate": schedule}, {})
    assert theta == {}
    assert architecture == NAdamW(
        1.0, warmup_fraction=0.01, constant_fraction=0.5, final_fraction=0.0, published_quirks=True
    )
    assert FAMILIES["nadamw"]({}, {})[0] == NAdamW(1e-4, published_quirks=True)
