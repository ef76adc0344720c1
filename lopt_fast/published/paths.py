"""Which arrays of a published implementation are which of ours, for reading and for writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..spec import SpecError

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Arrays of ours and of theirs with the same numbers: on both sides one below the other, joined along the inputs
    (the last axis but one)."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """Inputs of each of `paths`, where they are several."""
    transposed: bool = False
    """Theirs are (outputs, inputs)."""


@dataclass(frozen=True)
class Table:
    """All arrays of an implementation."""

    entries: tuple[Entry, ...]
    unused: Mapping[str, Shape] = field(default_factory=dict)
    """Arrays of theirs that nothing depends on; zeros where they are written."""
    absent: tuple[str, ...] = ()
    """Arrays of ours that their files do not have; read as zeros."""

    def read(self, leaves: Mapping[str, np.ndarray], shapes: Mapping[str, Shape]) -> Arrays:
        """Theirs as ours. shapes: of ours. Raises SpecError for one that is missing."""
        theta = {name: np.zeros(shapes[name], np.float32) for name in self.absent}
        for entry in self.entries:
            found = [_leaf(leaves, path) for path in entry.paths]
            found = [np.swapaxes(a, -1, -2) for a in found] if entry.transposed else found
            joined = found[0] if len(found) == 1 else np.concatenate(found, axis=-2)
            rows = [shapes[name][-2] for name in entry.names] if len(entry.names) > 1 else []
            theta |= dict(zip(entry.names, _split(joined, rows), strict=True))
        return theta

    def write(self, theta: Mapping[str, np.ndarray]) -> Arrays:
        """Ours as theirs."""
        leaves: Arrays = {}
        for entry in self.entries:
            arrays = [theta[name] for name in entry.names]
            joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-2)
            parts = _split(joined, entry.rows)
            parts = [np.swapaxes(a, -1, -2) for a in parts] if entry.transposed else parts
            leaves |= {p: np.array(a, order="C") for p, a in zip(entry.paths, parts, strict=True)}
        return leaves | {path: np.zeros(shape, np.float32) for path, shape in self.unused.items()}

    def shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of theirs, from those of ours."""
        return {path: a.shape for path, a in self.write({n: np.zeros(s) for n, s in shapes.items()}).items()}


def renamed(names: Mapping[str, str], transposed: bool = False) -> tuple[Entry, ...]:
    """Entries for arrays that are only named differently: ours -> theirs. Vectors are never transposed."""
    return tuple(
        Entry((name,), (path,), transposed=transposed and not path.endswith("bias"))
        for name, path in names.items()
    )


def _split(a: np.ndarray, rows: Sequence[int]) -> list[np.ndarray]:
    if not rows:
        return [a]
    if sum(rows) != a.shape[-2]:
        raise SpecError(f"weights of {a.shape[-2]} inputs, expected {sum(rows)}")
    return np.split(a, np.cumsum(rows)[:-1], axis=-2)


def _leaf(leaves: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    if path not in leaves:
        raise SpecError(
            f"no array {path!r} among the meta-parameters: they are of another family, or incomplete"
        )
    return leaves[path]
