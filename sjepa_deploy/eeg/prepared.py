"""Makes the windows of a signal from recordings, for training with braindecode, skorch, MOABB or plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.epochs import windows_of_epochs
from sjepa_deploy.eeg.events import ALL, Events, events_of
from sjepa_deploy.eeg.montage import require_mne
from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.spec import SignalSpec

if TYPE_CHECKING:
    import mne


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Holds windows as a model takes them.

    Attributes
    ----------
    eeg : ndarray of float32, shape (n_windows, n_chans, n_times)
        The windows after all steps, in the order of the events.
    events : Events or None
        The event of each window; None where windows follow each other.
    times : ndarray of float64, shape (n_windows,)
        Start of each window in seconds of the recording's own time.
    settling : ndarray of bool, shape (n_windows,)
        Windows that begin where causal steps still settle.
    signal : SignalSpec
        The signal. A model that learns from these windows keeps this for its export (``sjepa-export --signal``).
    steps : tuple of str
        Sentences that say what was done, in order.
    """

    eeg: NDArray[np.float32]
    events: Events | None
    times: NDArray[np.float64]
    settling: NDArray[np.bool_]
    signal: SignalSpec
    steps: tuple[str, ...]

    def to_epochs(self) -> mne.EpochsArray:
        """Return the windows as MNE Epochs. The values are those of `eeg`, so in volts only where the signal's unit is "V"."""
        mne = require_mne()
        signal, n = self.signal, len(self.eeg)
        names = list(signal.ch_names or map(str, range(signal.n_chans)))
        info = mne.create_info(names, signal.sfreq, "eeg")
        if signal.ch_names is not None and signal.positions is not None:
            places = dict(zip(signal.ch_names, map(np.array, signal.positions), strict=True))
            info.set_montage(mne.channels.make_dig_montage(places, coord_frame="head"))
        described = ("window",) * n if self.events is None else self.events.description
        ids = {name: i + 1 for i, name in enumerate(sorted(set(described)))}
        events = np.column_stack([np.arange(n), np.zeros(n, int), [ids[name] for name in described]])
        tmin = 0.0 if signal.event_window is None else signal.event_window.start
        return mne.EpochsArray(self.eeg.astype(np.float64), info, events, tmin=tmin, event_id=ids, verbose="error")


def prepare(
    data: mne.io.BaseRaw | mne.BaseEpochs,
    signal: SignalSpec,
    *,
    events: Sequence[str] | Events | None = None,
    hop: float | None = None,
    interpolate: float = 0.0,
    check_unit: bool = True,
) -> Prepared:
    """Make the windows that a model of `signal` learns from: with the very code that decodes recordings and streams.

    Parameters
    ----------
    data : mne.io.BaseRaw or mne.BaseEpochs
        A recording in volts, as MNE's readers and `sjepa_deploy.eeg.recording.read_recording` return it. Epochs were filtered
        before they were cut: they only go through the steps that have no memory.
    signal : SignalSpec
        The signal. Its phase says whether the steps are causal, as live, or zero-phase.
    events : sequence of str, Events or None
        Descriptions of the events whose windows are made, or the events themselves. None takes those of the signal's event
        window, or all events where it names none.
    hop : float or None
        Seconds from one window to the next, of a recording whose windows belong to no events; None are windows that adjoin.
    interpolate, check_unit
        See `sjepa_deploy.eeg.recording.fit_recording`.

    Raises
    ------
    RecordingError
        If the recording does not fit the signal, or has no such events or no whole window of them.
    """
    if not hasattr(data, "annotations") or not hasattr(data, "first_samp"):
        return _of_epochs(data, signal, events, check_unit)
    fitted = fit_recording(data, signal, interpolate=interpolate, check_unit=check_unit)
    found: Events | None = None
    if signal.event_window is None and events is None:
        starts = fitted.window_starts(signal.n_times if hop is None else max(1, round(hop * signal.sfreq)))
    else:
        if signal.event_window is None:
            raise RecordingError(
                "The signal does not say where its windows lie after events.", "Give it an `event_window=EventWindow(start=...)`."
            )
        found = events if isinstance(events, Events) else events_of(data).named(_names(events, signal))
        starts, whole = fitted.place_windows(found.onset, signal.event_window.start)
        if not whole.any():
            raise RecordingError("No event has a whole window in the recording.", "Use other events, or a shorter window.")
        starts, found = starts[whole], found[whole]
    return Prepared(
        eeg=fitted.cut(starts),
        events=found,
        times=fitted.times(starts),
        settling=fitted.settling(starts),
        signal=signal,
        steps=fitted.steps,
    )


def _of_epochs(epochs: Any, signal: SignalSpec, events: Sequence[str] | Events | None, check_unit: bool) -> Prepared:
    start = epochs.tmin if signal.event_window is None else signal.event_window.start
    cut = windows_of_epochs(epochs, signal, start, "The Epochs", check_unit=check_unit)
    assert cut.events is not None
    rows = np.arange(len(cut.eeg))
    if isinstance(events, Events):
        raise RecordingError("Epochs have events of their own.", "Name them, or give the recording.")
    if events is not None:
        kept = cut.events.named(tuple(events)).description
        rows = np.flatnonzero([name in kept for name in cut.events.description])
    return Prepared(
        eeg=cut.eeg[rows],
        events=cut.events[rows],
        times=cut.events.onset[rows] + start,
        settling=np.zeros(len(rows), np.bool_),
        signal=signal,
        steps=cut.steps,
    )


def _names(events: Sequence[str] | None, signal: SignalSpec) -> tuple[str, ...]:
    assert signal.event_window is not None
    return tuple(events or signal.event_window.events or (ALL,))
