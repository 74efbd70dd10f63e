"""Places and cuts windows in a recording that was fitted to a signal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sjepa_deploy.eeg.chain import finish_windows
from sjepa_deploy.eeg.events import nearest_sample, window_start
from sjepa_deploy.eeg.pauses import Segment
from sjepa_deploy.errors import InputError
from sjepa_deploy.spec import SignalSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """Says what a recording is after it was fitted to a model, and where its windows lie.

    Attributes
    ----------
    signal : SignalSpec
        The signal of the model.
    segments : tuple of Segment
        The stretches of the fitted samples that were recorded without a pause, in which windows lie.
    source_sfreq : float
        Rate of the recording in Hz.
    n_found : int
        Channels of the model that the recording has; the others are interpolated.
    n_settling : int
        Samples at the start of each segment in which causal steps settle; 0 in zero phase.
    steps : tuple of str
        Sentences that say what was done to the recording, in order.
    """

    signal: SignalSpec
    segments: tuple[Segment, ...]
    source_sfreq: float
    n_found: int
    n_settling: int
    steps: tuple[str, ...]

    @property
    def sfreq(self) -> float:
        """Return the rate of the fitted samples in Hz."""
        return self.signal.sfreq

    def window_starts(self, hop: int) -> NDArray[np.intp]:
        """Return the first sample of every whole window, shape (n_windows,): each segment starts with one.

        Raises
        ------
        InputError
            See `window_starts`, the function.
        """
        n_times = self.signal.n_times
        longest = max(segment.stop - segment.start for segment in self.segments)
        window_starts(longest, n_times, hop)  # refuses what there is no window of
        return np.concatenate([np.arange(s.start, s.stop - n_times + 1, hop) for s in self.segments])

    def place_windows(self, onsets: NDArray[np.float64], start: float) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Place windows after events, see `sjepa_deploy.eeg.events`.

        Parameters
        ----------
        onsets : ndarray, shape (n_events,)
            When the events were, in seconds of the recording's own time.
        start : float
            Start of a window in seconds after its event; may be negative.

        Returns
        -------
        starts : ndarray of int, shape (n_events,)
            The first sample of each window of the fitted samples.
        whole : ndarray of bool, shape (n_events,)
            Whether event and window lie in one segment.
        """
        n_times, rate = self.signal.n_times, self.source_sfreq
        first = np.array([segment.onset for segment in self.segments]) - 0.5 / rate
        which = np.searchsorted(first, onsets, side="right") - 1
        begin, stop, onset = (np.array([getattr(s, name) for s in self.segments])[which] for name in ("start", "stop", "onset"))
        samples = nearest_sample(onsets - onset, rate)
        starts = begin + window_start(samples, rate, start=start, sfreq_model=self.sfreq)
        whole = (which >= 0) & (begin + samples * (self.sfreq / rate) < stop) & (starts >= begin) & (starts + n_times <= stop)
        return starts, whole

    def settling(self, starts: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return which windows begin at fitted samples in which the steps settle."""
        which = np.searchsorted([segment.start for segment in self.segments], starts, side="right") - 1
        begin = np.array([segment.start for segment in self.segments])[which]
        return np.asarray(starts - begin < self.n_settling)

    def times(self, samples: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the times at which fitted samples were taken, in seconds of the recording's own time."""
        which = np.searchsorted([segment.start for segment in self.segments], samples, side="right") - 1
        start = np.array([segment.start for segment in self.segments])[which]
        onset = np.array([segment.onset for segment in self.segments])[which]
        seconds: NDArray[np.float64] = onset + (samples - start) / self.sfreq
        return seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedRecording(Fitted):
    """Holds a recording as a model expects it.

    Attributes
    ----------
    data : ndarray of float32, shape (n_chans, n_samples)
        Contiguous samples in the unit and the channel order of the model, one segment after the other.
    """

    data: NDArray[np.float32]

    def cut(self, starts: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the windows that begin at samples of `data`, with all steps, shape (n_windows, n_chans, n_times)."""
        n_times = self.signal.n_times
        if not len(starts):
            return np.empty((0, *self.signal.input_shape), np.float32)
        cut = np.stack([self.data[:, start : start + n_times] for start in starts])
        return finish_windows(self.signal, cut)

    def windows(self, hop: int) -> list[NDArray[np.float32]]:
        """Return the windows of each segment that has one, see `windows`, the function.

        They are a read-only view where the signal has no steps on windows.
        """
        n_times = self.signal.n_times
        pieces = [self.data[:, segment.start : segment.stop] for segment in self.segments]
        return [finish_windows(self.signal, windows(piece, n_times, hop)) for piece in pieces if piece.shape[1] >= n_times]


def window_starts(n_samples: int, n_times: int, hop: int) -> NDArray[np.intp]:
    """Return the first sample of every whole window, shape (n_windows,).

    Parameters
    ----------
    n_samples, n_times, hop : int
        Length of the recording, of a window, and from one window's start to the next one's, in samples.

    Raises
    ------
    InputError
        If `n_times` or `hop` is below 1, or there is not one whole window.
    """
    if n_times < 1 or hop < 1:
        raise InputError(f"Windows of {n_times} samples every {hop} samples are none.", "Use 1 sample or more for both.")
    if n_samples < n_times:
        raise InputError(f"{n_samples} samples hold no window of {n_times}.", "Give at least one window of samples.")
    return np.arange(0, n_samples - n_times + 1, hop)


def windows(data: NDArray[Any], n_times: int, hop: int) -> NDArray[Any]:
    """Return all whole windows of `data` as a read-only view, without a copy.

    Parameters
    ----------
    data : ndarray, shape (n_chans, n_samples)
        A recording.
    n_times, hop : int
        Length of a window, and from one window's start to the next one's, in samples.

    Returns
    -------
    windows : ndarray, shape (n_windows, n_chans, n_times)
        Window i starts at sample ``window_starts(n_samples, n_times, hop)[i]``.

    Raises
    ------
    InputError
        If `n_times` or `hop` is below 1, or there is not one whole window.
    """
    window_starts(data.shape[1], n_times, hop)  # refuses what a slice would take: a negative hop
    return sliding_window_view(data, n_times, axis=1)[:, ::hop].swapaxes(0, 1)
