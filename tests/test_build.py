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
