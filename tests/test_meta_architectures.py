"""Meta-training and evaluation of architectures other than `small_fc_lopt`."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("pydantic")
jnp = jax.numpy

from array_api_compat import array_namespace  # noqa: E402

from lopt_fast.architectures import ARCHITECTURES, Architecture, initial_theta  # noqa: E402
from lopt_fast.architectures.base import Update  # noqa: E402
from lopt_fast.checkpoint import Checkpoint, load  # noqa: E402
from lopt_fast.meta import config as settings  # noqa: E402
from lopt_fast.meta import devices, outer  # noqa: E402
from lopt_fast.meta.config import ConfigError, MetaTrainConfig  # noqa: E402
from lopt_fast.meta.evaluation.choices import read_learned  # noqa: E402
from lopt_fast.meta.evaluation.comparison import compare  # noqa: E402
from lopt_fast.meta.evaluation.evaluate import Evaluator  # noqa: E402
from lopt_fast.meta.evaluation.study import Learned, Plan, TaskSource  # noqa: E402
from lopt_fast.meta.run import Report, Silent, run  # noqa: E402
from lopt_fast.meta.tasks import Task  # noqa: E402
from lopt_fast.spec import Averages, Spec, SpecError  # noqa: E402

TRAINED = [
    name for name, kind in ARCHITECTURES.items() if issubclass(kind, Architecture) and kind().theta_shapes
]
ONE_EACH = {"momentum_decays": [0.9], "rms_decays": [0.9], "adafactor_decays": [0.9]}
SMALL: dict[str, dict[str, Any]] = {
    "celo": {**ONE_EACH, "hidden_size": 2, "hidden_layers": 1, "lstm_size": 4},
    "celo2": {**ONE_EACH, "hidden_size": 2, "hidden_layers": 1, "adam_below_rank": 1, "newton_schulz_iterations": 1},
    "fc_lopt": {"momentum_decays": [0.9], "hidden_size": 4, "hidden_layers": 1},
    "rnn_fc_lopt": {"decays": [0.9], "hidden_layers": 1, "lstm_size": 4},
    "recurrent_transformer": {
        "decays": [0.9], "hidden_layers": 1, "width": 4, "layers": 1, "heads": 1, "key_size": 4,
    },
    "nn_adam": {"lstm_size": 4},
    "velo": {**ONE_EACH, "hidden_size": 2, "hidden_layers": 1, "lstm_size": 4, "mixture": 2},
}  # fmt: skip
"""Hyperparameters that compile fast."""


@dataclass(frozen=True)
class Clock(Architecture):
    """Gradient descent whose rate falls to 0 at the end of the training, and which looks at the loss."""

    NAME: ClassVar[str] = "clock"
    needs_loss: ClassVar[bool] = True
    needs_num_steps: ClassVar[bool] = True

    @property
    def theta_shapes(self):
        return {"rate": (1,), "wanted": (1,)}

    def init_theta(self, seed=0):
        return {"rate": np.full(1, 0.1, np.float32), "wanted": np.zeros(1, np.float32)}

    def accumulates(self, name, shape):
        return Averages()

    def init_shared(self, theta):
        return {"lengths": 0.0 * theta["rate"], "losses": 0.0 * theta["rate"]}

    def step(self, operations, theta, tensors, rows, shared, inputs):
        xp = array_namespace(theta["rate"])
        left = 1.0 - xp.astype(inputs.t, theta["rate"].dtype) / inputs.num_steps
        rate = theta["rate"][0] * left + 0.0 * theta["wanted"][0]
        outputs = [tensors.finish(i, rate * g) for i, g in enumerate(tensors.grads)]
        seen = {
            "lengths": shared["lengths"] + inputs.num_steps,
            "losses": shared["losses"] + inputs.loss,
        }
        return Update(outputs, tensors.states, rows, seen)


class Line(Task):
    """Cheap to compile: a few numbers that are to become 1 or 2."""

    name, variants, initial_loss = "line", ("a", "b"), 12.0
    shape = (3,)

    def init(self, key: Any) -> Any:
        return {"w": 0.1 * jax.random.normal(key, self.shape)}

    def loss(self, params: Any, batch: Any) -> Any:
        return jnp.sum((params["w"] - batch) ** 2)

    def sample(self, data: Any, key: Any, variant: Any) -> Any:
        return 1.0 + variant + 0.1 * jax.random.normal(key)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setitem(ARCHITECTURES, Clock.NAME, Clock)
    return Clock()


def make_config(architecture: str, steps: int = 5, resets: str = "between", **more: Any) -> MetaTrainConfig:
    values = {
        "optimizer": {"architecture": architecture, "spec": SMALL.get(architecture, {})},
        "estimator": {"name": "pes", "pairs": 2, "std": 0.1},
        "truncation": {"steps": 4, "min_steps": 4, "max_steps": 12, "resets": resets},
        "outer": {"steps": steps, "warmup": 1},
        "evaluation": {"every": 0, "steps": 6, "seeds": 2},
        "checkpoint": {"every": 2},
        **more,
    }
    return settings.from_json(json.dumps(values))


def one_device() -> Any:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), (devices.PAIRS,))


class Loop:
    """Outer steps by gradient descent: far less to compile than `OuterLoop`."""

    def __init__(self, config: MetaTrainConfig) -> None:
        (self.task,) = outer.truncated_tasks(config, [Line()])
        self.theta = jax.flatten_util.ravel_pytree(outer.initial_theta(config))[0]
        self.unrolls = jax.jit(self.task.fresh)(self.theta, self._keys(0))
        self._advance, self._steps = jax.jit(self.task.advance), 0

    def step(self) -> Any:
        self._steps += 1
        variant = jnp.arange(2) % 2
        self.unrolls, estimate, counts = self._advance(
            self.theta, self.unrolls, (), self._keys(self._steps), variant
        )
        self.theta = self.theta - 0.01 * estimate.gradient
        return counts

    def _keys(self, step: int) -> Any:
        return jax.random.split(jax.random.key(step), 2)


# configuration


def test_configuration() -> None:
    config = make_config("celo")
    assert config.spec.NAME == "celo"
    assert config.spec.hidden_size == 2
    assert config.optimizer.initial == "random"
    assert settings.from_json(config.to_json()) == config
    for name, a in outer.initial_theta(config).items():
        np.testing.assert_array_equal(a, initial_theta(config.spec, config.seed)[name])
    plain = settings.parse("")
    assert isinstance(plain.spec, Spec)
    assert plain.optimizer.initial == "warm"
    assert "any in `lopt_fast.architectures`" in settings.explain()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'architecture = "celoo"',
            r"optimizer\.architecture: 'celoo' is unknown; must be one of small_fc_lopt, ",
        ),
        ('architecture = "adamw"', r"optimizer\.architecture: 'adamw' has no meta-parameters"),
        ('architecture = "celo"\ninitial = "warm"', r"optimizer\.initial: 'warm' is for small_fc_lopt only"),
        (
            'architecture = "celo"\nspec = { width = 3 }',
            r"optimizer\.spec: unknown hyperparameters \['width'\]",
        ),
    ],
)
def test_bad_configuration_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.parse(f"[optimizer]\n{text}")


def test_initial_checkpoint_is_of_the_same_architecture(tmp_path: Path) -> None:
    spec = ARCHITECTURES["nn_adam"].from_dict(SMALL["nn_adam"])
    path = Checkpoint(spec, initial_theta(spec, 3)).save(tmp_path / "mine.safetensors")

    def config(name: str) -> MetaTrainConfig:
        optimizer = {"architecture": name, "spec": SMALL[name], "initial": str(path)}
        return make_config(name, optimizer=optimizer)

    theta = outer.initial_theta(config("nn_adam"))
    np.testing.assert_array_equal(theta["lstm_w"], load(path).theta["lstm_w"])
    with pytest.raises(ConfigError, match="is nn_adam, not celo"):
        outer.initial_theta(config("celo"))


# the outer loop


@pytest.mark.parametrize("name", TRAINED)
def test_outer_steps_of_every_architecture(name: str) -> None:
    loop = Loop(make_config(name))
    before = np.asarray(loop.theta)
    for _ in range(5):
        counts = loop.step()
        assert np.isfinite(counts.loss).all()
        assert not counts.diverged.any()
    after = np.asarray(loop.theta)
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 0
    assert np.isfinite(loop.unrolls.inner.params["w"]).all()


@pytest.mark.parametrize("resets", ["between", "inside"])
def test_optimizers_are_told_length_and_loss(clock: Clock, resets: str) -> None:
    """Each unroll its own length, also in the truncation in which it begins."""
    loop = Loop(make_config(clock.NAME, resets=resets))
    lengths = []
    for _ in range(4):
        loop.step()
        unrolls = loop.unrolls
        seen, made = unrolls.inner.optimizer_state.shared, unrolls.inner.optimizer_state.count
        np.testing.assert_array_equal(made, unrolls.inner.step)
        expected = np.asarray(made * unrolls.length[:, None], np.float32)
        np.testing.assert_allclose(seen["lengths"][..., 0], expected, rtol=1e-6)
        assert (np.asarray(seen["losses"])[np.asarray(made) > 0] > 0).all()
        lengths += np.asarray(unrolls.length).tolist()
    assert min(lengths) >= 4
    assert max(lengths) <= 12
    assert len(set(lengths)) > 1


def test_run_resumes_bit_for_bit_and_its_weights_load(clock: Clock, tmp_path: Path) -> None:
    mesh = one_device()
    config = make_config(clock.NAME, steps=4)
    whole = run(config, [Line()], [], tmp_path / "whole", mesh)
    assert whole.finished
    outcome = _stopped_after(2, config, tmp_path / "parts", mesh)
    assert not outcome.finished
    resumed = run(config, [Line()], [], tmp_path / "parts", mesh, resume=True)
    a, b = load(whole.weights), load(resumed.weights)
    assert a.spec == b.spec == clock
    for name, value in a.theta.items():
        np.testing.assert_array_equal(value, b.theta[name])
    assert np.abs(a.theta["rate"] - 0.1).max() > 0


def _stopped_after(steps: int, config: MetaTrainConfig, folder: Path, mesh: Any) -> Any:
    """A run that is told to stop after so many outer steps."""

    class Stop(Silent):
        def progress(self, report: Report) -> None:
            if report.outer_step == steps:
                os.kill(os.getpid(), signal.SIGTERM)

    return run(config, [Line()], [], folder, mesh, observer=Stop())


# evaluation


def test_evaluation_tells_the_length(clock: Clock) -> None:
    """The rate falls to 0 over the steps of the evaluation: longer runs are not the beginnings of shorter ones."""
    theta = clock.init_theta()
    (few, _), (many, _) = (Evaluator(clock, [Line()], steps, 2)(theta) for steps in (6, 60))
    assert few.last_loss > 1.5 * many.last_loss
    assert np.isfinite(many.mean_loss)


def test_comparison_with_baselines(clock: Clock) -> None:
    checkpoint = Checkpoint(clock, clock.init_theta(), "clock")
    learned = [Learned("clock", checkpoint, "exact", rate) for rate in (1.0, 0.5)]
    plan = Plan(steps=10, horizons=(1, 3), seeds=2, baselines=("adam",), rates=3, timing=False, spike=10.0)
    study = compare([TaskSource(Line(), {})], learned, plan, None)
    assert [c.steps for c in study.comparisons] == [10, 10, 30, 30]
    for c in study.comparisons:
        assert [r.label for r in c.rows] == ["clock, exact", "clock, exact, lr 0.5", "Adam"]
        assert all(r.losses.shape == (2, c.steps) and np.isfinite(r.losses).all() for r in c.rows)
    short, long = (study.comparisons[i].rows[0].losses for i in (0, 2))
    np.testing.assert_allclose(short[:, :2], long[:, :2], rtol=0.1)
    assert (long[:, 9] < short[:, 9]).all()  # their rate is still high
    assert len(study.spikes) == 2 * 3


def test_statistics_that_an_architecture_lacks_are_refused(clock: Clock, tmp_path: Path) -> None:
    path = str(Checkpoint(clock, clock.init_theta()).save(tmp_path / "mine.safetensors"))
    assert [o.label for o in read_learned([path, "adamw"], None, [1.0])] == ["mine, exact", "adamw, exact"]
    with pytest.raises(SpecError, match="clock has 'exact' alone"):
        read_learned([path], "lagged", [1.0])
