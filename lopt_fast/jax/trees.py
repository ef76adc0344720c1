"""Parameters, gradients and hyperparameters as an optimizer is given them: checked, and without their tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from ..reference import Array
from .state import packed_dtypes

Schedule: TypeAlias = Callable[[Array], Array]


class Described(NamedTuple):
    """What is known of a parameter before its values are."""

    path: str
    """As JAX writes it, for messages."""
    shape: tuple[int, ...]
    dtype: str
    name: str = ""
    """Keys joined by "/": by this architectures tell parameters apart."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def flatten(params: Any) -> tuple[tuple[Described, ...], list[Array], Any]:
    """Descriptions, arrays and structure. Raises ValueError for a leaf that is neither float32 nor float64."""
    with_path, treedef = tree_flatten_with_path(params)
    described, leaves = [], []
    for path, value in with_path:
        name, dtype = keystr(path), dtype_of(value)
        if dtype not in packed_dtypes():
            raise ValueError(
                f"params{name} is {dtype or type(value).__name__}: parameters must be float32"
                f"{' or float64' if 'float64' in packed_dtypes() else ''}; cast it, or leave it out with optax.masked"
            )
        leaves.append(jnp.asarray(value, dtype))
        joined = "/".join(_key(entry) for entry in path)
        described.append(Described(name, tuple(leaves[-1].shape), dtype, joined))
    return tuple(described), leaves, treedef


def _key(entry: Any) -> str:
    """One step of a path, without JAX's punctuation (keystr(simple=True), which JAX 0.5 does not have)."""
    attributes = ("key", "idx", "name")  # of a dict, a sequence, a dataclass
    return next((str(getattr(entry, name)) for name in attributes if hasattr(entry, name)), str(entry))


def gradients(grads: Any, params: Any, treedef: Any, described: Sequence[Described]) -> list[Array | None]:
    """The gradient of each leaf, None where there is none. Raises ValueError that names the leaf that does not fit."""
    try:
        found = treedef.flatten_up_to(grads)
    except ValueError as error:
        theirs, ours = ({keystr(path) for path, _ in tree_flatten_with_path(t)[0]} for t in (grads, params))
        first = min(theirs ^ ours, default="")
        where = f"{'params' if first in ours else 'grads'}{first} is in only one" if first else str(error)
        raise ValueError(f"grads and params are different trees: {where}") from None
    arrays: list[Array | None] = []
    for leaf, gradient in zip(described, found, strict=True):
        if gradient is None:
            arrays.append(None)
            continue
        dtype = dtype_of(gradient)
        shape = jnp.shape(gradient) if dtype else ()
        if (dtype, shape) != (leaf.dtype, leaf.shape):
            kind = f"{dtype}{shape}" if dtype else type(gradient).__name__
            raise ValueError(f"grads{leaf.path} is {kind}, its parameter {leaf.dtype}{leaf.shape}")
        arrays.append(jnp.asarray(gradient, dtype))
    return arrays


def check_number(name: str, value: Any, positive: bool = False, finite: bool = True) -> None:
    """Raise ValueError unless `value` is a real scalar, checked as far as it is known: a traced one is not."""
    dtype = dtype_of(value)
    if not dtype.startswith(("float", "bfloat", "int", "uint")) or jnp.shape(value) != ():
        raise ValueError(f"{name}={value!r}: must be a real number or a scalar array")
    known = isinstance(value, (int, float)) and finite
    if known and not (math.isfinite(value) and (value > 0 or not positive)):
        raise ValueError(f"{name}={value!r}: must be finite{' and positive' if positive else ''}")


def dtype_of(value: Any) -> str:
    """Name of the dtype as JAX takes it at the moment, empty if `value` is not an array."""
    if isinstance(value, jax.Array):
        return str(value.dtype)
    try:
        return str(jnp.asarray(value).dtype)
    except (TypeError, ValueError):
        return ""


def scalars(
    learning_rate: float | Array | Schedule,
    weight_decay: float | Array,
    max_grad_norm: float | Array | None,
    count: Array,
) -> Array:
    """(3,) learning rate, weight decay, largest gradient norm."""
    lr = learning_rate(count) if callable(learning_rate) else learning_rate
    values = (lr, weight_decay, 0.0 if max_grad_norm is None else max_grad_norm)
    return jnp.stack([jnp.asarray(x, jnp.result_type(float)) for x in values])
