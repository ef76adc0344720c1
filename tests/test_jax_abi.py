"""The hand-written part of XLA's C interface, compared with the header of the installed jaxlib."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")

ROOT = Path(__file__).resolve().parent.parent

# our struct: XLA's struct, and (our field, XLA's field)
STRUCTS = {
    "Extension": ("XLA_FFI_Extension_Base", [("type", "type"), ("next", "next")]),
    "Version": ("XLA_FFI_Api_Version", [("major", "major_version"), ("minor", "minor_version")]),
    "Metadata": ("XLA_FFI_Metadata", [("version", "api_version"), ("traits", "traits")]),
    "MetadataExtension": (
        "XLA_FFI_Metadata_Extension",
        [("base", "extension_base"), ("metadata", "metadata")],
    ),
    "Buffer": ("XLA_FFI_Buffer", [("dtype", "dtype"), ("data", "data"), ("rank", "rank"), ("dims", "dims")]),
    "ByteSpan": ("XLA_FFI_ByteSpan", [("data", "ptr"), ("size", "len")]),
    "Array": ("XLA_FFI_Array", [("dtype", "dtype"), ("size", "size"), ("data", "data")]),
    "Buffers": ("XLA_FFI_Args", [("size", "size"), ("types", "types"), ("values", "args")]),
    "Buffers ": ("XLA_FFI_Rets", [("size", "size"), ("types", "types"), ("values", "rets")]),
    "Attributes": (
        "XLA_FFI_Attrs",
        [("size", "size"), ("types", "types"), ("names", "names"), ("values", "attrs")],
    ),
    "ErrorCreate": ("XLA_FFI_Error_Create_Args", [("message", "message"), ("code", "errc")]),
    "ErrorDestroy": ("XLA_FFI_Error_Destroy_Args", [("error", "error")]),
    "StreamGet": ("XLA_FFI_Stream_Get_Args", [("context", "ctx"), ("stream", "stream")]),
    "Schedule": (
        "XLA_FFI_ThreadPool_Schedule_Args",
        [("context", "ctx"), ("task", "task"), ("data", "data")],
    ),
    "NumThreads": ("XLA_FFI_ThreadPool_NumThreads_Args", [("context", "ctx"), ("threads", "num_threads")]),
    "Api": (
        "XLA_FFI_Api",
        [
            ("version", "api_version"),
            ("internal", "internal_api"),
            ("error_create", "XLA_FFI_Error_Create"),
            ("error_destroy", "XLA_FFI_Error_Destroy"),
            ("stream_get", "XLA_FFI_Stream_Get"),
            ("schedule", "XLA_FFI_ThreadPool_Schedule"),
            ("num_threads", "XLA_FFI_ThreadPool_NumThreads"),
        ],
    ),
    "CallFrame": (
        "XLA_FFI_CallFrame",
        [
            ("extensions", "extension_start"),
            ("api", "api"),
            ("context", "ctx"),
            ("stage", "stage"),
            ("operands", "args"),
            ("results", "rets"),
            ("attributes", "attrs"),
        ],
    ),
}
CONSTANTS = {
    "kMetadataExtension": "XLA_FFI_Extension_Metadata",
    "kExecute": "XLA_FFI_ExecutionStage_EXECUTE",
    "kS32": "XLA_FFI_DataType_S32",
    "kS64": "XLA_FFI_DataType_S64",
    "kU8": "XLA_FFI_DataType_U8",
    "kF16": "XLA_FFI_DataType_F16",
    "kBF16": "XLA_FFI_DataType_BF16",
    "kF32": "XLA_FFI_DataType_F32",
    "kF64": "XLA_FFI_DataType_F64",
    "kCommandBufferCompatible": "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
    "kArrayAttribute": "XLA_FFI_AttrType_ARRAY",
    "kInvalidArgument": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "kInternal": "XLA_FFI_Error_Code_INTERNAL",
}
PASSED_TO_XLA = (
    "ErrorCreate",
    "ErrorDestroy",
    "StreamGet",
    "Schedule",
    "NumThreads",
)  # XLA checks that they are large enough


def compile_checks(checks: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = folder / "abi.cc"
    lines = ['#include "xla/ffi/api/c_api.h"', '#include "csrc/xla_abi.h"', *checks]
    source.write_text("\n".join(lines) + "\n")
    command = [
        compiler,
        "-std=c++17",
        "-fsyntax-only",
        f"-I{ROOT}",
        f"-I{jax.ffi.include_dir()}",
        str(source),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def same_offset(ours: str, field: str, theirs: str, their_field: str) -> str:
    a, b = f"offsetof(lopt::xla::{ours.strip()}, {field})", f"offsetof({theirs}, {their_field})"
    return (
        f'static_assert({a} == {b}, "{ours}.{field}");\n'
        f"static_assert(sizeof(lopt::xla::{ours.strip()}::{field}) == sizeof({theirs}::{their_field})"
        f' || sizeof(lopt::xla::{ours.strip()}::{field}) > 16, "size of {ours}.{field}");'
    )


def test_offsets_and_constants(tmp_path: Path) -> None:
    checks = [
        same_offset(ours, a, theirs, b) for ours, (theirs, fields) in STRUCTS.items() for a, b in fields
    ]
    checks += [f'static_assert(int(lopt::xla::{a}) == int({b}), "{a}");' for a, b in CONSTANTS.items()]
    checks += [
        f'static_assert(sizeof(lopt::xla::{ours}) >= {STRUCTS[ours][0]}_STRUCT_SIZE, "size of {ours}");'
        for ours in PASSED_TO_XLA
    ]
    result = compile_checks(checks, tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_wrong_offset_is_found(tmp_path: Path) -> None:
    result = compile_checks([same_offset("Buffer", "rank", "XLA_FFI_Buffer", "dims")], tmp_path)
    assert result.returncode != 0
    assert "Buffer.rank" in result.stderr
