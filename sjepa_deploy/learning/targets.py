"""Labels the events of a recording: with reaction times, or with a column of a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from sjepa_deploy.eeg.pauses import number_of_segment, segments_of, time_of
from sjepa_deploy.errors import DataError
from sjepa_deploy.learning.data import Target

if TYPE_CHECKING:
    import mne


def reaction_times(raw: mne.io.BaseRaw, target: Target) -> list[tuple[float, float]]:
    """Return the onset of every stimulus that was answered before the next one, and the seconds to the answer.

    Onsets are in the recording's own time (`sjepa_deploy.eeg.pauses.segments_of`). No answer comes after a pause.

    Raises
    ------
    DataError
        If the recording lacks stimuli or responses of these names, or the task is not a regression.
    """
    if target.task == "classification":
        raise DataError("Reaction times are numbers, not classes.", "Set the task to regression, or name a column.")
    segments, sfreq = segments_of(raw), raw.info["sfreq"]
    samples = raw.annotations.onset - raw.first_time  # MNE counts them from the start of the acquisition
    onsets, stretches = time_of(samples, segments, sfreq), number_of_segment(samples, segments, sfreq)
    names = [str(name) for name in raw.annotations.description]
    for wanted in (target.stimulus, target.response):
        if not wanted or not set(wanted) & set(names):
            there = ", ".join(sorted(set(names))) or "none"
            raise DataError(
                f"The recording has no events {' or '.join(wanted) or '(none was named)'}; its events are {there}.",
                "Name both by --stimulus and --response, or in the target's configuration.",
            )
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


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a tab-separated file."""
    if not path.is_file():
        raise DataError(f"There is no table {path}.", "Check the target's `tsv`.")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def read_column(table: Path, target: Target) -> list[tuple[float, str]]:
    """Return the onset in seconds and the label of every row of a table, or of those with one of the target's stimuli.

    Raises
    ------
    DataError
        If the table or its columns are missing, or an onset is no number.
    """
    rows = read_tsv(table)
    if not rows or target.column not in rows[0] or "onset" not in rows[0]:
        raise DataError(
            f"{table.name} has no columns onset and {target.column}.",
            f"It has {', '.join(rows[0] if rows else ()) or 'no rows'}.",
        )
    if target.stimulus:
        rows = [row for row in rows if row.get("trial_type") in target.stimulus]
    try:
        return [(float(row["onset"]), row[target.column]) for row in rows]
    except ValueError as e:
        raise DataError(f"An onset in {table.name} is no number ({e}).", "Give every onset in seconds.") from e
