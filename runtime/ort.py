"""ONNX Runtime."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime as ort

from sjepa_deploy.bundle import ONNX_CONTRACT_KEY, Bundle, graph_contract
from sjepa_deploy.errors import BackendError, BundleError
from sjepa_deploy.runtime.backend import BackendOptions, FloatArray
from sjepa_deploy.spec import Precision

NO_KERNELS: dict[str, frozenset[Precision]] = {"CPUExecutionProvider": frozenset({"bf16"})}
"""Precisions that a provider has no kernels for."""


class OrtCpuBackend:
    """ONNX Runtime on the CPU.

    Input and output buffers are made once for each batch size and bound, so that a call allocates nothing.

    Raises
    ------
    BackendError
        If ONNX Runtime has no kernels for the precision, or places a node elsewhere.
    BundleError
        If the ONNX file carries another contract than the manifest.
    """

    name = "ort-cpu"

    def __init__(self, bundle: Bundle, precision: Precision, options: BackendOptions) -> None:
        provider = "CPUExecutionProvider"
        if precision in NO_KERNELS[provider]:
            raise BackendError(
                f"ONNX Runtime has no {precision} kernels on the CPU.", "Use --precision fp32 or fp16, or a GPU backend."
            )
        self.precision = precision
        spec, graph = bundle.spec, bundle.graph(precision)
        n_threads = options.n_threads
        if n_threads is None:
            n_threads = 0 if spec.needs_positions else 1
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = n_threads
        settings.log_severity_level = 3  # fp16 on a CPU casts node by node; that is known and no news to a user
        try:
            self._session = ort.InferenceSession(str(bundle.graph_path(precision)), settings, providers=[provider])
        except Exception as e:
            reason = str(e).splitlines()[0]
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot load {graph.file}: {reason}", "Export with another --opset."
            ) from e
        if self._session.get_providers() != [provider]:
            raise BackendError(f"ONNX Runtime did not load {provider}.", "Install onnxruntime again.")
        contract = graph_contract(spec, precision=precision, max_batch=graph.max_batch, static_batch=graph.static_batch)
        check_contract(self._session.get_modelmeta().custom_metadata_map, contract, graph.file)
        self._spec = spec
        self._bound: dict[int, tuple[Any, FloatArray, FloatArray]] = {}

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times). The result is overwritten by the next call."""
        bound = self._bound.get(len(eeg)) or self._bind(len(eeg))
        binding, inputs, outputs = bound
        np.copyto(inputs, eeg)
        self._session.run_with_iobinding(binding)
        return outputs

    def _bind(self, batch: int) -> tuple[Any, FloatArray, FloatArray]:
        inputs = np.zeros((batch, *self._spec.input_shape), np.float32)
        outputs = np.zeros((batch, *self._spec.output_shape), np.float32)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._spec.input_name, ort.OrtValue.ortvalue_from_numpy(inputs))
        binding.bind_output(self._spec.output_name, "cpu", 0, np.float32, outputs.shape, outputs.ctypes.data)
        self._bound[batch] = (binding, inputs, outputs)
        return self._bound[batch]

    def close(self) -> None:
        """Release the session and its buffers."""
        self._bound.clear()
        del self._session


def check_contract(metadata: dict[str, str], contract: str, file: str) -> None:
    """Compare the contract in an ONNX file's metadata with the manifest's.

    Raises
    ------
    BundleError
        If they differ. The message names the first field.
    """
    stored = metadata.get(ONNX_CONTRACT_KEY, "")
    if stored == contract:
        return
    differs = "it has none"
    if stored:
        ours, theirs = json.loads(contract), json.loads(stored)
        ours, theirs = ours | ours.pop("spec"), theirs | theirs.pop("spec", {})
        differs = "it differs in " + ", ".join(sorted(k for k in ours if ours[k] != theirs.get(k)))
    raise BundleError(f"The contract inside {file} is not the manifest's: {differs}.", "Copy or export the bundle again.")
