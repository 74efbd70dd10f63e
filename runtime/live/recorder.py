"""Records a run in one XDF file, such that it can be decoded again: samples as received, decisions, incidents."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

import sjepa_deploy
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.xdf import CHUNKS_NAME, DECISIONS_NAME, INCIDENTS_NAME, MARKERS_NAME, load_xdf
from sjepa_deploy.errors import RecordingError, StreamError
from sjepa_deploy.files import load_json
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.recorded_events import RecordedEvent
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.live.sources import Chunk, Incident
from sjepa_deploy.runtime.live.states import STATE_FIELDS, RecordedState, columns_of, recorded_state
from sjepa_deploy.serialize import decode, encode
from sjepa_deploy.spec import RunPrecision

FLUSH_S = 1.0
"""Seconds from one write to the next: what a kill can cost."""

MOST_PENDING_S = 60.0
"""Seconds of the run that wait for a disk that stalls; what is more is not recorded, and counted."""

_SAMPLES, _CHUNKS, _DECISIONS, _EVENTS, _MARKERS, _MARKS = 1, 2, 3, 4, 5, 6  # stream ids
_FILE_HEADER, _STREAM_HEADER, _SAMPLES_TAG, _CLOCK_OFFSET, _BOUNDARY, _FOOTER = 1, 2, 3, 4, 5, 6  # tags of XDF 1.0
_BOUNDARY_UUID = bytes.fromhex("43a546dccbf5410fb30ed5467383cbe4")
_FORMATS = {"f4": "float32", "f8": "double64", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64"}
_TEXTS = (INCIDENTS_NAME, MARKERS_NAME, "events")
_FIELDS = ("index", "due", "received", "decided", "infer_s", "held", "bridged", "n_bad_channels")


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

    @property
    def n_state_fields(self) -> int:
        """Return the number of columns behind the outputs in a record."""
        return 0 if self.decisions is None else len(STATE_FIELDS)

    @property
    def n_streams(self) -> int:
        """Return the number of streams in the file."""
        return _EVENTS if self.schedule is None else _MARKS


class Recorder:
    """Writes a run in a thread of its own, once a second, so that a kill costs a second and a slow disk no decision.

    Register `chunk`, `decision` and `incident` as callbacks of the decoder.

    Parameters
    ----------
    path : Path
        File to make; it must not exist.
    run : RunDescription
        Description that stands at the head of the record.
    n_outputs : int
        Values of a prediction.
    on_failure : callable
        Called with one sentence if the disk is full, or takes no more; decoding goes on, recording does not.
    patient : bool
        Whether a slow disk is waited for, as for a recording that is decoded as fast as possible.

    Attributes
    ----------
    n_lost : dict of str to int
        Samples, decisions, and incidents and events that are not in the file: of a disk that was full, or stalled for a minute.

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
        self._path = path
        self._run, self._n_outputs, self._on_failure, self._patient = run, n_outputs, on_failure, patient
        self._streams = range(_SAMPLES, run.n_streams + 1)
        self._most_pending = round(MOST_PENDING_S * run.stream.sfreq)
        self._chunks: deque[Chunk] = deque()
        self._decisions: deque[Decision] = deque()
        self._incidents: deque[Incident] = deque()
        self._marked: deque[RecordedEvent] = deque()
        self._n_taken = self._n_written = 0
        self.n_lost = {"samples": 0, "decisions": 0, "events": 0}
        self._dtype: np.dtype[Any] | None = None
        self._failed = False
        try:
            self._file = path.open("xb", buffering=0)
        except FileExistsError:
            raise StreamError(f"{path} exists.", "Choose another --record: a record is never overwritten.") from None
        except OSError as e:
            raise StreamError(f"{path} cannot be written ({e.strerror}).", "Choose another --record.") from e
        self._write(b"XDF:" + _xdf_chunk(_FILE_HEADER, b'<?xml version="1.0"?><info><version>1.0</version></info>'))
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="recorder", daemon=True)
        self._thread.start()

    def chunk(self, chunk: Chunk) -> None:
        """Record samples."""
        if self._takes("samples", len(chunk.stamps)):
            self._n_taken += len(chunk.stamps)
            self._chunks.append(chunk)

    def decision(self, decision: Decision) -> None:
        """Record a decision."""
        if self._takes("decisions"):
            self._decisions.append(decision)

    def incident(self, incident: Incident) -> None:
        """Record an incident."""
        if self._takes("events"):
            self._incidents.append(incident)

    def event(self, event: RecordedEvent) -> None:
        """Record an event."""
        if self._takes("events"):
            self._marked.append(event)

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
            footer = b'<?xml version="1.0"?><info/>'
            self._write(b"".join(_xdf_chunk(_FOOTER, struct.pack("<I", i) + footer) for i in self._streams))
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()
        if self._dtype is None and self._path.is_file():  # not a device
            self._path.unlink()

    def _keep_writing(self) -> None:
        while not self._stop.is_set():
            self._hurry.wait(FLUSH_S)
            self._hurry.clear()
            self._flush()
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def _flush(self, *, ending: bool = False) -> None:
        chunks, decisions, incidents = _drained(self._chunks), _drained(self._decisions), _drained(self._incidents)
        marked = _drained(self._marked)
        if not ending:  # a decision is handed over before its samples, and is written after them
            newest = chunks[-1].received if chunks else -math.inf
            early = [decision for decision in decisions if decision.received > newest]
            decisions = [decision for decision in decisions if not decision.received > newest]
            self._decisions.extendleft(reversed(early))
        n = sum(len(chunk.stamps) for chunk in chunks)
        if self._failed:
            self._count_lost(n, len(decisions), len(incidents) + len(marked))
            return
        parts = []
        if chunks and self._dtype is None:
            self._dtype = chunks[0].samples.dtype.newbyteorder("<")
            self._write(self._headers())  # on a disk that is full already, a record without samples is still one
        if self._dtype is None:
            self._incidents.extendleft(reversed(incidents))  # until the type of the samples is known
            self._marked.extendleft(reversed(marked))
            return
        if chunks:
            values = np.concatenate([chunk.samples for chunk in chunks]).astype(self._dtype)
            parts.append(_xdf_samples(_SAMPLES, np.concatenate([chunk.stamps for chunk in chunks]), values))
            # The stamps are on this machine's clock already. pyxdf warns of a stream that has stamps and no offset.
            offsets = (struct.pack("<Idd", stream, chunks[-1].received, 0.0) for stream in self._streams)
            parts.extend(_xdf_chunk(_CLOCK_OFFSET, offset) for offset in offsets)
            facts = np.array([[len(chunk.stamps), chunk.received, chunk.restarted, chunk.correction] for chunk in chunks])
            parts.append(_xdf_samples(_CHUNKS, facts[:, 1], facts))
        if decisions:
            names = self._run.class_names
            rows = [
                [float(getattr(d, name)) for name in _FIELDS[:-1]]
                + [float(len(d.bad_channels)), *d.prediction.ravel().tolist(), *columns_of(d, names)]
                for d in decisions
            ]
            parts.append(_xdf_samples(_DECISIONS, np.array([d.time for d in decisions]), np.array(rows)))
        parts.extend(_xdf_text(_EVENTS, e.time, json.dumps(encode(e))) for e in incidents)
        for one in marked:
            parts.append(_xdf_text(_MARKERS, one.event.arrived, json.dumps(encode(one))))
            if not math.isnan(one.event.onset):
                parts.append(_xdf_text(_MARKS, one.event.onset - one.offset, one.event.description))
        if parts:
            parts.append(_xdf_chunk(_BOUNDARY, _BOUNDARY_UUID))
            self._write(b"".join(parts))
        self._n_written += n
        if self._failed:
            self._count_lost(n, len(decisions), len(incidents) + len(marked))

    def _count_lost(self, n_samples: int, n_decisions: int, n_events: int) -> None:
        for what, n in (("samples", n_samples), ("decisions", n_decisions), ("events", n_events)):
            self.n_lost[what] += n

    def _headers(self) -> bytes:
        assert self._dtype is not None
        stream = self._run.stream
        channels = "".join(
            f"<channel><label>{escape(name)}</label><type>EEG</type><unit>{stream.unit}</unit></channel>"
            for name in stream.ch_names
        )
        run = escape(json.dumps(encode(self._run)))
        n = len(stream.ch_names)
        fields = "".join(f"<field>{name}</field>" for name in _FIELDS)
        return b"".join(
            (
                _xdf_header(_SAMPLES, stream.name, "EEG", n, stream.sfreq, _FORMATS[self._dtype.str[1:]], channels=channels),
                _xdf_header(_CHUNKS, CHUNKS_NAME, "Chunks", 4, 0, "double64"),
                _xdf_header(
                    _DECISIONS,
                    DECISIONS_NAME,
                    "Decision",
                    len(_FIELDS) + self._n_outputs + self._run.n_state_fields,
                    0,
                    "double64",
                    rest=f"<fields>{fields}</fields><run>{run}</run>",
                ),
                *(_xdf_header(i, name, "Markers", 1, 0, "string") for i, name in zip(self._streams[3:], _TEXTS, strict=False)),
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
        except OSError as e:
            self._failed = True
            with contextlib.suppress(OSError):
                self._file.truncate(whole)  # a file that ends within a chunk is harder to read
            why = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else e.strerror
            self._on_failure(f"Recording ended: {why}.")


def describe_run(decoder: Decoder) -> RunDescription:
    """Return the description of the run of `decoder`."""
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
    )


def record(decoder: Decoder, path: Path) -> Recorder:
    """Record the run of `decoder` in `path` from now on. Close the recorder after the run.

    Parameters
    ----------
    decoder : Decoder
        Its decisions wait for the disk only where its source does (`Source.live` is False).
    path : Path
        File to make; it must not exist.
    """
    recorder = Recorder(
        path,
        describe_run(decoder),
        math.prod(decoder.spec.output_shape),
        lambda why: decoder.note("record", why),
        patient=not decoder.source.live,
    )
    decoder.on_chunk(recorder.chunk)
    decoder.on_decision(recorder.decision)
    decoder.on_incident(recorder.incident)
    decoder.on_event(
        lambda event: recorder.event(
            RecordedEvent(event=event, n_samples=decoder.counters.samples, offset=decoder.windows.offset)
        )
    )
    return recorder


def _drained(queue: deque[Any]) -> list[Any]:
    return [queue.popleft() for _ in range(len(queue))]


def _xdf_chunk(tag: int, content: bytes) -> bytes:
    return b"\x08" + struct.pack("<QH", len(content) + 2, tag) + content


def _xdf_header(
    stream: int, name: str, kind: str, n: int, sfreq: float, fmt: str, *, channels: str = "", rest: str = ""
) -> bytes:
    xml = (
        f'<?xml version="1.0"?><info><name>{escape(name)}</name><type>{kind}</type><channel_count>{n}</channel_count>'
        f"<nominal_srate>{sfreq!r}</nominal_srate><channel_format>{fmt}</channel_format>"
        f"<desc><channels>{channels}</channels>{rest}</desc></info>"
    )
    return _xdf_chunk(_STREAM_HEADER, struct.pack("<I", stream) + xml.encode())


def _xdf_samples(stream: int, stamps: NDArray[np.float64], values: NDArray[Any]) -> bytes:
    rows = np.empty(len(stamps), np.dtype([("n", "u1"), ("stamp", "<f8"), ("values", values.dtype, (values.shape[1],))]))
    rows["n"], rows["stamp"], rows["values"] = 8, stamps, values
    return _xdf_chunk(_SAMPLES_TAG, struct.pack("<IBI", stream, 4, len(rows)) + rows.tobytes())


def _xdf_text(stream: int, stamp: float, text: str) -> bytes:
    data = text.encode()
    return _xdf_chunk(_SAMPLES_TAG, struct.pack("<IBIBdBI", stream, 4, 1, 8, stamp, 4, len(data)) + data)


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
    decisions : dict of int to ndarray of float32
        Prediction of each window that was decoded, shape (n_outputs,), without those that repeat another.
    stamps : dict of int to float
        Stamp of the newest sample of each of these windows.
    n_held : int
        Windows answered by the last decision.
    n_cut_off : int
        Decisions at the end whose samples a kill kept from the file. These are not among `decisions`.
    incidents : list of Incident
        What happened.
    states : list of RecordedState
        Every decision in order, also the held ones, if there was a decision layer.
    events : list of RecordedEvent
        Events whose markers came, in this order.
    """

    path: Path
    run: RunDescription
    chunks: list[Chunk]
    decisions: dict[int, NDArray[np.float32]]
    stamps: dict[int, float]
    n_held: int
    n_cut_off: int
    incidents: list[Incident]
    states: list[RecordedState]
    events: list[RecordedEvent]


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
        by_id = {stream["info"]["stream_id"]: stream for stream in load_xdf(path, synchronize=False)}
        described = load_json(by_id[_DECISIONS]["info"]["desc"][0]["run"][0], finite=False)
        described["config"].setdefault("interpolate_share", 1.0)  # records of 0.1 made any number of channels
        run = decode(RunDescription, described)
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise RecordingError(
            f"{path.name} is no record of sjepa-stream ({type(error).__name__}: {error}).", "Give a file made by --record."
        ) from error
    samples, stamps = np.asarray(by_id[_SAMPLES]["time_series"]), np.asarray(by_id[_SAMPLES]["time_stamps"])
    chunks, start = [], 0
    for n, received, restarted, *correction in by_id[_CHUNKS]["time_series"]:  # without a correction in records of 0.1
        stop = start + int(n)
        if stop > len(stamps):
            break
        chunks.append(Chunk(samples[start:stop], stamps[start:stop], float(received), bool(restarted), *map(float, correction)))
        start = stop
    decisions, times, n_held, n_cut_off = {}, {}, 0, 0
    states: list[RecordedState] = []
    n_fields, n_more = len(_FIELDS), run.n_state_fields
    last_received = chunks[-1].received if chunks else -math.inf
    rows = np.asarray(by_id[_DECISIONS]["time_series"], np.float64)
    for row, stamp in zip(rows, by_id[_DECISIONS]["time_stamps"], strict=True):
        fields = dict(zip(_FIELDS, row.tolist(), strict=False))
        cut_off = fields["received"] > last_received
        if n_more and not cut_off:
            states.append(recorded_state(fields, row[-n_more:].tolist(), float(stamp)))
        if fields["held"]:
            n_held += 1
            continue
        if cut_off:
            n_cut_off += 1
            continue
        decisions[int(row[0])] = row[n_fields : len(row) - n_more].astype(np.float32)
        times[int(row[0])] = float(stamp)
    incidents = [decode(Incident, load_json(text[0], finite=False)) for text in by_id[_EVENTS]["time_series"]]
    marked = by_id[_MARKERS]["time_series"] if run.schedule is not None else ()
    return Record(
        path=path,
        run=run,
        chunks=chunks,
        decisions=decisions,
        stamps=times,
        n_held=n_held,
        n_cut_off=n_cut_off,
        incidents=incidents,
        states=states,
        events=[decode(RecordedEvent, load_json(text[0], finite=False)) for text in marked],
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
