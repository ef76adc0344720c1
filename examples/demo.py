"""Trains a byte-level transformer in PyTorch and a perceptron in JAX, with a learned optimizer and with AdamW.

python examples/demo.py [--steps N] [--out DIR]      (`make demo` sets up everything and runs it)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lopt_fast import checkpoint
from lopt_fast.cli import run_and_report
from lopt_fast.training import TrainConfig
from lopt_fast.training.choices import parse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=500, help="steps of the transformer; the perceptron gets twice as many"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--learned", action="append", help="a learned optimizer as in `lopt-fast train`; repeat it"
    )
    options = parser.parse_args()
    learned = options.learned or dict.fromkeys(
        ["small_fc_lopt", "small_fc_lopt@statistics=lagged", checkpoint.DEFAULT_NAME]
    )
    choices = [parse(text) for text in (*learned, "adamw", "adamw:best")]
    run_and_report(
        [
            TrainConfig("stdlib-lm", choices, options.steps, "torch"),
            TrainConfig("digits", choices, 2 * options.steps, "jax"),
        ],
        [options.out / "stdlib-lm-torch", options.out / "digits-jax"],
    )


if __name__ == "__main__":
    main()
