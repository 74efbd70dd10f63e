"""Keeps the newest samples of a few channels for drawing: the decoder hands them over, and another thread thins them out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BIN_S = 0.04
"""Seconds whose smallest and largest sample are drawn as one line."""

MOST_CHANNELS = 32
"""Channels that are kept."""

MOST_CHUNKS = 2048
"""Chunks that wait to be thinned out; older ones make way."""


def spread_over(ch_names: Sequence[str], n: int = 8) -> tuple[str, ...]:
    """Return at most `n` channels, evenly spread over the order of the channels."""
    places = np.linspace(0, len(ch_names) - 1, min(n, len(ch_names))).round().astype(int)
    return tuple(ch_names[place] for place in places)


class Traces:
    """Takes chunks in the decoder's thread in a microsecond or two, and gives their extremes a bin in another thread.

    Parameters
    ----------
    columns : sequence of int
        Columns of the chunks to keep, at most `MOST_CHANNELS`.
    """

    def __init__(self, columns: Sequence[int]) -> None:
        assert len(columns) <= MOST_CHANNELS
        self._columns = np.array(columns, np.intp)
        self._chunks: deque[tuple[NDArray[np.float64], float, NDArray[Any]]] = deque(maxlen=MOST_CHUNKS)
        self._rest = np.empty(0), np.empty((0, len(columns)))

    def take(self, stamps: NDArray[np.float64], samples: NDArray[Any], offset: float = 0.0) -> None:
        """Take a chunk: stamps in seconds, to which `offset` is added, and samples of shape (n_samples, n_chans)."""
        if len(self._columns):
            self._chunks.append((stamps, offset, samples.take(self._columns, 1)))

    def thinned(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the bins that are whole by now, and forget these bins. Only one thread calls this.

        Returns
        -------
        times : ndarray of float64, shape (n_bins,)
            Start of each bin in seconds. Bins without samples are left out.
        low, high : ndarray of float64, shape (n_bins, n_kept)
            Smallest and largest sample of each channel in the stream's unit; NaN where a sample is.
        """
        taken = [self._chunks.popleft() for _ in range(len(self._chunks))]
        stamps = np.concatenate([self._rest[0], *(stamps + offset for stamps, offset, _ in taken)])
        samples = np.concatenate([self._rest[1], *(samples for _, _, samples in taken)])
        bins = np.floor(stamps / BIN_S)
        # a clock that was set begins a new bin as well
        starts = np.flatnonzero(np.diff(bins, prepend=np.nan) != 0)
        if not len(starts):
            return np.empty(0), samples, samples
        self._rest = stamps[starts[-1] :], samples[starts[-1] :]
        if len(starts) == 1:
            return np.empty(0), samples[:0], samples[:0]
        whole = samples[: starts[-1]]
        low, high = (extreme.reduceat(whole, starts[:-1], axis=0) for extreme in (np.minimum, np.maximum))
        return bins[starts[:-1]] * BIN_S, low, high
