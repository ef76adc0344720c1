"""One step over a whole tree of parameters: the custom calls of the kernels, and the reference in their place.

Both take and return the same arrays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp

from .. import reference
from ..backends import BACKENDS, BackendError, BackendWarning, cuda, native, refusal
from ..reference import Array
from ..spec import Spec
from .custom_call import PHASE_TARGETS, TARGETS, Choice, Operands, Step
from .sharded import step_on
from .state import put, take


@partial(jax.jit, static_argnums=0)
def learned_optimizer_step(step: Step, operands: Operands) -> tuple[list[Array], list[Array]]:
    """(outputs, new state buffers)."""
    if not operands.params:
        return [], operands.buffers
    kernels: dict[str, Any] = {name: partial(step_on, name, step) for name in step.choice.kernels}
    plain = partial(_reference, step)
    if kernels and step.choice.reference:
        return jax.lax.platform_dependent(operands, default=plain, **kernels)
    return next(iter(kernels.values()), plain)(operands)


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
    reason = refused(wanted) if wanted in TARGETS else f"JAX has no kernels for {wanted}"
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
    kernels = tuple(platform for platform in platforms if platform in TARGETS and refused(platform) is None)
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
    """Register the platform's custom calls with JAX at first use; None, or the reason why JAX refuses it."""
    try:
        core = native()
        if platform == "cuda":
            core.xla_set_device(cuda().device())
        name = "CUDA" if platform == "cuda" else platform
        jax.ffi.register_ffi_target(TARGETS[platform], core.xla_handlers()[platform], platform=name)
        jax.ffi.register_ffi_target(
            PHASE_TARGETS[platform], core.xla_phase_handlers()[platform], platform=name
        )
    except Exception as error:  # a handler that is refused must not take JAX down with it
        return f"JAX {jax.__version__} does not take the custom call ({type(error).__name__}: {error})"
    return None


def _reference(step: Step, operands: Operands) -> tuple[list[Array], list[Array]]:
    theta, count, scalars, buffers, params, grads = operands
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
