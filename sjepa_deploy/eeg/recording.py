"""Reads recordings of EEG and fits them to a signal; `sjepa_deploy.eeg.windows` cuts them into windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sjepa_deploy.eeg.chain import flows_of, zero_phase
from sjepa_deploy.eeg.conditioning import Conditioner
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.montage import require_mne
from sjepa_deploy.eeg.names import find_channels, renamed, says_other_than_eeg
from sjepa_deploy.eeg.pauses import Segment, Told, segments_of, told
from sjepa_deploy.eeg.places import check_places, interpolation_of
from sjepa_deploy.eeg.quality import ROUNDING_V, flat_seconds
from sjepa_deploy.eeg.readers import read_edf, read_npy, read_with_mne, reading
from sjepa_deploy.eeg.steps import BandPass, Flow, Phase
from sjepa_deploy.eeg.steps.filters import Filter
from sjepa_deploy.eeg.steps.rate import check_rate
from sjepa_deploy.eeg.units import PLAUSIBLE_RMS, check_unit, volts_in
from sjepa_deploy.eeg.windows import FittedRecording, windows
from sjepa_deploy.eeg.xdf import read_xdf
from sjepa_deploy.errors import RecordingError, StreamError, TooShortError, listed
from sjepa_deploy.spec import SignalSpec, Unit

if TYPE_CHECKING:
    import mne
    from numpy.typing import NDArray

UNIT_MEND = (
    "State the unit they are stored in with `--unit` (volts passed as microvolts?), or take them as they are with "
    "`--no-check-unit`."
)
"""Says what to do about amplitudes that no EEG has."""


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


def fit_recording(
    raw: mne.io.BaseRaw, signal: SignalSpec, *, interpolate: float = 0.0, check_unit: bool = True, phase: Phase | None = None
) -> FittedRecording:
    """Take a recording through the steps of a signal.

    In the causal phase the samples go through the very code that runs live (`sjepa_deploy.eeg.conditioning`), and each stretch
    without a pause starts anew. In zero phase each stretch goes through the zero-phase forms; stretches that are shorter than the
    band-pass are left out. Stretches that are shorter than a window are always left out. Channels are taken by name (see
    `sjepa_deploy.eeg.names.find_channels`); channels marked bad count as missing.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording in volts, as `read_recording` returns it. The recording is left as it is.
    signal : SignalSpec
        The signal of the model.
    interpolate : float
        Largest share of the model's channels, 0 to 1, that is made by spherical splines (Perrin et al. 1989). In the causal phase
        from the model's other channels, as live. In zero phase from all good EEG channels: the recording's positions and the
        model's are each taken about the centre of their best sphere, since montages come in frames whose origins lie centimetres
        apart. The tilt of these frames (up to 6 degrees between MNE's templates and its head frame) remains. A recording without
        positions takes those of the 10-05 system, or of its net, by name.
    check_unit : bool
        Whether amplitudes that no EEG has are refused.
    phase : {"causal", "zero-phase"} or None
        Form of the steps; None is the signal's.

    Raises
    ------
    RecordingError
        If the recording lacks more channels of the model than `interpolate` allows; has other electrodes under the model's names;
        is slower than the model; has no stretch of one window, or of the length of the band-pass; holds samples of these channels
        that are not finite; is in another unit by the looks of it, see `check_amplitude`; or does not suit a step.
        `TooShortError` where the band-pass is longer.
    """
    check_rate(raw.info["sfreq"], signal.sfreq)
    phase = phase or signal.phase
    steps: list[str] = list(told(raw).notes)
    segments = _long_enough(raw, signal, phase, steps)
    source = _match_channels(raw, signal, interpolate, steps)
    flat = flat_seconds(raw.get_data(picks=list(source.picks)), raw.info["sfreq"])
    if flat.any():
        steps.append(f"is flat in {flat.sum()} of its {len(flat)} seconds, the first of them number {flat.argmax()}")
    make = _causal if phase == "causal" else _zero_phase
    pieces, n_settling = make(raw, signal, source, segments, check_unit, interpolate, steps)
    fitted, start = [], 0
    for segment, piece in zip(segments, pieces, strict=True):
        stop = start + piece.shape[1]
        fitted.append(Segment(start=start, stop=stop, onset=segment.onset))
        start = stop
    flow = Flow(ch_names=source.names, sfreq=raw.info["sfreq"], goal=signal.goal)
    for step, at in zip(signal.steps, flows_of(signal, flow), strict=True):
        if phrase := step.told(at):
            form = {"causal": ", causal", "zero-phase": ", zero-phase FIR"}[phase] if isinstance(step, Filter) else ""
            steps.append(f"{phrase}{form}")
    steps.append(f"scaled to {signal.unit}")
    data = np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1), dtype=np.float32)
    return FittedRecording(
        data=data,
        signal=signal,
        segments=tuple(fitted),
        source_sfreq=float(raw.info["sfreq"]),
        n_found=source.n_found,
        n_settling=n_settling,
        steps=tuple(steps),
    )


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
        If all channels are flat, or the median over windows, or seconds, of the RMS about the mean of the median channel that is
        not flat lies outside `PLAUSIBLE_RMS`.
    """
    n = max(1, round(sfreq)) if samples.ndim == 2 else samples.shape[2]
    pieces = windows(samples, n, n) if samples.ndim == 2 and samples.shape[1] >= n else samples.reshape(-1, *samples.shape[-2:])
    spread = pieces.std(axis=2) * volts_in(unit)
    carrying = (spread > ROUNDING_V) & np.isfinite(spread)
    if not carrying.any():
        raise RecordingError("All channels are flat.", "Choose channels, or a recording, that carry EEG.")
    each = np.array([np.median(row[mask]) for row, mask in zip(spread, carrying, strict=True) if mask.any()])
    rms = float(np.median(each))
    if PLAUSIBLE_RMS[0] <= rms <= PLAUSIBLE_RMS[1]:
        return
    out = np.flatnonzero((each < PLAUSIBLE_RMS[0]) | (each > PLAUSIBLE_RMS[1]))
    what = "seconds" if samples.ndim == 2 else "windows"
    where = f" ({len(out)} of its {len(each)} {what}, the first of them number {out[0]})" if 0 < len(out) < len(each) else ""
    raise RecordingError(
        f"The median channel has an RMS of {rms * 1e6:.3g} uV{where}, which is no EEG: the samples look like another unit's.",
        mend,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Source:
    """Holds which channels of a recording are used.

    Attributes
    ----------
    picks, names : tuple of str
        The channels, and their names as the model writes them.
    matrix : ndarray, shape (n_chans of the model, len(picks))
        The model's channels from these, in zero phase.
    n_found : int
        Channels of the model that are among them.
    """

    picks: tuple[str, ...]
    names: tuple[str, ...]
    matrix: NDArray[np.float64]
    n_found: int


def _zero_phase(
    raw: mne.io.BaseRaw,
    signal: SignalSpec,
    source: _Source,
    segments: Sequence[Segment],
    check_unit: bool,
    interpolate: float,
    steps: list[str],
) -> tuple[list[NDArray[np.float64]], int]:
    data = raw.get_data(picks=list(source.picks))
    if check_unit:
        check_amplitude(data, raw.info["sfreq"], UNIT_MEND)
    data /= volts_in(signal.unit)
    flow = Flow(ch_names=source.names, sfreq=raw.info["sfreq"], goal=signal.goal)
    single = ((source.matrix != 0).sum(axis=1) == 1) & (source.matrix.max(axis=1) == 1.0)

    def fit_channels(data: NDArray[np.float64], at: Flow) -> NDArray[np.float64]:
        fitted: NDArray[np.float64] = data[source.matrix.argmax(axis=1)]
        fitted[~single] = source.matrix[~single] @ data
        return fitted

    return [zero_phase(signal, data[:, s.start : s.stop], flow, fit_channels) for s in segments], 0


def _causal(
    raw: mne.io.BaseRaw,
    signal: SignalSpec,
    source: _Source,
    segments: Sequence[Segment],
    check_unit: bool,
    interpolate: float,
    steps: list[str],
) -> tuple[list[NDArray[np.float64]], int]:
    info = StreamInfo(name="The recording", ch_names=tuple(raw.ch_names), sfreq=raw.info["sfreq"], unit="V")
    reports: list[str] = []
    pieces: list[NDArray[np.float64]] = []
    try:
        conditioner = Conditioner(
            signal, info, interpolate=interpolate, bads=raw.info["bads"], check_unit=check_unit, report=reports.append
        )
        for segment in segments:
            conditioner.restart()
            samples = conditioner.pick(np.ascontiguousarray(raw.get_data(start=segment.start, stop=segment.stop).T))
            made, done = [], 0
            while done < len(samples):
                out, _, n_taken = conditioner.take(samples[done:])
                conditioner.judge()
                made.append(out)
                done += n_taken
            pieces.append(np.concatenate(made).T)
    except StreamError as e:
        raise RecordingError(e.problem, e.mend) from e
    steps += dict.fromkeys(reports[:20])
    if len(reports) > 20:
        steps.append(f"{len(reports) - 20} more changes of channels")
    return pieces, conditioner.n_settling


def _long_enough(raw: mne.io.BaseRaw, signal: SignalSpec, phase: Phase, steps: list[str]) -> list[Segment]:
    """Return the stretches without a pause that hold a window and, in zero phase, the filter."""
    sfreq = raw.info["sfreq"]
    segments = segments_of(raw)
    bands = [step for step in signal.steps if isinstance(step, BandPass)] if phase == "zero-phase" else []
    filter_s, band = max(((step.length(sfreq), step.band) for step in bands), default=(0.0, ""))
    length = signal.seconds
    kept = [s for s in segments if (s.stop - s.start) / sfreq >= max(length, filter_s) - 1e-9]
    if not kept:
        longest = max((s.stop - s.start for s in segments), default=0) / sfreq
        what = "recording lasts" if len(segments) < 2 else f"longest of {len(segments)} stretches between pauses lasts"
        if longest < length - 1e-9:
            raise RecordingError(f"The {what} {longest:g} s, one window of the model {length:g} s.", "Give a longer recording.")
        raise TooShortError(
            f"The filter for {band} lasts {filter_s:.3g} s, the {what.removesuffix(' lasts')} {longest:.3g} s.",
            "Give a longer recording.",
        )
    if len(segments) > 1:
        steps.append(f"cut at {len(segments) - 1} pauses, over which no window reaches")
    if short := len(segments) - len(kept):
        seconds = sum(s.stop - s.start for s in segments) - sum(s.stop - s.start for s in kept)
        steps.append(f"left out {short} stretches between pauses ({seconds / sfreq:.3g} s), shorter than a window or the filter")
    return kept


def _match_channels(raw: mne.io.BaseRaw, signal: SignalSpec, interpolate: float, steps: list[str]) -> _Source:
    """Return which channels of a recording make the model's."""
    if signal.ch_names is None:
        raise RecordingError(
            "The model has no channel names, so the recording's montage cannot be checked against it.",
            "Export the bundle with `--montage` or `--channels`.",
        )
    good = [name for name in raw.ch_names if name not in raw.info["bads"]]
    match = find_channels(signal.ch_names, good)
    found = {mine: good[i] for mine, i in zip(signal.ch_names, match.columns, strict=True) if i is not None}
    missing = [name for name in signal.ch_names if name not in found]
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
            f"The recording lacks, or marks as bad, {len(missing)} of the model's {signal.n_chans} channels: {listed(missing)}; "
            f"{there}{doubts}{notes}.",
            "Record with the model's montage, give channels the model's names with `--rename THEIRS=MINE`, or make them from the "
            "others with `--interpolate`.",
        )
    if len(missing) > interpolate * signal.n_chans + 1e-9:
        share = math.ceil(100 * len(missing) / signal.n_chans) / 100
        raise RecordingError(
            f"{len(missing)} of {signal.n_chans} channels of the model would be interpolated, more than {interpolate:g}; "
            f"{there}{doubts}{notes}.",
            f"Use a model of the recording's channels, `--rename`, or `--interpolate {share:g}` to take such EEG all the same.",
        )
    check_places(raw, signal, found)
    if match.aliases:
        steps.append(f"took {listed(f'{theirs} as {mine}' for theirs, mine in match.aliases)}")
    theirs = {name: mine for mine, name in found.items()}
    picks = [name for name in good if name in theirs or signal.uses(name, says_other_than_eeg(name))]
    if not missing:
        if unused := [name for name in good if name not in picks]:
            steps.append(f"left out {len(unused)} channels: {listed(unused)}")
        matrix = np.zeros((signal.n_chans, len(picks)))
    else:
        sources, weights = interpolation_of(raw, signal, steps)
        picks += [name for name in sources if name not in picks]
        matrix = np.zeros((signal.n_chans, len(picks)))
        matrix[:, [picks.index(name) for name in sources]] = weights
        steps.append(f"interpolated {len(missing)} of {signal.n_chans} channels: {listed(missing)}")
    for row, mine in enumerate(signal.ch_names):
        if mine in found:
            matrix[row] = 0.0
            matrix[row, picks.index(found[mine])] = 1.0
    finite = np.isfinite(raw.get_data(picks=picks)).all(axis=1)
    if not finite.all():
        broken = [theirs.get(name, name) for name, ok in zip(picks, finite, strict=True) if not ok]
        raise RecordingError(
            f"The recording holds samples that are not finite (NaN or infinite) in {listed(broken)}.",
            "Cut these stretches out, or mark these channels as bad.",
        )
    names = tuple(theirs.get(name, name) for name in picks)
    return _Source(picks=tuple(picks), names=names, matrix=matrix, n_found=len(found))
