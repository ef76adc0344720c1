"""Numbers from training curves: clipping, ends, smoothing, time to a target. Losses have the steps on the last axis."""

from __future__ import annotations

import numpy as np

LOSS_CLIP = 3.0
"""In means a loss counts as at most this many times the task's initial loss; NaN counts as that."""


def is_clipped(losses: np.ndarray, initial_loss: float) -> np.ndarray:
    """Where losses are not finite or reach LOSS_CLIP times `initial_loss`."""
    return ~(losses < LOSS_CLIP * initial_loss)


def clipped(losses: np.ndarray, initial_loss: float) -> np.ndarray:
    """float64 losses of at most LOSS_CLIP times `initial_loss`, which is also what NaN and infinity count as."""
    return np.where(is_clipped(losses, initial_loss), LOSS_CLIP * initial_loss, losses).astype(np.float64)


def last(losses: np.ndarray) -> np.ndarray:
    """The last 5 % of the steps, at least one."""
    return losses[..., -max(1, losses.shape[-1] // 20) :]


def standard_error(by_seed: np.ndarray) -> float:
    """Of the mean of independent values; NaN for one."""
    return float(by_seed.std(ddof=1) / np.sqrt(len(by_seed))) if len(by_seed) > 1 else float("nan")


def window(steps: int) -> int:
    """Number of steps over which a curve of `steps` is smoothed."""
    return max(1, steps // 50)


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Means over the last `window` steps, over fewer at the beginning."""
    steps = losses.shape[-1]
    width = window(steps)
    sums = np.cumsum(losses, axis=-1)
    before = np.concatenate([np.zeros((*losses.shape[:-1], width)), sums[..., :-width]], axis=-1)
    return (sums - before) / np.minimum(np.arange(1, steps + 1), width)


def steps_to(losses: np.ndarray, target: float) -> int | None:
    """Steps until the smoothed mean over the seeds of (seeds, steps) is at most `target`, at a whole window's end."""
    curve = smoothed(losses).mean(axis=0)
    first = window(losses.shape[-1]) - 1
    below = np.flatnonzero(curve[first:] <= target)
    return int(below[0]) + first + 1 if len(below) else None
