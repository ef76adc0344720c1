"""Steps of CUDA kernels for a profiler: that of small_fc_lopt with nothing of a framework in between, or the operations
of another optimizer.

ncu -k regex:items_kernel -c 12 -o phases python examples/profile_gpu.py --schedule phased --width 4
ncu -k regex:apply_kernel -c 1 -o apply python examples/profile_gpu.py --optimizer celo
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from lopt_fast.benchmark import BenchmarkError, gpu_contenders, models
from lopt_fast.benchmark.contenders import Config
from lopt_fast.torch import LearnedOptimizer

MODELS = {"tiny": models.tiny(models.GPT2_124M)} | models.MODELS


def learned(
    place: gpu_contenders.Place, name: str, parameters: list[torch.Tensor], gradients: list[torch.Tensor]
) -> Callable[[], object]:
    """A step of that optimizer; on the processor by the CPU kernels."""
    params = [torch.nn.Parameter(p) for p in parameters]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    optimizer = LearnedOptimizer(params, name, num_steps=1000, backend=place.backends[0])
    return lambda: optimizer.step(loss=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="GPT-2 124M", help="whose tensors")
    parser.add_argument("--optimizer", help="shipped weights, such as celo or nn_adam; not with what follows")
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
    tensors = place.draw(models.shapes(MODELS[chosen.model]))
    if chosen.optimizer:
        step = learned(place, chosen.optimizer, *tensors)
    else:
        config = Config(width=chosen.width)
        build = gpu_contenders.raw(place, config, variant=chosen.variant, schedule=chosen.schedule)
        step = build(*tensors).step
    for _ in range(chosen.steps):
        step()
    place.wait()
    what = chosen.optimizer or f"small_fc_lopt, width {chosen.width}"
    print(f"{chosen.steps} steps of {what}, tensors of {chosen.model}, on {place.device}")


if __name__ == "__main__":
    main()
