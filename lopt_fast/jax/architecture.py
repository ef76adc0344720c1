"""One step of any `Architecture` over a tree of parameters: its array code and operations, compiled by XLA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path

from ..architectures import Architecture
from ..architectures.base import Inputs
from ..native import arithmetic
from ..operations import ModelTensors, Operations
from ..operations.accumulators import initial_state
from ..reference import CLIP_EPSILON, Array, TensorState
from .custom_call import vary_like
from .operations import implementation
from .trees import Described, Schedule, check_number, flatten, gradients, kind_of, scalars

Arrays = dict[str, Array]


class ArchitectureState(NamedTuple):
    """State of `lopt_fast.jax.learned_optimizer` for all architectures but `small_fc_lopt`.

    In float64 for float64 parameters, in float32 for all others; `rows` and `shared` in the wider of them.
    """

    count: Array
    """int32, steps taken."""
    accumulators: TensorState
    """Running averages: in each field a tree of the parameters, with None for those that have no such averages. Those
    of the size of a parameter are (averages, *shape), sharded as it is."""
    rows: Arrays
    """Tensor-level state, a leading axis over the parameters that are not empty, in the order of the tree."""
    shared: Arrays
    """State of the whole model."""


@dataclass(frozen=True)
class _Step:
    """What is fixed when a step is traced."""

    architecture: Architecture
    operations: Operations
    described: tuple[Described, ...]
    """The parameters that have a gradient and are not empty."""
    rows: tuple[int, ...] | None
    """Which rows of the state are theirs; None: all."""
    clip: bool
    apply: bool
    """Return new parameters instead of what is to be added to them."""


class Numbers(NamedTuple):
    """Operands of a step; what the architecture does not look at is None."""

    scalars: Array
    """(3,) learning rate, weight decay, largest gradient norm."""
    num_steps: Array | None
    loss: Array | None


@dataclass(frozen=True)
class Optimizer:
    """The functions of an optax transformation, for `transformation.learned_optimizer`, which checks its arguments."""

    architecture: Architecture
    theta: Mapping[str, Array]
    learning_rate: float | Array | Schedule
    weight_decay: float | Array
    max_grad_norm: float | Array | None
    num_steps: float | Array | None
    backend: str

    def init(self, params: Any) -> ArchitectureState:
        """State before the first step. Raises ValueError for parameters that cannot be trained."""
        described, leaves, treedef = flatten(params)
        state = _zeros(self.architecture, self._theta(described), described, treedef)
        arrays, structure = jax.tree.flatten(state)
        return structure.unflatten(vary_like(arrays, leaves))

    def advance(
        self, apply: bool, grads: Any, state: Any, params: Any, loss: Any
    ) -> tuple[Any, ArchitectureState]:
        """(new parameters or what is to be added to them, new state). Raises ValueError, BackendError."""
        operations = implementation(self.architecture, self.backend)
        described, leaves, treedef = flatten(params)
        found = gradients(grads, params, treedef, described)
        state = _checked(self.architecture, described, treedef, state)
        theta = self._theta(described)
        filled = [i for i, leaf in enumerate(described) if leaf.size]
        present = [i for i in filled if found[i] is not None]
        result = list(leaves) if apply else [jnp.zeros_like(p) for p in leaves]  # where there is no gradient
        count = optax.safe_increment(state.count)
        numbers = Numbers(
            scalars(self.learning_rate, self.weight_decay, self.max_grad_norm, state.count),
            _like(self.num_steps, described) if self.architecture.needs_num_steps else None,
            self._loss(loss, described),
        )
        if not present:
            return treedef.unflatten(result), state._replace(count=count)
        step = _Step(
            self.architecture,
            operations,
            tuple(described[i] for i in present),
            None if present == filled else tuple(filled.index(i) for i in present),
            self.max_grad_norm is not None,
            apply,
        )
        # Fields of the state as lists over all parameters; those of the present ones are replaced.
        averages = [treedef.flatten_up_to(field) for field in state.accumulators]
        outputs, states, rows, shared = architecture_step(
            step,
            theta,
            state.count,
            numbers,
            [TensorState(*(field[i] for field in averages)) for i in present],
            state.rows,
            state.shared,
            [leaves[i] for i in present],
            [found[i] for i in present],
        )
        for k, i in enumerate(present):
            result[i] = outputs[k]
            for field, value in zip(averages, states[k], strict=True):
                field[i] = value
        accumulators = TensorState(*(treedef.unflatten(field) for field in averages))
        return treedef.unflatten(result), ArchitectureState(count, accumulators, rows, shared)

    def observe_validation(self, state: Any, loss: Any) -> ArchitectureState:
        """State after a loss on validation data has been seen."""
        if not isinstance(state, ArchitectureState):
            raise ValueError(_not_a_state(state))
        check_number("loss", loss, None)
        dtype = next((a.dtype for a in state.shared.values()), jnp.float32)
        theta = {name: jnp.asarray(a, dtype) for name, a in self.theta.items()}
        loss = jnp.asarray(loss, dtype)
        return state._replace(shared=_observed(self.architecture, theta, state.shared, loss))

    def _theta(self, described: Sequence[Described]) -> Arrays:
        dtype = _widest(described)
        return {name: jnp.asarray(a, dtype) for name, a in self.theta.items()}

    def _loss(self, loss: Any, described: Sequence[Described]) -> Array | None:
        if not self.architecture.needs_loss:
            return None
        if loss is None:
            name = self.architecture.NAME
            raise ValueError(f"{name} looks at the training loss: pass value=loss, that of these gradients")
        check_number("value", loss, None)
        return _like(loss, described)


@partial(jax.jit, static_argnums=0)
def architecture_step(
    step: _Step,
    theta: Arrays,
    count: Array,
    numbers: Numbers,
    states: list[TensorState],
    rows: Arrays,
    shared: Arrays,
    params: list[Array],
    grads: list[Array],
) -> tuple[list[Array], list[TensorState], Arrays, Arrays]:
    """(outputs, new accumulators, rows, shared). Lists are over the parameters `step.described`, at least one."""
    lr, weight_decay, max_norm = numbers.scalars
    stored = params
    params, grads = ([a.astype(arithmetic(a.dtype.name)) for a in arrays] for arrays in (params, grads))
    grad_scale: Array | float = 1.0
    if step.clip:
        dtype = numbers.scalars.dtype
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(dtype))) for g in grads))
        scale = jnp.minimum(1.0, max_norm / (norm + CLIP_EPSILON))
        if len({g.dtype for g in grads}) == 1:
            grad_scale = scale.astype(grads[0].dtype)
        else:  # one number of one type would turn gradients of another into it
            grads = [g * scale.astype(g.dtype) for g in grads]
    index = None if step.rows is None else np.array(step.rows)
    tensors = ModelTensors(
        params,
        grads,
        [_all_arrays(state, p) for state, p in zip(states, params, strict=True)],
        [lr.astype(p.dtype) for p in params],
        [weight_decay.astype(p.dtype) for p in params],
        names=[leaf.name for leaf in step.described],
        grad_scale=grad_scale,
        apply=step.apply,
    )
    theirs = rows if index is None else {name: a[index] for name, a in rows.items()}
    inputs = Inputs(count, numbers.num_steps, numbers.loss)
    # GPUs and TPUs would round the networks' inputs to fewer bits than float32.
    with jax.default_matmul_precision("highest"):
        update = step.architecture.step(step.operations, theta, tensors, theirs, shared, inputs)
    after = _as_before(theirs, update.rows)
    if index is not None:
        after = {name: a.at[index].set(after[name]) for name, a in rows.items()}
    outputs = [output.astype(p.dtype) for output, p in zip(update.outputs, stored, strict=True)]
    kept = [_without_missing(*both) for both in zip(states, update.states, strict=True)]
    return outputs, kept, after, _as_before(shared, update.shared)


@partial(jax.jit, static_argnums=0)
def _observed(architecture: Architecture, theta: Arrays, shared: Arrays, loss: Array) -> Arrays:
    return _as_before(shared, architecture.observe_validation(theta, shared, loss))


@partial(jax.jit, static_argnums=(0, 2, 3))
def _zeros(
    architecture: Architecture, theta: Arrays, described: tuple[Described, ...], treedef: Any
) -> ArchitectureState:
    """State before the first step. Compiled: outside, architectures would commit it to one device."""
    states = []
    for leaf in described:
        if not leaf.size:
            states.append(TensorState(None, None, None, None, None))
            continue
        accumulates = architecture.accumulates(leaf.name, leaf.shape)
        state = initial_state(accumulates, jnp.zeros(leaf.shape, arithmetic(leaf.dtype)))
        states.append(TensorState(*(a if a.size else None for a in state)))
    shapes = [leaf.shape for leaf in described if leaf.size]
    rows = dict(architecture.init_rows(theta, shapes or [(1,)]))
    if not shapes:
        rows = {name: a[:0] for name, a in rows.items()}
    fields = zip(*states, strict=True) if states else [()] * len(TensorState._fields)
    start = ArchitectureState(
        jnp.zeros((), jnp.int32),
        TensorState(*(treedef.unflatten(list(field)) for field in fields)),
        rows,
        dict(architecture.init_shared(theta)),
    )
    # Without weak types: the state after a step has none, and would be compiled for again.
    return jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), start)


@lru_cache(maxsize=64)
def _expected(
    architecture: Architecture, described: tuple[Described, ...], treedef: Any
) -> tuple[Any, dict[str, tuple[tuple[int, ...], str]]]:
    """(structure, shape and dtype by path) of the state."""
    dtype = _widest(described)
    theta = {name: jax.ShapeDtypeStruct(s, dtype) for name, s in architecture.theta_shapes.items()}
    state = jax.eval_shape(lambda theta: _zeros(architecture, theta, described, treedef), theta)
    leaves = tree_flatten_with_path(state)[0]
    return jax.tree.structure(state), {
        f"state{keystr(path)}": (tuple(a.shape), a.dtype.name) for path, a in leaves
    }


def _checked(
    architecture: Architecture, described: tuple[Described, ...], treedef: Any, state: Any
) -> ArchitectureState:
    """`state` as arrays. Raises ValueError unless it fits the parameters."""
    remedy = "make the state with init(params) of these parameters"
    if not isinstance(state, ArchitectureState):
        raise ValueError(_not_a_state(state))
    structure, expected = _expected(architecture, described, treedef)
    leaves, found = tree_flatten_with_path(state)
    if found != structure:
        theirs = {f"state{keystr(path)}" for path, _ in leaves}
        first = min(theirs ^ expected.keys(), default="state")
        what = "missing" if first in expected else "not a part of it"
        raise ValueError(f"{first} is {what}: {remedy}")
    arrays = []
    for (_, value), (name, (shape, dtype)) in zip(leaves, expected.items(), strict=True):
        if (kind := kind_of(value)) != f"{dtype}{shape}":
            raise ValueError(f"{name} is {kind}, expected {dtype}{shape}: {remedy}")
        arrays.append(jnp.asarray(value))
    return structure.unflatten(arrays)


def _not_a_state(state: Any) -> str:
    return f"state is {type(state).__name__}, not an ArchitectureState: make it with init(params)"


def _widest(described: Sequence[Described]) -> str:
    """The type of the tensor level: the widest in which a parameter is updated."""
    return max((arithmetic(leaf.dtype) for leaf in described), default="float32")  # float32 or float64


def _like(number: Any, described: Sequence[Described]) -> Array:
    """A scalar in the type of the tensor level."""
    return jnp.asarray(number, _widest(described))


def _all_arrays(state: TensorState, p: Array) -> TensorState:
    """What is not used as arrays of size 0, as operations take it."""
    return TensorState(*(jnp.zeros((0,), p.dtype) if a is None else a for a in state))


def _without_missing(before: TensorState, after: TensorState) -> TensorState:
    """Inverse of `_all_arrays`, in the types of `before`."""
    return TensorState(
        *(None if a is None else b.astype(a.dtype) for a, b in zip(before, after, strict=True))
    )


def _as_before(before: Arrays, after: Mapping[str, Array]) -> Arrays:
    """`after` in the types of `before`, so that it may be carried through a loop."""
    return {name: jnp.asarray(after[name], a.dtype) for name, a in before.items()}
