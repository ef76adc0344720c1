"""Compile the Triton kernels ahead of time, no GPU needed, and report what each takes: registers, spills, loads.

python -m lopt_fast.benchmark.triton_resources [--target sm_90 ...] [--only apply|statistics|main] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Resources:
    """One instance of a kernel on one target."""

    kernel: str
    instance: str
    target: str
    registers: int
    """32-bit registers of a thread (AMD: vector registers)."""
    spills: int
    """Bytes of stack of a thread (AMD: spilled vector registers): 0 means none."""
    shared: int
    """Bytes of shared memory of a block."""
    vector_loads: int
    """Instructions that load 16 bytes."""
    matrix_instructions: int
    """Tensor-core (AMD: matrix-core) instructions."""


def instances(k: Any) -> Iterator[tuple[str, str, Any, Any, dict[str, Any]]]:
    """(kernel, name, layout, network, more constants) of everything that a default configuration launches.

    Tensors of a usual model with the default network, every width of the last pass, lagged statistics, bfloat16.
    """
    network = k.Network()
    layouts = {
        "matrix": k.Layout("matrix", True, 64),
        "gathered": k.Layout("gathered", False, 64),
        "vector": k.Layout("vector", True, 64),
    }
    narrow = k.Layout("matrix", False, 16)
    half = k.Layout("matrix", True, 64, "bfloat16", "bfloat16", "bfloat16")
    lagged = k.Network(lagged=True)
    for place, layout in layouts.items():
        if place != "vector":
            yield "factor_statistics", place, layout, network, {}
        yield "feature_statistics", place, layout, network, {}
        yield "apply", f"{place}, width 4", layout, network, {}
        yield "apply", f"{place}, width 4, lagged", layout, lagged, {}
    yield "feature_statistics", "matrix, rows up to 32", narrow, network, {}
    yield "apply", "matrix, rows up to 32, width 4", narrow, network, {}
    yield "apply", "matrix, width 4, bfloat16", half, network, {}
    for width in (2, 8, 16, 32, 64):
        matmul = width >= k.MATMUL_FROM
        wide = k.Network(hidden=width, matmul=matmul)
        yield "apply", f"matrix, width {width}" + (", matmul" if matmul else ""), layouts["matrix"], wide, {}
    yield "square_sums", "matrix", layouts["matrix"], network, {}
    yield "clip_factors", "", None, network, {}
    yield "find_first_steps", "", None, lagged, {}
    yield "move_accumulators", "", None, network, {"WHEN": "exact"}
    yield "fold_factors", "", None, network, {}
    yield "fold_network", "", None, network, {"PARAMETER_RMS": True}
    yield "keep_statistics", "", None, lagged, {}
    yield "set_addresses", "", None, network, {}


_TYPES = {"tiles": "*i32", "table": "*i64", "gradients": "*i64", "chunks": "*i64", "to": "*i64",
          "count": "i32", "first": "i32", "step_mult": "fp32", "exp_mult": "fp32", "scale_epsilon": "fp32"}  # fmt: skip


MAIN = (
    ("factor_statistics", "matrix"),
    ("feature_statistics", "matrix"),
    ("fold_factors", ""),
    ("fold_network", ""),
    ("apply", "matrix, width 4"),
    ("apply", "matrix, width 64, matmul"),
)
"""A few instances that show whether a target is served."""


def wanted(kernel: str, name: str, only: str | None) -> bool:
    if only == "main":
        return (kernel, name) in MAIN
    return only is None or (kernel == "apply") == (only == "apply")


def compile_instance(
    kernel: str, name: str, layout: Any, network: Any, more: dict[str, Any], target: str
) -> Resources:
    """Compile one instance for "sm_<number>" or an AMD target and read its resources from the binary."""
    k = import_module("lopt_fast.kernels.small_fc_lopt.triton")
    if network.matmul:
        backend = "cuda" if target.startswith("sm_") else "hip"
        network = k.Network(**{**asdict(network), "precision": k.default_precision(backend)})
    constants, options = k.instance(kernel, layout, network)
    return compile_kernel(k.KERNELS[kernel], name, constants | more, options, _TYPES, target)


def compile_kernel(
    function: Any,
    name: str,
    constants: dict[str, Any],
    options: dict[str, Any],
    types: dict[str, str],
    target: str,
) -> Resources:
    """Compile a kernel with these constants for a target; `types` of arguments that are not addresses of float32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia, kernel = target.startswith("sm_"), function.__name__
    names = function.arg_names
    signature = {
        n: "constexpr" if n in constants else "i64" if re.fullmatch(r"a\d", n) else types.get(n, "*fp32")
        for n in names
    }
    source = ASTSource(
        function,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")},
    )
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    compiled = triton.compile(source, target=gpu, options=options)
    shared = int(compiled.metadata.shared)
    if nvidia:
        usage = _cubin_usage(compiled.asm["cubin"], Path(triton.__file__).parent)
        text = compiled.asm["ptx"]
        loads = len(re.findall(r"\bld\.global[\w.:]*\.v[48]\.(?:b32|f32)|\bld\.global[\w.:]*\.v2\.b64", text))
        matrix = len(re.findall(r"\b(?:mma|wgmma|tcgen05)\.(?:sync|mma)", text))
        return Resources(kernel, name, target, usage["REG"], usage["STACK"], shared, loads, matrix)
    text = compiled.asm["amdgcn"]
    registers, spills = (
        int(_find(rf"\.{field}:\s+(\d+)", text)) for field in ("vgpr_count", "vgpr_spill_count")
    )
    loads = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text))
    return Resources(
        kernel, name, target, registers, spills, shared, loads, len(re.findall(r"\bv_mfma_", text))
    )


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiled code: has the compiler's output format changed?")
    return match[1]


def _cubin_usage(cubin: bytes, triton_folder: Path) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = triton_folder / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {field: int(_find(rf"\b{field}:(\d+)", text)) for field in ("REG", "STACK")}


def resources(
    targets: Sequence[str] = TARGETS, only: str | None = None, progress: bool = False
) -> list[Resources]:
    """Every instance on every target; `only`: "apply", "statistics" (all others) or "main" (a few).

    Compiles in this process; set TRITON_CACHE_DIR to a new folder before triton is imported if nothing may come from
    the cache.
    """
    k = import_module("lopt_fast.kernels.small_fc_lopt.triton")

    found = []
    for target in targets:
        for kernel, name, layout, network, more in instances(k):
            if not wanted(kernel, name, only):
                continue
            found.append(compile_instance(kernel, name, layout, network, more, target))
            if progress:
                print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--only", choices=["apply", "statistics", "main"], help="default: everything")
    parser.add_argument("--json", type=Path, help="where the rows go; default: standard output")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = [asdict(r) for r in resources(arguments.target or TARGETS, arguments.only, progress=True)]
    text = json.dumps(rows, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
