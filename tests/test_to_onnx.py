"""The exported graphs: small, typed, without shape arithmetic, and equal to the PyTorch model at every batch size."""

import copy
import functools
import json
import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import ExportError
from sjepa_deploy.export.rewrite import rewrite
from sjepa_deploy.export.to_onnx import DEFAULT_OPSET, OPSETS, SHAPE_OPS, check_graph, count_nodes, to_onnx
from sjepa_deploy.models.networks import build_model, reference_mode
from sjepa_deploy.parity import TOLERANCE
from sjepa_deploy.spec import EncoderSpec, ModelSpec

SMALL = EncoderSpec(n_layers=1, n_decoder_layers=1)  # more repeat the same: every bundle that tests export has two
TYPES = ("fp32", "fp16", "bf16")


def spec_of(variant, n_chans=6, n_times=200, encoder=SMALL, **fields):
    montage = read_montage("GSN-HydroCel-129")
    return ModelSpec.of(
        variant=variant,
        n_chans=n_chans,
        n_times=n_times,
        sfreq=100.0,
        ch_names=montage.ch_names[:n_chans],
        positions=montage.positions[:n_chans],
        encoder=encoder,
        **fields,
    )


def exported(variant, n_times=280, precision="fp32", opset=DEFAULT_OPSET):
    """Return a model with two outputs and its graph for batches to 8. Tests share them and alter neither."""
    return _exported(variant, n_times, precision, opset)


@functools.cache
def _exported(variant, n_times, precision, opset):
    model = build_model(spec_of(variant, n_times=n_times, n_outputs=2), seed=0)
    return model, to_onnx(rewrite(model), precision=precision, opset=opset, max_batch=8)


def run(proto, eeg):
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return session.run(None, {"eeg": eeg})[0]


def reference(model, eeg):
    double = copy.deepcopy(model).double()
    with reference_mode(double):
        return double(torch.from_numpy(eeg).double()).numpy()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("n_times", [152, 280, 408])
@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual", "base"])
def test_equals_the_model_at_every_batch_size(variant, n_times, precision):
    model, proto = exported(variant, n_times, precision)
    eeg = eeg_windows(8, 6, n_times, 100.0, np.random.default_rng(0))
    want = reference(model, eeg)
    scale = np.sqrt(np.mean(want**2))
    for batch in (1, 2, 3, 7, 8):
        assert np.abs(run(proto, eeg[:batch]) - want[:batch]).max() <= TOLERANCE[precision] * scale


@pytest.mark.parametrize(
    ("variant", "most", "precisions"),
    [("prelocal", 50, TYPES), ("postlocal", 50, TYPES), ("contextual", 199, TYPES), ("base", 199, ["fp32"])],
)
def test_the_default_graphs_are_small_and_free_of_shape_arithmetic(variant, most, precisions, request):
    model = build_model(spec_of(variant, n_chans=129, encoder=EncoderSpec()), seed=0)
    if variant == "contextual":
        bundle = request.getfixturevalue("default_contextual")
        assert bundle.spec == model.spec.replace(phase="zero-phase")  # what is assumed where nothing was said
        protos = [onnx.load(bundle.graph_path(precision)) for precision in precisions]
    else:
        protos = [to_onnx(rewrite(model), precision=precision) for precision in precisions]
    for proto in protos:
        casts = sum(node.op_type == "Cast" for node in proto.graph.node)
        assert count_nodes(proto) - casts < most
        assert not {node.op_type for node in proto.graph.node} & SHAPE_OPS
        initializers = {tensor.name for tensor in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type == "Reshape":
                assert node.input[1] in initializers


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp32", TensorProto.FLOAT), ("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)]
)
def test_products_are_typed_and_islands_stay_in_float32(precision, kind):
    proto = onnx.shape_inference.infer_shapes(exported("contextual", precision=precision)[1])
    values = [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    by_op = {}
    for node in proto.graph.node:
        by_op.setdefault(node.op_type, []).append({types[name] for name in node.output})
    for op in ("LayerNormalization", "InstanceNormalization", "Softmax", "Conv"):
        assert by_op[op] == [{TensorProto.FLOAT}] * len(by_op[op]), op
    assert {kind} in by_op["MatMul"]
    head = types[proto.graph.output[0].name]
    assert head == TensorProto.FLOAT == types["eeg"]


@pytest.mark.parametrize("opset", OPSETS)
def test_every_offered_opset_runs(opset):
    model, proto = exported("contextual", opset=opset)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    eeg = eeg_windows(3, 6, 280, 100.0, np.random.default_rng(0))
    assert np.allclose(run(proto, eeg), reference(model, eeg), rtol=0, atol=1e-5)


@pytest.mark.parametrize("opset", [7, 16, 22])
def test_other_opsets_are_refused(opset):
    with pytest.raises(ExportError, match=f"Opset {opset} is not supported"):
        to_onnx(rewrite(build_model(spec_of("prelocal"), seed=0)), opset=opset)


def test_static_batch():
    model = build_model(spec_of("postlocal"), seed=0)
    proto = to_onnx(rewrite(model), static_batch=3)
    assert [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [3, 6, 200]
    eeg = eeg_windows(3, 6, 200, 100.0, np.random.default_rng(0))
    assert np.allclose(run(proto, eeg), reference(model, eeg), rtol=0, atol=1e-5)


def test_names_shapes_and_contract():
    model, proto = exported("base")
    assert [value.name for value in proto.graph.input] == ["eeg"]
    assert [value.name for value in proto.graph.output] == ["features"]
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param, dims[1].dim_value, dims[2].dim_value) == ("batch", 6, 280)
    contract = json.loads({entry.key: entry.value for entry in proto.metadata_props}["sjepa_deploy"])
    assert contract["spec"]["signal"]["ch_names"] == list(model.spec.ch_names)
    assert (contract["precision"], contract["max_batch"]) == ("fp32", 8)


def test_nan_in_one_window_stays_there():
    _, proto = exported("contextual")
    eeg = eeg_windows(3, 6, 280, 100.0, np.random.default_rng(0))
    eeg[1, 2, 50] = np.nan
    assert np.isnan(run(proto, eeg)).all(axis=1).tolist() == [False, True, False]


def test_a_graph_with_shape_arithmetic_is_refused():
    x = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = onnx.helper.make_tensor_value_info("y", TensorProto.INT64, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Shape", ["x"], ["y"])], "g", [x], [y])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ExportError, match=re.escape("(Shape)")):
        check_graph(proto)
