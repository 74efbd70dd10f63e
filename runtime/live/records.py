"""Describes the record of a run, and reads it: samples as received, decisions, events, commands, incidents."""

from __future__ import annotations

import math
import struct
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.xdf import COMMANDS_NAME, HEADS_NAME, MARKERS_NAME, UNDECIDED_NAME, load_xdf
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.files import load_json
from sjepa_deploy.runtime.live.adapt import AdaptConfig, HeadChange
from sjepa_deploy.runtime.live.commands import Executed
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.places import Reason
from sjepa_deploy.runtime.live.recorded_events import RecordedEvent
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.live.sources import Chunk, Incident
from sjepa_deploy.runtime.live.states import STATE_FIELDS, RecordedState, recorded_state
from sjepa_deploy.serialize import decode
from sjepa_deploy.spec import RunPrecision

SAMPLES, CHUNKS, DECISIONS, INCIDENTS = 1, 2, 3, 4
"""Numbers of the streams that every record has; the others are known by their names."""

FIELDS = ("index", "due", "received", "decided", "infer_s", "held", "bridged", "n_bad_channels")
"""Columns of a decision in a record, before the outputs."""

EVENT_FIELDS = ("event", "offset")
"""Columns behind the outputs and the state: number of the event among all, or -1, and the seconds in `time` that bring the stamp
of the newest sample to the source's clock."""


@dataclass(frozen=True, kw_only=True)
class RunLabels:
    """Says whose run of which session it is, by the labels that the user gives.

    Attributes
    ----------
    subject, task : str
        Letters and digits.
    run : int
        Number of the run, from 1 on.
    session : str or None
        Letters and digits; None where there is one session.
    started : str
        When the recording began: ISO 8601, in UTC.
    """

    subject: str
    task: str
    run: int
    session: str | None
    started: str


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """Says what was decoded, with which model and backend, and how.

    Attributes
    ----------
    stream : StreamInfo
        The source's contract.
    config : StreamConfig
        How it was decoded.
    bundle, bundle_digest : str
        The bundle's path, and the digest of its manifest.
    backend, precision : str
        What ran it.
    version : str
        Release of sjepa-deploy.
    decisions, decisions_digest : str or None
        Name and digest of the decision layer. None without a layer.
    class_names : tuple of str
        Classes of the decision layer in the order of their numbers.
    schedule : Events or None
        Events that were decided; None where a window was decided every hop.
    run_id : str
        Name of the run. Empty in records of 0.1.
    labels : RunLabels or None
        Whose run it is. None outside of a session.
    event_fields : tuple of str
        `EVENT_FIELDS`; none in records of 0.1.
    adapt : AdaptConfig or None
        How the last layer was adapted. None where it was not.
    """

    stream: StreamInfo
    config: StreamConfig
    bundle: str
    bundle_digest: str
    backend: str
    precision: RunPrecision
    version: str
    decisions: str | None = None
    decisions_digest: str | None = None
    class_names: tuple[str, ...] = ()
    schedule: Events | None = None
    run_id: str = ""
    labels: RunLabels | None = None
    event_fields: tuple[str, ...] = ()
    adapt: AdaptConfig | None = None

    @property
    def state_fields(self) -> tuple[str, ...]:
        """Return the columns of the state of a decision."""
        return () if self.decisions is None else STATE_FIELDS


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedDecision:
    """Holds a decision of a record.

    Attributes
    ----------
    index, time, due, received, decided, infer_s, held, bridged, prediction
        See `Decision`.
    n_bad_channels : int
        Channels that were bad somewhere in the window.
    state : RecordedState or None
        What the decision layer said.
    event : int or None
        Number of its event among `Record.events`.
    offset : float
        Seconds in `time` that bring the stamp of the newest sample to the source's clock.
    """

    index: int
    time: float
    due: float
    received: float
    decided: float
    infer_s: float
    held: bool
    bridged: bool
    n_bad_channels: int
    prediction: NDArray[np.float32]
    state: RecordedState | None = None
    event: int | None = None
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RecordedUndecided:
    """Says that an event got no decision.

    Attributes
    ----------
    event : int
        Number of the event among `Record.events`.
    reason : Reason
        Why.
    arrived : float
        When its marker came.
    """

    event: int
    reason: Reason
    arrived: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """Holds a recorded run.

    Attributes
    ----------
    path : Path
        The file.
    run : RunDescription
        Description of the run.
    chunks : list of Chunk
        Samples as they were received.
    rows : list of RecordedDecision
        Every decision in order, also the held ones.
    n_cut_off : int
        Decisions at the end whose samples a kill kept from the file. These are not among `rows`.
    incidents : list of Incident
        What happened.
    events : list of RecordedEvent
        Events whose markers came, in this order.
    undecided : list of RecordedUndecided
        Events that got no decision, where events were decided.
    commands : list of Executed
        Commands that the decoder answered.
    heads : list of HeadChange
        Changes of the last layer, where it was adapted.
    """

    path: Path
    run: RunDescription
    chunks: list[Chunk]
    rows: list[RecordedDecision]
    n_cut_off: int
    incidents: list[Incident]
    events: list[RecordedEvent]
    undecided: list[RecordedUndecided]
    commands: list[Executed]
    heads: list[HeadChange]

    @property
    def decisions(self) -> dict[int, NDArray[np.float32]]:
        """Return the prediction of each window that was decoded, shape (n_outputs,), without those that repeat another."""
        return {row.index: row.prediction for row in self.rows if not row.held}

    @property
    def stamps(self) -> dict[int, float]:
        """Return the stamp of the newest sample of each of these windows."""
        return {row.index: row.time for row in self.rows if not row.held}

    @property
    def n_held(self) -> int:
        """Return the number of windows that were answered by the last decision."""
        return sum(row.held for row in self.rows)

    @property
    def states(self) -> list[RecordedState]:
        """Return the states of all decisions in order, if there was a decision layer."""
        return [row.state for row in self.rows if row.state is not None]


def read_record(path: Path) -> Record:
    """Read a record, whole or cut short by a kill.

    Raises
    ------
    RecordingError
        If it is no record of `sjepa-stream`.
    MissingDependencyError
        If pyxdf is not installed.
    """
    if not path.is_file():
        raise RecordingError(f"There is no record {path}.", "Check the path.")
    try:
        streams = load_xdf(path, synchronize=False)
        by_id = {stream["info"]["stream_id"]: stream for stream in streams}
        texts = {stream["info"]["name"][0]: stream["time_series"] for stream in streams}
        described = load_json(by_id[DECISIONS]["info"]["desc"][0]["run"][0], finite=False)
        described["config"].setdefault("interpolate_share", 1.0)  # records of 0.1 made any number of channels
        run = decode(RunDescription, described)
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise RecordingError(
            f"{path.name} is no record of sjepa-stream ({type(error).__name__}: {error}).", "Give a file made by --record."
        ) from error
    chunks = _chunks_of(by_id)
    last_received = chunks[-1].received if chunks else -math.inf
    decided = [
        _decision_of(row, float(stamp), run)
        for row, stamp in zip(
            np.asarray(by_id[DECISIONS]["time_series"], np.float64), by_id[DECISIONS]["time_stamps"], strict=True
        )
    ]
    rows = [row for row in decided if not row.received > last_received]
    n_cut_off = sum(not row.held for row in decided) - sum(not row.held for row in rows)

    def stored(name: str) -> list[Any]:
        return [load_json(text[0], finite=False) for text in texts.get(name, ())]

    return Record(
        path=path,
        run=run,
        chunks=chunks,
        rows=rows,
        n_cut_off=n_cut_off,
        incidents=[decode(Incident, load_json(text[0], finite=False)) for text in by_id[INCIDENTS]["time_series"]],
        events=[decode(RecordedEvent, each) for each in stored(MARKERS_NAME)],
        undecided=[decode(RecordedUndecided, each) for each in stored(UNDECIDED_NAME)],
        commands=[decode(Executed, each) for each in stored(COMMANDS_NAME)],
        heads=[decode(HeadChange, each) for each in stored(HEADS_NAME)],
    )


def _chunks_of(by_id: dict[int, dict[str, Any]]) -> list[Chunk]:
    samples, stamps = np.asarray(by_id[SAMPLES]["time_series"]), np.asarray(by_id[SAMPLES]["time_stamps"])
    chunks, start = [], 0
    for n, received, restarted, *correction in by_id[CHUNKS]["time_series"]:  # without a correction in records of 0.1
        stop = start + int(n)
        if stop > len(stamps):
            break
        chunks.append(Chunk(samples[start:stop], stamps[start:stop], float(received), bool(restarted), *map(float, correction)))
        start = stop
    return chunks


def _decision_of(row: NDArray[np.float64], stamp: float, run: RunDescription) -> RecordedDecision:
    values = row.tolist()
    fields = dict(zip(FIELDS, values, strict=False))
    of_event = len(values) - len(run.event_fields)
    of_state = of_event - len(run.state_fields)
    more = dict(zip(run.event_fields, values[of_event:], strict=True))
    number = int(more.get("event", -1))
    return RecordedDecision(
        index=int(fields["index"]),
        time=stamp,
        due=fields["due"],
        received=fields["received"],
        decided=fields["decided"],
        infer_s=fields["infer_s"],
        held=bool(fields["held"]),
        bridged=bool(fields["bridged"]),
        n_bad_channels=int(fields["n_bad_channels"]),
        prediction=row[len(FIELDS) : of_state].astype(np.float32),
        state=recorded_state(fields, values[of_state:of_event], stamp) if run.state_fields else None,
        event=None if number < 0 else number,
        offset=more.get("offset", 0.0),
    )


class RecordSource:
    """Hands out the samples of a record in the chunks in which they were received."""

    def __init__(self, record: Record) -> None:
        self.info = record.run.stream
        self.incidents: deque[Incident] = deque()
        self.n_flushed, self.live = 0, False
        self._chunks = iter(record.chunks)
        self._now = 0.0
        self.ended = not record.chunks

    def read(self, timeout: float) -> Chunk | None:
        """Return the next chunk."""
        chunk = next(self._chunks, None)
        if chunk is None:
            self.ended = True
        else:
            self._now = chunk.received
        return chunk

    def clock(self) -> float:
        """Return the time at which the last chunk was received."""
        return self._now

    def close(self) -> None:
        """Release nothing."""
