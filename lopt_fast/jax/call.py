"""One step over a whole tree of parameters: the custom calls of the kernels, and the reference in their place.

Both take and return the same arrays. The custom call aliases state with new state, and parameters with new parameters
or else gradients with updates, so that what is donated or an intermediate result is overwritten in place; of anything
else XLA makes a copy first. Under vmap it becomes one call with leading batch dimensions on everything. Operands and
attributes are listed in csrc/xla_call.h. On a GPU the call has scratch memory as one more result, which is dropped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np

from .. import reference
from ..backends import BACKENDS, BackendError, BackendWarning, cuda, native, refusal
from ..layout import loops
from ..native import kernel_spec
from ..reference import Array
from ..spec import Spec
from .state import Layout, put, take

_TARGETS = {"cpu": "lopt_fast_small_fc_step", "cuda": "lopt_fast_small_fc_step_gpu"}
"""Name of the custom call, by JAX's name of the platform, which is also that of the backend."""
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


@partial(jax.jit, static_argnums=0)
def learned_optimizer_step(
    step: Step,
    theta: Theta,
    count: Array,
    scalars: Array,
    buffers: list[Array],
    params: list[Array],
    grads: list[Array],
) -> tuple[list[Array], list[Array]]:
    """(outputs, new state buffers).

    Args:
        count: int32 [], steps taken before.
        scalars: (3,) learning rate, weight decay, largest gradient norm.
        buffers: state buffers of `step.layout`.
        params, grads: of the leaves `step.present`, in order.
    """
    if not params:
        return [], buffers
    kernels = {name: partial(_kernel, step, name) for name in step.choice.kernels}
    plain = partial(_reference, step)
    arguments = (theta, count, scalars, buffers, params, grads)
    if kernels and step.choice.reference:
        return jax.lax.platform_dependent(*arguments, default=plain, **kernels)
    return next(iter(kernels.values()), plain)(*arguments)


def resolve(spec: Spec, dtypes: Sequence[str], backend: str, state_dtype: str | None = None) -> Choice:
    """`choice` of small_fc_lopt for parameters of these dtypes.

    State in bfloat16 is for the CUDA kernels alone, which round it stochastically: rounded to the nearest, a second
    moment would stand still.
    """
    platforms = known_platforms()

    def refused(platform: str) -> str | None:
        where = platform if platform in platforms else platforms[0]
        found = (refusal(platform, spec, where, dtype) for dtype in dtypes)
        return next(filter(None, found), None) or registration_failure(platform)

    if state_dtype == "bfloat16" and backend in ("auto", "cpu", "reference"):
        reason = refused("cuda") if backend == "auto" else f"backend={backend!r} keeps it in float32"
        if reason:
            raise BackendError(
                f"state_dtype='bfloat16' needs the CUDA kernels: {reason}. Leave it out to keep state in float32."
            )
        backend = "cuda"
    return choice("small_fc_lopt", refused, backend)


def choice(name: str, refused: Callable[[str], str | None], backend: str) -> Choice:
    """What computes the optimizer `name`, for the backend that the user named.

    refused: None if the kernels of a platform can compute it here, else the reason why not.
    Raises BackendError if `backend` is unknown or cannot be used here. With "auto" the reference is taken where there
    is no kernel, with a warning that says so once.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return Choice((), True)
    platforms = known_platforms()
    wanted = platforms[0] if backend == "auto" else backend
    reason = refused(wanted) if wanted in _TARGETS else f"JAX has no kernels for {wanted}"
    if reason and backend != "auto":
        raise BackendError(
            f"backend={backend!r} of {name} cannot be used: {reason}. "
            "Use backend='auto' to take the best that can, backend='reference' for plain array code."
        )
    if backend != "auto":
        return Choice((backend,), False)
    if reason:
        warn_once(
            f"{name} on {wanted} uses the reference implementation, which is slow: {reason}. "
            "backend='reference' chooses it without this warning."
        )
    kernels = tuple(platform for platform in platforms if platform in _TARGETS and refused(platform) is None)
    return Choice(kernels, reference=kernels != tuple(platforms) or len(kernels) > 1)


def known_platforms() -> list[str]:
    """Platforms for which a program may be lowered in this process, the default one first."""
    found = jax.extend.backend.backends()
    default = jax.extend.backend.get_backend()
    return sorted(found, key=lambda name: found[name] is not default)


@cache
def warn_once(message: str) -> None:
    """A BackendWarning, the first time that this is said."""
    warnings.warn(message, BackendWarning, stacklevel=7)  # who called update or step


@cache
def registration_failure(platform: str) -> str | None:
    """Register the platform's custom call with JAX at first use; None, or the reason why JAX refuses it."""
    try:
        core = native()
        if platform == "cuda":
            core.xla_set_device(cuda().device())
        name = "CUDA" if platform == "cuda" else platform
        jax.ffi.register_ffi_target(_TARGETS[platform], core.xla_handlers()[platform], platform=name)
    except Exception as error:  # a handler that is refused must not take JAX down with it
        return f"JAX {jax.__version__} does not take the custom call ({type(error).__name__}: {error})"
    return None


def _kernel(
    step: Step,
    backend: str,
    theta: Theta,
    count: Array,
    scalars: Array,
    buffers: list[Array],
    params: list[Array],
    grads: list[Array],
) -> tuple[list[Array], list[Array]]:
    spec = step.spec
    leaves = [step.layout.leaves[i] for i in step.present]
    operands = vary_like([count, scalars, *theta.flat.values(), *buffers, *params, *grads], ())
    first_buffer = 2 + len(theta.flat)
    first_param = first_buffer + len(buffers)
    first_in_place = first_param if step.apply else first_param + len(params)
    aliases = {first_buffer + i: i for i in range(len(buffers))}
    aliases |= {first_in_place + i: len(buffers) + i for i in range(len(params))}
    # The operands that results are like describe them, with the mesh axes that they vary over.
    results = operands[first_buffer : first_param + len(params)]
    nests = [astuple(loops(leaf.shape)) for leaf in leaves]
    table = [
        [*(int(n) for n in nest), *(n for slot in leaf.slots for n in _place(slot))]
        for nest, leaf in zip(nests, leaves, strict=True)
    ]
    if backend == "cuda":
        scratch = native().xla_gpu_scratch_bytes(spec=kernel_spec(spec), leaves=nests, clip=step.clip)
        results = [*results, *vary_like([jnp.zeros(scratch, jnp.uint8)], operands)]
    call = jax.ffi.ffi_call(
        _TARGETS[backend],
        results,
        vmap_method="broadcast_all",
        input_output_aliases=aliases,
    )
    out = call(
        *operands,
        call=np.array(
            [_FORMAT, len(theta.flat), len(leaves), spec.hidden_size, spec.hidden_layers, spec.scale == "parameter_rms",
             spec.statistics == "lagged", step.clip, step.apply],
            np.int64,
        ),
        reals=np.array([spec.step_mult, spec.exp_mult, spec.scale_epsilon], np.float64),
        sizes=np.array([math.prod(shape) for shape in step.layout.shapes], np.int64),
        leaves=np.array(table, np.int64).reshape(-1),
    )  # fmt: skip
    return list(out[len(buffers) : len(buffers) + len(params)]), list(out[: len(buffers)])


def _place(slot: Any) -> tuple[int, int]:
    return (slot.buffer, slot.offset) if slot.size else (-1, 0)


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


def _reference(
    step: Step,
    theta: Theta,
    count: Array,
    scalars: Array,
    buffers: list[Array],
    params: list[Array],
    grads: list[Array],
) -> tuple[list[Array], list[Array]]:
    new_buffers, outputs = list(buffers), []
    grad_scale: Array = jnp.ones((), scalars.dtype)
    if step.clip:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(scalars.dtype))) for g in grads))
        grad_scale = jnp.minimum(1.0, scalars[2] / (norm + reference.CLIP_EPSILON))
    for index, p, g in zip(step.present, params, grads, strict=True):
        leaf = step.layout.leaves[index]
        p, g, lr, weight_decay, scale = (
            x.astype(leaf.arithmetic) for x in (p, g, scalars[0], scalars[1], grad_scale)
        )
        with jax.default_matmul_precision("highest"):  # a GPU would take tf32
            delta, state = reference.update(
                step.spec, theta.named[leaf.arithmetic], p, g, take(buffers, leaf), count,
                lr=lr, weight_decay=weight_decay, grad_scale=scale,
            )  # fmt: skip
        put(new_buffers, leaf, state)
        outputs.append((p + delta if step.apply else delta).astype(leaf.dtype))
    return outputs, new_buffers
