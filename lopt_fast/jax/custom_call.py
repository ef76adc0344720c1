"""The custom call of the kernels: one for a whole tree of parameters, or one for each phase where they are sharded.

The call aliases state with new state, and parameters with new parameters or else gradients with updates, so that what
is donated or an intermediate result is overwritten in place; of anything else XLA makes a copy first. Under vmap it
becomes one call with leading batch dimensions on everything. Operands and attributes are listed in csrc/xla_call.h. On
a GPU the call has scratch memory as one more result, which is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..backends import native
from ..layout import Loops, loops
from ..native import kernel_spec
from ..reference import Array
from ..spec import Spec
from .state import Layout, Leaf, Slot

TARGETS = {"cpu": "lopt_fast_small_fc_step", "cuda": "lopt_fast_small_fc_step_gpu"}
"""Name of the custom call, by JAX's name of the platform, which is also that of the backend."""
PHASE_TARGETS = {"cpu": "lopt_fast_small_fc_phase", "cuda": "lopt_fast_small_fc_phase_gpu"}
"""Of a phase of a step over parts of tensors."""
_FORMAT = 1  # of the attributes; csrc/xla_call.cc refuses others


class Theta(NamedTuple):
    """Meta-parameters, by dtype of the arithmetic: what the chosen backend does not read may be missing."""

    flat: dict[str, Array]
    """(theta_size,), as the kernels take them."""
    named: dict[str, dict[str, Array]]
    """Arrays of `Spec.theta_shapes`."""


class Choice(NamedTuple):
    """What computes a step."""

    kernels: tuple[str, ...]
    """Platforms with a kernel; the one that a program is lowered for takes its own."""
    reference: bool
    """Other platforms take the reference. If False there is one kernel, used whatever the platform."""


@dataclass(frozen=True)
class Step:
    """What is fixed when a step is traced."""

    spec: Spec
    layout: Layout
    present: tuple[int, ...]
    """Indices of the leaves that have a gradient."""
    clip: bool
    apply: bool
    """Return new parameters instead of what is to be added to them."""
    choice: Choice


class Operands(NamedTuple):
    """What a step is computed from."""

    theta: Theta
    count: Array
    """int32 [], steps taken before."""
    scalars: Array
    """(3,) learning rate, weight decay, largest gradient norm."""
    buffers: list[Array]
    """State buffers of `Step.layout`."""
    params: list[Array]
    grads: list[Array]
    """Of the leaves `Step.present`, in order."""


def kernel(step: Step, backend: str, operands: Operands) -> tuple[list[Array], list[Array]]:
    """(outputs, new state buffers) of a step over whole parameters."""
    leaves = [step.layout.leaves[i] for i in step.present]
    nests = [loops(leaf.shape) for leaf in leaves]
    scratch = []
    if backend == "cuda":
        size = native().xla_gpu_scratch_bytes(
            spec=kernel_spec(step.spec), leaves=list(map(astuple, nests)), clip=step.clip
        )
        scratch = [jnp.zeros(size, jnp.uint8)]
    found = call(
        TARGETS[backend],
        step,
        operands,
        [row(leaf, nest) for leaf, nest in zip(leaves, nests, strict=True)],
        results=scratch,
    )
    return found.outputs, found.buffers


class Found(NamedTuple):
    """Results of a call; empty lists where it does not return such arrays."""

    buffers: list[Array]
    outputs: list[Array]
    others: list[Array]


def row(leaf: Leaf, nest: Loops, slots: Sequence[Slot] | None = None) -> list[int]:
    """A parameter in the table of a call."""
    places = ((s.buffer, s.offset) if s.size else (-1, 0) for s in slots or leaf.slots)
    return [*map(int, astuple(nest)), *(n for place in places for n in place)]


def call(
    target: str,
    step: Step,
    operands: Operands,
    table: list[list[int]],
    *,
    extra: Sequence[Array] = (),
    results: Sequence[Array] = (),
    state: bool = True,
    outputs: bool = True,
    **attributes: np.ndarray,
) -> Found:
    """The custom call `target`.

    table: a `row` for each parameter. extra: operands behind the others. results: what further results are like.
    state, outputs: whether the state buffers, and the outputs of the parameters, are results.
    """
    spec, (theta, count, scalars, buffers, params, grads) = step.spec, operands
    all_operands = vary_like([count, scalars, *theta.flat.values(), *buffers, *params, *grads, *extra], ())
    first_buffer = 2 + len(theta.flat)
    first_param = first_buffer + len(buffers)
    first_in_place = first_param if step.apply else first_param + len(params)
    aliases: dict[int, int] = {}
    # The operands that results are like describe them, with the mesh axes that they vary over.
    like: list[Array] = []
    if state:
        aliases |= {first_buffer + i: i for i in range(len(buffers))}
        like += all_operands[first_buffer:first_param]
    if outputs:
        aliases |= {first_in_place + i: len(like) + i for i in range(len(params))}
        like += all_operands[first_param : first_param + len(params)]
    written = len(like)
    like += vary_like(list(results), all_operands)
    out = jax.ffi.ffi_call(target, like, vmap_method="broadcast_all", input_output_aliases=aliases)(
        *all_operands,
        call=np.array(
            [_FORMAT, len(theta.flat), len(params), spec.hidden_size, spec.hidden_layers, spec.scale == "parameter_rms",
             spec.statistics == "lagged", step.clip, step.apply],
            np.int64,
        ),
        reals=np.array([spec.step_mult, spec.exp_mult, spec.scale_epsilon], np.float64),
        sizes=np.array([math.prod(buffer.shape) for buffer in buffers], np.int64),
        leaves=np.array(table, np.int64).reshape(-1),
        **attributes,
    )  # fmt: skip
    found = list(out)
    first_output = len(buffers) if state else 0
    return Found(found[:first_output], found[first_output:written], found[written:])


def is_manual(arrays: Any) -> bool:
    """Whether this is traced for the program of one device of a mesh, inside shard_map."""
    if any(_varying_axes(a) for a in jax.tree.leaves(arrays)):
        return True
    if not hasattr(jax.sharding, "get_abstract_mesh"):  # before jax 0.5
        return False
    return bool(getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()))


def vary_like(arrays: list[Array], others: Sequence[Array]) -> list[Array]:
    """Inside shard_map: `arrays` as varying over all mesh axes that any of the arrays or the others varies over."""
    wanted = frozenset().union(*(_varying_axes(a) for a in (*arrays, *others)))
    if not wanted:
        return arrays
    missing = [tuple(sorted(wanted - _varying_axes(a))) for a in arrays]
    return [_cast(a, axes) if axes else a for a, axes in zip(arrays, missing, strict=True)]


def _cast(array: Array, axes: tuple[str, ...]) -> Array:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, axes, to="varying")
    return jax.lax.pvary(array, axes)  # before jax 0.8


def _varying_axes(array: Array) -> frozenset[str]:
    if not hasattr(jax, "typeof"):  # before jax 0.6
        return frozenset()
    aval: Any = jax.typeof(array)
    if hasattr(aval, "manual_axis_type"):
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))  # before jax 0.10
