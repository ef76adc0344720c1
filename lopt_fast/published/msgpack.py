"""Flax's files of arrays (`flax.serialization`): MessagePack, with arrays as extension types. Nothing is executed.

Formats: https://github.com/msgpack/msgpack/blob/master/spec.md; an array is the extension 1, whose data is again
MessagePack: [shape, name of the dtype, little-endian bytes in C order]. A NumPy scalar is the extension 3, the same.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

_ARRAY, _SCALAR = 1, 3
_DTYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)
_DEPTH = 64
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_LENGTHS = {  # first byte -> (kind, type of the length)
    0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"),
    0xC7: ("extension", ">B"), 0xC8: ("extension", ">H"), 0xC9: ("extension", ">I"),
    0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"),
    0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class MessagePackError(ValueError):
    """Bytes that are not a Flax file of arrays, or a damaged one."""


def loads(data: bytes) -> Any:
    """The value in `data`: dictionaries, lists, strings, numbers and NumPy arrays. Raises MessagePackError."""
    reader = _Reader(data)
    try:
        value = reader.value(0)
    except (struct.error, UnicodeDecodeError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, MessagePackError):
            raise
        raise MessagePackError(f"not MessagePack: {error}") from error
    if reader.position != len(data):
        raise MessagePackError(f"{len(data) - reader.position} bytes after the end of the value")
    return value


def dumps(value: Any) -> bytes:
    """Dictionaries with string keys, strings, integers, lists and NumPy arrays, as Flax writes them."""
    if isinstance(value, Mapping):
        items = b"".join(dumps(str(key)) + dumps(item) for key, item in value.items())
        return _head(len(value), fixed=(0x80, 16), sizes={0xDE: ">H", 0xDF: ">I"}) + items
    if isinstance(value, (list, tuple)):
        items = b"".join(map(dumps, value))
        return _head(len(value), fixed=(0x90, 16), sizes={0xDC: ">H", 0xDD: ">I"}) + items
    if isinstance(value, str):
        text = value.encode()
        return _head(len(text), fixed=(0xA0, 32), sizes={0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}) + text
    if isinstance(value, bytes):
        return _head(len(value), sizes={0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}) + value
    if isinstance(value, np.ndarray):
        content = value.astype(value.dtype.newbyteorder("<")).tobytes("C")
        data = dumps([list(value.shape), value.dtype.name, content])
        head = _head(len(data), sizes={0xC7: ">B", 0xC8: ">H", 0xC9: ">I"})
        return head + struct.pack(">b", _ARRAY) + data
    if type(value) is int and value >= 0:
        return _head(value, fixed=(0x00, 128), sizes={0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"})
    raise TypeError(f"{type(value).__name__} cannot be written as MessagePack here")


def _head(length: int, sizes: Mapping[int, str], fixed: tuple[int, int] = (0, 0)) -> bytes:
    """The first byte with the length in its low bits, or behind it in the smallest of `sizes`."""
    if length < fixed[1]:
        return bytes([fixed[0] | length])
    for code, kind in sizes.items():
        if length < 256 ** struct.calcsize(kind):
            return bytes([code]) + struct.pack(kind, length)
    raise OverflowError(f"{length} is too large for MessagePack")


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise MessagePackError("the data ends too early: truncated or not MessagePack")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def value(self, depth: int) -> Any:
        if depth > _DEPTH:
            raise MessagePackError("nested too deeply")
        first = self.take(1)[0]
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first < 0x90:
            return self.sized("map", first & 0x0F, depth)
        if first < 0xA0:
            return self.sized("list", first & 0x0F, depth)
        if first < 0xC0:
            return self.sized("text", first & 0x1F, depth)
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            return self.number(_NUMBERS[first])
        if first in _FIXED_EXTENSIONS:
            return self.sized("extension", _FIXED_EXTENSIONS[first], depth)
        if first not in _LENGTHS:
            raise MessagePackError(f"byte {first:#x} starts no value")
        kind, length = _LENGTHS[first]
        return self.sized(kind, self.number(length), depth)

    def sized(self, kind: str, length: int, depth: int) -> Any:
        if kind == "bytes":
            return self.take(length)
        if kind == "text":
            return self.take(length).decode()
        if kind == "list":
            return [self.value(depth + 1) for _ in range(length)]
        if kind == "map":
            pairs = [(self.value(depth + 1), self.value(depth + 1)) for _ in range(length)]
            if not all(isinstance(key, str) for key, _ in pairs):
                raise MessagePackError("a key that is not a string")
            if len(dict(pairs)) != len(pairs):
                raise MessagePackError("a key occurs twice")
            return dict(pairs)
        code = self.number(">b")
        data = self.take(length)
        if code not in (_ARRAY, _SCALAR):
            raise MessagePackError(f"extension type {code}: known are arrays and NumPy scalars")
        return _array(data, depth)


def _array(data: bytes, depth: int) -> np.ndarray:
    inner = _Reader(data)
    content = inner.value(depth + 1)
    if not (isinstance(content, list) and len(content) == 3) or inner.position != len(data):
        raise MessagePackError("an array that is not [shape, dtype, bytes]")
    shape, name, raw = content
    if name not in _DTYPES:
        raise MessagePackError(f"an array of dtype {name!r}: known are {', '.join(_DTYPES)}")
    dtype = np.dtype(name).newbyteorder("<")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise MessagePackError(f"an array of shape {shape!r}")
    if not isinstance(raw, bytes) or math.prod(shape) * dtype.itemsize != len(raw):
        raise MessagePackError(f"an array of shape {shape} and dtype {name} with the wrong number of bytes")
    return np.frombuffer(raw, dtype).astype(name).reshape(shape)
