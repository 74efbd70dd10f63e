"""Runs a graph with ONNX Runtime on the CPU, and gives what enters the last layer, which can be replaced."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError
from sjepa_deploy.last_layer import LastLayer
from sjepa_deploy.onnx_file import input_of, with_output
from sjepa_deploy.runtime.backend import AdaptableBackend, BackendOptions, FloatArray
from sjepa_deploy.runtime.backends.ort import OrtCpuBackend
from sjepa_deploy.spec import RunPrecision


class AdaptableOrtBackend(OrtCpuBackend, AdaptableBackend):
    """Runs a graph that also gives the input of its last node.

    Graphs of PostLocal and Contextual have the spatial filters in that node, and of Contextual the scale and shift of the last
    normalisation too. Both are applied here, so that the features are those of the PyTorch model's last layer.

    Raises
    ------
    BackendError
        If the model outputs features, or its graph has no last layer.
    """

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions) -> None:
        spec = bundle.spec
        if spec.variant == "base":
            raise BackendError("A base model outputs features and has no last layer.", "Use a fine-tuned model.")
        self._name = ""
        n_rows = spec.n_spat_filters if spec.variant == "prelocal" else spec.n_chans
        self._shape = (n_rows, spec.n_tokens_per_channel, spec.encoder.emb_dim)
        self._tokens: FloatArray = np.zeros((0, math.prod(self._shape)), np.float32)
        self._n = 0
        super().__init__(bundle, precision, options)
        self.last_layer: LastLayer | None = None
        if spec.variant == "prelocal":
            return
        weights = bundle.weights()
        filters = weights["final_layer.spat_conv.weight"].reshape(spec.n_spat_filters, spec.n_chans)
        self._filters = filters.astype(np.float32)
        emb_dim = spec.encoder.emb_dim
        scale, shift = np.ones(emb_dim), np.zeros(emb_dim)
        if spec.variant == "contextual":
            scale, shift = weights["transformer.encoder.norm.weight"], weights["transformer.encoder.norm.bias"]
        offset = np.outer(filters.sum(axis=1), shift) + weights["final_layer.spat_conv.bias"][:, None]
        self._scale, self._offset = scale.astype(np.float32), offset[:, None].astype(np.float32)

    @property
    def features(self) -> FloatArray:
        """What entered the last layer in the last call, shape (batch, n_features)."""
        tokens = self._tokens[: self._n]
        if self._spec.variant == "prelocal":
            return tokens.copy()
        filtered = np.einsum("vc,bcne->bvne", self._filters, tokens.reshape(-1, *self._shape), optimize=True)
        features: FloatArray = (filtered * self._scale + self._offset).reshape(self._n, -1)
        return features

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times). The result is overwritten by the next call."""
        outputs = super().run(eeg)
        self._n = len(eeg)
        if self.last_layer is not None:
            np.copyto(outputs, self.last_layer(self.features), casting="same_kind")
        return outputs

    def _edited(self, onnx: bytes) -> bytes:
        try:
            self._name = input_of(onnx, self._spec.output_name)
        except ValueError as e:
            raise BackendError(f"The graph has no last layer ({e}).", "Export the bundle again.") from e
        return with_output(onnx, self._name)

    def _bind(self, batch: int) -> tuple[Any, FloatArray, FloatArray]:
        bound = super()._bind(batch)
        if batch > len(self._tokens):  # as the other buffers, whose bindings are dropped by now
            self._tokens = np.zeros((batch, math.prod(self._shape)), np.float32)
        tokens = self._tokens[:batch]
        bound[0].bind_output(self._name, "cpu", 0, np.float32, tokens.shape, tokens.ctypes.data)
        return bound
