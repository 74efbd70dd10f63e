"""Reads windows that were cut before: MNE Epochs, and arrays of windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.amplitudes import UNIT_MEND, check_amplitude
from sjepa_deploy.eeg.chain import apply_to_cut
from sjepa_deploy.eeg.events import Events
from sjepa_deploy.eeg.montage import require_mne
from sjepa_deploy.eeg.names import find_channels
from sjepa_deploy.eeg.readers import heard, reading
from sjepa_deploy.eeg.steps.rate import check_rate, resample
from sjepa_deploy.eeg.units import check_unit as refuse_unknown
from sjepa_deploy.eeg.units import volts_in
from sjepa_deploy.errors import RecordingError, listed
from sjepa_deploy.spec import SignalSpec, Unit

if TYPE_CHECKING:
    import mne

EPOCHS = ("-epo.fif", "_epo.fif", "-epo.fif.gz", "_epo.fif.gz")
"""Files of MNE's Epochs have names that end in these."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CutWindows:
    """Holds windows as a model expects them.

    Attributes
    ----------
    eeg : ndarray of float32, shape (n_windows, n_chans, n_times)
        In the unit and the channel order of the model.
    times : ndarray of float64, shape (n_windows,)
        The last sample of each in seconds after the first window's event, or where no event is known, number of the window.
    steps : tuple of str
        Sentences that say what was done to the windows.
    events : Events or None
        The event of each window, where Epochs tell.
    """

    eeg: NDArray[np.float32]
    times: NDArray[np.float64]
    steps: tuple[str, ...]
    events: Events | None = None


def holds_windows(path: Path) -> bool:
    """Return whether a file holds windows: Epochs, or an array of three axes."""
    if path.name.endswith(EPOCHS):
        return True
    if path.suffix.lower() != ".npy" or not path.is_file():
        return False
    with reading(path.name), path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return len(read(file)[0]) == 3


def epochs_at(
    epochs: mne.BaseEpochs, ch_names: Sequence[str], sfreq: float, tmin: float, n_times: int, name: str
) -> NDArray[np.float64]:
    """Return a window of every epoch in volts, shape (n_epochs, n_chans, n_times): `ch_names` from `tmin` on at `sfreq`.

    Raises
    ------
    RecordingError
        If channels are missing, the rate is lower, or the epochs do not hold the window.
    """
    good = [each for each in epochs.ch_names if each not in epochs.info["bads"]]
    columns = find_channels(ch_names, good).columns
    if missing := [mine for mine, column in zip(ch_names, columns, strict=True) if column is None]:
        raise RecordingError(
            f"{name} lacks, or marks as bad, the channels {listed(missing)}; it has {listed(good, 64)}.",
            "Choose channels that it has.",
        )
    check_rate(epochs.info["sfreq"], sfreq)
    volts = epochs.get_data(picks=[good[column] for column in columns if column is not None])
    rows = resample(volts.reshape(-1, volts.shape[2]), epochs.info["sfreq"], sfreq)
    volts = rows.reshape(*volts.shape[:2], -1)
    start = round((tmin - epochs.tmin) * sfreq)
    if start < 0 or start + n_times > volts.shape[2]:
        raise RecordingError(
            f"The epochs of {name} last from {epochs.tmin:g} to {epochs.tmax:g} s and hold no window of {n_times} samples from "
            f"{tmin:g} s.",
            "Use shorter windows, or epochs that hold them.",
        )
    window: NDArray[np.float64] = volts[:, :, start : start + n_times]
    return window


def read_windows(
    path: Path, signal: SignalSpec, *, unit: Unit | None = None, tmin: float | None = None, check_unit: bool = True
) -> CutWindows:
    """Read windows for a model. The windows were filtered before they were cut: nothing is filtered here.

    Parameters
    ----------
    path : Path
        See `holds_windows`. An array has the shape (n_windows, n_chans, n_times) and the rate and channels of the model.
    signal : SignalSpec
        The signal of the model.
    unit : {"nV", "uV", "mV", "V"} or None
        Unit of an array.
    tmin : float or None
        Start of the windows in seconds after their event; None is where the epochs begin.
    check_unit : bool
        Whether amplitudes that no EEG has are refused. They are judged before the steps.

    Raises
    ------
    RecordingError
        If they do not fit the model.
    """
    if path.suffix.lower() != ".npy":
        steps: list[str] = []
        with reading(path.name), heard(steps):
            epochs = require_mne().read_epochs(path, preload=True, verbose="warning").pick("eeg")
        cut = windows_of_epochs(epochs, signal, epochs.tmin if tmin is None else tmin, path.name, check_unit=check_unit)
        return replace(cut, steps=(*steps, *cut.steps))
    if unit is None:
        raise RecordingError(f"{path.name} is a bare array that does not state its unit.", "Give --unit.")
    refuse_unknown(unit)
    with reading(path.name), path.open("rb") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.shape[1:] != signal.input_shape or array.dtype.kind not in "fiu" or not len(array):
        raise RecordingError(
            f"{path.name} holds an array of shape {array.shape} and type {array.dtype}.",
            f"Save real numbers of shape (n_windows, {signal.n_chans}, {signal.n_times}), or (n_chans, n_samples).",
        )
    times = np.arange(len(array), dtype=np.float64)
    return _finished(array.astype(np.float64) * volts_in(unit), signal, times, None, path.name, check_unit)


def windows_of_epochs(
    epochs: mne.BaseEpochs, signal: SignalSpec, start: float, name: str, *, check_unit: bool = True
) -> CutWindows:
    """Return the window of every epoch that begins `start` seconds after its event, see `read_windows`."""
    if signal.ch_names is None:
        raise RecordingError("The model has no channel names.", "Export the bundle with `--montage` or `--channels`.")
    volts = epochs_at(epochs, signal.ch_names, signal.sfreq, start, signal.n_times, name)
    onset = (epochs.events[:, 0] - epochs.events[:1, 0]) / epochs.info["sfreq"]
    name_of = {number: each for each, number in epochs.event_id.items()}
    metadata = {} if epochs.metadata is None else {str(each): epochs.metadata[each] for each in epochs.metadata}
    events = Events(
        onset=onset,
        description=tuple(name_of[number] for number in epochs.events[:, 2]),
        columns={each: tuple(map(str, values)) for each, values in metadata.items()},
    )
    return _finished(volts, signal, onset + start + (signal.n_times - 1) / signal.sfreq, events, name, check_unit)


def _finished(
    volts: NDArray[np.float64], signal: SignalSpec, times: NDArray[np.float64], events: Events | None, name: str, check_unit: bool
) -> CutWindows:
    if not np.isfinite(volts).all():
        raise RecordingError(f"{name} holds samples that are not finite.", "Leave these windows out.")
    if check_unit:
        check_amplitude(volts, signal.sfreq, UNIT_MEND)
    steps = ["windows as they were cut and filtered", f"scaled to {signal.unit}"]
    eeg = apply_to_cut(signal, volts / volts_in(signal.unit), steps)
    return CutWindows(eeg=eeg, times=times, steps=tuple(steps), events=events)
