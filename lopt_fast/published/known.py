"""Published meta-parameters that are known: nothing needs to be asked about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """Where meta-parameters come from and how their optimizer is constructed."""

    source: str
    family: str
    arguments: Mapping[str, Any]
    """Only those that the arrays do not show and that are not the defaults."""
    licence: str
    """SPDX, of the repository that they are in."""


_CELO = "https://github.com/amoudgl/celo at 66d976116f39da286951f0c5e0a18eee8d1fd66b"

KNOWN: dict[str, Known] = {
    "57755d37e979fe84e3110a4669574528ee4e8689a762f5525d3734e32e3a3ff9": Known(
        f"{_CELO}, algoperf/submissions/celo/theta.state", "celo", {"train_phase": 2}, "MIT"
    ),
    "eb0770089e4b73d042fc3250721d061d6b031025045bd12886026838af3a59d8": Known(
        f"{_CELO}, algoperf/submissions/celo_adam/theta.state", "celo_adam", {}, "MIT"
    ),
}
"""By `sources.digest` of the arrays."""
