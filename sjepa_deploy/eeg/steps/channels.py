"""Makes the channels of the model from those of a recording or a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sjepa_deploy.eeg.steps.base import FloatArray, Flow, Running, Step


@dataclass(frozen=True, kw_only=True)
class Channels(Step):
    """Picks the model's channels by name, and interpolates those that are lacking or bad where this was asked for.

    The step stands in every chain. Both forms get the weights from where the electrodes are known: live from
    `sjepa_deploy.eeg.interpolation`, offline in zero phase from `sjepa_deploy.eeg.places`.
    """

    name: ClassVar[str] = "channels"
    memory: ClassVar[bool] = False

    def after(self, flow: Flow) -> Flow:
        """Return the signal with the model's channels."""
        assert flow.goal.ch_names is not None, "the contract was checked"
        return flow.replace(ch_names=flow.goal.ch_names)

    def told(self, flow: Flow) -> str:
        """Return nothing: what was picked is told where it is picked."""
        return ""


class Mixer(Running):
    """Multiplies each sample by a matrix that may change between two samples.

    Parameters
    ----------
    matrix : ndarray, shape (n_chans_out, n_chans_in)
        The weights. A row with a single one passes that channel on as it is.
    """

    def __init__(self, matrix: FloatArray) -> None:
        self.set_matrix(matrix)

    def set_matrix(self, matrix: FloatArray) -> None:
        """Use another matrix from the next sample on."""
        single = ((matrix != 0).sum(axis=1) == 1) & (matrix.max(axis=1) == 1.0)
        self._picks = matrix.argmax(axis=1)
        self._as_it_is = bool(single.all()) and np.array_equal(self._picks, np.arange(matrix.shape[1]))
        self._mixed = np.flatnonzero(~single)
        self._weights = np.ascontiguousarray(matrix[self._mixed])

    def start(self, sample: FloatArray) -> FloatArray:
        """Return the product of a sample: the matrix has no memory."""
        product: FloatArray = self(sample[None])[0]
        return product

    def __call__(self, samples: FloatArray) -> FloatArray:
        """Return the products, shape (n_samples, n_chans_out)."""
        # Sums run over contiguous rows, one sample at a time: else their order, and the last bit, would depend on the chunk.
        mixed = np.ascontiguousarray(samples if self._as_it_is else samples[:, self._picks])
        if len(self._mixed):
            for i, sample in enumerate(samples):
                mixed[i, self._mixed] = (self._weights * sample).sum(axis=1)
        return mixed
