import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_clock import VirtualClock

from sjepa_deploy.runtime.keep_warm import N_FIRST, N_REMEMBERED, Clock, KeepWarm


def warm(clock, lengths, period):
    """A policy whose dummy calls take `lengths` in turn, and the intervals in which they ran."""
    ran, lengths = [], iter(lengths)

    def call():
        start = clock.now()
        clock.advance(next(lengths))
        ran.append((start, clock.now()))

    return KeepWarm(call, period, clock), ran


@settings(deadline=None)
@given(
    length=st.floats(1e-5, 0.02),
    period=st.floats(1e-3, 0.5),
    gaps=st.lists(st.floats(0, 1.0), min_size=1, max_size=10),
)
def test_no_beat_stands_in_the_way(length, period, gaps):
    """Whatever the length of calls, period and gaps: every wait returns at its due time, not later."""
    clock = VirtualClock()
    policy, ran = warm(clock, iter(lambda: length, None), period)
    for gap in gaps:
        due = clock.now() + gap
        assert policy.wait_until(due) == pytest.approx(due, abs=1e-9)
    assert policy.n_beats == len(ran) - N_FIRST
    assert policy.busy_s == pytest.approx(length * policy.n_beats)
    ends = [end for _, end in ran[N_FIRST - 1 :]]
    starts = [start for start, _ in ran[N_FIRST:]]
    assert all(start - end >= period - 1e-9 for end, start in zip(ends, starts, strict=False))


def test_a_long_gap_is_filled_at_the_period():
    clock = VirtualClock()
    policy, ran = warm(clock, iter(lambda: 0.001, None), period=0.049)
    due = clock.now() + 1.0
    policy.wait_until(due)
    assert policy.n_beats == 19  # at 0.049, 0.099, ..., 0.949
    assert due - ran[-1][1] <= 0.05 + 0.001


def test_the_longest_call_seen_decides_and_is_forgotten():
    clock = VirtualClock()
    policy, _ = warm(clock, iter(lambda: 0.001, None), period=0.01)
    assert policy.beat(clock.now() + 0.0011)
    assert not policy.beat(clock.now() + 0.0009)
    policy.saw(clock.now(), clock.now() + 0.02)  # a real call that stalled
    assert policy.longest_s == pytest.approx(0.02)
    assert not policy.beat(clock.now() + 0.019)
    assert policy.beat(clock.now() + 0.021)
    for _ in range(N_REMEMBERED):
        policy.saw(clock.now(), clock.now() + 0.001)
    assert policy.beat(clock.now() + 0.0011)


def test_a_real_call_counts_as_a_beat():
    clock = VirtualClock()
    policy, ran = warm(clock, iter(lambda: 0.001, None), period=0.1)
    for _ in range(20):  # windows every 50 ms: no pause is as long as the period
        policy.wait_until(clock.now() + 0.05)
        policy.saw(clock.now() - 0.001, clock.now())
    assert len(ran) == N_FIRST


def test_a_due_time_that_has_passed_is_not_waited_for():
    clock = VirtualClock(10.0)
    policy, ran = warm(clock, iter(lambda: 0.001, None), period=0.01)
    now = clock.now()
    assert policy.wait_until(now - 1) == now
    assert len(ran) == N_FIRST


@pytest.mark.parametrize("period", [0, -1, float("nan")])
def test_a_period_must_be_one(period):
    with pytest.raises(ValueError, match="Use a positive one"):
        KeepWarm(lambda: None, period)


def test_the_real_clock_is_never_early():
    clock = Clock()
    for wait in (0, 1e-5, 4e-4, 2e-3):
        due = time.perf_counter() + wait
        assert clock.wait_until(due) >= due
        assert time.perf_counter() - due < 1
