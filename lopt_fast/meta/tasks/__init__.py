"""Inner tasks: what a learned optimizer is meta-trained and evaluated on. One file for each kind; how to write
one's own: docs/tasks.md.
"""

from .autoencoder import Autoencoder
from .base import Batch, Data, Key, Level, Params, Reparametrisation, Task, TaskError
from .conv import Conv
from .images import Dataset, ImageBatch, ImageTask
from .lstm import LSTM
from .mlp import MLP
from .quadratic import Quadratic
from .registry import KINDS, make
from .text import Text, TextTask
from .transformer import Transformer

__all__ = [
    "KINDS",
    "LSTM",
    "MLP",
    "Autoencoder",
    "Batch",
    "Conv",
    "Data",
    "Dataset",
    "ImageBatch",
    "ImageTask",
    "Key",
    "Level",
    "Params",
    "Quadratic",
    "Reparametrisation",
    "Task",
    "TaskError",
    "Text",
    "TextTask",
    "Transformer",
    "make",
]
