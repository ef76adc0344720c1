"""The meta-training loop: configuration, outer step, folder of a run, interruption and resumption, the command."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("pydantic")
jnp = jax.numpy

from typer.testing import CliRunner  # noqa: E402

from lopt_fast.checkpoint import CheckpointError, load  # noqa: E402
from lopt_fast.cli import app  # noqa: E402
from lopt_fast.meta import config as settings  # noqa: E402
from lopt_fast.meta import devices  # noqa: E402
from lopt_fast.meta.config import ConfigError, MetaTrainConfig  # noqa: E402
from lopt_fast.meta.outer import OuterLoop, OuterState, initial_theta, warm_start_theta  # noqa: E402
from lopt_fast.meta.run import Report, load_tasks, run  # noqa: E402
from lopt_fast.meta.store import RunError, read_metrics  # noqa: E402
from lopt_fast.meta.tasks import MLP, Dataset, Reparametrisation, Task  # noqa: E402
from lopt_fast.meta.truncation import Lengths, Unrolls, stagger  # noqa: E402
from lopt_fast.meta.unroll import inner_optimizer, sampler, start, unroll  # noqa: E402
from lopt_fast.spec import Spec  # noqa: E402

TOML = """
name = "toy"
[estimator]
name = "{estimator}"
pairs = 4
[truncation]
steps = 5
min_steps = 5
max_steps = 20
[outer]
steps = 6
warmup = 1
[[task]]
kind = "quadratic"
shape = [2, 2]
[evaluation]
every = 3
steps = 10
seeds = 2
[checkpoint]
every = 2
"""


def toy_dataset(seed: int = 0, name: str = "toy") -> Dataset:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 200).astype(np.int32)
    inputs = rng.standard_normal((200, 2, 2, 1)).astype(np.float32)
    inputs[:, 0, 0, 0] += 2.0 * labels
    return Dataset(name, inputs, labels)


def toy_task(**options: Any) -> Task:
    return MLP(
        [toy_dataset(0, "a"), toy_dataset(1, "b")],
        **{"hidden": (4,), "classes": 3, "batch_size": 8, **options},
    )


def toy_config(method: str = "nres", **changes: Mapping[str, Any]) -> MetaTrainConfig:
    config = settings.parse(TOML.format(estimator=method)).model_dump()
    for name, values in changes.items():
        config[name] = {**config[name], **values} if isinstance(values, Mapping) else values
    return MetaTrainConfig.model_validate(config)


class Line(Task):
    """Cheap to compile: a few numbers that are to become 1 or 2."""

    name, variants, initial_loss = "line", ("a", "b"), 3.0

    def init(self, key: Any) -> Any:
        return {"w": 0.1 * jax.random.normal(key, (3,))}

    def loss(self, params: Any, batch: Any) -> Any:
        return jnp.sum((params["w"] - batch) ** 2)

    def sample(self, data: Any, key: Any, variant: Any) -> Any:
        return 1.0 + variant + 0.1 * jax.random.normal(key)


def make_loop(
    config: MetaTrainConfig, task: Task | None = None, count: int = 1
) -> tuple[OuterLoop, OuterState]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), (devices.PAIRS,))
    loop = OuterLoop(config, [task or Line()], mesh)
    return loop, loop.init(initial_theta(config))


# configuration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3", r"steps: unknown setting; known here are name, seed"),
        ("[outer]\nstep = 3", r"outer\.step: unknown setting; known here are steps"),
        ("[outer]\nsteps = 10\nwarmup = 10", r"outer: warmup=10 must be less than steps=10"),
        ('[outer]\noptimizer = "adamm"', r"outer: optimizer='adamm' is not an optimizer of optax"),
        ("[outer]\noptions = { b7 = 1.0 }", r"outer: options=.*b7"),
        ("[outer]\nsteps = 2.5", r"outer\.steps: .*integer"),
        ('[estimator]\nname = "pess"', r"estimator: estimator 'pess': must be one of full_es"),
        ("[estimator]\nstd = 0.0", r"estimator\.std: .*greater than 0"),
        ("[truncation]\nmin_steps = 9\nmax_steps = 3", r"truncation: min_steps=9 is more than max_steps=3"),
        (
            '[estimator]\nname = "nres"\n[truncation]\nresets = "inside"',
            r"inside.*not for the estimator 'nres'",
        ),
        ('[truncation]\nresets = "inside"\nmin_steps = 3\nsteps = 5', r"needs min_steps=3 of at least"),
        ("[optimizer]\nspec = { hidden_size = 1 }", r"optimizer\.spec: hidden_size=1"),
        ("[optimizer]\nspec = { width = 1 }", r"optimizer\.spec: .*width"),
        (
            '[optimizer]\ntrain = ["lstm_*"]',
            r"optimizer\.train: .*'lstm_\*' is none of the meta-parameters w0, b0",
        ),
        ("[optimizer]\ntrain = []", r"optimizer\.train: .*nothing would be trained"),
        ("[[task]]\nhidden = [3]", r"task\.0\.kind: Field required"),
        ("task = []", r"task: .*at least 1"),
        (
            '[[task]]\nkind = "mlp"\n[task.unroll]\nmin = 3',
            r"task\.0\.unroll\.min: unknown .*min_steps, max_steps",
        ),
        ("outer = {", "not TOML"),
    ],
)
def test_bad_configurations_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        settings.read(path)
    assert str(path) in str(caught.value)


def test_explanation_is_a_configuration_with_the_defaults() -> None:
    text = settings.explain()
    values = settings.parse(text).model_dump()
    default = MetaTrainConfig().model_dump()
    for name in ("optimizer", "outer", "truncation", "evaluation", "checkpoint", "seed"):
        assert values[name] == default[name], name
    for before, line in pairwise(text.splitlines()):
        if " = " in line and not line.startswith("#"):
            assert before.startswith("#"), f"{line} is not explained"


def test_configuration_survives_json_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(TOML.format(estimator="pes") + '[data]\ncifar10 = "here"\n')
    config = settings.read(path)
    assert config.data == {"cifar10": str(tmp_path / "here")}
    assert settings.from_json(config.to_json()) == config
    assert config.task[0].options == {"shape": [2, 2]}


def test_task_files_are_relative_to_the_configuration_and_tasks_have_names_of_their_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(
        "from lopt_fast.meta.tasks import Quadratic\nclass Mine(Quadratic):\n    pass\n"
    )
    path = tmp_path / "config.toml"
    path.write_text('[[task]]\nkind = "mine.py:Mine"\n[[task]]\nkind = "quadratic"\n')
    config = settings.read(path)
    assert config.task[0].kind == f"{tmp_path}/mine.py:Mine"
    tasks, held_out = load_tasks(config, {})
    assert tasks[1].name == f"{tasks[0].name}#2"
    assert held_out == ()


# outer step


@pytest.mark.parametrize(
    ("estimator", "scale"),
    [("full_es", "none"), ("truncated_es", "none"), ("pes", "none"), ("nres", "parameter_rms")],
)
def test_outer_steps_are_finite_and_change_theta(estimator: str, scale: str) -> None:
    config = toy_config(estimator, optimizer={"spec": {"scale": scale}})
    loop, state = make_loop(config, toy_task() if estimator == "nres" else Line())
    before = np.asarray(state.theta)
    for _ in range(config.outer.steps):
        state, metrics = loop.step(state, loop.data)
        assert np.isfinite(metrics.tasks[0].loss).all()
        assert metrics.tasks[0].loss.shape == (2,)
        assert not metrics.refused
    assert loop.step._cache_size() == 1  # compiled once
    theta = np.asarray(state.theta)
    assert np.isfinite(theta).all()
    assert (theta != before).mean() > 0.9
    steps = np.asarray(state.unrolls[0].inner.step)
    assert (steps[:, 0] == steps[:, 1]).all()
    if estimator != "full_es":
        assert len(set(steps[:, 0].tolist())) > 1  # pairs are at different points of training


def test_only_named_meta_parameters_are_trained() -> None:
    config = toy_config(optimizer={"train": ["w1", "b*"]})
    before = initial_theta(config)
    loop, state = make_loop(config)
    for _ in range(3):
        state, metrics = loop.step(state, loop.data)
        assert not bool(metrics.refused)
    after = loop.named(state.theta)
    assert after.keys() == before.keys()
    changed = {name for name in before if not np.array_equal(after[name], before[name])}
    assert changed == {"w1", *(name for name in before if name.startswith("b"))}


def test_unrolls_end_between_truncations_at_their_lengths() -> None:
    config = toy_config("pes", truncation={"min_steps": 15, "max_steps": 15, "staggered": False})
    loop, state = make_loop(config)
    seen = []
    for _ in range(6):
        state, _ = loop.step(state, loop.data)
        seen.append(np.asarray(state.unrolls[0].inner.step[:, 0]).tolist())
    assert seen == [[5] * 4, [10] * 4, [0] * 4] * 2


def test_unrolls_end_inside_truncations_at_their_lengths() -> None:
    config = toy_config(
        "pes", truncation={"min_steps": 7, "max_steps": 7, "staggered": False, "resets": "inside"}
    )
    loop, state = make_loop(config)
    seen = []
    for _ in range(4):
        state, _ = loop.step(state, loop.data)
        seen.append(int(state.unrolls[0].inner.step[0, 0]))
    # 7 steps and a reset in their place make 8: after 5, 10, 15, 20 steps.
    assert seen == [5, 2, 7, 4]


def test_staggered_unrolls_end_one_after_the_other() -> None:
    length = jnp.full(4, 100, jnp.int32)
    spread = stagger(Unrolls(None, None, length), jnp.arange(4), 4, 10).length
    assert spread.tolist() == [25, 50, 75, 100]
    assert stagger(Unrolls(None, None, length), jnp.arange(4), 4, 60).length.tolist() == [60, 60, 75, 100]


def test_lengths_are_log_uniform() -> None:
    drawn = np.asarray(Lengths(10, 1000).sample(jax.random.split(jax.random.key(0), 4000)))
    assert drawn.min() >= 10
    assert drawn.max() <= 1000
    assert abs(np.mean(drawn < 100) - 0.5) < 0.03
    assert set(np.asarray(Lengths(7, 7).sample(jax.random.split(jax.random.key(0), 9))).tolist()) == {7}


class Exploding(Task):
    """The loss of some networks is not finite, or huge."""

    name, variants, initial_loss = "exploding", ("a", "b"), 1.0

    def init(self, key: Any) -> Any:
        return {"w": jax.random.normal(key, (3,))}

    def loss(self, params: Any, batch: Any) -> Any:
        x = jnp.sum(params["w"] ** 2) + 0.0 * batch
        return jnp.where(x > 3, jnp.nan, jnp.where(x > 2, 1e30, x))

    def sample(self, data: Any, key: Any, variant: Any) -> Any:
        return jnp.zeros(())


def test_divergence_is_clipped_counted_and_started_anew() -> None:
    config = toy_config("pes", estimator={"pairs": 16})
    loop, state = make_loop(config, Exploding())
    shares = []
    for _ in range(6):
        state, metrics = loop.step(state, loop.data)
        assert np.isfinite(metrics.gradient_norm)
        assert (np.asarray(metrics.tasks[0].loss) <= 1.5 + 1e-6).all()
        shares.append(float(np.mean(metrics.tasks[0].diverged)))
    assert max(shares) > 0.1
    assert np.isfinite(state.theta).all()
    # A pair whose losses are NaN has nothing to tell: it does not wait for the end of its unroll.
    params = np.asarray(state.unrolls[0].inner.params["w"])
    assert np.isfinite(params).all()


def test_gradient_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lopt_fast.meta.estimators import PES

    estimate = PES.estimate
    monkeypatch.setattr(
        PES, "estimate", lambda *a: (e := estimate(*a))._replace(gradient=e.gradient * jnp.nan)
    )
    loop, state = make_loop(toy_config("pes"))
    before = np.asarray(state.theta)
    state, metrics = loop.step(state, loop.data)
    assert metrics.refused
    np.testing.assert_array_equal(np.asarray(state.theta), before)
    assert int(state.outer_step) == 1


def test_reparametrised_task_trains_and_weights_matter() -> None:
    task = Line()
    task.reparametrisation = Reparametrisation("tensor", 0.1, 10.0)
    loop, state = make_loop(toy_config(), task)
    state, metrics = loop.step(state, loop.data)
    assert np.isfinite(metrics.gradient_norm)
    table = {**toy_config().model_dump()["task"][0], "data_weights": {"c": 1.0}}
    with pytest.raises(ConfigError, match=r"data_weights for \['c'\], but it has a, b"):
        make_loop(toy_config(task=(table,)))


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ConfigError, match="pairs=1, but it has 2 data sets"):
        make_loop(toy_config(estimator={"pairs": 1}))


def test_checkpoint_to_start_from_must_fit() -> None:
    config = toy_config(optimizer={"initial": "small_fc_lopt", "spec": {"hidden_size": 8}})
    with pytest.raises(ConfigError, match="small_fc_lopt has other meta-parameters"):
        initial_theta(config)
    theta = initial_theta(toy_config(optimizer={"initial": "small_fc_lopt"}))
    np.testing.assert_array_equal(theta["w0"], load("small_fc_lopt").theta["w0"])


@pytest.mark.parametrize("layers", [1, 2])
def test_warm_start_trains(layers: int) -> None:
    task = toy_task()
    spec = Spec(hidden_layers=layers, step_mult=0.01)
    theta = {k: jnp.asarray(v) for k, v in warm_start_theta(spec, 3.0, 0).items()}
    optimizer = inner_optimizer(spec, theta, 4)
    keys, draw = jax.random.split(jax.random.key(1), 60), sampler(task, task.data, jnp.asarray(0))
    _, losses = unroll(task, optimizer, start(task, optimizer, jax.random.key(0)), keys, draw)
    assert losses[-10:].mean() < 0.7 * losses[:5].mean()


# a run and its folder


class Killed(Exception):
    pass


class Recorder:
    """An observer that may end the run in the middle."""

    def __init__(self, kill_at: int | None = None, signal_at: int | None = None) -> None:
        self.kill_at, self.signal_at, self.reports, self.said = kill_at, signal_at, [], []

    def progress(self, report: Report) -> None:
        self.reports.append(report)
        if report.outer_step == self.kill_at:
            raise Killed
        if report.outer_step == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def scalars(self, outer_step: int, values: Mapping[str, float]) -> None:
        assert all(np.isfinite(v) for v in values.values())

    def say(self, message: str) -> None:
        self.said.append(message)


def go(config: MetaTrainConfig, out: Path, **options: Any) -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (devices.PAIRS,))
    return run(config, [Line()], [], out, mesh, **options)


def test_interrupted_runs_end_as_uninterrupted_ones(tmp_path: Path) -> None:
    config = toy_config("pes")
    whole = go(config, tmp_path / "whole")
    assert whole.finished
    parts = tmp_path / "parts"
    with pytest.raises(Killed):
        go(config, parts, observer=Recorder(kill_at=3))
    with pytest.raises(RunError, match="--resume"):
        go(config, parts)
    stopped = go(config, parts, resume=True, observer=Recorder(signal_at=4))
    assert (stopped.finished, stopped.outer_step) == (False, 5)
    resumed = go(config, parts, resume=True)
    assert resumed.finished
    for name in ("weights", "best"):
        a, b = load(getattr(whole, name)).theta, load(getattr(resumed, name)).theta
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "whole", parts)]
    for lines in logs:
        assert [line["evaluation"]["outer_step"] for line in lines if "evaluation" in line] == [3, 6]
        shown = [line["outer_step"] for line in lines if "seconds" in line]
        assert shown == sorted(set(shown))
    scores = [[x["evaluation"]["score"] for x in lines if "evaluation" in x] for lines in logs]
    assert scores[0] == scores[1]
    assert resumed.progress.inner_steps == whole.progress.inner_steps


def test_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    config = toy_config()
    with pytest.raises(Killed):
        go(config, tmp_path, observer=Recorder(kill_at=3))
    before = {name: (tmp_path / name).read_bytes() for name in ("state.npz", "weights.safetensors")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2500, limits[1])
    )  # enough for the configuration, not for a state
    try:
        with pytest.raises((OSError, CheckpointError), match="File too large"):
            go(config, tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not list(tmp_path.glob(".*.tmp"))
    assert go(config, tmp_path, resume=True).finished


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    config = toy_config()
    with pytest.raises(Killed):
        go(config, tmp_path, observer=Recorder(kill_at=3))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(RunError, match=r"outer was .*1e-0?5.* and is"):
        go(toy_config(outer={"final_learning_rate": 1e-4}), tmp_path, resume=True)
    (tmp_path / "state.npz").write_bytes(before["state.npz"][:-100])
    with pytest.raises(RunError, match=r"state\.npz cannot be read"):
        go(config, tmp_path, resume=True)
    assert (tmp_path / "config.json").read_bytes() == before["config.json"]


def test_shipped_form_of_the_weights_records_how_they_were_made(tmp_path: Path) -> None:
    outcome = go(toy_config(), tmp_path)
    best = load(outcome.best)
    record = best.metadata["meta_training"]
    assert record["outer_steps"] == outcome.progress.best_step
    assert record["configuration"]["estimator"]["name"] == "nres"
    assert set(record["datasets"]) == {"a", "b"}
    assert load(outcome.weights).spec == toy_config().spec


# the command


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in this process, where JAX has long begun."""
    monkeypatch.setattr(devices, "setup", lambda *arguments: None)


def write_config(folder: Path, text: str = TOML) -> Path:
    path = folder / "config.toml"
    path.write_text(text.format(estimator="nres"))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lopt_fast.cli", "meta-train", *map(str, arguments)]


def finish(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240)


def wait_for_checkpoint(state: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a checkpoint was written for the second time."""
    first: int | None = None
    for _ in range(2400):
        if state.exists():
            now = state.stat().st_mtime_ns
            first = first or now
            if now != first:
                return
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.05)
    raise AssertionError("no checkpoint")


def test_kill_and_resume_give_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    text = (
        TOML.replace("steps = 6", "steps = 400")
        .replace("every = 2", "every = 20")
        .replace("every = 3", "every = 150")
    )
    config = write_config(tmp_path, text)
    arguments = (config, "--devices", 2, "--out")
    process = subprocess.Popen(
        command(*arguments, tmp_path / "b"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_checkpoint(tmp_path / "b" / "state.npz", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder, more in (("a", ()), ("b", ("--resume",))):
        done = finish(*arguments, tmp_path / folder, *more)
        assert done.returncode == 0, done.stderr
    for name in ("weights", "best"):
        a, b = (load(tmp_path / f / f"{name}.safetensors").theta for f in "ab")
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert (tmp_path / "b" / "meta_loss.png").read_bytes().startswith(b"\x89PNG")


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    config = write_config(tmp_path, TOML.replace("steps = 6", "steps = 100000"))
    out = tmp_path / "run"
    process = subprocess.Popen(command(config, "--out", out), stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(out / "state.npz", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "--resume" in errors
    assert load(out / "weights.safetensors").metadata["meta_training"]["outer_steps"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[outer]\nstep = 3", "outer.step: unknown setting"),
        ('[[task]]\nkind = "mlp"\ndatasets = ["cifar10"]', "--data cifar10="),
        ('[[task]]\nkind = "mlp"\ndatasets = ["cifar10"]\n[data]\ncifar10 = "nowhere"', "nowhere"),
        ('[[task]]\nkind = "mlpp"', "mlpp"),
        ('[[task]]\nkind = "mlp"\nhiden = [3]', "hiden"),
        ('[optimizer]\ninitial = "nowhere.safetensors"', "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_used_ends_the_command_before_anything_is_written(
    text: str, message: str, tmp_path: Path, begun: None
) -> None:
    config = write_config(tmp_path, text)
    result = CliRunner().invoke(app, ["meta-train", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", "")
    assert not (tmp_path / "run" / "state.npz").exists()


def test_command_needs_a_configuration_and_explains_it() -> None:
    assert CliRunner().invoke(app, ["meta-train"]).exit_code == 2
    result = CliRunner().invoke(app, ["meta-train", "--explain"])
    assert result.exit_code == 0
    assert "[estimator]" in result.output


def test_numbers_as_json(tmp_path: Path, begun: None) -> None:
    config = write_config(tmp_path)
    numbers = tmp_path / "numbers.json"
    result = CliRunner().invoke(
        app, ["meta-train", str(config), "--out", str(tmp_path / "run"), "--json", str(numbers)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(numbers.read_text())
    assert (found["outer_step"], found["finished"], found["inner_steps"]) == (6, True, 6 * 2 * 4 * 5)
