"""Downloads from a Hub on this machine, through the real huggingface_hub where it is installed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

from lopt_fast.architectures import ARCHITECTURES, initial_theta
from lopt_fast.checkpoint import Checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
import lopt_fast
print(float(lopt_fast.load(sys.argv[1]).theta["lr"]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Address of a Hub with the repository owner/name, which holds a.safetensors and README.md at COMMIT."""
    spec = ARCHITECTURES["nn_adam"].from_dict({"lstm_size": 4})
    theta = initial_theta(spec) | {"lr": np.float32(-0.25)}
    contents = {
        "a.safetensors": Checkpoint(spec, theta).save(tmp_path / "a.safetensors").read_bytes(),
        "README.md": b"# weights",
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
            if path.startswith("/api/models/owner/name"):
                siblings = [{"rfilename": file} for file in contents]
                entries = [
                    {"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in contents.items()
                ]
                about = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
                self.answer(json.dumps(entries if "/tree/" in path else about).encode())
            elif name in contents:
                self.answer(contents[name])
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def load(reference: str, hub: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its address and folders when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
    }
    return subprocess.run(
        [sys.executable, "-c", LOAD, reference], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.parametrize("file", ["", "/a.safetensors"])
def test_download_and_cache(hub: str, tmp_path: Path, file: str) -> None:
    done = load(f"hf:owner/name@{COMMIT}{file}", hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == -0.25
    if file:  # a second time from the cache, without the Hub
        again = load(f"hf:owner/name@{COMMIT}{file}", "http://127.0.0.1:9", tmp_path / "cache")
        assert again.returncode == 0, again.stderr
        assert float(again.stdout) == -0.25


def test_missing_file(hub: str, tmp_path: Path) -> None:
    done = load(f"hf:owner/name@{COMMIT}/b.safetensors", hub, tmp_path / "cache")
    assert done.returncode != 0
    assert f"hf:owner/name@{COMMIT}/b.safetensors: cannot be downloaded" in done.stderr
