"""Reads streams of the Lab Streaming Layer, through pylsl, which runs on Python 3.10 and is thin over liblsl."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.names import parse_rename, renamed
from sjepa_deploy.eeg.units import unit_named
from sjepa_deploy.errors import MissingDependencyError, StreamError, listed
from sjepa_deploy.runtime.live.open_source import SourceOptions
from sjepa_deploy.runtime.live.sources import Chunk, Incident
from sjepa_deploy.spec import SignalSpec, Unit

MAX_CHUNK = 1024
"""Samples that are taken at once."""

BUFFER_S = 360
"""Seconds that liblsl keeps for a decoder that stalls; what is older is lost, and seen as a gap."""

CORRECT_EVERY_S = 5.0
"""Seconds from one look at the clock correction to the next; liblsl measures it in its own thread."""

LOOK_EVERY_S = 10.0
"""Seconds of silence after which the network is asked whether the stream is still there: a pulled cable ends no connection."""

ANSWER_S = 4.0
"""Seconds in which a stream that is there answers: without multicast, liblsl asks its known peers every 0.75 s and waits."""

FORMATS = ("of no type", "float32", "double64", "text", "int32", "int16", "int8", "int64")
"""Names of the sample types that LSL's `channel_format` numbers."""


def require_pylsl() -> Any:
    """Return the module `pylsl`.

    Raises
    ------
    MissingDependencyError
        If it is not installed, or has no liblsl for this machine.
    """
    try:
        import pylsl
    except (ImportError, RuntimeError) as error:  # RuntimeError: no liblsl
        raise MissingDependencyError("pylsl", "stream") from error
    return pylsl


def _queries(text: str) -> list[tuple[str, str]]:
    """Return "type=EEG,name=X", or a bare name, as pairs of property and value."""
    if "=" not in text:
        return [("name", text)]
    return [(key.strip(), value.strip()) for key, _, value in (part.partition("=") for part in text.split(","))]


def find_stream(text: str, timeout: float = 3.0) -> Any:
    """Return pylsl's description of the one stream that `text` names.

    Parameters
    ----------
    text : str
        A name, or "type=EEG", "source_id=...", "name=A,type=EEG".
    timeout : float
        Seconds to wait for it to appear.

    Raises
    ------
    StreamError
        If there is none, or more than one. The message lists what there is.
    """
    pylsl = require_pylsl()
    predicate = " and ".join(f"{key}={quoted(value)}" for key, value in _queries(text))
    found = pylsl.resolve_bypred(predicate, 1, timeout)
    if found:  # others of that name may answer a little later
        found = pylsl.resolve_bypred(predicate, 64, 1.0) or found
    if len(found) == 1:
        return found[0]
    if found:
        raise StreamError(
            f"{len(found)} LSL streams are {text}: {listed(map(_describe, found))}.",
            "Name one by `lsl:source_id=...`, or by name and type.",
        )
    others = pylsl.resolve_streams(1.0)
    there = f"the streams there are {listed(map(_describe, others))}" if others else "there are no streams at all"
    raise StreamError(f"There is no LSL stream {text}; {there}.", "Start the amplifier's app, or name one of these.")


def quoted(value: str) -> str:
    """Return `value` in the quotes that LSL's queries ask for."""
    if "'" in value and '"' in value:
        raise StreamError(f"{value} holds both kinds of quotes.", "Name the stream by another property.")
    return f'"{value}"' if "'" in value else f"'{value}'"


def _describe(info: Any) -> str:
    identity = f", source_id {info.source_id()}" if info.source_id() else ""
    return (
        f"{info.name()} ({info.type() or 'no type'}, {info.channel_count()} channels, {info.nominal_srate():g} Hz{identity}, "
        f"on {info.hostname()})"
    )


def read_info(
    info: Any, *, unit: Unit | None = None, ch_names: Sequence[str] | None = None, rename: Sequence[str] = ()
) -> StreamInfo:
    """Return the contract in a stream's full description.

    Parameters
    ----------
    info : pylsl.StreamInfo
        From an inlet, with the description of the channels.
    unit : {"nV", "uV", "mV", "V"} or None
        Unit of a stream that does not state it, or states a wrong one.
    ch_names : sequence of str or None
        Names of the channels of a stream that does not name them.
    rename : sequence of str
        "THEIRS=MINE": channels that get other names.

    Raises
    ------
    StreamError
        If names or the unit are missing, or the samples are text.
    """
    name, n_chans = info.name(), info.channel_count()
    if info.channel_format() == require_pylsl().cf_string:
        raise StreamError(f"Stream {name} sends text.", "Name a stream of samples.")
    labels, units = [], []
    channel = info.desc().child("channels").child("channel")
    for _ in range(n_chans):
        labels.append(channel.child_value("label"))
        units.append(channel.child_value("unit"))
        channel = channel.next_sibling("channel")
    if all(labels):
        names: Sequence[str] = labels
        if ch_names is not None and [n.casefold() for n in ch_names] != [n.casefold() for n in labels]:
            raise StreamError(f"Stream {name} names its channels itself: {listed(labels)}.", "Leave out `--channels`.")
    elif ch_names is None or len(ch_names) != n_chans:
        given = "" if ch_names is None else f", and {len(ch_names)} names were given"
        raise StreamError(
            f"Stream {name} does not name its {n_chans} channels{given}.", "Name them in their order with `--channels A,B,...`."
        )
    else:
        names = ch_names
    names = renamed(names, parse_rename(rename, StreamError), StreamError)
    stated = [unit_named(text) for text in units]
    known = [one for one in stated if one is not None]
    if unit is None and not known:
        words = sorted(set(filter(None, units)))
        why = (
            f"states units that are not one of nV, uV, mV and V: {listed(words)}"
            if words
            else "does not state the unit of its channels"
        )
        raise StreamError(f"Stream {name} {why}.", "State the unit with `--unit uV`, nV, mV or V.")
    its_own: Unit = max(known, key=known.count) if unit is None else unit
    other = () if unit else tuple(label for label, one in zip(names, stated, strict=True) if one != its_own)
    against = sorted({text for text, one in zip(units, stated, strict=True) if text and one != unit})
    notes = (f"taken as {unit}, by `--unit`, and not as {listed(against)}, as the stream states",) if unit and against else ()
    return StreamInfo(name=name, ch_names=tuple(names), sfreq=info.nominal_srate(), unit=its_own, other_units=other, notes=notes)


def changes(before: StreamInfo, now: StreamInfo) -> list[str]:
    """Return in words how a stream that came back differs from before. A note is no difference."""
    said = []
    if now.ch_names != before.ch_names:
        said.append(f"with the channels {listed(now.ch_names)} in place of {listed(before.ch_names)}")
    if now.sfreq != before.sfreq:
        said.append(f"at {now.sfreq:g} Hz in place of {before.sfreq:g} Hz")
    if now.unit != before.unit:
        said.append(f"in {now.unit} in place of {before.unit}")
    if now.other_units != before.other_units:
        said.append(
            f"with {listed(now.other_units) or 'no channel'} in another unit, before {listed(before.other_units) or 'none'}"
        )
    return said


class _NoAnswerError(StreamError):
    """A stream that is announced does not answer, as one that has just gone: it may be back soon."""


class LslSource:
    """Reads a stream of the Lab Streaming Layer.

    The source waits for single samples in liblsl (half a millisecond behind the sender), takes what has come, and puts the stamps
    on this machine's clock. Samples that waited before the first `read` are dropped and counted. A lost stream is looked for
    until it is back; it must then have the same contract and the same type of samples. A stream without a source_id is known by
    its outlet alone.

    Parameters
    ----------
    text : str
        See `find_stream`.
    unit, ch_names, rename
        See `read_info`.
    successor : bool
        Whether a lost stream without a source_id may be followed by another outlet that `text` names.
    timeout : float
        Seconds to wait for the stream to appear.
    """

    def __init__(
        self,
        text: str,
        *,
        unit: Unit | None = None,
        ch_names: Sequence[str] | None = None,
        rename: Sequence[str] = (),
        successor: bool = False,
        timeout: float = 3.0,
    ) -> None:
        self._pylsl = require_pylsl()
        self._text, self._unit, self._ch_names, self._rename = text, unit, ch_names, rename
        self.ended, self.live = False, True
        self.incidents: deque[Incident] = deque()
        self.n_flushed = 0
        self.clock: Callable[[], float] = self._pylsl.local_clock
        self._restarted = False
        self._inlet: Any = None
        self._resolver: Any = None  # looks for the stream in a thread of its own
        self._found = find_stream(text, timeout)
        self._source_id, self._successor = self._found.source_id(), successor
        self.info = self._open(self._found)

    def _open(self, found: Any) -> StreamInfo:
        # recover=True would hide a loss: no exception, seconds of silence, and the first second of the new stream lost.
        inlet = self._pylsl.StreamInlet(found, max_buflen=BUFFER_S, recover=False, processing_flags=0, as_numpy=True)
        try:
            info = read_info(inlet.info(5.0), unit=self._unit, ch_names=self._ch_names, rename=self._rename)
            inlet.open_stream(5.0)
            self._correction = inlet.time_correction(5.0)
        except (self._pylsl.util.TimeoutError, self._pylsl.util.LostError) as error:
            raise _NoAnswerError(f"{_describe(found)} does not answer ({error}).", "Check its app and the firewall.") from error
        self._inlet = inlet
        self._fresh = True
        self._correct_at = self.clock() + CORRECT_EVERY_S
        self._look_at = self.clock() + LOOK_EVERY_S
        return info

    def read(self, timeout: float) -> Chunk | None:
        """Return the samples that came; None if none came, or while the stream is being looked for."""
        if self._inlet is None:
            self._reconnect(timeout)
            return None
        if self._fresh:
            self._fresh = False
            if (n_old := self._inlet.flush()) > 0:
                self.n_flushed += n_old
                self.incidents.append(Incident(kind="flushed", time=self.clock(), text=f"{n_old} old samples dropped."))
        try:
            samples, stamps = self._inlet.pull_chunk(timeout, MAX_CHUNK, min_samples=1)
        except self._pylsl.util.LostError:
            self._lose("The stream was lost.")
            return None
        received = self.clock()
        if not len(stamps):
            if received > self._look_at:
                self._look()
            return None
        if received > self._correct_at:
            with contextlib.suppress(self._pylsl.util.TimeoutError, self._pylsl.util.LostError):  # the last one holds meanwhile
                self._correction = self._inlet.time_correction(0.01)
            self._correct_at = received + CORRECT_EVERY_S
        self._look_at, self._resolver = received + LOOK_EVERY_S, None
        restarted, self._restarted = self._restarted, False
        return Chunk(samples, stamps + self._correction, received, restarted, self._correction)

    def close(self) -> None:
        """Leave the stream."""
        if self._inlet is not None:
            self._inlet.close_stream()
            self._inlet = None
        self.ended = True

    def _predicate(self) -> str:
        if self._source_id:
            return f"source_id={quoted(self._source_id)} and name={quoted(self.info.name)}"
        return " and ".join(f"{key}={quoted(value)}" for key, value in _queries(self._text))

    def _answers(self) -> list[Any]:
        """Return the streams that have answered since they are looked for, the one that was lost first."""
        if self._resolver is None:
            self._resolver = self._pylsl.ContinuousResolver(pred=self._predicate())
        answers: list[Any] = self._resolver.results()
        return sorted(answers, key=lambda answer: answer.uid() != self._found.uid())

    def _look(self) -> None:
        """Ask whether a silent stream is still announced, and let it go if it does not answer."""
        if self._resolver is None:
            self._answers()
            self._look_at = self.clock() + ANSWER_S
            return
        if not self._answers():
            self._lose("The stream fell silent and is announced no more.")
        self._look_at, self._resolver = self.clock() + LOOK_EVERY_S, None

    def _lose(self, text: str) -> None:
        self.incidents.append(Incident(kind="lost", time=self.clock(), text=text))
        self._inlet = None

    def _reconnect(self, timeout: float) -> None:
        answers = self._answers()
        if not answers:
            time.sleep(timeout)
            return
        found, before = answers[0], self._found
        if not (self._source_id or self._successor or found.uid() == before.uid()):
            raise StreamError(
                f"{_describe(before)} was lost, and {_describe(found)} is another outlet of that name: without a source_id "
                "nothing says that it is the same amplifier.",
                "Give the stream a source_id, or let another one follow with `--successor`.",
            )
        try:
            info = self._open(found)
        except _NoAnswerError:
            self._inlet = self._resolver = None
            time.sleep(timeout)  # it was announced and is gone again
            return
        said = changes(self.info, info)
        if found.channel_format() != before.channel_format():
            was, now = FORMATS[before.channel_format()], FORMATS[found.channel_format()]
            said = [*said, f"with samples of another type ({now}, not {was})"]
        if said:
            raise StreamError(f"Stream {info.name} came back {' and '.join(said)}.", "Start the decoder anew with this stream.")
        self._found, self._restarted, self._resolver = found, True, None
        self.incidents.append(Incident(kind="reconnected", time=self.clock(), text="The stream is back."))


def open_lsl(text: str, _: SignalSpec, options: SourceOptions) -> LslSource:
    """Return the stream that `text` names, see `find_stream`."""
    return LslSource(text, unit=options.unit, ch_names=options.ch_names, rename=options.rename, successor=options.successor)
