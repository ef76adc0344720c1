"""What the compiled module is made of: no code shared between instruction sets, nothing leaked, nothing foreign."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lopt_fast import backends

_module, _reason = backends._import_native()
needs_module = pytest.mark.skipif(_module is None, reason=f"no compiled kernels: {_reason}")


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin")
    if not found or not sys.platform.startswith("linux"):
        pytest.skip(f"no {name} here")
    return found


def output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def test_module_is_there() -> None:
    """All other tests of the kernels skip without it."""
    assert _module is not None, _reason


@needs_module
def test_module_shows_its_entry_point_alone() -> None:
    symbols = output(tool("nm"), "--dynamic", "--defined-only", _module.__file__)
    assert [line.split()[-1].split("@")[0] for line in symbols.splitlines()] == ["PyInit__native"]


@needs_module
def test_module_needs_the_c_library_alone() -> None:
    needed = [
        line for line in output(tool("readelf"), "-d", _module.__file__).splitlines() if "(NEEDED)" in line
    ]
    names = {line.split("[")[1].split(".so")[0] for line in needed}
    assert names <= {"libc", "libm", "libpthread", "libdl", "ld-linux-x86-64", "ld-linux-aarch64"}


@pytest.mark.parametrize(("source", "accepted"), [
    ("namespace { inline int f() { return 1; } }  int g() { return f(); }", True),
    ("inline int f() { return 1; }  int (*g)() = f;", False),
    ("inline int& f() { static int x; return x; }  int& g() { return f(); }", False),
])  # fmt: skip
def test_build_stops_at_shared_symbols(root: Path, tmp_path: Path, source: str, accepted: bool) -> None:
    (tmp_path / "x.cc").write_text(source)
    output(tool("g++"), "-c", tmp_path / "x.cc", "-o", tmp_path / "x.o")
    check = [tool("cmake"), f"-DNM={tool('nm')}", "-P", str(root / "cmake/check_weak_symbols.cmake"), "--"]
    done = subprocess.run([*check, str(tmp_path / "x.o")], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == accepted, done.stderr
    assert accepted or "share symbols" in done.stderr


@pytest.mark.parametrize(("release", "asked", "expected"), [
    ("13.0", "", "code: sm_80;sm_90;sm_100;compute_80"),
    ("12.4", "", "code: sm_80;sm_90;compute_80"),
    ("12.4", "90-real;120-virtual", "code: sm_90;compute_80"),
    ("12.4", "80-real;100-real", "holds 100-real, which"),
    ("13.0", "90", 'holds "90"'),
    ("12.0", "", "is of CUDA 12.0, the kernels need 12.1 or later"),
    ("of clang", "", "does not answer as nvcc does"),
])  # fmt: skip
def test_what_an_nvcc_can_make(root: Path, tmp_path: Path, release: str, asked: str, expected: str) -> None:
    """An architecture that it does not know is left out of the default ones, and refused among those asked for."""
    known = "sm_80 sm_90 sm_100" if release == "13.0" else "sm_80 sm_90"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "tools, release {release}, V1"\n'
        f'[ "$1" = --list-gpu-code ] && printf "%s\\n" {known}\nexit 0\n'
    )
    nvcc.chmod(0o755)
    script = root / "cmake/cuda_code.cmake"
    done = subprocess.run(
        [tool("cmake"), f"-DNVCC={nvcc}", f"-DARCHITECTURES={asked}", "-P", str(script)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == expected.startswith("code"), done.stderr
    assert expected in " ".join((done.stdout + done.stderr).split())
