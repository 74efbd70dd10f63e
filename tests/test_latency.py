"""The measuring loops, on a clock that moves only when a backend says so."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_clock import VirtualClock

from sjepa_deploy.runtime.bench import loops
from sjepa_deploy.runtime.bench.estimates import percentile
from sjepa_deploy.runtime.keep_warm import Clock, KeepWarm

WINDOWS = [np.zeros((1, 2, 3), np.float32)] * 2
BATCHES = {1: WINDOWS, 2: [np.zeros((2, 2, 3), np.float32)], 4: [np.zeros((4, 2, 3), np.float32)]}
MS = 1e-3


def stalling(clock, *, usual=0.5 * MS, stall=20 * MS, every=1000):
    """A backend that takes `usual`, and one call in `every` takes `stall`."""
    number = itertools.count(1)

    def call(eeg):
        clock.advance(stall if next(number) % every == 0 else usual)

    return call


def test_a_closed_loop_hides_what_an_open_loop_shows():
    """One call in a thousand takes 20 ms: the closed loop has it in 0.1 % of its figures, the windows behind it look fine.

    At 400 windows a second, 20 ms are 8 windows. The oracle is the queue by hand: the k-th window behind the stall waits for what
    is left of it.
    """
    clock = VirtualClock()
    closed = loops.closed_loop(stalling(clock), WINDOWS, clock, seconds=5)
    n = len(closed)
    assert (closed > 1 * MS).sum() == n // 1000
    assert percentile(closed, 99.8) == pytest.approx(0.5 * MS)

    rate, deadline = 400.0, 2.5 * MS
    served = loops.open_loop(stalling(clock), {1: WINDOWS}, loops.even(rate, 5500), clock, period=1 / rate)
    expected, free = [], 0.0
    for i in range(5500):
        due = (i + 1) / rate
        free = max(free, due) + (20 * MS if (i + 1) % 1000 == 0 else 0.5 * MS)
        expected.append(free - due)
    np.testing.assert_allclose(served.latency, expected, atol=1e-9)
    missed = served.latency > deadline
    per_stall = 1 + 8  # 20 ms, then 18, 16, ... 4 ms and 2 ms: the last one is in time
    assert missed.sum() == 5 * per_stall
    assert loops.longest_run(missed) == per_stall
    assert percentile(served.latency, 99.9) == pytest.approx(18 * MS)  # the sixth of 5500: five stalls, and who came next
    assert percentile(served.latency, 99.2) > 2.5 * MS  # nine windows in a thousand are late, not one
    assert loops.held([served])


@pytest.mark.parametrize(("service", "held"), [(9 * MS, True), (9.9 * MS, True), (10.2 * MS, False), (30 * MS, False)])
def test_a_rate_that_cannot_be_held_is_told_from_a_slow_one(service, held):
    clock = VirtualClock()
    blocks = [
        loops.open_loop(lambda eeg: clock.advance(service), {1: WINDOWS}, loops.even(100, 100), clock, period=0.01)
        for _ in range(5)
    ]
    assert loops.held(blocks) is held
    assert loops.utilization(blocks) == pytest.approx(service / 0.01, rel=0.02)


def test_a_hopeless_rate_is_given_up():
    clock = VirtualClock()
    served = loops.open_loop(lambda eeg: clock.advance(0.5), {1: WINDOWS}, loops.even(100, 10_000), clock, period=0.01)
    assert served.gave_up
    assert (served.n_due, len(served.due)) == (10_000, 4)  # late by 1.5 s at the fourth
    assert not loops.held([served])


def test_one_stall_at_the_end_of_a_block_is_no_backlog():
    clock = VirtualClock()
    blocks = []
    for turn in range(3):
        times = iter([1 * MS] * 90 + ([200 * MS] if turn == 0 else [1 * MS]) + [1 * MS] * 9)
        blocks.append(
            loops.open_loop(lambda eeg, t=times: clock.advance(next(t)), {1: WINDOWS}, loops.even(100, 100), clock, period=0.01)
        )
    assert loops.held(blocks)


@settings(deadline=None, max_examples=60)
@given(
    gaps=st.lists(st.integers(0, 20), min_size=1, max_size=80),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20),
)
def test_batches_are_what_waits_and_every_window_is_served_once_in_order(gaps, lengths):
    """Windows are due at whole milliseconds, and calls never end at one: no order hangs on the rounding."""
    clock, due = VirtualClock(), np.cumsum(gaps) * MS
    lengths = [(length + np.pi / 77) * MS for length in lengths]
    length, sizes = itertools.cycle(lengths), []

    def call(eeg):
        sizes.append(len(eeg))
        clock.advance(next(length))

    served = loops.open_loop(call, BATCHES, due.tolist(), clock, period=10.0)
    assert sum(sizes) == len(due) == len(served.due)
    assert served.busy == pytest.approx(sum(itertools.islice(itertools.cycle(lengths), len(sizes))))
    assert (served.start >= served.due - 1e-12).all()
    first = np.cumsum([0, *sizes[:-1]])
    for i, size in zip(first, sizes, strict=True):
        waiting = int((due[i:] <= served.start[i] + 1e-9).sum())
        assert size == max(b for b in BATCHES if b <= max(1, waiting))


def test_streams_have_a_phase_each_and_keep_it():
    due = loops.streams(5, rate=10, seconds=2, rng=np.random.default_rng(0))
    assert len(due) == 100
    assert (np.diff(due) >= 0).all()
    phases = np.sort(due % 0.1)
    assert len(np.unique(phases.round(9))) == 5
    assert due.max() < 2


def test_jitter_is_that_of_the_intervals_between_outputs():
    clock = VirtualClock()
    times = itertools.cycle([1 * MS, 3 * MS])
    served = loops.open_loop(lambda eeg: clock.advance(next(times)), {1: WINDOWS}, loops.even(100, 1000), clock, period=0.01)
    assert loops.jitter([served]) == pytest.approx(2 * MS, rel=0.01)  # intervals of 8 and 12 ms in turn
    assert loops.jitter([]) is None


def test_longest_run():
    assert loops.longest_run(np.array([True, False, True, True, False])) == 2
    assert loops.longest_run(np.array([False])) == 0


def test_keep_warm_lowers_what_a_pause_costs_and_says_what_it_took():
    """A backend that is slow after a pause of 20 ms: without beats every window is, with them none."""

    def backend(clock):
        last = [clock.now()]

        def call(eeg=None):
            clock.advance(5 * MS if clock.now() - last[0] > 20 * MS else 1 * MS)
            last[0] = clock.now()

        return call

    clock = VirtualClock()
    cold = loops.open_loop(backend(clock), {1: WINDOWS}, loops.even(10, 50), clock, period=0.1)
    call = backend(clock)
    policy = KeepWarm(call, 0.01, clock)
    warm = loops.open_loop(call, {1: WINDOWS}, loops.even(10, 50), clock, period=0.1, keep_warm=policy)
    np.testing.assert_allclose(cold.latency, 5 * MS)
    np.testing.assert_allclose(warm.latency, 1 * MS)
    assert policy.busy_s == pytest.approx(policy.n_beats * 1 * MS)
    assert policy.n_beats == pytest.approx(50 * 9, abs=50)


# ---------------------------------------------------------------- warm-up


def test_warm_up_goes_on_until_latencies_stand_still():
    clock, calls = VirtualClock(), itertools.count()

    def call(eeg):
        clock.advance(1 * MS + 4 * MS * np.exp(-next(calls) / 50))

    assert loops.warm_up(call, WINDOWS, clock, seconds=10)
    before = clock.now()
    call(None)
    assert clock.now() - before < 1.1 * MS


def test_warm_up_says_that_it_did_not_come_to_rest():
    clock, calls = VirtualClock(), itertools.count()
    assert not loops.warm_up(lambda eeg: clock.advance(1 * MS * 1.01 ** next(calls)), WINDOWS, clock, seconds=2)


def test_noise_without_a_trend_is_stable():
    rng = np.random.default_rng(0)
    verdicts = [loops.is_stable(1 + 0.02 * rng.standard_normal(10)) for _ in range(200)]
    assert np.mean(verdicts) > 0.9
    assert not loops.is_stable(np.linspace(1.0, 1.04, 10))


# ---------------------------------------------------------------- cost


def test_measuring_costs_little():
    """Under 1 us a call on a quiet machine (every report says what it was); a tenfold of that is a mistake anywhere.

    What a turn of the loop takes beside the call is not in the latencies, and is judged in the quickest of some runs.
    """
    clock, turns = Clock(), []
    for _ in range(10):
        start = time.perf_counter()
        latencies = loops.closed_loop(lambda eeg: None, WINDOWS, clock, seconds=0.02)
        turns.append((time.perf_counter() - start) / len(latencies))
    assert np.median(latencies) < 10e-6
    assert min(turns) < 10e-6
