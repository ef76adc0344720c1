"""`Operations`: what an architecture calls, and `Reference`, which runs the definitions."""

from __future__ import annotations

from typing import Protocol

from ..reference import Array
from ..spec import Accumulates
from . import adam as _adam
from . import mlp as _mlp
from . import statistics as _statistics
from .accumulators import Decays, ModelTensors
from .adam import AdamScalars
from .mlp import ElementMlp, Weights
from .results import Result, Statistics


class Operations(Protocol):
    """Operations over all tensors of a model at once. The docstrings of their definitions apply."""

    def statistics(
        self,
        accumulates: Accumulates,
        tensors: ModelTensors,
        decays: Decays | None,
        gradient_clip: Array | float | None = None,
        before: bool = False,
    ) -> Statistics: ...

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
    ) -> Result: ...

    def adam(
        self,
        tensors: ModelTensors,
        scalars: AdamScalars,
        gradient_clip: Array | float | None = None,
        statistics: bool = False,
    ) -> Result: ...


class Reference:
    """The definitions, in plain array code: for NumPy, PyTorch and JAX alike."""

    statistics = staticmethod(_statistics.statistics)
    element_mlp = staticmethod(_mlp.element_mlp)
    adam = staticmethod(_adam.adam)
