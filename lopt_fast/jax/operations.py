"""`Operations` of the CPU kernels in JAX: each one XLA custom call for all tensors of a model.

A call aliases averages with new averages, and parameters with new parameters or else gradients with updates, so that
what is donated or an intermediate result is overwritten in place; of anything else XLA makes a copy first. Under vmap
it becomes one call with leading batch dimensions on everything. Operands and attributes are listed in
csrc/xla_operations.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..architectures import Architecture
from ..backends import BackendError, native, operations_refusal
from ..layout import loops
from ..native_operations import columns_of_statistics, unsupported
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
from ..operations.adam import ADAM_AVERAGES
from ..operations.mlp import check_column_mean_square
from ..reference import Array, TensorState
from ..spec import Accumulates, Averages
from . import call, gpu_operations
from .custom_call import vary_like
from .grouped import Grouped

_FORMAT = 2  # of the attributes; csrc/xla_operations.cc refuses others
_OUTPUT = {"parameter": 0, "delta": 1, "step": 2}  # kernels/common/operands.h
_STATE = ("momentum", "second_moment", "factored_row", "factored_column")

Out = TypeVar("Out")


def implementation(architecture: Architecture, backend: str) -> Operations:
    """The operations of `architecture` for the backend that the user named, see `call.choice`."""

    def refused(platform: str) -> str | None:
        return gpu_operations.refusal(architecture) if platform == "cuda" else _refusal(architecture)

    chosen = call.choice(architecture.NAME, refused, backend)
    if "cuda" in chosen.kernels and chosen.reference:
        cpu = {"cpu": CustomCalls()} if "cpu" in chosen.kernels else {}
        return gpu_operations.ByPlatform({"cuda": gpu_operations.GpuCalls(), **cpu})
    if "cuda" in chosen.kernels:
        return gpu_operations.GpuCalls()
    return CustomCalls(elsewhere=chosen.reference) if chosen.kernels else Grouped


def _refusal(architecture: Architecture) -> str | None:
    """None if the CPU kernels can compute the operations of `architecture`, else the reason why not."""
    return registration_failure() or operations_refusal("cpu", architecture, "cpu", "float32")


@cache
def registration_failure() -> str | None:
    """Register the custom calls with JAX at first use; None, or the reason why they cannot be used."""
    try:
        core = native()
    except BackendError as error:
        return str(error)
    if not hasattr(core, "xla_operation_handlers"):
        return "the compiled core lopt_fast._native is older than these custom calls: reinstall lopt_fast"
    try:
        for operation, handler in core.xla_operation_handlers().items():
            jax.ffi.register_ffi_target(_target(operation), handler, platform="cpu")
    except Exception as error:  # a handler that is refused must not take JAX down with it
        return f"JAX {jax.__version__} does not take the custom calls ({type(error).__name__}: {error})"
    return None


def _target(operation: str) -> str:
    return f"lopt_fast_{operation}"


@dataclass(frozen=True)
class CustomCalls:
    """Implements `Operations` with the CPU kernels, once `registration_failure` has found none."""

    elsewhere: bool = False
    """Whether the program may be lowered for another platform, which then takes the definitions."""

    def statistics(
        self,
        accumulates: Accumulates,
        tensors: ModelTensors,
        decays: Decays | None,
        gradient_clip: Array | float | None = None,
        before: bool = False,
    ) -> Statistics:
        spec = columns_of_statistics(accumulates, decays)
        counts = Averages.of(accumulates)
        counts = counts if spec else counts._replace(factored_moments=0)
        sizes = _statistics_sizes(counts, spec)

        def kernel() -> Statistics:
            step = _Call("statistics", tensors, counts, decays, gradient_clip)
            _, _, rows = step.run(
                mode=decays is not None and not before,
                writes=False,
                last=sum(sizes),
                more=spec is not None,
                attributes=None if spec is None else _attributes(spec),
            )
            return _statistics_of(rows, sizes)

        def definition() -> Statistics:
            found = Grouped.statistics(spec or counts, tensors, decays, gradient_clip, before)
            # It shows all averages that there are.
            wide = (a[:, :n] for a, n in zip(found[5:], sizes[5:], strict=False) if a is not None)
            return Statistics(*found[:5], *wide)

        return self._choose(kernel, definition, tensors, decays, gradient_clip)

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
        layers = list(zip(weights.w, weights.b, strict=True))
        if column_mean_square is not None:
            check_column_mean_square(spec, len(tensors), column_mean_square)

        def kernel() -> Result:
            own = [a.reshape(-1) for a in (multiplier, column_mean_square) if a is not None]
            given = 0 if column_mean_square is None else column_mean_square.shape[1]
            step = _Call("element_mlp", tensors, Averages.of(spec), decays, gradient_clip, own)
            outputs, states, messages = step.run(
                mode=_OUTPUT["step" if steps_only else _mode(tensors)],
                weights=[array for layer in layers for array in layer],
                matrices=spec.normalise_over == "matrix",
                last=spec.messages,
                attributes=_attributes(spec, layers, multiplier is not None, given),
            )
            return Result(outputs, states, messages if spec.messages else None)

        def definition() -> Result:
            return Grouped.element_mlp(
                spec, tensors, decays, weights, multiplier, gradient_clip, steps_only, column_mean_square
            )

        if unsupported(spec):
            return definition()
        operands = decays, weights, multiplier, gradient_clip, column_mean_square
        return self._choose(kernel, lambda: _in_types_of(tensors, definition()), tensors, *operands)

    def adam(
        self,
        tensors: ModelTensors,
        scalars: AdamScalars,
        gradient_clip: Array | float | None = None,
        statistics: bool = False,
    ) -> Result:
        counts = Averages.of(ADAM_AVERAGES)
        sizes = _statistics_sizes(counts)

        def kernel() -> Result:
            own = [jnp.stack([_real(x) for x in scalars], axis=-1).reshape(-1)]
            step = _Call("adam", tensors, counts, None, gradient_clip, own)
            outputs, states, rows = step.run(
                mode=_OUTPUT[_mode(tensors)], last=sum(sizes) if statistics else 0, more=statistics
            )
            return Result(outputs, states, statistics=_statistics_of(rows, sizes) if statistics else None)

        def definition() -> Result:
            return Grouped.adam(tensors, scalars, gradient_clip, statistics)

        operands = scalars, gradient_clip
        return self._choose(kernel, lambda: _in_types_of(tensors, definition()), tensors, *operands)

    def _choose(
        self, kernel: Callable[[], Out], definition: Callable[[], Out], tensors: ModelTensors, *operands: Any
    ) -> Out:
        if not self.elsewhere:
            return kernel()
        numbers = tensors.lr, tensors.weight_decay, tensors.grad_scale
        inputs = jax.tree.leaves((tensors.params, tensors.grads, tensors.states, numbers, operands))

        def varying(branch: Callable[[], Out]) -> Out:
            """Over the same mesh axes whatever the branch: over those of a call's operands, as its results do."""
            results, structure = jax.tree.flatten(branch())
            same: Out = structure.unflatten(vary_like(results, inputs))
            return same

        chosen: Out = jax.lax.platform_dependent(
            default=partial(varying, definition), cpu=partial(varying, kernel)
        )
        return chosen


class _Call:
    """One custom call, for all tensors of a model."""

    def __init__(
        self,
        operation: str,
        tensors: ModelTensors,
        counts: Averages,
        decays: Decays | None,
        gradient_clip: Array | float | None,
        own: Sequence[Array] = (),
    ) -> None:
        """decays: None where the kernel does not read them. own: the operation's own numbers, (numbers,) each."""
        self.operation, self.tensors, self.counts = operation, tensors, counts
        bound = math.inf if gradient_clip is None else gradient_clip
        rates = [np.zeros(n) for n in counts] if decays is None else decays
        self.numbers = jnp.concatenate(
            [
                *(_real(values).reshape(-1) for values, n in zip(rates, counts, strict=True) if n),
                jnp.stack([_real(tensors.grad_scale), _real(bound)]),
                _vector(tensors.lr),
                _vector(tensors.weight_decay),
                *map(_real, own),
            ]
        )

    def run(
        self,
        *,
        mode: int,
        weights: Sequence[Array] = (),
        writes: bool = True,
        matrices: bool = False,
        last: int = 0,
        more: bool = False,
        attributes: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> tuple[list[Array], list[TensorState], Array]:
        """(outputs, new states, (tensors, last) numbers that the operation returns beside them).

        mode, more: see csrc/xla_operations.h. matrices: normalisers are of the last two axes alone.
        """
        tensors, counts = self.tensors, self.counts
        operands, results, aliases = [self.numbers, *weights], list[int](), dict[int, int]()
        for p, g, state in zip(tensors.params, tensors.grads, tensors.states, strict=True):
            if writes:
                aliases[len(operands) + (mode != _OUTPUT["parameter"])] = len(results)
                results.append(len(operands))
            operands += [p, g]
            for name in self._averages(p):
                if writes:
                    aliases[len(operands)] = len(results)
                    results.append(len(operands))
                operands.append(getattr(state, name))
        operands = vary_like(operands, ())
        # The operands that results are like describe them, with the mesh axes that they vary over.
        like = [operands[i] for i in results]
        if last:
            dtype = jnp.result_type(*(p.dtype for p in tensors.params))
            like += vary_like([jnp.zeros((len(tensors), last), dtype)], operands)
        ffi_call = jax.ffi.ffi_call(
            _target(self.operation), like, vmap_method="broadcast_all", input_output_aliases=aliases
        )
        found = iter(
            ffi_call(
                *operands,
                call=_integers([(_FORMAT, len(tensors), *counts, mode, more)]),
                tensors=_integers(
                    (*astuple(loops(p.shape)), math.prod(p.shape[-2:]) if matrices and p.ndim > 2 else 0)
                    for p in tensors.params
                ),
                **(attributes or {}),
            )
        )
        outputs, states = [], []
        for p, state in zip(tensors.params, tensors.states, strict=True):
            if writes:
                outputs.append(next(found))
                states.append(state._replace(**{name: next(found) for name in self._averages(p)}))
        return outputs, states, next(found, jnp.zeros((len(tensors), 0)))

    def _averages(self, p: Array) -> list[str]:
        """Fields of the state of `p` that the operation reads."""
        momenta, second_moments, factored = self.counts
        present = (momenta, second_moments, factored, factored if p.ndim >= 2 else 0)
        return [name for name, count in zip(_STATE, present, strict=True) if count]


def _attributes(
    spec: ElementMlp, layers: Sequence[tuple[Array, Array]] = (), multiplied: bool = False, given: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """Those of element_mlp, and of statistics with columns. given: columns whose mean squares are operands."""
    cap = math.inf if spec.scale_cap is None else spec.scale_cap
    return {
        "spec": _integers(
            [(spec.hidden_size, spec.hidden_layers, spec.messages, spec.scale == "parameter_rms",
              spec.activation == "tanh", spec.factored_vectors, multiplied, given)],
        ),
        "reals": np.array(
            [spec.step_mult, spec.exp_mult, spec.scale_epsilon, cap,
             spec.epsilons.rms, spec.epsilons.diagonal_momentum, spec.epsilons.normaliser],
        ),
        "groups": np.frombuffer("".join(f"{group} " for group in spec.groups).encode(), np.uint8),
        "layers": _integers((*w.shape[-2:], w.ndim == 3, b.ndim == 2) for w, b in layers),
    }  # fmt: skip


def _statistics_sizes(counts: Averages, columns: ElementMlp | None = None) -> list[int]:
    """How many numbers of a row each field of `Statistics` has."""
    sizes = [1] * 5 + [counts.momenta] * 2 + [counts.second_moments] * 2
    return sizes if columns is None else [*sizes, columns.layer_sizes[0][0]]


def _statistics_of(rows: Array, sizes: Sequence[int]) -> Statistics:
    """From (tensors, numbers)."""
    fields = jnp.split(rows, list(accumulate(sizes))[:-1], axis=1)
    return Statistics(*(a[:, 0] for a in fields[:5]), *fields[5:])


def _mode(tensors: ModelTensors) -> str:
    return "parameter" if tensors.apply else "delta"


def _integers(rows: Iterable[Iterable[int]]) -> np.ndarray[Any, Any]:
    """All numbers of the rows, as an attribute."""
    return np.array([int(n) for row in rows for n in row], np.int64)


def _real(number: Any) -> Array:
    """In the widest type, as the kernels compute with such numbers in float64."""
    return jnp.asarray(number, jnp.result_type(float))


def _vector(numbers: Sequence[Array | float]) -> Array:
    """(numbers,)"""
    if all(number is numbers[0] for number in numbers):
        return jnp.broadcast_to(_real(numbers[0]), (len(numbers),))
    return jnp.stack([_real(number) for number in numbers])


def _in_types_of(tensors: ModelTensors, result: Result) -> Result:
    """What the definitions return in the types that the kernels return."""
    outputs = [a.astype(p.dtype) for a, p in zip(result.outputs, tensors.params, strict=True)]
    states = [
        TensorState(*(a.astype(b.dtype) for a, b in zip(new, old, strict=True)))
        for new, old in zip(result.states, tensors.states, strict=True)
    ]
    return result._replace(outputs=outputs, states=states)
