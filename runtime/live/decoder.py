"""Decodes a live stream: every window gets a decision with a known age, or is counted as skipped or failed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import DecisionError, StreamError
from sjepa_deploy.runtime.backend import DEFAULT_BACKEND, BackendOptions, FloatArray
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.stored import check_bundle
from sjepa_deploy.runtime.live.callbacks import Callbacks
from sjepa_deploy.runtime.live.calls import BackendCalls
from sjepa_deploy.runtime.live.commands import BadChannels, Mark, Pause, Reply, Start, Status, Stop
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.event_names import EventNames, check_names
from sjepa_deploy.runtime.live.exchange import check_exchange
from sjepa_deploy.runtime.live.markers import MarkerSource
from sjepa_deploy.runtime.live.open_markers import open_markers
from sjepa_deploy.runtime.live.open_source import SourceOptions, open_source
from sjepa_deploy.runtime.live.places import Reason, Undecided
from sjepa_deploy.runtime.live.schedule import Events, Hop, Schedule
from sjepa_deploy.runtime.live.sources import Chunk, Incident, Source
from sjepa_deploy.runtime.live.waiting import Waiting
from sjepa_deploy.runtime.live.windows import Window, WindowStream
from sjepa_deploy.runtime.predictor import Predictor, load
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import RunPrecision, Unit

POLL_S = 0.1
"""Longest wait for samples in seconds, after which the decoder looks at signals and at the watchdog."""


class Decoder(Callbacks):
    """Decodes a stream: iterate over it, or register callbacks and call `run`.

    One decoder serves one stream in one thread. Several in one process share nothing but the predictor's weights, if even that.
    A backend that keeps the newest window is given new samples alone, see `StreamConfig.roll`.

    Parameters
    ----------
    predict : Predictor
        The model, from `sjepa_deploy.load`.
    source : Source
        The stream.
    config : StreamConfig
        The configuration of the decoder.
    decisions : DecisionLayer or None
        Layer that gives every decision a state. None leaves the outputs alone.
    schedule : Hop, Events or None
        When a window is decided: every hop, or once for each event. None decides every hop of `config`.
    markers : sequence of MarkerSource
        Where the events come from. The decoder closes them. Without `Events` they are only told, and recorded.
    monotonic : callable
        Clock of the watchdog in seconds.

    Attributes
    ----------
    counters : Counters
        Counts of what happened to every sample and every window.
    commands : Commands
        Takes commands from other threads, as `Pause` and `Mark`.
    paused : bool
        Whether windows get no decision until `Start`.
    run_id : str
        Name of this run, which nothing else has.
    events : Events or None
        The events that are decided. None where a window is decided every hop.
    event_names : EventNames
        Which events came, and which of those that are asked for did not.

    Raises
    ------
    StreamError
        If the stream breaks the model's contract.
    DecisionError
        If the decision layer is of another bundle, or waits for trials that nothing begins.

    Examples
    --------
    >>> with sjepa_deploy.Decoder.open("bundle", "lsl:type=EEG") as decoder:  # doctest: +SKIP
    ...     for decision in decoder:
    ...         print(decision.time, decision.prediction, decision.flags)
    """

    def __init__(
        self,
        predict: Predictor,
        source: Source,
        config: StreamConfig | None = None,
        *,
        decisions: DecisionLayer | None = None,
        schedule: Schedule | None = None,
        markers: Sequence[MarkerSource] = (),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or StreamConfig()
        if isinstance(schedule, Hop):
            config = dataclasses.replace(config, hop=schedule.seconds)
        events = schedule if isinstance(schedule, Events) else None
        if events is not None and not markers:
            raise StreamError("Events come from markers, and there are none.", "Name their source (--markers).")
        _check_layer(decisions, predict, at_events=events is not None)
        self.config, self.layer, self.events = config, decisions, events
        self.predict, self.source, self.spec = predict, source, predict.spec
        self.hop = self.config.hop_samples(self.spec.signal)
        self.deadline = self.config.deadline_s(self.spec.signal)
        super().__init__(source.clock, Counters())
        self.paused = False
        self.run_id = secrets.token_hex(8)
        self._markers = tuple(markers)
        self.event_names = EventNames(events)
        self._opened: Predictor | None = None
        self._stopping = False
        self.windows = WindowStream(
            self.spec.signal,
            source.info,
            self.config,
            counters=self.counters,
            report=self._report,
            schedule=events,
            undecided=self._tell_undecided,
        )
        self._waiting = Waiting(source.info.sfreq, self.deadline)
        self._calls = BackendCalls(
            predict,
            self.windows,
            self.config,
            clock=source.clock,
            counters=self.counters,
            report=self._report,
            waiting=self._waiting,
            layer=decisions,
            events=events,
        )
        self._monotonic = monotonic
        self._heard = monotonic()
        self._silent = False
        self._behind = 0
        self._eeg: FloatArray | None = None
        self._stop_at = math.inf
        take = self.commands.handle
        take(Status, lambda command, asked: self._status())
        take(Start, lambda command, asked: self._pause(False))
        take(Pause, lambda command, asked: self._pause(True))
        take(Stop, lambda command, asked: self._obey_stop())
        take(Mark, self._obey_mark)
        take(BadChannels, lambda command, asked: self._obey_bads(command))

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        source: str,
        config: StreamConfig | None = None,
        *,
        decisions: DecisionLayer | None = None,
        schedule: Schedule | None = None,
        markers: Sequence[str] = (),
        backend: str = DEFAULT_BACKEND,
        precision: RunPrecision | None = None,
        options: BackendOptions | None = None,
        unit: Unit | None = None,
        ch_names: Sequence[str] | None = None,
        rename: Sequence[str] = (),
        sfreq: float | None = None,
        successor: bool = False,
        speed: float = 1.0,
    ) -> Decoder:
        """Open a bundle and a stream. The backend loads before the stream is looked for.

        Parameters
        ----------
        bundle : Bundle, Path or str
            The model.
        source : str
            "lsl:NAME", "lsl:type=EEG", "file:RECORDING" or "synthetic", see `sjepa_deploy.runtime.live.open_source`.
        config : StreamConfig or None
            The configuration of the decoder.
        decisions : DecisionLayer or None
            Layer that gives every decision a state, see `DecisionLayer.load`.
        schedule : Hop, Events or None
            When a window is decided: every hop, or once for each event. None decides every hop of `config`.
        markers : sequence of str
            Where the events come from, see `sjepa_deploy.runtime.live.open_markers`. Empty: the annotations of a recording.
        backend, precision, options
            See `sjepa_deploy.load`.
        unit, ch_names, rename, sfreq, speed
            What the source does not say itself, see `sjepa_deploy.runtime.live.open_source.SourceOptions`. At infinite speed a
            hop of samples comes at once.

        Raises
        ------
        BundleError, BackendError
            If the bundle cannot be opened, or the backend cannot run it.
        StreamError
            If there is no such stream, it breaks the model's contract, or a recording lacks events of the schedule.
        RecordingError
            If the recording cannot be read.
        """
        config = config or StreamConfig()
        with contextlib.ExitStack() as opened:
            predict = opened.enter_context(load(bundle, backend=backend, precision=precision, options=options, check_unit=False))
            hop = dataclasses.replace(config, hop=schedule.seconds) if isinstance(schedule, Hop) else config
            chunk = hop.hop_samples(predict.spec.signal) if math.isinf(speed) else 1
            stream = open_source(
                source,
                predict.spec.signal,
                SourceOptions(
                    unit=unit, ch_names=ch_names, rename=rename, sfreq=sfreq, successor=successor, speed=speed, chunk=chunk
                ),
            )
            opened.callback(stream.close)
            opened_markers = open_markers(markers, stream) if markers or isinstance(schedule, Events) else ()
            for one in opened_markers:
                opened.callback(one.close)
            if isinstance(schedule, Events):
                check_names(schedule, opened_markers, stream.info.name)
            decoder = cls(predict, stream, config, decisions=decisions, schedule=schedule, markers=opened_markers)
            decoder._opened = predict
            opened.pop_all()
        return decoder

    @property
    def advice(self) -> str | None:
        """Return why the source makes decisions late, and which deadline suits it; None without such a cause."""
        return self._waiting.advice

    @property
    def silent(self) -> bool:
        """Return whether no samples have come for longer than `StreamConfig.silence`."""
        return self._silent

    @property
    def eeg(self) -> FloatArray:
        """Return the window of the decision that is told now, shape (1, n_chans, n_times). The next one overwrites it."""
        return self.windows.eeg(self._behind) if self._eeg is None else self._eeg

    def __iter__(self) -> Iterator[Decision]:
        """Give decisions until the source ends, or `stop` is called."""
        calls = self._calls
        poll = POLL_S if calls.keep_warm is None else min(POLL_S, calls.keep_warm.period / 2)
        try:
            while not self._stopping:
                chunk = self.source.read(poll)
                if self.source.incidents:
                    self._take_incidents()
                if chunk is not None:
                    self._heard = self._monotonic()
                    self._silent = False
                    yield from self.feed(chunk)
                elif self.source.ended:
                    break
                else:
                    yield from self._mark()
                    self._watch()
                    self._stopping |= self.source.clock() >= self._stop_at
                self.commands.execute_next(self.counters.samples)
                for turn in self._on_turn:
                    turn()
                self._tell_repeated()
                if calls.keep_warm is not None:
                    calls.fill_pause()
            yield from self._mark(ended=self.source.ended)
            yield from self._decide(self.windows.finish(), -math.inf)
        finally:
            for window in self.windows.finish():  # of a run that an error or the caller ended
                self.counters.failed += 1
                if window.event is not None:
                    self._tell_undecided(Undecided(window.event, "failed"))
            self.commands.close(self.counters.samples)
            self._tell_repeated(ending=True)

    def run(self) -> Counters:
        """Decode until the source ends or `stop` is called, for the callbacks alone."""
        for _ in self:
            pass
        return self.counters

    def stop(self) -> None:
        """End the iteration after the chunk at hand. May be called from a signal handler or another thread."""
        self._stopping = True

    def stop_after(self, seconds: float) -> None:
        """End the iteration `seconds` after the arrival of the first sample, with a whole chunk."""

        def look(chunk: Chunk) -> None:
            self._stop_at = min(self._stop_at, chunk.received + seconds)
            if chunk.received >= self._stop_at:
                self.stop()

        self.on_chunk(look)

    def note(self, kind: str, text: str) -> None:
        """Report an incident that another thread saw: the callbacks get it in the decoder's thread, with the next samples."""
        self.source.incidents.append(Incident(kind=kind, time=self.source.clock(), text=text))

    def swap(self, predict: Predictor, decisions: DecisionLayer | None = None) -> None:
        """Decide with another model from the next window on. To be called between two chunks, in the decoder's thread.

        Parameters
        ----------
        predict : Predictor
            The model, warmed up (`calls.warm_up`). The decoder closes it, as it closes now the one that `open` or `swap` gave it.
        decisions : DecisionLayer or None
            Layer of the new model. It starts anew.

        Raises
        ------
        StreamError
            If signal, classes or kind of output differ, or the backend cannot be called as the configuration asks.
        DecisionError
            If the layer is of another bundle, or waits for trials that nothing begins.
        """
        check_exchange(self.spec, predict.spec, self.layer, decisions)
        _check_layer(decisions, predict, at_events=self.events is not None)
        self._calls.swap(predict, decisions)
        last, self._opened = self._opened, predict
        self.predict, self.spec, self.layer = predict, predict.spec, decisions
        if last is not None:  # which takes milliseconds
            threading.Thread(target=last.close, name="close", daemon=True).start()
        self._report("bundle", f"{predict.bundle.path.name} ({predict.bundle.manifest.digest[:12]}) decides from here on.")

    def feed(self, chunk: Chunk) -> Iterator[Decision]:
        """Decode what `chunk` completes. The iterator does this for every chunk of the source."""
        self._waiting.chunk(len(chunk.stamps))
        yield from self._mark()
        yield from self._decide(self.windows.push(chunk), chunk.received)
        for markers in self._markers:
            markers.hear(chunk, self.windows.offset, self.windows.began)
        yield from self._mark()
        for take in self._on_chunk:
            take(chunk)

    def _mark(self, *, ended: bool = False) -> Iterator[Decision]:
        """Take the events whose markers have come, and decide those whose samples are there."""
        for markers in self._markers:
            events = markers.read()
            if ended:
                events += markers.rest()
            while markers.incidents:
                self._tell(dataclasses.replace(markers.incidents.popleft(), sample=self.counters.samples))
            if events:
                self.event_names.take(events)
                for event in events:
                    for take in self._on_event:
                        take(event)
                if self.events is not None:
                    yield from self._decide(self.windows.mark(events), -math.inf)
        if self._markers:
            n_lost = sum(markers.n_lost for markers in self._markers)
            if n_lost > self.counters.markers_lost:
                self._report("events", "Markers come faster than they are read: some were left out.")
            self.counters.markers_lost = n_lost
            if (lacking := self.event_names.lacking(self.source.clock())) is not None:
                self._report("events", lacking)

    def _decide(self, windows: Iterable[Window], received: float) -> Iterator[Decision]:
        together: list[tuple[Window, FloatArray]] = []
        for window in windows:
            if self.paused:
                self.counters.skipped_paused += 1
                if window.event is not None:
                    self._tell_undecided(Undecided(window.event, "paused"))
            elif self._calls.most_together == 1:
                self._behind, self._eeg = window.behind, None
                try:
                    answer = self._calls.decide(window, received)
                except BaseException:
                    self._tell_failed([window])
                    raise
                yield from self._give(window, answer)
            else:
                together.append((window, self.windows.eeg(window.behind)[0].copy()))
                if len(together) == self._calls.most_together:
                    yield from self._decide_together(together, received)
                    together.clear()
        if together:
            yield from self._decide_together(together, received)

    def _decide_together(self, together: list[tuple[Window, FloatArray]], received: float) -> Iterator[Decision]:
        windows = [window for window, _ in together]
        eeg = np.stack([eeg for _, eeg in together])
        try:
            answers = self._calls.decide_together(windows, eeg, received)
        except BaseException:
            self._tell_failed(windows)
            raise
        for i, (window, answer) in enumerate(zip(windows, answers, strict=True)):
            self._eeg = eeg[i : i + 1]
            yield from self._give(window, answer)

    def _tell_failed(self, windows: Sequence[Window]) -> None:
        for window in windows:
            if window.event is not None:
                self._tell_undecided(Undecided(window.event, "failed"))

    def _give(self, window: Window, answer: Decision | Reason) -> Iterator[Decision]:
        if isinstance(answer, Decision):
            for tell in self._on_decision:
                tell(answer)
            yield answer
        elif window.event is not None:
            self._tell_undecided(Undecided(window.event, answer))

    def close(self) -> None:
        """Release the source and the markers, and the backend if `open` or `swap` gave it. Commands that wait are refused."""
        self.commands.close(self.counters.samples)
        self.source.close()
        for markers in self._markers:
            markers.close()
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _status(self) -> Reply:
        bundle = self.predict.bundle
        data = {
            "time": self.source.clock(),
            "bundle": bundle.path.name,
            "digest": bundle.manifest.digest,
            "backend": self.predict.backend.name,
            "decisions": None if self.layer is None else self.layer.description.name,
            "source": self.source.info.name,
            "interpolated": encode(self.windows.interpolated),
            "counters": encode(self.counters),
        }
        return Reply(accepted=True, text="paused" if self.paused else "deciding", data=data)

    def _pause(self, paused: bool) -> Reply:
        was, self.paused = self.paused, paused
        return Reply(accepted=True, text=f"{'Already' if was == paused else 'Now'} {'paused' if paused else 'deciding'}.")

    def _obey_stop(self) -> Reply:
        self.stop()
        return Reply(accepted=True, text="The run ends.")

    def _obey_mark(self, mark: Mark, asked: float) -> Reply:
        self._tell_each(Incident(kind="mark", time=asked, text=mark.text, sample=self.counters.samples))
        return Reply(accepted=True, text=f"Marked at {asked:.3f} s.")

    def _obey_bads(self, command: BadChannels) -> Reply:
        self.windows.name_bads(command.names)
        return Reply(accepted=True, text=f"Named as bad: {', '.join(command.names) or 'none'}.")

    def _watch(self) -> None:
        """Look how long the source has been silent."""
        silent_for = self._monotonic() - self._heard
        if silent_for > self.config.silence and not self._silent:
            self._silent = True
            self.counters.silences += 1
            self._report("silent", f"No samples for {silent_for:.1f} s.")
        if self.config.give_up is not None and silent_for > self.config.give_up:
            raise StreamError(f"{self.source.info.name} has sent nothing for {silent_for:.0f} s.", "Check the amplifier.")

    def _take_incidents(self) -> None:
        self.counters.samples_flushed = self.source.n_flushed
        while self.source.incidents:
            self._tell(dataclasses.replace(self.source.incidents.popleft(), sample=self.counters.samples))


def _check_layer(decisions: DecisionLayer | None, predict: Predictor, *, at_events: bool) -> None:
    if decisions is None:
        return
    check_bundle(decisions.description, predict.bundle)
    if not at_events and any(step.trial_windows for step in decisions.description.steps):
        raise DecisionError(
            f"The decision layer {decisions.description.name} waits for trials, and windows every hop have none.",
            "Decide at events (--events, `schedule=Events(...)`), or fit it on windows of a stream (sjepa-decide --hop).",
        )
    decisions.restart()
