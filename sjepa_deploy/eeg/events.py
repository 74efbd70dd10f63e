"""Reads events, and places windows after them: one rule for training, offline decoding and live decoding.

An event is at the sample of its source that is nearest to it. Ties go to the even sample, as in MNE (`numpy.rint`). Resampling
moves the event to the nearest sample at the model's rate, by half a sample at most, as `mne.io.Raw.resample` does with events.
The window starts a whole number of samples after that.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sjepa_deploy.eeg.pauses import PAUSE, segments_of, time_of
from sjepa_deploy.errors import RecordingError, counted, listed

if TYPE_CHECKING:
    import mne

ALL = "all"
"""Name that stands for all events of a recording."""

NOT_EVENTS = ("bad", "edge", "boundary", "new segment", "amplifier")
"""Annotations whose descriptions begin with these mark stretches and cuts, and are no events."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Events:
    """Holds events in the order of time.

    Attributes
    ----------
    onset : ndarray of float64, shape (n_events,)
        Seconds of the recording's own time (`sjepa_deploy.eeg.pauses.segments_of`).
    description : tuple of str
        What each event is called.
    columns : dict of str to tuple of str
        What a table says of each event besides.
    """

    onset: NDArray[np.float64]
    description: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.onset)

    def __getitem__(self, kept: NDArray[np.bool_] | NDArray[np.intp]) -> Events:
        """Return the events of a mask, or of indices."""
        rows = np.arange(len(self))[kept]
        columns = {name: tuple(values[row] for row in rows) for name, values in self.columns.items()}
        return Events(onset=self.onset[rows], description=tuple(self.description[row] for row in rows), columns=columns)

    def named(self, names: Sequence[str]) -> Events:
        """Return the events with one of these descriptions; all of them for `ALL` alone.

        Raises
        ------
        RecordingError
            If there is no event, or none with one of the names; the message lists those that are there.
        """
        there = Counter(self.description)
        lacking = [name for name in names if name not in there] if tuple(names) != (ALL,) else []
        if lacking or not there:
            raise RecordingError(
                f"The recording has no events {listed(lacking)}; its events are {counted(there)}."
                if lacking
                else "The recording has no events.",
                "Name events that it has with --events, or give a table of events (--events FILE.tsv).",
            )
        if tuple(names) == (ALL,):
            return self
        return self[np.array([name in names for name in self.description], dtype=np.bool_)]


def events_of(raw: mne.io.BaseRaw) -> Events:
    """Return the events that the annotations of a recording name. Stretches marked bad and cuts are no events."""
    marks = raw.annotations
    onsets = time_of(marks.onset - raw.first_time, segments_of(raw), raw.info["sfreq"])
    names = [str(name) for name in marks.description]
    kept = [i for i, name in enumerate(names) if name != PAUSE and not name.casefold().startswith(NOT_EVENTS)]
    order = sorted(kept, key=lambda i: onsets[i])
    durations = tuple(f"{marks.duration[i]:g}" for i in order)
    return Events(
        onset=np.array([onsets[i] for i in order], dtype=np.float64),
        description=tuple(names[i] for i in order),
        columns={"duration": durations},
    )


def read_events(path: Path) -> Events:
    """Read a table of events: tab-separated, with the columns ``onset`` in seconds and ``trial_type``, as in BIDS.

    Raises
    ------
    RecordingError
        If the table is missing or has no such columns, or an onset is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, delimiter="\t")
            rows, header = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise RecordingError(f"The table of events {path} cannot be read ({e}).", "Give a tab-separated file.") from e
    if "onset" not in header or any(None in row or None in row.values() for row in rows):
        raise RecordingError(
            f"{path.name} is no table of events: its columns are {listed(header, 12) or 'none'}, and each row needs all of them.",
            "Give the columns onset (in seconds) and trial_type, separated by tabs.",
        )
    try:
        onsets = np.array([float(row["onset"]) for row in rows], dtype=np.float64)
    except ValueError as e:
        raise RecordingError(f"An onset in {path.name} is no number ({e}).", "Give every onset in seconds.") from e
    if not np.isfinite(onsets).all():
        raise RecordingError(f"An onset in {path.name} is not finite.", "Give every onset in seconds.")
    name = next((column for column in ("trial_type", "value", "description") if column in header), None)
    order = np.argsort(onsets, kind="stable")
    return Events(
        onset=onsets[order],
        description=tuple("event" if name is None else rows[i][name] for i in order),
        columns={column: tuple(rows[i][column] for i in order) for column in header if column not in ("onset", name)},
    )


def event_name(value: Any) -> str:
    """Return what an event is called that a marker tells by a text or a number: "7" for 7.0, every digit of a whole number."""
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def nearest_sample(seconds: ArrayLike, sfreq: float) -> NDArray[np.intp]:
    """Return the sample that is nearest to each time.

    Parameters
    ----------
    seconds : array_like
        Times in seconds after the first sample of a stretch without a pause.
    sfreq : float
        Rate in Hz.
    """
    return np.rint(np.asarray(seconds, dtype=np.float64) * sfreq).astype(np.intp)


def window_start(events: ArrayLike, sfreq: float, *, start: float, sfreq_model: float) -> NDArray[np.intp]:
    """Return the first sample of the window of each event at the model's rate.

    Parameters
    ----------
    events : array_like of int
        Samples of the source at which the events are, from the first sample of a stretch without a pause.
    sfreq, sfreq_model : float
        Rates of the source and of the model in Hz.
    start : float
        Start of the window in seconds after its event.

    Returns
    -------
    ndarray of int
        Samples at the model's rate from the first one of the stretch; negative where a window begins before the stretch.
    """
    at_event = np.rint(np.asarray(events, dtype=np.float64) * sfreq_model / sfreq)
    starts: NDArray[np.intp] = (at_event + np.rint(start * sfreq_model)).astype(np.intp)
    return starts
