"""Optimizer state in few arrays: a call costs about a microsecond for each array that goes in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..backends import BackendError
from ..native import arithmetic
from ..reference import Array, TensorState, init_state
from ..spec import Spec
from .trees import dtype_of, kind_of

PACKED_SIZE = 65_536
"""Parameters of at most so many elements share the packed arrays; larger ones get an array of their own."""

_ALIGNMENT = 16
"""Elements: every parameter's state in a packed array starts on a cache line (in bfloat16 on half of one)."""

AVERAGES = ("momentum", "second_moment")
"""The accumulators that `state_dtype` is about."""


class LearnedOptimizerState(NamedTuple):
    """State of `lopt_fast.jax.learned_optimizer`; the same for every backend.

    In float64 for float64 parameters, in float32 for all others; momentum and second moment in `state_dtype`.
    """

    count: Array
    """int32, steps taken."""
    packed: dict[str, Array]
    """By dtype, one flat array: the accumulators of small parameters, the row and column accumulators of all."""
    moments: Any
    """Tree of the parameters. Large ones: (momentum and second-moment decays, *shape), sharded as they are (with the
    full-size factored accumulator behind, where rank < 2 and it is of the same dtype); None for those in `packed`."""


@dataclass(frozen=True)
class Slot:
    """Where one accumulator lies: elements [offset, offset + size) of the flat state buffer, C order."""

    buffer: int
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Leaf:
    """One parameter tensor and where its state lies; accumulators that it does not have are slots of size 0."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    """Of the parameter and its gradient."""
    slots: TensorState
    own: int | None
    """Its own state buffer, if any."""

    @property
    def arithmetic(self) -> str:
        """Dtype in which it is updated."""
        return arithmetic(self.dtype)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def own_rows(self, slot: Slot) -> slice:
        """Of its own buffer, (decays, *shape); flattened, XLA would gather it where it is sharded."""
        first = slot.offset // self.size
        return slice(first, first + slot.shape[0])


@dataclass(frozen=True)
class Layout:
    """The state buffers of a tree of parameters: first the packed ones, then those of large parameters in order."""

    leaves: tuple[Leaf, ...]
    packed: tuple[str, ...]
    """Dtypes of the packed buffers, which come first."""
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    def unflatten(self, count: Array, buffers: Sequence[Array], treedef: Any) -> LearnedOptimizerState:
        own = [None if leaf.own is None else buffers[leaf.own] for leaf in self.leaves]
        packed = dict(zip(self.packed, buffers, strict=False))
        return LearnedOptimizerState(count, packed, treedef.unflatten(own))

    def flatten(self, state: LearnedOptimizerState, treedef: Any) -> tuple[Array, list[Array]]:
        """The count and the buffers of `state`. Raises ValueError, naming what does not fit these parameters."""
        remedy = "make it with `init` of the same optimizer, from parameters of the same shapes and types"
        if not isinstance(state, LearnedOptimizerState):
            raise ValueError(f"state is a {type(state).__name__}, not a LearnedOptimizerState: {remedy}")
        if not isinstance(state.packed, Mapping):
            raise ValueError(f"state.packed is {kind_of(state.packed)}, not a dict: {remedy}")
        if state.packed.keys() != set(self.packed):
            raise ValueError(
                f"state.packed has {sorted(map(str, state.packed))}, not {sorted(self.packed)}: {remedy}"
            )
        try:
            own = treedef.flatten_up_to(state.moments)
        except ValueError as error:
            raise ValueError(f"state.moments is not a tree like params ({error}): {remedy}") from None
        named = [(f"state.packed[{dtype!r}]", state.packed[dtype]) for dtype in self.packed]
        for leaf, moments in zip(self.leaves, own, strict=True):
            if (leaf.own is None) != (moments is None):
                wanted = "None" if leaf.own is None else f"an array {self.shapes[leaf.own]}"
                raise ValueError(f"state.moments{leaf.path} is not {wanted}: {remedy}")
            if moments is not None:
                named.append((f"state.moments{leaf.path}", moments))
        for (name, buffer), shape, dtype in zip(named, self.shapes, self.dtypes, strict=True):
            if (kind := kind_of(buffer)) != f"{dtype}{shape}":
                raise ValueError(f"{name} is {kind}, expected {dtype}{shape}: {remedy}")
        if not dtype_of(state.count).startswith(("int", "uint")) or np.shape(state.count) != ():
            raise ValueError(f"state.count must be an integer scalar, not {state.count!r}: {remedy}")
        return jnp.asarray(state.count, jnp.int32), [jnp.asarray(buffer) for _, buffer in named]


def take(buffers: Sequence[Array], leaf: Leaf) -> TensorState:
    """The accumulators of one parameter, out of the buffers."""

    def get(slot: Slot) -> Array:
        if slot.size == 0:
            return jnp.zeros(slot.shape, leaf.arithmetic)
        if slot.buffer == leaf.own:
            return buffers[slot.buffer][leaf.own_rows(slot)]
        flat = jnp.reshape(buffers[slot.buffer], (-1,))
        return jnp.reshape(flat[slot.offset : slot.offset + slot.size], slot.shape)

    return TensorState(*(get(slot) for slot in leaf.slots))


def put(buffers: list[Array], leaf: Leaf, state: TensorState) -> None:
    """Replace the accumulators of one parameter in the list of buffers."""
    for slot, value in zip(leaf.slots, state, strict=True):
        if slot.size and slot.buffer == leaf.own:
            buffers[slot.buffer] = buffers[slot.buffer].at[leaf.own_rows(slot)].set(value)
        elif slot.size:
            whole, part = buffers[slot.buffer], slice(slot.offset, slot.offset + slot.size)
            flat = jnp.reshape(whole, (-1,)).at[part].set(jnp.reshape(value, (-1,)))
            buffers[slot.buffer] = jnp.reshape(flat, whole.shape)


@lru_cache(maxsize=64)
def layout(
    spec: Spec,
    leaves: tuple[tuple[str, tuple[int, ...], str], ...],
    packed: tuple[str, ...],
    state_dtype: str | None = None,
) -> Layout:
    """Layout for (path, shape, dtype) of each parameter; `packed` are those that `packed_dtypes` gives at the moment.

    Raises BackendError, naming the parameter, if its state cannot be kept in `state_dtype`.
    """
    sizes = [0] * len(packed)
    shapes: list[tuple[int, ...]] = []
    dtypes = list(packed)
    found: list[Leaf] = []
    abstract = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in leaves]
    states = jax.eval_shape(lambda ps: [init_state(spec, p) for p in ps], abstract)
    for (path, shape, dtype), state in zip(leaves, states, strict=True):
        check_state_dtype(state_dtype, path, dtype)
        averages = state_dtype or arithmetic(dtype)
        empty = 0 in shape
        large = math.prod(shape) > PACKED_SIZE
        own: int | None = None
        decays = 0  # leading axis of the own buffer so far
        slots = []
        for name, array in zip(TensorState._fields, state, strict=True):
            stored = averages if name in AVERAGES else arithmetic(dtype)
            shared = packed.index(stored)
            size = 0 if empty else math.prod(array.shape)
            if size and large and array.shape[1:] == shape and stored == averages:
                own = len(packed) + len(shapes)
                slots.append(Slot(own, decays * math.prod(shape), array.shape))
                decays += array.shape[0]
            elif size:
                slots.append(Slot(shared, sizes[shared], array.shape))
                sizes[shared] += size
            else:
                slots.append(Slot(shared, 0, (0,)))
        if own is not None:
            shapes.append((decays, *shape))
            dtypes.append(averages)
        sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        found.append(Leaf(path, shape, dtype, TensorState(*slots), own))
    return Layout(tuple(found), packed, (*((n,) for n in sizes), *shapes), tuple(dtypes))


def packed_dtypes(state_dtype: str | None = None) -> tuple[str, ...]:
    """Dtypes of state: always the same packed arrays, whatever the parameters are."""
    wide = ("float32", "float64") if jax.config.jax_enable_x64 else ("float32",)
    return wide if state_dtype in (None, "float32") else (*wide, state_dtype)


def state_dtype_name(dtype: Any) -> str | None:
    """Raises ValueError unless it is a dtype in which state can be kept, or None."""
    try:
        name = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in (None, "float32", "bfloat16"):
        raise ValueError(f"state_dtype={dtype!r}: must be jnp.float32, jnp.bfloat16 or None")
    return name


def check_state_dtype(state_dtype: str | None, path: str, dtype: str) -> None:
    """Raise BackendError unless a parameter of this dtype can have state in `state_dtype`."""
    if state_dtype is not None and arithmetic(dtype) != "float32":
        raise BackendError(
            f"state_dtype={state_dtype!r}: params{path} is {dtype}, which has its state in {arithmetic(dtype)}: "
            "leave out state_dtype, or cast the parameter"
        )
