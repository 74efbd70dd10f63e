"""Exports a rewritten model as a small typed ONNX graph."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch

from sjepa_deploy.bundle import ONNX_CONTRACT_KEY, graph_contract
from sjepa_deploy.errors import ExportError
from sjepa_deploy.export.rewrite import set_precision
from sjepa_deploy.models.networks import SignalJEPAModule, reference_mode
from sjepa_deploy.spec import Precision

DEFAULT_OPSET = 17
"""Opset 17 brought LayerNormalization, and every supported TensorRT reads opset 17 (8.6 reads no 20)."""

TORCH_OPSET = 18
"""The lowest opset that torch's exporter writes; graphs of 17 are converted from it."""

OPSETS = range(17, 22)


def to_onnx(
    model: SignalJEPAModule,
    *,
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
    max_batch: int = 64,
    static_batch: int | None = None,
    weights: str | None = None,
) -> onnx.ModelProto:
    """Export a rewritten model as an ONNX graph with float32 input and output.

    Parameters
    ----------
    model : SignalJEPAModule
        A model as `sjepa_deploy.export.rewrite.rewrite` returns it. It is left unchanged.
    precision : {"fp32", "fp16", "bf16"}
        Type of the matrix products.
    opset : int
        ONNX opset, 17 to 21.
    max_batch : int
        Largest batch; the graph takes 1..max_batch windows.
    static_batch : int or None
        Number of windows of every call instead.
    weights : str or None
        sha256 of the file of the model's weights, for the metadata.

    Returns
    -------
    onnx.ModelProto
        Input ``eeg`` (batch, n_chans, n_times), output ``prediction`` (batch, n_outputs) or, for the base model, ``features``
        (batch, n_chans * n_tokens, emb_dim). The model's contract is in its metadata.

    Raises
    ------
    ExportError
        If the opset is not supported, or the graph does not pass the checks.
    """
    if opset not in OPSETS:
        raise ExportError(
            f"Opset {opset} is not supported.", f"Use one of {OPSETS[0]} to {OPSETS[-1]}; {DEFAULT_OPSET} runs everywhere."
        )
    spec = model.spec
    typed = _copy_in_precision(model, precision)
    example = torch.randn(static_batch or min(2, max_batch), *spec.input_shape)
    dynamic = static_batch is None and max_batch > 1
    with _quiet_exporter(), reference_mode(typed):
        program = torch.onnx.export(
            typed,
            (example,),
            input_names=[spec.input_name],
            output_names=[spec.output_name],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=max_batch)},) if dynamic else None,
            opset_version=max(opset, TORCH_OPSET),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model
    constant_reshapes(graph)
    drop_debris(graph)
    proto = ir.to_proto(graph)
    if opset < TORCH_OPSET:
        relabel_opset(proto, opset)
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    proto.producer_name, proto.producer_version = "sjepa-deploy", ""
    contract = graph_contract(
        spec, precision=precision, max_batch=static_batch or max_batch, static_batch=static_batch, weights=weights
    )
    onnx.helper.set_model_props(proto, {ONNX_CONTRACT_KEY: contract})
    check_graph(proto)
    return proto


def _copy_in_precision(model: SignalJEPAModule, precision: Precision) -> SignalJEPAModule:
    typed = copy.deepcopy(model)
    set_precision(typed, precision)
    return typed


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide torch's notes on missing torchvision and its own deprecations: our users can do nothing about them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def constant_reshapes(model: ir.Model) -> None:
    """Replace computed target shapes by constants, with -1 where the batch is.

    Requires that at most one dimension of each reshaped value depends on the batch. Without it, ONNX Runtime keeps the shape
    arithmetic on the CPU, and its CUDA graph refuses the model.
    """
    for node in list(model.graph):
        target = node.inputs[1] if node.op_type == "Reshape" else None
        if target is None or ir.convenience.get_const_tensor(target) is not None:
            continue
        shape = node.outputs[0].shape
        assert shape is not None, "torch's exporter annotates every value"
        dims = [d if isinstance(d, int) else -1 for d in shape]
        assert dims.count(-1) <= 1, f"{node.name} reshapes to {shape}"
        value = ir.val(f"{node.outputs[0].name}_shape", const_value=ir.tensor(np.array(dims, dtype=np.int64)))
        value.const_value.name = value.name  # type: ignore[union-attr]
        model.graph.initializers.add(value)
        node.replace_input_with(1, value)


def drop_debris(model: ir.Model) -> None:
    """Remove nodes that no output needs, and the exporter's notes on the origin of each node."""
    for run_pass in (
        common_passes.RemoveUnusedNodesPass(),
        common_passes.DeduplicateInitializersPass(),
        common_passes.RemoveUnusedOpsetsPass(),
        common_passes.ClearMetadataAndDocStringPass(),
    ):
        run_pass(model)


def relabel_opset(model: onnx.ModelProto, opset: int) -> None:
    """Declare a lower opset for a graph whose operators are the same in both.

    onnx's version converter knows no way down for Split, whose form with explicit sizes did not change.
    """
    (domain,) = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    for node in model.graph.node:
        since = onnx.defs.get_schema(node.op_type, domain.version, "").since_version
        unchanged_split = node.op_type == "Split" and not any(a.name == "num_outputs" for a in node.attribute)
        assert since <= opset or unchanged_split, f"{node.op_type} is another operator in opset {opset}"
    domain.version = opset


SHAPE_OPS = frozenset({"Shape", "Size", "Expand", "ConstantOfShape", "Range", "NonZero", "ScatterND", "If", "Loop"})
"""Operators of shape arithmetic and data-dependent shapes, which keep parts of a graph on the CPU."""


def check_graph(model: onnx.ModelProto) -> None:
    """Run the full checker, and refuse shape arithmetic.

    Raises
    ------
    ExportError
        If the graph is invalid or computes shapes.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ExportError(
            f"The exported graph is invalid: {str(e).splitlines()[0]}", "Report this with your torch and onnx versions."
        ) from e
    if found := sorted({node.op_type for node in model.graph.node} & SHAPE_OPS):
        raise ExportError(
            f"The exported graph computes shapes at run time ({', '.join(found)}).",
            "Report this with your torch and onnx versions.",
        )


def count_nodes(model: onnx.ModelProto) -> int:
    """Return the number of nodes without constants."""
    return sum(node.op_type != "Constant" for node in model.graph.node)
