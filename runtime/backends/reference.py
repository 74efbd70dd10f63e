"""Runs the PyTorch model itself in float64. This backend is slow, and every parity check compares with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.backend import Backend, BackendOptions, FloatArray, Turn
from sjepa_deploy.spec import RunPrecision

if TYPE_CHECKING:
    from sjepa_deploy.models.networks import SignalJEPAModule


class TorchBackend(Backend):
    """Runs the checkpoint in the bundle with PyTorch in float64, and rounds the outputs to float32 once.

    Raises
    ------
    BackendError
        If a precision other than fp32 is asked for.
    """

    name = "torch"

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions) -> None:
        if precision != "fp32":
            raise BackendError(f"The PyTorch reference does not run in {precision}.", "Use --precision fp32.")
        from sjepa_deploy.models.checkpoint import load_model, read_checkpoint

        self.precision = precision
        self._model = load_model(read_checkpoint(bundle.checkpoint), bundle.spec).double()
        self._turn = Turn()

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times)."""
        self._turn.begin()
        try:
            return run_reference(self._model, eeg).astype(np.float32)
        finally:
            self._turn.end()

    def close(self) -> None:
        """Release the model."""
        if not self._turn.closed:
            self._turn.close()
            del self._model


def run_reference(model: SignalJEPAModule, eeg: FloatArray) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the float64 outputs of a float64 `model` for `eeg`, shape (batch, n_chans, n_times)."""
    import torch

    from sjepa_deploy.models.networks import reference_mode

    with reference_mode(model):
        out = model(torch.from_numpy(eeg).double())
    return cast("np.ndarray[tuple[int, ...], np.dtype[np.float64]]", out.numpy())
