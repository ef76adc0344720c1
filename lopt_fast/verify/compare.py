"""How far a replayed trajectory may be off, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .golden import Replay, Target

ILL_CONDITIONED = {
    "rnn_fc_lopt": "log(|p| + 1e-8) of a parameter that crosses zero",
}
"""Architectures with a column whose rounding a float32 run amplifies. There one element in a hundred may be off by a
tenth of the tensor's largest change, the others by a thousandth of it."""
_NEARLY_ALL = 0.99

_EPS32 = float(np.finfo(np.float32).eps)
_EPS64 = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Row:
    """The worst step of one tensor: the one with the largest error relative to its tolerance."""

    tensor: str
    shape: tuple[int, ...]
    error: float
    tolerance: float
    passed: bool
    note: str


@dataclass(frozen=True)
class Report:
    """What `verify` found out about one file."""

    file: str
    framework: str
    backend: str
    dtype: str
    rows: tuple[Row, ...]
    skipped: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)


@dataclass(frozen=True)
class _Check:
    """Errors of one kind and what they may be, each (steps,) or fewer."""

    error: np.ndarray
    tolerance: np.ndarray
    label: str


def compare(
    name: str, start: np.ndarray, found: np.ndarray, target: Target, item: Replay, dtype: str, unit: float
) -> tuple[float, Row]:
    """(largest error / tolerance over the steps, the row that reports it); NaN counts as the largest.

    found: (steps, *shape) float64. unit: errors are divided by this.
    """
    steps = len(target.values)
    flat = found.reshape(steps, -1)
    p0 = start.astype(np.float64).reshape(1, -1)
    shown = slice(None) if target.index is None else target.index
    before = p0[:, shown] if item.hold else np.concatenate([p0[:, shown], target.values[:-1]])
    moved = np.abs(target.values - before).max(axis=1)
    most = np.maximum.accumulate(moved)  # what earlier steps were off stays in the parameter
    strict = dtype == "float64" and target.exact
    wide = item.spec.NAME in ILL_CONDITIONED
    rtol32 = 1e-1 if wide else 1e-4
    eps, rtol = (_EPS64, 1e-9) if strict else (_EPS32, rtol32)
    rounding = 4.0 * eps * np.maximum(np.abs(target.values).max(axis=1), unit if item.hold else 0.0)
    carried = rounding + rtol * most if strict else np.minimum(rounding + rtol * most, target.float32_error)
    tolerance = np.maximum(rounding + rtol * moved, carried)
    errors = np.abs(flat[:, shown] - target.values)
    checks = [_Check(errors.max(axis=1), tolerance, item.label)]
    if wide and not strict:
        nearly_all = np.quantile(errors, _NEARLY_ALL, axis=1, method="lower")
        limit = np.maximum(rounding + 1e-3 * moved, np.minimum(rounding + 1e-3 * most, target.float32_error))
        checks.append(_Check(nearly_all, limit, "all but 1 in 100"))
    if target.moves is not None:
        steps_found = np.diff(np.concatenate([p0, flat]), axis=0)[:, shown]
        checks.append(_Check(np.abs(steps_found - target.moves).max(axis=1), tolerance, "the step"))
    if target.last is not None:  # a float32 run itself: it may be as far off as this one
        limit = 4.0 * _EPS32 * np.abs(target.last).max() + rtol32 * moved[-1:] + 2.0 * target.last_error
        error = np.abs(flat[-1] - target.last).max(keepdims=True)
        checks.append(_Check(error, limit if strict else 2.0 * limit, "all elements"))
    ratios = [_ratios(check) for check in checks]
    worst = int(np.argmax([ratio.max() for ratio in ratios]))
    check = checks[worst]
    i = int(np.argmax(ratios[worst]))
    step = i + steps - len(check.error)
    passed = all(bool((c.error <= c.tolerance).all()) for c in checks)  # False for NaN
    note = f"step {step}" + (f", {check.label}" if check.label else "")
    row = Row(name, start.shape, float(check.error[i]) / unit, float(check.tolerance[i]) / unit, passed, note)
    return float(ratios[worst][i]), row


def _ratios(check: _Check) -> np.ndarray:
    ratio = check.error / np.maximum(check.tolerance, np.finfo(np.float64).tiny)
    return np.where(np.isnan(ratio), np.inf, ratio)
