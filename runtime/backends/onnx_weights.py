"""Reads the float16 weights of an ONNX file without the package `onnx`, which machines that build engines need not have."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.onnx_file import GRAPH, INITIALIZER, fields, messages

DIMS, DATA_TYPE, RAW_DATA = 1, 2, 9
"""Fields of onnx.TensorProto."""

FLOAT16 = 10
"""Value of float16 in onnx.TensorProto.DataType."""


def half_tensors(onnx: bytes) -> Iterator[NDArray[np.float16]]:
    """Return the float16 initialisers of a model, in the order of the file."""
    for graph in messages(memoryview(onnx), GRAPH):
        for tensor in messages(graph, INITIALIZER):
            content = list(fields(tensor))
            shape = [value for number, value in content if number == DIMS and isinstance(value, int)]
            raw = [value for number, value in content if number == RAW_DATA and not isinstance(value, int)]
            if (DATA_TYPE, FLOAT16) in content and raw and len(raw[0]) == 2 * math.prod(shape):
                yield np.frombuffer(raw[0], "<f2").reshape(shape)
