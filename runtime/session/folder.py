"""Names the records of the runs of a session, in a folder laid out as LabRecorder lays out its own.

FOLDER/sub-S/ses-L/eeg/sub-S_ses-L_task-T_run-N_eeg.xdf
"""

from __future__ import annotations

import datetime
import re
import shutil
from pathlib import Path

from sjepa_deploy.errors import OutputError, RecordingError
from sjepa_deploy.runtime.live.adapt import Adapter
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.recorder import Recorder, record
from sjepa_deploy.runtime.live.records import Record, RunLabels, read_record

_LABEL = re.compile(r"[0-9A-Za-z]+")
_RUN = re.compile(r"_run-(\d+)_eeg\.xdf$")

BYTES_BESIDE = 40
"""Bytes of a sample in a record beside its values: its stamp, and its share of decisions and chunks."""


def run_labels(folder: Path, *, subject: str, task: str, run: int | None = None, session: str | None = None) -> RunLabels:
    """Return the labels of a run that begins now.

    Parameters
    ----------
    folder : Path
        Folder of the experiment.
    subject, task, session : str
        Labels of letters and digits, as BIDS asks for. `session` may be None.
    run : int or None
        Number of the run. None is the one after the last one in the folder.

    Raises
    ------
    OutputError
        If a label has other characters, or the run is there.
    """
    for what, label in (("subject", subject), ("task", task), ("session", session)):
        if label is not None and not _LABEL.fullmatch(label):
            raise OutputError(f"The {what} {label!r} is no label of BIDS.", "Use letters and digits alone.")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    labels = RunLabels(subject=subject, task=task, run=run or 1, session=session, started=started)
    path = run_path(folder, labels)
    runs = [int(found[1]) for file in path.parent.glob("*.xdf") if (found := _RUN.search(file.name)) and _same(file, path)]
    if run is None:
        return RunLabels(subject=subject, task=task, run=max(runs, default=0) + 1, session=session, started=started)
    if run < 1:
        raise OutputError(f"Run {run} cannot be.", "Count runs from 1 on.")
    if run in runs:
        raise OutputError(f"{path} is there already: a run is never recorded over.", f"Use --run {max(runs) + 1}.")
    return labels


def _same(file: Path, other: Path) -> bool:
    """Return whether two files are of runs of one task."""
    return file.name.partition("_run-")[0] == other.name.partition("_run-")[0]


def run_path(folder: Path, labels: RunLabels) -> Path:
    """Return the file of a run."""
    parts = [f"sub-{labels.subject}", *([f"ses-{labels.session}"] if labels.session else [])]
    name = "_".join([*parts, f"task-{labels.task}", f"run-{labels.run}", "eeg.xdf"])
    return folder.joinpath(*parts, "eeg", name)


def record_run(decoder: Decoder, folder: Path, labels: RunLabels, *, adapter: Adapter | None = None) -> Recorder:
    """Record the run of `decoder` in the folder of an experiment from now on. Close the recorder after the run.

    Raises
    ------
    OutputError
        If the folder cannot be made.
    StreamError
        If the run is there, or cannot be written.
    """
    path = run_path(folder, labels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{path.parent} cannot be made ({e.strerror}).", "Choose another --session.") from e
    return record(decoder, path, labels, adapter=adapter)


def room(decoder: Decoder, folder: Path) -> tuple[float, float]:
    """Return the free bytes of the disk of a folder, and the seconds of the stream of `decoder` for which they are enough.

    Values of 8 bytes are assumed.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = float(shutil.disk_usage(there).free)
    info = decoder.source.info
    return free, free / (info.sfreq * (8 * len(info.ch_names) + BYTES_BESIDE))


def runs_of(path: Path) -> list[Path]:
    """Return the records of a folder in the order of their names, or the one that `path` is.

    Raises
    ------
    RecordingError
        If there is none.
    """
    files = [path] if path.is_file() else sorted(path.glob("sub-*/**/*_eeg.xdf"), key=_order)
    if not files:
        raise RecordingError(f"{path} holds no runs.", "Give a folder that sjepa-stream --session made.")
    return files


def _order(file: Path) -> tuple[str, int]:
    """Return by what runs are sorted: the tenth comes after the ninth."""
    found = _RUN.search(file.name)
    return (file.name[: found.start()], int(found[1])) if found else (file.name, 0)


def read_run(path: Path) -> Record:
    """Read the record of a run.

    Raises
    ------
    RecordingError
        If it is no record of a session.
    """
    found = read_record(path)
    if found.run.labels is None:
        raise RecordingError(f"{path.name} does not say whose run it is.", "Give a record of sjepa-stream --session.")
    return found
