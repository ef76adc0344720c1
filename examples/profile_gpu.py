"""Steps of the CUDA kernel alone, for a profiler: no framework's kernels in between.

ncu -k regex:items_kernel -c 12 -o phases python examples/profile_gpu.py --schedule phased --width 4
"""

from __future__ import annotations

import argparse

from lopt_fast.benchmark import BenchmarkError, gpu_contenders, models
from lopt_fast.benchmark.contenders import Config

MODELS = {"tiny": models.tiny(models.GPT2_124M)} | models.MODELS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="GPT-2 124M", help="whose tensors")
    parser.add_argument("--width", type=int, default=4, help="hidden units")
    parser.add_argument("--variant", default="automatic", help="elementwise, matmul or matmul_bfloat16")
    parser.add_argument("--schedule", default="automatic", help="single_launch or phased")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--emulate", action="store_true", help="on the processor, to try the script itself")
    chosen = parser.parse_args()
    try:
        place = gpu_contenders.find_place(rehearse=chosen.emulate)
    except BenchmarkError as error:
        parser.error(str(error))
    build = gpu_contenders.raw(
        place, Config(width=chosen.width), variant=chosen.variant, schedule=chosen.schedule
    )
    contender = build(*place.draw(models.shapes(MODELS[chosen.model])))
    contender.run(chosen.steps)
    print(f"{chosen.steps} steps of {chosen.model}, width {chosen.width}, on {place.device}")


if __name__ == "__main__":
    main()
