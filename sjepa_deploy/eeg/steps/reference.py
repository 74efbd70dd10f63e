"""References EEG to the average of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.steps.base import FloatArray, Flow, Running, StreamStep
from sjepa_deploy.errors import RecordingError, SpecError, listed

Dtype = TypeVar("Dtype", bound=np.floating[Any])


def average_reference(samples: NDArray[Dtype], axis: int) -> NDArray[Dtype]:
    """Return `samples` without the mean of all channels, which lie along `axis`."""
    referenced: NDArray[Dtype] = samples - samples.mean(axis=axis, keepdims=True)
    return referenced


@dataclass(frozen=True, kw_only=True)
class Reference(StreamStep):
    """Subtracts the mean of channels, at every sample.

    After the step "channels" the channels are the model's; before it they are those of the recording or the stream, so that
    electrodes can be named there which the model does not have, such as mastoids.

    Attributes
    ----------
    channels : tuple of str or None
        The channels; None are all channels at this place.
    """

    name: ClassVar[str] = "reference"
    memory: ClassVar[bool] = False

    channels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.channels is not None and (not self.channels or len({*map(str.casefold, self.channels)}) < len(self.channels)):
            raise SpecError(
                f"The reference names the channels {listed(self.channels) or 'none'}.", "Name one or more, each once."
            )

    def told(self, flow: Flow) -> str:
        """Return the channels."""
        if self.channels is not None:
            return f"re-referenced to {listed(self.channels)}"
        return f"re-referenced to the average of {len(flow.ch_names)} channels"

    def causal(self, flow: Flow) -> Running:
        """Return the subtraction, which has no memory."""
        return _Referenced(self._columns(flow))

    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the same subtraction."""
        columns = self._columns(flow)
        mean: FloatArray = (data if columns is None else data[columns]).mean(axis=0, keepdims=True)
        return data - mean

    def _columns(self, flow: Flow) -> NDArray[np.intp] | None:
        if self.channels is None:
            if len(flow.ch_names) == 1:
                raise RecordingError(
                    "Nothing is left of one channel that is referenced to the average of one.",
                    "Set the reference to none (`--reference none`, in a configuration data.preprocessing), or use more.",
                )
            return None
        column = {name.casefold(): i for i, name in enumerate(flow.ch_names)}
        if lacking := [name for name in self.channels if name.casefold() not in column]:
            raise RecordingError(
                f"The reference channels {listed(lacking)} are not there; there are {listed(flow.ch_names, 64)}.",
                "Record them too, give them these names with `--rename THEIRS=MINE`, or use a model of another reference.",
            )
        return np.array([column[name.casefold()] for name in self.channels], dtype=np.intp)


class _Referenced(Running):
    """Subtracts the mean of `columns`. Sums run over contiguous rows: their order does not depend on the chunk."""

    def __init__(self, columns: NDArray[np.intp] | None) -> None:
        self._columns = columns

    def start(self, sample: FloatArray) -> FloatArray:
        referenced: FloatArray = self(sample[None])[0]
        return referenced

    def __call__(self, samples: FloatArray) -> FloatArray:
        if self._columns is None:
            return average_reference(np.ascontiguousarray(samples), axis=1)
        mean: FloatArray = np.ascontiguousarray(samples[:, self._columns]).mean(axis=1, keepdims=True)
        return samples - mean
