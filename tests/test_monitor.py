"""What the monitor says is what was written, at any moment, however fast the loop writes."""

import dataclasses
import itertools
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitors import Written, decision
from streams import ScriptedSource, Wrapped, chunks_of, eeg, info_of

from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.errors import RefusedError
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.predictor import Predictor, load
from sjepa_deploy.runtime.watch.snapshot import TIME_EDGES
from sjepa_deploy.runtime.watch.watching import watch


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_nothing_yet():
    taken = Written().monitor.snapshot()
    assert taken.state == "waiting"
    assert (taken.counters, taken.n_skipped, len(taken.decisions)) == (Counters(), 0, 0)
    largest = [taken.latency.largest, taken.age.largest, taken.newest_sample, taken.percentile("latency", 50)]
    assert np.isnan(largest).all()


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 20.0)), max_size=60), st.integers(1, 20))
def test_agrees_with_a_plain_account_of_the_same_decisions(times, n_recent):
    written = Written(n_recent=n_recent)
    made = [
        written.decide(index, transport=transport, latency=latency, prediction=(index, -index), bridged=index % 3 == 0)
        for index, (transport, latency) in enumerate(times)
    ]
    taken = written.monitor.snapshot()
    assert taken.n_noted == taken.counters.decisions == len(times)
    newest = made[-n_recent:]
    of = taken.decisions
    columns = zip(of.index, of.time, of.received, of.decided, strict=True)
    assert list(columns) == [(d.index, d.time, d.received, d.decided) for d in newest]
    assert of.flags == tuple(d.flags for d in newest)
    assert of.prediction.tolist() == [[d.index, -d.index] for d in newest]
    edges = np.array([-np.inf, *TIME_EDGES, np.inf])
    for name in ("age", "latency"):
        values, times_of = np.array([getattr(d, name) for d in made]), getattr(taken, name)
        expected = [((values > low) & (values <= high)).sum() for low, high in itertools.pairwise(edges)]
        assert list(times_of.counts) == expected
        if made:
            assert times_of.largest == values.max()
            assert times_of.total == pytest.approx(values.sum())
            assert taken.percentile(name, 50) == pytest.approx(np.percentile(values[-n_recent:], 50))


def test_age_counts_from_the_stamp_and_latency_from_the_arrival():
    """A sample that is 8 ms under way and decided 3.8 ms after its arrival: the decision's latency is 3.8 ms, its age 11.8."""
    written = Written()
    written.decide(0, transport=0.008, latency=0.0038)
    taken = written.monitor.snapshot()
    assert taken.latency.largest == pytest.approx(0.0038)
    assert taken.age.largest == pytest.approx(0.0118)


def test_counters_are_those_of_the_decoder(make_bundle):
    """Over losses, late windows and misses, the monitor never says anything but what the decoder counted."""
    with load(make_bundle("prelocal")) as predict:
        spec = predict.spec
        samples, stamps = eeg(1500), np.arange(1500) / spec.sfreq
        kept = np.r_[0:400, 440:900, 905:1500]
        chunks = chunks_of(samples[kept], stamps[kept])
        late = [dataclasses.replace(c, received=c.received + (0.3 if 70 <= i < 80 else 0)) for i, c in enumerate(chunks)]
        decoder = Decoder(predict, ScriptedSource(info_of(spec), late), StreamConfig(late="skip"))
        monitor, runs = watch(decoder), [0]
        decoder.on_decision(lambda made: runs.append(monitor.snapshot().counters.miss_run))
        decoder.run()
    taken = monitor.snapshot()
    assert taken.counters == decoder.counters
    assert taken.skips == {
        "late": decoder.counters.skipped_late, "gap": decoder.counters.skipped_gap, "paused": 0, "held": 0, "backend failed": 0
    }  # fmt: skip
    assert taken.counters.windows == taken.counters.decisions + taken.n_skipped
    assert taken.skips["late"] > 5
    assert taken.skips["gap"] > 5
    assert taken.counters.longest_misses >= taken.skips["late"] > 0
    assert [i.kind for i in taken.incidents if i.kind == "gap"] == ["gap", "gap"]
    assert taken.state == "decoding"


def watched(predict, chunks, **config):
    """Decode `chunks`, and return the snapshot after each of them, and the decoder."""
    decoder = Decoder(predict, ScriptedSource(info_of(predict.spec), chunks), StreamConfig(**config))
    monitor, shots = watch(decoder), []
    decoder.on_chunk(lambda _: shots.append(monitor.snapshot()))
    decoder.run()
    return shots, decoder


def test_without_decisions_for_a_while_the_state_says_so(make_bundle):
    """60 ms are lost in every 1.5 s, so that no window of 2 s is whole any more; then the losses end."""
    with load(make_bundle("prelocal")) as predict:
        n = 4000
        kept = np.array([i for i in range(n) if not (600 <= i < 3000 and i % 150 < 6)])
        shots, _ = watched(predict, chunks_of(eeg(n)[kept], kept / predict.spec.sfreq))
    states = [(shot.now, shot.state) for shot in shots]
    assert {state for now, state in states if now < 1.95} == {"filling"}
    assert {state for now, state in states if 2.2 < now < 6} == {"decoding"}
    last = next(shot.decisions.time[-1] for shot in reversed(shots) if shot.now < 20)
    # a window of 2 s, and 5 s more
    assert {state for now, state in states if last < now < last + 6.9} == {"decoding"}
    assert {state for now, state in states if last + 7.2 < now < 30} == {"no decisions"}
    assert {state for now, state in states if now > 32.5} == {"decoding"}


def test_windows_that_are_all_late_are_no_decisions(make_bundle):
    """From 3 s on; a stream whose windows are late from the start is refused."""
    with load(make_bundle("prelocal")) as predict:
        samples, stamps = eeg(1500), np.arange(1500) / predict.spec.sfreq
        for late, delay, state in (("skip", 0.3, "no decisions"), ("queue", 0.3, "decoding"), ("hold", 0.0, "decoding")):
            chunks = [
                dataclasses.replace(c, received=c.received + (delay if c.received > 3 else 0.0))
                for c in chunks_of(samples, stamps)
            ]
            shots, _ = watched(predict, chunks, late=late)
            assert {shot.state for shot in shots if 2.2 < shot.now < 3} == {"decoding"}
            assert shots[-1].state == state


def test_a_backend_that_hangs_is_no_decisions():
    """Nothing is written meanwhile: the time alone says so."""
    clock = Clock()
    written = Written(clock=clock)
    written.monitor.received(0.0)
    written.decide(0)
    clock.now = 6.9
    assert written.monitor.snapshot().state == "decoding"
    clock.now = 7.1
    assert written.monitor.snapshot().state == "no decisions"
    written.monitor.set_state("silent")
    assert written.monitor.snapshot().state == "silent"
    clock.now = 60.0
    written.monitor.received(60.0)
    assert written.monitor.snapshot().state == "filling"  # it has the time of a window again
    clock.now = 67.1
    assert written.monitor.snapshot().state == "no decisions"


@pytest.mark.parametrize("step", [-500.0, 500.0])
def test_silence_counts_from_the_arrival_whatever_the_stamps_say(make_bundle, step):
    with load(make_bundle("prelocal")) as predict:
        stamps = 1000 + np.arange(1500) / predict.spec.sfreq
        chunks = chunks_of(eeg(1500), stamps)
        stepped = [dataclasses.replace(c, stamps=c.stamps + step) if c.received > 1005 else c for c in chunks]
        shots, decoder = watched(predict, stepped)
    assert decoder.counters.clock_resets == 1
    assert max(shot.now - shot.newest_sample for shot in shots) < 0.01


@pytest.mark.parametrize(("policy", "n_bad", "n_repaired"), [("repair", 2, 2), ("repair", 6, 0), ("flag", 2, 0)])
def test_repaired_is_what_the_conditioning_interpolates(make_bundle, policy, n_bad, n_repaired):
    with load(make_bundle("prelocal")) as predict:
        samples = eeg(1200)
        samples[600:, :n_bad] = 0.0
        shots, _ = watched(predict, chunks_of(samples, np.arange(1200) / predict.spec.sfreq), bad_channels=policy)
    quality = shots[-1].quality
    assert (quality.state == ChannelState.FLAT).sum() == n_bad
    assert quality.repaired.tolist() == [i < n_repaired for i in range(8)]


def test_channels_that_the_stream_lacks_are_interpolated(make_bundle):
    with load(make_bundle("prelocal")) as predict:
        spec, samples = predict.spec, eeg(600)
        chunks = chunks_of(samples, np.arange(600) / spec.sfreq)
        info = info_of(spec)
        decoder = Decoder(predict, ScriptedSource(info, chunks), StreamConfig(interpolate=True, bads=spec.ch_names[:1]))
        monitor = watch(decoder)
        decoder.run()
    quality = monitor.snapshot().quality
    assert quality.state.tolist() == [ChannelState.MISSING] + 7 * [ChannelState.OK]
    assert quality.repaired.tolist() == [True] + 7 * [False]


def test_windows_that_the_backend_failed_on_are_misses(make_bundle):
    with load(make_bundle("prelocal")) as predict:
        backend = Wrapped(predict.backend)
        refusing = Predictor(predict.bundle, backend)
        decoder = Decoder(
            refusing, ScriptedSource(info_of(predict.spec), chunks_of(eeg(600), np.arange(600) / predict.spec.sfreq))
        )
        monitor = watch(decoder)

        def refuse(eeg):
            raise RefusedError("The server is full.", "Wait.")

        backend.before = refuse
        decoder.run()
    counters = monitor.snapshot().counters
    assert counters.failed == counters.misses == counters.longest_misses > 30


def test_edges_are_ten_a_decade():
    steps = np.diff(np.log10(TIME_EDGES))
    assert (TIME_EDGES[0], TIME_EDGES[-1], len(TIME_EDGES)) == (1e-5, 10.0, 61)
    assert (abs(steps - 0.1) < 0.01).all()


def test_a_high_percentile_of_few_latencies_is_not_given():
    written = Written()
    for index in range(99):
        written.decide(index, latency=0.01)
    assert np.isnan(written.monitor.snapshot().percentile("latency", 99))
    written.decide(99, latency=0.01)
    assert written.monitor.snapshot().percentile("latency", 99) == pytest.approx(0.01)


def test_quality_incidents_and_state():
    clock = Clock()
    written = Written(n_incidents=2, clock=clock)
    monitor = written.monitor
    monitor.received(0.5)
    monitor.received(0.6)
    monitor.set_state("decoding")
    monitor.set_quality([0, 1, 5, 0, 0, 0, 0, 0], np.arange(8.0), [False, True, True] + 5 * [False])
    for second in range(3):
        written.happen(f"incident {second}", time=float(second))
    clock.now = 2.0
    taken = monitor.snapshot()
    assert (taken.newest_sample, taken.state, taken.now) == (0.6, "decoding", 2.0)
    assert [ChannelState(s).name for s in taken.quality.state[:3]] == ["OK", "FLAT", "MISSING"]
    assert taken.quality.repaired.tolist() == [False, True, True] + 5 * [False]
    assert [(i.time, i.text) for i in taken.incidents] == [(1.0, "incident 1"), (2.0, "incident 2")]
    assert taken.memory > 10e6


def test_a_base_model_has_no_values_to_keep():
    written = Written(output_names=())
    written.decide(0, prediction=np.zeros((8, 64)))
    assert written.monitor.snapshot().decisions.prediction.shape == (1, 0)


def test_a_refused_write_leaves_the_monitor_readable():
    written = Written()
    with pytest.raises(ValueError):
        written.monitor.decided(decision(0, prediction=(1.0, 2.0, 3.0)))
    assert written.monitor.snapshot().n_noted == 0


def test_snapshots_are_of_one_moment_while_the_loop_writes():
    """Every value written is a function of the window's number, so that a mixture of two moments would show."""
    written = Written(n_recent=64)
    monitor = written.monitor
    stop = threading.Event()

    def loop():
        index = 0
        while not stop.is_set():
            written.counters.samples += 1
            monitor.received(index)
            written.decide(index, prediction=(index, 2 * index), bridged=index % 2 == 0)
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
            np.testing.assert_allclose(taken.decisions.time, index * 0.1)
            assert taken.decisions.flags == tuple(("bridged",) if i % 2 == 0 else () for i in index)
            assert taken.n_noted == taken.age.counts.sum() == taken.latency.counts.sum() == taken.counters.decisions
            assert 0 <= taken.counters.samples - taken.n_noted <= 1
            if len(index):
                assert index[-1] == taken.n_noted - 1 >= last
                last = index[-1]
        assert last > 0
    finally:
        stop.set()
        thread.join()


def test_the_loop_allocates_nothing_that_stays():
    written = Written(n_recent=256)
    state, rms = np.zeros(8, np.uint8), np.ones(8)

    def loop(n):
        for index in range(n):
            written.monitor.received(index * 0.1)
            written.decide(index)
            written.monitor.set_quality(state, rms)
            written.happen("something")

    loop(1000)  # every slot is filled
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        loop(20_000)
        assert tracemalloc.get_traced_memory()[0] - before < 20_000  # a byte a decision would be 20,000
    finally:
        tracemalloc.stop()
