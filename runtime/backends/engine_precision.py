"""Finds the precision that an engine computes in, from the layers that the engine shows and the weights in its plan."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import EngineError
from sjepa_deploy.runtime.backends.engines import LayerSummary
from sjepa_deploy.runtime.backends.onnx_weights import half_tensors
from sjepa_deploy.spec import RunPrecision

TYPE_WORDS: dict[str, re.Pattern[str]] = {
    "fp16": re.compile(r"\b(half|fp16|float16)\b|f16|fp16|hmma|h884|h1688|h16816", re.IGNORECASE),
    "bf16": re.compile(r"bf16|bfloat16", re.IGNORECASE),
    "tf32": re.compile(r"tf32", re.IGNORECASE),
    "fp32": re.compile(r"\b(float|fp32|float32)\b|fp32|f32f32|sgemm|ffma", re.IGNORECASE),
}
"""Words in formats, types and kernel names that name the type of a computation, over all versions."""

WeightSamples = tuple[NDArray[np.float16], ...]
"""Samples of float16 matrices. A sample is a run of a row and a run of a column: a plan holds one of the two side by side."""

N_SAMPLES, RUN = 64, 4
"""Number of samples of the weights, and number of values of a run, small enough to lie within a kernel's tile."""


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """Counts the types in which a plan holds the float16 weights of the graph.

    Attributes
    ----------
    n : int
        Samples of weights that were looked for.
    as_half, as_single : int
        Samples that the plan holds in float16, and in float32.
    """

    n: int
    as_half: int
    as_single: int


def weight_samples(onnx: bytes) -> WeightSamples:
    """Return samples of the float16 matrices of a graph, spread over all of them.

    The samples come from the file: the weakly typed networks of TensorRT 8.6 showed no float16 constant.
    """
    samples = []
    for matrix in half_tensors(onnx):
        if matrix.ndim == 2 and min(matrix.shape) >= 2 * RUN:
            samples += [np.stack([matrix[k, :RUN], matrix[:RUN, k]]) for k in range(2 * RUN)]
    samples = [sample for sample in samples if all(len(set(run)) == RUN for run in sample.tolist())]
    return tuple(samples[:: max(1, len(samples) // N_SAMPLES)])


def stored_weights(plan: bytes, samples: WeightSamples) -> StoredWeights:
    """Look for weights in a plan, as float16 and as float32."""

    def count(dtype: type[np.floating[Any]]) -> int:
        return sum(any(plan.find(run.tobytes()) >= 0 for run in sample.astype(dtype)) for sample in samples)

    return StoredWeights(n=len(samples), as_half=count(np.float16), as_single=count(np.float32))


def summarise_layers(inspected: str) -> LayerSummary:
    """Return the facts of an engine inspector's JSON that a proof of precision needs.

    Raises
    ------
    EngineError
        If the JSON holds layer names only.
    """
    layers = json.loads(inspected, strict=False)["Layers"]  # 8.6 writes raw control characters
    if any(not isinstance(layer, dict) for layer in layers):
        raise EngineError("The engine was built without layer information.", "Build it with sjepa-build --rebuild.")
    types = dict.fromkeys(TYPE_WORDS, 0)
    n_opaque = 0
    for layer in layers:
        tensors = [t for key in ("Inputs", "Outputs") for t in layer.get(key, []) if isinstance(t, dict)]
        words = [str(v) for t in tensors for k, v in t.items() if "format" in k.lower() or "type" in k.lower()]
        words += [str(layer[key]) for key in ("TacticName", "Precision") if key in layer]
        text = " ".join(words).replace("bf16", "BF16")
        for name, pattern in TYPE_WORDS.items():
            found = pattern.search(re.sub("bf16|bfloat16", "", text, flags=re.IGNORECASE) if name == "fp16" else text)
            types[name] += found is not None
        n_opaque += "ForeignNode" in str(layer.get("Name", "")) or "myelin" in str(layer.get("LayerType", "")).lower()
    return LayerSummary(n_layers=len(layers), types={k: v for k, v in types.items() if v}, n_opaque=n_opaque)


def judge_types(layers: LayerSummary, precision: RunPrecision, stored: StoredWeights) -> tuple[RunPrecision, str]:
    """Return the precision that an engine computes in, and the evidence.

    Regions that TensorRT fuses hide their inner types from the inspector, but not how their weights are stored.

    Parameters
    ----------
    layers : LayerSummary
        Layers and types that the inspector found.
    precision : {"fp32", "tf32", "fp16", "bf16"}
        Requested precision.
    stored : StoredWeights
        Types in which the plan holds the graph's float16 weights.

    Raises
    ------
    EngineError
        If an fp32 engine may use TensorFloat-32.
    """
    if precision == "fp32":
        if layers.types.get("tf32"):
            raise EngineError(
                f"{layers.types['tf32']} layers of the fp32 engine use TensorFloat-32.", "Ask for tf32, or report this."
            )
        return "fp32", "TensorFloat-32 was off for the build, and no layer names it"
    if precision == "tf32":
        return "tf32", "TensorFloat-32 was allowed"
    if n_typed := layers.types.get(precision, 0):
        return precision, f"{n_typed} of {layers.n_layers} layers are typed {precision}"
    found = f"of {stored.n} samples of weights its plan holds {stored.as_half} in fp16 and {stored.as_single} in fp32"
    if precision == "fp16" and layers.n_opaque and stored.as_half > stored.n / 2 > stored.as_single:
        return precision, f"its fused layers tell no types; {found}"
    return "fp32", f"none of its {layers.n_layers} layers is typed {precision}; {found}"
