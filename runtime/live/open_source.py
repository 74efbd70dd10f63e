"""A source by what a user writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.sources import ReplaySource, Source, synthetic_source
from sjepa_deploy.spec import ModelSpec, Unit


def open_source(
    text: str,
    spec: ModelSpec,
    *,
    unit: Unit | None = None,
    ch_names: Sequence[str] | None = None,
    sfreq: float | None = None,
    speed: float = 1.0,
) -> Source:
    """Open a source.

    Parameters
    ----------
    text : str
        "lsl:NAME", "lsl:type=EEG", "lsl:source_id=..." ; "file:RECORDING", what
        `sjepa_deploy.eeg.recording.read_recording` reads; or "synthetic".
    spec : ModelSpec
        The model that will decode it.
    unit : {"uV", "mV", "V"} or None
        Unit of a stream or file that does not state it.
    ch_names : sequence of str or None
        Names of the channels of a stream or file that does not name them.
    sfreq : float or None
        Rate in Hz of the synthetic stream, or of a file that does not state it.
    speed : float
        Seconds of a file or of the synthetic stream in one second; infinity for as fast as possible.

    Raises
    ------
    StreamError
        If there is no such source.
    RecordingError
        If the file cannot be read.
    """
    kind, _, what = text.partition(":")
    if kind == "lsl" and what:
        from sjepa_deploy.runtime.live.lsl import LslSource

        return LslSource(what, unit=unit, ch_names=ch_names)
    if kind == "file" and what:
        return recording_source(Path(what), unit=unit, ch_names=ch_names or spec.ch_names, sfreq=sfreq, speed=speed)
    if text == "synthetic":
        return synthetic_source(spec, sfreq=sfreq, speed=speed)
    raise StreamError(f"{text!r} is not a source.", "Use lsl:NAME, lsl:type=EEG, file:RECORDING or synthetic.")


def recording_source(
    path: Path,
    *,
    unit: Unit | None = None,
    ch_names: Sequence[str] | None = None,
    sfreq: float | None = None,
    speed: float = 1.0,
) -> ReplaySource:
    """Return a recording as a stream in volts, without its bad channels."""
    from sjepa_deploy.eeg.recording import read_recording

    raw = read_recording(path, sfreq=sfreq, unit=unit, ch_names=ch_names)
    raw.drop_channels(raw.info["bads"])
    info = StreamInfo(name=path.name, ch_names=tuple(raw.ch_names), sfreq=raw.info["sfreq"], unit="V")
    return ReplaySource(info, np.ascontiguousarray(raw.get_data().T), speed=speed)
