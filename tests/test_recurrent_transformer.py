"""recurrent_transformer against a direct NumPy implementation that shares nothing with the package."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

from lopt_fast.architectures.base import Inputs
from lopt_fast.architectures.recurrent_transformer import RecurrentTransformer
from lopt_fast.architectures.transformer import Encoder
from lopt_fast.operations import ModelTensors, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.spec import SpecError

Theta = dict[str, np.ndarray]


# --- the direct implementation: one token, head and unit at a time ------------------------------------------------


def direct_norm(x: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Of one token."""
    return scale * (x - x.mean()) / math.sqrt(x.var() + 1e-5) + offset


def direct_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def direct_attention(theta: Theta, layer: int, heads: int, tokens: list[np.ndarray]) -> list[np.ndarray]:
    size = theta["query_w"].shape[2] // heads
    out = []
    for token in tokens:
        parts = []
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)

            def project(name: str, x: np.ndarray, cut: slice = cut) -> np.ndarray:
                return x @ theta[f"{name}_w"][layer][:, cut] + theta[f"{name}_b"][layer][cut]

            query = project("query", token)
            weights = [math.exp(query @ project("key", other) / math.sqrt(size)) for other in tokens]
            values = [project("value", other) for other in tokens]
            parts.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
        out.append(np.concatenate(parts) @ theta["attention_w"][layer] + theta["attention_b"][layer])
    return out


def direct_mlp(theta: Theta, layer: int, token: np.ndarray) -> np.ndarray:
    hidden = token @ theta["mlp_in_w"][layer] + theta["mlp_in_b"][layer]
    return np.array([direct_gelu(h) for h in hidden]) @ theta["mlp_out_w"][layer] + theta["mlp_out_b"][layer]


def direct_encoder(theta: Theta, layers: int, heads: int, norm: str, tokens: np.ndarray) -> np.ndarray:
    xs = list(tokens)
    for layer in range(layers):
        n1 = theta["attention_norm_scale"][layer], theta["attention_norm_offset"][layer]
        n2 = theta["mlp_norm_scale"][layer], theta["mlp_norm_offset"][layer]
        if norm == "post":
            seen = direct_attention(theta, layer, heads, xs)
            xs = [direct_norm(x + y, *n1) for x, y in zip(xs, seen, strict=True)]
            xs = [direct_norm(x + direct_mlp(theta, layer, x), *n2) for x in xs]
        else:
            seen = direct_attention(theta, layer, heads, [direct_norm(x, *n1) for x in xs])
            xs = [x + y for x, y in zip(xs, seen, strict=True)]
            xs = [x + direct_mlp(theta, layer, direct_norm(x, *n2)) for x in xs]
    if norm == "pre":
        xs = [direct_norm(x, theta["last_norm_scale"], theta["last_norm_offset"]) for x in xs]
    return np.stack(xs)


class Direct:
    """recurrent_transformer of one model, float64, one tensor at a time. The numbers of its configuration are here."""

    DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)

    def __init__(self, theta: Theta, params: list[np.ndarray], layers: int, heads: int) -> None:
        self.theta, self.params, self.layers, self.heads = theta, [p.copy() for p in params], layers, heads
        self.m = [[np.zeros_like(p) for _ in self.DECAYS] for p in params]
        self.v = [[np.zeros_like(p) for _ in self.DECAYS] for p in params]
        self.hidden = theta["hidden"]
        self.t = 0
        self.clip_steps, self.clip_value = 1, 0.01
        self.train, self.valid = [0.0, 0.0, 0], [0.0, 0.0, 0]  # mean, variance, losses seen

    @staticmethod
    def see_loss(state: list[Any], decay: float, loss: float) -> None:
        state[0] = decay * state[0] + (1 - decay) * loss
        state[1] = decay * state[1] + (1 - decay) * (state[0] - loss) ** 2
        state[2] += 1

    def validation(self, loss: float) -> None:
        self.see_loss(self.valid, 0.95, loss)
        self.t += 1

    def loss_features(self) -> list[float]:
        def correction(state: list[Any], decay: float) -> float:
            return 1 / (1 - decay ** state[2] + 1e-8)

        def feature(loss: float) -> float:
            c = correction(self.train, 0.9)
            return min(5.0, max(-5.0, (loss - self.train[0] * c) / math.sqrt(self.train[1] * c + 1e-8)))

        return [feature(self.loss), feature(self.valid[0] * correction(self.valid, 0.95))]

    def features(self, i: int, g: np.ndarray) -> list[float]:
        """18 numbers of tensor i."""

        def magnitude(x: float) -> float:
            return min(5.0, max(-5.0, math.log(1e-8 + abs(x))))

        p, m, v = self.params[i], np.array(self.m[i]), np.array(self.v[i])
        dims = [float(n) for n in p.shape] + [1.0] * (4 - p.ndim)
        return [
            magnitude(math.sqrt((g * g).sum())),
            1.0 if p.ndim == 0 else -1.0,
            magnitude(m.mean()), np.sign(m.mean()),
            magnitude(v.mean()), np.sign(v.mean()),
            magnitude(p.mean()), np.sign(p.mean()),
            magnitude(math.sqrt((p * p).sum())),
            *[math.log(n) - 1 for n in dims],
            *self.loss_features(),
            magnitude(m.var()), magnitude(v.var()), magnitude(p.var()),
        ]  # fmt: skip

    def conditioning(self, grads: list[np.ndarray]) -> list[np.ndarray]:
        """17 numbers for each tensor; moves the hidden token."""
        tokens = [
            np.array(self.features(i, g)) @ self.theta["features_w"] + self.theta["features_b"]
            for i, g in enumerate(grads)
        ]
        out = direct_encoder(self.theta, self.layers, self.heads, "post", np.stack([self.hidden, *tokens]))
        self.hidden = out[0]
        return [x @ self.theta["conditioning_w"] + self.theta["conditioning_b"] for x in out[1:]]

    def step(self, grads: list[np.ndarray], loss: float) -> None:
        self.loss = loss
        bound = 10 * self.clip_value / (1 - 0.99**self.clip_steps)
        grads = [np.clip(g, -bound, bound) for g in grads]
        mean_square = sum((g * g).mean() for g in grads) / len(grads)
        self.clip_value = 0.99 * self.clip_value + 0.01 * math.sqrt(1e-8 + mean_square)
        self.clip_steps += 1
        self.see_loss(self.train, 0.9, loss)
        for i, g in enumerate(grads):
            for k, b in enumerate(self.DECAYS):
                self.m[i][k] = b * self.m[i][k] + (1 - b) * g
                self.v[i][k] = b * self.v[i][k] + (1 - b) * g * g
        given = self.conditioning(grads)
        self.params = [
            p - self.element_steps(i, g, given[i])
            for i, (p, g) in enumerate(zip(self.params, grads, strict=True))
        ]
        self.t += 1

    def element_steps(self, i: int, g: np.ndarray, given: np.ndarray) -> np.ndarray:
        p, m, v = self.params[i], self.m[i], self.v[i]
        rsqrt = [1 / np.sqrt(x + 1e-6) for x in v]
        columns = [
            g,
            p,
            np.log(abs(p) + 1e-8),
            *m,
            *v,
            *[a * b for a, b in zip(m, rsqrt, strict=True)],
            *rsqrt,
        ]
        columns = [c / math.sqrt((c * c).mean() + 1e-5) for c in columns]
        scales = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
        shared = [
            *[math.sin(self.t / (x * math.pi)) for x in scales],
            math.log(len(self.params)) - 1,
            math.log(math.sqrt((p * p).sum()) + 1e-8),
            math.log(p.size),
            *given,
        ]
        out = np.zeros(p.shape)
        weights = [
            np.concatenate([self.theta["w0"], self.theta["w0_constant"]]),
            self.theta["w1"],
            self.theta["w2"],
        ]
        for index in np.ndindex(p.shape):
            x = np.array([c[index] for c in columns] + shared)
            for k in range(3):
                x = x @ weights[k] + self.theta[f"b{k}"]
                x = np.maximum(x, 0) if k < 2 else x
            out[index] = 0.001 * x[0] * math.exp(0.001 * x[1])
        return out


# --- the encoder ------------------------------------------------------------------------------------------------


def random_theta(shapes: dict[str, tuple[int, ...]], seed: int = 0, scale: float = 0.3) -> Theta:
    """float64, nothing at 0 or 1: no meta-parameter may go unused."""
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_encoder_is_the_direct_one(norm: Any) -> None:
    encoder = Encoder(width=6, layers=3, heads=2, key_size=5, mlp_width=11, norm=norm)
    theta = random_theta(encoder.theta_shapes)
    tokens = np.random.default_rng(1).standard_normal((7, 6))
    expected = direct_encoder(theta, 3, 2, norm, tokens)
    assert np.abs(encoder(theta, tokens) - expected).max() <= 1e-12
    for name, array in theta.items():  # each of them matters
        if name == "key_b":  # adds the same to all scores of a query, which softmax does not see
            continue
        changed = theta | {name: array + 0.1 * np.random.default_rng(2).standard_normal(array.shape)}
        assert np.abs(encoder(changed, tokens) - expected).max() > 1e-6, name


def test_softmax_does_not_overflow() -> None:
    encoder = Encoder(width=4, layers=1, heads=1, key_size=4, mlp_width=4, norm="post")
    theta = random_theta(encoder.theta_shapes, scale=1.0)
    theta["query_w"] = theta["query_w"] * 1e6
    out = encoder({k: v.astype(np.float32) for k, v in theta.items()}, np.eye(5, 4, dtype=np.float32))
    assert np.isfinite(out).all()


# --- the optimizer ----------------------------------------------------------------------------------------------

SHAPES: list[tuple[int, ...]] = [(), (1,), (5,), (4, 3), (2, 3, 4), (2, 1, 3, 2)]
SMALL = RecurrentTransformer(width=8, layers=2, heads=2, key_size=6)


class Run:
    """A training with given gradients, through the architecture."""

    def __init__(
        self, architecture: RecurrentTransformer, theta: dict[str, Any], params: list[Any],
        operations: Any = Reference,
    ) -> None:  # fmt: skip
        architecture.check_theta(theta)
        self.architecture, self.theta, self.params, self.operations = architecture, theta, params, operations
        self.states = [initial_state(architecture.accumulates("p", p.shape), p) for p in params]
        self.rows = architecture.init_rows(theta, [tuple(p.shape) for p in params])
        self.shared = architecture.init_shared(theta)
        self.t = 0

    def step(self, grads: list[Any], loss: Any) -> None:
        n = len(grads)
        tensors = ModelTensors(self.params, grads, self.states, [1.0] * n, [0.0] * n, apply=True)
        t = array_namespace(self.theta["w0"]).asarray(self.t)
        update = self.architecture.step(
            self.operations, self.theta, tensors, self.rows, self.shared, Inputs(t, None, loss)
        )
        self.params, self.states, self.rows, self.shared = update
        self.t += 1

    def validation(self, loss: Any) -> None:
        self.shared = self.architecture.observe_validation(self.theta, self.shared, loss)


def problem(
    shapes: list[tuple[int, ...]], steps: int = 6
) -> tuple[list[np.ndarray], list[list[np.ndarray]], list[Any]]:
    """Parameters, the gradients of each step and their losses; one gradient is far too large."""
    rng = np.random.default_rng(3)
    params = [rng.standard_normal(s) for s in shapes]
    scales = 10.0 ** rng.uniform(-3, 0, (steps, len(shapes)))
    grads = [
        [np.asarray(a * rng.standard_normal(s)) for a, s in zip(row, shapes, strict=True)] for row in scales
    ]
    grads[3][2] = grads[3][2] * 1e4
    return params, grads, [np.asarray(x) for x in rng.uniform(1, 3, steps)]


def moved(before: list[Any], after: list[Any]) -> list[np.ndarray]:
    return [np.asarray(b) - np.asarray(a) for a, b in zip(before, after, strict=True)]


def test_steps_are_the_direct_ones() -> None:
    params, grads, losses = problem(SHAPES)
    theta = random_theta(SMALL.theta_shapes)
    run, direct = Run(SMALL, theta, params), Direct(theta, params, layers=2, heads=2)
    for step, (g, loss) in enumerate(zip(grads, losses, strict=True)):
        before = run.params
        if step in (2, 4):
            run.validation(loss + 0.5)
            direct.validation(float(loss) + 0.5)
        run.step(g, loss)
        direct.step(g, float(loss))
        for start, ours, theirs in zip(before, run.params, direct.params, strict=True):
            error, change = np.abs(ours - theirs).max(), np.abs(theirs - start).max()
            assert change > 1e-6
            assert error <= 1e-9 * change
        assert np.abs(run.shared["hidden"] - direct.hidden).max() <= 1e-12


def test_a_permutation_of_the_tensors_permutes_the_updates() -> None:
    params, grads, losses = problem(SHAPES)
    theta = random_theta(SMALL.theta_shapes)
    order = [3, 0, 5, 1, 4, 2]
    run, other = Run(SMALL, theta, params), Run(SMALL, theta, [params[i] for i in order])
    for g, loss in zip(grads, losses, strict=True):
        run.step(g, loss)
        other.step([g[i] for i in order], loss)
    for i, p in zip(order, other.params, strict=True):
        assert np.abs(p - run.params[i]).max() <= 1e-12
    for name, value in run.shared.items():
        assert np.abs(value - other.shared[name]).max() <= 1e-12, name


def test_the_hidden_token_carries_state() -> None:
    params, grads, losses = problem(SHAPES)
    theta = random_theta(SMALL.theta_shapes)
    assert (SMALL.init_shared(theta)["hidden"] == theta["hidden"]).all()
    run, emptied = Run(SMALL, theta, params), Run(SMALL, theta, params)
    for each in (run, emptied):
        each.step(grads[0], losses[0])
    assert np.abs(run.shared["hidden"] - theta["hidden"]).max() > 1e-3
    emptied.shared = emptied.shared | {"hidden": np.zeros(SMALL.width)}
    before = run.params
    for each in (run, emptied):
        each.step(grads[1], losses[1])
    for a, b in zip(moved(before, run.params), moved(before, emptied.params), strict=True):
        assert np.abs(a - b).max() > 1e-6 * np.abs(a).max()


@pytest.mark.parametrize("attention", [True, False])
def test_tensors_condition_each_other_through_attention_alone(attention: bool) -> None:
    params, grads, losses = problem(SHAPES)
    theta = random_theta(SMALL.theta_shapes)
    if not attention:
        theta["attention_w"] = 0.0 * theta["attention_w"]
    run, other = Run(SMALL, theta, params), Run(SMALL, theta, [7.0 * params[0], *params[1:]])
    for each in (run, other):
        each.step(grads[0], losses[0])
    assert moved([params[0]], run.params[:1]) != moved([7.0 * params[0]], other.params[:1])
    for a, b in zip(run.params[1:], other.params[1:], strict=True):
        assert np.array_equal(a, b) != attention


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_many_steps_and_tensors_stay_finite(norm: Any) -> None:
    """With all numbers in float32: the hidden token does not grow from step to step."""
    architecture = RecurrentTransformer(width=8, layers=2, heads=2, key_size=6, norm=norm)
    theta = architecture.init_theta()
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 2)] * 20
    run = Run(architecture, theta, [rng.standard_normal(s).astype(np.float32) for s in shapes])
    for _ in range(20):
        run.step(
            [np.asarray(rng.standard_normal(s), np.float32) for s in shapes], np.float32(rng.uniform(1, 2))
        )
        assert np.abs(run.shared["hidden"]).max() <= math.sqrt(architecture.width)
    assert all(np.isfinite(p).all() and p.dtype == np.float32 for p in run.params)


def test_one_tensor() -> None:
    params, grads, losses = problem([(4, 3)] * 3)
    theta = random_theta(SMALL.theta_shapes)
    run, direct = Run(SMALL, theta, params[:1]), Direct(theta, params[:1], layers=2, heads=2)
    for g, loss in zip(grads, losses, strict=True):
        run.step(g[:1], loss)
        direct.step(g[:1], float(loss))
    assert np.abs(run.params[0] - direct.params[0]).max() <= 1e-12


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    params, grads, losses = problem(SHAPES)
    theta = random_theta(SMALL.theta_shapes)
    run = Run(SMALL, theta, params)
    ours = Run(SMALL, {k: torch.asarray(v) for k, v in theta.items()}, [torch.asarray(p) for p in params])
    for g, loss in zip(grads, losses, strict=True):
        run.step(g, loss)
        ours.step([torch.asarray(x) for x in g], torch.asarray(loss))
    for p, expected in zip(ours.params, run.params, strict=True):
        assert np.abs(p.numpy() - expected).max() <= 1e-12


def test_jax() -> None:
    """A step under jit, mapped over meta-parameters and models."""
    jax = pytest.importorskip("jax")
    shapes = [(), (5,), (4, 3)]
    params, grads, losses = problem(shapes)
    thetas = [random_theta(SMALL.theta_shapes, seed) for seed in (0, 1)]
    models = [params, [1.5 * p for p in params]]
    runs = [Run(SMALL, theta, model) for theta, model in zip(thetas, models, strict=True)]

    def step(theta: Any, params: Any, states: Any, shared: Any, t: Any, grads: Any, loss: Any) -> Any:
        tensors = ModelTensors(params, grads, states, [1.0] * 3, [0.0] * 3, apply=True)
        update = SMALL.step(Reference, theta, tensors, {}, shared, Inputs(t, None, loss))
        return update.outputs, update.states, update.shared

    with jax.enable_x64(True):
        mapped = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, 0, None, None, None)))
        theta, *state = (
            jax.tree.map(lambda *xs: jax.numpy.stack(xs), *parts)
            for parts in (thetas, models, [r.states for r in runs], [r.shared for r in runs])
        )
        for t, (g, loss) in enumerate(zip(grads, losses, strict=True)):
            state = mapped(theta, *state, jax.numpy.asarray(t), g, loss)
            for run in runs:
                run.step(g, loss)
            for i, p in enumerate(state[0]):
                assert np.abs(p - np.stack([run.params[i] for run in runs])).max() <= 1e-12


# --- meta-parameters --------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper() -> None:
    shapes = RecurrentTransformer().theta_shapes
    assert shapes["features_w"] == (18, 64)
    assert shapes["hidden"] == (64,)
    assert shapes["query_w"] == shapes["key_w"] == shapes["value_w"] == (4, 64, 4 * 32)
    assert shapes["mlp_in_w"] == (4, 64, 256)
    assert shapes["conditioning_w"] == (64, 17)
    assert shapes["w0"][0] + shapes["w0_constant"][0] == 23 + 11 + 3 + 17
    assert (shapes["w1"], shapes["w2"]) == ((32, 32), (32, 2))


def test_hyperparameters_survive_json() -> None:
    architecture = RecurrentTransformer(width=16, mlp_multiple=2, norm="pre", decays=(0.8, 0.99))
    assert RecurrentTransformer.from_dict(architecture.to_dict()) == architecture


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(n, v) for n in ("width", "layers", "heads", "key_size", "mlp_multiple") for v in (0, 2.0, True)],
        ("hidden_size", 0), ("norm", "between"), ("decays", ()), ("messages", 3),
    ],
)  # fmt: skip
def test_unusable_hyperparameters_are_named(name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=name):
        RecurrentTransformer.from_dict({name: value})


@pytest.mark.parametrize("hidden_layers", [1, 2])
def test_initial_steps_follow_the_momentum(hidden_layers: int) -> None:
    architecture = RecurrentTransformer(hidden_layers=hidden_layers)
    theta = architecture.init_theta(seed=5)
    assert all(a.dtype == np.float32 for a in theta.values())
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(s) for s in [(300,), (30, 10)]]
    run = Run(architecture, {k: v.astype(np.float64) for k, v in theta.items()}, params)
    for _ in range(5):
        before = run.params
        run.step([rng.standard_normal(p.shape) for p in params], np.asarray(1.0))
    for i, step in enumerate(moved(run.params, before)):
        followed = run.states[i].momentum[1] / np.sqrt(run.states[i].second_moment[1] + 1e-6)
        assert np.corrcoef(step.ravel(), followed.ravel())[0, 1] > 0.9
        assert 0.5e-3 < math.sqrt((step * step).mean()) < 2e-3


def test_initial_optimizer_descends() -> None:
    architecture = RecurrentTransformer(width=8, layers=2, heads=2, key_size=6, step_mult=0.01)
    run = Run(architecture, architecture.init_theta(), [np.ones(20, np.float32), np.float32(1)])
    for _ in range(40):
        run.step([0.1 * p for p in run.params], np.float32(0.05) * sum((p * p).sum() for p in run.params))
    assert sum((p * p).sum() for p in run.params) < 0.6 * 21
