"""What byte-level language models share: their texts, how a batch is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from . import sources
from .base import Data, Key, Task, TaskError
from .options import at_least_one

BYTES = 256
"""Size of the vocabulary."""


@dataclass(frozen=True)
class Text:
    """(n,) uint8."""

    name: str
    bytes: np.ndarray


@dataclass(eq=False, kw_only=True)
class TextTask(Task):
    """Prediction of the next byte of one or several texts, its variants; cross-entropy in nats.

    Subclasses define `init`, `loss` and `name`, the last after `super().__post_init__()`. A batch is int32
    (batch, context + 1): inputs, and shifted by one what is to be predicted.

    `data`: all texts one after the other; first and count (variants,), where pieces of each may begin.
    """

    datasets: Sequence[Text] = field(kw_only=False, repr=False)
    """In a configuration: a list of names."""
    context: int = 32
    """Bytes in a piece of text."""
    batch_size: int = 128
    """Pieces in a batch, drawn with replacement."""

    default_datasets: ClassVar[tuple[str, ...]] = ("stdlib",)

    def __post_init__(self) -> None:
        at_least_one(context=self.context, batch_size=self.batch_size)
        if not self.datasets:
            raise TaskError("datasets is empty: name at least one")
        lengths = [len(t.bytes) for t in self.datasets]
        for t, length in zip(self.datasets, lengths, strict=True):
            if length <= self.context:
                raise TaskError(f"text {t.name} has {length} bytes: context={self.context} needs more")
        self.variants = tuple(t.name for t in self.datasets)
        self.initial_loss = math.log(BYTES)
        self.data = {
            "text": jnp.asarray(np.concatenate([t.bytes for t in self.datasets]), jnp.uint8),
            "first": jnp.asarray(np.cumsum([0, *lengths[:-1]]), jnp.int32),
            "count": jnp.asarray([n - self.context for n in lengths], jnp.int32),
        }

    def sample(self, data: Data, key: Key, variant: jax.Array) -> jax.Array:
        start = jax.random.randint(key, (self.batch_size, 1), 0, data["count"][variant])
        index = data["first"][variant] + start + jnp.arange(self.context + 1)
        return data["text"][index].astype(jnp.int32)

    @classmethod
    def load(cls, name: str, files: Mapping[str, Path]) -> Text:
        """The text of this name. Raises DataError if its file is missing."""
        return Text(name, sources.load_text(name, files))
