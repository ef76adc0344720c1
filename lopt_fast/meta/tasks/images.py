"""What tasks on images share: their data sets, how they are prepared, how a batch is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ...data import average_pool, standardise
from ...data import grey as mean_of_channels
from . import sources
from .base import Data, Key, Task, TaskError
from .options import at_least_one

ImageBatch: TypeAlias = tuple[jax.Array, jax.Array]
"""Inputs (batch, *shape) float32, labels (batch,) int32."""


@dataclass(frozen=True)
class Dataset:
    """Inputs (n, height, width, channels), labels (n,) integer.

    uint8 inputs are standardised (mean 0, standard deviation 1 over the whole set); float32 ones are used as they are.
    """

    name: str
    inputs: np.ndarray
    labels: np.ndarray


@dataclass(eq=False, kw_only=True)
class ImageTask(Task):
    """A task on one or several image sets of one shape, its variants.

    Subclasses define `init`, `loss`, `name` and `initial_loss`, the last two after `super().__post_init__()`.

    `data`: inputs and labels of all sets one after the other; first and count (variants,), where each lies;
    shift and scale (variants,), which standardise a batch where inputs are kept as uint8 (a quarter of the memory).
    """

    datasets: Sequence[Dataset] = field(kw_only=False, repr=False)
    """In a configuration: a list of names."""
    image_size: int | None = None
    """Images are average-pooled to this height and width; left out: as they are."""
    grey: bool | None = None
    """Whether channels are averaged; left out: if images are pooled."""
    classes: int = 10
    """Labels are below this."""
    batch_size: int = 128
    """Images in a batch, drawn with replacement."""

    default_datasets: ClassVar[tuple[str, ...]] = ("digits",)

    def __post_init__(self) -> None:
        at_least_one(classes=self.classes, batch_size=self.batch_size)
        if self.image_size is not None:
            at_least_one(image_size=self.image_size)
        if not self.datasets:
            raise TaskError("datasets is empty: name at least one")
        for d in self.datasets:
            _check(d, self.classes)
        inputs = [_prepared(d.inputs, self.image_size, self.grey) for d in self.datasets]
        self.variants = tuple(d.name for d in self.datasets)
        shapes = {name: x.shape[1:] for name, x in zip(self.variants, inputs, strict=True)}
        if len(set(shapes.values())) > 1:
            raise TaskError(
                f"data sets of one task must have images of one shape, not {shapes}: set image_size"
            )
        self.image_shape: tuple[int, ...] = inputs[0].shape[1:]
        shift_and_scale = [(0.0, 1.0)] * len(inputs)
        if all(x.dtype == np.uint8 for x in inputs):
            shift_and_scale = [_mean_and_inverse_std(x) for x in inputs]
        else:
            inputs = [standardise(x) if x.dtype == np.uint8 else x for x in inputs]
        counts = [len(x) for x in inputs]
        self.data = {
            "inputs": jnp.asarray(np.concatenate(inputs)),
            "labels": jnp.asarray(np.concatenate([d.labels for d in self.datasets]), jnp.int32),
            "first": jnp.asarray(np.cumsum([0, *counts[:-1]]), jnp.int32),
            "count": jnp.asarray(counts, jnp.int32),
            "shift": jnp.asarray([shift for shift, _ in shift_and_scale], jnp.float32),
            "scale": jnp.asarray([scale for _, scale in shift_and_scale], jnp.float32),
        }

    def sample(self, data: Data, key: Key, variant: jax.Array) -> ImageBatch:
        index = jax.random.randint(key, (self.batch_size,), 0, data["count"][variant])
        index = index + data["first"][variant]
        x, y = data["inputs"][index], data["labels"][index]
        if x.dtype == jnp.uint8:
            x = (x.astype(jnp.float32) - data["shift"][variant]) * data["scale"][variant]
        return x, y

    @classmethod
    def load(cls, name: str, folders: Mapping[str, Path]) -> Dataset:
        """The data set of this name. Raises DataError if its files are missing."""
        images = sources.load_images(name, folders)
        return Dataset(name, images.images, images.labels)


def _check(d: Dataset, classes: int) -> None:
    if len(d.labels) != len(d.inputs) or not len(d.inputs):
        raise TaskError(f"data set {d.name}: {len(d.inputs)} inputs, {len(d.labels)} labels")
    low, high = int(d.labels.min()), int(d.labels.max())
    if low < 0 or high >= classes:
        raise TaskError(f"data set {d.name}: labels {low} to {high} for classes={classes}")


def _prepared(x: np.ndarray, image_size: int | None, grey: bool | None) -> np.ndarray:
    """uint8 where nothing had to be done, else float32."""
    if grey is None:
        grey = image_size is not None
    if not grey and image_size is None:
        return x if x.dtype == np.uint8 else x.astype(np.float32)
    if x.ndim != 4:
        raise TaskError(f"inputs of shape {x.shape[1:]} are not images: leave out image_size and grey")
    y = mean_of_channels(x) if grey else x
    y = y if image_size is None else average_pool(y, image_size)
    return standardise(y) if x.dtype == np.uint8 else y.astype(np.float32)


def _mean_and_inverse_std(x: np.ndarray) -> tuple[float, float]:
    """Of uint8 values, without a copy in float64."""
    mean = float(x.mean(dtype=np.float64))
    variance = float(np.square(x, dtype=np.uint16).mean(dtype=np.float64)) - mean**2
    return mean, variance**-0.5 if variance > 0 else 1.0
