"""Cuts a live stream into the windows of a model. No clock: the result depends on samples and stamps alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.conditioning import Conditioner
from sjepa_deploy.eeg.continuity import Continuity
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.timeline import DOUBTFUL, EARLY, LARGEST_RATE_ERROR, REPEATED, RESET
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.arrival import Arrival
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.places import EventPlaces, Undecided
from sjepa_deploy.runtime.live.ring import Ring
from sjepa_deploy.runtime.live.schedule import Events, HopCounter
from sjepa_deploy.runtime.live.sources import Chunk, Samples
from sjepa_deploy.spec import SignalSpec

NOTED_RATE_ERROR = 0.001
"""Ratio from which on a stream's rate is reported as off."""


@dataclass(frozen=True, slots=True)
class Window:
    """Describes a whole window, whose samples are in `WindowStream.eeg`.

    Attributes
    ----------
    index : int
        Number among all windows that were due.
    stamp : float
        Stamp of the newest sample, on the source's clock.
    bridged : bool
        Whether samples in it were interpolated in time.
    bad_channels : tuple of str
        Channels of the stream that were bad somewhere in it, repaired or not.
    doubtful : bool
        Whether samples may be missing in it: its newest ones are later than any jitter so far, and it is not known yet for good.
    settling : bool
        Whether it begins where the steps of the signal still settle, after the start of the stream or after a loss.
    event : Event or None
        The event that it belongs to.
    behind : int
        Samples that have come since its newest one: of an event whose marker came after its samples. What is `bridged`,
        `doubtful` or bad somewhere in them counts too.
    trial : float or None
        When the trial of the event began, on the source's clock; None if the event is in no trial.
    """

    index: int
    stamp: float
    bridged: bool
    bad_channels: tuple[str, ...]
    doubtful: bool
    settling: bool
    event: Event | None = None
    behind: int = 0
    trial: float | None = None


class WindowStream:
    """Turns chunks of a stream into windows of a model, with every sample and every window accounted for.

    `Continuity` says which samples follow each other. Samples that do go through the `Conditioner` into a `Ring`, and
    the schedule says when the ring holds a window that is due: a `HopCounter` counts samples, `EventPlaces` follow events.

    Parameters
    ----------
    signal : SignalSpec
        The signal of the model.
    info : StreamInfo
        The stream.
    config : StreamConfig
        Its hop, bridge, largest jitter, interpolation and policy for bad channels.
    counters : Counters
        Counters of the stream.
    report : callable
        Called with the kind and the text of every incident.
    schedule : Events or None
        The events whose windows are given. None gives a window every hop of `config`.
    undecided : callable or None
        Called with every event that gets no window.

    Attributes
    ----------
    ch_names, missing : tuple of str
        Channels of the stream that are used, and channels of the model that are made from them.
    delay : AlgorithmicDelay
        Delay of the filters.

    Raises
    ------
    StreamError
        If the stream breaks the model's contract.
    """

    def __init__(
        self,
        signal: SignalSpec,
        info: StreamInfo,
        config: StreamConfig,
        *,
        counters: Counters,
        report: Callable[[str, str], None],
        schedule: Events | None = None,
        undecided: Callable[[Undecided], None] | None = None,
    ) -> None:
        self._signal, self._info, self._bridge = signal, info, config.bridge
        self._counters, self._report = counters, report
        self._conditioner = Conditioner(
            signal,
            info,
            interpolate=config.share,
            bads=config.bads,
            bad_channels=config.bad_channels,
            check_unit=config.check_unit,
            report=partial(report, "channel"),
        )
        self.ch_names, self.missing, self.delay = self._conditioner.ch_names, self._conditioner.missing, self._conditioner.delay
        self._continuity = Continuity(info.sfreq, config.max_jitter, trusted=config.bridge > 0)
        self._schedule = HopCounter(signal.n_times, config.hop_samples(signal))
        self._places: EventPlaces | None = None
        n_older = 0
        if schedule is not None:
            self._places = EventPlaces(schedule, signal, info.sfreq, counters=counters, undecided=undecided)
            n_older = self._places.n_older
        self._ring = Ring(*signal.input_shape, n_older)
        self._bridged_until = -(2**62)  # elapsed samples of the schedule
        self._rate_noted = False
        self._last_row: Samples | None = None
        self._arrival = Arrival(info.name, info.sfreq, report)
        self._doubtful = False
        self._stamp = 0.0

    @property
    def due_at(self) -> float:
        """Return the time at which the newest sample of the next window is expected, on the source's clock."""
        due_in = self._schedule.due_in if self._places is None else self._places.due_in
        return self._stamp + self._arrival.offset + due_in / self._signal.sfreq

    @property
    def offset(self) -> float:
        """Return the seconds that bring the stamps of chunks to the source's clock, where they are on another one."""
        return self._arrival.offset

    @property
    def began(self) -> float:
        """Return the time of the first sample after the last loss, on the source's clock; -inf if nothing was lost."""
        return -math.inf if self._places is None else self._places.began

    @property
    def codes(self) -> NDArray[np.int8]:
        """Return the `ChannelState` of each channel of `ch_names`, shape (len(ch_names),)."""
        return self._conditioner.codes

    @property
    def interpolated(self) -> tuple[str, ...]:
        """Return the channels of the model that are made from others now."""
        return self._conditioner.interpolated

    def name_bads(self, names: Sequence[str]) -> None:
        """Count these channels of the stream as bad from the next sample on, see `Conditioner.name_bads`."""
        self._conditioner.name_bads(names)

    def eeg(self, behind: int = 0) -> NDArray[np.float32]:
        """Return the window whose newest sample came `behind` samples ago (`Window.behind`), shape (1, n_chans, n_times)."""
        return self._ring.window(behind)

    def newest(self, n: int) -> NDArray[np.float32]:
        """Return the newest n samples, at most a window, shape (n_chans, n). The next call, also of `eeg`, overwrites them."""
        return self._ring.newest(n)

    def mark(self, events: Iterable[Event]) -> Iterator[Window]:
        """Take events, and give the windows of those whose samples are there. The others come with their samples."""
        assert self._places is not None
        for event in events:  # one by one: in which order windows come must not depend on which markers came together
            self._places.add(event)
            yield from self._due_events()

    def finish(self) -> Iterator[Window]:
        """Give the last windows of events at the end of the stream, and account for the events that still wait."""
        if self._places is not None:
            self._places.finish()
            yield from self._due_events()

    def push(self, chunk: Chunk) -> Iterator[Window]:
        """Take a chunk and give each whole window that is due, while its samples are in `eeg`: at once, not in a list."""
        samples, stamps = chunk.samples, chunk.stamps.tolist()
        n, counters = len(stamps), self._counters
        if samples.shape[1] != len(self._info.ch_names):
            raise StreamError(
                f"{self._info.name} sent {samples.shape[1]} channels in place of {len(self._info.ch_names)}.", "Mend the source."
            )
        counters.samples += n
        restarted, start = chunk.restarted, 0
        if restarted:
            counters.interruptions += 1
        # Which samples follow each other, the sender's own stamps say: the correction of its clock moves in steps.
        own = chunk.stamps - chunk.correction if chunk.correction else chunk.stamps
        self._arrival.check_unit(own)
        if not self._arrival.began:
            self._arrival.take(chunk)
        for i, verdict in self._continuity.breaks(samples, own, restarted=restarted):
            yield from self._take(samples[start:i], stamps[start:i])
            start = i + 1
            if verdict == REPEATED:
                counters.samples_repeated += 1
            elif verdict == EARLY:
                counters.samples_early += 1
            elif verdict == DOUBTFUL and not restarted:
                self._doubtful = True
                yield from self._take(samples[i:start], stamps[i:start])
                self._doubtful = False
            else:
                start = i
                n_lost = max(0, verdict)
                if verdict == RESET or self._arrival.jumped(chunk, i, n_lost):
                    counters.clock_resets += 1
                    self._arrival.count_from(chunk)
                    self._interrupt(0, "clock reset", "The clock of the stamps was set; from here on they count from arrival.")
                elif 0 < n_lost <= self._bridge and not restarted and self._last_row is not None:
                    yield from self._bridge_to(samples, stamps, i, n_lost)
                else:
                    counters.samples_lost += n_lost
                    counters.gaps += not restarted
                    kind = "interruption" if restarted else "gap"
                    self._interrupt(n_lost, kind, f"{n_lost} samples ({n_lost / self._info.sfreq:.3g} s) are missing.")
                restarted = False
        yield from self._take(samples[start:], stamps[start:])
        self._arrival.take(chunk)
        self._last_row, self._stamp = samples[-1], stamps[-1]

    def _bridge_to(self, samples: Samples, stamps: list[float], i: int, n_lost: int) -> Iterator[Window]:
        before = np.asarray(samples[i - 1] if i else self._last_row, np.float64)
        share = np.arange(1, n_lost + 1)[:, None] / (n_lost + 1)
        self._counters.samples_lost += n_lost
        self._counters.samples_bridged += n_lost
        period = 1 / self._info.sfreq
        self._report("bridged", f"{n_lost} lost samples were interpolated.")
        self._bridged_until = 2**62  # until the real ones are there
        with np.errstate(invalid="ignore"):  # between two infinite samples there is none
            made = before + share * (np.asarray(samples[i], np.float64) - before)
        yield from self._take(made, [stamps[i] - (n_lost - k) * period for k in range(n_lost)])
        self._bridged_until = self._schedule.elapsed

    def _interrupt(self, n_lost: int, kind: str, text: str) -> None:
        """Start anew, and account for the windows that fell into the loss."""
        self._report(kind, f"{text} Decisions go on when a window is whole again.")
        n_windows = self._schedule.skip(round(n_lost * self._conditioner.ratio))
        if self._places is None:
            self._counters.windows += n_windows
            self._counters.skipped_gap += n_windows
        else:
            self._places.interrupt()
        self._conditioner.restart()

    def _take(self, samples: Samples, stamps: list[float]) -> Iterator[Window]:
        """Take samples that follow each other."""
        conditioner = self._conditioner
        picked = conditioner.pick(samples)
        done = 0
        while done < len(picked):
            try:
                made, rows, n_taken = conditioner.take(picked[done:])
            finally:  # also of samples that end the stream
                self._counters.samples_non_finite = conditioner.n_non_finite
            made_at = [stamps[done + row] for row in rows]
            if self._places is None:
                yield from self._windows_of(made, made_at)
            else:
                self._places.take(np.array(stamps[done : done + n_taken]) + self._arrival.offset)
                yield from self._event_windows_of(made, np.array(made_at) + self._arrival.offset)
            if conditioner.judge():
                self._check_rate()
            done += n_taken

    def _windows_of(self, made: NDArray[np.float64], stamps: list[float]) -> Iterator[Window]:
        schedule, counters, n_times = self._schedule, self._counters, self._signal.n_times
        position = 0
        while position < len(made):
            start, position = position, min(position + schedule.due_in, len(made))
            self._ring.extend(made[start:position])
            if not schedule.advance(position - start):
                break
            counters.windows += 1
            if not schedule.whole:
                counters.skipped_gap += 1
                continue
            bads = self._conditioner.bad_in_newest(n_times + len(made) - position)
            settling = schedule.unbroken - n_times < self._conditioner.n_settling
            bridged = schedule.elapsed - self._bridged_until < n_times
            yield Window(
                counters.windows - 1, stamps[position - 1] + self._arrival.offset, bridged, bads, self._doubtful, settling
            )

    def _event_windows_of(self, made: NDArray[np.float64], stamps: NDArray[np.float64]) -> Iterator[Window]:
        assert self._places is not None
        yield from self._due_events()
        position = 0
        while position < len(made):
            start, position = position, min(position + self._places.due_in, len(made))
            self._ring.extend(made[start:position])
            self._schedule.count(position - start)
            self._places.advance(stamps[start:position])
            yield from self._due_events(len(made) - position)

    def _due_events(self, n_ahead: int = 0) -> Iterator[Window]:
        """Give the windows of events whose samples are there. `n_ahead` samples were made that are not in the ring yet."""
        assert self._places is not None
        n_times = self._signal.n_times
        for place in self._places.due():
            self._counters.windows += 1
            behind = place.behind
            yield Window(
                self._counters.windows - 1,
                place.stamp,
                self._schedule.elapsed - self._bridged_until < n_times + behind,
                self._conditioner.bad_in_newest(n_times + behind + n_ahead),
                self._doubtful,
                place.start < self._conditioner.n_settling,
                place.event,
                behind,
                place.trial,
            )

    def _check_rate(self) -> None:
        timeline = self._continuity.timeline
        measured = timeline.sfreq
        if measured is None:
            return
        error = measured / self._info.sfreq - 1
        if abs(error) > LARGEST_RATE_ERROR:
            raise StreamError(
                f"{self._info.name} says {self._info.sfreq:g} Hz and sends {measured:.4g} Hz.",
                "Mend the source's nominal rate, or what loses samples on the way.",
            )
        if abs(error) > NOTED_RATE_ERROR + timeline.rate_error and not self._rate_noted:
            self._rate_noted = True
            self._report("rate", f"The stamps show {measured:.6g} Hz, {error:+.2%} off the nominal rate.")
