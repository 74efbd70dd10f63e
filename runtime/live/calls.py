"""Calls the backend for the windows of one stream, and handles windows that are late or fail."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from sjepa_deploy.eeg.chain import finish_windows
from sjepa_deploy.errors import RefusedError, StreamError, UnansweredError
from sjepa_deploy.runtime.backend import FloatArray
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.keep_warm import KeepWarm
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision, flags_of
from sjepa_deploy.runtime.live.pace import Pace
from sjepa_deploy.runtime.live.places import Reason
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.live.trials import EventSteps
from sjepa_deploy.runtime.live.waiting import Waiting
from sjepa_deploy.runtime.live.windows import Window, WindowStream
from sjepa_deploy.runtime.predictor import Predictor

N_WARM_UP = 20
"""Calls of the backend before the stream is read, so that no decision pays for buffers and caches."""

MOST_TOGETHER = 64
"""Most windows of events that share a batch: those of a burst of markers that came late."""

ALL_LATE_S = 5.0
"""Seconds of windows, none of which was in time, after which a stream that never had a decision is refused."""


class BackendCalls:
    """Makes a decision of each window of a stream, and counts every window that gets none.

    A backend that keeps the newest window (`Predictor.rolling`) is given the new samples alone where a window follows the last
    one decoded, and a whole window otherwise. On creation the backend is called `N_WARM_UP` times in each of these ways.

    Parameters
    ----------
    predict : Predictor
        The model.
    windows : WindowStream
        Where the samples of a window are.
    config : StreamConfig
        The configuration: it says what to do with late windows, whether to give new samples alone, how to keep the backend awake.
    clock : callable
        The time now in seconds of the source's clock.
    counters : Counters
        Counters of the stream's windows.
    report : callable
        Called with the kind and the text of every incident.
    waiting : Waiting
        Tells whether windows are late because samples waited in the source.
    layer : DecisionLayer or None
        Layer that gives every decision a state.
    events : Events or None
        Events to which the windows belong: then they are whole ones on every backend. None where a window is decided every hop.

    Attributes
    ----------
    most_together : int
        Windows of events that are due together and share a batch. 1 unless the backend gives the same bits in every batch.

    Raises
    ------
    StreamError
        If the config asks for new samples alone, and the backend or the schedule cannot give them; or for the last decision in
        place of that of another event.
    """

    def __init__(
        self,
        predict: Predictor,
        windows: WindowStream,
        config: StreamConfig,
        *,
        clock: Callable[[], float],
        counters: Counters,
        report: Callable[[str, str], None],
        waiting: Waiting,
        layer: DecisionLayer | None = None,
        events: Events | None = None,
    ) -> None:
        if events is not None and config.late == "hold":
            raise StreamError("The decision on one event is none on the next one.", "Use --late skip or --late queue.")
        self._windows, self._late, self._config, self._events = windows, config.late, config, events
        self._clock, self._counters, self._report = clock, counters, report
        self._hop, self._n_times = config.hop_samples(predict.spec.signal), predict.spec.n_times
        self._signal = predict.spec.signal
        self._sfreq, self._deadline = predict.spec.sfreq, config.deadline_s(predict.spec.signal)
        self.waiting, self._pace = waiting, Pace()
        self._last: Decision | None = None
        warm_up(predict, config, windows.eeg().copy(), at_events=events is not None)
        self.swap(predict, layer)
        self._called = time.perf_counter()

    def swap(self, predict: Predictor, layer: DecisionLayer | None) -> None:
        """Call another predictor and step another layer from the next window on. The predictor was warmed up (`warm_up`)."""
        config, at_events = self._config, self._events is not None
        self._steps = None if layer is None or self._events is None else EventSteps(layer, self._events)  # may be refused
        self._rolls = gives_new_samples(predict, config, at_events=at_events)
        together = at_events and predict.backend.batch_invariant and not predict.backend.finishes
        self.most_together = min(predict.max_batch, MOST_TOGETHER) if together else 1
        self._predict, self._layer = predict, layer
        self._rolled: tuple[int, int] | None = None  # the last window decoded, and the predictor's count of calls then
        self.keep_warm: KeepWarm | None = None
        if config.keep_warm is not None:
            window = self._windows.eeg().copy()
            self.keep_warm = KeepWarm(lambda: predict.backend.run(window), config.keep_warm)

    def decide(self, window: Window, received: float) -> Decision | Reason:
        """Return the decision of the newest window of the stream, or the reason why the window gets none.

        Parameters
        ----------
        window : Window
            The window.
        received : float
            When its newest sample arrived, in seconds of the source's clock. The decision on an event whose marker came later is
            due from the arrival of the marker on.
        """
        due, received = self._due(window, received)
        started = self._clock()
        if started > due and self._late != "queue":
            return self._answer_late(window, due, received, started)
        outputs = self._run(lambda: self._call(window))
        if outputs is None:
            return "failed"
        decided = self._clock()
        if window.event is not None:
            self._pace.decided(decided - started)
        return self._answer(window, outputs[0], due, received, started, decided)

    def decide_together(self, windows: Sequence[Window], eeg: FloatArray, received: float) -> list[Decision | Reason]:
        """Return the decisions of windows of events that are due together, from one call of the backend; see `decide`.

        Parameters
        ----------
        windows : sequence of Window
            The windows, at most `most_together`.
        eeg : ndarray, shape (len(windows), n_chans, n_times)
            Their samples.
        received : float
            When the newest sample of all arrived.
        """
        answers: list[Decision | Reason] = ["failed"] * len(windows)
        started, kept = self._clock(), []
        for i, window in enumerate(windows):
            due, arrived = self._due(window, received)
            if started > due and self._late != "queue":
                answers[i] = self._answer_late(window, due, arrived, started)
            else:
                kept.append((i, due, arrived))
        rows = [i for i, _, _ in kept]
        outputs = self._run(lambda: self._predict(finish_windows(self._signal, eeg[rows])), len(rows)) if rows else None
        if outputs is not None:
            decided = self._clock()
            self._pace.decided((decided - started) / len(rows))
            for (i, due, arrived), prediction in zip(kept, outputs, strict=True):
                answers[i] = self._answer(windows[i], prediction, due, arrived, started, decided)
        return answers

    def _due(self, window: Window, received: float) -> tuple[float, float]:
        """Return when a decision is due, and when its last cause arrived: the newest sample, or the marker."""
        due = window.stamp + self._deadline
        if window.event is None:
            return due, received
        return max(due, window.event.arrived + self._deadline), max(received, window.event.arrived)

    def _run(self, call: Callable[[], FloatArray], n: int = 1) -> FloatArray | None:
        """Return the outputs of `n` windows; None if a server does not answer, which may answer the next ones."""
        try:
            return call()
        except BaseException as e:
            self._counters.failed += n
            for _ in range(n):
                self._count_miss(missed=True)
            if not isinstance(e, RefusedError | UnansweredError):
                raise
            self._report("unanswered", str(e))
            return None

    def _answer(
        self, window: Window, prediction: FloatArray, due: float, received: float, started: float, decided: float
    ) -> Decision:
        late = decided > due
        self._judge_pace(window, received, late=late)
        self.waiting.done(decided, decided - started)
        if self.keep_warm is not None:
            self._called = time.perf_counter()
        self._counters.decisions += 1
        state = None
        self._count_miss(missed=late)
        if self._layer is not None:
            flags = flags_of(
                late=late,
                held=False,
                bridged=window.bridged,
                doubtful=window.doubtful,
                settling=window.settling,
                bad_channels=bool(window.bad_channels),
            )
            if self._steps is not None:
                state = self._steps.step(prediction, window.stamp, flags, window.trial)
            else:
                state = self._layer.step(prediction, window.stamp, flags)
        self._last = Decision(
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
            window.doubtful,
            window.settling,
            state,
            window.event,
            window.trial,
        )
        return self._last

    def fill_pause(self) -> None:
        """Make the dummy call of `keep_warm` if the last call is long ago and the next window far enough."""
        keep_warm = self.keep_warm
        assert keep_warm is not None
        now = time.perf_counter()
        if now - self._called >= keep_warm.period:
            wait = self._windows.due_at - self._clock()
            if keep_warm.beat(now + wait if wait > 0 else math.inf):  # a silent source is not waited for
                self._called = time.perf_counter()

    def _answer_late(self, window: Window, due: float, received: float, now: float) -> Decision | Reason:
        self._count_miss(missed=True)
        self._judge_pace(window, received, late=True)
        self.waiting.done(now)
        if self._late == "skip" or self._last is None:
            self._counters.skipped_late += 1
            if window.event is None and self._last is None and self._counters.skipped_late * self._hop > ALL_LATE_S * self._sfreq:
                raise StreamError(
                    f"All windows of {ALL_LATE_S:g} s came too late: their newest samples are {now - window.stamp:.3g} s old by "
                    f"their stamps when they can be decoded, and a decision is due after {self._deadline:.3g} s.",
                    self.waiting.advice or "Use a longer --deadline or --late queue, or mend the source's stamps.",
                )
            return "late"
        self._counters.held += 1
        again = dataclasses.replace(
            self._last,
            index=window.index,
            time=window.stamp,
            due=due,
            received=received,
            decided=now,
            infer_s=0.0,
            held=True,
        )
        if self._layer is None:
            return again
        return dataclasses.replace(again, state=self._layer.step(again.prediction, again.time, again.flags))

    def _judge_pace(self, window: Window, received: float, *, late: bool) -> None:
        """Name once what makes windows late: a source on arrival from which they are too old already, or events too fast."""
        if window.event is not None:
            if (why := self._pace.due(window.event, late=late)) is not None:
                self._report("deadline", why)
        elif late and self.waiting.late(window.stamp, received):
            self._report("deadline", str(self.waiting.advice))

    def _call(self, window: Window) -> FloatArray:
        if self._predict.backend.finishes:  # a predictor judges windows after all steps, the stream what comes in
            return self._predict.backend.run_unfinished(np.ascontiguousarray(self._windows.eeg(window.behind)))
        if not self._rolls:
            return self._predict(finish_windows(self._signal, self._windows.eeg(window.behind)))
        # Between windows that were due one after the other there is no gap, as after one the next window is not whole.
        follows = self._rolled == (window.index - 1, self._predict.n_rolls)
        outputs = self._predict.roll(self._windows.newest(self._hop if follows else self._n_times))
        self._rolled = window.index, self._predict.n_rolls
        return outputs

    def _count_miss(self, *, missed: bool) -> None:
        counters = self._counters
        if not missed:
            counters.miss_run = 0
            return
        counters.miss_run += 1
        counters.misses += 1
        counters.longest_misses = max(counters.longest_misses, counters.miss_run)
        if counters.miss_run == 1:
            self._report("deadline", f"A decision is later than {self._deadline:.3g} s.")


def paced(run: Callable[[FloatArray], FloatArray], pauses: float) -> Callable[[FloatArray], FloatArray]:
    """Return `run` with a pause after each call, `pauses` times as long as the call: windows of another model come first."""

    def call(eeg: FloatArray) -> FloatArray:
        started = time.perf_counter()
        outputs = run(eeg)
        time.sleep(pauses * (time.perf_counter() - started))
        return outputs

    return call


def warm_up(predict: Predictor, config: StreamConfig, eeg: FloatArray, *, at_events: bool, pauses: float = 0.0) -> None:
    """Call a predictor `N_WARM_UP` times in each way in which it will be called.

    Parameters
    ----------
    predict : Predictor
        The predictor.
    config : StreamConfig
        The configuration of the decoder.
    eeg : ndarray of float32, shape (1, n_chans, n_times)
        A window.
    at_events : bool
        Whether windows belong to events.
    pauses : float
        See `paced`.

    Raises
    ------
    StreamError
        See `BackendCalls`.
    """
    call, roll = paced(predict, pauses), paced(predict.roll, pauses)
    for _ in range(N_WARM_UP):
        call(eeg)
    if gives_new_samples(predict, config, at_events=at_events):
        for n in (predict.spec.n_times, config.hop_samples(predict.spec.signal)):
            samples = eeg[0, :, :n].copy()
            for _ in range(N_WARM_UP):
                roll(samples)


def gives_new_samples(predict: Predictor, config: StreamConfig, *, at_events: bool) -> bool:
    """Return whether the backend is given new samples alone, see `StreamConfig.roll`."""
    why_whole = _why_whole_windows(predict, config, at_events=at_events)
    if config.roll and why_whole is not None:
        raise why_whole
    return config.roll is not False and why_whole is None


def _why_whole_windows(predict: Predictor, config: StreamConfig, *, at_events: bool) -> StreamError | None:
    """Return the reason why the backend must be given whole windows, not only new samples; None without a reason."""
    if at_events:
        return StreamError("The window of one event does not follow that of another.", "Leave roll out.")
    if predict.rolling is None:
        return StreamError(
            f"The backend {predict.backend.name} keeps no window of a stream.", "Use the backend cuda, or leave roll out."
        )
    if predict.spec.signal.window_steps:
        return StreamError(
            f"The step {predict.spec.signal.window_steps[0].name!r} changes a whole window at every decision.", "Leave roll out."
        )
    if predict.rolling.persistent and config.keep_warm is not None:
        return StreamError(
            "The dummy calls of keep_warm are whole windows, for which a kernel that stays on the GPU would leave each time.",
            "Leave keep_warm or roll out.",
        )
    return None
