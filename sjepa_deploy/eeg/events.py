"""Places windows after events: one rule for training, offline decoding and live decoding.

An event is at the sample of its source that is nearest to it. Ties go to the even sample, as in MNE (`numpy.rint`). Resampling
moves the event to the nearest sample at the model's rate, by half a sample at most, as `mne.io.Raw.resample` does with events.
The window starts a whole number of samples after that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def nearest_sample(seconds: ArrayLike, sfreq: float) -> NDArray[np.intp]:
    """Return the sample that is nearest to each time.

    Parameters
    ----------
    seconds : array_like
        Times in seconds after the first sample of a stretch without a pause.
    sfreq : float
        Rate in Hz.
    """
    return np.rint(np.asarray(seconds, dtype=np.float64) * sfreq).astype(np.intp)


def window_start(events: ArrayLike, sfreq: float, *, start: float, sfreq_model: float) -> NDArray[np.intp]:
    """Return the first sample of the window of each event at the model's rate.

    Parameters
    ----------
    events : array_like of int
        Samples of the source at which the events are, from the first sample of a stretch without a pause.
    sfreq, sfreq_model : float
        Rates of the source and of the model in Hz.
    start : float
        Start of the window in seconds after its event.

    Returns
    -------
    ndarray of int
        Samples at the model's rate from the first one of the stretch; negative where a window begins before the stretch.
    """
    at_event = np.rint(np.asarray(events, dtype=np.float64) * sfreq_model / sfreq)
    starts: NDArray[np.intp] = (at_event + np.rint(start * sfreq_model)).astype(np.intp)
    return starts
