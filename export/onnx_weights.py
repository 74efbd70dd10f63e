"""Reads the float16 weights of an ONNX file without the package `onnx`, which machines that build engines need not have."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

GRAPH, INITIALIZER = 7, 5
"""Fields of onnx.ModelProto and onnx.GraphProto."""

DIMS, DATA_TYPE, RAW_DATA = 1, 2, 9
"""Fields of onnx.TensorProto."""

FLOAT16 = 10
"""Of onnx.TensorProto.DataType."""


def half_tensors(onnx: bytes) -> Iterator[NDArray[np.float16]]:
    """Return the float16 initialisers of a model, in the order of the file."""
    for graph in _messages(memoryview(onnx), GRAPH):
        for tensor in _messages(graph, INITIALIZER):
            fields = list(_fields(tensor))
            shape = [value for number, value in fields if number == DIMS and isinstance(value, int)]
            raw = [value for number, value in fields if number == RAW_DATA and not isinstance(value, int)]
            if (DATA_TYPE, FLOAT16) in fields and raw and len(raw[0]) == 2 * math.prod(shape):
                yield np.frombuffer(raw[0], "<f2").reshape(shape)


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in _fields(message) if number == wanted and not isinstance(value, int))


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Return number and content of each field of a protocol buffer."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
