"""Emulates bfloat16 graphs on a CPU, which has no kernels for bfloat16."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper


def emulate_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph equal to `model` that computes every bfloat16 operation in float32 and rounds its result.

    Hardware does the same: products of bfloat16 values accumulate in float32. Values stay bfloat16 between operations.
    """
    model = onnx.shape_inference.infer_shapes(model)
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    widened: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "Cast":
            nodes.append(node)
            continue
        wide = onnx.NodeProto()
        wide.CopyFrom(node)
        after = []
        for i, name in enumerate(node.input):
            if types.get(name) == TensorProto.BFLOAT16:
                if name not in widened:
                    nodes.append(helper.make_node("Cast", [name], [f"{name}/as float32"], to=TensorProto.FLOAT))
                    widened.add(name)
                wide.input[i] = f"{name}/as float32"
        for i, name in enumerate(node.output):
            if types.get(name) == TensorProto.BFLOAT16:
                wide.output[i] = f"{name}/wide"
                after.append(helper.make_node("Cast", [wide.output[i]], [name], to=TensorProto.BFLOAT16))
        nodes += [wide, *after]
    graph = helper.make_graph(nodes, model.graph.name, model.graph.input, model.graph.output, model.graph.initializer)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
