"""What `rnn_fc_lopt` and `recurrent_transformer` share: a per-parameter MLP conditioned by a network over tensors.

Equations: Metz et al. 2020 (arXiv 2009.11243), with the numbers of its public implementation. A step is

    observed, shared = self.observe(...)               # bound on the gradient, loss, 18 features of each tensor
    conditioning = ...                                 # the architecture's own network: (tensors, conditioning)
    result = self.update_parameters(..., conditioning) # the MLP: new parameters, and its messages to the network

Per parameter: the columns gradient, parameter, log |parameter|, momenta, second moments, their ratios and inverse
roots -> MLP -> [direction, magnitude, messages]. The MLP also sees what is equal for all parameters of a tensor: time,
sizes and conditioning, folded into a first bias for each tensor. Operations used: `statistics`, `element_mlp`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from ..namespace import array_namespace
from ..operations import Decays, ElementMlp, ModelTensors, Operations, Result, Statistics, Weights
from ..reference import LOG_EPSILON, Array
from ..spec import TIMESCALES, Accumulates
from .base import Architecture, Arrays, Inputs, Theta
from .checks import check_decays, check_numbers, check_sizes
from .networks import INITIAL_SCALE, clip, constant, follow_momentum, init_mlp, linear, log_magnitude, new

GROUPS = ("g", "p", "log_abs_p", "m", "rms", "m_rsqrt_rms", "rsqrt_rms")
"""Of the columns, in the order of w0."""
TENSOR_CONSTANTS = len(TIMESCALES) + 3
"""Inputs of the MLP that are equal over a tensor, without the conditioning: time, number of tensors, norm, size."""
CLIP_DECAY, CLIP_FACTOR, GRADIENT_EPSILON = 0.99, 10.0, 1e-8
TRAIN_LOSS_DECAY, VALID_LOSS_DECAY = 0.9, 0.95
LOSS_EPSILON = 1e-8

TENSOR_FEATURES = (
    "gradient_norm", "is_scalar", "momentum_mean", "momentum_sign", "second_moment_mean", "second_moment_sign",
    "parameter_mean", "parameter_sign", "parameter_norm", "axis_0", "axis_1", "axis_2", "axis_3",
    "train_loss", "valid_loss", "momentum_variance", "second_moment_variance", "parameter_variance",
)  # fmt: skip
"""What a network over tensors sees of each; how they are computed: `tensor_features`."""


class Observed(NamedTuple):
    """What the network over tensors and the MLP are given, as they are in this step."""

    features: Array
    """(tensors, 18): `TENSOR_FEATURES`."""
    gradient_clip: Array
    """()"""
    constants: Array
    """(tensors, TENSOR_CONSTANTS)"""
    column_mean_square: Array | None
    """Of the MLP, as operations pass it on."""


@dataclass(frozen=True)
class ConditionedMlp(Architecture):
    """Base class: subclasses add a network over tensors."""

    needs_loss: ClassVar[bool] = True
    sees_tensors: ClassVar[bool] = True

    hidden_size: int = 32
    hidden_layers: int = 2
    decays: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999, 0.9999)
    """Of the momenta, and of as many second moments."""
    conditioning: int = 17
    """Numbers that the network over tensors sends to the MLP."""
    step_mult: float = 0.001
    exp_mult: float = 0.001

    def __post_init__(self) -> None:
        check_sizes(self, "hidden_size", "hidden_layers", "conditioning")
        check_numbers(self, "step_mult", "exp_mult")
        check_decays(self, "decays")

    @property
    def messages(self) -> int:
        """Numbers that the MLP sends to the network over tensors: means over the parameters of a tensor. A
        hyperparameter of architectures that have any."""
        return 0

    @property
    def mlp(self) -> ElementMlp:
        return ElementMlp(
            groups=GROUPS,
            momenta=len(self.decays),
            second_moments=len(self.decays),
            factored_moments=0,
            hidden_size=self.hidden_size,
            hidden_layers=self.hidden_layers,
            step_mult=self.step_mult,
            exp_mult=self.exp_mult,
            messages=self.messages,
        )

    @property
    def mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        """Meta-parameters of the MLP. `w0_constant`: of the inputs that are equal over a tensor."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (n_in, n_out) in enumerate(self.mlp.layer_sizes):
            shapes |= {f"w{i}": (n_in, n_out), f"b{i}": (n_out,)}
        return shapes | {"w0_constant": (TENSOR_CONSTANTS + self.conditioning, self.hidden_size)}

    def init_mlp_theta(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Initial meta-parameters of the MLP: random, but for a path that follows momentum (`follow_momentum`).

        Weights are truncated normal with 1 / sqrt(inputs), `INITIAL_SCALE` times that in the last layer; biases zero.
        A step is 0.001 times the momentum over the root of its second moment, normalised, and small random terms.
        """
        theta = init_mlp(rng, self.mlp_shapes)
        theta[f"w{self.hidden_layers}"] *= INITIAL_SCALE
        follow_momentum(theta, self.mlp, "m_rsqrt_rms", self.decays)
        return theta

    def accumulates(self, name: str, shape: Sequence[int]) -> Accumulates:
        return self.mlp

    def init_shared(self, theta: Theta) -> Arrays:
        sums = ("train_loss_mean", "train_loss_variance", "valid_loss_mean", "valid_losses")
        # Average of the gradient's size, which starts as if it had seen 1 once.
        first = {"gradient_scale": 1.0 - CLIP_DECAY} | dict.fromkeys(sums, 0.0)
        return {name: new(value, theta["w0"]) for name, value in first.items()}

    def observe_validation(self, theta: Theta, shared: Arrays, loss: Array) -> Arrays:
        """Also moves the MLP's clock on by one, as a step does."""
        mean = shared["valid_loss_mean"]
        loss = array_namespace(mean).astype(loss, mean.dtype)
        mean = VALID_LOSS_DECAY * mean + (1.0 - VALID_LOSS_DECAY) * loss
        return {**shared, "valid_loss_mean": mean, "valid_losses": shared["valid_losses"] + 1.0}

    def running_averages(self, like: Array) -> Decays:
        """Decays as operations take them."""
        return Decays.constant(like, self.decays, self.decays)

    def observe(
        self, operations: Operations, theta: Theta, tensors: ModelTensors, shared: Arrays, inputs: Inputs
    ) -> tuple[Observed, Arrays]:
        """(what this step's networks are given, `shared` after it). Running averages are those after this gradient."""
        like = theta["w0"]
        xp = array_namespace(like)
        t = xp.astype(inputs.t, like.dtype)
        assert inputs.loss is not None
        loss = xp.astype(inputs.loss, like.dtype)

        bound = CLIP_FACTOR * shared["gradient_scale"] / _weight(CLIP_DECAY, t + 1.0)
        statistics = operations.statistics(self.mlp, tensors, self.running_averages(like), bound).of(like)
        mean_square = xp.mean(statistics.gradient_variance + statistics.gradient_mean**2)
        scale = CLIP_DECAY * shared["gradient_scale"] + (1.0 - CLIP_DECAY) * xp.sqrt(
            mean_square + GRADIENT_EPSILON
        )

        mean = TRAIN_LOSS_DECAY * shared["train_loss_mean"] + (1.0 - TRAIN_LOSS_DECAY) * loss
        variance = (
            TRAIN_LOSS_DECAY * shared["train_loss_variance"] + (1.0 - TRAIN_LOSS_DECAY) * (mean - loss) ** 2
        )
        after = {
            **shared,
            "gradient_scale": scale,
            "train_loss_mean": mean,
            "train_loss_variance": variance,
        }
        losses = xp.stack(
            [loss, _corrected(shared["valid_loss_mean"], VALID_LOSS_DECAY, shared["valid_losses"])]
        )
        centre = _corrected(mean, TRAIN_LOSS_DECAY, t + 1.0)
        spread = xp.sqrt(_corrected(variance, TRAIN_LOSS_DECAY, t + 1.0) + LOSS_EPSILON)
        losses = clip((losses - centre) / spread, -5.0, 5.0)

        shapes = [tuple(p.shape) for p in tensors.params]
        observed = Observed(
            tensor_features(statistics, shapes, losses[0, ...], losses[1, ...]),
            bound,
            tensor_constants(statistics, shapes, t + shared["valid_losses"]),
            statistics.column_mean_square,
        )
        return observed, after

    def update_parameters(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        observed: Observed,
        conditioning: Array,
    ) -> Result:
        """The MLP. conditioning: (tensors, conditioning). The result's `messages`, (tensors, messages), are the
        network's input of the next step."""
        xp = array_namespace(conditioning)
        layers = range(self.hidden_layers + 1)
        constants = xp.concat([observed.constants, conditioning], axis=1)
        biases = [theta[f"b{i}"] for i in layers]
        biases[0] = linear(constants, theta["w0_constant"], theta["b0"])
        weights = Weights(tuple(theta[f"w{i}"] for i in layers), tuple(biases))
        return operations.element_mlp(
            self.mlp,
            tensors,
            self.running_averages(theta["w0"]),
            weights,
            gradient_clip=observed.gradient_clip,
            column_mean_square=observed.column_mean_square,
        )


def _weight(decay: float, n: Array) -> Array:
    """1 - decay ** n, without the cancellation."""
    return -array_namespace(n).expm1(n * math.log(decay))


def _corrected(average: Array, decay: float, n: Array) -> Array:
    """A running average from zero without its bias after n values; 0 where there was none."""
    xp = array_namespace(n)
    weight = _weight(decay, n)
    return average / (xp.where(n > 0, weight, xp.ones_like(weight)) + LOSS_EPSILON)


def tensor_features(
    statistics: Statistics, shapes: Sequence[tuple[int, ...]], train_loss: Array, valid_loss: Array
) -> Array:
    """(tensors, 18): `TENSOR_FEATURES` of tensors of these shapes.

    Means and variances of momenta and second moments are over parameters and decays together. All but signs, flags,
    axes and losses are logarithms of magnitudes, from -5 to 5. Axes are log(size) - 1, and -1 where there is none;
    of five and more axes the last feature shows the fourth and all behind it as one (published weights have seen up
    to four). losses: (), how far each is from the running mean of the training loss, in standard deviations.
    """
    like = statistics.parameter_mean
    xp = array_namespace(like)
    momentum_mean, momentum_variance = _over_decays(statistics.momentum_mean, statistics.momentum_variance)
    second_mean, second_variance = _over_decays(
        statistics.second_moment_mean, statistics.second_moment_variance
    )
    axes = constant([axis_features(shape) for shape in shapes], like)
    zeros = xp.zeros_like(like)
    columns = [
        log_magnitude(_norm(statistics.gradient_mean, statistics.gradient_variance, shapes)),
        constant([-1.0 if shape else 1.0 for shape in shapes], like),
        log_magnitude(momentum_mean),
        xp.sign(momentum_mean),
        log_magnitude(second_mean),
        xp.sign(second_mean),
        log_magnitude(statistics.parameter_mean),
        xp.sign(statistics.parameter_mean),
        log_magnitude(_norm(statistics.parameter_mean, statistics.parameter_variance, shapes)),
        *(axes[:, i] for i in range(axes.shape[1])),
        zeros + train_loss,
        zeros + valid_loss,
        log_magnitude(momentum_variance),
        log_magnitude(second_variance),
        log_magnitude(statistics.parameter_variance),
    ]
    return xp.stack(columns, axis=1)


def axis_features(shape: Sequence[int]) -> list[float]:
    """log(size) - 1 of four axes; missing ones have size 1, those behind the fourth are multiplied to it."""
    sizes = [*shape[:3], *[1] * (3 - len(shape)), math.prod(shape[3:])]
    return [math.log(size) - 1.0 for size in sizes]


def tensor_constants(statistics: Statistics, shapes: Sequence[tuple[int, ...]], time: Array) -> Array:
    """(tensors, TENSOR_CONSTANTS): sin(time / (pi x)) for each timescale x, log(number of tensors) - 1,
    log(norm of the parameter + 1e-8), log(its number of elements). time: ()."""
    like = statistics.parameter_mean
    xp = array_namespace(like)
    sines = xp.sin(time / constant([math.pi * x for x in TIMESCALES], like))
    norms = _norm(statistics.parameter_mean, statistics.parameter_variance, shapes)
    columns = [
        constant([math.log(len(shapes)) - 1.0] * len(shapes), like),
        xp.log(norms + LOG_EPSILON),
        constant([math.log(math.prod(shape)) for shape in shapes], like),
    ]
    return xp.concat(
        [xp.broadcast_to(sines, (len(shapes), len(TIMESCALES))), xp.stack(columns, axis=1)], axis=1
    )


def _norm(mean: Array, variance: Array, shapes: Sequence[tuple[int, ...]]) -> Array:
    """(tensors,) root of the sum of squares."""
    sizes = constant([float(math.prod(shape)) for shape in shapes], mean)
    return array_namespace(mean).sqrt(sizes * (variance + mean * mean))


def _over_decays(means: Array, variances: Array) -> tuple[Array, Array]:
    """(tensors,) mean and variance over all decays, from (tensors, decays)."""
    xp = array_namespace(means)
    mean = xp.mean(means, axis=1)
    variance = xp.mean(variances + (means - mean[:, None]) ** 2, axis=1)
    return mean, variance
