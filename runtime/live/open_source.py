"""Opens a source from its address: `lsl:NAME`, `brainflow:BOARD`, `file:PATH`, `synthetic`."""

from __future__ import annotations

import dataclasses
import importlib.util
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.events import events_of, nearest_sample
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.names import parse_rename
from sjepa_deploy.errors import MissingDependencyError, StreamError
from sjepa_deploy.runtime.live.sources import ReplaySource, Source, synthetic_source
from sjepa_deploy.spec import SignalSpec, Unit

if TYPE_CHECKING:
    from sjepa_deploy.eeg.pauses import Segment


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Holds what a user says about a source beside its address.

    Attributes
    ----------
    unit : {"nV", "uV", "mV", "V"} or None
        Unit of a stream or recording that does not state it.
    ch_names : sequence of str or None
        Channels, in order, of a stream or recording that does not name them.
    rename : sequence of str
        "THEIRS=MINE": channels of a stream or recording that get other names.
    sfreq : float or None
        Rate in Hz of the synthetic stream, or of a recording that does not state it.
    successor : bool
        Whether a lost LSL stream without a source_id may be followed by another one that the address names.
    speed : float
        Seconds of a recording or of the synthetic stream in one second; infinity for as fast as possible.
    chunk : int
        Samples of a recording or of the synthetic stream that come at once.
    """

    unit: Unit | None = None
    ch_names: Sequence[str] | None = None
    rename: Sequence[str] = ()
    sfreq: float | None = None
    successor: bool = False
    speed: float = 1.0
    chunk: int = 1


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """Says where a kind of source is found and what it needs.

    Attributes
    ----------
    target : str
        "module:function", imported when such a source is asked for. The function takes what follows the colon of the address,
        the `SignalSpec` of the model that will decode the source, and `SourceOptions`; it returns a `Source`.
    address : str
        Form of an address, for messages.
    package, extra : str
        Package that must be importable, and the extra of sjepa-deploy that installs the package.
    takes : tuple of str
        The fields of `SourceOptions` that the function reads. Others are refused.
    """

    target: str
    address: str
    package: str
    extra: str
    takes: tuple[str, ...]


SOURCES: dict[str, SourceEntry] = {
    "lsl": SourceEntry(
        target="sjepa_deploy.runtime.live.lsl:open_lsl",
        address="lsl:NAME, lsl:type=EEG",
        package="pylsl",
        extra="stream",
        takes=("unit", "ch_names", "rename", "successor"),
    ),
    "brainflow": SourceEntry(
        target="sjepa_deploy.runtime.live.brainflow:open_brainflow",
        address="brainflow:BOARD",
        package="brainflow",
        extra="brainflow",
        takes=("unit", "ch_names", "rename"),
    ),
    "file": SourceEntry(
        target="sjepa_deploy.runtime.live.open_source:open_file",
        address="file:RECORDING",
        package="mne",
        extra="eeg",
        takes=("unit", "ch_names", "rename", "sfreq", "speed", "chunk"),
    ),
    "synthetic": SourceEntry(
        target="sjepa_deploy.runtime.live.open_source:open_synthetic",
        address="synthetic",
        package="numpy",
        extra="",
        takes=("sfreq", "speed", "chunk"),
    ),
}
"""Every kind of source by what its address begins with."""


def open_source(address: str, signal: SignalSpec, options: SourceOptions | None = None) -> Source:
    """Open a source.

    Parameters
    ----------
    address : str
        "lsl:NAME", "lsl:type=EEG", "lsl:source_id=..." (see `sjepa_deploy.runtime.live.lsl.find_stream`); "brainflow:BOARD" or
        "brainflow:BOARD,serial_port=..." (see `sjepa_deploy.runtime.live.brainflow.BrainFlowSource`); "file:RECORDING" (see
        `sjepa_deploy.eeg.recording.read_recording`); or "synthetic".
    signal : SignalSpec
        The signal of the model that will decode it.
    options : SourceOptions or None
        Facts that the source does not say itself.

    Raises
    ------
    StreamError
        If there is no such source, or the source does not take one of the options.
    RecordingError
        If the file cannot be read.
    MissingDependencyError
        If what the source needs is not installed.
    """
    options = options or SourceOptions()
    kind, _, what = address.partition(":")
    entry = SOURCES.get(kind)
    if entry is None or bool(what) != (":" in entry.address):
        known = ", ".join(entry.address for entry in SOURCES.values())
        raise StreamError(f"{address!r} is not a source.", f"Use one of {known}.")
    for field in dataclasses.fields(options):
        if field.name not in entry.takes and getattr(options, field.name) != field.default:
            raise StreamError(f"The source {kind} takes no {field.name}.", f"Leave {field.name} out.")
    if importlib.util.find_spec(entry.package) is None:
        raise MissingDependencyError(entry.package, entry.extra)
    opened: Source = pkgutil.resolve_name(entry.target)(what, signal, options)
    return opened


def open_file(path: str, signal: SignalSpec, options: SourceOptions) -> ReplaySource:
    """Return a recording as a stream in volts, without its bad channels."""
    from sjepa_deploy.eeg.pauses import segments_of, told
    from sjepa_deploy.eeg.recording import read_recording

    raw = read_recording(
        Path(path),
        sfreq=options.sfreq,
        unit=options.unit,
        ch_names=options.ch_names,
        row_names=signal.ch_names,
        rename=parse_rename(options.rename, StreamError),
    )
    raw.drop_channels(raw.info["bads"])
    info = StreamInfo(
        name=Path(path).name, ch_names=tuple(raw.ch_names), sfreq=raw.info["sfreq"], unit="V", notes=told(raw).notes
    )
    segments = segments_of(raw)
    volts = np.concatenate([raw.get_data(start=segment.start, stop=segment.stop) for segment in segments], axis=1)
    breaks = np.cumsum([segment.stop - segment.start for segment in segments])[:-1].tolist()
    when = partial(_when, segments=segments, sfreq=raw.info["sfreq"])
    events = events_of(raw)
    return ReplaySource(
        info,
        np.ascontiguousarray(volts.T),
        speed=options.speed,
        chunk=options.chunk,
        breaks=breaks,
        plan=list(zip(when(events.onset).tolist(), events.description, strict=True)),
        when=when,
    )


def _when(seconds: NDArray[np.float64], *, segments: Sequence[Segment], sfreq: float) -> NDArray[np.float64]:
    """Return when the samples at times of a recording are due, in a stream that leaves its pauses out."""
    onsets = np.array([segment.onset for segment in segments])
    begins = np.cumsum([0, *(segment.stop - segment.start for segment in segments)])
    which = np.searchsorted(onsets - 0.5 / sfreq, seconds, side="right") - 1
    samples = nearest_sample(seconds - onsets[np.maximum(which, 0)], sfreq)
    due: NDArray[np.float64] = (begins[np.maximum(which, 0)] + samples) / sfreq
    in_pause = (which >= 0) & (which < len(segments) - 1) & (samples >= np.diff(begins)[which])
    due[in_pause] = np.nan
    return due


def open_synthetic(_: str, signal: SignalSpec, options: SourceOptions) -> ReplaySource:
    """Return endless synthetic EEG of the model's channels."""
    return synthetic_source(signal, sfreq=options.sfreq, speed=options.speed, chunk=options.chunk)
