"""Keeps the newest samples of a stream."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Ring:
    """Keeps the newest samples in memory that does not grow.

    Parameters
    ----------
    n_chans, n_times : int
        Shape of a window.
    n_older : int
        Samples that are kept before the newest window.
    """

    def __init__(self, n_chans: int, n_times: int, n_older: int = 0) -> None:
        self._n_times, self._n_kept = n_times, n_times + n_older
        self._data = np.zeros((n_chans, 2 * self._n_kept + 6 * n_times), np.float32)
        self._stop = self._n_kept
        self._newest = np.zeros(n_chans * n_times, np.float32)

    def extend(self, samples: NDArray[np.float64]) -> None:
        """Append samples of shape (n_samples, n_chans)."""
        n_kept = self._n_kept
        samples = samples[-n_kept:]
        stop = self._stop + len(samples)
        if stop > self._data.shape[1]:
            self._data[:, :n_kept] = self._data[:, self._stop - n_kept : self._stop]
            self._stop, stop = n_kept, n_kept + len(samples)
        self._data[:, self._stop : stop] = samples.T
        self._stop = stop

    def window(self, behind: int = 0) -> NDArray[np.float32]:
        """Return the window that ended `behind` samples ago, shape (1, n_chans, n_times), contiguous.

        The next call overwrites the window.
        """
        return self.newest(self._n_times, behind)[None]

    def newest(self, n: int, behind: int = 0) -> NDArray[np.float32]:
        """Return the n samples that ended `behind` samples ago, at most a window, shape (n_chans, n), contiguous.

        The next call, also of `window`, overwrites them.
        """
        n_chans, stop = len(self._data), self._stop - behind
        newest = self._newest[: n_chans * n].reshape(n_chans, n)
        newest[...] = self._data[:, stop - n : stop]
        return newest
