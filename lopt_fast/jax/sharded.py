"""A step over parameters that are sharded over devices, under `jax.jit`: each device updates the parts that it holds.

XLA's partitioner asks for the program of one device (`jax.experimental.custom_partitioning`). It is the phases of
csrc/core.h, with the sums that they give added up over all devices of the mesh in between. The result is that of the
whole parameters, up to rounding (state in bfloat16: up to other random bits). Momentum and second moment of a large
parameter are sharded as it is; packed state (small parameters, and the row and column accumulators of all) lies on
every device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..backends import native
from ..layout import Loops, Part, factored_dims, loops
from ..native import Placement, kernel_spec
from ..reference import CLIP_EPSILON, Array
from .custom_call import PHASE_TARGETS, Operands, Step, Theta, call, is_manual, kernel, row
from .state import Layout, Leaf, Slot

Result: TypeAlias = tuple[list[Array], list[Array]]
"""Outputs, state buffers."""
Cut: TypeAlias = tuple[tuple[str, ...], ...]
"""Of each axis of a parameter, the mesh axes that it is sharded over."""

_enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8
_PHASES = ("factor_sums", "feature_sums", "apply", "finish")  # PartPhase of csrc/core.h


def step_on(platform: str, step: Step, operands: Operands) -> Result:
    """`kernel` of a platform; parameters that turn out to be sharded stay so."""
    operands = operands._replace(theta=Theta(operands.theta.flat, {}))
    if not _can_be_partitioned(platform, operands):
        return kernel(step, platform, operands)

    @jax.custom_batching.custom_vmap
    def partitioned(operands: Operands) -> Result:
        result: Result = _partitioned(platform, step, operands)
        return result

    @partitioned.def_vmap  # the partitioner's call has no batching rule
    def batched(axis_size: int, in_batched: list[Any], operands: Operands) -> tuple[Result, Any]:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched[0])
        result = jax.vmap(partial(kernel, step, platform), in_axes=(axes,), axis_size=axis_size)(operands)
        return result, jax.tree.map(lambda a: True, result)

    result: Result = partitioned(operands)
    return result


def device_count(platform: str) -> int:
    """Devices of a platform; 1 where there is none and programs for it are lowered alone."""
    try:
        return jax.device_count(platform)
    except RuntimeError:
        return 1


def _can_be_partitioned(platform: str, operands: Operands) -> bool:
    """Whether there are devices to partition for, and JAX can."""
    if device_count(platform) == 1 or jax.__version_info__ < (0, 7) or is_manual(operands):
        return False
    explicit = getattr(jax.sharding.get_abstract_mesh(), "explicit_axes", ())
    return not explicit or jax.__version_info__ >= (0, 9)


def _partitioned(platform: str, step: Step, operands: Operands) -> Result:
    """The step as XLA's partitioner is to see it."""
    x64 = jax.config.jax_enable_x64

    def on_device(mesh: Mesh, cuts: list[Cut], operands: Operands) -> Result:
        with _enable_x64(x64):  # traced in a thread that knows nothing of the caller's `with`
            return _on_device(platform, step, mesh, cuts, operands)

    def partition(mesh: Mesh, arguments: Any, result: Any) -> Any:
        del result
        cuts = _cuts(step, mesh, arguments[0])
        wanted = _shardings(step, mesh, cuts, arguments[0])
        return mesh, partial(on_device, mesh, cuts), (wanted.params, wanted.buffers), (wanted,)

    def infer(mesh: Mesh, arguments: Any, result: Any) -> Any:
        return partition(mesh, arguments, result)[2]

    whole: Any = custom_partitioning(partial(kernel, step, platform))
    whole.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=_sharding_rule(step, operands),
    )
    return whole(operands)


def _sharding_rule(step: Step, operands: Operands) -> Any:
    """For Shardy: the axes of a parameter, its gradient, its output and its own state are sharded alike."""
    from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule  # not before jax 0.5

    names = map(str, itertools.count())
    together = [[f"p{next(names)}" for _ in leaf.shape] for leaf in step.layout.leaves]
    own = {leaf.own: axes for leaf, axes in zip(step.layout.leaves, together, strict=True)}
    free = {name for leaf in step.layout.leaves if leaf.own is not None for name in own[leaf.own]}

    def alone(rank: int) -> list[str]:
        return [f"a{next(names)}" for _ in range(rank)]

    numbers = [alone(1) for _ in operands.theta.flat] + [alone(0), alone(1)]
    buffers = [
        [*alone(1), *own[k]] if k in own else alone(len(shape)) for k, shape in enumerate(step.layout.shapes)
    ]
    leaves = [together[i] for i in step.present]
    inputs, outputs = [*numbers, *buffers, *leaves, *leaves], [*leaves, *buffers]
    factors = dict.fromkeys(itertools.chain(*inputs))
    return SdyShardingRule(
        tuple(ArrayMapping(*axes) for axes in inputs),
        tuple(ArrayMapping(*axes) for axes in outputs),
        need_replication_factors=tuple(name for name in factors if name not in free),
    )


# ---- what lies where ----


def zeros(layout: Layout, params: Sequence[Array]) -> tuple[Array, list[Array]]:
    """The count and the state buffers before the first step.

    Where it is known how parameters are sharded (outside of `jax.jit`, or by explicit sharding), their own state is
    sharded in the same way, and all else lies on every device.
    """
    known = [_sharding_of(p) for p in params]
    where = {leaf.own: s for leaf, s in zip(layout.leaves, known, strict=True) if leaf.own is not None}
    meshes = [s.mesh for s in known if s is not None]

    def make(shape: tuple[int, ...], dtype: str, of: NamedSharding | None = None) -> Array:
        if not meshes:
            return jnp.zeros(shape, dtype)
        sharding = NamedSharding(meshes[0], P()) if of is None else NamedSharding(of.mesh, P(None, *of.spec))
        if any(isinstance(p, jax.core.Tracer) for p in params):
            return jnp.zeros(shape, dtype, out_sharding=sharding)
        return jnp.zeros(shape, dtype, device=sharding)

    described = enumerate(zip(layout.shapes, layout.dtypes, strict=True))
    return make((), "int32"), [make(shape, dtype, where.get(i)) for i, (shape, dtype) in described]


def _sharding_of(p: Array) -> NamedSharding | None:
    """None if `p` lies on one device, or it is not known yet where it will."""
    if isinstance(p, jax.core.Tracer):
        sharding = getattr(jax.typeof(p), "sharding", None) if hasattr(jax, "typeof") else None
        return sharding if sharding is not None and any(sharding.spec) else None
    sharding = p.sharding
    return sharding if isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1 else None


def _cuts(step: Step, mesh: Mesh, operands: Any) -> list[Cut]:
    """How each parameter of the layout is cut: as its own state is, or else as it is itself."""
    given = dict(zip(step.present, operands.params, strict=True))
    cuts = []
    for i, leaf in enumerate(step.layout.leaves):
        nothing: Cut = ((),) * len(leaf.shape)
        if leaf.own is None or any(slot.size and slot.buffer != leaf.own for slot in _full_size(leaf)):
            cuts.append(nothing)
            continue
        cut = _cut_of(mesh, operands.buffers[leaf.own], leaf.shape, skip=1)
        if cut == nothing and i in given:
            cut = _cut_of(mesh, given[i], leaf.shape)
        cuts.append(cut)
    return cuts


def _full_size(leaf: Leaf) -> list[Slot]:
    """The accumulators of the parameter's size."""
    slots = [leaf.slots.momentum, leaf.slots.second_moment]
    return slots if factored_dims(leaf.shape) else [*slots, leaf.slots.factored_row]


def _cut_of(mesh: Mesh, array: Any, shape: tuple[int, ...], skip: int = 0) -> Cut:
    """Of the last axes of an array; axes that the devices do not divide are not cut."""
    spec = getattr(array.sharding, "spec", ())
    entries = [*spec, *(None,) * (skip + len(shape) - len(spec))][skip:]
    axes = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]
    known = [names if all(name in mesh.shape for name in names) else () for names in axes]
    return tuple(
        names if n % math.prod(mesh.shape[name] for name in names) == 0 else ()
        for names, n in zip(known, shape, strict=True)
    )


def _shardings(step: Step, mesh: Mesh, cuts: list[Cut], operands: Any) -> Any:
    """Of the operands; outputs lie as parameters do."""
    shardings = jax.tree.map(lambda a: NamedSharding(mesh, P()), operands)
    leaves = [NamedSharding(mesh, P(*cut)) for cut in cuts]
    for leaf, cut in zip(step.layout.leaves, cuts, strict=True):
        if leaf.own is not None:
            shardings.buffers[leaf.own] = NamedSharding(mesh, P(None, *cut))
    present = [leaves[i] for i in step.present]
    return shardings._replace(params=present, grads=present)


# ---- the program of one device ----


@dataclass(frozen=True)
class _Local:
    """A parameter with a gradient, as one device sees it."""

    leaf: Leaf
    cut: Cut
    part: Part
    """Its `begin` is not known here: it differs from device to device."""

    @classmethod
    def of(cls, leaf: Leaf, cut: Cut, mesh: Mesh) -> _Local:
        pieces = [math.prod(mesh.shape[name] for name in names) for names in cut]
        shape = tuple(n // k for n, k in zip(leaf.shape, pieces, strict=True))
        copies = mesh.size // math.prod(pieces)
        return cls(leaf, cut, Part(shape, leaf.shape, (0,) * len(shape), copies))

    @property
    def nest(self) -> Loops:
        return loops(self.part.shape, whole=self.part.whole)

    @property
    def begin(self) -> list[Array]:
        """Of each axis; a scalar has one."""
        if not self.cut:
            return [jnp.zeros((), jnp.int32)]
        return [
            jax.lax.axis_index(names) * n if names else jnp.zeros((), jnp.int32)
            for names, n in zip(self.cut, self.part.shape, strict=True)
        ]

    @property
    def table(self) -> list[int]:
        """Row of the attribute `parts`."""
        ndim = max(len(self.part.shape), 1)
        x_axis, y_axis = sorted(factored_dims(self.part.whole) or (0, 0))
        shape, whole = self.part.shape or (1,), self.part.whole or (1,)
        return [ndim, x_axis, y_axis, self.part.copies, *shape, *whole]

    @property
    def slots(self) -> list[Slot]:
        """Where the accumulators lie in the state buffers of the device."""
        mine, all_elements = math.prod(self.part.shape), self.leaf.size
        return [
            replace(slot, offset=slot.offset // all_elements * mine, shape=(slot.shape[0], *self.part.shape))
            if slot.size and slot.buffer == self.leaf.own
            else slot
            for slot in self.leaf.slots
        ]

    @property
    def sums(self) -> int:
        """Length of its `factors`."""
        return int(self.native_part.sums(factored=self.nest.factored))

    @property
    def native_part(self) -> Any:
        return Placement(self.part.shape, tuple(range(len(self.part.shape))), part=self.part).native_part()


class _Sums(NamedTuple):
    """What the phases give and take, see csrc/core.h."""

    factors: Array
    squares: Array


def _on_device(platform: str, step: Step, mesh: Mesh, cuts: list[Cut], operands: Operands) -> Result:
    """The step of one device, on what it holds."""
    if not any(names for cut in cuts for names in cut):
        return kernel(step, platform, operands)
    local = [_Local.of(step.layout.leaves[i], cuts[i], mesh) for i in step.present]
    dtype = jnp.dtype(jnp.float32) if platform == "cuda" else operands.scalars.dtype
    everywhere = mesh.axis_names
    operands = operands._replace(scalars=_with_scale(step, local, operands, everywhere))
    step = replace(step, clip=False)
    begin = jnp.stack([n for leaf in local for n in leaf.begin]).astype(jnp.int32)
    none = _Sums(
        jnp.zeros(sum(leaf.sums for leaf in local), dtype),
        jnp.zeros(len(local) * native().part_squares, dtype),
    )
    scratch = _scratch(platform, step, local)

    def phase(
        name: str, operands: Operands, sums: _Sums, state: bool = False, outputs: bool = False
    ) -> tuple[_Sums, Operands, list[Array]]:
        found = call(
            PHASE_TARGETS[platform],
            step,
            operands,
            [row(leaf.leaf, leaf.nest, leaf.slots) for leaf in local],
            extra=(begin, *sums),
            results=[*scratch, *sums],
            state=state,
            outputs=outputs,
            phase=np.array([_PHASES.index(name)], np.int64),
            parts=np.array([n for leaf in local for n in leaf.table], np.int64),
        )
        return _Sums(*found.others[len(scratch) :]), operands._replace(buffers=found.buffers), found.outputs

    def added_up(sums: _Sums) -> _Sums:
        return _Sums(*(jax.lax.psum(a, everywhere) for a in sums))

    def exact(sums: _Sums) -> _Sums:
        factors = jax.lax.psum(phase("factor_sums", operands, sums)[0].factors, everywhere)
        squares = phase("feature_sums", operands, sums._replace(factors=factors))[0].squares
        return _Sums(factors, jax.lax.psum(squares, everywhere))

    if step.spec.statistics == "exact":
        _, after, outputs = phase("apply", operands, exact(none), state=True, outputs=True)
        return outputs, after.buffers
    sums = jax.lax.cond(operands.count == 0, exact, lambda sums: sums, none)
    sums, after, outputs = phase("apply", operands, sums, state=True, outputs=True)
    _, after, _ = phase("finish", after, added_up(sums), state=True)
    return outputs, after.buffers


def _scratch(platform: str, step: Step, local: Sequence[_Local]) -> list[Array]:
    """What the scratch memory of a phase is like, if it needs any."""
    if platform == "cpu":
        return []
    size = native().xla_gpu_phase_scratch_bytes(
        spec=kernel_spec(step.spec),
        leaves=[astuple(leaf.nest) for leaf in local],
        parts=[leaf.native_part for leaf in local],
    )
    return [jnp.zeros(size, jnp.uint8)]


def _with_scale(step: Step, local: Sequence[_Local], operands: Operands, everywhere: Any) -> Array:
    """The scalars with what multiplies the gradients in place of the largest norm."""
    scalars = operands.scalars
    if not step.clip:
        return scalars.at[2].set(1.0)
    squares = [
        jnp.sum(jnp.square(g.astype(scalars.dtype))) / leaf.part.copies
        for leaf, g in zip(local, operands.grads, strict=True)
    ]
    norm = jnp.sqrt(jax.lax.psum(sum(squares), everywhere))
    return scalars.at[2].set(jnp.minimum(1.0, scalars[2] / (norm + CLIP_EPSILON)))
