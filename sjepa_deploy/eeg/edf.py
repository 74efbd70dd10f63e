"""Reads what MNE does not tell of EDF and BDF files: rates and units of single channels, and when each record began."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import RecordingError

_ANNOTATIONS = ("EDF Annotations", "BDF Annotations")
_ONSET = re.compile(rb"[+-]\d+(?:\.\d*)?")


@dataclass(frozen=True, kw_only=True)
class EdfHeader:
    """The header of an EDF or BDF file (Kemp and Olivan 2003, Clin. Neurophysiol. 114, 1755-1761).

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
        """Which of `labels` are signals, and not annotations."""
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


def record_onsets(path: Path, header: EdfHeader) -> NDArray[np.float64]:
    """Return when each record began, in seconds after the first one: what the first annotation of each says.

    Raises
    ------
    RecordingError
        If a record does not say when it began, or began before the one in front of it ended.
    """
    signal = next((i for i, label in enumerate(header.labels) if label in _ANNOTATIONS), None)
    if signal is None:
        raise RecordingError(f"{path.name} is an EDF+D file without annotations.", "Export the recording again.")
    size = sum(header.n_samples) * header.sample_bytes
    begin = sum(header.n_samples[:signal]) * header.sample_bytes
    length = header.n_samples[signal] * header.sample_bytes
    onsets = []
    with path.open("rb") as file:
        file.seek(0, 2)
        n_records = (file.tell() - header.n_bytes) // size
        for record in range(n_records):
            file.seek(header.n_bytes + record * size + begin)
            found = _ONSET.match(file.read(length))
            if found is None:
                raise RecordingError(
                    f"Record {record + 1} of {path.name} does not say when it began.", "Export the recording again."
                )
            onsets.append(float(found[0]))
    onset = np.array(onsets) - onsets[0] if onsets else np.empty(0)
    if (np.diff(onset) < header.record_s * 0.5).any():
        raise RecordingError(f"The records of {path.name} do not follow each other in time.", "Export the recording again.")
    return onset
