"""What the monitor says is what was written, at any moment, however fast the loop writes."""

import itertools
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitors import facts

from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.runtime.watch.monitor import LATENCY_EDGES, Monitor

pytestmark = pytest.mark.alone


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def decide(monitor, index, latency, *, prediction=(0.0, 0.0), flags=()):
    due = index * 0.1
    monitor.decided(index=index, time=due - 0.02, due=due, decided=due + latency, prediction=prediction, flags=flags)


def test_nothing_yet():
    taken = Monitor(facts()).snapshot()
    assert taken.state == "waiting"
    assert (taken.n_windows, taken.n_misses, len(taken.decisions)) == (0, 0, 0)
    assert np.isnan([taken.latency_max, taken.age_max, taken.newest_sample, taken.percentile("latency", 50)]).all()


@given(st.lists(st.one_of(st.floats(-0.01, 20.0), st.sampled_from(["late", "gap"])), max_size=60), st.integers(1, 20))
def test_agrees_with_a_plain_account_of_the_same_windows(windows, n_recent):
    monitor = Monitor(facts(deadline=0.1), n_recent=n_recent)
    misses, kept = [], []
    for index, window in enumerate(windows):
        if isinstance(window, str):
            monitor.skipped(window, late=window == "late")
            if window == "late":
                misses.append(True)
        else:
            decide(monitor, index, window, prediction=(index, -index), flags=(f"window {index}",))
            due = index * 0.1
            kept.append((index, due, due + window))
            misses.append(due + window - due > 0.1)
    taken = monitor.snapshot()
    runs = "".join("x" if missed else " " for missed in misses).split(" ")
    assert taken.n_windows == len(windows) == taken.n_decisions + taken.n_skipped
    assert taken.skips == {r: windows.count(r) for r in ("late", "gap") if r in windows}
    assert taken.n_misses == sum(misses)
    assert taken.longest_miss_run == max(map(len, runs))
    assert taken.miss_run == len(runs[-1])
    newest = kept[-n_recent:]
    of = taken.decisions
    assert list(zip(of.index, of.due, of.decided, strict=True)) == newest
    assert of.flags == tuple((f"window {index}",) for index, _, _ in newest)
    assert of.prediction.tolist() == [[index, -index] for index, _, _ in newest]
    latencies = np.array([decided - due for _, due, decided in kept])
    edges = np.array([-np.inf, *LATENCY_EDGES, np.inf])
    expected = [((latencies > low) & (latencies <= high)).sum() for low, high in itertools.pairwise(edges)]
    assert list(taken.latency_counts) == expected
    if kept:
        assert taken.latency_max == latencies.max()
        assert taken.latency_sum == pytest.approx(latencies.sum())
        assert taken.percentile("latency", 50) == pytest.approx(np.percentile(latencies[-n_recent:], 50))


def test_edges_are_ten_a_decade():
    steps = np.diff(np.log10(LATENCY_EDGES))
    assert (LATENCY_EDGES[0], LATENCY_EDGES[-1], len(LATENCY_EDGES)) == (1e-5, 10.0, 61)
    assert (abs(steps - 0.1) < 0.01).all()


def test_a_high_percentile_of_few_latencies_is_not_given():
    monitor = Monitor(facts())
    for index in range(99):
        decide(monitor, index, 0.01)
    assert np.isnan(monitor.snapshot().percentile("latency", 99))
    decide(monitor, 99, 0.01)
    assert monitor.snapshot().percentile("latency", 99) == pytest.approx(0.01)


def test_counters_quality_events_and_state():
    clock = Clock()
    monitor = Monitor(facts(), n_incidents=2, clock=clock)
    monitor.received(10, 0.5)
    monitor.received(5, 0.6)
    monitor.count("samples lost", 3)
    monitor.count("gaps")
    monitor.set_state("decoding")
    monitor.set_quality([0, 1, 5, 0, 0, 0, 0, 0], np.arange(8.0), [False, True, True] + 5 * [False])
    for second in range(3):
        clock.now = float(second)
        monitor.incident(f"incident {second}")
    taken = monitor.snapshot()
    assert taken.counters == {"samples received": 15, "samples lost": 3, "gaps": 1}
    assert (taken.newest_sample, taken.state, taken.now) == (0.6, "decoding", 2.0)
    assert [ChannelState(s).name for s in taken.quality.state[:3]] == ["OK", "FLAT", "MISSING"]
    assert taken.quality.repaired.tolist() == [False, True, True] + 5 * [False]
    assert [(e.time, e.text) for e in taken.incidents] == [(1.0, "incident 1"), (2.0, "incident 2")]
    assert taken.memory > 10e6


def test_a_base_model_has_no_values_to_keep():
    monitor = Monitor(facts(output_names=()))
    decide(monitor, 0, 0.01, prediction=np.zeros((8, 64)))
    assert monitor.snapshot().decisions.prediction.shape == (1, 0)


def test_a_refused_write_leaves_the_monitor_readable():
    monitor = Monitor(facts())
    with pytest.raises(ValueError):
        decide(monitor, 0, 0.01, prediction=(1.0, 2.0, 3.0))
    assert monitor.snapshot().n_decisions == 0


def test_snapshots_are_of_one_moment_while_the_loop_writes():
    """Every value written is a function of the window's number, so that a mixture of two moments would show."""
    monitor = Monitor(facts(), n_recent=64)
    stop = threading.Event()

    def loop():
        index = 0
        while not stop.is_set():
            monitor.received(1, index)
            decide(monitor, index, 0.01, prediction=(index, 2 * index), flags=(str(index),))
            monitor.skipped("gap")
            index += 1

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        last = -1
        for _ in range(200):
            taken = monitor.snapshot()
            index = taken.decisions.index
            assert (np.diff(index) == 1).all()
            np.testing.assert_array_equal(taken.decisions.prediction, np.stack([index, 2 * index], axis=1))
            np.testing.assert_allclose(taken.decisions.due, index * 0.1)
            assert taken.decisions.flags == tuple((str(i),) for i in index)
            assert taken.n_decisions == taken.latency_counts.sum()
            assert 0 <= taken.n_decisions - taken.n_skipped <= 1
            assert 0 <= taken.counters.get("samples received", 0) - taken.n_decisions <= 1
            if len(index):
                assert index[-1] == taken.n_decisions - 1 >= last
                last = index[-1]
        assert last > 0
    finally:
        stop.set()
        thread.join()


def test_the_loop_allocates_nothing_that_stays():
    monitor = Monitor(facts(), n_recent=256)
    state, rms = np.zeros(8, np.uint8), np.ones(8)

    def loop(n):
        for index in range(n):
            monitor.received(10, index * 0.1)
            decide(monitor, index, 0.01)
            monitor.set_quality(state, rms)
            monitor.incident("something")

    loop(1000)  # every slot is filled
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        loop(20_000)
        assert tracemalloc.get_traced_memory()[0] - before < 20_000  # a byte a decision would be 20,000
    finally:
        tracemalloc.stop()
