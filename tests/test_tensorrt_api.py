"""The adapter against the real bindings: TensorRT-RTX builds on any machine, TensorRT 11's lean runtime shows its names."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tensorrt_lean  # creating its Runtime without a driver ends the process: names only
import tensorrt_rtx
from engine_bundles import small_bundle
from fake_gpu import FakeDriver, Faults, fake_tensorrt

from sjepa_deploy.errors import EngineError, MissingDependencyError
from sjepa_deploy.runtime.backends import tensorrt_api
from sjepa_deploy.runtime.backends.engine_precision import (
    StoredWeights,
    judge_types,
    stored_weights,
    summarise_layers,
    weight_samples,
)
from sjepa_deploy.runtime.backends.engines import BuildSettings, LayerSummary
from sjepa_deploy.runtime.backends.onnx_weights import half_tensors
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT, graph_types, hold_types
from sjepa_deploy.spec import VARIANTS, graph_precision

OF_THE_FAKE = {("IBuilderConfig", "workspace"), ("IBuilderConfig", "cache"), ("INetworkDefinition", "onnx")}
ONLY_BEFORE_11 = {
    "FP16", "PREFER_PRECISION_CONSTRAINTS", "device_memory_size", "create_execution_context_without_device_memory"
}  # fmt: skip


@pytest.mark.parametrize(("version", "rtx"), [("10.9.0", False), ("11.4.0", False), ("1.7.1", True)])
def test_every_name_that_the_adapter_uses_exists_in_the_bindings(version, rtx):
    """The fake has all that the adapter uses, or the tests on it would fail with an AttributeError (test_build_engines.py)."""
    module = fake_tensorrt(version, FakeDriver(), Faults(), rtx=rtx)
    checked = []
    for name, fake in vars(module).items():
        if name == "__version__":
            continue
        real = getattr(tensorrt_rtx, name) if rtx else getattr(tensorrt_lean, name, None) or getattr(tensorrt_rtx, name)
        members = list(fake.__members__) if hasattr(fake, "__members__") else [m for m in vars(fake) if not m.startswith("_")]
        for member in members:
            if (name, member) in OF_THE_FAKE:
                continue
            if version.startswith("10") and member in ONLY_BEFORE_11:
                continue
            assert hasattr(real, member), f"{name}.{member}"
            checked.append(f"{name}.{member}")
    assert {"ICudaEngine.device_memory_size_v2", "IExecutionContext.execute_async_v3", "BuilderFlag.TF32"} <= set(checked)


def test_what_11_dropped_is_not_used_with_it():
    for gone in ("FP16", "BF16", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"):
        assert not hasattr(tensorrt_lean.BuilderFlag, gone)
    api = TensorRT("tensorrt", module=fake_tensorrt("11.4.0", FakeDriver(), Faults()))
    settings = BuildSettings(refittable=True, version_compatible=True)
    for precision in api.precisions:
        strong, *flags = api.flags(precision, settings)
        assert strong == "STRONGLY_TYPED"
        assert all(hasattr(tensorrt_lean.BuilderFlag, flag) for flag in flags)


def test_the_runtime_calls_fit_the_signatures_of_11():
    for method, words in (
        (tensorrt_lean.ICudaEngine.create_execution_context, "strategy: tensorrt_lean_bindings.tensorrt_lean.Execution"),
        (tensorrt_lean.IExecutionContext.set_device_memory, "memory: typing.SupportsInt, size: typing.SupportsInt"),
        (tensorrt_lean.IExecutionContext.execute_async_v3, "stream_handle"),
        (tensorrt_lean.IExecutionContext.set_tensor_address, "memory"),
        (tensorrt_lean.ICudaEngine.get_tensor_profile_shape, "profile_index"),
    ):
        assert words in inspect.getdoc(method)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rtx_builds_every_precision_from_the_same_graphs(variant):
    bundle, api = small_bundle(variant), TensorRT("tensorrt-rtx")
    plans = {}
    for precision in api.precisions:
        onnx = bundle.graph_path(precision).read_bytes()
        built = api.build(onnx, precision, BuildSettings(max_batch=8, optimization_level=0))
        plans[precision] = built.plan
        stored = stored_weights(built.plan, weight_samples(onnx))
        assert (stored.n >= 16) == (precision == "fp16")
        assert stored.as_half >= 0.9 * stored.n, "the plan of a strongly typed network holds halves"
        assert stored.as_single == 0
        _, network, _parser = api.parse(onnx, "STRONGLY_TYPED")
        given, made = network.get_input(0), network.get_output(0)
        spec = bundle.spec
        assert (network.num_inputs, network.num_outputs) == (1, 1)
        assert (given.name, tuple(given.shape), given.dtype.name) == ("eeg", (-1, *spec.input_shape), "FLOAT")
        assert (made.name, tuple(made.shape), made.dtype.name) == (spec.output_name, (-1, *spec.output_shape), "FLOAT")
        halves = _types(network)
        wanted = {"fp16": "HALF", "bf16": "BF16"}.get(precision)
        assert (halves - {"FLOAT", "INT64", "INT32", "BOOL"}) == ({wanted} if wanted else set())
    assert len({plans[p] for p in ("fp32", "fp16", "bf16")}) == 3
    if variant == "contextual":
        saved = bundle.graph_path("fp32").stat().st_size - bundle.graph_path("fp16").stat().st_size
        assert len(plans["fp32"]) - len(plans["fp16"]) > 0.6 * saved, "half the weights"
        assert graph_precision("tf32") == "fp32"


def _types(network):
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return {layer.get_output(k).dtype.name for layer in layers for k in range(layer.num_outputs)}


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_types_of_a_graph_are_those_of_a_strongly_typed_network(variant, precision):
    bundle = small_bundle(variant)
    api = TensorRT("tensorrt-rtx")
    _, network, _ = api.parse(bundle.graph_path(precision).read_bytes(), "STRONGLY_TYPED")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    assert graph_types(api.module, network) == [layer.get_output(0).dtype for layer in layers]


class LayerOf86:
    """A layer of a strongly typed network as the parser of 8.6 makes it: its casts are identities whose output type is set."""

    def __init__(self, layer):
        is_cast = layer.type.name == "CAST"
        self.type = SimpleNamespace(name="IDENTITY" if is_cast else layer.type.name)
        self.num_inputs, self.num_outputs = layer.num_inputs, layer.num_outputs
        self.get_input, self.get_output = layer.get_input, layer.get_output
        self.output_type_is_set = lambda k: is_cast
        self.get_output_type = lambda k: layer.get_output(k).dtype
        self.held = {}

    def set_output_type(self, k, dtype):
        self.held[k] = dtype


class NetworkOf86:
    def __init__(self, network):
        self.layers = [LayerOf86(network.get_layer(i)) for i in range(network.num_layers)]
        self.num_layers, self.get_layer, self.get_input = len(self.layers), self.layers.__getitem__, network.get_input


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
@pytest.mark.parametrize("half", [True, False])
def test_layers_of_8_6_are_asked_for_the_types_of_the_graph(variant, half):
    api = TensorRT("tensorrt-rtx")
    trt = api.module
    _, strong, _parser = api.parse(small_bundle(variant).graph_path("fp16").read_bytes(), "STRONGLY_TYPED")
    network = NetworkOf86(strong)
    hold_types(trt, network, half=half)
    asked = {name: set() for name in ("MATRIX_MULTIPLY", "CONVOLUTION", "NORMALIZATION", "SOFTMAX")}
    for i, layer in enumerate(network.layers):
        wanted = strong.get_layer(i).get_output(0).dtype
        if layer.held:
            assert layer.precision == wanted
            assert layer.held == dict.fromkeys(range(layer.num_outputs), wanted)
            asked.setdefault(layer.type.name, set()).add(wanted.name)
    assert asked["MATRIX_MULTIPLY"] == ({"HALF", "FLOAT"} if half else {"FLOAT"})
    assert asked["NORMALIZATION"] == asked["CONVOLUTION"] == {"FLOAT"}
    assert asked["SOFTMAX"] == ({"FLOAT"} if variant == "contextual" else set())
    assert not asked.keys() & {"IDENTITY", "CONSTANT", "SHUFFLE"}


def test_rtx_reports_progress_and_stops_when_told():
    onnx = small_bundle("prelocal").graph_path("fp32").read_bytes()
    seen = []

    def step(phase, share):
        seen.append((phase, share))
        return True

    api = TensorRT("tensorrt-rtx")
    api.build(onnx, "fp32", BuildSettings(max_batch=8), step=step)
    assert seen
    assert all(0 < share <= 1 for _, share in seen)
    with pytest.raises(EngineError, match="could not build the fp32 engine"):
        api.build(onnx, "fp32", BuildSettings(max_batch=8), step=lambda phase, share: False)


def test_a_graph_that_tensorrt_does_not_read_is_an_error():
    with pytest.raises(EngineError, match=r"does not read the graph: .* Export with --opset 17"):
        TensorRT("tensorrt-rtx").build(b"no graph", "fp32", BuildSettings())


def test_without_a_driver_an_engine_is_refused_with_a_reason_and_no_crash():
    api = TensorRT("tensorrt-rtx")
    built = api.build(small_bundle("prelocal").graph_path("fp32").read_bytes(), "fp32", BuildSettings(max_batch=8))
    with pytest.raises(EngineError, match="refuses the plan: "):
        api.deserialize(built.plan[:100])


def test_a_missing_or_broken_installation_is_told(monkeypatch):
    monkeypatch.setitem(tensorrt_api.MODULES, "tensorrt", ("tensorrt_that_nobody_has", "gpu"))
    with pytest.raises(MissingDependencyError, match=r"tensorrt_that_nobody_has.*pip install .*tensorrt>=.*\[gpu\]"):
        TensorRT("tensorrt")


LAYERS_8_6 = [
    {"Name": "mm", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f16_tn_n", "Outputs": []},
    {"Name": "ln", "LayerType": "kgen", "Inputs": [{"Name": "a", "Format/Datatype": "Row major linear FP32"}], "Outputs": []},
    {"Name": "{ForeignNode[x...y]}", "LayerType": "Myelin", "Outputs": [{"Name": "b", "Format/Datatype": "FP16 channel major"}]},
]
LAYERS_11 = [
    {"Name": "mm", "Outputs": [{"Name": "a", "DataType": "BFloat16", "Format": "Row major linear BF16 format (kLINEAR)"}]},
    {"Name": "id", "Outputs": [{"Name": "a", "DataType": "Float", "Format": "Row major linear FP32 format (kLINEAR)"}]},
    {"Name": "tf", "TacticName": "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n", "Outputs": []},
]


def test_layer_types_of_every_schema():
    summary = summarise_layers(json.dumps({"Layers": LAYERS_8_6}))
    assert (summary.n_layers, summary.types, summary.n_opaque) == (3, {"fp16": 2, "fp32": 1}, 1)
    summary = summarise_layers(json.dumps({"Layers": LAYERS_11}))
    assert (summary.types, summary.n_opaque) == ({"bf16": 1, "tf32": 1, "fp32": 2}, 0)
    with pytest.raises(EngineError, match="without layer information"):
        summarise_layers(json.dumps({"Layers": ["mm", "ln"]}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_weights_are_read_as_onnx_reads_them(variant):
    file = small_bundle(variant).graph_path("fp16")
    tensors = [tensor for tensor in onnx.load(file).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
    wanted = [onnx.numpy_helper.to_array(tensor) for tensor in tensors]
    read = list(half_tensors(file.read_bytes()))
    assert len(read) == len(wanted) > 4
    for ours, theirs in zip(read, wanted, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)
    samples = weight_samples(file.read_bytes())
    assert len(samples) >= 16
    for row, column in samples:
        matrices = [m for m in wanted if m.ndim == 2]
        assert any(any(np.array_equal(row, m[k, :4]) and np.array_equal(column, m[:4, k]) for k in range(8)) for m in matrices)
    assert not list(half_tensors(small_bundle(variant).graph_path("fp32").read_bytes()))


def test_fused_layers_are_judged_by_the_weights_that_the_plan_holds():
    samples = tuple(np.random.default_rng(0).standard_normal((40, 2, 8)).astype(np.float16))
    halves = b"head" + b"..".join(sample[i % 2].tobytes() for i, sample in enumerate(samples))
    singles = b"head" + b"..".join(sample[1].astype(np.float32).tobytes() for sample in samples)
    assert stored_weights(halves, samples) == StoredWeights(n=40, as_half=40, as_single=0)
    assert stored_weights(singles, samples) == StoredWeights(n=40, as_half=0, as_single=40)
    opaque = LayerSummary(n_layers=6, types={"fp32": 1}, n_opaque=1)
    assert judge_types(opaque, "fp16", stored_weights(halves, samples))[0] == "fp16"
    computes_in, evidence = judge_types(opaque, "fp16", stored_weights(singles, samples))
    assert computes_in == "fp32"
    assert evidence == "none of its 6 layers is typed fp16; of 40 samples of weights its plan holds 0 in fp16 and 40 in fp32"
    told = LayerSummary(n_layers=6, types={"fp32": 6})
    assert judge_types(told, "fp16", stored_weights(halves, samples))[0] == "fp32", "layers that tell their types are believed"
    assert judge_types(opaque, "bf16", stored_weights(singles, ()))[0] == "fp32", "nothing proves it"
