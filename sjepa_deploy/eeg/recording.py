"""EEG recordings: read from files, fitted to what a model expects, and cut into windows."""

from __future__ import annotations

import configparser
import contextlib
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sjepa_deploy.eeg.montage import fit_sphere, read_montage, require_mne
from sjepa_deploy.errors import InputError, MissingDependencyError, RecordingError, TooShortError, listed
from sjepa_deploy.spec import UNIT_NAMES, UNITS_IN_VOLTS, ModelSpec, Position, Unit

if TYPE_CHECKING:
    import mne
    from numpy.typing import NDArray

PLAUSIBLE_RMS = (1e-7, 1e-2)
"""Volts between which the RMS of EEG lies, from far below an amplifier's noise to far above a large artefact."""

# What the readers of MNE, SciPy and pyxdf were seen to raise on truncated and on garbage files.
_READER_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    SyntaxError,  # xml.etree's ParseError is one
    configparser.Error,
    struct.error,
    zlib.error,
)

_FORMATS = "EDF, BDF, BrainVision (.vhdr), EEGLAB (.set), FIF, XDF or .npy"


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedRecording:
    """A recording as a model expects it.

    Attributes
    ----------
    data : ndarray of float32, shape (n_chans, n_samples)
        Contiguous samples in the unit and the channel order of the model.
    sfreq : float
        The model's sampling rate in Hz.
    steps : tuple of str
        What was done to the recording, in order, for people to read.
    """

    data: NDArray[np.float32]
    sfreq: float
    steps: tuple[str, ...]


def read_recording(
    path: str | Path,
    *,
    sfreq: float | None = None,
    unit: Unit | None = None,
    ch_names: Sequence[str] | None = None,
) -> mne.io.BaseRaw:
    """Read the EEG channels of a recording.

    Parameters
    ----------
    path : str or Path
        EDF, BDF, BrainVision .vhdr, EEGLAB .set, FIF or what else `mne.io.read_raw` reads; XDF with one regular EEG
        stream without pauses of over a second, taken at its nominal rate; or .npy with an array of shape (n_chans, n_samples).
    sfreq : float or None
        Sampling rate in Hz. Needed for .npy; elsewhere it must be the file's own.
    unit : {"uV", "mV", "V"} or None
        Unit of the samples. Needed for .npy and for XDF streams that do not state one; other formats state theirs.
    ch_names : sequence of str or None
        Names of the channels of .npy files and of XDF streams without labels. Other files carry names, and ignore these.

    Returns
    -------
    raw : mne.io.BaseRaw
        The EEG channels, loaded, in volts. "EEG Fp1" of an EDF file is called "Fp1".

    Raises
    ------
    RecordingError
        If the file is missing, of an unknown format, truncated, damaged, without EEG, holds samples that are not finite,
        or contradicts `sfreq` or `unit`; or if these are needed and missing.
    MissingDependencyError
        If MNE, or pyxdf for an XDF file, is not installed.
    """
    require_mne()  # before anything else can go wrong
    path = Path(path)
    if not path.exists():
        raise RecordingError(f"There is no recording {path}.", "Check the path.")
    if unit is not None and unit not in UNITS_IN_VOLTS:
        raise RecordingError(f"{unit!r} is not a unit.", f"Use one of {', '.join(UNITS_IN_VOLTS)} with `--unit`.")
    suffix = path.suffix.lower()
    with reading(path.name):
        if suffix == ".npy":
            raw = _read_npy(path, sfreq, unit, ch_names)
        elif suffix == ".xdf":
            raw = _read_xdf(path, unit, ch_names)
        else:
            raw = _read_with_mne(path, unit)
    if sfreq is not None and not math.isclose(sfreq, raw.info["sfreq"], rel_tol=1e-6):
        raise RecordingError(f"{path.name} is sampled at {raw.info['sfreq']:g} Hz, not {sfreq:g} Hz.", "Leave out `--sfreq`.")
    finite = np.isfinite(raw.get_data()).all(axis=1)
    if not finite.all():
        broken = [name for name, ok in zip(raw.ch_names, finite, strict=True) if not ok]
        raise RecordingError(
            f"{path.name} holds samples that are not finite (NaN or infinite) in {listed(broken)}.",
            "Cut these stretches out, or drop these channels.",
        )
    return raw


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what readers raise on damaged files and on files of another kind into a `RecordingError`."""
    try:
        yield
    except (RecordingError, MissingDependencyError):
        raise
    except _READER_ERRORS as error:
        detail = " ".join(str(error).split()).rstrip(".")
        raise RecordingError(
            f"{name} cannot be read as a recording ({type(error).__name__}: {detail}).",
            f"Give a whole, undamaged file: {_FORMATS}.",
        ) from error


def fit_recording(raw: mne.io.BaseRaw, spec: ModelSpec, *, interpolate: bool = False) -> FittedRecording:
    """Bring a recording to the channels, band, rate, reference and unit of a model.

    In this order: channels by name (case is ignored; channels marked bad count as missing), zero-phase FIR band-pass,
    resampling, average reference, unit. The spec decides which of the last four happen.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording in volts, as `read_recording` returns it. It is left as it is.
    spec : ModelSpec
        The model.
    interpolate : bool
        Make missing channels by spherical splines (Perrin et al. 1989) from all good EEG channels. The recording's
        positions and the model's are each taken about the centre of their best sphere, since montages come in frames whose
        origins lie centimetres apart; the tilt of these frames (up to 6 degrees between MNE's templates and its head frame)
        remains. A recording without positions takes those of the 10-05 system by name.

    Raises
    ------
    RecordingError
        If the recording lacks channels of the model and `interpolate` is False or impossible; is slower than the model;
        is shorter than one window or than the band-pass; or is in another unit by the looks of it: the median over the
        channels of the RMS about the mean lies outside `PLAUSIBLE_RMS`. `TooShortError` where the band-pass is longer.
    """
    steps: list[str] = []
    rate, n_samples = raw.info["sfreq"], raw.n_times
    if rate < spec.sfreq and not math.isclose(rate, spec.sfreq):
        raise RecordingError(
            f"The recording is sampled at {rate:g} Hz, the model at {spec.sfreq:g} Hz.",
            "Record at the model's rate or above: upsampling cannot bring back what was not recorded.",
        )
    if n_samples / rate < spec.n_times / spec.sfreq:
        raise RecordingError(
            f"The recording lasts {n_samples / rate:g} s, one window of the model {spec.n_times / spec.sfreq:g} s.",
            "Give a longer recording.",
        )
    raw = _fit_channels(raw, spec, interpolate, steps)
    _band_pass(raw, spec, steps)
    if not math.isclose(rate, spec.sfreq):
        raw.resample(spec.sfreq, verbose="error")
        steps.append(f"resampled from {rate:g} to {spec.sfreq:g} Hz")
    volts = raw.get_data()
    if spec.preprocessing.reference == "average":
        if spec.n_chans == 1:
            raise RecordingError(
                "Nothing is left of one channel that is referenced to the average of one.",
                "Set the reference to none (`--reference none`, in a configuration data.preprocessing), or use more channels.",
            )
        volts -= volts.mean(axis=0)
        steps.append(f"re-referenced to the average of {spec.n_chans} channels")
    rms = float(np.median(volts.std(axis=1)))
    check_amplitude(rms, "State the unit they are stored in with `--unit` (volts passed as microvolts?), or mend the header.")
    data = np.ascontiguousarray(volts / UNITS_IN_VOLTS[spec.unit], dtype=np.float32)
    steps.append(f"scaled to {spec.unit}")
    return FittedRecording(data=data, sfreq=spec.sfreq, steps=tuple(steps))


def check_amplitude(rms: float, mend: str) -> None:
    """Refuse an amplitude that no EEG has.

    Parameters
    ----------
    rms : float
        Of the median channel about its mean, in volts.
    mend : str
        What to do about it.

    Raises
    ------
    RecordingError
        If it lies outside `PLAUSIBLE_RMS`.
    """
    if not PLAUSIBLE_RMS[0] <= rms <= PLAUSIBLE_RMS[1]:
        raise RecordingError(
            f"The median channel has an RMS of {rms * 1e6:.3g} uV, which is no EEG: the samples look like another unit's.",
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


def _read_with_mne(path: Path, unit: Unit | None) -> mne.io.BaseRaw:
    from scipy.io.matlab import MatReadError  # type: ignore[import-untyped, unused-ignore]

    if unit is not None:
        raise RecordingError(f"{path.name} states the unit of its samples itself.", "Leave out `--unit`.")
    mne, edf = require_mne(), path.suffix.lower() in (".edf", ".bdf")
    try:
        # infer_types splits EDF's standard labels, "EEG Fp1", into type and name.
        raw = mne.io.read_raw(path, preload=True, verbose="error", **({"infer_types": True} if edf else {}))
    except MatReadError as error:
        raise OSError(str(error)) from error
    if (promised := _promised_n_times(path, raw.info["sfreq"])) > raw.n_times:
        raise RecordingError(
            f"{path.name} is truncated: it holds {raw.n_times} of {promised} samples.", "Copy it again from its source."
        )
    if "eeg" not in raw:
        types = ", ".join(raw.get_channel_types(unique=True))
        raise RecordingError(f"{path.name} has no EEG channels, only {types}.", "Give a recording with EEG channels.")
    return raw.pick("eeg")


def _promised_n_times(path: Path, sfreq: float) -> int:
    """Return how many samples the header of a format that MNE reads short without a word announces, 0 if it does not say."""
    match path.suffix.lower():
        case ".edf" | ".bdf":
            with path.open("rb") as file:
                header = file.read(252)
            n_records, seconds = int(header[236:244]), float(header[244:252])
            return round(n_records * seconds * sfreq) if n_records > 0 else 0  # -1: the format's "never closed"
        case ".vhdr" | ".ahdr":
            found = re.search(r"^DataPoints\s*=\s*(\d+)", path.read_text(encoding="latin-1"), re.MULTILINE)
            return int(found[1]) if found else 0
    return 0


def _read_npy(path: Path, sfreq: float | None, unit: Unit | None, ch_names: Sequence[str] | None) -> mne.io.BaseRaw:
    missing = [flag for flag, value in (("--sfreq", sfreq), ("--unit", unit)) if value is None]
    if sfreq is None or unit is None:
        raise RecordingError(f"{path.name} is a bare array that states neither rate nor unit.", f"Give {' and '.join(missing)}.")
    if not (math.isfinite(sfreq) and sfreq > 0):
        raise RecordingError(f"A rate of {sfreq} Hz is none.", "Give a positive `--sfreq`.")
    with path.open("rb") as file:
        data = np.lib.format.read_array(file, allow_pickle=False)
    if data.ndim != 2 or 0 in data.shape or data.dtype.kind not in "fiu":
        raise RecordingError(
            f"{path.name} holds an array of shape {data.shape} and type {data.dtype}.",
            "Save real numbers of shape (n_chans, n_samples).",
        )
    return _raw_from_array(data * UNITS_IN_VOLTS[unit], sfreq, ch_names, path.name)


def _read_xdf(path: Path, unit: Unit | None, ch_names: Sequence[str] | None) -> mne.io.BaseRaw:
    try:
        import pyxdf
    except ImportError as error:
        raise MissingDependencyError("pyxdf", "eeg") from error
    with path.open("rb") as file:  # pyxdf leaves a file that it opens itself and refuses open
        # By default a pause must last 500 samples too, or pyxdf spreads it over the whole stream and hides it.
        streams, _ = pyxdf.load_xdf(file, jitter_break_threshold_samples=1)
    stream = _eeg_stream(streams, path.name)
    info = stream["info"]
    name, rate = info["name"][0], float(info["nominal_srate"][0])
    if stream.get("footer") is None:
        raise RecordingError(
            f"{path.name} is truncated: stream {name} has no footer.",
            "Copy it again, or repair it by loading and saving it.",
        )
    steps = np.diff(stream["time_stamps"])
    if (abs(steps * rate - 1) > 0.01).any():  # pyxdf has taken the jitter out: what is left are gaps and wrong rates
        raise RecordingError(
            f"Stream {name} has gaps, or is not at its rate: its samples are {steps.min():.3g} to {steps.max():.3g} s apart, "
            f"nominally {1 / rate:.3g} s.",
            "Cut a stretch without loss out of it.",
        )
    samples = np.asarray(stream["time_series"], dtype=np.float64).T
    described = (((info["desc"] or [None])[0] or {}).get("channels") or [None])[0] or {}
    channels: list[dict[str, list[str]]] = described.get("channel") or [{}] * len(samples)
    picks = [i for i, channel in enumerate(channels) if _text(channel, "type", "EEG").casefold() == "eeg"]
    labels = [_text(channels[i], "label", "") for i in picks]
    stated = {UNIT_NAMES.get(_text(channels[i], "unit", "").casefold()) for i in picks}
    if not picks or len(channels) != len(samples):
        raise RecordingError(f"Stream {name} does not describe its {len(samples)} channels as EEG.", "Mend its description.")
    if len(stated) > 1 or (None not in stated and unit is not None and unit not in stated):
        units = ", ".join(sorted(str(value) for value in stated))
        raise RecordingError(f"Stream {name} is in {units}.", "Use one unit for all its channels, and leave out `--unit`.")
    unit = unit or stated.pop()
    if unit is None:
        raise RecordingError(f"Stream {name} of {path.name} does not state its unit.", "Give it with `--unit`.")
    return _raw_from_array(samples[picks] * UNITS_IN_VOLTS[unit], rate, labels if all(labels) else ch_names, path.name)


def _eeg_stream(streams: list[dict[str, Any]], source: str) -> dict[str, Any]:
    regular = [
        stream
        for stream in streams
        if float(stream["info"]["nominal_srate"][0]) > 0 and stream["info"]["channel_format"][0] != "string"
    ]
    eeg = [stream for stream in regular if (stream["info"]["type"][0] or "").casefold() == "eeg"] or regular
    if len(eeg) != 1 or not len(eeg[0]["time_stamps"]):
        names = ", ".join(f"{stream['info']['name'][0]} ({stream['info']['type'][0]})" for stream in streams)
        raise RecordingError(
            f"{source} does not have exactly one EEG stream with samples; its streams are {names or 'none'}.",
            "Keep one regular stream of type EEG in the file.",
        )
    return eeg[0]


def _text(channel: dict[str, list[str]], key: str, default: str) -> str:
    return (channel.get(key) or [default])[0] or default


def _raw_from_array(volts: NDArray[np.float64], sfreq: float, ch_names: Sequence[str] | None, source: str) -> mne.io.BaseRaw:
    mne = require_mne()
    if ch_names is None or len(ch_names) != len(volts) or len(set(ch_names)) != len(volts):
        given = "no channel names" if ch_names is None else f"{len(set(ch_names))} different channel names"
        raise RecordingError(
            f"{source} has {len(volts)} rows of samples, and there are {given} for them.",
            "Give exactly the model's channels in rows, shape (n_chans, n_samples), or a file that names its own.",
        )
    return mne.io.RawArray(volts, mne.create_info(list(ch_names), sfreq, "eeg"), verbose="error")


def _fit_channels(raw: mne.io.BaseRaw, spec: ModelSpec, interpolate: bool, steps: list[str]) -> mne.io.BaseRaw:
    """Return a loaded copy of `raw` with the channels of the model."""
    if spec.ch_names is None:
        raise RecordingError(
            "The model has no channel names, so the recording's montage cannot be checked against it.",
            "Export the bundle with `--montage` or `--channels`.",
        )
    good = {name.casefold(): name for name in raw.ch_names if name not in raw.info["bads"]}
    if len(good) != len(raw.ch_names) - len(raw.info["bads"]):
        raise RecordingError("Channel names of the recording differ in case only.", "Rename or drop one of them.")
    found = [good.pop(name.casefold(), None) for name in spec.ch_names]
    present = [name for name in found if name is not None]
    missing = [name for name, there in zip(spec.ch_names, found, strict=True) if there is None]
    if missing and not interpolate:
        raise RecordingError(
            f"The recording lacks, or marks as bad, {len(missing)} of the model's {spec.n_chans} channels: {listed(missing)}.",
            "Record with the model's montage, or make them from the others with `--interpolate`.",
        )
    if not missing:
        if good:
            steps.append(f"left out {len(good)} channels: {listed(good.values())}")
        return raw.copy().pick(present).load_data(verbose="error")
    fitted = _interpolate(raw, spec, steps)
    if present:
        rows = [i for i, name in enumerate(found) if name is not None]
        fitted[rows] = raw.get_data(picks=present)
    steps.append(f"interpolated {len(missing)} of {spec.n_chans} channels: {listed(missing)}")
    return fitted


def _interpolate(raw: mne.io.BaseRaw, spec: ModelSpec, steps: list[str]) -> mne.io.BaseRaw:
    """Return the recording at all positions of the model, by spherical splines from its good EEG channels."""
    mne = require_mne()
    if spec.ch_names is None or spec.positions is None:
        raise RecordingError("The model has no channel positions to interpolate to.", "Export it with `--montage`.")
    good = [raw.ch_names[i] for i in mne.pick_types(raw.info, eeg=True)]
    placed = {
        channel["ch_name"]: tuple(channel["loc"][:3])
        for channel in raw.info["chs"]
        if channel["ch_name"] in good and np.isfinite(channel["loc"][:3]).all() and channel["loc"][:3].any()
    }
    if not placed:
        template = read_montage("standard_1005")
        by_name = dict(zip(map(str.casefold, template.ch_names), template.positions, strict=True))
        placed = {name: by_name[name.casefold()] for name in good if name.casefold() in by_name}
        steps.append(f"placed {len(placed)} channels by their names in the 10-05 system")
    if len(placed) < 4:
        raise RecordingError(
            f"Only {len(placed)} good EEG channels of the recording have a position, by digitisation or by name.",
            "Give a recording with positions or with 10-05 names for at least 4 channels.",
        )
    source = raw.copy().pick(list(placed)).load_data(verbose="error")
    source.set_channel_types(dict.fromkeys(placed, "eeg"), verbose="error")
    source.set_montage(_centred(placed, placed.values()), verbose="error")
    target = _centred(spec.ch_names, spec.positions)
    with mne.use_log_level("error"):
        return source.interpolate_to(target, origin=(0.0, 0.0, 0.0), method="spline")


def _centred(ch_names: Iterable[str], positions: Iterable[Position]) -> mne.channels.DigMontage:
    """Return a montage about the centre of the sphere that fits best."""
    mne = require_mne()
    points = np.array(list(positions))
    centre, radius = fit_sphere(points)
    if not 0.05 <= radius <= 0.15:
        raise RecordingError(
            f"The {len(points)} channel positions lie on a sphere of {radius * 1e3:.0f} mm, which is no head.",
            "Give positions in metres that go around the head.",
        )
    return mne.channels.make_dig_montage(dict(zip(ch_names, points - centre, strict=True)), coord_frame="head")


def _band_pass(raw: mne.io.BaseRaw, spec: ModelSpec, steps: list[str]) -> None:
    """Filter `raw` in place. The upper edge is below its Nyquist frequency, because it is below the model's."""
    mne = require_mne()
    low, high = spec.preprocessing.l_freq, spec.preprocessing.h_freq
    if low is None and high is None:
        return
    n_taps = len(mne.filter.create_filter(None, raw.info["sfreq"], low, high, phase="zero", verbose="error"))
    band = f"{low or 0:g} Hz up" if high is None else f"{low or 0:g} to {high:g} Hz"
    if n_taps > raw.n_times:
        raise TooShortError(
            f"The filter for {band} lasts {n_taps / raw.info['sfreq']:.3g} s, the recording "
            f"{raw.n_times / raw.info['sfreq']:.3g} s.",
            "Give a longer recording.",
        )
    raw.filter(low, high, picks="all", phase="zero", verbose="error")
    steps.append(f"band-passed {band}, zero-phase FIR")
