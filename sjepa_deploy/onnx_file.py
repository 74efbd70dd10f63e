"""Reads what an ONNX file says of itself, without the package `onnx`, which machines that decode need not have.

An ONNX file is a protocol buffer: nested messages of numbered fields (onnx.proto of the ONNX project names the numbers).
"""

from __future__ import annotations

from collections.abc import Iterator

METADATA, GRAPH, FUNCTION = 14, 7, 25
"""Fields of ModelProto."""

KEY, VALUE = 1, 2
"""Fields of StringStringEntryProto."""

NODE, INITIALIZER, OUTPUT, SPARSE_INITIALIZER = 1, 5, 12, 15
"""Fields of GraphProto."""

NODE_INPUT, NODE_OUTPUT = 1, 2
"""Fields of NodeProto that name tensors."""

VALUE_NAME = 1
"""Field of ValueInfoProto."""

FUNCTION_NODE = 7
"""Field of FunctionProto."""

ATTRIBUTE = 5
"""Field of NodeProto."""

TENSOR_FIELDS, GRAPH_FIELDS, SPARSE_FIELDS = (5, 10), (6, 11), (22, 23)
"""Fields of AttributeProto that hold one or several TensorProto, GraphProto and SparseTensorProto."""

EXTERNAL_DATA, DATA_LOCATION = 13, 14
"""Fields of TensorProto that say that its values are in another file."""


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Return number and content of each field of a protocol buffer.

    Raises
    ------
    ValueError
        If `message` is no protocol buffer.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = {1: 8, 5: 4}[kind]
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if at + size > len(message):
            raise ValueError("a field that goes beyond the end")
        yield key >> 3, message[at : at + size]
        at += size


def messages(message: memoryview, *wanted: int) -> Iterator[memoryview]:
    """Return the content of the fields whose number is in `wanted`."""
    return (value for number, value in fields(message) if number in wanted and not isinstance(value, int))


def metadata_of(onnx: bytes) -> dict[str, str]:
    """Return the metadata of a model.

    Raises
    ------
    ValueError
        If the bytes are no protocol buffer.
    """
    entries = (dict(fields(entry)) for entry in messages(memoryview(onnx), METADATA))
    return {_text(entry.get(KEY)): _text(entry.get(VALUE)) for entry in entries}


def input_of(onnx: bytes, output: str) -> str:
    """Return the first input of the node of a model's graph that gives the tensor `output`.

    Raises
    ------
    ValueError
        If no node does, or the bytes are no protocol buffer.
    """
    for graph in messages(memoryview(onnx), GRAPH):
        for node in messages(graph, NODE):
            if output in map(_text, messages(node, NODE_OUTPUT)):
                return _text(next(messages(node, NODE_INPUT)))
    raise ValueError(f"no node gives {output}")


def with_output(onnx: bytes, name: str) -> bytes:
    """Return a model whose graph gives the tensor `name` too.

    A reader of protocol buffers merges a message that comes twice: the graph's further output stands behind the model.
    """
    value = _field(VALUE_NAME, name.encode())
    return onnx + _field(GRAPH, _field(OUTPUT, value))


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(content)) + content


def _number(value: int) -> bytes:
    coded = bytearray()
    while value > 127:
        coded.append(value & 127 | 128)
        value >>= 7
    return bytes((*coded, value))


def has_external_data(onnx: bytes) -> bool:
    """Return whether a tensor of the model, wherever it stands, has its values in another file.

    Raises
    ------
    ValueError
        If the bytes are no protocol buffer.
    """
    model = memoryview(onnx)
    nodes = (node for function in messages(model, FUNCTION) for node in messages(function, FUNCTION_NODE))
    return any(map(_graph_has, messages(model, GRAPH))) or any(map(_node_has, nodes))


def _graph_has(graph: memoryview) -> bool:
    tensors = (*messages(graph, INITIALIZER), *_parts(messages(graph, SPARSE_INITIALIZER)))
    return any(map(_is_external, tensors)) or any(map(_node_has, messages(graph, NODE)))


def _node_has(node: memoryview) -> bool:
    for attribute in messages(node, ATTRIBUTE):
        tensors = (*messages(attribute, *TENSOR_FIELDS), *_parts(messages(attribute, *SPARSE_FIELDS)))
        if any(map(_is_external, tensors)) or any(map(_graph_has, messages(attribute, *GRAPH_FIELDS))):
            return True
    return False


def _parts(sparse: Iterator[memoryview]) -> Iterator[memoryview]:
    """Return the values and indices of sparse tensors."""
    return (tensor for each in sparse for tensor in messages(each, 1, 2))


def _is_external(tensor: memoryview) -> bool:
    return any(number == EXTERNAL_DATA or (number == DATA_LOCATION and value != 0) for number, value in fields(tensor))


def _text(value: int | memoryview | None) -> str:
    return "" if value is None or isinstance(value, int) else bytes(value).decode()


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number that goes beyond the end")
