"""Reads EDF and BDF headers and annotations where MNE says too little: rates and units of single channels, times of records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import RecordingError

_ANNOTATIONS = ("EDF Annotations", "BDF Annotations")
_ONSET = re.compile(rb"[+-]\d+(?:\.\d*)?")
_EVENTS = re.compile(rb"([+-]\d+(?:\.\d*)?)(?:\x15(\d+(?:\.\d*)?))?\x14((?:[^\x14\0]*\x14)*)\0")  # time, duration, texts


@dataclass(frozen=True, kw_only=True)
class EdfHeader:
    """Holds the header of an EDF or BDF file (Kemp and Olivan 2003, Clin. Neurophysiol. 114, 1755-1761).

    Attributes
    ----------
    labels, dimensions : tuple of str
        Label and physical dimension of each signal.
    n_samples : tuple of int
        Samples of each signal in one record.
    n_records : int
        Records by the header; -1 where the file was never closed.
    record_s : float
        Seconds of a record.
    interrupted : bool
        Whether records do not follow each other (EDF+D, BDF+D).
    n_bytes : int
        Bytes of the header.
    sample_bytes : int
        Bytes of a sample: 2 in EDF, 3 in BDF.
    """

    labels: tuple[str, ...]
    dimensions: tuple[str, ...]
    n_samples: tuple[int, ...]
    n_records: int
    record_s: float
    interrupted: bool
    n_bytes: int
    sample_bytes: int

    @property
    def signals(self) -> tuple[int, ...]:
        """Return the `labels` of signals, without those of annotations."""
        return tuple(i for i, label in enumerate(self.labels) if label not in _ANNOTATIONS)

    def sfreq(self, signal: int) -> float:
        """Return the rate in Hz of a signal."""
        return self.n_samples[signal] / (self.record_s or 1.0)


def read_edf_header(path: Path) -> EdfHeader:
    """Return the header of a file.

    Raises
    ------
    ValueError
        If there is none.
    """
    with path.open("rb") as file:
        fixed = file.read(256)
        n = int(fixed[252:256])
        rest = file.read(256 * n)
    if len(fixed) < 256 or len(rest) < 256 * n or n < 1:
        raise ValueError(f"the header of {n} signals is cut short")

    def column(begin: int, width: int) -> list[str]:
        return [rest[begin * n + i * width :][:width].decode("latin-1").strip() for i in range(n)]

    return EdfHeader(
        labels=tuple(column(0, 16)),
        dimensions=tuple(text.replace("\x83\xca", "μ") for text in column(96, 8)),  # Shift-JIS, as Nihon Kohden writes it
        n_samples=tuple(map(int, column(216, 8))),
        n_records=int(fixed[236:244]),
        record_s=float(fixed[244:252]),
        interrupted=fixed[192:197] in (b"EDF+D", b"BDF+D"),
        n_bytes=int(fixed[184:192]),
        sample_bytes=3 if fixed[:1] == b"\xff" else 2,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class EdfTimes:
    """Holds the times and events that the annotations of an EDF+ or BDF+ file state.

    Attributes
    ----------
    records : ndarray, shape (n_records,)
        When each record began, in seconds after the first one.
    events : tuple of (float, float, str)
        Onset in seconds after the first record, duration in seconds, and text of each event.
    """

    records: NDArray[np.float64]
    events: tuple[tuple[float, float, str], ...]


def read_times(path: Path, header: EdfHeader) -> EdfTimes:
    """Read the start times of the records of an EDF+ or BDF+ file (the first annotation of each record), and the events.

    `mne.read_annotations` searches the samples too, in which annotations are found by chance.

    Raises
    ------
    RecordingError
        If a record does not say when it began, or began before the one in front of it ended.
    """
    signals = [i for i, label in enumerate(header.labels) if label in _ANNOTATIONS]
    if not signals:
        raise RecordingError(f"{path.name} is an EDF+D file without annotations.", "Export the recording again.")
    ends = np.cumsum(header.n_samples) * header.sample_bytes
    onsets: list[float] = []
    events: list[tuple[float, float, str]] = []
    with path.open("rb") as file:
        file.seek(header.n_bytes)
        while len(record := file.read(ends[-1])) == ends[-1]:
            for signal in signals:
                begin = ends[signal] - header.n_samples[signal] * header.sample_bytes
                lists = record[begin : ends[signal]]
                if signal == signals[0]:
                    if (found := _ONSET.match(lists)) is None:
                        raise RecordingError(
                            f"Record {len(onsets) + 1} of {path.name} does not say when it began.", "Export the recording again."
                        )
                    onsets.append(float(found[0]))
                for onset, duration, texts in _EVENTS.findall(lists):
                    events += [(float(onset), float(duration or 0), decoded(text)) for text in texts.split(b"\x14") if text]
    first = onsets[0] if onsets else 0.0
    records = np.array(onsets) - first
    if (np.diff(records) < header.record_s * 0.5).any():
        raise RecordingError(f"The records of {path.name} do not follow each other in time.", "Export the recording again.")
    return EdfTimes(records=records, events=tuple((onset - first, duration, text) for onset, duration, text in events))


def decoded(text: bytes) -> str:
    """Return an annotation's text: UTF-8, as EDF+ asks for, or what older devices write."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")
