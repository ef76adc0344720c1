"""The built-in tasks without a framework: data, sizes of the network, how a batch is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import Images, canonical, load_cifar10, load_digits, load_idx, load_stdlib_bytes, standardise
from .choices import TrainingError


@dataclass(frozen=True)
class ImageProblem:
    """Classification by a perceptron or, channels last, by strided convolutions; cross-entropy."""

    name: str
    images: np.ndarray
    """(n, height, width, channels) float32, standardised."""
    labels: np.ndarray
    """(n,) int64."""
    hidden: tuple[int, ...]
    convolutions: bool = False
    batch_size: int = 128

    def batch(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        chosen = rng.integers(len(self.images), size=size)
        return self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class TextProblem:
    """Next byte by a causal transformer; cross-entropy in nats. The defaults have 1.06 million parameters."""

    name: str
    text: np.ndarray
    """(n,) uint8."""
    width: int = 128
    layers: int = 5
    heads: int = 4
    context: int = 64
    batch_size: int = 8

    def batch(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        starts = rng.integers(len(self.text) - self.context, size=(size, 1))
        return (self.text[starts + np.arange(self.context + 1)].astype(np.int64),)


@dataclass(frozen=True)
class QuadraticProblem:
    """0.5 * sum(h (p - target)^2) from p = 0, with curvatures h from 1e-3 to 1; no data, no noise."""

    name: str
    targets: tuple[np.ndarray, ...]
    curvatures: tuple[np.ndarray, ...]
    batch_size: int = 1

    def batch(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        return ()


Problem = ImageProblem | TextProblem | QuadraticProblem


def make(task: str, data: str | Path | None = None) -> Problem:
    """The task by name. Raises TrainingError for an unknown one or missing --data, DataError for unreadable data."""
    task = task_name(task)
    if task in NEEDS_DATA and data is None:
        raise TrainingError(f"task {task!r} reads files that you have: give their folder with --data")
    if task in BUILT_IN and data is not None:
        raise TrainingError(f"task {task!r} needs no --data; those that do are {', '.join(NEEDS_DATA)}")
    if task == "quadratic":
        return _quadratic()
    if task == "stdlib-lm":
        return TextProblem(task, load_stdlib_bytes())
    if task == "digits":
        return _images(load_digits(), (128,))
    if task == "cifar10":
        return _images(load_cifar10(str(data)), (32, 64), convolutions=True)
    return _images(load_idx(str(data), name=task), (128, 128))


def task_name(text: str) -> str:
    """The task as results name it, from any spelling (`data.canonical`). Raises TrainingError for an unknown one."""
    known = {canonical(name): name for name in (*BUILT_IN, *NEEDS_DATA)}
    if canonical(text) not in known:
        raise TrainingError(f"task {text!r}: must be one of {', '.join(known.values())}")
    return known[canonical(text)]


BUILT_IN = ("digits", "stdlib-lm", "quadratic")
NEEDS_DATA = ("cifar10", "mnist", "fashion-mnist")


def _images(data: Images, hidden: tuple[int, ...], convolutions: bool = False) -> ImageProblem:
    return ImageProblem(
        data.name, standardise(data.images), data.labels.astype(np.int64), hidden, convolutions
    )


def _quadratic() -> QuadraticProblem:
    rng = np.random.default_rng(0)
    targets = [rng.standard_normal(shape).astype(np.float32) for shape in ((32, 32), (32,))]
    curvatures = [(10.0 ** rng.uniform(-3, 0, t.shape)).astype(np.float32) for t in targets]
    return QuadraticProblem("quadratic", tuple(targets), tuple(curvatures))
