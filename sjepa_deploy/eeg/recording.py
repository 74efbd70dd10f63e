"""Reads recordings of EEG, fits them to what a model expects, and cuts them into windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sjepa_deploy.eeg.montage import require_mne
from sjepa_deploy.eeg.names import find_channels, renamed
from sjepa_deploy.eeg.pauses import Segment, Told, segments_of, told
from sjepa_deploy.eeg.places import check_places, interpolated
from sjepa_deploy.eeg.quality import ROUNDING_V, flat_seconds
from sjepa_deploy.eeg.readers import read_edf, read_npy, read_with_mne, reading
from sjepa_deploy.eeg.reference import average_reference
from sjepa_deploy.eeg.resample import check_rate, resample
from sjepa_deploy.eeg.units import check_unit, volts_in
from sjepa_deploy.eeg.xdf import read_xdf
from sjepa_deploy.errors import InputError, RecordingError, TooShortError, listed
from sjepa_deploy.spec import ModelSpec, Unit

if TYPE_CHECKING:
    import mne
    from numpy.typing import NDArray

PLAUSIBLE_RMS = (1e-7, 1e-2)
"""Volts between which the RMS of EEG lies, from far below an amplifier's noise to far above a large artefact."""

UNIT_MEND = (
    "State the unit they are stored in with `--unit` (volts passed as microvolts?), or take them as they are with "
    "`--no-check-unit`."
)
"""Says what to do about amplitudes that no EEG has."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedRecording:
    """Holds a recording as a model expects it.

    Attributes
    ----------
    data : ndarray of float32, shape (n_chans, n_samples)
        Contiguous samples in the unit and the channel order of the model, one segment after the other.
    sfreq : float
        The model's sampling rate in Hz.
    segments : tuple of Segment
        The stretches of `data` that were recorded without a pause, in which windows lie.
    n_found : int
        Channels of the model that the recording has; the others are interpolated.
    steps : tuple of str
        Sentences that say what was done to the recording, in order.
    """

    data: NDArray[np.float32]
    sfreq: float
    segments: tuple[Segment, ...]
    n_found: int
    steps: tuple[str, ...]

    def window_starts(self, n_times: int, hop: int) -> NDArray[np.intp]:
        """Return the first sample of every whole window, shape (n_windows,): each segment starts with one.

        Raises
        ------
        InputError
            See `window_starts`, the function.
        """
        longest = max(segment.stop - segment.start for segment in self.segments)
        window_starts(longest, n_times, hop)  # refuses what there is no window of
        return np.concatenate([np.arange(s.start, s.stop - n_times + 1, hop) for s in self.segments])

    def windows(self, n_times: int, hop: int) -> list[NDArray[np.float32]]:
        """Return the windows of each segment that has one as a read-only view, see `windows`, the function."""
        pieces = [self.data[:, segment.start : segment.stop] for segment in self.segments]
        return [windows(piece, n_times, hop) for piece in pieces if piece.shape[1] >= n_times]

    def starts_after(self, onsets: NDArray[np.float64], delay: float, n_times: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Place windows after events.

        Parameters
        ----------
        onsets : ndarray, shape (n_events,)
            When the events were, in seconds of the recording's own time.
        delay : float
            Seconds from an event to the start of its window; may be negative.
        n_times : int
            Samples of a window.

        Returns
        -------
        starts : ndarray of int, shape (n_events,)
            The sample of `data` that is nearest to each start.
        whole : ndarray of bool, shape (n_events,)
            Whether event and window lie in one segment.
        """
        first = np.array([segment.onset for segment in self.segments]) - 0.5 / self.sfreq
        which = np.searchsorted(first, onsets, side="right") - 1
        start, stop, onset = (np.array([getattr(s, name) for s in self.segments])[which] for name in ("start", "stop", "onset"))
        at_event = start + (onsets - onset) * self.sfreq
        starts = np.rint(start + (onsets - onset + delay) * self.sfreq).astype(np.intp)
        whole = (which >= 0) & (at_event < stop) & (starts >= start) & (starts + n_times <= stop)
        return starts, whole

    def times(self, samples: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the times at which samples of `data` were taken, in seconds of the recording's own time."""
        which = np.searchsorted([segment.start for segment in self.segments], samples, side="right") - 1
        start = np.array([segment.start for segment in self.segments])[which]
        onset = np.array([segment.onset for segment in self.segments])[which]
        seconds: NDArray[np.float64] = onset + (samples - start) / self.sfreq
        return seconds


def read_recording(
    path: str | Path,
    *,
    sfreq: float | None = None,
    unit: Unit | None = None,
    ch_names: Sequence[str] | None = None,
    row_names: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> mne.io.BaseRaw:
    """Read the EEG channels of a recording.

    Parameters
    ----------
    path : str or Path
        EDF, BDF, BrainVision .vhdr, EEGLAB .set, FIF or what else `mne.io.read_raw` reads; XDF with one regular EEG
        stream, taken at its nominal rate, also a record of `sjepa-stream`; or .npy with an array of shape (n_chans, n_samples).
    sfreq : float or None
        Sampling rate in Hz. Needed for .npy; elsewhere it must be the file's own.
    unit : {"nV", "uV", "mV", "V"} or None
        Unit of the samples. Needed for .npy and for files that state none. A unit that the file states gives way to it, with a
        note.
    ch_names : sequence of str or None
        Names of the channels of .npy files and of XDF streams without labels. Other files carry names, and ignore these.
    row_names : sequence of str or None
        Names of the rows of a .npy file, where `ch_names` is None: as a rule the channels of the model.
    rename : mapping of str to str or None
        Channels that get other names, see `sjepa_deploy.eeg.names.parse_rename`.

    Returns
    -------
    raw : mne.io.BaseRaw
        The EEG channels, loaded, in volts. "EEG Fp1" of an EDF file is called "Fp1". Of an EDF file with several rates, the
        channels at the rate of most of them. ``raw.info["temp"]`` holds what reading has shown, see
        `sjepa_deploy.eeg.pauses.told`.

    Raises
    ------
    RecordingError
        If the file is missing, of an unknown format, truncated, damaged, without EEG, or contradicts `sfreq`; or if `sfreq`,
        `unit` or `ch_names` are needed and missing.
    MissingDependencyError
        If MNE, or pyxdf for an XDF file, is not installed.
    """
    require_mne()  # before anything else can go wrong
    path = Path(path)
    if not path.exists():
        raise RecordingError(f"There is no recording {path}.", "Check the path.")
    if unit is not None:
        check_unit(unit)
    suffix = path.suffix.lower()
    notes: list[str] = []
    with reading(path.name):
        if suffix == ".npy":
            raw = read_npy(path, sfreq, unit, ch_names or row_names)
        elif suffix == ".xdf":
            raw = read_xdf(path, unit, ch_names, notes)
        elif suffix in (".edf", ".bdf"):
            raw = read_edf(path, unit, notes)
        else:
            raw = read_with_mne(path, unit, notes)
    if sfreq is not None and not math.isclose(sfreq, raw.info["sfreq"], rel_tol=1e-6):
        raise RecordingError(f"{path.name} is sampled at {raw.info['sfreq']:g} Hz, not {sfreq:g} Hz.", "Leave out `--sfreq`.")
    if rename:
        names = renamed(raw.ch_names, rename, RecordingError)
        raw.rename_channels(dict(zip(raw.ch_names, names, strict=True)))
    raw.info["temp"] = Told(notes=tuple(notes), paused=told(raw).paused)
    return raw


def fit_recording(raw: mne.io.BaseRaw, spec: ModelSpec, *, interpolate: float = 0.0, check_unit: bool = True) -> FittedRecording:
    """Bring a recording to the channels, band, rate, reference and unit of a model.

    In this order: channels by name (see `sjepa_deploy.eeg.names.find_channels`; channels marked bad count as missing), zero-phase
    FIR band-pass, resampling, average reference, unit. The spec decides which of the last four happen. Each stretch without a
    pause is filtered and resampled by itself; those that are shorter than a window or than the band-pass are left out.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording in volts, as `read_recording` returns it. The recording is left as it is.
    spec : ModelSpec
        The model.
    interpolate : float
        Largest share of the model's channels, 0 to 1, that is made by spherical splines (Perrin et al. 1989) from all good EEG
        channels. The recording's positions and the model's are each taken about the centre of their best sphere, since montages
        come in frames whose origins lie centimetres apart. The tilt of these frames (up to 6 degrees between MNE's templates and
        its head frame) remains. A recording without positions takes those of the 10-05 system, or of its net, by name.
    check_unit : bool
        Whether amplitudes that no EEG has are refused.

    Raises
    ------
    RecordingError
        If the recording lacks more channels of the model than `interpolate` allows; has other electrodes under the model's names;
        is slower than the model; has no stretch of one window, or of the length of the band-pass; holds samples of these channels
        that are not finite; or is in another unit by the looks of it, see `check_amplitude`.
        `TooShortError` where the band-pass is longer.
    """
    check_rate(raw.info["sfreq"], spec.sfreq)
    steps: list[str] = list(told(raw).notes)
    segments = _long_enough(raw, spec, steps)
    volts, n_found = _fit_channels(raw, spec, interpolate, steps)
    pieces, fitted, start = [], [], 0
    for segment in segments:
        piece = volts[:, segment.start : segment.stop]
        pieces.append(resample(_band_passed(piece, raw.info["sfreq"], spec), raw.info["sfreq"], spec.sfreq))
        stop = start + pieces[-1].shape[1]
        fitted.append(Segment(start=start, stop=stop, onset=segment.onset))
        start = stop
    steps += _told_of(spec, raw.info["sfreq"])
    volts = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
    if spec.preprocessing.reference == "average":
        if spec.n_chans == 1:
            raise RecordingError(
                "Nothing is left of one channel that is referenced to the average of one.",
                "Set the reference to none (`--reference none`, in a configuration data.preprocessing), or use more channels.",
            )
        volts = average_reference(volts, axis=0)
        steps.append(f"re-referenced to the average of {spec.n_chans} channels")
    if check_unit:
        check_amplitude(volts, spec.sfreq, UNIT_MEND)
    flat = flat_seconds(volts, spec.sfreq)
    if flat.any():
        steps.append(f"is flat in {flat.sum()} of its {len(flat)} seconds, the first of them number {flat.argmax()}")
    data = np.ascontiguousarray(volts / volts_in(spec.unit), dtype=np.float32)
    steps.append(f"scaled to {spec.unit}")
    return FittedRecording(data=data, sfreq=spec.sfreq, segments=tuple(fitted), n_found=n_found, steps=tuple(steps))


def check_amplitude(samples: NDArray[np.floating[Any]], sfreq: float, mend: str, *, unit: Unit = "V") -> None:
    """Refuse an amplitude that no EEG has.

    Parameters
    ----------
    samples : ndarray, shape (n_chans, n_samples) or (n_windows, n_chans, n_samples)
        A recording, or windows.
    sfreq : float
        Rate in Hz, to tell where.
    unit : {"nV", "uV", "mV", "V"}
        Their unit.
    mend : str
        What to do about it.

    Raises
    ------
    RecordingError
        If the median over channels and windows of the RMS about the mean lies outside `PLAUSIBLE_RMS`, or is none.
    """
    rms = float(np.median(samples.std(axis=-1))) * volts_in(unit)
    if not math.isfinite(rms) or PLAUSIBLE_RMS[0] <= rms <= PLAUSIBLE_RMS[1]:
        return
    n = max(1, round(sfreq)) if samples.ndim == 2 else samples.shape[2]
    pieces = windows(samples, n, n) if samples.ndim == 2 and samples.shape[1] >= n else samples.reshape(-1, *samples.shape[-2:])
    each = np.median(pieces.std(axis=2), axis=1) * volts_in(unit)
    out = np.flatnonzero((each < PLAUSIBLE_RMS[0]) | (each > PLAUSIBLE_RMS[1]))
    what = "seconds" if samples.ndim == 2 else "windows"
    where = f" ({len(out)} of its {len(each)} {what}, the first of them number {out[0]})" if 0 < len(out) < len(each) else ""
    if rms < ROUNDING_V:
        raise RecordingError(f"The median channel is flat{where}.", "Choose channels, or a recording, that carry EEG.")
    raise RecordingError(
        f"The median channel has an RMS of {rms * 1e6:.3g} uV{where}, which is no EEG: the samples look like another unit's.",
        mend,
    )


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


def _long_enough(raw: mne.io.BaseRaw, spec: ModelSpec, steps: list[str]) -> list[Segment]:
    """Return the stretches without a pause that hold a window and the filter."""
    sfreq = raw.info["sfreq"]
    segments = segments_of(raw)
    length, filter_s = spec.n_times / spec.sfreq, _filter_seconds(sfreq, spec)
    kept = [s for s in segments if (s.stop - s.start) / sfreq >= max(length, filter_s) - 1e-9]
    if not kept:
        longest = max((s.stop - s.start for s in segments), default=0) / sfreq
        what = "recording lasts" if len(segments) < 2 else f"longest of {len(segments)} stretches between pauses lasts"
        if longest < length - 1e-9:
            raise RecordingError(f"The {what} {longest:g} s, one window of the model {length:g} s.", "Give a longer recording.")
        raise TooShortError(
            f"The filter for {_band(spec)} lasts {filter_s:.3g} s, the {what.removesuffix(' lasts')} {longest:.3g} s.",
            "Give a longer recording.",
        )
    if len(segments) > 1:
        steps.append(f"cut at {len(segments) - 1} pauses, over which no window reaches")
    if short := len(segments) - len(kept):
        seconds = sum(s.stop - s.start for s in segments) - sum(s.stop - s.start for s in kept)
        steps.append(f"left out {short} stretches between pauses ({seconds / sfreq:.3g} s), shorter than a window or the filter")
    return kept


def _fit_channels(raw: mne.io.BaseRaw, spec: ModelSpec, interpolate: float, steps: list[str]) -> tuple[NDArray[np.float64], int]:
    """Return the channels of the model in volts, and how many of them the recording has."""
    if spec.ch_names is None:
        raise RecordingError(
            "The model has no channel names, so the recording's montage cannot be checked against it.",
            "Export the bundle with `--montage` or `--channels`.",
        )
    good = [name for name in raw.ch_names if name not in raw.info["bads"]]
    match = find_channels(spec.ch_names, good)
    found = {mine: good[i] for mine, i in zip(spec.ch_names, match.columns, strict=True) if i is not None}
    missing = [name for name in spec.ch_names if name not in found]
    for name, several in match.doubtful:
        if len({one.casefold() for one in several}) == 1:
            raise RecordingError(
                f"The recording's channels {listed(several)} differ in case only.", "Rename or drop one of them."
            )
        steps.append(f"took none of {listed(several)} as {name}: it could be each of them")
    there = f"it has {listed(raw.ch_names, 64)}"
    doubts = "".join(f"; {name} could be each of {listed(several)}" for name, several in match.doubtful)
    notes = "".join(f"; {note}" for note in told(raw).notes)
    if missing and not interpolate:
        raise RecordingError(
            f"The recording lacks, or marks as bad, {len(missing)} of the model's {spec.n_chans} channels: {listed(missing)}; "
            f"{there}{doubts}{notes}.",
            "Record with the model's montage, give channels the model's names with `--rename THEIRS=MINE`, or make them from the "
            "others with `--interpolate`.",
        )
    if len(missing) > interpolate * spec.n_chans + 1e-9:
        share = math.ceil(100 * len(missing) / spec.n_chans) / 100
        raise RecordingError(
            f"{len(missing)} of the model's {spec.n_chans} channels would be interpolated, more than a share of {interpolate:g}; "
            f"{there}{doubts}{notes}.",
            f"Use a model of the recording's channels, `--rename`, or `--interpolate {share:g}` to take such EEG all the same.",
        )
    check_places(raw, spec, found)
    if match.aliases:
        steps.append(f"took {listed(f'{theirs} as {mine}' for theirs, mine in match.aliases)}")
    if not missing:
        if unused := [name for name in good if name not in found.values()]:
            steps.append(f"left out {len(unused)} channels: {listed(unused)}")
        volts = raw.get_data(picks=list(found.values()))
    else:
        volts = interpolated(raw, spec, steps)
        if found:
            volts[[i for i, name in enumerate(spec.ch_names) if name in found]] = raw.get_data(picks=list(found.values()))
        steps.append(f"interpolated {len(missing)} of {spec.n_chans} channels: {listed(missing)}")
    finite = np.isfinite(volts).all(axis=1)
    if not finite.all():
        broken = [name for name, ok in zip(spec.ch_names, finite, strict=True) if not ok]
        raise RecordingError(
            f"The recording holds samples that are not finite (NaN or infinite) in {listed(broken)}.",
            "Cut these stretches out, or mark these channels as bad.",
        )
    return volts, len(found)


def _band(spec: ModelSpec) -> str:
    low, high = spec.preprocessing.l_freq, spec.preprocessing.h_freq
    return f"{low or 0:g} Hz up" if high is None else f"{low or 0:g} to {high:g} Hz"


def _filter_seconds(sfreq: float, spec: ModelSpec) -> float:
    """Return the length of the band-pass in seconds; a shorter recording would hold only the filter's edges."""
    low, high = spec.preprocessing.l_freq, spec.preprocessing.h_freq
    if low is None and high is None:
        return 0.0
    return len(require_mne().filter.create_filter(None, sfreq, low, high, phase="zero", verbose="error")) / sfreq


def _band_passed(volts: NDArray[np.float64], sfreq: float, spec: ModelSpec) -> NDArray[np.float64]:
    """Return `volts` in the band, zero-phase. The upper edge is below its Nyquist frequency, because it is below the model's."""
    low, high = spec.preprocessing.l_freq, spec.preprocessing.h_freq
    if low is None and high is None:
        return volts
    filtered: NDArray[np.float64] = require_mne().filter.filter_data(volts, sfreq, low, high, phase="zero", verbose="error")
    return filtered


def _told_of(spec: ModelSpec, sfreq: float) -> list[str]:
    """Return sentences that say what filtering and resampling do."""
    told_of = []
    if spec.preprocessing.l_freq is not None or spec.preprocessing.h_freq is not None:
        told_of.append(f"band-passed {_band(spec)}, zero-phase FIR")
    if not math.isclose(sfreq, spec.sfreq):
        told_of.append(f"resampled from {sfreq:g} to {spec.sfreq:g} Hz")
    return told_of
