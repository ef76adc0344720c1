"""Meta-parameters that others have published: their names and hyperparameters as ours.

A family is one published implementation of an architecture (`family.Family`). It takes the constructor arguments that
were passed and the arrays by their paths, and returns (architecture, meta-parameters by the names of `theta_shapes`).
Files of such arrays are read by `sources.py` and converted by `convert.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..architectures.base import Architecture
from ..spec import Spec
from . import celo2, fc, hyper, nadamw, nn_adam, small_fc
from .family import Family

Leaves = Mapping[str, np.ndarray]
Reader = Callable[[Mapping[str, Any], Leaves], tuple[Spec | Architecture, dict[str, np.ndarray]]]

FAMILIES: dict[str, Reader] = {
    "adafac": small_fc.adafac,
    "pylo_adafac": small_fc.pylo_adafac,
    "celo": hyper.celo,
    "celo2": celo2.celo2,
    "celo2_optax": celo2.transformation,
    "celo_adam": hyper.celo_adam,
    "mlp": fc.mlp,
    "rnn": fc.rnn,
    "nnadam": nn_adam.nn_adam,
    "velo": hyper.velo,
    "nadamw": nadamw.nadamw,
}
"""By the name of the family in golden files."""

FILES: dict[str, Family] = {
    **{name: reader for name, reader in FAMILIES.items() if isinstance(reader, Family)},
    "pylo_adafac": small_fc.pylo_meta_mlp,
    "pylo_celo2": celo2.pylo_celo2,
    "pylo_velo": hyper.pylo_velo,
}
"""Those that there are files of, by the name that `lopt-fast convert --family` takes."""
