"""Inner tasks: each kind learns, batched and compiled; options, data sets and errors; a user's own class."""

from __future__ import annotations

import dataclasses
import re
import struct
import textwrap
import tomllib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy

from lopt_fast import data  # noqa: E402
from lopt_fast.meta import tasks  # noqa: E402
from lopt_fast.meta.tasks.conv import convolve  # noqa: E402
from lopt_fast.meta.unroll import sampler, start, unroll  # noqa: E402


def images(name: str, seed: int, channels: int = 3, size: int = 8) -> tasks.Dataset:
    """Images whose brightness says the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 120)
    x = rng.integers(0, 100, (120, size, size, channels)) + 70 * labels[:, None, None, None]
    return tasks.Dataset(name, x.astype(np.uint8), labels)


def text(name: str, seed: int) -> tasks.Text:
    return tasks.Text(name, np.random.default_rng(seed).integers(97, 101, 900).astype(np.uint8))


IMAGES = [images("a", 0), images("b", 1)]
TEXTS = [text("a", 0), text("b", 1)]


def small_tasks() -> list[tasks.Task]:
    """One of each kind, small enough to compile in about a second; names as ids."""
    return [
        tasks.MLP(IMAGES, image_size=4, hidden=(8,), classes=3, batch_size=16),
        tasks.Conv(IMAGES, channels=(4, 6), classes=3, batch_size=16),
        tasks.Autoencoder(IMAGES, image_size=4, hidden=(8,), classes=3, batch_size=16),
        tasks.LSTM(TEXTS, width=12, embedding=6, context=8, batch_size=8),
        tasks.Transformer(TEXTS, width=12, layers=1, heads=2, context=8, batch_size=8),
        tasks.Quadratic(shape=(4, 3), condition=4.0, noise=0.01),
    ]


every_kind = pytest.mark.parametrize("task", small_tasks(), ids=lambda t: t.name)


def test_small_tasks_are_all_kinds() -> None:
    assert [type(t) for t in small_tasks()] == list(tasks.KINDS.values())


@every_kind
def test_learns_under_vmap_over_seeds_and_variants(task: tasks.Task) -> None:
    """Four seeds of each variant in one program: losses start near `initial_loss` and fall, every parameter moves."""
    optimizer, steps, seeds = optax.adam(2e-2), 60, 4
    variants = jnp.repeat(jnp.arange(len(task.variants)), seeds)

    def train(data: Any, key: Any, variant: Any) -> Any:
        init, batches = jax.random.split(key)
        before = start(task, optimizer, init)
        draw = sampler(task, data, variant)
        after, losses = unroll(task, optimizer, before, jax.random.split(batches, steps), draw)
        return before.params, after.params, losses

    keys = jax.random.split(jax.random.key(0), len(variants))
    before, after, losses = jax.jit(jax.vmap(train, (None, 0, 0)))(task.data, keys, variants)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(before)]
    for name, p, q in zip(paths, jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert p.dtype == jnp.float32, name
        assert jnp.isfinite(q).all(), name  # so all gradients were
        assert (p != q).any(), name
    assert losses.shape == (len(variants), steps)
    assert jnp.isfinite(losses).all()
    assert 0.7 * task.initial_loss < losses[:, 0].mean() < 1.5 * task.initial_loss
    assert (losses[:, -5:].mean(1) < 0.85 * losses[:, :3].mean(1)).all()
    assert len(set(losses[:, 0].tolist())) == len(variants)  # each has its own network and batches


@every_kind
def test_batch_is_drawn_from_the_argument(task: tasks.Task) -> None:
    """Shapes and types; equal keys give equal batches; no data are constants of the program."""
    shapes = {
        tasks.MLP: [((16, 4, 4, 1), jnp.float32), ((16,), jnp.int32)],
        tasks.Conv: [((16, 8, 8, 3), jnp.float32), ((16,), jnp.int32)],
        tasks.Autoencoder: [((16, 4, 4, 1), jnp.float32), ((16,), jnp.int32)],
        tasks.LSTM: [((8, 9), jnp.int32)],
        tasks.Transformer: [((8, 9), jnp.int32)],
        tasks.Quadratic: [((15,), jnp.float32)],
    }
    sample = jax.jit(task.sample)
    batch = sample(task.data, jax.random.key(0), 0)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(batch)] == shapes[type(task)]
    again, other = (sample(task.data, jax.random.key(k), 0) for k in (0, 1))
    for a, b, c in zip(*map(jax.tree.leaves, (batch, again, other)), strict=True):
        assert (a == b).all()
        assert (a != c).any()
    program = jax.make_jaxpr(sample)(task.data, jax.random.key(0), 0)
    inner = [e.params["jaxpr"].consts for e in program.jaxpr.eqns if hasattr(e.params.get("jaxpr"), "consts")]
    assert sum(np.size(c) for c in [*program.consts, *(c for consts in inner for c in consts)]) == 0
    zeros = jax.tree.map(jnp.zeros_like, task.data)
    assert all(
        (a == 0).all()
        for a in jax.tree.leaves(jax.tree.map(lambda x: x * 0, sample(zeros, jax.random.key(0), 0)))
    )


def test_variants_draw_from_their_own_data() -> None:
    sets = [
        tasks.Dataset(n, np.full((k, 2, 2, 1), v, np.float32), np.full(k, v))
        for n, k, v in (("a", 5, 0), ("b", 9, 1))
    ]
    task = tasks.MLP(sets, batch_size=64)
    for variant in (0, 1):
        x, y = task.sample(task.data, jax.random.key(0), jnp.asarray(variant))
        assert (x == variant).all()
        assert (y == variant).all()
    texts = [tasks.Text("a", np.full(9, 7, np.uint8)), tasks.Text("b", np.full(30, 8, np.uint8))]
    lm = tasks.LSTM(texts, context=8)
    for variant in (0, 1):
        assert (lm.sample(lm.data, jax.random.key(0), jnp.asarray(variant)) == 7 + variant).all()


def test_every_image_and_every_byte_can_be_drawn() -> None:
    x = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1)
    task = tasks.MLP([tasks.Dataset("a", x, np.arange(7))], batch_size=500)
    inputs, labels = task.sample(task.data, jax.random.key(0), jnp.asarray(0))
    assert set(np.asarray(labels).tolist()) == set(range(7))
    assert (inputs.ravel() == labels).all()
    lm = tasks.LSTM([tasks.Text("a", np.arange(10, dtype=np.uint8))], context=4, batch_size=500)
    pieces = np.asarray(lm.sample(lm.data, jax.random.key(0), jnp.asarray(0)))
    assert set(pieces[:, 0].tolist()) == set(range(6))
    assert (np.diff(pieces) == 1).all()


def test_images_are_standardised_the_same_way_as_bytes_or_float() -> None:
    """Native images stay uint8 on the device; what a network sees is what `standardise` makes."""
    both = tasks.MLP(IMAGES, classes=3, batch_size=40)
    assert both.data["inputs"].dtype == jnp.uint8
    for variant, d in enumerate(IMAGES):
        expected = data.standardise(d.inputs)
        x, y = both.sample(both.data, jax.random.key(3), jnp.asarray(variant))
        index = jax.random.randint(jax.random.key(3), (40,), 0, len(d.labels))
        np.testing.assert_allclose(x, expected[index], atol=1e-5)
        np.testing.assert_array_equal(y, d.labels[index])
    pooled = tasks.MLP(IMAGES, image_size=4, classes=3)
    grey = data.standardise(data.average_pool(data.grey(IMAGES[1].inputs), 4))
    np.testing.assert_array_equal(pooled.data["inputs"][120:], grey)
    assert tasks.MLP(IMAGES, image_size=4, grey=False, classes=3).image_shape == (4, 4, 3)
    assert tasks.MLP(IMAGES, grey=True, classes=3).image_shape == (8, 8, 1)


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (8, 2), (7, 2)])
def test_convolution_is_that_of_jax(size: int, stride: int) -> None:
    """Value and both derivatives, to 1e-5 of the largest."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, size, size, 3)), jax.random.normal(keys[1], (3, 3, 3, 5))
    out = jax.random.normal(keys[2], (2, -(-size // stride), -(-size // stride), 5))

    def theirs(x: Any, kernel: Any) -> Any:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=dims)

    @jax.jit
    def both(x: Any, kernel: Any, out: Any) -> Any:
        results = []
        for f in (lambda x, kernel: convolve(x, kernel, stride), theirs):
            value, vjp = jax.vjp(f, x, kernel)
            results.append((value, *vjp(out)))
        return results

    for a, b in zip(*both(x, kernel, out), strict=True):
        assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()


@pytest.mark.parametrize("task_class", [tasks.LSTM, tasks.Transformer])
def test_language_models_are_causal_and_remember(task_class: Any) -> None:
    """Predictions do not depend on what follows, and the last one does on the first byte."""
    task = task_class(TEXTS, width=8, context=5)
    params = task.init(jax.random.key(0))
    params["embedding"] = params["embedding"] / params["embedding"].std()
    shorter = dict(params, positions=params["positions"][:4]) if "positions" in params else params

    @jax.jit
    def losses(tokens: Any) -> Any:
        """(256,) summed losses of `tokens` with each byte as the last."""
        every = jax.vmap(lambda byte: tokens.at[-1].set(byte))(jnp.arange(256))
        return 5 * jax.vmap(lambda t: task.loss(params, t[None]))(every)

    tokens = jnp.array([3, 141, 59, 26, 53, 0])
    # The likelihoods of the last byte sum to 1; what is left is the loss of the others, with the fifth as an input.
    of_others = -jax.nn.logsumexp(-losses(tokens))
    alone = 4 * jax.jit(task.loss)(shorter, tokens[None, :5])
    assert jnp.abs(of_others - alone) <= 1e-4 * alone
    last, changed = (jax.nn.softmax(-losses(t)) for t in (tokens, tokens.at[0].set(4)))
    assert jnp.abs(last - changed).max() > 1e-5


def test_conv_net_of_the_paper_and_perceptrons() -> None:
    """Sizes of the published tasks, counted by hand."""

    def count(task: tasks.Task) -> int:
        return sum(a.size for a in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))

    cifar, fashion = images("cifar10", 0, 3, 32), images("fashion_mnist", 0, 1, 28)
    conv = tasks.Conv([cifar])
    assert conv.strides == (2, 1, 1)
    assert count(conv) == (9 * 3 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 64 + 65 * 10
    assert conv.name == "conv_32x32_3-32-64-64-10"
    assert tasks.Conv([cifar], channels=(4, 4), strides=(2, 2)).name == "conv_32x32_3-4-4-10_strides2-2"
    assert count(tasks.MLP([fashion], hidden=(128, 128))) == 785 * 128 + 129 * 128 + 129 * 10
    small = tasks.MLP([cifar, fashion], image_size=8)
    assert small.name == "mlp_64-32-10"
    assert count(small) == 65 * 32 + 33 * 10
    assert count(tasks.LSTM(TEXTS)) == 256 * 64 + 193 * 512 + 2 * 128 + 129 * 256
    assert tasks.LSTM(TEXTS).name == "lstm_64-128"
    assert tasks.LSTM(TEXTS, context=16).name == "lstm_64-128_context16"
    assert tasks.MLP([fashion], hidden=(), batch_size=7).name == "mlp_784-10_batch_size7"


def test_reparametrisation() -> None:
    """The loss at the start is unchanged, an SGD step is multiplied by c, and there are as many c as the level says."""
    task = tasks.MLP(IMAGES, image_size=4, hidden=(8,), classes=3, batch_size=16)

    def step(reparametrisation: tasks.Reparametrisation | None) -> tuple[Any, Any, Any]:
        """(state before, parameters' change, loss); from the same key."""
        task.reparametrisation = reparametrisation

        def run(key: Any) -> Any:
            state = start(task, optax.sgd(1.0), key)
            after, loss = unroll(
                task, optax.sgd(1.0), state, key[None], sampler(task, task.data, jnp.asarray(0))
            )
            return state, jax.tree.map(jnp.subtract, after.params, state.params), loss

        return jax.jit(run)(jax.random.key(5))

    plain, plain_steps, plain_loss = step(None)
    leaves = jax.tree.leaves(plain.params)
    different = {"global": 1, "tensor": len(leaves), "parameter": sum(x.size for x in leaves)}
    for level in get_args(tasks.Level):
        state, steps, loss = step(tasks.Reparametrisation(level, 0.01, 100.0))
        np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
        drawn = np.concatenate([np.ravel(c) for c in jax.tree.leaves(state.scale)])
        assert len(set(drawn.tolist())) == different[level]
        assert drawn.min() >= 0.0099
        assert drawn.max() <= 101.0
        trees = (plain.params, state.params, plain_steps, steps, state.scale)
        for p, q, moved, scaled_moved, c in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(q * c, p, rtol=1e-6)
            # A step is the difference of two parameters: it is known to the rounding of these.
            rounding = 1e-6 * (jnp.abs(q) + jnp.abs(c * moved) + c * (jnp.abs(p) + jnp.abs(moved)))
            assert (jnp.abs(scaled_moved - c * moved) <= 1e-4 * jnp.abs(c * moved) + rounding).all()


def test_quadratics_have_random_curvatures() -> None:
    """Every unroll has its own, over the whole range; the loss of each is the mean over elements."""
    task = tasks.Quadratic(shape=(20, 30), condition=1e4)
    assert task.reparametrisation is not None
    states = [start(task, optax.sgd(0.1), jax.random.key(k)) for k in (0, 1)]
    curvatures = []
    for state in states:

        def loss(p: Any, scale: Any = state.scale) -> Any:
            return task.loss(jax.tree.map(jnp.multiply, p, scale), task.data["targets"])

        # of a diagonal quadratic: difference of gradients over difference of points
        gradient = jax.grad(loss)
        step = jax.tree.map(jnp.ones_like, state.params)
        h = jax.tree.map(
            jnp.subtract, gradient(jax.tree.map(jnp.add, state.params, step)), gradient(state.params)
        )
        curvatures.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(h)]) * 630)
    for h in curvatures:
        assert 1e-2 * 0.9 < h.min() < 2e-2
        assert 50 < h.max() < 1e2 * 1.1
    assert (curvatures[0] != curvatures[1]).mean() > 0.99


def test_make_with_data_of_the_machine() -> None:
    """`digits` and `stdlib` need no files; a source is read once in a process."""
    mlp = tasks.make("mlp", {"hidden": [5, 4]}, {})
    assert mlp.name == "mlp_64-5-4-10"
    assert mlp.variants == ("digits",)
    assert isinstance(mlp, tasks.MLP)
    again = tasks.make("autoencoder", {}, {})
    assert isinstance(again, tasks.Autoencoder)
    assert again.datasets[0].inputs is mlp.datasets[0].inputs


def test_make_with_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, values in (
        ("train-images-idx3-ubyte", rng.integers(0, 256, (20, 28, 28), np.uint8)),
        ("train-labels-idx1-ubyte", rng.integers(0, 10, 20).astype(np.uint8)),
    ):
        head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
        (tmp_path / name).write_bytes(head + values.tobytes())
    (tmp_path / "a.txt").write_text("a text of more than thirty-two bytes, which is the default")
    (tmp_path / "data_batch_1.bin").write_bytes(rng.integers(0, 10, 3 * 3073).astype(np.uint8).tobytes())
    where = dict.fromkeys(("mnist", "cifar10"), tmp_path) | {"mine": tmp_path / "a.txt"}
    scale = tasks.Reparametrisation("global")
    task = tasks.make("mlp", {"datasets": ["mnist", "cifar10", "digits"], "image_size": 8}, where, scale)
    assert task.variants == ("mnist", "cifar10", "digits")
    assert task.name == "mlp_64-32-10"
    assert task.reparametrisation is scale
    assert tasks.make("lstm", {"datasets": ["mine"]}, where).variants == ("mine",)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("perceptron", {}, r"'perceptron'.*mlp, conv, autoencoder, lstm, transformer, quadratic.*file\.py:Class"),
        ("mlp", {"hiden": [3]}, "'mlp' has no option 'hiden'; known are.*hidden"),
        ("mlp", {"hidden": 3}, "hidden=3 must be a list, each item an integer"),
        ("mlp", {"hidden": [3.5]}, "must be a list, each item an integer"),
        ("mlp", {"hidden": [0]}, r"'mlp': hidden\[0\]=0: must be at least 1"),
        ("mlp", {"batch_size": "many"}, "batch_size='many' must be an integer"),
        ("mlp", {"batch_size": True}, "must be an integer"),
        ("mlp", {"batch_size": 0}, "batch_size=0"),
        ("mlp", {"image_size": "8"}, "image_size='8' must be an integer"),
        ("mlp", {"grey": 1}, "grey=1 must be true or false"),
        ("mlp", {"classes": 9}, "digits: labels 0 to 9 for classes=9"),
        ("mlp", {"datasets": "digits"}, "datasets='digits' must be a list of names"),
        ("mlp", {"datasets": []}, "datasets is empty"),
        ("conv", {"channels": []}, "channels is empty"),
        ("conv", {"strides": [1]}, "1 strides for 3 channels"),
        ("transformer", {"heads": 5}, "width=96: must be a multiple of heads=5"),
        ("transformer", {"context": 10**9}, "stdlib has .* bytes: context=1000000000 needs more"),
        ("quadratic", {"datasets": ["digits"]}, "no option 'datasets'"),
        ("quadratic", {"shape": [3]}, "must be .rows, columns."),
        ("quadratic", {"condition": 0.5}, "condition=0.5"),
        ("quadratic", {"noise": float("nan")}, "noise=nan"),
        ("no_such_module_of_mine:Task", {}, "cannot import no_such_module_of_mine"),
        ("missing.py:Task", {}, r"no file .*missing\.py"),
        ("json:JSONDecoder", {}, "no class JSONDecoder that derives from"),
    ],
)  # fmt: skip
def test_errors_name_the_culprit(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(tasks.TaskError, match=message):
        tasks.make(kind, options, {})


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(tasks.TaskError, match=r"one shape.*'a': .8, 8, 3.*'c': .8, 8, 1.*set image_size"):
        tasks.MLP([IMAGES[0], images("c", 2, 1)], classes=3)
    with pytest.raises(tasks.TaskError, match="a: 3 inputs, 2 labels"):
        tasks.MLP([tasks.Dataset("a", np.zeros((3, 2, 2, 1), np.float32), np.zeros(2, int))])


def test_missing_source_says_how_to_give_it(tmp_path: Path) -> None:
    for kind, name in (("mlp", "cifar10"), ("conv", "fashion_mnist"), ("lstm", "shakespeare")):
        with pytest.raises(data.DataError, match=rf"'{name}'.*\[data\].*--data {name}=PATH"):
            tasks.make(kind, {"datasets": [name]}, {})
        with pytest.raises(data.DataError, match="nowhere"):
            tasks.make(kind, {"datasets": [name]}, {name: tmp_path / "nowhere"})


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (root / "docs" / "tasks.md").read_text(), re.DOTALL)


def test_the_documented_task_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the table of docs/tasks.md, as they are printed there."""
    monkeypatch.chdir(tmp_path)
    (source,) = blocks(root, "python")
    (tmp_path / "my_tasks.py").write_text(source)
    table = tomllib.loads(blocks(root, "toml")[0])["task"][0]
    options = {k: v for k, v in table.items() if k not in ("kind", "weight")}
    task = tasks.make(table["kind"], options, {})
    assert task.name == "sine_32_2"
    assert task.initial_loss == 2.0
    assert type(task) is type(tasks.make(table["kind"], {}, {}))
    optimizer = optax.adam(1e-2)

    def train(data: Any, key: Any, variant: Any) -> Any:
        draw = sampler(task, data, variant)
        return unroll(task, optimizer, start(task, optimizer, key), jax.random.split(key, 300), draw)[1]

    keys = jax.random.split(jax.random.key(0), 2)
    losses = jax.jit(jax.vmap(train, (None, 0, 0)))(task.data, keys, jnp.arange(2))
    assert (losses[:, -10:].mean(1) < 0.5 * losses[:, 0]).all()
    with pytest.raises(
        tasks.TaskError, match="no option 'frequency'; known are amplitude, width, batch_size"
    ):
        tasks.make(table["kind"], {"frequency": 1}, {})
    with pytest.raises(tasks.TaskError, match=r"width=3\.5 must be an integer"):
        tasks.make(table["kind"], {"width": 3.5}, {})


def test_the_documented_options_are_all_options(root: Path) -> None:
    """Each kind's row and the two paragraphs below name every option with its default."""
    documentation = (root / "docs" / "tasks.md").read_text()
    for kind, task_class in tasks.KINDS.items():
        (row,) = (line for line in documentation.splitlines() if line.startswith(f"| `{kind}` |"))
        shared = re.findall(r"^- \*(images|text)\*: (.*?)(?=^- |^$)", documentation, re.DOTALL | re.MULTILINE)
        words = row + " ".join(body for title, body in shared if title in row)
        for option in dataclasses.fields(task_class):
            assert f"`{option.name}`" in words, f"{kind}: {option.name}"
            if option.name == "datasets":
                default: Any = task_class.default_datasets
            else:
                default = option.default
            if default is None:
                continue
            said = re.search(rf"`{option.name}` (\[.*?\]|\d[\de]*)", words)
            assert said is not None, f"{kind}: {option.name}"
            value = tomllib.loads(f"x = {said[1]}")["x"]
            assert (tuple(value) if isinstance(value, list) else value) == default, f"{kind}: {option.name}"


def test_own_class_on_images(tmp_path: Path) -> None:
    """A class that derives from a built-in base has its options and its data sets."""
    path = tmp_path / "own.py"
    path.write_text(
        textwrap.dedent("""
        from __future__ import annotations
        from dataclasses import dataclass
        import jax.numpy as jnp
        from lopt_fast.meta.tasks import ImageTask

        @dataclass(eq=False, kw_only=True)
        class Mean(ImageTask):
            start: float = 3.0

            def __post_init__(self):
                super().__post_init__()
                self.name, self.initial_loss = "mean", 1.0

            def init(self, key):
                return jnp.full((), self.start)

            def loss(self, params, batch):
                return jnp.mean((batch[0] - params) ** 2)

        class Nameless(ImageTask):
            init = loss = lambda *_: None
        """)
    )
    task = tasks.make(f"{path}:Mean", {"start": 1, "batch_size": 30}, {})
    assert task.variants == ("digits",)
    batch = task.sample(task.data, jax.random.key(0), jnp.asarray(0))
    assert batch[0].shape == (30, 8, 8, 1)
    assert float(task.loss(task.init(jax.random.key(0)), batch)) == pytest.approx(2.0, rel=0.1)
    with pytest.raises(tasks.TaskError, match="start='x' must be a number"):
        tasks.make(f"{path}:Mean", {"start": "x"}, {})
    with pytest.raises(tasks.TaskError, match=r"the constructor must set self\.name"):
        tasks.make(f"{path}:Nameless", {}, {})


def test_real_images(shared: Path) -> None:
    """CIFAR-10 from its files, pooled with others and native."""
    where = {
        "cifar10": shared / "data" / "cifar-10-batches-bin",
        "fashion_mnist": shared / "data" / "fashion-mnist-3584",
    }
    if not all(path.is_dir() for path in where.values()):
        pytest.skip("no data sets beside the golden vectors")
    pooled = tasks.make("mlp", {"datasets": ["digits", *where], "image_size": 8}, where)
    assert pooled.variants == ("digits", "cifar10", "fashion_mnist")
    native = tasks.make("conv", {"datasets": ["cifar10"]}, where)
    for task, variant, shape in ((pooled, 2, (128, 8, 8, 1)), (native, 0, (128, 32, 32, 3))):
        x, y = jax.jit(task.sample)(task.data, jax.random.key(0), variant)
        assert x.shape == shape
        assert float(jnp.abs(x.mean())) < 0.2
        assert float(jnp.abs(x.std() - 1)) < 0.2
        assert len(set(np.asarray(y).tolist())) == 10
