"""What an optimizer of the `small_fc_lopt` family computes, as data: columns, decays, widths, output rule.

Everything that more than one implementation must agree on is defined here once: the order of the columns, the
feature sets, the names and the flat order of the meta-parameters. The numbers of the formulas (epsilons,
timescales) are defined once for Python in `reference.py` and once for C++ in `kernels/common/constants.h`; a test
compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

from .errors import UserError

Kind = Literal["element", "row", "column", "time"]
Scale = Literal["none", "parameter_rms"]
Statistics = Literal["exact", "lagged"]

TIMESCALES: tuple[float, ...] = (1, 3, 10, 30, 100, 300, 1000, 3000, 1e4, 3e4, 1e5)
"""Time column x is tanh(t / x - 1), t the number of steps taken before this one (Metz et al. 2022, App. A)."""

LAGGED_CLIP = 10.0
"""Bound on a normalised per-parameter column when its normaliser comes from the step before."""

_GROUPS: dict[str, frozenset[str]] = {
    # Metz et al. 2022, Figure 2: which groups of columns an ablation keeps (time columns are always there).
    "grads_time_p": frozenset({"g", "p"}),
    "m": frozenset({"g", "p", "m"}),
    "rms": frozenset({"g", "p", "rms", "rsqrt_rms"}),
    "m_rms": frozenset({"g", "p", "m", "rms", "m_rsqrt_rms", "rsqrt_rms"}),
    "adafact": frozenset({"g", "p", "fac_g", "fac_row", "fac_column", "rsqrt_fac_row", "rsqrt_fac_column"}),
    "adafact_m_mul": frozenset(
        {"g", "p", "m", "fac_g", "fac_row", "fac_column", "rsqrt_fac_row", "rsqrt_fac_column", "fac_m"}
    ),
}
_ALL_GROUPS = (
    "g", "p", "m", "rms", "m_rsqrt_rms", "rsqrt_rms", "fac_g",
    "fac_row", "fac_column", "rsqrt_fac_row", "rsqrt_fac_column", "fac_m",
)  # fmt: skip
_KINDS: dict[str, Kind] = {
    "fac_row": "row", "rsqrt_fac_row": "row", "fac_column": "column", "rsqrt_fac_column": "column",
}  # fmt: skip

FEATURE_SETS: tuple[str, ...] = ("default", "union", *_GROUPS)
"""Named feature sets. `default` are the 39 columns of `small_fc_lopt`; `union` is the same set of groups with
three second-moment decays instead of one; `m`, `rms`, `m_rms` take as many decays as the specification lists, so
that the paper's m_*, rms_*, m_rms_* are these names with their decays."""


class Accumulates(Protocol):
    """Which running averages a parameter has: how many of each kind."""

    @property
    def momenta(self) -> int: ...
    @property
    def second_moments(self) -> int: ...
    @property
    def factored_moments(self) -> int: ...


class Averages(NamedTuple):
    """The plainest `Accumulates`: the counts themselves."""

    momenta: int = 0
    second_moments: int = 0
    factored_moments: int = 0

    @classmethod
    def of(cls, accumulates: Accumulates) -> Averages:
        """Those of anything that accumulates."""
        return cls(accumulates.momenta, accumulates.second_moments, accumulates.factored_moments)


class SpecError(UserError, ValueError):
    """A specification, a set of meta-parameters or a checkpoint that cannot be used; says which value and why."""


@dataclass(frozen=True)
class Column:
    """One input of the per-parameter MLP. `index` counts the decays within the group."""

    group: str
    index: int
    kind: Kind


class Hyperparameters:
    """Base of the frozen dataclasses that configure an architecture, which checkpoints hold as JSON."""

    NAME: ClassVar[str]

    def with_statistics(self, statistics: Statistics | None) -> Self:
        """The same with these statistics; None: as it is. Raises SpecError if the architecture does not have them."""
        if statistics in (None, "exact"):
            return self
        raise SpecError(f"statistics={statistics!r}: {self.NAME} has 'exact' alone")

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the meta-parameters, in the order in which they are flattened."""
        raise NotImplementedError

    @property
    def theta_size(self) -> int:
        """Number of meta-parameters."""
        return sum(math.prod(s) for s in self.theta_shapes.values())

    def check_theta(self, theta: Mapping[str, Any]) -> None:
        """Raise SpecError unless `theta` has exactly the arrays of `theta_shapes`."""
        expected = self.theta_shapes
        missing, extra = sorted(expected.keys() - theta.keys()), sorted(theta.keys() - expected.keys())
        if missing or extra:
            raise SpecError(
                f"meta-parameters do not fit the specification: missing {missing}, unknown {extra}"
            )
        for name, shape in expected.items():
            if tuple(theta[name].shape) != shape:
                raise SpecError(
                    f"meta-parameter {name!r} has shape {tuple(theta[name].shape)}, expected {shape}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises SpecError for unknown keys and unusable values."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(values.keys() - known)
        if unknown:
            raise SpecError(f"unknown hyperparameters {unknown}; known are {sorted(known)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**arguments)
        except SpecError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            raise SpecError(f"unusable hyperparameters {dict(values)}: {error}") from error


@dataclass(frozen=True)
class Spec(Hyperparameters):
    """Configuration of one per-parameter MLP optimizer (Metz et al. 2022, arXiv 2203.11860, App. A).

    The step is ``step_mult * direction * exp(exp_mult * magnitude)``, times the root mean square of the parameter
    tensor, ``sqrt(mean p**2 + scale_epsilon)``, where ``scale == "parameter_rms"``.
    """

    NAME: ClassVar[str] = "small_fc_lopt"

    hidden_size: int = 4
    hidden_layers: int = 2
    feature_set: str = "default"
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decays: tuple[float, ...] = (0.999,)
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    step_mult: float = 0.001
    exp_mult: float = 0.001
    scale: Scale = "none"
    scale_epsilon: float = 1e-4
    statistics: Statistics = "exact"

    def __post_init__(self) -> None:
        for name in ("momentum_decays", "rms_decays", "adafactor_decays"):
            decays = tuple(float(b) for b in getattr(self, name))
            object.__setattr__(self, name, decays)
            if not decays or not all(math.isfinite(b) and b < 1.0 for b in decays):
                raise SpecError(f"{name}={decays}: give at least one decay, each below 1")
        if (
            isinstance(self.hidden_size, bool)
            or not isinstance(self.hidden_size, int)
            or not 2 <= self.hidden_size <= 256
        ):
            raise SpecError(f"hidden_size={self.hidden_size!r}: must be an integer from 2 to 256")
        if type(self.hidden_layers) is not int or self.hidden_layers not in (1, 2):
            raise SpecError(f"hidden_layers={self.hidden_layers!r}: must be 1 or 2")
        if self.feature_set not in FEATURE_SETS:
            raise SpecError(f"feature_set={self.feature_set!r}: must be one of {', '.join(FEATURE_SETS)}")
        if self.scale not in ("none", "parameter_rms"):
            raise SpecError(f"scale={self.scale!r}: must be 'none' or 'parameter_rms'")
        if self.statistics not in ("exact", "lagged"):
            raise SpecError(f"statistics={self.statistics!r}: must be 'exact' or 'lagged'")
        for name in ("step_mult", "exp_mult", "scale_epsilon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise SpecError(f"{name}={value!r}: must be a finite number")
            object.__setattr__(self, name, float(value))
        if self.scale_epsilon < 0:
            raise SpecError(f"scale_epsilon={self.scale_epsilon}: must not be negative")
        n_m, n_r, n_f = len(self.momentum_decays), len(self.rms_decays), len(self.adafactor_decays)
        if "m_rsqrt_rms" in self.groups and n_r not in (1, n_m):
            raise SpecError(f"{n_r} rms_decays for {n_m} momentum_decays: give one, or one for each momentum")
        if "fac_m" in self.groups and n_f != n_m:
            raise SpecError(
                f"{n_f} adafactor_decays for {n_m} momentum_decays: the columns m*R*C need equally many"
            )

    def with_statistics(self, statistics: Statistics | None) -> Spec:
        """The same with these statistics; None: as it is."""
        return self if statistics is None else replace(self, statistics=statistics)

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of columns, in the order of the MLP's input."""
        kept = _GROUPS.get(self.feature_set)
        return tuple(g for g in _ALL_GROUPS if kept is None or g in kept)

    @property
    def normalised_columns(self) -> tuple[Column, ...]:
        """The columns that are divided by their root mean square, in the order of the MLP's input."""
        return tuple(self._columns())

    def _columns(self) -> Iterator[Column]:
        n_m, n_r, n_f = len(self.momentum_decays), len(self.rms_decays), len(self.adafactor_decays)
        counts = {"g": 1, "p": 1, "m": n_m, "rms": n_r, "m_rsqrt_rms": n_m, "rsqrt_rms": n_r, "fac_m": n_m}
        for group in self.groups:
            for index in range(counts.get(group, n_f)):
                yield Column(group, index, _KINDS.get(group, "element"))

    @property
    def momenta(self) -> int:
        """How many momenta a parameter has, 0 where no column shows them; so for the two that follow."""
        return len(self.momentum_decays) if self.uses_momentum else 0

    @property
    def second_moments(self) -> int:
        return len(self.rms_decays) if self.uses_second_moment else 0

    @property
    def factored_moments(self) -> int:
        return len(self.adafactor_decays) if self.uses_factored else 0

    @property
    def uses_momentum(self) -> bool:
        return any(g in self.groups for g in ("m", "m_rsqrt_rms", "fac_m"))

    @property
    def uses_second_moment(self) -> bool:
        return any(g in self.groups for g in ("rms", "m_rsqrt_rms", "rsqrt_rms"))

    @property
    def uses_factored(self) -> bool:
        return any(g.startswith(("fac", "rsqrt_fac")) for g in self.groups)

    @property
    def input_size(self) -> int:
        return len(self.normalised_columns) + len(TIMESCALES)

    @property
    def layer_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each layer; the last one gives [direction, magnitude]."""
        sizes = [self.input_size, *[self.hidden_size] * self.hidden_layers, 2]
        return tuple(pairwise(sizes))

    @property
    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the meta-parameters, in the order in which they are flattened."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (n_in, n_out) in enumerate(self.layer_sizes):
            shapes[f"w{i}"] = (n_in, n_out)
            shapes[f"b{i}"] = (n_out,)
        shapes["momentum_decays"] = (len(self.momentum_decays),)
        shapes["rms_decays"] = (len(self.rms_decays),)
        shapes["adafactor_decays"] = (len(self.adafactor_decays),)
        return shapes
