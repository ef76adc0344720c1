"""Evaluation: training curves, baselines, tuning and its cache, the command `lopt-fast eval`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Golden, assert_update_close
from typer.testing import CliRunner

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
pytest.importorskip("pydantic")
jnp = jax.numpy

import lopt_fast  # noqa: E402
import lopt_fast.jax  # noqa: E402
from lopt_fast.cli import app  # noqa: E402
from lopt_fast.meta import devices  # noqa: E402
from lopt_fast.meta.evaluation import choices, comparison, curves, evaluate, tuning  # noqa: E402
from lopt_fast.meta.evaluation.baselines import BASELINES, Baseline, NAdamW, describe, draw_nadamw, nadamw  # noqa: E402
from lopt_fast.meta.evaluation.study import Learned, Plan, TaskSource  # noqa: E402
from lopt_fast.meta.tasks import Task  # noqa: E402

CASES = ("cosine", "cosine_nowarm", "default", "wd")


class Line(Task):
    """Two "networks" of two numbers, pulled to noisy targets: small, fast to compile."""

    name = "line"
    initial_loss = 1.0

    def __init__(self, variants: tuple[str, ...] = ("near", "far")) -> None:
        self.variants = variants
        self.data = jnp.arange(1.0, len(variants) + 1)

    def init(self, key: Any) -> Any:
        return {"w": jax.random.normal(key, (2,))}

    def loss(self, params: Any, batch: Any) -> Any:
        return jnp.mean((params["w"] - batch) ** 2)

    def sample(self, data: Any, key: Any, variant: Any) -> Any:
        return data[variant] + 0.1 * jax.random.normal(key, (2,))


@pytest.fixture(scope="module")
def checkpoint() -> lopt_fast.Checkpoint:
    return lopt_fast.load("small_fc_lopt_rms")


@pytest.fixture(scope="module")
def adam() -> evaluate.Simulator:
    """Adam on the small task, compiled once for many tests."""
    return evaluate.Simulator(optax.adam, Line())


@pytest.fixture(scope="module", autouse=True)
def devices_as_they_are() -> Iterator[None]:
    """The command cannot set them any more, once another test has computed something."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "setup", lambda count=None: None)
        yield


class Other(Line):
    """The same, under another name."""

    name = "other"


# ---- baselines ----


def nadamw_settings(meta: dict[str, Any]) -> NAdamW:
    """The hyperparameters of a golden file."""
    given = dict(meta["hyperparameters"])
    rate = given.pop("learning_rate")
    names = {
        "adamw_weight_decay": "weight_decay", "l2_weight_decay": "l2", "use_nesterov": "nesterov",
        "min_learning_rate_mult": "final_fraction",
    }  # fmt: skip
    if isinstance(rate, dict):
        given |= rate["CosineLearningRateSchedule"]
    else:
        given["learning_rate"] = rate
    values = {names.get(k, k): float(v) for k, v in given.items()}
    return NAdamW(**values, num_steps=float(meta["num_steps"]))


@pytest.mark.parametrize("case", CASES)
def test_nadamw_replays_published_trajectories(shared: Path, case: str) -> None:
    golden = Golden(shared / "golden" / f"nadamw_{case}.npz")
    with jax.enable_x64(True):
        params = {name: jnp.asarray(p, jnp.float64) for name, p in golden.params0.items()}
        optimizer = nadamw(nadamw_settings(golden.meta))
        update = jax.jit(optimizer.update)
        state, seen = optimizer.init(params), [params]
        for t in range(golden.meta["n_steps"]):
            grads = {name: jnp.asarray(g[t], jnp.float64) for name, g in golden.grads.items()}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            seen.append(params)
        seen = jax.tree.map(np.asarray, seen)
    for name, p0 in golden.params0.items():
        expected, index = golden.expected64(name)
        mine = np.stack([p[name].reshape(-1) if index is None else p[name].reshape(-1)[index] for p in seen])
        start = p0.astype(np.float64).reshape(-1)
        before = start if index is None else start[index]
        for t, after in enumerate(expected):
            assert_update_close(
                mine[t + 1] - mine[t], after - before, after, "float64", f"{case} {name} step {t}"
            )
            before = after


def test_every_nadamw_file_is_replayed(shared: Path) -> None:
    assert {p.stem for p in (shared / "golden").glob("nadamw_*.npz")} == {f"nadamw_{case}" for case in CASES}


def test_nadamw_draws_are_those_of_the_search_space() -> None:
    draws = draw_nadamw(300, 1000)
    assert draws[:20] == draw_nadamw(20, 1000)
    assert draws[0] != draw_nadamw(1, 1000, seed=1)[0]
    for low, high, values in (
        (1e-5, 1, [d.learning_rate for d in draws]),
        (1e-3, 1, [1 - d.beta1 for d in draws]),
        (1e-5, 1, [1 - d.beta2 for d in draws]),
        (1e-8, 1e4, [d.epsilon for d in draws]),
        (1e-5, 1e-1, [d.weight_decay for d in draws if d.weight_decay]),
        (1e-5, 1e-1, [d.l2 for d in draws if d.l2]),
        (1e-5, 1e-1, [d.warmup_fraction for d in draws if d.warmup_fraction]),
        (1e-5, 1, [d.final_fraction for d in draws if d.final_fraction]),
    ):
        assert low * (1 - 1e-9) <= min(values) < low * (high / low) ** 0.1
        assert low * (high / low) ** 0.9 < max(values) <= high * (1 + 1e-9)
        assert abs(np.mean(np.log(values)) - np.log(low * high) / 2) < 0.1 * np.log(high / low)
    kinds = [(d.weight_decay > 0, d.l2 > 0) for d in draws]
    assert set(kinds) == {(True, False), (False, True), (True, True)}
    for share in (np.mean([d.nesterov for d in draws]), np.mean([d.warmup_fraction > 0 for d in draws])):
        assert 0.4 < share < 0.6


# ---- curves ----


def test_curves_do_not_depend_on_what_runs_beside_them(adam: evaluate.Simulator) -> None:
    rates = [0.01, 0.1, 0.3]
    whole = adam.losses(rates, [0, 1], 60, 3)  # in several rounds, of several calls
    assert whole.shape == (3, 2, 3, 60)
    assert len({loss.tobytes() for loss in whole.reshape(-1, 60)}) == 18  # all differ
    np.testing.assert_array_equal(whole, adam.losses(rates, [0, 1], 60, 3))
    programs = adam._advance._cache_size()
    assert programs == len(adam._sizes)
    np.testing.assert_array_equal(adam.losses(rates[:2], [0, 1], 12, 3), whole[:2, ..., :12])
    assert adam._advance._cache_size() == programs
    one_at_a_time = evaluate.training_losses(optax.adam, rates, Line(), 1, 60, 3, memory=1)
    np.testing.assert_allclose(one_at_a_time, whole[:, 1], rtol=1e-5)


def test_curves_do_not_depend_on_the_number_of_devices(adam: evaluate.Simulator) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from lopt_fast.meta import devices; devices.setup(int(sys.argv[1]))\n"
        "import jax, optax; from lopt_fast.meta.evaluation import evaluate; from test_meta_evaluate import Line\n"
        "assert jax.local_device_count() == int(sys.argv[1])\n"
        "losses = evaluate.training_losses(optax.adam, [0.01, 0.1], Line(), 0, 20, 3)\n"
        "print(' '.join(f'{x:.9g}' for x in losses.ravel()))\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, "3"], capture_output=True, text=True, cwd=root, check=True
    )
    there = np.array([float(x) for x in done.stdout.split()]).reshape(2, 3, 20)
    np.testing.assert_allclose(there, adam.losses([0.01, 0.1], [0], 20, 3)[:, 0], rtol=1e-5)


def test_common_seeds_give_common_networks_and_batches(adam: evaluate.Simulator) -> None:
    task = adam.task
    still = adam.losses([0.0], [1], 3, 2)[0, 0]
    for seed in range(2):
        key = jax.random.key(evaluate.FIRST_SEED + seed)
        params = task.init(jax.random.split(jax.random.fold_in(key, 0))[0])
        for step in range(3):
            batch = task.sample(task.data, jax.random.fold_in(jax.random.fold_in(key, 1), step), 1)
            np.testing.assert_allclose(still[seed, step], task.loss(params, batch), rtol=1e-6)


def test_a_spike_changes_what_follows() -> None:
    simulator = evaluate.Simulator(BASELINES["sgdm"].make, Line(("near",)), spikes=True)
    plain, spiked = simulator.losses([0.1, 0.1], [0], 20, 2, spikes=[(10, 1.0), (10, 50.0)])[:, 0]
    np.testing.assert_array_equal(plain, simulator.losses([0.1], [0], 20, 2)[0, 0])
    np.testing.assert_array_equal(
        plain[:, :11], spiked[:, :11]
    )  # the loss of a step is that before its update
    assert (spiked[:, 11] > plain[:, 11]).all()


def test_diverged_losses_are_bounded_and_counted() -> None:
    task = Line()
    bound = curves.LOSS_CLIP * task.initial_loss
    losses = np.ones((4, 100), np.float32)
    losses[0, 50:] = np.nan
    losses[1, 98:] = np.inf
    losses[2, 10] = 1e6  # recovers
    result = evaluate.summarise(losses, task, 1)
    assert result.diverged == 2
    assert result.dataset == "far"
    by_seed = [(50 + 50 * bound) / 100, (98 + 2 * bound) / 100, (99 + bound) / 100, 1.0]
    assert math.isclose(result.mean_loss, np.mean(by_seed))
    assert math.isclose(result.standard_error, np.std(by_seed, ddof=1) / 2)
    assert math.isclose(result.last_loss, (bound + (3 + 2 * bound) / 5 + 2) / 4)
    assert math.isfinite(evaluate.held_out_score([result]))


def test_smoothed_curves_and_time_to_a_target() -> None:
    losses = np.linspace(1.0, 0.0, 101)[:100].repeat(2).reshape(1, 200)
    width = curves.window(200)
    assert width == 4
    smooth = curves.smoothed(losses)[0]
    for t in (0, 2, 3, 57, 199):
        assert math.isclose(smooth[t], losses[0, max(0, t - width + 1) : t + 1].mean(), abs_tol=1e-12)
    assert curves.steps_to(losses, 2.0) == width
    assert curves.steps_to(losses, -1.0) is None
    at = curves.steps_to(np.concatenate([losses, losses]), 0.5)
    assert at is not None
    assert smooth[at - 1] <= 0.5 < smooth[at - 2]


def test_held_out_score_averages_data_sets_then_tasks() -> None:
    like = evaluate.summarise(np.full((1, 20), 0.5), Line(), 0)
    a = [dataclasses.replace(like, task="a", mean_loss=m, initial_loss=2.0) for m in (1.0, 0.5)]
    b = [dataclasses.replace(like, task="b", mean_loss=3.0, initial_loss=1.0)]
    expected = ((math.log(0.5) + math.log(0.25)) / 2 + math.log(3.0)) / 2
    assert math.isclose(evaluate.held_out_score(a + b), expected)
    with pytest.raises(ValueError, match="no results"):
        evaluate.held_out_score([])


def test_evaluator_is_compiled_once(checkpoint: lopt_fast.Checkpoint) -> None:
    evaluator = evaluate.Evaluator(checkpoint.spec, [Line()], steps=20, seeds=2)
    first = evaluator(checkpoint.theta)
    assert [(r.task, r.dataset, r.steps, r.seeds) for r in first] == [
        ("line", "near", 20, 2),
        ("line", "far", 20, 2),
    ]
    assert evaluator(checkpoint.theta) == first
    changed = evaluator({k: np.zeros_like(v) for k, v in checkpoint.theta.items()})
    assert evaluator._simulators[0]._advance._cache_size() == 1
    assert changed[0].mean_loss > first[0].mean_loss  # no steps are made


# ---- tuning ----


def tune(
    simulator: evaluate.Simulator, baseline: Baseline, folder: Path | None, **changes: Any
) -> dict[tuple[int, int], tuning.Tuned]:
    arguments = {"options": {}, "horizons": [20, 40], "seeds": 2, "rates": 5, "draws": 4, **changes}
    return tuning.tune(
        baseline, simulator, **arguments, cache=None if folder is None else tuning.Cache(folder)
    )


def test_tuning_finds_the_best_and_leaves_the_range_if_it_must(adam: evaluate.Simulator) -> None:
    narrow = dataclasses.replace(BASELINES["adam"], range=(1e-4, 1e-2))
    found = tune(adam, narrow, None)
    assert set(found) == {(v, h) for v in (0, 1) for h in (20, 40)}
    for (v, h), best in found.items():
        assert best.losses.shape == (2, h)
        losses = [loss for _, loss in best.tried]
        rates = [setting["learning_rate"] for setting, _ in best.tried]
        assert rates == sorted(rates)
        assert max(rates) > 1e-2 * 1.001  # it went on where the range of five ended
        assert min(losses) == evaluate.summarise(best.losses, adam.task, v).mean_loss
        assert describe(best.setting) == best.tried[int(np.argmin(losses))][0]
        assert best.edge == ("highest" if rates[-1] == best.setting else "")
        np.testing.assert_array_equal(best.losses, adam.losses([best.setting], [v], h, 2)[0, 0])
    assert found[0, 40].tried[-1][1] < found[0, 20].tried[-1][1]  # more steps, smaller mean loss


def test_tuned_baselines_are_kept(
    adam: evaluate.Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    search = tuning._search
    monkeypatch.setattr(tuning, "_search", lambda *a: runs.append(1) or search(*a))
    simulators = {"adam": adam, "nadamw": evaluate.Simulator(nadamw, Line())}

    def again(name: str) -> dict[tuple[int, int], tuning.Tuned]:
        return tune(simulators[name], BASELINES[name], tmp_path)

    def same(a: dict[Any, tuning.Tuned], b: dict[Any, tuning.Tuned]) -> None:
        assert a.keys() == b.keys()
        for at in a:
            assert (a[at].setting, a[at].tried, a[at].edge) == (b[at].setting, b[at].tried, b[at].edge)
            np.testing.assert_array_equal(a[at].losses, b[at].losses)

    first = {name: again(name) for name in simulators}
    assert len(runs) == 3  # one for both horizons, one for each schedule
    assert isinstance(first["nadamw"][0, 20].setting, NAdamW)
    assert first["nadamw"][0, 20].setting.num_steps == 20
    for name, found in first.items():
        same(found, again(name))
    assert len(runs) == 3
    kept = sorted(tmp_path.glob("line-adam-*.npz"))
    assert len(kept) == 4
    kept[0].write_bytes(kept[0].read_bytes()[:200])
    kept[1].write_bytes(b"")
    kept[2].write_bytes(kept[3].read_bytes())  # whole, but of another key
    same(first["adam"], again("adam"))
    assert len(runs) == 4
    same(first["adam"], again("adam"))
    assert len(runs) == 4
    assert not list(tmp_path.glob(".*"))


def test_the_key_of_the_cache_is_all_that_matters() -> None:
    def key(task: Task, **changes: Any) -> str:
        arguments = {"options": {"a": 1}, "variant": 0, "steps": 20, "seeds": 2, "settings": [0.1], **changes}
        return tuning._digest(tuning._key(BASELINES["adam"], task, **arguments))

    other_data = Line()
    other_data.data = other_data.data + 1e-6
    keys = [
        key(Line()), key(Line(), options={"a": 2}), key(Line(), variant=1), key(Line(), steps=21),
        key(Line(), seeds=3), key(Line(), settings=[0.2]), key(Other()), key(other_data),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(Line()) == keys[0]


# ---- the comparison and the command ----


def test_learned_optimizers_are_those_of_the_public_interface(checkpoint: lopt_fast.Checkpoint) -> None:
    task = Line(("near",))
    learned = [Learned("rms", checkpoint, "exact"), Learned("rms", checkpoint, "exact", 0.1)]
    plan = Plan(steps=8, seeds=1, baselines=(), timing=False)
    study = comparison.compare([TaskSource(task, {})], learned, plan, None)
    (only,) = study.comparisons
    assert [row.label for row in only.rows] == ["rms, exact", "rms, exact, lr 0.1"]
    assert study.transfer() is None
    key = jax.random.key(evaluate.FIRST_SEED)
    for row in only.rows:
        assert row.learned is not None
        tx = lopt_fast.jax.learned_optimizer(checkpoint, row.learned.learning_rate)
        params = task.init(jax.random.split(jax.random.fold_in(key, 0))[0])
        state = tx.init(params)
        for t in range(plan.steps):
            batch = task.sample(task.data, jax.random.fold_in(jax.random.fold_in(key, 1), t), 0)
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            np.testing.assert_allclose(row.losses[0, t], loss, rtol=1e-4)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)


TASKS = f"""
[[task]]
kind = "{Path(__file__)}:Line"
weight = 2.0
reparametrise = {{}}

[truncation]
steps = 7
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A run of the command with everything in it."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "tasks.toml").write_text(TASKS)
    run = folder / "my_run"
    run.mkdir()
    shipped = lopt_fast.load("small_fc_lopt_rms")
    record = {"tasks": ["some_task"], "datasets": {"digits": ""}}
    theta = {name: 0.9 * value for name, value in shipped.theta.items()}
    lopt_fast.Checkpoint(shipped.spec, theta, metadata={"meta_training": record}).save(
        run / "best.safetensors"
    )
    command = f"""eval small_fc_lopt_rms {run} --tasks {folder}/tasks.toml --steps 20 --horizons 1,2 --seeds 2
        --rates 3 --draws 3 --baselines adam,nadamw,adam_default --statistics both --spike 30 --timing
        --cache {folder}/cache --out {folder}/out
        --json {folder}/numbers.json"""
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    return folder, result.output, json.loads((folder / "numbers.json").read_text())


def test_command_tables(evaluated: tuple[Path, str, dict[str, Any]]) -> None:
    _, output, _ = evaluated
    for text in (
        "line, near: 20 steps, 2 seeds", "line, far: 40 steps, 2 seeds", "my_run, lagged",
        "small_fc_lopt_rms, exact", "NAdamW", "gradient of step 10 times 30", "some_task",
        "smallest mean loss in 4 comparisons", "wrote",
    ):  # fmt: skip
        assert text in output, text


def test_command_numbers(evaluated: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, found = evaluated
    assert found == json.loads((folder / "out" / "results.json").read_text())
    learned = ["small_fc_lopt_rms, exact", "small_fc_lopt_rms, lagged", "my_run, exact", "my_run, lagged"]
    assert sorted(o["optimizer"] for o in found["learned"]) == sorted(learned)
    assert {o["trained_on"] for o in found["learned"] if o["name"] == "my_run"} == {"some_task on digits"}
    assert {(c["dataset"], c["steps"]) for c in found["comparisons"]} == {
        (d, n) for d in ("near", "far") for n in (20, 40)
    }
    for c in found["comparisons"]:
        rows = {r["optimizer"]: r for r in c["optimizers"]}
        assert set(rows) == {*learned, "Adam", "NAdamW", "Adam, untuned"}
        assert rows["Adam, untuned"]["hyperparameters"] == {"learning_rate": 1e-3}
        assert c["winner"] == min(rows, key=lambda name: rows[name]["mean_loss"])
        adam = rows["Adam"]
        assert adam["relative_to_adam"] == 1
        for row in rows.values():
            assert math.isclose(row["relative_to_adam"], row["mean_loss"] / adam["mean_loss"])
            assert row["seconds_per_step"] > 0
            if row["steps_to_adam"] is not None:
                assert math.isclose(row["seconds_to_adam"], row["steps_to_adam"] * row["seconds_per_step"])
            assert row["learned"] == (row["hyperparameters"] == {}) == (row["search"] == [])
            assert len(row["curve"]["mean"]) == len(row["curve"]["step"]) == c["steps"]
            assert all(
                low <= high for low, high in zip(row["curve"]["low"], row["curve"]["high"], strict=True)
            )
        assert len(rows["NAdamW"]["search"]) == 3
        assert rows["NAdamW"]["hyperparameters"]["num_steps"] == c["steps"]
    transfer = found["transfer"]
    assert transfer["columns"] == ["line near", "line far"]
    first = {c["dataset"]: c for c in found["comparisons"] if c["steps"] == 20}
    for label, row in zip(transfer["rows"], transfer["relative"], strict=True):
        for c, value in zip(first.values(), row, strict=True):
            assert next(r["relative_to_adam"] for r in c["optimizers"] if r["optimizer"] == label) == value
    assert len(found["spikes"]) == 2 * 7
    assert all(s["step"] == 10 and s["damage"] is not None for s in found["spikes"])


def test_command_plots(evaluated: tuple[Path, str, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    folder, _, _ = evaluated
    plots = sorted(p.name for p in (folder / "out").glob("*.png"))
    assert len(plots) == 5
    assert {"line_near_20.png", "line_far_40.png", "transfer.png"} <= set(plots)
    assert all((folder / "out" / p).read_bytes().startswith(b"\x89PNG") for p in plots)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("small_fc_lopt --baselines adam,lamb", "unknown baseline 'lamb'"),
        ("nowhere.safetensors", "nowhere.safetensors"),
        ("small_fc_lopt small_fc_lopt", "given twice"),
        ("small_fc_lopt --statistics fuzzy", "--statistics fuzzy"),
        ("small_fc_lopt --lr 1,fast", "--lr 1,fast"),
        ("small_fc_lopt --horizons 0", "--horizons 0"),
        ("small_fc_lopt --data cifar10", "give NAME=PATH"),
        ("small_fc_lopt --task juggling", "juggling"),
        ("small_fc_lopt --tasks {tmp}/none.toml", "none.toml"),
        ("small_fc_lopt --tasks {tmp}/empty.toml", "no tasks"),
        ("small_fc_lopt --tasks {tmp}/wrong.toml", "tasks: unknown setting"),
        ("small_fc_lopt --tasks {tmp}/data.toml", "cifar10"),
        ("small_fc_lopt --tasks {tmp}/data.toml --data cifar10={tmp}", "no CIFAR-10"),
    ],
)
def test_command_refuses(tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "empty.toml").write_text("[truncation]\nsteps = 3\n")
    (tmp_path / "wrong.toml").write_text('[[tasks]]\nkind = "mlp"\n')
    (tmp_path / "data.toml").write_text('[[task]]\nkind = "mlp"\ndatasets = ["cifar10"]\nimage_size = 8\n')
    command = ["eval", *arguments.format(tmp=tmp_path).split(), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--cache", str(tmp_path / "cache")])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_tasks_of_a_file(tmp_path: Path) -> None:
    held_out = f"[[held_out]]\nkind = '{Path(__file__)}:Other'\nvariants = ['a', 'b']\n"
    (tmp_path / "tasks.toml").write_text(TASKS + held_out)
    sources = choices.read_tasks(tmp_path / "tasks.toml", ["quadratic"], {})
    assert [s.task.name.partition("_")[0] for s in sources] == ["quadratic", "line", "other"]
    assert sources[1].task.reparametrisation is None
    assert sources[2].task.variants == ("a", "b")
    assert dict(sources[2].options) == {"kind": f"{Path(__file__)}:Other", "variants": ["a", "b"]}
    (tmp_path / "tasks.toml").write_text(held_out)
    assert [s.task.name for s in choices.read_tasks(tmp_path / "tasks.toml", [], {})] == ["other"]


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from lopt_fast.meta.tasks import Quadratic\nclass Mine(Quadratic):\n    pass\n"
    )
    (tmp_path / "tasks.toml").write_text('[[task]]\nkind = "mine.py:Mine"\n')
    (source,) = choices.read_tasks(tmp_path / "tasks.toml", [], {})
    assert source.options["kind"] == f"{tmp_path}/mine.py:Mine"


def test_default_tasks_can_be_made() -> None:
    sources = choices.read_tasks(None, [], {})
    assert len(sources) == len(choices.DEFAULT_TASKS) == len({s.task.name for s in sources})
    for source in sources:
        assert source.options["kind"] in choices.DEFAULT_TASKS
