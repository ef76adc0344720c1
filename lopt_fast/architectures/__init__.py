"""The registry of architectures: one file and one line each."""

from __future__ import annotations

import numpy as np

from ..spec import Spec
from . import small_fc_lopt
from .adafactor import Adafactor
from .adamw import AdamW
from .base import Architecture
from .celo import Celo
from .celo2 import Celo2
from .celo_adam import CeloAdam
from .fc_lopt import FcLopt
from .nadamw import NAdamW
from .nn_adam import NNAdam
from .recurrent_transformer import RecurrentTransformer
from .rnn_fc_lopt import RnnFcLopt
from .sgdm import SgdM
from .velo import Velo

__all__ = ["ARCHITECTURES", "Architecture", "initial_theta"]

ARCHITECTURES: dict[str, type[Spec] | type[Architecture]] = {
    kind.NAME: kind
    for kind in (
        Spec,  # small_fc_lopt, whose kernels are its own
        Celo,
        Celo2,
        CeloAdam,
        FcLopt,
        RnnFcLopt,
        RecurrentTransformer,
        NNAdam,
        Velo,
        AdamW,  # from here on without meta-parameters
        NAdamW,
        SgdM,
        Adafactor,
    )
}
"""What a checkpoint's `architecture` may be."""


def initial_theta(spec: Spec | Architecture, seed: int = 0) -> dict[str, np.ndarray]:
    """Meta-parameters before meta-training, float32, random."""
    return small_fc_lopt.init_theta(spec, seed) if isinstance(spec, Spec) else spec.init_theta(seed)
