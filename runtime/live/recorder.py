"""Records a run in one XDF file, such that it can be decoded again. `sjepa_deploy.runtime.live.records` reads the file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

import sjepa_deploy
from sjepa_deploy.eeg import xdf_chunks
from sjepa_deploy.eeg.xdf import (
    CHUNKS_NAME,
    COMMANDS_NAME,
    DECISIONS_NAME,
    HEADS_NAME,
    INCIDENTS_NAME,
    MARKERS_NAME,
    UNDECIDED_NAME,
)
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.adapt import Adapter, HeadChange
from sjepa_deploy.runtime.live.commands import Executed, Load, Reply
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.places import Undecided
from sjepa_deploy.runtime.live.recorded_events import RecordedEvent, recorded_event
from sjepa_deploy.runtime.live.records import (
    CHUNKS,
    DECISIONS,
    EVENT_FIELDS,
    FIELDS,
    INCIDENTS,
    SAMPLES,
    RecordedUndecided,
    RunDescription,
    RunLabels,
)
from sjepa_deploy.runtime.live.sources import Chunk, Incident
from sjepa_deploy.runtime.live.states import columns_of
from sjepa_deploy.serialize import encode

FLUSH_S = 1.0
"""Seconds from one write to the next: what a kill can cost."""

MOST_PENDING_S = 60.0
"""Seconds of the run that wait for a disk that stalls; what is more is not recorded, and counted."""

LEAST_ROOM_S = 600.0
"""Seconds of recording for which a disk has room when that is told."""

_MARKERS, _COMMANDS, _UNDECIDED, _HEADS, _FIRST_MARKS = 5, 7, 8, 9, 16  # numbers of streams; streams of markers from 16 on
_TEXTS = {
    INCIDENTS: INCIDENTS_NAME,
    _MARKERS: MARKERS_NAME,
    _COMMANDS: COMMANDS_NAME,
    _UNDECIDED: UNDECIDED_NAME,
    _HEADS: HEADS_NAME,
}


class Recorder:
    """Writes a run in a thread of its own, once a second, so that a kill costs a second and a slow disk no decision.

    `record` registers its methods as callbacks of the decoder.

    Parameters
    ----------
    path : Path
        File to make; it must not exist.
    run : RunDescription
        Description that stands at the head of the record.
    n_outputs : int
        Values of a prediction.
    on_failure : callable
        Called with one sentence if the disk is nearly full, or takes no more: then decoding goes on, and recording does not.
    patient : bool
        Whether a slow disk is waited for, as for a recording that is decoded as fast as possible.

    Attributes
    ----------
    path : Path
        The file.
    n_bytes : int
        Size of the file.
    n_lost : dict of str to int
        Samples, decisions, and incidents, events and commands that are not in the file: of a disk that was full, or stalled for a
        minute.

    Raises
    ------
    StreamError
        If the file exists, or cannot be made.
    """

    def __init__(
        self,
        path: Path,
        run: RunDescription,
        n_outputs: int,
        on_failure: Callable[[str], object],
        *,
        patient: bool = False,
    ) -> None:
        self.path = path
        self._run, self._n_outputs, self._on_failure, self._patient = run, n_outputs, on_failure, patient
        self._streams = [SAMPLES, CHUNKS, DECISIONS, *_TEXTS]
        self._marks: dict[str, int] = {}  # numbers of the streams of markers
        self._most_pending = round(MOST_PENDING_S * run.stream.sfreq)
        self._chunks: deque[Chunk] = deque()
        self._decisions: deque[tuple[Decision, int, float]] = deque()
        self._told: deque[Incident | RecordedEvent | RecordedUndecided | Executed | HeadChange] = deque()
        self._n_events = 0
        self._numbers: dict[int, tuple[int, Event]] = {}  # of the events that wait for their decision, by their identity
        self._n_taken = self._n_written = self.n_bytes = 0
        self.n_lost = {"samples": 0, "decisions": 0, "events": 0}
        self._dtype: np.dtype[Any] | None = None
        self._failed = self._has_little_room = False
        self._began = time.monotonic()
        try:
            self._file = path.open("xb", buffering=0)
        except FileExistsError:
            raise StreamError(f"{path} exists.", "Choose another --record: a record is never overwritten.") from None
        except OSError as e:
            raise StreamError(f"{path} cannot be written ({e.strerror}).", "Choose another --record.") from e
        self._write(xdf_chunks.file_start())
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="recorder", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Return whether the disk took no more, so that nothing is recorded any longer."""
        return self._failed

    def chunk(self, chunk: Chunk) -> None:
        """Record samples."""
        if self._takes("samples", len(chunk.stamps)):
            self._n_taken += len(chunk.stamps)
            self._chunks.append(chunk)

    def decision(self, decision: Decision, offset: float = 0.0) -> None:
        """Record a decision; `offset` is the seconds in its time that bring stamps to the source's clock."""
        number = self._number_of(decision.event)
        if self._takes("decisions"):
            self._decisions.append((decision, number, offset))

    def incident(self, incident: Incident) -> None:
        """Record an incident."""
        if self._takes("events"):
            self._told.append(incident)

    def head(self, change: HeadChange) -> None:
        """Record a change of the last layer."""
        if self._takes("events"):
            self._told.append(change)

    def event(self, event: RecordedEvent) -> None:
        """Record an event."""
        if self._takes("events"):
            self._told.append(event)
            if self._run.schedule is not None and self._run.schedule.wants(event.event.description):
                self._numbers[id(event.event)] = self._n_events, event.event
            self._n_events += 1

    def undecided(self, left: Undecided) -> None:
        """Record that an event gets no decision."""
        number = self._number_of(left.event)
        if self._takes("events") and number >= 0:
            self._told.append(RecordedUndecided(event=number, reason=left.reason, arrived=left.event.arrived))

    def command(self, executed: Executed) -> None:
        """Record a command and whether it was accepted; of the data of the answer only which bundle decides now."""
        if self._takes("events"):
            data = executed.reply.data if isinstance(executed.command, Load) else {}
            reply = Reply(accepted=executed.reply.accepted, text=executed.reply.text, data=data)
            self._told.append(
                Executed(command=executed.command, reply=reply, asked=executed.asked, time=executed.time, sample=executed.sample)
            )

    def _number_of(self, event: Event | None) -> int:
        """Return the number of an event, which has its decision now; -1 if there is none in the file."""
        return self._numbers.pop(id(event), (-1, None))[0]

    def _takes(self, what: str, n: int = 1) -> bool:
        """Return whether there is room for more, or count it."""
        while self._patient and not self._failed and self._is_behind():
            self._hurry.set()
            time.sleep(0.001)
        if self._failed or self._is_behind():
            self.n_lost[what] += n
            return False
        return True

    def _is_behind(self) -> bool:
        return self._n_taken - self._n_written > self._most_pending

    def close(self) -> None:
        """Write what is left and the footers, and bring the file to the disk. A record without a sample is removed."""
        self._stop.set()
        self._hurry.set()
        self._thread.join()
        self._flush(ending=True)
        if self._dtype is not None:
            self._write(b"".join(xdf_chunks.stream_footer(i) for i in (*self._streams, *self._marks.values())))
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()
        if self._dtype is None and self.path.is_file():  # not a device
            self.path.unlink()

    def _keep_writing(self) -> None:
        while not self._stop.is_set():
            self._hurry.wait(FLUSH_S)
            self._hurry.clear()
            self._flush()
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
                self._watch_room()

    def _watch_room(self) -> None:
        """Tell once when the disk has room for ten minutes at the rate so far."""
        elapsed = time.monotonic() - self._began
        if self._patient or self._has_little_room or elapsed < 10 * FLUSH_S:
            return
        seconds = shutil.disk_usage(self.path.parent).free / (self.n_bytes / elapsed)
        if seconds < LEAST_ROOM_S:
            self._has_little_room = True
            self._on_failure(f"The disk of the record has room for {seconds / 60:.0f} minutes more.")

    def _flush(self, *, ending: bool = False) -> None:
        chunks, decisions, told = _drained(self._chunks), _drained(self._decisions), _drained(self._told)
        if not ending:  # a decision is handed over before its samples, and is written after them
            newest = chunks[-1].received if chunks else -math.inf
            early = [each for each in decisions if each[0].received > newest]
            decisions = [each for each in decisions if not each[0].received > newest]
            self._decisions.extendleft(reversed(early))
        n = sum(len(chunk.stamps) for chunk in chunks)
        if self._failed:
            self._count_lost(n, len(decisions), len(told))
            return
        parts = []
        if chunks and self._dtype is None:
            self._dtype = chunks[0].samples.dtype.newbyteorder("<")
            self._write(self._headers())  # on a disk that is full already, a record without samples is still one
        if self._dtype is None:
            self._told.extendleft(reversed(told))  # until the type of the samples is known
            return
        if chunks:
            values = np.concatenate([chunk.samples for chunk in chunks]).astype(self._dtype)
            parts.append(xdf_chunks.samples(SAMPLES, np.concatenate([chunk.stamps for chunk in chunks]), values))
            # The stamps are on this machine's clock already. pyxdf warns of a stream that has stamps and no offset.
            parts += [xdf_chunks.clock_offset(i, chunks[-1].received, 0.0) for i in (*self._streams, *self._marks.values())]
            facts = np.array([[len(chunk.stamps), chunk.received, chunk.restarted, chunk.correction] for chunk in chunks])
            parts.append(xdf_chunks.samples(CHUNKS, facts[:, 1], facts))
        if decisions:
            parts.append(self._rows(decisions))
        for each in told:
            parts += self._texts(each)
        if parts:
            parts.append(xdf_chunks.boundary())
            self._write(b"".join(parts))
        self._n_written += n
        if self._failed:
            self._count_lost(n, len(decisions), len(told))

    def _rows(self, decisions: list[tuple[Decision, int, float]]) -> bytes:
        names = self._run.class_names
        rows = [
            [float(getattr(d, name)) for name in FIELDS[:-1]]
            + [float(len(d.bad_channels)), *d.prediction.ravel().tolist(), *columns_of(d, names), float(number), offset]
            for d, number, offset in decisions
        ]
        return xdf_chunks.samples(DECISIONS, np.array([d.time for d, _, _ in decisions]), np.array(rows))

    def _texts(self, what: Incident | RecordedEvent | RecordedUndecided | Executed | HeadChange) -> list[bytes]:
        told = json.dumps(encode(what))
        if isinstance(what, Incident):
            return [xdf_chunks.text(INCIDENTS, what.time, told)]
        if isinstance(what, Executed):
            return [xdf_chunks.text(_COMMANDS, what.time, told)]
        if isinstance(what, HeadChange):
            return [xdf_chunks.text(_HEADS, what.time, told)]
        if isinstance(what, RecordedUndecided):
            return [xdf_chunks.text(_UNDECIDED, what.arrived, told)]
        event, parts = what.event, [xdf_chunks.text(_MARKERS, what.event.arrived, told)]
        if not math.isnan(event.onset):
            stamp = event.onset - what.offset
            if event.stream not in self._marks:
                stream = self._marks[event.stream] = _FIRST_MARKS + len(self._marks)
                parts.append(xdf_chunks.stream_header(stream, event.stream, "Markers", 1))
                parts.append(xdf_chunks.clock_offset(stream, stamp, 0.0))
            parts.append(xdf_chunks.text(self._marks[event.stream], stamp, event.description))
        return parts

    def _count_lost(self, n_samples: int, n_decisions: int, n_events: int) -> None:
        for what, n in (("samples", n_samples), ("decisions", n_decisions), ("events", n_events)):
            self.n_lost[what] += n

    def _headers(self) -> bytes:
        assert self._dtype is not None
        stream, run, double = self._run.stream, self._run, np.dtype("<f8")
        channels = [(name, "Misc", "") if name in stream.other_units else (name, "EEG", stream.unit) for name in stream.ch_names]
        fields = "".join(f"<field>{name}</field>" for name in FIELDS)
        described = f"<fields>{fields}</fields><run>{escape(json.dumps(encode(run)))}</run>"
        n_columns = len(FIELDS) + self._n_outputs + len(run.state_fields) + len(run.event_fields)
        header = xdf_chunks.stream_header
        return b"".join(
            (
                header(SAMPLES, stream.name, "EEG", len(channels), sfreq=stream.sfreq, dtype=self._dtype, channels=channels),
                header(CHUNKS, CHUNKS_NAME, "Chunks", 4, dtype=double),
                header(DECISIONS, DECISIONS_NAME, "Decision", n_columns, dtype=double, described=described),
                *(header(i, name, "Markers", 1) for i, name in _TEXTS.items()),
            )
        )

    def _write(self, data: bytes) -> None:
        if self._failed:
            return
        whole = self._file.seek(0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            self.n_bytes = whole + len(data)
        except OSError as e:
            self._failed = True
            with contextlib.suppress(OSError):
                self._file.truncate(whole)  # a file that ends within a chunk is harder to read
            why = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else e.strerror
            self._on_failure(f"Recording ended: {why}.")


def describe_run(decoder: Decoder, labels: RunLabels | None = None, adapter: Adapter | None = None) -> RunDescription:
    """Return the description of the run of `decoder`, which `adapter` adapts."""
    bundle, backend = decoder.predict.bundle, decoder.predict.backend
    layer = None if decoder.layer is None else decoder.layer.description
    return RunDescription(
        stream=decoder.source.info,
        config=decoder.config,
        bundle=str(bundle.path),
        bundle_digest=bundle.manifest.digest,
        backend=backend.name,
        precision=backend.precision,
        version=sjepa_deploy.__version__,
        decisions=None if layer is None else layer.name,
        decisions_digest=None if layer is None else layer.digest,
        class_names=() if layer is None else layer.class_names or (),
        schedule=decoder.events,
        run_id=decoder.run_id,
        labels=labels,
        event_fields=EVENT_FIELDS,
        adapt=None if adapter is None else adapter.config,
    )


def record(decoder: Decoder, path: Path, labels: RunLabels | None = None, *, adapter: Adapter | None = None) -> Recorder:
    """Record the run of `decoder` in `path` from now on. Close the recorder after the run.

    Parameters
    ----------
    decoder : Decoder
        Its decisions wait for the disk only where its source does (`Source.live` is False).
    path : Path
        File to make; it must not exist.
    labels : RunLabels or None
        Whose run it is, in a session.
    adapter : Adapter or None
        What adapts the decoder. Its changes of the last layer are recorded.
    """
    recorder = Recorder(
        path,
        describe_run(decoder, labels, adapter),
        math.prod(decoder.spec.output_shape),
        lambda why: decoder.note("record", why),
        patient=not decoder.source.live,
    )
    decoder.on_chunk(recorder.chunk)
    decoder.on_decision(lambda decision: recorder.decision(decision, decoder.windows.offset))
    decoder.on_incident(recorder.incident)
    decoder.on_event(lambda event: recorder.event(recorded_event(decoder, event)))
    decoder.on_undecided(recorder.undecided)
    decoder.on_command(recorder.command)
    if adapter is not None:
        adapter.on_change(recorder.head)
    return recorder


def _drained(queue: deque[Any]) -> list[Any]:
    return [queue.popleft() for _ in range(len(queue))]
