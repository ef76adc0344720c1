"""velo, celo and celo_adam beyond their golden files: frameworks, shapes, flags, initial meta-parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

from lopt_fast.architectures import ARCHITECTURES
from lopt_fast.architectures.base import Architecture, Inputs
from lopt_fast.architectures.celo import Celo
from lopt_fast.architectures.celo_adam import CeloAdam
from lopt_fast.architectures.networks import LossHistory, seen_fraction
from lopt_fast.architectures.velo import Velo
from lopt_fast.operations import ModelTensors, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.published import FAMILIES, hyper
from lopt_fast.spec import SpecError

SHAPES = ((6, 5), (), (7,), (1,), (3, 3, 2, 4), (1, 6))
STEPS = 5
VELO = Velo(lstm_size=8, mixture=4, hidden_size=9, weights_mult=10.0)  # a width at which XLA compiles fast
CELO = Celo(lstm_size=8, mixture=3, hidden_size=9)
CELO_ADAM = CeloAdam(lstm_size=8)
VARIANT = Velo(
    lstm_size=8, mixture=4, rms_decays=(0.9, 0.99, 0.999), validation_input=True, minimise_validation=True,
    lstm_state_decay=0.1, short_loss_history=True, scale_cap=0.01, hidden_size=9, hidden_layers=1, weights_mult=10.0,
)  # fmt: skip
each = pytest.mark.parametrize("architecture", [VELO, CELO, CELO_ADAM], ids=lambda a: a.NAME)


def random_theta(architecture: Architecture, seed: int = 0) -> dict[str, np.ndarray]:
    """With biases and a first state that are not zero, so that a forgotten one shows."""
    rng = np.random.default_rng(seed)
    theta = architecture.init_theta(seed)
    return {k: (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32) for k, a in theta.items()}


def problem(
    shapes: Sequence[tuple[int, ...]], seed: int = 0
) -> tuple[list[Any], list[list[Any]], list[float]]:
    """(parameters, gradients of each step, losses), exact in float32."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    params = [draw(shape, 10.0 ** (i % 3 - 2)) for i, shape in enumerate(shapes)]
    grads = [[draw(shape, 10.0 ** (-i % 4 - 1)) for i, shape in enumerate(shapes)] for _ in range(STEPS)]
    return params, grads, [float(np.float32(x)) for x in 2.0 + rng.standard_normal(STEPS)]


def run(
    architecture: Architecture,
    theta: dict[str, np.ndarray],
    params: list[Any],
    grads: list[list[Any]],
    losses: list[float],
    as_array: Callable[[Any], Any] = lambda x: np.asarray(x, np.float64),
    compiled: Callable[[Any], Any] = lambda f: f,
    num_steps: float = 50.0,
) -> tuple[list[list[np.ndarray]], dict[str, Any]]:
    """(what each step adds to each parameter, the last `rows`)."""
    theta = {name: as_array(a) for name, a in theta.items()}
    xp = array_namespace(*theta.values())
    params = [as_array(p) for p in params]
    states = [initial_state(architecture.accumulates(str(i), p.shape), p) for i, p in enumerate(params)]
    rows = architecture.init_rows(theta, [tuple(p.shape) for p in params])
    shared = architecture.init_shared(theta)

    def step(params: Any, grads: Any, states: Any, rows: Any, shared: Any, loss: Any, t: Any) -> Any:
        n = len(params)
        tensors = ModelTensors(params, grads, states, [1.0] * n, [0.0] * n)
        return architecture.step(Reference, theta, tensors, rows, shared, Inputs(t, num_steps, loss))

    step = compiled(step)
    outputs = []
    for t in range(len(grads)):
        g = [as_array(x) for x in grads[t]]
        update = step(params, g, states, rows, shared, as_array(losses[t]), xp.asarray(t))
        states, rows, shared = update.states, update.rows, update.shared
        assert [o.dtype for o in update.outputs] == [p.dtype for p in params]
        assert [tuple(o.shape) for o in update.outputs] == [tuple(p.shape) for p in params]
        params = [p + o for p, o in zip(params, update.outputs, strict=True)]
        outputs.append([np.asarray(o) for o in update.outputs])
    return outputs, rows


def error(actual: list[list[np.ndarray]], expected: list[list[np.ndarray]]) -> float:
    """Largest, relative to the largest element of all steps of the tensor; infinite where there is a NaN.

    Of all steps: velo's multiplier of a step has a sign, so that it may be the difference of two large numbers.
    """
    worst = 0.0
    for found, wanted in zip(zip(*actual, strict=True), zip(*expected, strict=True), strict=True):
        relative = np.abs(np.stack(found) - np.stack(wanted)).max() / np.abs(np.stack(wanted)).max()
        worst = max(worst, float(relative)) if np.isfinite(relative) else np.inf
    return worst


def in_torch(dtype: str) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {"as_array": lambda x: torch.as_tensor(np.asarray(x), dtype=getattr(torch, dtype))}


def in_jax(dtype: str) -> dict[str, Any]:
    jax = pytest.importorskip("jax")
    return {"as_array": lambda x: jax.numpy.asarray(x, dtype=dtype), "compiled": jax.jit}


@pytest.mark.parametrize("architecture", [VELO, VARIANT, CELO, CELO_ADAM], ids=lambda a: a.NAME)
def test_torch(architecture: Architecture) -> None:
    given = random_theta(architecture), *problem(SHAPES)
    expected, _ = run(architecture, *given)
    assert error(run(architecture, *given, **in_torch("float64"))[0], expected) <= 1e-11
    assert error(run(architecture, *given, **in_torch("float32"))[0], expected) <= 1e-5


@each
def test_jax_compiled(architecture: Architecture) -> None:
    """In float32 where float64 exists, so that a wider array inside would show in the type of the result."""
    jax = pytest.importorskip("jax")
    given = (
        random_theta(architecture),
        *problem(SHAPES[: 2 if architecture is VELO else 1]),
    )  # few, for XLA's sake
    with jax.enable_x64(True):
        found, _ = run(architecture, *given, **in_jax("float32"))
    assert error(found, run(architecture, *given)[0]) <= 1e-5
    assert error(found, run(architecture, *given, **in_torch("float32"))[0]) <= 1e-5


@each
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)], ids=str)
def test_one_tensor(architecture: Architecture, shape: tuple[int, ...]) -> None:
    """From the initial meta-parameters, as meta-training starts: all steps are finite and all elements move."""
    added, _ = run(architecture, architecture.init_theta(3), *problem([shape]))
    for (delta,) in added:
        assert np.isfinite(delta).all()
        assert np.abs(delta).min() > 0.0


def test_initial_meta_parameters_take_small_steps() -> None:
    """At the published sizes, with parameters that start at zero, or that have no gradient yet."""
    for architecture in (Velo(), Celo(), CeloAdam()):
        theta = architecture.init_theta()
        architecture.check_theta(theta)
        assert all(a.dtype == np.float32 for a in theta.values())
        params, grads, losses = problem(SHAPES)
        params[0] *= 0.0
        grads[0] = [0.0 * g for g in grads[0]]
        added, _ = run(architecture, theta, params, grads, losses)
        assert all(np.isfinite(delta).all() for deltas in added for delta in deltas)
        for p, *deltas in zip(params, *added, strict=True):
            size = np.sqrt(np.mean(np.asarray(p) ** 2) + 1e-6)
            assert max(np.abs(delta).max() for delta in deltas) <= 0.1 * size
            assert max(np.abs(delta).max() for delta in deltas) > 0.0
        # The seed decides.
        assert np.array_equal(architecture.init_theta(1)["lstm_w"], architecture.init_theta(1)["lstm_w"])
        assert not np.array_equal(architecture.init_theta(1)["lstm_w"], theta["lstm_w"])


@each
def test_order_of_tensors(architecture: Architecture) -> None:
    theta, (params, grads, losses) = random_theta(architecture), problem(SHAPES)
    expected, rows = run(architecture, theta, params, grads, losses)
    order = [3, 0, 5, 1, 4, 2]
    found, permuted = run(
        architecture, theta, [params[i] for i in order], [[g[i] for i in order] for g in grads], losses
    )
    assert error(found, [[deltas[i] for i in order] for deltas in expected]) <= 1e-11
    assert all(np.abs(permuted[name] - rows[name][order]).max() <= 1e-11 for name in rows)
    assert architecture is not VELO or rows["lstm_cell"].shape == (len(SHAPES), 8)


def test_tensors_hear_of_each_other() -> None:
    """velo: through the maximum over them; not celo, whose network knows only time and loss."""
    for architecture, same in ((VELO, False), (CELO, True)):
        theta, (params, grads, losses) = random_theta(architecture), problem(SHAPES)
        both, _ = run(architecture, theta, params[:2], [g[:2] for g in grads], losses)
        alone, _ = run(architecture, theta, params[:1], [g[:1] for g in grads], losses)
        assert (error(alone, [deltas[:1] for deltas in both]) <= 1e-11) == same


def test_state_is_not_the_meta_parameters() -> None:
    for architecture in (VELO, CELO, CELO_ADAM):
        theta = architecture.init_theta()
        for state in (architecture.init_shared(theta), architecture.init_rows(theta, SHAPES)):
            assert not any(np.shares_memory(a, b) for a in state.values() for b in theta.values())
    assert VELO.init_rows(VELO.init_theta(), [])["lstm_hidden"].shape == (0, 8)


def steps_of(
    architecture: Velo, theta: dict[str, np.ndarray]
) -> tuple[list[list[np.ndarray]], dict[str, Any]]:
    return run(architecture, theta, *problem(SHAPES))


def test_scale_cap() -> None:
    """Where the root mean square of the parameter is above cap * sqrt(elements), it is replaced by that."""
    theta, (params, grads, losses) = random_theta(VELO), problem(SHAPES)
    free, _ = run(VELO, theta, params, grads[:1], losses)
    capped, _ = run(replace(VELO, scale_cap=0.05), theta, params, grads[:1], losses)
    bounds = [
        min(1.0, 0.05 * np.sqrt(p.size) / np.sqrt(np.mean(p.astype(np.float64) ** 2) + 1e-9)) for p in params
    ]
    assert 0 < sum(bound < 1.0 for bound in bounds) < len(bounds)
    assert error(capped, [[f * bound for f, bound in zip(free[0], bounds, strict=True)]]) <= 1e-11


def test_lstm_state() -> None:
    """Kept, decayed after the step, or lost."""
    theta = random_theta(VELO)
    given = theta, *problem(SHAPES)
    first = theta, *problem(SHAPES)[:1], given[2][:1], given[3]
    _, rows = run(VELO, *first)
    _, decayed = run(replace(VELO, lstm_state_decay=0.25), *first)
    _, frozen = run(replace(VELO, frozen_lstm_state=True), *given)
    for name, values in rows.items():
        assert np.abs(decayed[name] - 0.75 * values).max() <= 1e-15
        assert np.abs(frozen[name] - theta[name]).max() == 0.0
    kept, _ = run(VELO, *given)
    lost, _ = run(replace(VELO, frozen_lstm_state=True), *given)
    assert error(kept[:1], lost[:1]) == 0.0
    assert error(kept[1:], lost[1:]) > 1e-6


def test_validation_input() -> None:
    """The last input: without effect at 0 (the training loss), and with one at 1."""
    with_input = replace(VELO, validation_input=True)
    theta = random_theta(with_input)
    without = {name: a[:-1] if name in ("max_w", "mix_w") else a for name, a in theta.items()}
    expected, _ = steps_of(VELO, without)
    assert error(steps_of(with_input, theta)[0], expected) <= 1e-12
    assert error(steps_of(replace(with_input, minimise_validation=True), theta)[0], expected) > 1e-3


def test_loss_history_of_long_training() -> None:
    """In float32, where the decay of the longest average, 1 - 5e-6, has lost most of its digits."""
    rng = np.random.default_rng(0)
    losses = 2.0 + np.exp(-np.arange(300) / 100.0) + 0.05 * rng.standard_normal(300)
    features = {}
    for dtype in (np.float32, np.float64):
        history, features[dtype] = LossHistory.empty(np.zeros(1, dtype)), []
        for t, loss in enumerate(losses.astype(np.float32)):
            history, feature = history.add(loss, np.asarray(t), 200_000.0)
            assert feature.dtype == dtype
            features[dtype].append(feature)
    assert np.abs(np.array(features[np.float32]) - np.array(features[np.float64])).max() <= 1e-3
    assert np.std(features[np.float64]) > 0.1


def test_seen_fraction_near_one() -> None:
    decay, t = np.asarray(0.999, np.float32), np.asarray(0)
    assert abs(float(seen_fraction(decay, t)) / (1.0 - float(decay)) - 1.0) <= 1e-6
    assert abs(float(seen_fraction(np.asarray(0.9), np.asarray(2))) - (1.0 - 0.9**3)) <= 1e-15


def test_published_arguments() -> None:
    """Each argument becomes the field it should, and what is left out has the published default."""
    given = {
        "lstm_hidden_size": 512, "param_inits": 256, "use_bugged_loss_features": False,
        "use_bugged_next_lstm_state": True, "rnn_state_decay": 0.5, "clip_param_scale_amount": 2.0,
        "with_validation_feature_dim": True, "validation_mode": True, "ff_hidden_size": 8, "ff_mult": 1.0,
        "reparam_decay": 3.0, "summarize_all_control": True, "with_g": True, "initial_rms_decays": [0.99],
    }  # fmt: skip
    assert hyper.velo.architecture(given) == Velo(
        hidden_size=8, frozen_lstm_state=True, lstm_state_decay=0.5, scale_cap=2.0, validation_input=True,
        minimise_validation=True, weights_mult=1.0, rms_decays=(0.99,),
    )  # fmt: skip
    default = hyper.velo.architecture({"validation_mode": True})
    assert default == Velo(lstm_size=128, mixture=64, short_loss_history=True)
    assert hyper.celo.architecture({}) == Celo(lstm_size=128, mixture=64, use_schedule=False)
    adam = {
        "initial_momentum_decays": [0.8],
        "initial_rms_decays": [0.99],
        "initial_epsilon": 1e-6,
        "with_g": False,
    }
    assert hyper.celo_adam.architecture(adam) == CeloAdam(beta1=0.8, beta2=0.99, epsilon=1e-6)


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("velo", {"lstm_size": 4}, r"velo: unknown hyperparameters lstm_size; known are lstm_hidden_size"),
        ("velo", {"with_fac_rms": False}, "velo: with_fac_rms=False is not supported, only True"),
        ("velo", {"constant_loss": True}, "velo: constant_loss=True is not supported"),
        ("celo", {"rnn_state_decay": 0.1}, "celo: rnn_state_decay=0.1 is not supported"),
        ("celo_adam", {"mom_decay": False}, "celo_adam: mom_decay=False is not supported"),
        ("celo_adam", {"initial_momentum_decays": [0.9, 0.99]}, "must be one decay each"),
        ("celo_adam", {"horizon": 3}, "celo_adam: unknown hyperparameters horizon"),
        ("velo", {}, "no array 'ff_mod_stack/~/w0__0' among the meta-parameters"),
        ("celo_adam", {}, "no array 'lstm_init_state/hidden' among the meta-parameters"),
    ],
)
def test_published_arguments_refused(family: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        FAMILIES[family](given, {})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Velo, {"mixture": 0}, "velo: mixture=0 must be a positive integer"),
        (Celo, {"lstm_size": 3.0}, r"celo: lstm_size=3\.0 must be a positive integer"),
        (
            Velo,
            {"adafactor_decays": (0.9,)},
            "velo: 1 rms_decays and 1 adafactor_decays for 3 momentum_decays",
        ),
        (Velo, {"rms_decays": (0.9, 0.99)}, "velo: 2 rms_decays"),
        (Celo, {"momentum_decays": (0.9, 1.0, 0.5)}, "celo: momentum_decays=.*below 1"),
        (Velo, {"step_mult": float("nan")}, "velo: step_mult=nan must be a finite number"),
        (Velo, {"minimise_validation": True}, "velo: minimise_validation needs .* validation_input=True"),
        (Velo, {"lstm_state_decay": 1.5}, "velo: lstm_state_decay=1.5 must be from 0 to 1"),
        (Velo, {"frozen_lstm_state": "no"}, "velo: frozen_lstm_state='no' must be True or False"),
        (CeloAdam, {"beta2": 1.0}, "celo_adam: beta2=1.0 must be from 0 to below 1"),
        (CeloAdam, {"epsilon": -1}, "celo_adam: epsilon=-1.0 must not be negative"),
    ],
)
def test_hyperparameters_refused(kind: type[Architecture], values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        kind.from_dict(values)


@pytest.mark.parametrize("architecture", [VELO, VARIANT, CELO, CELO_ADAM], ids=lambda a: a.NAME)
def test_hyperparameters_as_json(architecture: Architecture) -> None:
    values = json.loads(json.dumps(architecture.to_dict()))
    assert type(architecture).from_dict(values) == architecture
    assert ARCHITECTURES[architecture.NAME] is type(architecture)
