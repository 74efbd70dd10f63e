"""Exports recorded runs to BIDS: the samples with events by MNE-BIDS, and the decisions as a derivative."""

from __future__ import annotations

import csv
import datetime
import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sjepa_deploy
from sjepa_deploy.eeg.montage import require_mne
from sjepa_deploy.eeg.quality import REASONS, ChannelQuality, ChannelState
from sjepa_deploy.eeg.readers import heard, reading
from sjepa_deploy.eeg.units import volts_in
from sjepa_deploy.eeg.xdf import read_placed
from sjepa_deploy.errors import MissingDependencyError, OutputError
from sjepa_deploy.files import write_atomically
from sjepa_deploy.runtime.decisions.state import STATES
from sjepa_deploy.runtime.live.commands import BadChannels
from sjepa_deploy.runtime.live.records import Record, RecordedDecision
from sjepa_deploy.runtime.session.folder import read_run
from sjepa_deploy.serialize import encode

PIPELINE = "sjepa-deploy"
"""Folder of the decisions under ``derivatives``."""

MOST_BAD = 0.5
"""Share of a run in which a channel must be bad for its status to be so."""

_NOT_THERE = "n/a"
_OUTPUT = "output_"

_COLUMNS = {
    "window_end": "Newest sample of the window, in seconds as onset.",
    "decided_after": "Seconds from the newest sample of the window to the decision.",
    "state": "State of the decision layer; no decision where an event has none.",
    "class": "Class that the decision layer gives.",
    "probability": "Probability of this class, or the value of a regression.",
    "reason": "Why an event has no decision.",
    "held": "Whether the decision repeats the last one, as its window was late.",
    "bridged": "Whether lost samples of the window were interpolated.",
    "n_bad_channels": "Channels that were bad somewhere in the window.",
}
"""Columns of the decisions. The onset is that of the event, or of the newest sample where windows were decided every hop."""


def export_run(path: Path, root: Path, *, with_date: bool = True, force: bool = False) -> list[str]:
    """Write the record of one run into a BIDS folder, which is made if it is not there.

    The samples go to ``sub-S/[ses-L/]eeg`` as BrainVision, which MNE-BIDS advises, in 32-bit floats. events.tsv holds the events
    of all streams of markers, channels.tsv which channels were bad. The decisions go to ``derivatives/sjepa-deploy``. Of the
    person there is the subject's label alone.

    Parameters
    ----------
    path : Path
        Record of `sjepa-stream --session`.
    root : Path
        BIDS folder.
    with_date : bool
        Whether scans.tsv tells when the run began.
    force : bool
        Whether a run that is there is replaced.

    Returns
    -------
    notes : list of str
        What people should know: samples that are missing, channels that were left out or bad.

    Raises
    ------
    RecordingError
        If it is no record of a session, or its samples cannot be read.
    OutputError
        If the run is in the BIDS folder already.
    MissingDependencyError
        If MNE, MNE-BIDS or pybv is not installed.
    """
    require_mne()
    for package in ("mne_bids", "pybv"):  # MNE-BIDS writes BrainVision with pybv
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "eeg")
    import mne_bids

    record = read_run(path)
    labels = record.run.labels
    assert labels is not None
    notes: list[str] = []
    with reading(path.name):
        raw, place = read_placed(path, None, None, notes)
    raw.info["temp"] = None
    if with_date:
        raw.set_meas_date(datetime.datetime.fromisoformat(labels.started))
    bids = mne_bids.BIDSPath(
        root=root, subject=labels.subject, session=labels.session, task=labels.task, run=str(labels.run), datatype="eeg"
    )
    target = bids.copy().update(suffix="eeg", extension=".vhdr").fpath
    if target.exists() and not force:
        raise OutputError(f"{target} is there already.", "Use --force to replace it, or another folder.")
    with heard(notes):
        bids = mne_bids.write_raw_bids(raw, bids, format="BrainVision", allow_preload=True, overwrite=force, verbose="error")
        # MNE-BIDS names the maker of the format; who made the amplifier, a stream does not tell
        sidecar = bids.copy().update(suffix="eeg", extension=".json")
        mne_bids.update_sidecar_json(sidecar, {"Manufacturer": _NOT_THERE}, verbose="error")
        if bads := bad_channels(record):
            names, why = list(bads), list(bads.values())
            mne_bids.mark_channels(bids, ch_names=names, status="bad", descriptions=why, verbose="error")
            notes.append("bad channels: " + ", ".join(f"{name} ({reason})" for name, reason in bads.items()))
        folder = root / "derivatives" / PIPELINE
        _describe(mne_bids, folder)
    name = bids.copy().update(suffix=None, extension=None).basename + "_desc-decisions_events"
    parts = [f"sub-{labels.subject}", *([f"ses-{labels.session}"] if labels.session else []), "eeg"]
    beside = folder.joinpath(*parts, name)
    beside.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(beside.with_suffix(".tsv"), _table(decision_rows(record, place)).encode())
    write_atomically(beside.with_suffix(".json"), (json.dumps(_description(record), indent=1) + "\n").encode())
    return notes


def bad_channels(record: Record) -> dict[str, str]:
    """Return which channels were bad in more than half of a run, with the reason: as the user named them, or by the signal.

    The rule is that of live decoding (`sjepa_deploy.eeg.quality`), over blocks of half a second.
    """
    stream = record.run.stream
    eeg = [i for i, name in enumerate(stream.ch_names) if name not in stream.other_units]
    named = set(record.run.config.bads)
    for one in record.commands:
        if isinstance(one.command, BadChannels) and one.reply.accepted:
            named = {*record.run.config.bads, *one.command.names}
    quality = ChannelQuality(len(eeg), stream.sfreq, 1 / volts_in(stream.unit))
    verdicts: list[NDArray[np.int8]] = []
    for chunk in record.chunks:
        samples = chunk.samples[:, eeg].astype(np.float64)
        while len(samples):
            n = min(quality.room, len(samples))
            if quality.take(samples[:n]):
                codes = quality.codes.copy()
                codes[~np.isfinite(samples[:n]).all(axis=0)] = ChannelState.NAN
                verdicts.append(codes)
            samples = samples[n:]
    codes_of = np.array(verdicts, dtype=np.int8).reshape(-1, len(eeg))
    found = {}
    for i, column in zip(eeg, codes_of.T, strict=True):
        name = stream.ch_names[i]
        share = float(np.mean(column != ChannelState.OK)) if len(column) else 0.0
        if name.casefold() in {each.casefold() for each in named}:
            found[name] = "named as bad"
        elif share > MOST_BAD:
            worst = ChannelState(int(np.bincount(column[column != ChannelState.OK]).argmax()))
            found[name] = f"{REASONS[worst]} in {share:.0%} of the run"
    return found


def decision_rows(record: Record, place: Any) -> list[dict[str, Any]]:
    """Return a row for each decision, and for each event without one, in the order of onsets.

    Parameters
    ----------
    record : Record
        The run.
    place : callable
        Places stamps in the recording, see `sjepa_deploy.eeg.xdf.read_placed`.
    """
    at = place(np.array([one.event.onset - one.offset for one in record.events], dtype=np.float64))
    newest = place(np.array([row.time - row.offset for row in record.rows], dtype=np.float64))
    rows = []
    for row, end in zip(record.rows, newest.tolist(), strict=True):
        event = {} if row.event is None else {"onset": at[row.event], "trial_type": record.events[row.event].event.description}
        rows.append({"onset": end, "trial_type": "window", "window_end": end} | event | _decided(row, record.run.class_names))
    for left in record.undecided:
        what = record.events[left.event].event.description
        rows.append({"onset": at[left.event], "trial_type": what, "state": "no decision", "reason": left.reason})
    return sorted(rows, key=lambda row: (math.isnan(row["onset"]), row["onset"]))


def _decided(row: RecordedDecision, class_names: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"decided_after": row.decided - row.time, "held": row.held, "bridged": row.bridged}
    found["n_bad_channels"] = row.n_bad_channels
    if row.state is not None:
        state, number, probability = row.state.numbers
        found["state"] = STATES[int(state)]
        found["class"] = class_names[int(number)] if number >= 0 else None
        found["probability"] = None if math.isnan(probability) else probability
    return found | {f"output_{i}": value for i, value in enumerate(row.prediction.tolist())}


def _table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table of BIDS."""
    there = {key for row in rows for key in row}
    outputs = sorted((key for key in there if key.startswith(_OUTPUT)), key=lambda key: int(key.removeprefix(_OUTPUT)))
    columns = ["onset", "duration", "trial_type", *(name for name in _COLUMNS if name in there), *outputs]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(_cell(({"duration": 0.0} | row).get(column)) for column in columns)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _NOT_THERE
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _description(record: Record) -> dict[str, Any]:
    """Return what the columns mean, and which bundle and decision layer decided."""
    run = record.run
    columns: dict[str, Any] = {name: {"Description": text} for name, text in _COLUMNS.items()}
    for name in ("window_end", "decided_after"):
        columns[name]["Units"] = "s"
    n_outputs = record.rows[0].prediction.size if record.rows else 0
    columns |= {f"{_OUTPUT}{i}": {"Description": "Output of the model."} for i in range(n_outputs)}
    kept = ("bundle_digest", "backend", "precision", "version", "decisions", "decisions_digest", "class_names", "schedule")
    told = {"bundle": Path(run.bundle).name} | {name: encode(getattr(run, name)) for name in kept}
    return columns | {PIPELINE: told | {"config": encode(run.config)}}


def _describe(mne_bids: Any, folder: Path) -> None:
    """Write the description of the derivative, if it is not there."""
    if (folder / "dataset_description.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    mne_bids.make_dataset_description(
        path=folder,
        name="Decisions of live decoding",
        dataset_type="derivative",
        generated_by=[{"Name": PIPELINE, "Version": sjepa_deploy.__version__}],
        source_datasets=[{"URL": "../.."}],
        verbose="error",
    )
