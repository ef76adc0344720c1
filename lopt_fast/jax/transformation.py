"""The optimizer as an optax gradient transformation."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path

from ..checkpoint import Checkpoint, load
from ..native import flat_theta
from ..reference import Array, flatten_theta
from ..spec import Spec, SpecError, Statistics
from .call import Choice, Step, Theta, learned_optimizer_step, resolve, vary_like
from .state import Leaf, LearnedOptimizerState, layout, packed_dtypes

Schedule: TypeAlias = Callable[[Array], Array]


class LearnedOptimizer(optax.GradientTransformationExtraArgs):
    """The pair (init, update) of optax, and `step`, which applies the update as it computes it.

    `step(grads, state, params)` returns (new params, new state): the same as `update` followed by
    `optax.apply_updates`, without writing and reading the updates. With `params` and `state` donated to `jax.jit`
    both are overwritten in place.
    """

    step: Callable[..., tuple[Any, LearnedOptimizerState]]


def learned_optimizer(
    optimizer: str | os.PathLike[str] | Checkpoint | Spec | None = None,
    learning_rate: float | Array | Schedule = 1.0,
    weight_decay: float | Array = 0.0,
    *,
    theta: Mapping[str, Array] | None = None,
    statistics: Statistics | None = None,
    max_grad_norm: float | Array | None = None,
    backend: str = "auto",
    num_steps: int | None = None,
) -> LearnedOptimizer:
    """A learned optimizer for JAX (Metz et al. 2022, arXiv 2203.11860, Appendix A).

    The update is ``-learning_rate * (step + weight_decay * params)``, with the step of the optimizer's network. It
    works under `jax.jit` (donate `params` and state to update in place), `jax.lax.scan`, `jax.vmap` over any of
    parameters, gradients, state, meta-parameters and hyperparameters, and inside `jax.shard_map`, where statistics
    are those of each shard.

    Args:
        optimizer: name of shipped weights, path of a checkpoint, a Checkpoint, or a Spec together with `theta`;
            None: the default weights.
        learning_rate: multiplies the step; a number, a scalar array, or an optax schedule of the step count.
        weight_decay: decoupled: the parameter times this is added to the step.
        theta: meta-parameters, arrays by the names of `Spec.theta_shapes`, in place of the checkpoint's; may be
            traced and batched (meta-training).
        statistics: "exact" or "lagged"; None: as the checkpoint says.
        max_grad_norm: gradients are scaled down to this norm, over all of them together; None: they are not.
        backend: "auto", "cpu" or "cuda" (the kernels; "cuda" takes float32 parameters), or "reference" (plain array
            code; also differentiable).
        num_steps: horizon of the training, for architectures that know theirs; not used by this one.

    Returns:
        A `optax.GradientTransformationExtraArgs` with the additional method `step`. Extra arguments (`value=loss`)
        are accepted. A None among the gradients leaves that parameter and its state as they are.

    Raises:
        CheckpointError, SpecError: a checkpoint, specification or meta-parameters that cannot be used.
        BackendError: at `update`, a backend that cannot be used here.
        ValueError: hyperparameters out of range; at `init` and `update`, trees, shapes or types that do not fit,
            named by their path.
    """
    del num_steps
    spec, theta = _spec_and_theta(optimizer, theta)
    if statistics is not None:
        spec = dataclasses.replace(spec, statistics=statistics)
    _check_number("learning_rate", learning_rate)
    _check_number("weight_decay", weight_decay)
    if max_grad_norm is not None:
        _check_number("max_grad_norm", max_grad_norm, positive=True)

    def init(params: Any) -> LearnedOptimizerState:
        paths, leaves, treedef = _flatten(params)
        plan = layout(spec, _described(paths, leaves), packed_dtypes())
        count, *buffers = vary_like([jnp.zeros((), jnp.int32), *plan.zeros()], leaves)
        return plan.unflatten(count, buffers, treedef)

    def advance(apply: bool, grads: Any, state: Any, params: Any) -> tuple[Any, LearnedOptimizerState]:
        if params is None:
            raise ValueError("a learned optimizer reads the parameters: call update(grads, state, params)")
        paths, leaves, treedef = _flatten(params)
        plan = layout(spec, _described(paths, leaves), packed_dtypes())
        count, buffers = plan.flatten(state, treedef)
        found = _gradients(grads, params, treedef, plan.leaves)
        present = tuple(i for i, leaf in enumerate(plan.leaves) if found[i] is not None and leaf.size > 0)
        dtypes = sorted({plan.leaves[i].dtype for i in present})
        chosen = resolve(spec, dtypes, backend) if present else Choice((), True)
        outputs, buffers = learned_optimizer_step(
            Step(spec, plan, present, max_grad_norm is not None, apply, chosen),
            _theta(spec, theta, dtypes, chosen),
            count,
            _scalars(learning_rate, weight_decay, max_grad_norm, count),
            buffers,
            [leaves[i] for i in present],
            [found[i] for i in present],
        )
        result = list(leaves) if apply else [jnp.zeros_like(p) for p in leaves]  # where there is no gradient
        for i, output in zip(present, outputs, strict=True):
            result[i] = output
        return treedef.unflatten(result), plan.unflatten(optax.safe_increment(count), buffers, treedef)

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        return advance(False, grads, state, params)

    def step(grads: Any, state: Any, params: Any, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        return advance(True, grads, state, params)

    transformation = LearnedOptimizer(init, update)
    transformation.step = step
    return transformation


def _spec_and_theta(
    optimizer: str | os.PathLike[str] | Checkpoint | Spec | None, theta: Mapping[str, Array] | None
) -> tuple[Spec, Mapping[str, Array]]:
    if isinstance(optimizer, Spec):
        if theta is None:
            raise SpecError("a Spec has no meta-parameters: give theta=..., or a checkpoint instead")
        spec = optimizer
    else:
        checkpoint = load(optimizer)
        spec, theta = checkpoint.spec, checkpoint.theta if theta is None else theta
    arrays = {n: a if isinstance(a, (jax.Array, np.ndarray)) else jnp.asarray(a) for n, a in theta.items()}
    spec.check_theta(arrays)
    return spec, arrays


def _check_number(name: str, value: Any, positive: bool = False) -> None:
    """Scalars, checked as far as they are known: traced ones are not."""
    if callable(value) and name == "learning_rate":
        return
    dtype = _dtype(value)
    if not dtype.startswith(("float", "bfloat", "int", "uint")) or jnp.shape(value) != ():
        raise ValueError(f"{name}={value!r}: must be a real number or a scalar array")
    if isinstance(value, (int, float)) and not (math.isfinite(value) and (value > 0 or not positive)):
        raise ValueError(f"{name}={value!r}: must be finite{' and positive' if positive else ''}")


def _flatten(params: Any) -> tuple[list[str], list[Array], Any]:
    """Paths, arrays and structure. Raises ValueError for a leaf that is neither float32 nor float64."""
    with_path, treedef = tree_flatten_with_path(params)
    paths = [keystr(path) for path, _ in with_path]
    leaves = []
    for path, (_, value) in zip(paths, with_path, strict=True):
        dtype = _dtype(value)
        if dtype not in packed_dtypes():
            raise ValueError(
                f"params{path} is {dtype or type(value).__name__}: parameters must be float32"
                f"{' or float64' if 'float64' in packed_dtypes() else ''}; cast it, or leave it out with optax.masked"
            )
        leaves.append(jnp.asarray(value, dtype))
    return paths, leaves, treedef


def _dtype(value: Any) -> str:
    """Name of the dtype as JAX takes it at the moment, empty if `value` is not an array."""
    if isinstance(value, jax.Array):
        return str(value.dtype)
    try:
        return str(jnp.asarray(value).dtype)
    except (TypeError, ValueError):
        return ""


def _described(paths: Sequence[str], leaves: Sequence[Array]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return tuple((p, tuple(a.shape), a.dtype.name) for p, a in zip(paths, leaves, strict=True))


def _gradients(grads: Any, params: Any, treedef: Any, leaves: Sequence[Leaf]) -> list[Array | None]:
    """The gradient of each leaf, None where there is none. Raises ValueError that names the leaf that does not fit."""
    try:
        found = treedef.flatten_up_to(grads)
    except ValueError as error:
        theirs, ours = ({keystr(path) for path, _ in tree_flatten_with_path(t)[0]} for t in (grads, params))
        first = min(theirs ^ ours, default="")
        where = f"{'params' if first in ours else 'grads'}{first} is in only one" if first else str(error)
        raise ValueError(f"grads and params are different trees: {where}") from None
    arrays: list[Array | None] = []
    for leaf, gradient in zip(leaves, found, strict=True):
        if gradient is None:
            arrays.append(None)
            continue
        dtype = _dtype(gradient)
        shape = jnp.shape(gradient) if dtype else ()
        if (dtype, shape) != (leaf.dtype, leaf.shape):
            kind = f"{dtype}{shape}" if dtype else type(gradient).__name__
            raise ValueError(f"grads{leaf.path} is {kind}, its parameter {leaf.dtype}{leaf.shape}")
        arrays.append(jnp.asarray(gradient, dtype))
    return arrays


def _theta(spec: Spec, theta: Mapping[str, Array], dtypes: Sequence[str], choice: Choice) -> Theta:
    """The meta-parameters in the form that the backend takes; those that are constants are folded here."""
    flat: dict[str, Array] = {}
    named: dict[str, dict[str, Array]] = {}
    if choice.reference:
        named = {dtype: {name: jnp.asarray(a, dtype) for name, a in theta.items()} for dtype in dtypes}
    if choice.kernels:
        if all(isinstance(a, np.ndarray) for a in theta.values()):
            flat = {dtype: jnp.asarray(a) for dtype, a in flat_theta(spec, theta).items() if dtype in dtypes}
        else:
            flat = {
                d: flatten_theta(spec, {name: jnp.asarray(a, d) for name, a in theta.items()}) for d in dtypes
            }
    return Theta(flat, named)


def _scalars(
    learning_rate: float | Array | Schedule,
    weight_decay: float | Array,
    max_grad_norm: float | Array | None,
    count: Array,
) -> Array:
    lr = learning_rate(count) if callable(learning_rate) else learning_rate
    values = (lr, weight_decay, 0.0 if max_grad_norm is None else max_grad_norm)
    return jnp.stack([jnp.asarray(x, jnp.result_type(float)) for x in values])
