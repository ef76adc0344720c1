"""Parameters, gradients and hyperparameters as an optimizer is given them: checked, and without their tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from ..native import HALF_TYPES
from ..reference import Array

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
    """Descriptions, arrays and structure. Raises ValueError for a leaf of a dtype that cannot be optimized."""
    with_path, treedef = tree_flatten_with_path(params)
    dtypes = ("float32", *HALF_TYPES, *(("float64",) if jax.config.jax_enable_x64 else ()))
    described, leaves = [], []
    for path, value in with_path:
        name, dtype = keystr(path), dtype_of(value)
        if dtype not in dtypes:
            raise ValueError(
                f"params{name} is {dtype or type(value).__name__}: parameters must be {', '.join(dtypes[:-1])} or "
                f"{dtypes[-1]}; cast it, or leave it out with optax.masked"
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
        if (dtype_of(gradient), np.shape(gradient)) != (leaf.dtype, leaf.shape):
            raise ValueError(
                f"grads{leaf.path} is {kind_of(gradient)}, its parameter {leaf.dtype}{leaf.shape}"
            )
        arrays.append(jnp.asarray(gradient, leaf.dtype))
    return arrays


def check_number(name: str, value: Any, sign: Literal["positive", "not negative"] | None) -> None:
    """Raise ValueError unless `value` is a real scalar, of this sign and finite; None: any number.

    Numbers and NumPy's arrays are checked; the value of a JAX array is not known (traced), or the host would wait for
    it.
    """
    dtype = dtype_of(value)
    if not dtype.startswith(("float", "bfloat", "int", "uint")) or np.shape(value) != ():
        raise ValueError(f"{name}={value!r}: must be a real number or a scalar array")
    if sign is None or isinstance(value, jax.Array):
        return
    number = float(value)
    if not (math.isfinite(number) and (number > 0 or (number == 0 and sign == "not negative"))):
        raise ValueError(f"{name}={value!r}: must be finite and {sign}")


def dtype_of(value: Any) -> str:
    """Name of the dtype as JAX takes it at the moment, empty if `value` is not an array."""
    if isinstance(value, jax.Array):
        return str(value.dtype)
    try:
        return str(jnp.asarray(value).dtype)
    except (TypeError, ValueError):
        return ""


def kind_of(value: Any) -> str:
    """Dtype and shape, as "float32(3, 4)"; the type of what is not an array."""
    dtype = dtype_of(value)
    return f"{dtype}{tuple(np.shape(value))}" if dtype else type(value).__name__


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
