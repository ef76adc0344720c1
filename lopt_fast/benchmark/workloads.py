"""What a step is taken on: one square matrix, one matrix, or a list of equal tensors; and how many bytes it moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import BenchmarkError

ADAMW_BYTES = 28.0
"""Bytes per float32 parameter of AdamW: p, g, m, v read, p, m, v written."""

READ_BYTES, STATE_BYTES = 24.0, 44.0
"""Of the learned optimizer: g, p, three momenta, a second moment read (24); the same and p, m, v written (44)."""

MEMORY_BYTES = 4.0 + READ_BYTES + STATE_BYTES
"""Factor statistics read g, feature statistics read all, apply reads all and writes: 72 with exact statistics."""

APPLY_UPDATES_BYTES = 12.0
"""optax.apply_updates: parameter and update read, parameter written."""


@dataclass(frozen=True)
class Workload:
    """`count` tensors of one shape, float32."""

    count: int
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        shape = "x".join(str(n) for n in self.shape)
        return shape if self.count == 1 and len(self.shape) > 1 else f"{self.count}:{shape}"

    @property
    def parameters(self) -> int:
        return self.count * math.prod(self.shape)

    @cached_property
    def values(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(parameters, gradients), the same in every call and every process."""
        rng = np.random.default_rng(0)

        def draw(scale: float) -> list[np.ndarray]:
            return [
                rng.standard_normal(self.shape, np.float32) * np.float32(scale) for _ in range(self.count)
            ]

        return draw(0.02), draw(0.01)

    def bytes_per_parameter(self, statistics: str, cache_bytes: int) -> float:
        """Byte model of one learned-optimizer step: with exact statistics 72 from memory, 44 where what is read of
        one tensor fits the cache until its last pass; 44 with lagged statistics."""
        if statistics == "lagged" or math.prod(self.shape) * READ_BYTES <= cache_bytes:
            return STATE_BYTES
        return MEMORY_BYTES


def parse(text: str) -> Workload:
    """`1024` (square), `512x2048`, `300:1000` or `300:25x40` (300 tensors). Raises BenchmarkError."""
    count_text, _, shape_text = text.strip().rpartition(":")
    try:
        count = int(count_text) if count_text else 1
        sizes = tuple(int(n) for n in shape_text.split("x"))
    except ValueError:
        count, sizes = 0, ()
    if count < 1 or not sizes or min(sizes) < 1:
        raise BenchmarkError(
            f"size {text!r}: give 1024 (a square), 512x2048 (a matrix), 300:1000 or 300:25x40 (300 tensors)"
        )
    square = len(sizes) == 1 and not count_text
    return Workload(count, sizes * 2 if square else sizes)


def parse_list(text: str) -> list[Workload]:
    return [parse(part) for part in text.split(",") if part.strip()]
