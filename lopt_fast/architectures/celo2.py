"""celo2: a learned step that is orthogonalised and normalised, and Adam for vectors (arXiv 2602.19142).

Per parameter: the 30 columns of velo and celo, divided by their root mean squares over the last two axes, -> 8 -> 8 ->
[direction, magnitude, unused]. The step of a matrix (of every matrix in the last two axes of a larger tensor) is

    step_mult * output_rms * x / rms(x),  x = orthogonalised(direction * exp(exp_mult * magnitude))

Tensors below rank `adam_below_rank` and those whose names match `adam_names` (input and output layers) move by

    step_mult * adam_mult * m / sqrt(v + epsilon)

Below rank 2 the network, where it is used there, has the first 15 columns alone, and nothing is orthogonalised.
Gradients are clipped to +-1000 first, but not Adam's. Operations used: `element_mlp`, `adam`.

Matrices are the last two axes whatever they mean: of convolution weights they are input and output channels in JAX's
layout, (height, width, in, out), for which this was designed, and height and width in PyTorch's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..namespace import array_namespace
from ..operations import AdamScalars, Decays, ElementMlp, ModelTensors, Operations, Result, Weights
from ..operations.adam import ADAM_AVERAGES
from ..operations.mlp import element_mlp
from ..operations.orthogonalise import COEFFICIENTS, newton_schulz, unit_rms
from ..reference import RMS_EPSILON, Array, Epsilons
from ..spec import Accumulates, Scale, SpecError
from .base import Architecture, Arrays, Inputs, Theta, Update
from .checks import check_decays, check_numbers, check_sizes
from .hyper import GRADIENT_CLIP, GROUPS, init_theta
from .networks import constant, seen_fraction

EPSILONS = Epsilons(rms=1e-8, diagonal_momentum=0.0, normaliser=1e-9)


@dataclass(frozen=True)
class Celo2(Architecture):
    """Defaults are those with which the published weights were meta-trained."""

    NAME: ClassVar[str] = "celo2"

    hidden_size: int = 8
    hidden_layers: int = 2
    activation: Literal["relu", "tanh"] = "relu"
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decays: tuple[float, ...] = (0.95,)
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    bias_correction: bool = False
    """Of the running averages that the columns show, all but the preconditioned gradient. Not in fast backends."""
    exp_mult: float = 0.0
    scale: Scale = "none"
    """"parameter_rms": the direction is multiplied by it, before it is orthogonalised and normalised."""
    orthogonalise: bool = True
    newton_schulz_coefficients: tuple[float, ...] = COEFFICIENTS
    newton_schulz_iterations: int = 5
    newton_schulz_epsilon: float = 1e-8
    normalise_output: bool = True
    output_rms: float = 1.0
    precondition_output: bool = False
    """Divide the step by sqrt(second moment + 1e-6), last of all."""
    step_mult: float = 0.001
    """The learning rate."""
    weight_decay: float = 0.0
    """Decoupled, times the learning rate, for Adam's tensors theirs."""
    adam_below_rank: int = 2
    adam_names: str = "embed"
    """Regular expression, searched for in the name; "" for none. A tensor without a name does not match."""
    adam_mult: float = 20.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    adam_bias_correction: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "hidden_size", "hidden_layers", "newton_schulz_iterations")
        check_numbers(
            self, "exp_mult", "newton_schulz_epsilon", "output_rms", "step_mult", "weight_decay", "adam_mult",
            "adam_beta1", "adam_beta2", "adam_epsilon",
        )  # fmt: skip
        for name in ("momentum_decays", "rms_decays", "adafactor_decays"):
            check_decays(self, name)
        n_m, n_r, n_f = len(self.momentum_decays), len(self.rms_decays), len(self.adafactor_decays)
        if n_r not in (1, n_m) or n_f != n_m:
            raise SpecError(
                f"{self.NAME}: {n_r} rms_decays and {n_f} adafactor_decays for {n_m} momentum_decays: give one "
                "rms_decay or one for each momentum, and one adafactor_decay for each momentum"
            )
        if self.activation not in ("relu", "tanh"):
            raise SpecError(f"{self.NAME}: activation={self.activation!r} must be 'relu' or 'tanh'")
        if self.scale not in ("none", "parameter_rms"):
            raise SpecError(f"{self.NAME}: scale={self.scale!r} must be 'none' or 'parameter_rms'")
        if len(self.newton_schulz_coefficients) != 3:
            raise SpecError(
                f"{self.NAME}: newton_schulz_coefficients={self.newton_schulz_coefficients} must be three numbers"
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SpecError(f"{self.NAME}: {name}={getattr(self, name)} must be from 0 to below 1")
        if type(self.adam_below_rank) is not int or self.adam_below_rank < 0:
            raise SpecError(
                f"{self.NAME}: adam_below_rank={self.adam_below_rank!r} must be an integer from 0 on"
            )
        try:
            re.compile(self.adam_names)
        except (re.error, TypeError) as error:
            raise SpecError(
                f"{self.NAME}: adam_names={self.adam_names!r} must be a regular expression: {error}"
            ) from error

    @property
    def mlp(self) -> ElementMlp:
        return ElementMlp(
            groups=GROUPS,
            momenta=len(self.momentum_decays),
            second_moments=len(self.rms_decays),
            factored_moments=len(self.adafactor_decays),
            hidden_size=self.hidden_size,
            hidden_layers=self.hidden_layers,
            step_mult=1.0,
            exp_mult=self.exp_mult,
            scale=self.scale,
            scale_epsilon=1e-9,
            activation=self.activation,
            epsilons=EPSILONS,
            normalise_over="matrix",
            factored_vectors=False,
        )

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (n_in, n_out) in enumerate(self.mlp.layer_sizes):
            # The published weights have a third output, which nothing reads.
            n_out += 1 if i == self.hidden_layers else 0
            shapes |= {f"w{i}": (n_in, n_out), f"b{i}": (n_out,)}
        return shapes

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        return init_theta(self.theta_shapes, seed)

    def uses_adam(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the parameter of this name and shape is moved by Adam."""
        if len(shape) < self.adam_below_rank:
            return True
        return bool(self.adam_names) and re.search(self.adam_names, name) is not None

    @property
    def has_kernels(self) -> bool:
        return not self.bias_correction

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return ADAM_AVERAGES if self.uses_adam(name, shape) else self.mlp

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        names = tensors.names or [""] * len(tensors)
        by_adam = [self.uses_adam(name, p.shape) for name, p in zip(names, tensors.params, strict=True)]
        outputs, states = list(tensors.params), list(tensors.states)
        for adam, move in ((True, self._adam), (False, self._network)):
            if indices := [i for i, used in enumerate(by_adam) if used is adam]:
                result = move(operations, theta, tensors.select(indices), inputs)
                for i, output, state in zip(indices, result.outputs, result.states, strict=True):
                    outputs[i], states[i] = output, state
        return Update(outputs, states, rows, shared)

    def _adam(self, operations: Operations, theta: Theta, tensors: ModelTensors, inputs: Inputs) -> Result:
        like = constant([0.0] * len(tensors), theta["b0"])
        lr = self.step_mult * self.adam_mult
        beta1, beta2 = constant(self.adam_beta1, like), constant(self.adam_beta2, like)
        scalars = AdamScalars.of(
            like,
            beta1=beta1,
            beta2=beta2,
            scale=lr,
            momentum_factor=1.0 / seen_fraction(beta1, inputs.t) if self.adam_bias_correction else 1.0,
            v_factor=1.0 / seen_fraction(beta2, inputs.t) if self.adam_bias_correction else 1.0,
            epsilon=0.0,
            root_epsilon=self.adam_epsilon,
        )
        return operations.adam(tensors.decayed(lr * self.weight_decay), scalars)

    def _network(self, operations: Operations, theta: Theta, tensors: ModelTensors, inputs: Inputs) -> Result:
        like = theta["w0"]
        layers = range(self.hidden_layers + 1)
        sizes = [n_out for _, n_out in self.mlp.layer_sizes]
        weights = Weights(
            tuple(theta[f"w{i}"][:, : sizes[i]] for i in layers),
            tuple(theta[f"b{i}"][: sizes[i]] for i in layers),
        )
        decays = Decays.constant(like, self.momentum_decays, self.rms_decays, self.adafactor_decays)
        corrections = None
        if self.bias_correction:
            corrections = Decays(*(seen_fraction(1.0 - rate, inputs.t) for rate in decays))
            directions = element_mlp(
                self.mlp, tensors, decays, weights,
                gradient_clip=GRADIENT_CLIP, steps_only=True, bias_correction=corrections,
            )  # fmt: skip
        else:
            directions = operations.element_mlp(
                self.mlp, tensors, decays, weights, gradient_clip=GRADIENT_CLIP, steps_only=True
            )
        tensors = tensors.decayed(self.step_mult * self.weight_decay)
        outputs = []
        for i, (direction, state) in enumerate(zip(directions.outputs, directions.states, strict=True)):
            step = self._shaped(direction)
            if self.precondition_output:
                v = state.second_moment[-1, ...]
                if corrections is not None:
                    v = v / array_namespace(v).astype(corrections.second_moment[-1, ...], v.dtype)
                step = step / array_namespace(v).sqrt(v + RMS_EPSILON)
            outputs.append(tensors.finish(i, self.step_mult * step))
        return Result(outputs, directions.states)

    def _shaped(self, direction: Array) -> Array:
        """What becomes of a direction of rank 2 and more, or below it."""
        if self.orthogonalise and direction.ndim >= 2:
            a, b, c = self.newton_schulz_coefficients
            direction = newton_schulz(
                direction, (a, b, c), self.newton_schulz_iterations, self.newton_schulz_epsilon
            )
        if self.normalise_output:
            direction = unit_rms(direction)
        return self.output_rms * direction
