"""`Operations` of the CUDA kernels in JAX: each one XLA custom call for all tensors of a model.

Aliases and vmap are as in operations.py; scratch memory is one more result, which is dropped. All arrays are float32:
parameters of other types go through the definitions. Operands and attributes are listed in csrc/xla_gpu_operations.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..architectures import Architecture
from ..backends import cuda, native, operations_refusal
from ..layout import loops
from ..native_operations import mlp_spec, unsupported_on_gpus
from ..operations import (
    AdamScalars,
    Decays,
    ElementMlp,
    ModelTensors,
    Operations,
    Result,
    Statistics,
    Weights,
)
from ..operations.adam import ADAM_AVERAGES, adam_between_statistics
from ..reference import Array, TensorState
from ..spec import Accumulates, Averages
from .custom_call import vary_like
from .grouped import Grouped

TARGET = "lopt_fast_operation_gpu"
"""Name of the custom call."""
_FORMAT = 1  # of the attributes; csrc/xla_gpu_operations.cc refuses others
_OPERATIONS = ("element_mlp", "adam", "statistics")  # csrc/gpu_operations.h
_OUTPUTS = ("parameter", "delta", "step")  # kernels/common/operands.h
_STATE = ("momentum", "second_moment", "factored_row", "factored_column")
_SOMEWHERE = 256
"""An address that is checked for null, never followed."""


def refusal(architecture: Architecture) -> str | None:
    """None if the CUDA kernels can compute the operations of `architecture`, else the reason why not."""
    return operations_refusal("cuda", architecture, "cuda", "float32") or registration_failure()


@cache
def registration_failure() -> str | None:
    """Register the custom call with JAX at first use; None, or the reason why it cannot be used."""
    try:
        core = native()
        core.xla_set_device(cuda().device())
        jax.ffi.register_ffi_target(TARGET, core.xla_gpu_operation_handlers()["cuda"], platform="CUDA")
    except Exception as error:  # a handler that is refused must not take JAX down with it
        return f"JAX {jax.__version__} does not take the custom call ({type(error).__name__}: {error})"
    return None


class GpuCalls:
    """Implements `Operations` with the CUDA kernels, once `refusal` has found no reason against it."""

    def statistics(
        self,
        accumulates: Accumulates,
        tensors: ModelTensors,
        decays: Decays | None,
        gradient_clip: Array | float | None = None,
        before: bool = False,
    ) -> Statistics:
        decays = None if before else decays
        counts = Averages.of(accumulates)._replace(factored_moments=0)
        sizes = [1] * 5 + [counts.momenta] * 2 + [counts.second_moments] * 2
        if not _taken(tensors):
            found = Grouped.statistics(counts, tensors, decays, gradient_clip)
            # It shows all averages that there are.
            wide = (a[:, :n] for a, n in zip(found[5:9], sizes[5:], strict=True))
            return Statistics(*found[:5], *wide)
        numbers = _numbers(tensors, counts, decays, gradient_clip)
        _, _, rows = _run("statistics", tensors, counts, [numbers], decays is not None, last=sum(sizes))
        columns = jnp.split(rows, np.cumsum(sizes)[:-1].tolist(), axis=1)
        return Statistics(*(c[:, 0] for c in columns[:5]), *columns[5:])

    def element_mlp(
        self,
        spec: ElementMlp,
        tensors: ModelTensors,
        decays: Decays,
        weights: Weights,
        multiplier: Array | None = None,
        gradient_clip: Array | float | None = None,
        steps_only: bool = False,
        column_mean_square: Array | None = None,
    ) -> Result:
        by_matrix = spec.normalise_over == "matrix" and any(p.ndim > 2 for p in tensors.params)
        if by_matrix or unsupported_on_gpus(spec) or not _taken(tensors):
            return Grouped.element_mlp(
                spec, tensors, decays, weights, multiplier, gradient_clip, steps_only, column_mean_square
            )
        counts = Averages.of(spec)
        numbers = _numbers(tensors, counts, decays, gradient_clip, [] if multiplier is None else [multiplier])
        layers = list(zip(weights.w, weights.b, strict=True))
        operands = [numbers, *(_single(a) for layer in layers for a in layer)]
        mode = "step" if steps_only else _mode(tensors)
        outputs, states, messages = _run(
            "element_mlp", tensors, counts, operands, _OUTPUTS.index(mode), spec.messages, spec,
            _attributes(spec, layers, multiplier is not None),
        )  # fmt: skip
        return Result(outputs, states, messages if spec.messages else None)

    def adam(
        self,
        tensors: ModelTensors,
        scalars: AdamScalars,
        gradient_clip: Array | float | None = None,
        statistics: bool = False,
    ) -> Result:
        if statistics:
            return adam_between_statistics(self, tensors, scalars, gradient_clip)
        if not _taken(tensors):
            return Grouped.adam(tensors, scalars, gradient_clip)
        counts = Averages.of(ADAM_AVERAGES)
        own = [jnp.stack([_single(x) for x in scalars], axis=-1)]
        numbers = _numbers(tensors, counts, None, gradient_clip, own)
        outputs, states, _ = _run("adam", tensors, counts, [numbers], _OUTPUTS.index(_mode(tensors)))
        return Result(outputs, states)


@dataclass(frozen=True)
class ByPlatform:
    """Implements `Operations` with those of the platform that a program is lowered for, and else the definitions."""

    kernels: Mapping[str, Operations]

    def statistics(
        self,
        accumulates: Accumulates,
        tensors: ModelTensors,
        decays: Decays | None,
        gradient_clip: Array | float | None = None,
        before: bool = False,
    ) -> Statistics:
        def branch(operations: Operations) -> Statistics:
            counts = Averages.of(accumulates)
            found = operations.statistics(counts, tensors, decays, gradient_clip, before)
            # What all have, so without columns: the definitions show all averages that there are.
            alone, momenta, second_moments = found[:5], found[5:7], found[7:9]
            return Statistics(
                *alone,
                *(a[:, : counts.momenta] for a in momenta),
                *(a[:, : counts.second_moments] for a in second_moments),
            )

        return self._choose(branch, tensors, decays, gradient_clip)

    def element_mlp(
        self,
        spec: ElementMlp,
        tensors: ModelTensors,
        decays: Decays,
        weights: Weights,
        multiplier: Array | None = None,
        gradient_clip: Array | float | None = None,
        steps_only: bool = False,
        column_mean_square: Array | None = None,
    ) -> Result:
        operands = decays, weights, multiplier, gradient_clip

        def branch(operations: Operations) -> Result:
            # None of the columns' mean squares: see `statistics`.
            return _in_types_of(
                tensors, operations.element_mlp(spec, tensors, *operands, steps_only=steps_only)
            )

        return self._choose(branch, tensors, *operands)

    def adam(
        self,
        tensors: ModelTensors,
        scalars: AdamScalars,
        gradient_clip: Array | float | None = None,
        statistics: bool = False,
    ) -> Result:
        def branch(operations: Operations) -> Result:
            return _in_types_of(tensors, operations.adam(tensors, scalars, gradient_clip, statistics))

        return self._choose(branch, tensors, scalars, gradient_clip)

    def _choose(self, branch: Callable[[Operations], Any], tensors: ModelTensors, *operands: Any) -> Any:
        numbers = tensors.lr, tensors.weight_decay, tensors.grad_scale
        inputs = jax.tree.leaves((tensors.params, tensors.grads, tensors.states, numbers, operands))

        def varying(operations: Operations) -> Any:
            """Over the same mesh axes whatever the branch: over those of a call's operands, as its results do."""
            results, structure = jax.tree.flatten(branch(operations))
            return structure.unflatten(vary_like(results, inputs))

        return jax.lax.platform_dependent(
            default=partial(varying, Grouped),
            **{name: partial(varying, k) for name, k in self.kernels.items()},
        )


def _taken(tensors: ModelTensors) -> bool:
    """Whether the kernels take these types."""
    return all(p.dtype == jnp.float32 for p in tensors.params)


def _mode(tensors: ModelTensors) -> str:
    return "parameter" if tensors.apply else "delta"


def _single(a: Any) -> Array:
    return jnp.asarray(a, jnp.float32)


def _numbers(
    tensors: ModelTensors,
    counts: Averages,
    decays: Decays | None,
    gradient_clip: Array | float | None,
    own: Sequence[Array] = (),
) -> Array:
    """What kernels/common/gpu_operations.h calls so. own: the operation's own numbers, (tensors, ...)."""
    bound = math.inf if gradient_clip is None else gradient_clip
    rates = [np.zeros(n) for n in counts] if decays is None else decays
    parts = [a for a, n in zip(rates, counts, strict=True) if n]
    parts += [tensors.grad_scale, bound, _vector(tensors.lr), _vector(tensors.weight_decay), *own]
    return jnp.concatenate([_single(part).reshape(-1) for part in parts])


def _vector(numbers: Sequence[Array | float]) -> Array:
    """(numbers,)"""
    if all(number is numbers[0] for number in numbers):
        return jnp.broadcast_to(_single(numbers[0]), (len(numbers),))
    return jnp.stack([_single(number) for number in numbers])


def _run(
    operation: str,
    tensors: ModelTensors,
    counts: Averages,
    operands: list[Array],
    mode: int,
    last: int = 0,
    spec: ElementMlp | None = None,
    attributes: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> tuple[list[Array], list[TensorState], Array | None]:
    """(outputs, new states, (tensors, last) numbers that the operation returns beside them).

    operands: those before the tensors. mode: of the output, or whether statistics are of moved averages.
    """
    writes, aliased, aliases = operation != "statistics", list[int](), dict[int, int]()
    fields = [_averages(counts, p) for p in tensors.params]
    operands = list(operands)

    def add(a: Array, is_result: bool) -> None:
        if is_result:
            aliases[len(operands)] = len(aliased)
            aliased.append(len(operands))
        operands.append(a)

    in_place = writes and _OUTPUTS[mode] == "parameter"
    for p, g, state, names in zip(tensors.params, tensors.grads, tensors.states, fields, strict=True):
        add(p, in_place)
        add(_single(g), writes and not in_place)
        for name in names:
            add(getattr(state, name), writes)
    operands = vary_like(operands, ())
    # The operands that results are like describe them, with the mesh axes that they vary over.
    results = [operands[i] for i in aliased]
    more = [jnp.zeros((len(tensors), last), jnp.float32)] if last else []
    more.append(jnp.zeros(_scratch_bytes(operation, tensors, counts, spec), jnp.uint8))
    results += vary_like(more, operands)
    found = iter(
        jax.ffi.ffi_call(TARGET, results, vmap_method="broadcast_all", input_output_aliases=aliases)(
            *operands,
            call=np.array(
                [_FORMAT, _OPERATIONS.index(operation), len(tensors), *counts, mode, last], np.int64
            ),
            tensors=np.array([astuple(loops(p.shape)) for p in tensors.params], np.int64).reshape(-1),
            **(attributes or {}),
        )
    )
    outputs, states = [], []
    for state, names in zip(tensors.states, fields, strict=True):
        if writes:
            outputs.append(next(found))
            states.append(state._replace(**{name: next(found) for name in names}))
    return outputs, states, next(found) if last else None


def _averages(counts: Averages, p: Array) -> list[str]:
    """Fields of the state of `p` that an operation with these averages reads."""
    momenta, second_moments, factored = counts
    present = (momenta, second_moments, factored, factored if p.ndim >= 2 else 0)
    return [name for name, count in zip(_STATE, present, strict=True) if count]


def _scratch_bytes(operation: str, tensors: ModelTensors, counts: Averages, spec: ElementMlp | None) -> int:
    layers = [] if spec is None else [(_SOMEWHERE, _SOMEWHERE, *size, 0, 0) for size in spec.layer_sizes]
    shape_alone = native().GpuOperation(
        operation,
        tensors=[("float32", astuple(loops(p.shape)), (_SOMEWHERE,) * 7, (0,) * 4) for p in tensors.params],
        averages=counts,
        numbers=_SOMEWHERE,
        spec=None if spec is None else mlp_spec(spec),
        layers=layers,
    )
    return int(shape_alone.scratch_bytes()) + 256  # to be aligned


def _attributes(
    spec: ElementMlp, layers: Sequence[tuple[Array, Array]], multiplied: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """Those of element_mlp alone."""
    cap = math.inf if spec.scale_cap is None else spec.scale_cap
    epsilons = spec.epsilons
    shapes = [(*w.shape[-2:], w.ndim == 3, b.ndim == 2) for w, b in layers]
    return {
        "spec": np.array(
            [spec.hidden_size, spec.hidden_layers, spec.messages, spec.scale == "parameter_rms",
             spec.activation == "tanh", spec.factored_vectors, multiplied, 0], np.int64,
        ),
        "reals": np.array(
            [spec.step_mult, spec.exp_mult, spec.scale_epsilon, cap,
             epsilons.rms, epsilons.diagonal_momentum, epsilons.normaliser], np.float64,
        ),
        "groups": np.frombuffer("".join(f"{group} " for group in spec.groups).encode(), np.uint8),
        "layers": np.array(shapes, np.int64).reshape(-1),
    }  # fmt: skip


def _in_types_of(tensors: ModelTensors, result: Result) -> Result:
    """A result in the types that kernels return."""
    outputs = [a.astype(p.dtype) for a, p in zip(result.outputs, tensors.params, strict=True)]
    states = [
        TensorState(*(a.astype(b.dtype) for a, b in zip(new, old, strict=True)))
        for new, old in zip(result.states, tensors.states, strict=True)
    ]
    return result._replace(outputs=outputs, states=states)
