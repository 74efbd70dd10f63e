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
    """

    def __init__(self, n_chans: int, n_times: int) -> None:
        self._n_times = n_times
        self._data = np.zeros((n_chans, 8 * n_times), np.float32)
        self._stop = n_times
        self._newest = np.zeros(n_chans * n_times, np.float32)

    def extend(self, samples: NDArray[np.float64]) -> None:
        """Append samples of shape (n_samples, n_chans)."""
        samples = samples[-self._n_times :]
        stop = self._stop + len(samples)
        if stop > self._data.shape[1]:
            self._data[:, : self._n_times] = self._data[:, self._stop - self._n_times : self._stop]
            self._stop, stop = self._n_times, self._n_times + len(samples)
        self._data[:, self._stop : stop] = samples.T
        self._stop = stop

    def window(self) -> NDArray[np.float32]:
        """Return the newest window, shape (1, n_chans, n_times), contiguous. The next call overwrites it."""
        return self.newest(self._n_times)[None]

    def newest(self, n: int) -> NDArray[np.float32]:
        """Return the newest n samples, shape (n_chans, n), contiguous. The next call, also of `window`, overwrites them."""
        n_chans = len(self._data)
        newest = self._newest[: n_chans * n].reshape(n_chans, n)
        newest[...] = self._data[:, self._stop - n : self._stop]
        return newest
