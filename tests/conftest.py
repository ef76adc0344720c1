from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden vectors and data: $LOPT_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("LOPT_SHARED") or ROOT.parent / "shared")
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden vectors: {folder / 'golden'} is not a folder (set LOPT_SHARED)")
    return folder
