"""Reads the formats of recordings through MNE and NumPy, and keeps what their readers warn of."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import math
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sjepa_deploy.eeg.edf import EdfHeader, read_edf_header, read_times
from sjepa_deploy.eeg.montage import require_mne
from sjepa_deploy.eeg.names import says_other_than_eeg
from sjepa_deploy.eeg.pauses import PAUSE, Segment, Told, sample_time
from sjepa_deploy.eeg.units import unit_named, volts_in
from sjepa_deploy.errors import MissingDependencyError, RecordingError, listed
from sjepa_deploy.spec import Unit

if TYPE_CHECKING:
    import mne
    from numpy.typing import NDArray

FORMATS = "EDF, BDF, BrainVision (.vhdr), EEGLAB (.set), FIF, XDF or .npy"

_TRIGGERS = 1 << 20  # samples of a trigger channel that are read at once

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
            f"Give a whole, undamaged file: {FORMATS}.",
        ) from error


@contextlib.contextmanager
def heard(notes: list[str]) -> Iterator[None]:
    """Add what MNE's readers warn of to `notes`, each once; other warnings go on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif (text := " ".join(str(warning.message).split())) not in notes:
            notes.append(text)


def read_with_mne(path: Path, unit: Unit | None, notes: list[str], *, preload: bool) -> mne.io.BaseRaw:
    """Read the EEG channels of a file that is neither EDF nor BDF."""
    raw = _read_raw(path, notes, preload=preload)
    if unit is not None:
        stated = _volts_stated(raw, path)
        _rescale(raw, [volts_in(unit) / stated(name) for name in raw.ch_names], unit, path, notes)
    if path.suffix.lower() in (".vhdr", ".ahdr"):
        found = re.search(r"^DataPoints\s*=\s*(\d+)", path.read_text(encoding="latin-1"), re.MULTILINE)
        _check_length(raw, int(found[1]) if found else 0, path)
    return _only_eeg(raw, path)


def read_edf(path: Path, unit: Unit | None, notes: list[str], *, preload: bool) -> mne.io.BaseRaw:
    """Read the EEG channels of an EDF or BDF file that have the rate of most of them, each in the unit that the header states."""
    header = read_edf_header(path)
    rates = Counter(header.sfreq(i) for i in header.signals if not says_other_than_eeg(header.labels[i]))
    rate = max(rates, key=lambda sfreq: (rates[sfreq], sfreq)) if rates else None
    others = [i for i in header.signals if rate is not None and header.sfreq(i) != rate]
    # infer_types splits EDF's standard labels, "EEG Fp1", into type and name; `exclude` compares what is left.
    bare = [header.labels[i] for i in others]
    exclude = sorted({name for label in bare for name in (label, label.partition(" ")[2]) if name})
    try:
        raw = _read_raw(path, notes, preload=preload, infer_types=True, exclude=exclude)
    except Exception as error:
        if type(error) is not Exception or "encoding" not in str(error):  # MNE's for annotations that are not UTF-8
            raise
        raw = _read_raw(path, notes, preload=preload, infer_types=True, exclude=exclude, encoding="latin1")
        notes.append("read the annotations as Latin-1: they are not in UTF-8, as EDF+ asks for")
    if others:
        notes.append(f"left out {listed(bare)}, which have not the {rate:g} Hz of the other channels")
    if header.n_records > 0:  # -1: the format's "never closed"
        _check_length(raw, round(header.n_records * (header.record_s or 1.0) * raw.info["sfreq"]), path)
    if header.interrupted:
        _mark_pauses(raw, path, header, notes)
    excluded = set(others)
    kept = [i for i in header.signals if i not in excluded]
    if len(kept) != len(raw.ch_names):
        raise RecordingError(f"{path.name} has channels of one name and different rates.", "Give every channel its own name.")
    _mend_units(raw, path, [header.dimensions[i] for i in kept], unit, notes)
    return _only_eeg(raw, path)


def read_npy(path: Path, sfreq: float | None, unit: Unit | None, ch_names: Sequence[str] | None) -> mne.io.BaseRaw:
    """Read an array of shape (n_chans, n_samples)."""
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
    return raw_from_array(data * volts_in(unit), sfreq, ch_names, path.name)


def _read_raw(path: Path, notes: list[str], *, preload: bool, **options: Any) -> mne.io.BaseRaw:
    from scipy.io.matlab import MatReadError  # type: ignore[import-untyped, unused-ignore]

    mne = require_mne()
    if path.suffix.lower() == ".txt" and path.read_bytes().startswith(b"%OpenBCI"):
        raise RecordingError(
            f"{path.name} is a text file of OpenBCI's GUI, which names no channels.",
            "Save its EXG columns as .npy, shape (n_chans, n_samples), and give --sfreq and --unit uV; or record BDF+.",
        )
    kind = _kind(path)
    if kind in _PACKAGES and importlib.util.find_spec(_PACKAGES[kind]) is None:
        raise MissingDependencyError(_PACKAGES[kind], "eeg" if kind == "MFF" else "")
    # For .cnt, read_raw tries reader after reader, and antio's ends the process on a file of Neuroscan.
    read = {"ANT": mne.io.read_raw_ant, "Neuroscan": mne.io.read_raw_cnt}.get(kind, mne.io.read_raw)
    try:
        with heard(notes):
            raw = read(path, preload=preload or not _in_stretches(path), verbose="warning", **options)
    except MatReadError as error:
        raise OSError(str(error)) from error
    except TypeError as error:
        if "number of trials" not in str(error):
            raise
        raise RecordingError(
            f"{path.name} holds epochs, and no continuous recording.",
            "Save them for sjepa-run as *-epo.fif: mne.read_epochs_eeglab(...).save(...).",
        ) from error
    if kind == "MFF":
        _mark_filled(raw, notes)
    return raw


def _in_stretches(path: Path) -> bool:
    """Return whether a file can be left on the disk and read stretch by stretch."""
    suffix = path.suffix.lower()
    return suffix in (".fif", ".edf", ".bdf", ".vhdr", ".ahdr") or (suffix == ".set" and path.with_suffix(".fdt").is_file())


_PACKAGES = {"MFF": "mffpy", "MATLAB 7.3": "pymatreader", "ANT": "antio"}
"""Names the package that MNE imports to read each format.

Without the package, MNE's errors speak of a damaged file or of every reader that MNE has tried.
"""


def _kind(path: Path) -> str:
    """Return the format of a file whose suffix says too little to choose the reader, or ""."""
    suffix = path.suffix.lower()
    if suffix == ".mff":
        return "MFF"
    if suffix not in (".set", ".cnt") or not path.is_file():
        return ""
    with path.open("rb") as file:
        start = file.read(10)
    if suffix == ".set":
        return "MATLAB 7.3" if start == b"MATLAB 7.3" else ""
    return "ANT" if start.startswith((b"RIFF", b"RF64")) else "Neuroscan"


def _mark_filled(raw: mne.io.BaseRaw, notes: list[str]) -> None:
    """Mark as not recorded the zeros in all channels at once that EGI's recorder writes at the end of an epoch, mostly 112 ms."""
    filled = (raw.get_data(picks="eeg") == 0).all(axis=0)
    if filled.all():
        return
    sfreq = raw.info["sfreq"]
    begin, end = np.flatnonzero(np.diff(filled, prepend=False, append=False)).reshape(-1, 2).T
    known = sum(mark["duration"] for mark in raw.annotations if mark["description"] == "BAD_ACQ_SKIP")
    if (seconds := filled.sum() / sfreq - known) > 0.5 / sfreq:
        raw.annotations.append(begin / sfreq + raw.first_time, (end - begin) / sfreq, "BAD_ACQ_SKIP")
        notes.append(f"{seconds:.3g} s at the ends of epochs were not recorded")


def _only_eeg(raw: mne.io.BaseRaw, path: Path) -> mne.io.BaseRaw:
    if "eeg" not in raw:
        types = ", ".join(raw.get_channel_types(unique=True))
        raise RecordingError(f"{path.name} has no EEG channels, only {types}.", "Give a recording with EEG channels.")
    _mark_triggers(raw)
    return raw.pick("eeg")


def _mark_triggers(raw: mne.io.BaseRaw) -> None:
    """Add an annotation for each rise of a trigger channel, named by its value: "1"."""
    mne = require_mne()
    for name in [raw.ch_names[i] for i in mne.pick_types(raw.info, meg=False, stim=True)]:
        info = mne.create_info([name], raw.info["sfreq"], "stim")
        for start in range(0, raw.n_times, _TRIGGERS):
            first = max(start - 1, 0)  # the value before a rise
            part = mne.io.RawArray(raw.get_data([name], first, start + _TRIGGERS), info, raw.first_samp + first, verbose="error")
            events = mne.find_events(part, stim_channel=name, shortest_event=1, verbose="error")
            raw.annotations.append(
                events[:, 0] / raw.info["sfreq"], np.zeros(len(events)), [str(value) for value in events[:, 2]]
            )


def _check_length(raw: mne.io.BaseRaw, promised: int, path: Path) -> None:
    """Refuse a file that is shorter than its header announces: MNE would read the short file without an error."""
    if promised > raw.n_times:
        raise RecordingError(
            f"{path.name} is truncated: it holds {raw.n_times} of {promised} samples.", "Copy it again from its source."
        )


def _volts_stated(raw: mne.io.BaseRaw, path: Path) -> Callable[[str], float]:
    """Return how many volts a value of 1 in the file is for each channel, as MNE read the file."""
    suffix = path.suffix.lower()
    if suffix == ".set":
        return lambda name: 1e-6  # EEGLAB's files are in microvolts, and do not say so
    if suffix in (".fif", ".gz"):
        return lambda name: 1.0
    if suffix in (".vhdr", ".ahdr"):
        words = {name: unit_named(word) for name, word in raw._orig_units.items()}
        return lambda name: volts_in(words.get(name) or "uV")
    raise RecordingError(f"{path.name} states the unit of its samples itself.", "Leave out `--unit`.")


def _multiply(raw: mne.io.BaseRaw, factors: NDArray[np.float64]) -> None:
    """Multiply each channel by its factor, now or, where the samples are still in the file, when they are read."""
    if raw.preload:
        raw._data *= factors[:, None]
    else:
        raw._cals *= factors


def _rescale(raw: mne.io.BaseRaw, factors: Sequence[float], unit: Unit, path: Path, notes: list[str]) -> None:
    eeg = [kind == "eeg" for kind in raw.get_channel_types()]
    if any(is_eeg and not math.isclose(factor, 1.0) for is_eeg, factor in zip(eeg, factors, strict=True)):
        notes.append(f"taken as {unit}, by `--unit`, against what {path.name} states")
    _multiply(raw, np.where(eeg, factors, 1.0))


def _mend_units(raw: mne.io.BaseRaw, path: Path, dimensions: Sequence[str], unit: Unit | None, notes: list[str]) -> None:
    """Bring an EDF file's channels to volts. MNE knows uV and mV; what it does not know it takes for volts."""
    eeg = [kind == "eeg" for kind in raw.get_channel_types()]
    by_mne = [1e-6 if word in ("μV", "µV", "uV") else 1e-3 if word == "mV" else 1.0 for word in dimensions]
    if unit is not None:
        stated = sorted({word or "no unit" for word, is_eeg in zip(dimensions, eeg, strict=True) if is_eeg})
        _multiply(raw, np.where(eeg, volts_in(unit) / np.array(by_mne), 1.0))
        if any(unit_named(word) != unit for word in stated):
            notes.append(f"taken as {unit}, by `--unit`, and not as {listed(stated)}, as {path.name} states")
        return
    volts = [volts_in(known) if (known := unit_named(word)) else None for word in dimensions]
    unknown = [i for i, is_eeg in enumerate(eeg) if is_eeg and volts[i] is None]
    if len(unknown) == sum(eeg) > 0:
        words = sorted({dimensions[i] for i in unknown} - {""})
        why = f"states the unit of its channels as {listed(words)}, which is no voltage" if words else "does not state its unit"
        raise RecordingError(f"{path.name} {why}.", "Give it with `--unit`, for most devices `--unit uV`.")
    _multiply(raw, np.array([1.0 if v is None else v / m for v, m in zip(volts, by_mne, strict=True)]))
    if unknown:
        gone = [f"{raw.ch_names[i]} ({dimensions[i] or 'no unit'})" for i in unknown]
        notes.append(f"left out {listed(gone)}: no voltage; `--unit` takes all channels in one unit")
        raw.drop_channels([raw.ch_names[i] for i in unknown])


def _mark_pauses(raw: mne.io.BaseRaw, path: Path, header: EdfHeader, notes: list[str]) -> None:
    """Mark the pauses of an interrupted file, and put its annotations where their samples are: MNE joins the records."""
    mne = require_mne()
    times = read_times(path, header)
    onset = times.records
    sfreq = raw.info["sfreq"]
    late = onset - np.arange(len(onset)) * header.record_s  # seconds of all pauses before each record
    after = np.flatnonzero(np.diff(late, prepend=0.0) > 0.5 / sfreq)
    marks = mne.Annotations(*zip(*times.events, strict=True)) if times.events else mne.Annotations([], [], [])
    begin = [round(i * header.record_s * sfreq) for i in range(len(onset) + 1)]
    records = [Segment(start=begin[i], stop=begin[i + 1], onset=float(onset[i])) for i in range(len(onset))]
    places = sample_time(marks.onset, records, sfreq)
    notes[:] = [note for note in notes if not re.search(r"annotation.*outside|[Oo]mitted|[Ll]imited", note)]
    pauses = mne.Annotations(after * header.record_s, 0.0, [PAUSE] * len(after))
    raw.set_annotations(mne.Annotations(places, marks.duration, marks.description) + pauses, verbose="error")
    lengths = np.diff(late, prepend=0.0)[after]
    paused = tuple((round(int(i) * header.record_s * sfreq), float(s)) for i, s in zip(after, lengths, strict=True))
    raw.info["temp"] = Told(paused=paused)
    if paused:
        notes.append(f"recorded with {len(paused)} pauses of {lengths.min():.3g} to {lengths.max():.3g} s")


def raw_from_array(volts: NDArray[np.float64], sfreq: float, ch_names: Sequence[str] | None, source: str) -> mne.io.BaseRaw:
    """Return samples in volts, shape (n_chans, n_samples), with the names of their channels."""
    mne = require_mne()
    if ch_names is None or len(ch_names) != len(volts) or len(set(ch_names)) != len(volts):
        given = "no channel names" if ch_names is None else f"{len(set(ch_names))} different channel names"
        raise RecordingError(
            f"{source} has {len(volts)} rows of samples, and there are {given} for them.",
            "Give exactly the model's channels in rows, shape (n_chans, n_samples), name them with `--channels`, or give a file "
            "that names its own.",
        )
    return mne.io.RawArray(volts, mne.create_info(list(ch_names), sfreq, "eeg"), verbose="error")
