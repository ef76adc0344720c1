"""The optimizer as an optax gradient transformation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from ..architectures import Architecture
from ..backends import BackendError
from ..checkpoint import Checkpoint, load
from ..native import arithmetic, flat_theta
from ..reference import Array, flatten_theta
from ..spec import Spec, SpecError, Statistics
from . import architecture, sharded
from .call import learned_optimizer_step, resolve
from .custom_call import Choice, Operands, Step, Theta, vary_like
from .state import Layout, LearnedOptimizerState, layout, packed_dtypes, state_dtype_name
from .trees import (
    Described,
    Schedule,
    check_number,
    dtype_of,
    flatten,
    gradients,
    kind_of,
    scalars,
)


class LearnedOptimizer(optax.GradientTransformationExtraArgs):
    """The pair (init, update) of optax, and `step`, which applies the update as it computes it.

    `step(grads, state, params)` returns (new params, new state): the same as `update` followed by
    `optax.apply_updates`, without writing and reading the updates. With `params` and `state` donated to `jax.jit`
    both are overwritten in place.

    `observe_validation(state, loss)` returns the state after a loss on validation data has been seen, between two
    updates; architectures that do not look at it return the state as it is.
    """

    step: Callable[..., tuple[Any, Any]]
    observe_validation: Callable[[Any, Any], Any]


def learned_optimizer(
    optimizer: str | os.PathLike[str] | Checkpoint | Spec | Architecture | None = None,
    learning_rate: float | Array | Schedule = 1.0,
    weight_decay: float | Array = 0.0,
    *,
    theta: Mapping[str, Array] | None = None,
    statistics: Statistics | None = None,
    max_grad_norm: float | Array | None = None,
    backend: str = "auto",
    num_steps: float | Array | None = None,
    state_dtype: DTypeLike | None = None,
) -> LearnedOptimizer:
    """A learned optimizer for JAX: `small_fc_lopt` (Metz et al. 2022, arXiv 2203.11860) or any other architecture.

    The update is ``-learning_rate * (step + weight_decay * params)``, with the step of the optimizer's network.
    Parameters are float32, bfloat16, float16 or, where JAX has it enabled, float64, mixed as you like. A gradient has
    the dtype of its parameter; so have updates and new parameters, rounded to the nearest, once: arithmetic and state
    are in float32, for float64 parameters in float64. An update of `update` is rounded before it is added, and a sum
    of bfloat16 again: `step` loses less.

    It works under `jax.jit` (donate `params` and state to update in place), `jax.lax.scan`, `jax.vmap` over any of
    parameters, gradients, state, meta-parameters, hyperparameters and losses, and inside `jax.shard_map`, where
    statistics are those of each shard. Under `jax.jit` sharded parameters give the same result as whole ones: the
    kernels of `small_fc_lopt` update on each device the parts that it holds, those of other architectures have them
    gathered for the step (docs/sharding.md). Call `init` outside of `jax.jit` to have state sharded as they are.

    Architectures other than `small_fc_lopt` have state of their own,
    `ArchitectureState`. With backend="reference" XLA compiles each shape of parameter once, in about 4 seconds of a
    CPU core where there is an MLP for every parameter, and in 0.1 seconds for each parameter (100 parameters of 5
    shapes: celo 30 seconds, celo_adam 12).

    Args:
        optimizer: name of shipped weights, path of a checkpoint, a Checkpoint, or hyperparameters (a Spec or an
            Architecture) together with `theta`; None: the default weights.
        learning_rate: multiplies the step; a number, a scalar array, or an optax schedule of the step count.
        weight_decay: decoupled: the parameter times this is added to the step.
        theta: meta-parameters, arrays by the names of `theta_shapes`, in place of the checkpoint's; may be traced and
            batched (meta-training).
        statistics: "exact" or "lagged"; None: as the checkpoint says.
        max_grad_norm: gradients are scaled down to this norm, over all of them together; None: they are not.
        backend: "auto", "cpu" or "cuda" (the kernels; "cuda" does not take float64 parameters), or "reference" (plain
            array code; also differentiable).
        num_steps: length of the whole training, for architectures that know theirs (`celo`, `velo`); others do not
            look at it. A number or a scalar array, which may be traced, so that one program serves many lengths.
            It may be changed on resuming: time is what fraction of it has passed, so the schedule is stretched.
        state_dtype: of momentum and second moment of `small_fc_lopt`; None: float32, or float64 where the parameter is.
            The CUDA kernels take jnp.bfloat16 as well, rounded stochastically and reproducibly: half the state. In
            `optax.inject_hyperparams` give the name, "bfloat16": a type would be taken for a schedule.

    Returns:
        A `optax.GradientTransformationExtraArgs` with the additional methods `step` and `observe_validation`. Extra
        arguments are accepted; architectures that look at the loss need `value=loss`, the training loss of these
        gradients. A None among the gradients leaves that parameter and its state as they are.

    Raises:
        CheckpointError, SpecError: a checkpoint, specification or meta-parameters that cannot be used.
        BackendError: at `update`, a backend that cannot be used here, or no backend takes `state_dtype`.
        ValueError: hyperparameters out of range (a learning rate or a weight decay below 0, where it is a constant) or
            missing; at `init` and `update`, trees, shapes or types that do not fit, named by their path, and a loss
            that is missing.
    """
    spec, theta = _spec_and_theta(optimizer, theta)
    spec = spec.with_statistics(statistics)
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, "not negative")
    check_number("weight_decay", weight_decay, "not negative")
    if max_grad_norm is not None:
        check_number("max_grad_norm", max_grad_norm, "positive")
    if num_steps is not None:
        check_number("num_steps", num_steps, "positive")
    state_type = state_dtype_name(state_dtype)
    if isinstance(spec, Architecture):
        if state_type == "bfloat16":
            raise BackendError(f"state_dtype='bfloat16': {spec.NAME} keeps its state in float32")
        if spec.needs_num_steps and num_steps is None:
            raise ValueError(f"{spec.NAME} needs num_steps=..., the number of steps of the whole training")
        chosen = architecture.Optimizer(
            spec, theta, learning_rate, weight_decay, max_grad_norm, num_steps, backend
        )
        return _transformation(chosen.init, chosen.advance, chosen.observe_validation)
    init, advance = _small_fc_lopt(
        spec, theta, learning_rate, weight_decay, max_grad_norm, backend, state_type
    )
    return _transformation(init, advance, lambda state, loss: state)


def _transformation(
    init: Callable[[Any], Any],
    advance: Callable[[bool, Any, Any, Any, Any], tuple[Any, Any]],
    observe_validation: Callable[[Any, Any], Any],
) -> LearnedOptimizer:
    """`advance` takes (apply, gradients, state, parameters, loss or None)."""

    def checked(apply: bool, grads: Any, state: Any, params: Any, value: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("a learned optimizer reads the parameters: call update(grads, state, params)")
        return advance(apply, grads, state, params, value)

    def update(
        grads: Any, state: Any, params: Any = None, *, value: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        return checked(False, grads, state, params, value)

    def step(grads: Any, state: Any, params: Any, *, value: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        return checked(True, grads, state, params, value)

    transformation = LearnedOptimizer(init, update)
    transformation.step = step
    transformation.observe_validation = observe_validation
    return transformation


def _small_fc_lopt(
    spec: Spec,
    theta: Mapping[str, Array],
    learning_rate: float | Array | Schedule,
    weight_decay: float | Array,
    max_grad_norm: float | Array | None,
    backend: str,
    state_dtype: str | None,
) -> tuple[Callable[[Any], Any], Callable[..., tuple[Any, Any]]]:
    """(init, advance), see `_transformation`."""

    def laid_out(described: Sequence[Described]) -> Layout:
        return layout(spec, tuple(leaf[:3] for leaf in described), packed_dtypes(state_dtype), state_dtype)

    def init(params: Any) -> LearnedOptimizerState:
        described, leaves, treedef = flatten(params)
        plan = laid_out(described)
        count, buffers = sharded.zeros(plan, leaves)
        count, *buffers = vary_like([count, *buffers], leaves)
        return plan.unflatten(count, buffers, treedef)

    def advance(
        apply: bool, grads: Any, state: Any, params: Any, loss: Any
    ) -> tuple[Any, LearnedOptimizerState]:
        del loss
        described, leaves, treedef = flatten(params)
        plan = laid_out(described)
        count, buffers = plan.flatten(state, treedef)
        found = gradients(grads, params, treedef, described)
        present = tuple(i for i, leaf in enumerate(plan.leaves) if found[i] is not None and leaf.size > 0)
        dtypes = sorted({plan.leaves[i].dtype for i in present})
        chosen = resolve(spec, dtypes, backend, state_dtype) if present else Choice((), True)
        outputs, buffers = learned_optimizer_step(
            Step(spec, plan, present, max_grad_norm is not None, apply, chosen),
            Operands(
                _theta(spec, theta, sorted(set(map(arithmetic, dtypes))), chosen),
                count,
                scalars(learning_rate, weight_decay, max_grad_norm, count),
                buffers,
                [leaves[i] for i in present],
                [found[i] for i in present],
            ),
        )
        result = list(leaves) if apply else [jnp.zeros_like(p) for p in leaves]  # where there is no gradient
        for i, output in zip(present, outputs, strict=True):
            result[i] = output
        return treedef.unflatten(result), plan.unflatten(optax.safe_increment(count), buffers, treedef)

    return init, advance


def _spec_and_theta(
    optimizer: str | os.PathLike[str] | Checkpoint | Spec | Architecture | None,
    theta: Mapping[str, Array] | None,
) -> tuple[Spec | Architecture, Mapping[str, Array]]:
    if isinstance(optimizer, (Spec, Architecture)):
        if theta is None and optimizer.theta_shapes:
            kind = type(optimizer).__name__
            raise SpecError(f"a {kind} has no meta-parameters: give theta=..., or a checkpoint instead")
        spec, theta = optimizer, theta or {}
    else:
        checkpoint = load(optimizer)
        spec, theta = checkpoint.spec, checkpoint.theta if theta is None else theta
    for name, value in theta.items():
        if not dtype_of(value).startswith(("float", "bfloat")):
            raise SpecError(
                f"theta[{name!r}] is {kind_of(value)}: meta-parameters are floating-point numbers"
            )
    arrays = {n: a if isinstance(a, (jax.Array, np.ndarray)) else jnp.asarray(a) for n, a in theta.items()}
    spec.check_theta(arrays)
    return spec, arrays


def _theta(spec: Spec, theta: Mapping[str, Array], dtypes: Sequence[str], choice: Choice) -> Theta:
    """The meta-parameters of these types as the backend takes them; those that are constants are folded here."""
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
