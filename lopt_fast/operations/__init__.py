"""The fused operations that architectures are made of, as plain array code: how much is computed.

An architecture (lopt_fast/architectures/) says *what* in terms of these; `Operations` is their interface, with one
implementation here, the definition, and faster ones for frameworks and devices that have kernels. The tensors of a
model go through an operation together; what differs between tensors is an operand with a leading axis over them.
"""

from .accumulators import Decays, ModelTensors
from .adam import AdamScalars
from .base import Operations, Reference
from .mlp import ElementMlp, Weights
from .results import Result, Statistics

__all__ = [
    "AdamScalars",
    "Decays",
    "ElementMlp",
    "ModelTensors",
    "Operations",
    "Reference",
    "Result",
    "Statistics",
    "Weights",
]
