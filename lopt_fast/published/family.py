"""A published implementation of an architecture: its constructor's arguments and its arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..architectures.base import Architecture
from ..spec import Spec
from .paths import Arrays, Table

Leaves = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """Reads meta-parameters: ``family(arguments, arrays by path)`` is (architecture, arrays by our names)."""

    source: str
    """Whose implementation it is."""
    kind: type[Spec] | type[Architecture]
    architecture: Callable[[Mapping[str, Any]], Spec | Architecture]
    """From the constructor arguments that were passed. Raises SpecError for unknown ones, naming them."""
    table: Callable[[Any], Table]
    """All arrays of such an architecture."""
    shown: Callable[[Leaves], dict[str, Any]]
    """Constructor arguments that the shapes of the arrays tell. Raises KeyError for arrays of another family."""
    ask: Mapping[str, str] = field(default_factory=dict)
    """Constructor arguments that no array tells and whose defaults are wrong for some weights: what to give."""
    format: Literal["haiku", "pylo"] = "haiku"
    """How arrays are named: paths in a Haiku pytree, or PyLO's PyTorch modules."""
    grouped: bool = True
    """Whether the pytree's first level are groups, each with Haiku modules below it, rather than these modules."""
    prepare: Callable[[Leaves], Leaves] = dict
    """Brings arrays that are stored in another way to the paths of `table`."""

    def __call__(self, given: Mapping[str, Any], leaves: Leaves) -> tuple[Any, Arrays]:
        architecture = self.architecture(given)
        return architecture, self.table(architecture).read(self.prepare(leaves), architecture.theta_shapes)
