"""Data files: formats, refusals, preparation."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lopt_fast import data


def test_cifar10_binary_and_python_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    flat, labels = rng.integers(0, 256, (3, 3072), np.uint8), np.array([1, 5, 9])
    (tmp_path / "data_batch_1.bin").write_bytes(np.c_[labels.astype(np.uint8), flat].tobytes())
    (tmp_path / "py").mkdir()
    (tmp_path / "py" / "data_batch_1").write_bytes(
        pickle.dumps({b"data": flat, b"labels": labels.tolist()}, 2)
    )
    binary, python = data.load_cifar10(tmp_path), data.load_cifar10(tmp_path / "py")
    np.testing.assert_array_equal(binary.images, python.images)
    np.testing.assert_array_equal(binary.labels, python.labels)
    assert binary.images.shape == (3, 32, 32, 3)
    assert binary.images[2, 1, 4, 2] == flat[2, 2 * 1024 + 1 * 32 + 4]


def test_cifar10_pickle_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": SimpleNamespace(), b"labels": []}, 2))
    with pytest.raises(data.DataError, match="not expected"):
        data.load_cifar10(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path: Path, packed: bool) -> None:
    images = np.arange(2 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(2, 28, 28)

    def write(name: str, values: np.ndarray) -> None:
        raw = (
            bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
        )
        (tmp_path / (name + (".gz" if packed else ""))).write_bytes(gzip.compress(raw) if packed else raw)

    write("train-images-idx3-ubyte", images)
    write("train-labels-idx1-ubyte", np.array([3, 4], np.uint8))
    loaded = data.load_idx(tmp_path)
    np.testing.assert_array_equal(loaded.images[..., 0], images)
    assert loaded.labels.tolist() == [3, 4]
    with pytest.raises(data.DataError, match="t10k"):
        data.load_idx(tmp_path, "test")


def test_missing_cifar10_names_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"data_batch_1\.bin.*unpack"):
        data.load_cifar10(tmp_path)


def test_truncated_cifar10_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(b"\0" * 100)
    with pytest.raises(data.DataError, match="3073"):
        data.load_cifar10(tmp_path)


def test_average_pool_and_standardise() -> None:
    images = np.zeros((1, 28, 28, 1), np.uint8)
    images[:, :2, :2] = 64  # 4 of the 16 pixels of the first square, whose edges of width 2 are padding
    pooled = data.average_pool(images, 8)
    assert pooled.shape == (1, 8, 8, 1)
    assert pooled[0, 0, 0, 0] == 16.0
    assert data.average_pool(images, 28).sum() == images.sum()
    scaled = data.standardise(np.arange(10.0))
    assert scaled.dtype == np.float32
    assert abs(float(scaled.mean())) < 1e-6
    assert abs(float(scaled.std()) - 1) < 1e-6


def test_standard_library_bytes() -> None:
    text = data.load_stdlib_bytes(10_000)
    assert text.dtype == np.uint8
    assert text.shape == (10_000,)
    np.testing.assert_array_equal(text, data.load_stdlib_bytes(20_000)[:10_000])
