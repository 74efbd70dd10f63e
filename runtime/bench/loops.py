"""Runs the measuring loops: warm-up until stable, closed loop, and open loop counted from due times.

A closed loop calls as soon as the last call returned, so a call that stalls delays nothing in its figures but itself. In open
loop windows are due at a rate whatever the backend does; latency counts from there, so that the windows that wait behind a
stall show it too.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.runtime.backend import FloatArray
from sjepa_deploy.runtime.bench.estimates import has_trend
from sjepa_deploy.runtime.keep_warm import Clock, KeepWarm

Array = NDArray[np.float64]
Call = Callable[[FloatArray], Any]

N_GROUPS = 10
"""Groups of calls that the test of stability looks back at."""

GROUP_S = 0.005
"""Seconds that a group takes at least."""

GROUP_CALLS = 3

STABLE_WITHIN = 0.05
"""The medians of the older and of the newer groups differ by at most this, relatively, once the warm-up is over."""

MAX_CALLS = 5000
"""Calls of a block at most: ten blocks of so many give a p99.9, and more would only fill the disk."""

MAX_BACKLOG_S = 1.0
"""An open loop that is late by this and by `MAX_BACKLOG_WINDOWS` periods is given up: it does not hold its rate."""

MAX_BACKLOG_WINDOWS = 20


def warm_up(call: Call, windows: Sequence[FloatArray], clock: Clock, seconds: float = 3.0) -> bool:
    """Call until latencies neither fall nor rise, for at most `seconds`. Returns whether latencies became stable.

    Latencies are stable if two conditions hold over the last ten groups of calls. The medians of the groups show no trend
    (Mann-Kendall). The medians of the five newer groups are within 5 % of those of the five older groups.
    """
    feed = itertools.cycle(windows)
    end = clock.now() + seconds
    groups: list[float] = []
    while clock.now() < end:
        started = clock.now()
        latencies: list[float] = []
        while len(latencies) < GROUP_CALLS or clock.now() - started < GROUP_S:
            start = clock.now()
            call(next(feed))
            latencies.append(clock.now() - start)
        groups.append(float(np.median(latencies)))
        if len(groups) >= N_GROUPS and is_stable(np.array(groups[-N_GROUPS:])):
            return True
    return False


def is_stable(groups: Array) -> bool:
    """Return whether the medians of groups of calls, oldest first, stand still."""
    half = len(groups) // 2
    older, newer = np.median(groups[:half]), np.median(groups[half:])
    return bool(abs(newer - older) <= STABLE_WITHIN * older and not has_trend(groups))


def closed_loop(call: Call, windows: Sequence[FloatArray], clock: Clock, seconds: float) -> Array:
    """Call back to back for `seconds`, at least once and at most `MAX_CALLS` times. Returns the latencies in seconds."""
    now, feed = clock.now, itertools.cycle(windows)
    latencies: list[float] = []
    end = now() + seconds
    stop = 0.0
    while stop < end and len(latencies) < MAX_CALLS:
        window = next(feed)
        start = now()
        call(window)
        stop = now()
        latencies.append(stop - start)
    return np.array(latencies)


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """Holds when windows were due, begun and done, in order of their due times, in seconds from the start of the loop.

    Attributes
    ----------
    due, start, finish : array, shape (n,)
        When each window that was served was due, when the call that it was part of began, and when that ended.
    batch : array of int, shape (n,)
        Windows of that call.
    n_due : int
        Windows that were due; more than were served where the loop was given up.
    period : float
        Seconds from one window of a stream to its next.
    spacing : float
        Seconds from one window to the next of any stream, on average.
    """

    due: Array
    start: Array
    finish: Array
    batch: NDArray[np.integer]
    n_due: int
    period: float
    spacing: float

    @property
    def latency(self) -> Array:
        """Return the seconds from due to done, of each window."""
        return self.finish - self.due

    @property
    def service(self) -> Array:
        """Return the seconds of the call that served each window, without the wait."""
        return self.finish - self.start

    @property
    def busy(self) -> float:
        """Return the seconds spent in calls."""
        return float((self.service / self.batch).sum())

    @property
    def gave_up(self) -> bool:
        """Return whether windows were left over."""
        return len(self.due) < self.n_due

    @property
    def lags(self) -> bool:
        """Return whether the last quarter of the windows waited for more than a period: then streams have several waiting."""
        tail = slice(3 * len(self.due) // 4, None)
        return float(np.median((self.start - self.due)[tail])) > self.period


def open_loop(
    call: Call,
    batches: dict[int, Sequence[FloatArray]],
    due: Sequence[float],
    clock: Clock,
    *,
    period: float,
    keep_warm: KeepWarm | None = None,
) -> Served:
    """Serve windows that are due at `due`, in order, by one server.

    Whenever the server is free it takes the largest batch that is waiting: waiting longer to fill one would only add latency,
    and under load batches grow by themselves.

    Parameters
    ----------
    call : callable
        Takes a batch.
    batches : dict of int to sequence of array
        What to call it with, by size of the batch; the sizes that may be run. One of them is 1.
    due : sequence of float
        Rising instants, in seconds from the start of the loop.
    clock : Clock
        Time and waiting.
    period : float
        Seconds from one window of a stream to its next.
    keep_warm : KeepWarm or None
        Policy that fills idle gaps.
    """
    now = clock.now
    wait = clock.wait_until if keep_warm is None else keep_warm.wait_until
    feeds: dict[int, Iterator[FloatArray]] = {size: itertools.cycle(windows) for size, windows in batches.items()}
    sizes = sorted(feeds)
    give_up = max(MAX_BACKLOG_S, MAX_BACKLOG_WINDOWS * period)
    began = now()
    instants = [began + instant for instant in due]
    calls: list[tuple[int, float, float]] = []
    done, n = 0, len(instants)
    while done < n:
        time = wait(instants[done])
        size = 1
        if len(sizes) > 1:
            waiting = bisect.bisect_right(instants, time, done) - done
            size = sizes[bisect.bisect_right(sizes, max(waiting, 1)) - 1]
        window = next(feeds[size])
        start = now()
        call(window)
        finish = now()
        calls.append((size, start, finish))
        if keep_warm is not None:
            keep_warm.saw(start, finish)
        if start - instants[done] > give_up:
            break
        done += size
    done = sum(size for size, _, _ in calls)
    batch = np.array([size for size, _, _ in calls])
    starts, finishes = (np.array([call[i] for call in calls]) - began for i in (1, 2))
    return Served(
        due=np.array(due[:done], float),
        start=np.repeat(starts, batch),
        finish=np.repeat(finishes, batch),
        batch=np.repeat(batch, batch),
        n_due=n,
        period=period,
        spacing=float(due[-1] - due[0]) / (n - 1) if n > 1 else period,
    )


def even(rate: float, n: int) -> Array:
    """Return the due times of `n` windows of one stream, a period of idleness before the first."""
    return np.arange(1, n + 1) / rate


def streams(n_streams: int, rate: float, seconds: float, rng: np.random.Generator) -> Array:
    """Return the due times of independent streams, each with a window every 1 / rate and a phase of its own."""
    n = max(1, round(seconds * rate))
    phases = rng.uniform(0, 1 / rate, n_streams)
    return np.sort((phases[:, None] + np.arange(n) / rate).ravel())


def longest_run(missed: NDArray[np.bool_]) -> int:
    """Return the length of the longest run of True."""
    return max((len(list(group)) for is_missed, group in itertools.groupby(missed.tolist()) if is_missed), default=0)


def held(blocks: Sequence[Served]) -> bool:
    """Return whether the rate was held: the backlog stays bounded, and calls take less time than windows to arrive.

    One stall at the end of a block is no backlog that grows: most blocks must lag.
    """
    if not blocks or any(block.gave_up for block in blocks):
        return False
    return utilization(blocks) < 1 and 2 * sum(block.lags for block in blocks) <= len(blocks)


def utilization(blocks: Sequence[Served]) -> float:
    """Return the time in calls over the time that the windows take to arrive."""
    arrival = sum(len(block.due) * block.spacing for block in blocks)
    return sum(block.busy for block in blocks) / arrival if arrival else 0.0


def jitter(blocks: Sequence[Served]) -> float | None:
    """Return the standard deviation of the interval between outputs in a row, in seconds; None without two of them."""
    intervals = [np.diff(block.finish) for block in blocks]
    together = np.concatenate(intervals) if intervals else np.empty(0)
    return float(together.std()) if len(together) else None
