"""Which optimizers to train with, from text such as `small_fc_lopt`, `adamw@lr=3e-3` or `sgdm:best`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..architectures import ARCHITECTURES
from ..checkpoint import Checkpoint, load
from ..checkpoint import names as shipped
from ..errors import UserError
from ..spec import SpecError, Statistics

BASELINES: dict[str, tuple[float, float]] = {"adamw": (1e-3, 0.01), "sgdm": (1e-2, 0.0)}
"""Hand-designed optimizers: learning rate and weight decay if none are given. Momentum of `sgdm`: 0.9."""

_GRIDS: dict[str, tuple[float, ...]] = {
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
    "sgdm": (1e-2, 3e-2, 1e-1, 3e-1),
    "learned": (0.3, 1.0, 3.0),
}
_TEXT = re.compile(r"^(?P<name>.+?)(?P<best>:best)?(@(?P<options>\w+=[^@]*))?$")


def names() -> tuple[str, ...]:
    """What NAME may be in `parse`, besides the path of a checkpoint."""
    weightless = (name for name, kind in ARCHITECTURES.items() if not kind().theta_shapes)
    return tuple(dict.fromkeys((*shipped(), *BASELINES, *weightless)))


class TrainingError(UserError, ValueError):
    """A task, optimizer or option that cannot be used; names it and the remedy."""


@dataclass(frozen=True)
class Choice:
    """One optimizer with its hyperparameters. `checkpoint` is None for the baselines."""

    label: str
    name: str
    checkpoint: Checkpoint | None
    lr: float
    weight_decay: float
    statistics: Statistics | None = None
    search: tuple[float, ...] = ()
    """Learning rates to try first, each in a short run; the best one is then used for the whole run."""

    def at(self, lr: float) -> Choice:
        """The same optimizer with this learning rate and no search."""
        label = self.label if not self.search else f"{self.label} (lr={lr:g})"
        return replace(self, lr=lr, search=(), label=label)


def parse(text: str, lr: float | None = None, statistics: Statistics | None = None) -> Choice:
    """A Choice from NAME[:best][@key=value,...] with the keys lr, weight_decay, statistics.

    NAME is one of `names()`, or the path of a checkpoint.
    `lr` and `statistics` are what holds where the text does not say. Raises TrainingError, or CheckpointError for
    weights that cannot be loaded.
    """
    match = _TEXT.match(text)
    if match is None:
        raise TrainingError(f"optimizer {text!r}: give NAME, NAME:best or NAME@lr=VALUE")
    name, options = match["name"], _options(text, match["options"])
    checkpoint = None if name in BASELINES else load(name)
    if checkpoint is None and "statistics" in options:
        raise TrainingError(f"optimizer {text!r}: {name} has no statistics")
    if match["best"] and "lr" in options:
        raise TrainingError(f"optimizer {text!r}: either :best or lr=")
    default_lr, default_decay = BASELINES.get(name, (1.0, 0.0))
    chosen = _statistics(text, options.get("statistics")) or statistics if checkpoint else None
    if checkpoint is not None:
        _check_statistics(text, checkpoint, chosen)
    label = (
        text
        if checkpoint is None or not name.endswith(".safetensors")
        else text.replace(name, Path(name).stem)
    )
    if chosen is not None and "statistics" not in options and chosen != "exact":
        label = f"{label} {chosen}"
    return Choice(
        label=label,
        name=name,
        checkpoint=checkpoint,
        lr=_number(text, "lr", options.get("lr"), default_lr if lr is None else lr),
        weight_decay=_number(text, "weight_decay", options.get("weight_decay"), default_decay),
        statistics=chosen,
        search=(_GRIDS["learned"] if checkpoint else _GRIDS[name]) if match["best"] else (),
    )


def _check_statistics(text: str, checkpoint: Checkpoint, statistics: Statistics | None) -> None:
    try:
        checkpoint.spec.with_statistics(statistics)
    except SpecError as error:
        raise TrainingError(f"optimizer {text!r}: {error}") from error


def _options(text: str, options: str | None) -> dict[str, str]:
    pairs = [item.partition("=") for item in (options or "").split(",") if item]
    unknown = sorted({key for key, _, _ in pairs} - {"lr", "weight_decay", "statistics"})
    if unknown:
        raise TrainingError(
            f"optimizer {text!r}: unknown option {', '.join(unknown)}; known are lr, weight_decay, statistics"
        )
    return {key: value for key, _, value in pairs}


def _number(text: str, key: str, value: str | None, default: float) -> float:
    try:
        number = default if value is None else float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise TrainingError(
            f"optimizer {text!r}: {key}={default if value is None else value}: must be a number, not negative"
        )
    return number


def _statistics(text: str, value: str | None) -> Statistics | None:
    if value is None or value == "exact" or value == "lagged":
        return value  # type: ignore[return-value]
    raise TrainingError(f"optimizer {text!r}: statistics={value}: must be exact or lagged")
