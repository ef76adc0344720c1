"""Small real data sets, read from files that the user already has. Nothing is ever downloaded.

Images are uint8 arrays (n, height, width, channels), labels int32 (n,). What a network sees is made from them
by `average_pool`, `grey` and `standardise`.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import UserError

Split = Literal["train", "test"]
PathLike = str | Path


class DataError(UserError, FileNotFoundError):
    """A data file that is missing or unreadable; says which, and what to do."""


@dataclass(frozen=True)
class Images:
    """A labelled image set."""

    name: str
    images: np.ndarray
    """(n, height, width, channels) uint8."""
    labels: np.ndarray
    """(n,) int32."""


def canonical(name: str) -> str:
    """The name of a data set as names are compared: `fashion-mnist` and `fashion_mnist` are one."""
    return name.replace("-", "_")


def load_digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8, one channel, values 0..16."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DataError("the digits data set comes with scikit-learn: pip install scikit-learn") from error
    x, y = load(return_X_y=True)
    return Images("digits", x.reshape(-1, 8, 8, 1).astype(np.uint8), y.astype(np.int32))


def load_cifar10(directory: PathLike, split: Split = "train") -> Images:
    """CIFAR-10 (32x32, three channels), from its binary or its Python version, whichever lies in `directory`.

    The training split is made of those of data_batch_1..5 that are there: a part of the data set is accepted.
    """
    folder = Path(directory)
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    read = {".bin": _read_cifar_binary, "": _read_cifar_pickle}
    for suffix, reader in read.items():
        paths = [folder / (name + suffix) for name in names if (folder / (name + suffix)).is_file()]
        if paths:
            parts = [reader(path) for path in paths]
            return Images(
                "cifar10", np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
            )
    raise DataError(
        f"no CIFAR-10 {split} batch in {folder}: expected {names[0]}.bin (binary version) or {names[0]} "
        "(Python version); unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz and give that folder"
    )


def load_idx(directory: PathLike, split: Split = "train", name: str = "mnist") -> Images:
    """MNIST, Fashion-MNIST and others in the IDX format, 28x28, one channel; the files may be gzipped."""
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx(Path(directory) / f"{prefix}-images-idx3-ubyte")
    labels = _read_idx(Path(directory) / f"{prefix}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{directory}: images {images.shape} and labels {labels.shape} do not belong together"
        )
    return Images(name, images[..., None], labels.astype(np.int32))


def load_stdlib_bytes(max_bytes: int | None = None) -> np.ndarray:
    """(n,) uint8: the sources of Python's standard library, sorted by path. A text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    out = bytearray()
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            out += path.read_bytes()
            if max_bytes is not None and len(out) >= max_bytes:
                break
    if not out:
        raise DataError(
            f"no Python sources in {root}: this Python was installed without them; give a text file"
        )
    return np.frombuffer(bytes(out[:max_bytes]), np.uint8)


def load_text_bytes(path: PathLike) -> np.ndarray:
    """(n,) uint8: the bytes of a file."""
    if not Path(path).is_file():
        raise DataError(f"no text file {path}")
    return np.frombuffer(Path(path).read_bytes(), np.uint8)


def grey(images: np.ndarray) -> np.ndarray:
    """(n, h, w, 1) float32: mean over the channels."""
    return images.mean(axis=-1, keepdims=True, dtype=np.float32)


def average_pool(images: np.ndarray, size: int) -> np.ndarray:
    """(n, size, size, c) float32: zero-padded at the edges to a multiple of `size`, averaged in squares.

    28x28 becomes 32x32 before it is pooled to 8x8.
    """
    n, height, width, channels = images.shape
    if height != width:
        raise ValueError(f"images of shape {height}x{width}: only square ones are pooled")
    missing = -height % size
    pad = (missing // 2, missing - missing // 2)
    x = np.pad(images.astype(np.float32), ((0, 0), pad, pad, (0, 0)))
    k = x.shape[1] // size
    return x.reshape(n, size, k, size, k, channels).mean(axis=(2, 4))


def standardise(images: np.ndarray) -> np.ndarray:
    """float32, shifted and scaled to mean 0 and standard deviation 1 over the whole set."""
    x = images.astype(np.float64)
    return ((x - x.mean()) / x.std()).astype(np.float32)


def _read_cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % 3073:
        raise DataError(f"{path} has {raw.size} bytes, not a multiple of 3073: not a CIFAR-10 binary batch")
    raw = raw.reshape(-1, 3073)
    return _channels_last(raw[:, 1:]), raw[:, 0].astype(np.int32)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, lists and strings only: a data file must not be able to run code."""

    _allowed = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not expected in a CIFAR-10 batch")
        return super().find_class(module, name)


def _read_cifar_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return _channels_last(np.asarray(batch[b"data"])), np.asarray(batch[b"labels"], np.int32)
    except (pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"{path} is not a CIFAR-10 Python batch: {error}") from error


def _channels_last(flat: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_idx(path: Path) -> np.ndarray:
    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        raw = path.read_bytes()
    elif packed.is_file():
        raw = gzip.decompress(packed.read_bytes())
    else:
        raise DataError(
            f"neither {path} nor {packed.name} exists: give the folder of the four MNIST-style files"
        )
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes")
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise DataError(f"{path} announces shape {shape} but holds {values.size} bytes")
    return values.reshape(shape)
