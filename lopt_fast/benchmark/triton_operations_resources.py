"""Compile the Triton kernels of the operations ahead of time, no GPU needed: registers, spills, loads.

python -m lopt_fast.benchmark.triton_operations_resources [--target sm_90 ...] [--only NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from ..architectures.celo import Celo
from ..architectures.fc_lopt import FcLopt
from ..architectures.rnn_fc_lopt import RnnFcLopt
from ..files import write_atomically
from .triton_resources import TARGETS, Resources, compile_kernel

TYPES = {"table": "*i64", "tiles": "*i32", "pieces": "*i64"}
"""Of the arguments that are not addresses of float32."""


def instances(target: str) -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """(name, kernel, constants, warps) of what a step of a usual model launches."""
    common, mlp, adam, statistics = (
        import_module(f"lopt_fast.kernels.{name}.triton")
        for name in ("common", "element_mlp", "adam", "statistics")
    )
    matrix = common.Layout("matrix", True, True, 64)
    vector = common.Layout("vector", True, True, 64)
    gathered = common.Layout("gathered", False, True, 64)
    half = common.Layout("matrix", True, True, 64, "bfloat16")
    cases = [
        ("celo", Celo().mlp, {"matrix": matrix, "gathered": gathered, "vector": vector, "bfloat16": half}),
        ("fc_lopt", FcLopt().mlp, {"matrix": matrix}),
        ("rnn_fc_lopt", RnnFcLopt().mlp, {"vector": vector}),
    ]
    for name, spec, layouts in cases:
        for place, layout in layouts.items():
            for kernel in (mlp.column_sums, mlp.apply):
                block, warps = mlp.block(spec, kernel.__name__)
                backend = "cuda" if target.startswith("sm_") else "hip"
                constants = layout.constants(block) | mlp.constants(spec, layout, "parameter", backend)
                yield f"{kernel.__name__} {name} {place}", kernel, constants, warps
    yield from (
        (
            f"factor_sums {layout.place}",
            mlp.factor_sums,
            layout.constants(mlp.FACTOR_BLOCK[0]),
            mlp.FACTOR_BLOCK[1],
        )
        for layout in (matrix, gathered)
    )
    moving = {"FIRST_RATE": 4, "FACTORED_MOMENTS": 3, "TILES": mlp.MOVE_TILES, "ENTRIES": mlp.MOVE_ENTRIES}
    yield "move_factored", mlp.move_factored, moving, 4
    yield "add_tiles", common.add_tiles, {"WIDTH": 32, "BLOCK": common.ADD_TILES_BLOCK}, 4
    block, warps = adam.BLOCK
    yield "adam", adam.adam, vector.constants(block) | {"OUTPUT": "parameter"}, warps
    block, warps = statistics.BLOCK
    counts = {"MOMENTA": 5, "SECOND_MOMENTS": 5, "MOVED": True, "COUNT": 12, "WIDTH": statistics.width(5, 5)}
    yield "spreads rnn_fc_lopt", statistics.spreads, vector.constants(block) | counts, warps
    yield "merge", statistics.merge, counts | {"BLOCK": statistics.MERGE_BLOCK}, 4


def resources(
    targets: Sequence[str] = TARGETS, only: Sequence[str] = (), progress: bool = False
) -> list[Resources]:
    """Every instance on every target; `only` these names. Compiles in this process as `triton_resources.resources`."""
    common, found = import_module("lopt_fast.kernels.common.triton"), []
    for target in targets:
        for name, kernel, constants, warps in instances(target):
            if only and name not in only:
                continue
            chosen, options = common.launched(kernel, constants, warps)
            found.append(compile_kernel(kernel, name, chosen, options, TYPES, target))
            if progress:
                print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--only", action="append", help='a name, as "adam"; default: everything')
    parser.add_argument("--json", type=Path, help="where the rows go; default: standard output")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        found = resources(arguments.target or TARGETS, arguments.only or (), progress=True)
    text = json.dumps([asdict(row) for row in found], indent=1)
    if arguments.json:
        write_atomically(arguments.json, (text + "\n").encode())
    else:
        print(text)


if __name__ == "__main__":
    main()
