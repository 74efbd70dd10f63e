"""The decoder: a stream in, decisions with a known age out, and nothing silent."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import RefusedError, StreamError, UnansweredError
from sjepa_deploy.runtime.backend import DEFAULT_BACKEND, BackendOptions
from sjepa_deploy.runtime.keep_warm import KeepWarm
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.sources import Chunk, Incident, Source
from sjepa_deploy.runtime.live.windows import Window, WindowStream
from sjepa_deploy.runtime.predictor import Predictor, load
from sjepa_deploy.spec import RunPrecision

N_WARM_UP = 20
"""Calls of the backend before the stream is read, so that no decision pays for buffers and caches."""

POLL_S = 0.1
"""Longest wait for samples, after which signals and the watchdog are looked at."""


class Decoder:
    """Decodes a stream: iterate over it, or register callbacks and call `run`.

    One decoder serves one stream in one thread. Several in one process share nothing but the predictor's weights, if even that.
    Where the predictor rolls, of a window that follows the last one decoded the new samples alone are handed to it.

    Parameters
    ----------
    predict : Predictor
        The model, from `sjepa_deploy.load`.
    source : Source
        The stream.
    config : StreamConfig
        How to decode it.
    monotonic : callable
        Clock of the watchdog in seconds.

    Attributes
    ----------
    counters : Counters
        What happened to every sample and every window.

    Raises
    ------
    StreamError
        If the stream breaks the model's contract.

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
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config or StreamConfig()
        self.predict, self.source, self.spec = predict, source, predict.spec
        self.hop = self.config.hop_samples(self.spec)
        self.deadline = self.hop / self.spec.sfreq if self.config.deadline is None else self.config.deadline
        self.counters = Counters()
        self._on_decision: list[Callable[[Decision], object]] = []
        self._on_chunk: list[Callable[[Chunk], object]] = []
        self._on_incident: list[Callable[[Incident], object]] = []
        self.windows = WindowStream(
            self.spec,
            source.info,
            hop=self.hop,
            counters=self.counters,
            report=self._report,
            interpolate=self.config.interpolate,
            bads=self.config.bads,
            bad_channels=self.config.bad_channels,
            bridge=self.config.bridge,
            max_jitter=self.config.max_jitter,
        )
        self._opened: Predictor | None = None
        self._monotonic = monotonic
        self._heard = monotonic()
        self._silent = self._stopping = False
        self._last: Decision | None = None
        window = self.windows.eeg().copy()
        against = self._against_rolling()
        if self.config.roll and against is not None:
            raise against
        self._rolls = self.config.roll is not False and against is None
        self._rolled: tuple[int, int] | None = None  # the last window decoded, and the predictor's count of calls then
        calls = [partial(predict, window)]
        if self._rolls:
            calls += [partial(predict.roll, window[0, :, :n].copy()) for n in (self.spec.n_times, self.hop)]
        for call in calls:
            for _ in range(N_WARM_UP):
                call()
        self._keep_warm: KeepWarm | None = None
        if self.config.keep_warm is not None and not self.config.keep_warm > 0:
            raise StreamError(f"A keep_warm of {self.config.keep_warm:g} s is none.", "Use a positive time, such as 0.005.")
        if self.config.keep_warm is not None:
            self._keep_warm = KeepWarm(lambda: predict(window), self.config.keep_warm)
        self._called = time.perf_counter()

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        source: str,
        config: StreamConfig | None = None,
        *,
        backend: str = DEFAULT_BACKEND,
        precision: RunPrecision | None = None,
        options: BackendOptions | None = None,
    ) -> Decoder:
        """Open a bundle and a stream.

        Parameters
        ----------
        bundle : Bundle, Path or str
            The model.
        source : str
            "lsl:NAME", "lsl:type=EEG", "file:RECORDING" or "synthetic", see `sjepa_deploy.runtime.live.open_source`.
        config : StreamConfig or None
            How to decode.
        backend, precision, options
            See `sjepa_deploy.load`.
        """
        from sjepa_deploy.runtime.live.open_source import open_source

        predict = load(bundle, backend=backend, precision=precision, options=options, check_unit=False)
        stream: Source | None = None
        try:
            stream = open_source(source, predict.spec)
            decoder = cls(predict, stream, config)
            decoder._opened = predict
            return decoder
        except BaseException:
            if stream is not None:
                stream.close()
            predict.close()
            raise

    def on_decision(self, callback: Callable[[Decision], object]) -> None:
        """Call `callback` with every decision, before the iterator gives it."""
        self._on_decision.append(callback)

    def on_chunk(self, callback: Callable[[Chunk], object]) -> None:
        """Call `callback` with every chunk of samples, after its decisions."""
        self._on_chunk.append(callback)

    def on_incident(self, callback: Callable[[Incident], object]) -> None:
        """Call `callback` with everything that happens to the stream."""
        self._on_incident.append(callback)

    def __iter__(self) -> Iterator[Decision]:
        """Give decisions until the source ends, or `stop` is called."""
        read = self.source.read
        poll = POLL_S if self._keep_warm is None else min(POLL_S, self._keep_warm.period / 2)
        while not self._stopping:
            chunk = read(poll)
            if self.source.incidents:
                self._take_incidents()
            if chunk is not None:
                self._heard = self._monotonic()
                self._silent = False
                yield from self.feed(chunk)
            elif self.source.ended:
                break
            else:
                self._watch()
            if self._keep_warm is not None:
                self._fill_pause(self._keep_warm)

    def run(self) -> Counters:
        """Decode until the source ends or `stop` is called, for the callbacks alone."""
        for _ in self:
            pass
        return self.counters

    def stop(self) -> None:
        """End the iteration after the chunk at hand. May be called from a signal handler or another thread."""
        self._stopping = True

    def feed(self, chunk: Chunk) -> Iterator[Decision]:
        """Decode what `chunk` completes. The iterator does this for every chunk of the source."""
        for window in self.windows.push(chunk):
            decision = self._decide(window, chunk.received)
            if decision is not None:
                for tell in self._on_decision:
                    tell(decision)
                yield decision
        for take in self._on_chunk:
            take(chunk)

    def close(self) -> None:
        """Release the source, and the backend if `open` loaded it."""
        self.source.close()
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _decide(self, window: Window, received: float) -> Decision | None:
        counters, clock = self.counters, self.source.clock
        due = window.stamp + self.deadline
        started = clock()
        late = self.config.late
        if started > due and late != "queue":
            self._count_miss(missed=True)
            if late == "skip" or self._last is None:
                counters.skipped_late += 1
                return None
            counters.held += 1
            return dataclasses.replace(
                self._last,
                index=window.index,
                time=window.stamp,
                due=due,
                received=received,
                decided=started,
                infer_s=0.0,
                held=True,
            )
        try:
            prediction = self._predict(window)[0].copy()
        except (RefusedError, UnansweredError) as e:  # of a server, which may answer the next window
            counters.failed += 1
            self._count_miss(missed=True)
            self._report("unanswered", str(e))
            return None
        except BaseException:
            counters.failed += 1
            raise
        decided = clock()
        if self._keep_warm is not None:
            self._called = time.perf_counter()
        counters.decisions += 1
        self._count_miss(missed=decided > due)
        decision = self._last = Decision(
            window.index,
            prediction,
            window.stamp,
            due,
            received,
            decided,
            decided - started,
            False,
            window.bridged,
            window.bad_channels,
        )
        return decision

    def _against_rolling(self) -> StreamError | None:
        """Return what keeps the backend from being given new samples alone."""
        if self.predict.rolling is None:
            return StreamError(
                f"The backend {self.predict.backend.name} keeps no window of a stream.",
                "Use the backend cuda, or leave roll out.",
            )
        if self.predict.rolling.persistent and self.config.keep_warm is not None:
            return StreamError(
                "For the dummy calls of keep_warm, which are of whole windows, a kernel that stays would leave each time.",
                "Leave keep_warm or roll out.",
            )
        return None

    def _predict(self, window: Window) -> NDArray[np.float32]:
        if not self._rolls:
            return self.predict(self.windows.eeg())
        # Between windows that were due one after the other there is no gap, as after one the next window is not whole.
        follows = self._rolled == (window.index - 1, self.predict.n_rolls)
        outputs = self.predict.roll(self.windows.newest(self.hop if follows else self.spec.n_times))
        self._rolled = window.index, self.predict.n_rolls
        return outputs

    def _count_miss(self, *, missed: bool) -> None:
        counters = self.counters
        if not missed:
            counters.miss_run = 0
            return
        counters.miss_run += 1
        counters.misses += 1
        counters.longest_misses = max(counters.longest_misses, counters.miss_run)
        if counters.miss_run == 1:
            self._report("deadline", f"A decision is later than {self.deadline:.3g} s.")

    def _fill_pause(self, keep_warm: KeepWarm) -> None:
        """Make a dummy call if the last call is long ago and the next window far enough."""
        now = time.perf_counter()
        if now - self._called >= keep_warm.period:
            wait = self.windows.due_at - self.source.clock()
            if keep_warm.beat(now + wait if wait > 0 else math.inf):  # a silent source is not waited for
                self._called = time.perf_counter()

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
        while self.source.incidents:
            incident = self.source.incidents.popleft()
            if incident.kind == "flushed":
                self.counters.samples_flushed += incident.sample
            self._tell(dataclasses.replace(incident, sample=self.counters.samples))

    def _report(self, kind: str, text: str) -> None:
        self._tell(Incident(kind=kind, time=self.source.clock(), text=text, sample=self.counters.samples))

    def _tell(self, incident: Incident) -> None:
        for tell in self._on_incident:
            tell(incident)
