"""Labels the events of a recording: with classes, with reaction times, or with a column of a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.pauses import number_of_segment, segments_of, time_of
from sjepa_deploy.errors import DataError, NoWindowsError, counted, listed
from sjepa_deploy.learning.data import Target

if TYPE_CHECKING:
    import mne


def reaction_times(raw: mne.io.BaseRaw, target: Target) -> list[tuple[float, float]]:
    """Return the onset of every stimulus that was answered before the next one, and the seconds to the answer.

    Onsets are in the recording's own time (`sjepa_deploy.eeg.pauses.segments_of`). No answer comes after a pause.

    Raises
    ------
    DataError
        If the task is not a regression. `NoWindowsError` if the recording lacks stimuli or responses of these names.
    """
    if target.task == "classification":
        raise DataError("Reaction times are numbers, not classes.", "Set the task to regression, or name --classes.")
    samples = raw.annotations.onset - raw.first_time  # MNE counts them from the start of the acquisition
    onsets, stretches = _onsets(raw), number_of_segment(samples, segments_of(raw), raw.info["sfreq"])
    names = [str(name) for name in raw.annotations.description]
    for wanted in (target.stimulus, target.response):
        if not set(wanted) & set(names):
            raise _without(wanted, names, "Name both by --stimulus and --response, or in the target's configuration.")
    answered: list[tuple[float, float]] = []
    stimulus: float | None = None
    before = -1
    for onset, name, stretch in sorted(zip(onsets.tolist(), names, stretches.tolist(), strict=True)):
        if stretch != before:
            stimulus, before = None, stretch
        if name in target.stimulus:
            stimulus = onset
        elif name in target.response and stimulus is not None:
            if onset - stimulus <= target.max_reaction_time:
                answered.append((stimulus, onset - stimulus))
            stimulus = None
    return answered


def class_events(raw: mne.io.BaseRaw, target: Target) -> list[tuple[float, str]]:
    """Return the onset and the class of every event that is of a class, in the order of their onsets.

    Onsets are in the recording's own time (`sjepa_deploy.eeg.pauses.segments_of`).

    Raises
    ------
    NoWindowsError
        If the recording has no such event.
    """
    names = [str(name) for name in raw.annotations.description]
    labelled = [(onset, target.class_of(name)) for onset, name in zip(_onsets(raw).tolist(), names, strict=True)]
    found = sorted((onset, label) for onset, label in labelled if label is not None)
    if not found:
        raise _without(tuple(target.events), names, "Name events of the recording by --classes CLASS=EVENT.")
    return found


def _onsets(raw: mne.io.BaseRaw) -> NDArray[np.float64]:
    """Return the onsets of a recording's annotations in seconds of its own time."""
    return time_of(raw.annotations.onset - raw.first_time, segments_of(raw), raw.info["sfreq"])


def _without(wanted: tuple[str, ...], names: list[str], mend: str) -> NoWindowsError:
    if not wanted:
        return NoWindowsError(
            f"No events were chosen; the recording has {counted(names)}.",
            "Choose classes by --classes, or reaction times by --stimulus and --response.",
        )
    return NoWindowsError(f"The recording has no events {listed(wanted)}; its events are {counted(names)}.", mend)


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a tab-separated file."""
    if not path.is_file():
        raise NoWindowsError(f"There is no table {path}.", "Check the target's `tsv`.")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def read_column(table: Path, target: Target) -> list[tuple[float, str]]:
    """Return the onset in seconds and the label of the rows of a table.

    Where the target names stimuli or classes, other rows are passed over.

    Raises
    ------
    DataError
        If the columns are missing, or an onset is no number. `NoWindowsError` if the table is missing, or has no such row.
    """
    rows = read_tsv(table)
    if not rows or target.column not in rows[0] or "onset" not in rows[0]:
        raise DataError(
            f"{table.name} has no columns onset and {target.column}.",
            f"It has {', '.join(rows[0] if rows else ()) or 'no rows'}.",
        )
    if target.stimulus:
        kept = [row for row in rows if row.get("trial_type") in target.stimulus]
        if not kept:
            raise _without(target.stimulus, [str(row.get("trial_type")) for row in rows], "Name --stimulus as in trial_type.")
        rows = kept
    try:
        labelled = [(float(row["onset"]), target.class_of(row[target.column])) for row in rows]
    except ValueError as e:
        raise DataError(f"An onset in {table.name} is no number ({e}).", "Give every onset in seconds.") from e
    found = [(onset, label) for onset, label in labelled if label is not None]
    if not found:
        raise _without(tuple(target.events), [row[target.column] for row in rows], "Name values of the column by --classes.")
    return found
