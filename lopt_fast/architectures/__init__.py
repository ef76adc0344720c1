"""The registry of architectures: one file and one line each."""

from .base import Architecture
from .celo import Celo

ARCHITECTURES: dict[str, type[Architecture]] = {kind.NAME: kind for kind in (Celo,)}
"""All but `small_fc_lopt`, which has no tensor level and kernels of its own, by name."""
