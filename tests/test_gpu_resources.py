"""Registers, spills, vector loads and tensor-core instructions of the GPU kernels, from the binaries."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lopt_fast.benchmark import BenchmarkError, predict, resources
from lopt_fast.benchmark.cli import app
from lopt_fast.benchmark.resources import Resources

ROOT = Path(__file__).resolve().parents[1]
ROW = Resources(
    64, 1024, spills=2, spills_in_loops=0, vector_loads=8, row_loads=6, matrix=12, instructions=500
)


def has_tools() -> bool:
    try:
        return bool(resources.find_tool("cuobjdump") and resources.find_tool("nvdisasm"))
    except BenchmarkError:
        return False


needs_tools = pytest.mark.skipif(not has_tools(), reason="no cuobjdump and nvdisasm (pip install triton)")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler nvcc in PATH")

# ---- reading ----

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z6kernelILi4EEvPf:
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ASSEMBLY = """
	.target	sm_90
	.section	.text._Z6kernelILi4EEvPf,"ax",@progbits
        .type           _Z6kernelILi4EEvPf,@function
_Z6kernelILi4EEvPf:
.L_x_0:
        /*0000*/                   STL [R1+0x4], R0 ;
        /*0010*/                   CALL.REL.NOINC `($_Z6kernelILi4EEvPf$_ZN1a4partILi4ELb1EEEvv) ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
        /*0030*/                   EXIT ;
        .type           $_Z6kernelILi4EEvPf$_ZN1a4partILi4ELb1EEEvv,@function
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   LDL R8, [R1+0x4] ;
.L_x_1:
        /*0060*/                   HMMA.1688.F32.TF32 R8, R4, R2, R8 ;
        /*0070*/                   STL.64 [R1+0x8], R8 ;
        /*0080*/              @!P0 BRA `(.L_x_1) ;
        /*0090*/                   RET.REL.NODEC R20 `(_Z6kernelILi4EEvPf) ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
        /*00b0*/                   NOP;
"""


def test_parse() -> None:
    """Functions apart from their kernel; spills in loops apart from others; the loop over work items is none."""
    assert resources.parse(USAGE, ASSEMBLY) == {
        "cuda/sm_90/kernel<4>": Resources(40, 1024, 1, 0, 0, 0, 0, 4),
        "cuda/sm_90/kernel<4>/part<4, true>": Resources(0, 0, 2, 1, 1, 0, 1, 7),
    }


LOOPS = """
	.target	sm_90
	.section	.text._Z6kernelILi4EEvPf,"ax",@progbits
        .type           _Z6kernelILi4EEvPf,@function
_Z6kernelILi4EEvPf:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/              @P1 BRA `(.L_x_3) ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128.CONSTANT R8, [R2.64] ;
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64+0x10] ;
        /*0060*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0070*/              @P2 BRA `(.L_x_1) ;
        /*0080*/                   BSSY B0, `(.L_x_0) ;
        /*0090*/                   BRA.U UP0, `(.L_x_0) ;
        /*00a0*/                   STL [R1], R4 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
"""


def test_loads_of_the_rows() -> None:
    """Those of the inner of two loops, without an offset, wherever the compiler has put its code; a branch back from
    code that stands behind the loop makes no further one, nor does what is never executed.
    """
    (row,) = resources.parse(USAGE, LOOPS).values()
    assert (row.vector_loads, row.row_loads) == (6, 3)
    assert (row.spills, row.spills_in_loops) == (1, 0)


def test_parse_says_when_it_understands_nothing() -> None:
    with pytest.raises(BenchmarkError, match="no code of kernel<4>"):
        resources.parse(USAGE, "\t.target\tsm_90\n")
    with pytest.raises(BenchmarkError, match="two functions are called"):
        resources.parse(USAGE, ASSEMBLY + ASSEMBLY)
    with pytest.raises(BenchmarkError, match="not as expected"):
        resources.parse(USAGE, "")
    with pytest.raises(BenchmarkError, match="not as expected"):
        resources.parse(USAGE.replace("REG:40", ""), ASSEMBLY)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN4lopt39_GLOBAL__N__600089d7_7_cuda_cu_92ca4e7012items_kernelILi4EEEvNS_9GpuLaunchE", "items_kernel<4>"),
        (
            "_ZN37_INTERNAL_600089d7_7_cuda_cu_92ca4e704lopt39_GLOBAL__N__600089d7_7_cuda_cu_92ca4e70"
            "8run_partILi4ELb0ELi6ELb1ELb0EEEvi",
            "run_part<4, false, 6, true, false>",
        ),
        ("_ZN4lopt5applyILi4ELNS_10MlpVariantE2ELb1EEEvv", "apply<4, 2, true>"),
        ("_ZN4lopt1a8run_partILi4ELb1ENS0_4PartILi6ELb0EEEfEEvT1_i", "run_part<4, true, Part<6, false>, f>"),
        ("_Z1kILin3EEvv", "k<-3>"),
        ("_Z99short", "_Z99short"),
        ("_Z5countPKfi", "count"),
        ("plain_c", "plain_c"),
    ],
)  # fmt: skip
def test_names(symbol: str, name: str) -> None:
    assert resources.readable(symbol) == name


SOURCE = """
#include "kernels/small_fc_lopt/mma.h"
using namespace lopt;
template <bool Bfloat16>
__global__ void __launch_bounds__(kThreads, BLOCKS) network(const float4* in, const Folded<32>* folded, float* out) {
  extern __shared__ float4 shared[];
  auto& prepared = *reinterpret_cast<MatmulNetwork<32, Bfloat16>*>(shared);
  auto* x = reinterpret_cast<float*>(&prepared + 1) + threadIdx.x / 32 * 24 * kMatmulStride<32>;
  DeviceBlock block;
  prepare_matmul(block, *folded, true, 2, prepared);
  reinterpret_cast<float4*>(x)[threadIdx.x % 32] = in[threadIdx.x];
  __syncthreads();
  DeviceWarp warp;
  matmul_mlp(warp, prepared, true, 2, x, [&](int, int j, float(&to)[2]) { to[0] = to[1] = float(j); }, x);
  out[threadIdx.x] = x[threadIdx.x % 32];
}
template __global__ void network<false>(const float4*, const Folded<32>*, float*);
template __global__ void network<true>(const float4*, const Folded<32>*, float*);
"""


@needs_tools
@needs_nvcc
@pytest.mark.parametrize("blocks", [2, 6])
def test_reads_what_the_compiler_makes(tmp_path: Path, blocks: int) -> None:
    """The tensor-core network alone: no spills; with too few registers, spills, and they are seen."""
    source, cubin = tmp_path / "network.cu", tmp_path / "network.cubin"
    source.write_text(SOURCE)
    options = ["-std=c++17", "-I", str(ROOT), f"-DBLOCKS={blocks}", "-arch=sm_90", "-cubin"]
    subprocess.run(["nvcc", *options, str(source), "-o", str(cubin)], check=True)
    found = resources.of_binary(cubin)
    assert set(found) == {"cuda/sm_90/network<false>", "cuda/sm_90/network<true>"}
    # Two tiles of 16 elements, 4 blocks of 8 units, 2 slices of 8 inputs; the second layer is a loop over blocks.
    split, bfloat16 = found["cuda/sm_90/network<false>"], found["cuda/sm_90/network<true>"]
    assert split.matrix >= 2 * 4 * 2 * 3
    assert bfloat16.matrix >= 2 * 4
    assert split.vector_loads == bfloat16.vector_loads == 1
    assert split.registers <= 65536 // 256 // blocks
    if blocks == 6:
        assert split.spills > 0
    else:
        assert split.spills == bfloat16.spills == 0


def test_not_a_binary(tmp_path: Path) -> None:
    file = tmp_path / "nothing.cubin"
    file.write_bytes(b"nothing")
    with pytest.raises(BenchmarkError, match=r"nothing.cubin|cuobjdump"):
        resources.of_binary(file)


# ---- comparing ----


def complaints(**changes: int) -> list[str]:
    return resources.compare({"cuda/a": replace(ROW, **changes)}, {"cuda/a": ROW})


def test_what_is_no_worse_is_accepted() -> None:
    assert not complaints()
    assert not complaints(registers=64 + resources.REGISTER_TOLERANCE, instructions=900)
    assert not complaints(registers=64 - resources.REGISTER_TOLERANCE, spills=0, shared=0)
    assert not complaints(vector_loads=9, row_loads=7, matrix=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 81}, "81 registers, 64 in the table"),
        ({"registers": 40}, "40 registers"),
        ({"spills": 3}, "3 spills, 2 in the table"),
        ({"spills_in_loops": 1}, "1 spills in loops, 0"),
        ({"shared": 1040}, "1040 bytes of shared memory"),
        ({"vector_loads": 7}, "7 loads of 16 bytes, 8"),
        ({"row_loads": 5}, "5 loads of 16 bytes for each row, 6"),
        ({"matrix": 0}, "0 tensor-core instructions, 12"),
    ],
)
def test_what_is_worse_is_named(change: dict[str, int], message: str) -> None:
    (found,) = complaints(**change)
    assert found.startswith("cuda/a: ")
    assert message in found


def test_new_and_missing_kernels() -> None:
    found, table = {"cuda/sm_80/b": ROW}, {"cuda/sm_80/a": ROW, "cuda/sm_90/b": ROW}
    assert resources.compare(found, table) == [
        "cuda/sm_80/b: not in the table", "cuda/sm_80/a: in the table, but not built",
    ]  # fmt: skip
    assert resources.compare(found, table, partial=True) == ["cuda/sm_80/b: not in the table"]


def test_table_file(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    rows = {"triton/b, width 4": ROW, "cuda/a": replace(ROW, registers=1)}
    resources.write(file, rows)
    assert resources.read(file) == rows
    assert resources.select(rows, "cuda") == {"cuda/a": rows["cuda/a"]}
    assert len(file.read_text().splitlines()) == len(rows) + 2
    file.write_text("{}")
    with pytest.raises(BenchmarkError, match=r"table\.json cannot be read"):
        resources.read(file)


@needs_tools
@needs_nvcc
def test_command(tmp_path: Path) -> None:
    """Compares, says how to accept, accepts."""
    source, cubin, table = tmp_path / "a.cu", tmp_path / "a.cubin", tmp_path / "table.json"
    source.write_text('extern "C" __global__ void copy(const float4* a, float4* b) { *b = *a; }')
    subprocess.run(["nvcc", "-arch=sm_80", "-cubin", str(source), "-o", str(cubin)], check=True)
    options = ["resources", "--binary", str(cubin), "--table", str(table)]
    resources.write(table, {})
    refused = CliRunner().invoke(app, options)
    assert refused.exit_code == 2
    assert "cuda/sm_80/copy: not in the table" in refused.output
    assert "--update" in refused.output
    assert CliRunner().invoke(app, [*options, "--update"]).exit_code == 0
    assert resources.read(table)["cuda/sm_80/copy"].vector_loads == 1
    assert CliRunner().invoke(app, options).exit_code == 0
    assert CliRunner().invoke(app, ["resources", "--backend", "metal"]).exit_code == 2


# ---- what is built here, against the committed table (Triton: test_triton.py) ----


@pytest.fixture(scope="module")
def table() -> resources.Rows:
    return resources.read(ROOT / "kernels/small_fc_lopt/resources.json")


@needs_tools
def test_cuda_kernels_are_as_in_the_table(table: resources.Rows) -> None:
    try:
        module = resources.cuda_module()
    except BenchmarkError as error:
        pytest.skip(str(error))
    found = resources.of_binary(module)
    worse = resources.compare(found, resources.select(table, "cuda"))
    assert not worse, "\n".join([*worse, resources.ACCEPT])


def test_make_builds_the_architectures_of_the_table(table: resources.Rows) -> None:
    """So that the comparison above is one of all of them."""
    default = re.search(r"set\(LOPT_CUDA_ARCHITECTURES (.*)\)", (ROOT / "cmake/cuda_code.cmake").read_text())
    assert default
    made = {f"cuda/sm_{n}" for n in re.findall(r"(\d+)-real", default[1])}
    assert (
        made
        == resources.architectures(resources.select(table, "cuda"))
        == {f"cuda/sm_{n}" for n in (80, 90, 100)}
    )


def test_the_document_shows_the_registers_of_the_operations(table: resources.Rows) -> None:
    text = (ROOT / "kernels/element_mlp/CUDA.md").read_text()
    expected = resources.render_operations(table)
    assert expected.count("`apply_kernel<") == 3
    assert expected in text, f"the table of registers in kernels/element_mlp/CUDA.md should be\n{expected}"


SPILLS: dict[str, int] = {}
"""Rows of the table that may access local memory, and how often; each with a comment that says why."""


def test_no_spills(table: resources.Rows) -> None:
    """The table itself: no kernel of any variant, width and backend spills, but for what is listed above."""
    assert {resources.architecture(name) for name in table} >= {
        *(f"cuda/sm_{n}" for n in (80, 90, 100)), *(f"triton/sm_{n}" for n in (80, 90, 100)),
    }  # fmt: skip
    assert {name: row.spills for name, row in table.items() if row.spills} == SPILLS


STREAMS = {"1": 4, "4": 6, "6": 6}
"""Loads of 16 bytes a row of the three passes: four rows of g; g, p, v and three momenta."""


@pytest.mark.parametrize("lagged", [False, True])
def test_the_passes_load_16_bytes(table: resources.Rows, lagged: bool) -> None:
    """Of tensors whose rows begin on 16 bytes, float32. Apply: wherever a thread has four parameters at a time."""
    found = set()
    for name, row in table.items():
        part = re.fullmatch(
            rf"cuda/(\w+)/items_kernel<(\d+), {str(lagged).lower()}>/run_part<\2, Part<([146]), true, true, \w+>>",
            name,
        )
        if part:
            architecture, width, phase = part.groups()
            if phase != "6" or int(width) <= (4 if lagged else 8):
                assert row.row_loads == STREAMS[phase], name
                found.add((architecture, int(width), phase))
    widths, wide = (2, 4, 8, 16, 32, 64), (2, 4) if lagged else (2, 4, 8)
    assert found == {
        (f"sm_{n}", width, phase)
        for n in (80, 90, 100) for phase in STREAMS for width in (wide if phase == "6" else widths)
    }  # fmt: skip


# ---- predicted times ----


def test_prediction_is_bound_by_what_is_slowest() -> None:
    a100 = predict.DEVICES[0]
    assert predict.Cost(2.04e12, 0, 0).seconds(a100) == (1.0, "memory")
    seconds, bound = predict.Cost(0, a100.float32, 0).seconds(a100)
    assert (seconds, bound) == (1.0, "float32")
    assert predict.Cost(0, 0, 0, tensor=78e12).seconds(a100) == (1.0, "tensor")
    assert predict.Cost(0, 0, 0, tensor=156e12, tensor_bfloat16=True).seconds(a100) == (1.0, "tensor")
    assert predict.Cost(0, 0, a100.issue).seconds(a100) == (1.0, "issue")


def test_bytes_of_the_passes() -> None:
    """72 for exact statistics from memory, 44 for lagged ones, AdamW 28; half and less with bfloat16."""
    passes = (predict.factor_statistics(), predict.feature_statistics(), predict.apply(4))
    assert [cost.bytes for cost in passes] == [4, 24, 44]
    assert predict.apply(4, storage=predict.Storage(2, 2, 2)).bytes == 22


@pytest.mark.parametrize("device", predict.DEVICES, ids=lambda d: d.name)
def test_matmul_wins_from_some_width_on(device: predict.Device) -> None:
    """Narrow networks are bound by memory element-wise already; wide ones by arithmetic."""
    assert predict.apply(4).seconds(device)[1] == "memory"
    assert predict.crossing(device) in (8, 16)


def test_the_document_shows_the_predicted_table() -> None:
    text = (ROOT / "kernels/small_fc_lopt/GPU.md").read_text()
    assert predict.render() in text, (
        "paste the output of `lopt-fast bench predict` into kernels/small_fc_lopt/GPU.md"
    )
    operations = (ROOT / "kernels/element_mlp/CUDA.md").read_text()
    assert predict.render_operations() in operations, (
        "and that of the operations into kernels/element_mlp/CUDA.md"
    )
    result = CliRunner().invoke(app, ["predict"])
    assert result.exit_code == 0
    assert predict.render() in result.output
    assert predict.render_operations() in result.output


def test_bytes_of_the_operations() -> None:
    """Those of kernels/element_mlp/TRITON.md: 72 for Celo, 140 for rnn_fc_lopt, Adam 28."""
    costs = {name: cost.bytes for name, cost in predict.operations()}
    assert costs["`factor_sums`"] + costs["`column_sums`, Celo"] + costs["`apply`, Celo"] == 72
    assert costs["`column_sums`, rnn_fc_lopt"] + costs["`apply`, rnn_fc_lopt"] == 140
    assert costs["`adam`"] == 28
