"""recurrent_transformer: the learned optimizer of Moudgil et al. 2023.

"Learning to Optimize with Recurrent Hierarchical Transformers", ICML 2023 workshop Frontiers4LCD,
https://openreview.net/forum?id=MusMaHCrs2. No published weights are known, and this has not been run against
the authors' code (https://gist.github.com/amoudgl/12a1c079fe010ac966b73766e67405d0).

Per parameter: the conditioned MLP of conditioned.py, 23 columns -> 32 -> 32 -> [direction, magnitude]. Per tensor: its
18 features, projected to a token of width 64. One more token carries what is known of the whole training from step to
step. All tokens together go through a transformer encoder (transformer.py):

    hidden, tokens = encoder([hidden, features @ features_w + features_b])
    conditioning = tokens @ conditioning_w + conditioning_b

so that the output of the hidden token is the hidden token of the next step, and the first one is learned. Tensors have
no order: a permutation of them permutes the updates. The step is

    step_mult * direction * exp(exp_mult * magnitude)

The paper's: features and per-parameter MLP of `rnn_fc_lopt`; the hidden token, unprocessed from step to step, with a
learned initial value; a bidirectional encoder of 4 layers, width 64, 4 heads, key size 32; conditioning of size 17.
Our choice: the rest of the encoder as in BERT (normalisation behind each residual sum, an MLP four times as wide with
GELU, biases everywhere), without dropout, positions and a mark on the hidden token; no messages from the MLP back to
the tensor level, which `rnn_fc_lopt` has; its bound on the gradient, 10 times a running average of the gradients' root
mean square; the initial meta-parameters, see `init_theta`. Operations used: `statistics`, `element_mlp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..namespace import array_namespace
from ..operations import ModelTensors, Operations
from ..spec import SpecError
from .base import Arrays, Inputs, Theta, Update
from .checks import check_sizes
from .conditioned import TENSOR_FEATURES, ConditionedMlp
from .networks import INITIAL_SCALE, init_linear, linear, truncated_normal
from .transformer import Encoder, NormPlacement


@dataclass(frozen=True)
class RecurrentTransformer(ConditionedMlp):
    """Defaults are those of the paper, and ours where it gives none."""

    NAME: ClassVar[str] = "recurrent_transformer"

    width: int = 64
    layers: int = 4
    heads: int = 4
    key_size: int = 32
    """Of each head; of its values too."""
    mlp_multiple: int = 4
    """Width of the encoder's MLPs, in widths of the tokens."""
    norm: NormPlacement = "post"
    """Where the encoder normalises, see `Encoder`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "width", "layers", "heads", "key_size", "mlp_multiple")
        if self.norm not in ("post", "pre"):
            raise SpecError(f"{self.NAME}: norm={self.norm!r} must be 'post' or 'pre'")

    @property
    def encoder(self) -> Encoder:
        return Encoder(
            self.width, self.layers, self.heads, self.key_size, self.mlp_multiple * self.width, self.norm
        )

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            **self.mlp_shapes,
            "features_w": (len(TENSOR_FEATURES), self.width),
            "features_b": (self.width,),
            "hidden": (self.width,),
            **self.encoder.theta_shapes,
            "conditioning_w": (self.width, self.conditioning),
            "conditioning_b": (self.conditioning,),
        }

    def init_theta(self, seed: int = 0) -> dict[str, np.ndarray]:
        """That of the MLP follows momentum (`init_mlp_theta`). Otherwise truncated normal with 1 / sqrt(inputs), and
        `INITIAL_SCALE` times that in the last projection; biases zero. The hidden token has the size that the encoder's
        outputs have."""
        rng = np.random.default_rng(seed)
        theta = self.init_mlp_theta(rng) | self.encoder.init_theta(rng)
        theta["hidden"] = truncated_normal(rng, (self.width,), 1.0)
        theta["features_w"] = init_linear(rng, self.theta_shapes["features_w"])
        theta["conditioning_w"] = INITIAL_SCALE * init_linear(rng, self.theta_shapes["conditioning_w"])
        theta["features_b"] = np.zeros(self.width, np.float32)
        theta["conditioning_b"] = np.zeros(self.conditioning, np.float32)
        return {name: theta[name] for name in self.theta_shapes}

    def init_shared(self, theta: Theta) -> Arrays:
        return {
            **super().init_shared(theta),
            "hidden": theta["hidden"] + 0.0,
        }  # state must not be a meta-parameter itself

    def step(
        self,
        operations: Operations,
        theta: Theta,
        tensors: ModelTensors,
        rows: Arrays,
        shared: Arrays,
        inputs: Inputs,
    ) -> Update:
        observed, shared = self.observe(operations, theta, tensors, shared, inputs)
        tokens = linear(observed.features, theta["features_w"], theta["features_b"])
        tokens = array_namespace(tokens).concat([shared["hidden"][None, :], tokens], axis=0)
        tokens = self.encoder(theta, tokens)
        conditioning = linear(tokens[1:, :], theta["conditioning_w"], theta["conditioning_b"])
        outputs, states, *_ = self.update_parameters(operations, theta, tensors, observed, conditioning)
        return Update(outputs, states, rows, {**shared, "hidden": tokens[0, :]})
