"""Random trees, gradients and states through `lopt_fast.jax.learned_optimizer`.

A step agrees with the reference in NumPy, or an error names what is wrong. Arrays that were given are never changed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers import RELATIVE, random_theta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lopt_fast import backends, reference
from lopt_fast.architectures import initial_theta
from lopt_fast.architectures.celo import Celo
from lopt_fast.errors import UserError
from lopt_fast.spec import Spec

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import lopt_fast.jax as lopt  # noqa: E402

pytestmark = pytest.mark.skipif(
    backends._import_native()[0] is None, reason=f"no compiled kernels: {backends._import_native()[1]}"
)

REFUSED = (UserError, ValueError, TypeError)
SPEC = Spec(hidden_size=4, step_mult=0.01)
CELO = Celo.from_dict(
    {
        "momentum_decays": [0.9], "rms_decays": [0.9], "adafactor_decays": [0.9], "hidden_size": 2, "lstm_size": 8,
        "mixture": 2,
    }
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 17]), max_size=5).filter(
    lambda s: math.prod(s) <= 600
)
DTYPES = ("float32", "bfloat16", "float16")


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


def transformation(name: str, **options: Any) -> Any:
    if name == "celo":
        return lopt.learned_optimizer(CELO, theta=initial_theta(CELO, 0), num_steps=10, **options)
    return lopt.learned_optimizer(SPEC, theta=random_theta(SPEC, dtype="float32"), **options)


def snapshot(tree: Any) -> list[Any]:
    """What must not change, bit by bit."""
    return [np.array(leaf).tobytes() for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]


def applied(tx: Any, apply: bool, jit: bool) -> Any:
    """f(grads, state, params) -> (new params, new state), by either of the two ways."""

    def advance(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        if apply:
            return tx.step(grads, state, params, value=1.0)
        updates, state = tx.update(grads, state, params, value=1.0)
        return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), state

    return jax.jit(advance) if jit else advance


@fuzz(12)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=3),
    dtypes=st.lists(st.sampled_from(["float32", *DTYPES]), min_size=3, max_size=3),
    absent=st.sets(st.integers(0, 2), max_size=1),
    seed=st.integers(0, 99),
    jit=st.booleans(),
    apply=st.booleans(),
    value=st.sampled_from([None, None, math.nan, math.inf]),
)
def test_agrees_with_the_reference(
    shapes: list[list[int]], dtypes: list[str], absent: set[int], seed: int, jit: bool, apply: bool, value: Any,
) -> None:  # fmt: skip
    """Two steps of small_fc_lopt, the second one with NaN or Inf among the gradients, each from the parameters as they
    are. Not finite numbers come out where the reference has them."""
    rng = np.random.default_rng(seed)
    theta = random_theta(SPEC, dtype="float32")
    tx = transformation("small_fc_lopt")
    params = {
        f"p{i}": jnp.asarray(rng.standard_normal(shape), dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    advance = applied(tx, apply, jit)
    try:
        state = tx.init(params)
    except REFUSED as error:
        pytest.fail(f"{shapes} {dtypes}: {error}")
    exact = {name: reference.init_state(SPEC, np.asarray(p, np.float32)) for name, p in params.items()}
    for t in range(2):
        grads: dict[str, Any] = {}
        for i, (name, p) in enumerate(params.items()):
            g = rng.standard_normal(p.shape)
            g = np.where(rng.random(p.shape) < 0.2, value, g) if t == 1 and value is not None else g
            grads[name] = None if i in absent else jnp.asarray(g, p.dtype)
        given = snapshot((grads, state, params))
        after, following = advance(grads, state, params)
        assert snapshot((grads, state, params)) == given
        assert int(following.count) == t + 1
        for name, p in params.items():
            assert after[name].dtype == p.dtype
            assert after[name].shape == p.shape
            if grads[name] is None:
                assert snapshot(after[name]) == snapshot(p)
                continue
            start = np.asarray(p, np.float32)
            with np.errstate(all="ignore"):
                expected, exact[name] = reference.update(
                    SPEC, theta, start, np.asarray(grads[name], np.float32), exact[name], t
                )
                expected = np.asarray(expected)
                found = np.asarray(after[name], np.float32)
            what = f"{p.dtype}{p.shape} step {t}"
            np.testing.assert_array_equal(np.isnan(found), np.isnan(start + expected), err_msg=what)
            finite = np.isfinite(start + expected)
            if not finite.all() or not finite.size:
                continue
            scale = float(np.abs(start).max() + np.abs(expected).max())
            bound = 4 * float(jnp.finfo(p.dtype).eps) * scale + 3 * RELATIVE["float32"] * float(
                np.abs(expected).max()
            )
            error = float(np.abs(found - start - expected).max())
            assert error <= bound, f"{what}: off by {error:.2e}, allowed {bound:.2e}"
        params, state = after, following


BAD_LEAVES: dict[str, Any] = {
    "none": lambda a: None,
    "text": lambda a: "text",
    "object": lambda a: object(),
    "list": lambda a: [1.0, 2.0],
    "shape": lambda a: jnp.zeros((*a.shape, 2), a.dtype),
    "integer": lambda a: a.astype(jnp.int32),
    "bool": lambda a: a.astype(bool),
    "complex": lambda a: a.astype(jnp.complex64),
    "half": lambda a: a.astype(jnp.bfloat16),
    "wrong half": lambda a: a.astype(jnp.float16),
    "numpy text": lambda a: np.full(a.shape, "x"),
    "numpy objects": lambda a: np.full(a.shape, None),
    "tuple": lambda a: (a, a),
    "dict": lambda a: {"a": a},
}


def replaced(tree: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a tree of dicts and (named) tuples with one part replaced; `new` DROP: left out."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(tree, dict):
        changed = {k: replaced(v, rest, new) if k == key else v for k, v in tree.items()}
        return {k: v for k, v in changed.items() if v is not DROP}
    return tree._replace(**{key: replaced(getattr(tree, key), rest, new)})


DROP = object()


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a tree of dicts and named tuples."""
    if isinstance(tree, dict):
        parts = list(tree.items())
    elif hasattr(tree, "_fields"):
        parts = list(tree._asdict().items())
    else:
        return [path]
    return [path, *(found for key, part in parts for found in places(part, (*path, key)))]


def part_of(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key] if isinstance(tree, dict) else getattr(tree, key)
    return tree


@fuzz(60)
@given(
    name=st.sampled_from(["small_fc_lopt", "celo"]),
    where=st.sampled_from(["grads", "params", "state", "state"]),
    jit=st.booleans(),
    apply=st.booleans(),
    data=st.data(),
)
def test_trees_that_do_not_fit(name: str, where: str, jit: bool, apply: bool, data: Any) -> None:
    """One part of the gradients, the parameters or the state replaced by something else, or left out."""
    tx = transformation(name)
    params = {"w": jnp.ones((3, 4)), "layer": {"b": jnp.ones(4), "e": jnp.zeros((0, 2))}}
    call = {"grads": jax.tree.map(jnp.ones_like, params), "state": tx.init(params), "params": params}
    path = data.draw(st.sampled_from(places(call[where])))
    old = part_of(call[where], path)
    kinds = [k for k in BAD_LEAVES if hasattr(old, "dtype") or k in ("none", "text", "object", "list")]
    kind = data.draw(
        st.sampled_from(
            ["drop", *kinds] if path and isinstance(part_of(call[where], path[:-1]), dict) else kinds
        )
    )
    new = DROP if kind == "drop" else BAD_LEAVES[kind](old)
    harmless = (
        (where == "grads" and kind == "none" and hasattr(old, "dtype"))  # no gradient
        or (old is None and kind == "none")
        or (
            hasattr(old, "dtype")
            and hasattr(new, "dtype")
            and (old.dtype, old.shape) == (new.dtype, new.shape)
        )
    )
    if harmless:
        return
    call[where] = replaced(call[where], path, new)
    kept = snapshot(call)
    what = f"{where} {path} {kind}"
    with pytest.raises(REFUSED, match=r"params|grads|state|gradient|parameter") as error:
        applied(tx, apply, jit and kind not in ("text", "object", "numpy text", "numpy objects"))(**call)
    assert snapshot(call) == kept, (what, error)


BAD_NUMBERS = [
    math.nan,
    math.inf,
    -1.0,
    "0.1",
    [1.0],
    1j,
    object(),
    np.ones(2),
    jnp.ones(2),
    jnp.zeros((), complex),
]


@pytest.mark.parametrize("what", ["learning_rate", "weight_decay", "max_grad_norm", "num_steps"])
def test_hyperparameters_that_do_not_fit(what: str) -> None:
    for bad in BAD_NUMBERS:
        with pytest.raises(REFUSED, match=what):
            transformation("small_fc_lopt", **{what: bad})


THETAS = ("drop", "rename", "shape", "text", "none", "complex", "integer")


@pytest.mark.parametrize("how", THETAS)
@pytest.mark.parametrize("spec", [SPEC, CELO], ids=["small_fc_lopt", "celo"])
def test_meta_parameters_that_do_not_fit(spec: Any, how: str) -> None:
    """The array is named."""
    theta = dict(random_theta(SPEC, dtype="float32") if spec is SPEC else initial_theta(CELO, 0))
    name = sorted(theta)[1]
    value = theta.pop(name)
    if how == "rename":
        theta["x" + name] = value
    elif how != "drop":
        theta[name] = {
            "shape": np.ones((*value.shape, 2), np.float32), "text": "text", "none": None,
            "complex": value.astype(np.complex64),
            "integer": value.astype(np.int32),
        }[how]  # fmt: skip
    with pytest.raises(REFUSED, match=name):
        lopt.learned_optimizer(spec, theta=theta, num_steps=10)
