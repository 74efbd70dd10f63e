"""Windows of events in live streams: those that are cut from the recording at MNE's samples; every event is accounted for."""

import dataclasses
import itertools
import json

import mne
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from streams import ScriptedSource, Wrapped, chunks_of, info_of, run_stream

import sjepa_deploy
from sjepa_deploy.eeg import prepare
from sjepa_deploy.eeg.events import events_of
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.steps import BandPass, Channels, Reference, Resample
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.lines import write_lines
from sjepa_deploy.runtime.live.markers import Event, PlannedMarkers, RepeatedMarkers
from sjepa_deploy.runtime.live.open_markers import open_markers
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.replay import replay
from sjepa_deploy.runtime.live.schedule import Events, Hop
from sjepa_deploy.runtime.live.sources import Chunk, ReplaySource
from sjepa_deploy.runtime.live.windows import WindowStream
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.runtime.watch.dashboard import describe
from sjepa_deploy.runtime.watch.watching import watch
from sjepa_deploy.spec import EventWindow, SignalSpec

NAMES = ("Fz", "Cz", "Pz", "Oz")


def signal_of(sfreq=100.0, n_times=80):
    steps = (BandPass(l_freq=1.0, h_freq=30.0), Resample(), Channels(), Reference())
    return SignalSpec(n_chans=4, n_times=n_times, sfreq=sfreq, ch_names=NAMES, steps=steps)


def volts_of(n_samples, seed=0):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(4, n_samples)), axis=1) * 1e-6 + rng.normal(size=(4, n_samples)) * 5e-6


def raw_of(volts, sfreq):
    return mne.io.RawArray(volts, mne.create_info(list(NAMES), sfreq, "eeg"), verbose="error")


def assert_events_accounted(counters, n_decided):
    assert counters.events == (
        counters.windows
        + counters.events_before_start
        + counters.events_past_end
        + counters.events_past_history
        + counters.events_doubled
        + counters.events_ahead
    )
    skipped = counters.skipped_late + counters.skipped_gap + counters.skipped_paused
    assert counters.windows == n_decided + skipped + counters.failed


def stream_windows(signal, info, chunks, arrivals, *, start, history=3.0):
    """Push chunks; `arrivals` are (chunk before which the marker comes, event). Return windows, left events and counters."""
    counters, left, windows = Counters(), [], []
    stream = WindowStream(
        signal,
        info,
        StreamConfig(hop=0, check_unit=False),
        counters=counters,
        report=lambda kind, text: None,
        schedule=Events(start=start, history=history),
        undecided=lambda one: left.append((one.event, one.reason)),
    )

    def keep(made):
        windows.extend((window, stream.eeg(window.behind)[0].copy()) for window in made)

    for i, chunk in enumerate(chunks):
        keep(stream.mark([event for at, event in arrivals if at == i]))
        keep(stream.push(chunk))
    keep(stream.mark([event for at, event in arrivals if at >= len(chunks)]))
    keep(stream.finish())
    assert_events_accounted(counters, len(windows))
    return windows, left, counters


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    rates=st.sampled_from([(128.0, 128.0), (128.0, 100.0), (250.0, 100.0), (500.0, 128.0), (100.0, 100.0)]),
    samples=st.lists(st.integers(-5, 1300), min_size=1, max_size=25),
    start=st.floats(-1.2, 1.0),
    delays=st.lists(st.floats(0.0, 3.0), min_size=25, max_size=25),
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    pause=st.integers(400, 800),
    paused=st.booleans(),
)
def test_each_window_is_the_one_at_the_sample_of_mne(rates, samples, start, delays, sizes, order, pause, paused):
    """The oracle cuts the causal recording, with MNE's rounding of the event to the model's rate. Markers are up to 3 s late."""
    sfreq, sfreq_model = rates
    signal, n_samples = signal_of(sfreq_model), 1200
    volts = volts_of(n_samples)
    pieces = [(0, pause), (pause, n_samples)] if paused else [(0, n_samples)]
    fitted = {
        first: fit_recording(raw_of(volts[:, first:stop], sfreq), signal, phase="causal", check_unit=False).data
        for first, stop in pieces
    }
    wanted, doubled = {}, 0
    for sample in samples:
        if sample in wanted:
            doubled += 0 <= sample < n_samples  # the others have no sample to be at twice
            continue
        first, stop = next(((a, b) for a, b in pieces if a <= sample < b), (0, 0))
        begin = int(np.rint((sample - first) * sfreq_model / sfreq) + np.rint(start * sfreq_model))
        whole = stop > 0 and begin >= 0 and begin + signal.n_times <= fitted[first].shape[1]
        wanted[sample] = fitted[first][:, begin : begin + signal.n_times] if whole else None
    info = StreamInfo(name="amp", ch_names=NAMES, sfreq=sfreq, unit="V")
    chunks, at, size = [], 0, itertools.cycle(sizes)
    while at < n_samples:
        stop = min(at + next(size), n_samples, *(edge for edge in (pause,) if paused and at < edge))
        stamps = np.arange(at, stop) / sfreq
        chunks.append(Chunk(volts.T[at:stop], stamps, float(stamps[-1]), restarted=paused and at == pause))
        at = stop
    ends = np.array([chunk.stamps[-1] for chunk in chunks])
    events = [Event(sample / sfreq, "x", sample / sfreq + delay) for sample, delay in zip(samples, delays, strict=False)]
    order.shuffle(events)
    arrivals = [(int(np.searchsorted(ends, event.arrived)), event) for event in events]
    # A chunk is a step of the clock: a marker comes up to a chunk later than it says.
    windows, left, counters = stream_windows(signal, info, chunks, arrivals, start=start, history=3.0 + 2 * 400 / sfreq + 1.3)
    assert counters.events_doubled == doubled
    assert counters.events_past_history == counters.events_ahead == 0
    found = {round(window.event.onset * sfreq): eeg for window, eeg in windows}
    assert set(found) == {sample for sample, eeg in wanted.items() if eeg is not None}
    for sample, eeg in found.items():
        np.testing.assert_array_equal(eeg, wanted[sample])
    reasons = {round(event.onset * sfreq): reason for event, reason in left if reason != "doubled"}
    for sample, reason in reasons.items():
        in_first = not paused or sample < pause
        assert reason in ({"before start"} if sample < 0 else {"before start", "gap", "past end"})
        assert reason != "before start" or in_first
        assert reason != "past end" or not paused or sample >= pause


def test_the_window_ends_with_the_sample_that_makes_it_whole():
    """An event whose marker is there in time gets its window with the chunk of the window's last sample, and none before."""
    signal, volts = signal_of(), volts_of(1000)
    info = StreamInfo(name="amp", ch_names=NAMES, sfreq=100.0, unit="V")
    chunks = chunks_of(volts.T, np.arange(1000) / 100.0, 1)
    stream = WindowStream(
        signal,
        info,
        StreamConfig(check_unit=False),
        counters=Counters(),
        report=lambda kind, text: None,
        schedule=Events(start=0.2),
    )
    assert list(stream.mark([Event(3.0, "x", 0.0)])) == []
    due = [i for i, chunk in enumerate(chunks) for window in stream.push(chunk)]
    assert due == [300 + 20 + 80 - 1]


@pytest.mark.parametrize(
    ("late", "event", "reason"),
    [
        (0, Event(-1.0, "x", 0.0), "before start"),
        (0, Event(float("nan"), "x", 0.0), "gap"),
        (5, Event(500.0, "x", 0.0), "ahead"),
        (0, Event(9.9, "x", 0.0), "past end"),
        (99, Event(1.0, "x", 9.9), "past history"),
    ],
)
def test_an_event_without_a_window_is_told_with_its_reason(late, event, reason):
    chunks = chunks_of(volts_of(1000).T, np.arange(1000) / 100.0, 10)
    info = StreamInfo(name="amp", ch_names=NAMES, sfreq=100.0, unit="V")
    windows, left, _ = stream_windows(signal_of(), info, chunks, [(late, event)], start=0.0)
    assert (windows, left) == ([], [(event, reason)])


def test_an_event_over_lost_samples_has_no_window():
    """100 samples are lost from second 4 on: windows that reach into the loss, and events in it, are counted as gaps."""
    there = np.r_[0:400, 500:1000]
    chunks = chunks_of(volts_of(1000).T[there], there / 100.0, 10)
    info = StreamInfo(name="amp", ch_names=NAMES, sfreq=100.0, unit="V")
    events = [Event(t, f"at {t}", 0.0) for t in (3.0, 3.5, 4.5, 5.0, 6.0)]
    windows, left, counters = stream_windows(signal_of(), info, chunks, [(0, event) for event in events], start=0.0)
    assert [window.event for window, _ in windows] == [events[0], events[3], events[4]]
    assert left == [(events[1], "gap"), (events[2], "gap")]
    assert counters.skipped_gap == 2


def test_events_across_a_clock_that_was_set_have_no_window():
    """From second 5 on the stamps are 1,000 s less: samples count from their arrival, and windows from the first of these."""
    signal, volts, true = signal_of(), volts_of(1000), np.arange(1000) / 100.0
    info = StreamInfo(name="amp", ch_names=NAMES, sfreq=100.0, unit="V")
    stamps = np.where(true < 5.0, true, true - 1000.0)
    chunks = [Chunk(volts.T[i : i + 10], stamps[i : i + 10], float(true[i + 9])) for i in range(0, 1000, 10)]
    events = [Event(t, "x", t) for t in (2.0, 4.5, 6.0, 4.0)]
    arrivals = [(20, events[0]), (45, events[1]), (60, events[2]), (62, events[3])]  # the last one after the clock was set
    windows, left, counters = stream_windows(signal, info, chunks, arrivals, start=0.0)
    assert counters.clock_resets == 1
    assert left == [(events[1], "gap")]
    assert [window.event for window, _ in windows] == [events[0], events[3], events[2]]
    for (_, eeg), (first, start) in zip(windows, ((0, 200), (0, 400), (500, 100)), strict=True):
        fitted = fit_recording(raw_of(volts[:, first : first + 500], 100.0), signal, phase="causal", check_unit=False).data
        np.testing.assert_array_equal(eeg, fitted[:, start : start + 80])


def test_decisions_at_events_name_the_channels_that_were_bad_in_their_windows():
    """Fz is flat from second 4 to 6."""
    volts = volts_of(1500)
    volts[0, 400:600] = volts[0, 400]
    chunks = chunks_of(volts.T, np.arange(1500) / 100.0, 10)
    info = StreamInfo(name="amp", ch_names=NAMES, sfreq=100.0, unit="V")
    events = [Event(t, "x", 0.0) for t in (2.0, 4.6, 9.0)]
    windows, _, _ = stream_windows(signal_of(), info, chunks, [(0, event) for event in events], start=0.0)
    assert [window.bad_channels for window, _ in windows] == [(), ("Fz",), ()]


def heard(address, values, size, stamps=None, began=-np.inf):
    """Return (sample, name) of the events that a trigger channel has."""
    info = StreamInfo(name="amp", ch_names=("Fz", "STI"), sfreq=100.0, unit="V")
    (markers,) = open_markers([address], ScriptedSource(info, []))
    stamps = np.arange(len(values)) / 100.0 if stamps is None else stamps
    for chunk in chunks_of(np.stack([0 * values, values], axis=1), stamps, size):
        markers.hear(chunk, 0.0, began)
    return [(event.onset * 100, event.description) for event in markers.read()]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("mask", [None, 0b0110, 0b1000_0001])
def test_a_trigger_channel_names_events_by_its_rising_values(size, mask):
    """The oracle is `mne.find_events`, which masks too."""
    rng = np.random.default_rng(3)
    values = np.repeat(rng.integers(0, 256, 200), rng.integers(1, 6, 200)).astype(float)
    values = np.r_[values, 0.0]
    raw = mne.io.RawArray(values[None], mne.create_info(["STI"], 100.0, "stim"), verbose="error")
    want = mne.find_events(raw, "STI", consecutive="increasing", shortest_event=1, mask=mask, verbose="error")
    found = heard("channel:sti" if mask is None else f"channel:sti,mask={mask:#x}", values, size)
    assert [(round(sample), name) for sample, name in found] == [(int(sample), f"{code}") for sample, _, code in want]
    assert len(found) > 20


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 50))
def test_values_that_do_not_last_are_none(runs, least, size):
    """The oracle drops short runs of the whole channel, and looks where what is left rises."""
    values = np.array([value for value, n in runs for _ in range(n)], float)
    starts = [(value, [i for i, _ in run]) for value, run in itertools.groupby(enumerate(values), key=lambda each: each[1])]
    lasting = [(value, run[0]) for value, run in starts if len(run) >= least]
    want = [(start, f"{value:g}") for (before, _), (value, start) in itertools.pairwise(lasting) if value > before]
    found = heard(f"channel:STI,debounce={least / 100}", values, size)
    assert [(round(sample), name) for sample, name in found] == want


def test_a_value_that_rose_in_a_loss_has_no_onset():
    """The first sample after the loss is not when the event was; other edges keep their samples."""
    values = np.array([0, 0, 5, 0, 7, 7, 0, 3, 0], float)
    stamps = np.r_[0:4, 40:45] / 100.0
    (first, _), (lost, name), (last, _) = heard("channel:STI", values, 3, stamps, began=0.4)
    assert (first, last, name) == (2, pytest.approx(43), "7")
    assert np.isnan(lost)


@pytest.mark.parametrize("text", ["Trigger", "STI,mask=no", "STI,mask=0", "STI,debounce=-1", "STI,debounce=x", "STI,edge=up"])
def test_a_trigger_channel_that_cannot_be_is_refused(text):
    with pytest.raises(StreamError):
        heard(f"channel:{text}", np.zeros(3), 1)


@pytest.fixture(scope="module")
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        yield predict


def decode_events(predict, samples, plan, *, start=0.0, names=("all",), size=10, **config):
    source = ReplaySource(info_of(predict.spec), samples, speed=float("inf"), chunk=size)
    markers = PlannedMarkers(plan, source.clock)
    decoder = Decoder(predict, source, StreamConfig(**config), schedule=Events(tuple(names), start), markers=[markers])
    left, incidents = [], []
    decoder.on_undecided(lambda one: left.append((one.event, one.reason)))
    decoder.on_incident(incidents.append)
    decisions = list(decoder)
    assert_events_accounted(decoder.counters, len(decisions))
    assert decoder.counters.events == len(decisions) + len(left)
    return decisions, left, incidents


def microvolts(predict, n_samples):
    rng = np.random.default_rng(5)
    return rng.normal(0, 20, (n_samples, predict.spec.n_chans))


def test_a_decision_belongs_to_its_event_and_is_that_of_the_window(predict):
    """The decision equals that of the hop of one sample whose window ends where the window of the event ends."""
    samples, n_times = microvolts(predict, 2000), predict.spec.n_times
    plan = [(2.0, "left", 0.0), (3.0, "no"), (5.0, "right", 1.5), (7.003, "left", 0.0)]
    decisions, left, _ = decode_events(predict, samples, plan, names=("left", "right"), late="queue")
    source = ReplaySource(info_of(predict.spec), samples, speed=float("inf"), chunk=10)
    every = {d.index: d.prediction for d in Decoder(predict, source, StreamConfig(hop=0, late="queue"))}
    assert left == []
    assert [(d.event.onset, d.event.description) for d in decisions] == [(2.0, "left"), (5.0, "right"), (7.003, "left")]
    for decision, first in zip(decisions, (200, 500, 700), strict=True):
        assert decision.prediction.tobytes() == every[first].tobytes()
        assert decision.time == pytest.approx((first + n_times - 1) / 100.0)
    assert decisions[1].event.marker_delay == pytest.approx(1.5)


class Batches(Wrapped):
    """A backend that promises the same bits in every batch, and counts the windows of each call."""

    batch_invariant = True

    def __init__(self, backend):
        super().__init__(backend)
        self.calls = []
        self.before = lambda eeg: self.calls.append(len(eeg))


@pytest.mark.parametrize(("late", "calls", "n_decided"), [("queue", [4, 4, 3], 12), ("skip", [2], 2)])
def test_windows_that_are_due_together_share_a_batch(predict, late, calls, n_decided):
    """A burst of late markers, and events within one chunk: the same decisions and reasons as one by one, in the same order."""
    burst = [(2.0 + 0.1 * k, f"{k}", 3.0 - 0.1 * k) for k in range(9)]  # all at 5 s; the bundle's batches go up to 4
    close = [(8.03 + 0.01 * k, f"{k}") for k in range(3)]
    together = Batches(predict.backend)
    found = []
    for backend in (together, predict.backend):
        own = Predictor(predict.bundle, backend, check_unit=False)
        decisions, left, _ = decode_events(own, microvolts(predict, 1500), burst + close, late=late, deadline=0.065)
        found.append(([(d.event, d.prediction.tobytes(), d.time, d.index) for d in decisions], left))
    assert found[0] == found[1]
    assert [n for n in together.calls if n > 1] == calls
    assert len(found[0][0]) == n_decided


def test_events_whose_batch_fails_are_told(predict):
    backend = Batches(predict.backend)

    def fail(eeg):
        if len(eeg) > 1:
            raise RuntimeError("the GPU is gone")

    backend.before = fail
    source = ReplaySource(info_of(predict.spec), microvolts(predict, 1500), speed=float("inf"), chunk=10)
    markers = PlannedMarkers([(1.0, "a", 3.0), (1.1, "b", 2.9)], source.clock)
    own = Predictor(predict.bundle, backend, check_unit=False)
    decoder = Decoder(own, source, StreamConfig(late="queue"), schedule=Events(start=0.0), markers=[markers])
    left = []
    decoder.on_undecided(left.append)
    with pytest.raises(RuntimeError):
        decoder.run()
    assert [(one.event.description, one.reason) for one in left] == [("a", "failed"), ("b", "failed")]
    assert_events_accounted(decoder.counters, 0)


def test_a_server_that_does_the_steps_gets_the_window_of_a_late_marker(predict):
    """Not the newest window: the marker came 2 s after the end of its own."""

    class Serves(Wrapped):
        finishes = True

        def run_unfinished(self, eeg):
            return self.run(eeg)

    plan = [(2.0, "x", 4.0)]
    own = Predictor(predict.bundle, Serves(predict.backend), check_unit=False)
    ours, _, _ = decode_events(predict, microvolts(predict, 1500), plan)
    (theirs,), _, _ = decode_events(own, microvolts(predict, 1500), plan)
    assert theirs.prediction.tobytes() == ours[0].prediction.tobytes()


def test_a_hop_is_a_schedule_too(predict):
    samples = microvolts(predict, 600)

    def decided(config, schedule):
        source = ReplaySource(info_of(predict.spec), samples, speed=float("inf"), chunk=10)
        decoder = Decoder(predict, source, config, schedule=schedule)
        return decoder.config, [(d.index, d.prediction.tobytes()) for d in decoder]

    assert decided(StreamConfig(late="queue"), Hop(0.3)) == decided(StreamConfig(late="queue", hop=0.3), None)


def test_the_deadline_counts_from_the_later_of_window_and_marker(predict):
    """The clock of the source stands at the newest sample: a marker 3 s behind its event is late for nobody."""
    plan = [(2.0, "x", 0.0), (4.0, "x", 2.9)]
    decisions, left, _ = decode_events(predict, microvolts(predict, 2000), plan, deadline=0.15)
    assert [d.due for d in decisions] == pytest.approx([2.0 + 1.99 + 0.15, 4.0 + 2.9 + 0.15])
    assert [d.received - d.time for d in decisions] == pytest.approx([decisions[0].received - decisions[0].time, 0.91])
    assert not left


def test_an_event_that_is_late_is_left_out_with_its_reason(predict):
    """Chunks of 2 s at infinite speed: the window was whole up to 2 s before its chunk was there."""
    decisions, left, _ = decode_events(predict, microvolts(predict, 2000), [(1.0, "x", 0.0)], size=200, deadline=0.001)
    assert decisions == []
    assert [reason for _, reason in left] == ["late"]


def test_names_that_never_come_are_told_after_a_minute(predict):
    plan = [(2.0 + 5 * k, "right") for k in range(14)]
    _, _, incidents = decode_events(predict, microvolts(predict, 7500), plan, names=("left", "right"), late="queue")
    (told,) = [incident for incident in incidents if incident.kind == "events"]
    assert "left" in told.text
    assert "right (12)" in told.text
    assert 60 <= told.time < 61


def test_events_that_come_faster_than_they_are_decided_are_told(predict):
    """A decision takes 20 ms, and events come every 10 ms."""
    backend = Wrapped(predict.backend)
    samples = microvolts(predict, 1500)
    source = ScriptedSource(info_of(predict.spec), chunks_of(samples, np.arange(1500) / 100.0, 1))
    markers = PlannedMarkers([(2.0 + 0.01 * k, f"{k}") for k in range(300)], source.clock)
    own = Predictor(predict.bundle, backend, check_unit=False)
    decoder = Decoder(own, source, StreamConfig(deadline=0.1), schedule=Events(start=0.0), markers=[markers])

    def work(eeg):
        source.now += 0.02

    backend.before = work
    incidents = []
    decoder.on_incident(incidents.append)
    decisions = list(decoder)
    (told,) = [incident for incident in incidents if "faster backend" in incident.text]
    assert "every 10 ms" in told.text
    assert "takes 20 ms" in told.text
    assert decoder.counters.skipped_late > 100
    assert_events_accounted(decoder.counters, len(decisions))


def test_markers_that_were_left_out_are_counted_and_told(predict):
    source = ReplaySource(info_of(predict.spec), microvolts(predict, 500), speed=float("inf"), chunk=10)
    markers = PlannedMarkers([(1.0, "x")], source.clock)
    markers.n_lost = 7
    decoder = Decoder(predict, source, schedule=Events(start=0.0), markers=[markers])
    incidents = []
    decoder.on_incident(incidents.append)
    decoder.run()
    assert decoder.counters.markers_lost == 7
    assert [incident.kind for incident in incidents].count("events") == 1


@pytest.mark.parametrize(
    ("plan", "reason", "word"),
    [
        ([(-1000.0, "x", 1003.0), (-999.0, "x", 1003.0)], "before start", "clock"),  # stamped since the program began
        ([(1.7e9, "x", 4.0 - 1.7e9), (1.7e9, "x", 5.0 - 1.7e9)], "ahead", "clock"),  # stamped by time.time()
        ([(1.0, "x", 12.0), (1.5, "x", 11.6)], "past history", "--history"),
    ],
)
def test_markers_of_another_clock_or_too_late_are_told_once(predict, plan, reason, word):
    decisions, left, incidents = decode_events(predict, microvolts(predict, 2000), plan, late="queue")
    assert decisions == []
    assert [why for _, why in left] == [reason] * 2
    told = [incident.text for incident in incidents if incident.kind == "events"]
    assert word in told[0]
    assert len(told) == 2  # and how often, at the end
    assert "1 more time" in told[1]


def test_every_event_has_a_line(predict, tmp_path):
    source = ReplaySource(info_of(predict.spec), microvolts(predict, 2000), speed=float("inf"), chunk=10)
    markers = PlannedMarkers([(-1.0, "a"), (2.0, "b", 0.5), (float("nan"), "c"), (19.0, "d")], source.clock)
    decoder = Decoder(predict, source, StreamConfig(late="queue"), schedule=Events(start=0.0), markers=[markers])
    lines = write_lines(decoder, tmp_path / "lines.jsonl")
    decoder.run()
    lines.close()
    read = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    of_events = {line["event"]: line for line in read if "event" in line}
    reasons = {name: line["reason"] if line["type"] == "undecided" else None for name, line in of_events.items()}
    assert reasons == {"a": "before start", "b": None, "c": "gap", "d": "past end"}
    assert (of_events["b"]["onset"], of_events["b"]["marker_delay"]) == (2.0, 0.5)
    assert len(of_events["b"]["prediction"]) == np.prod(predict.spec.output_shape)
    assert of_events["c"]["onset"] is None


def test_a_page_takes_a_decoder_of_events_and_calls_no_decision_overdue(predict):
    """The next event may be far: after a minute without one the state is still "decoding". JSON has no infinity."""
    source = ReplaySource(info_of(predict.spec), microvolts(predict, 7000), speed=float("inf"), chunk=10)
    markers = PlannedMarkers([(2.0, "x")], source.clock)
    decoder = Decoder(predict, source, StreamConfig(late="queue"), schedule=Events(start=0.0), markers=[markers])
    monitor = watch(decoder)
    assert json.loads(json.dumps(describe(monitor.facts), allow_nan=False))["overdue"] is None
    decoder.run()
    assert monitor.snapshot().state == "decoding"


def test_a_record_of_events_decodes_again_and_holds_them_for_others(predict, tmp_path):
    """Late, early and doubled markers, and events without a window; `read_recording` gives the events back as annotations."""
    rng = np.random.default_rng(2)
    samples, file = microvolts(predict, 3000), tmp_path / "run.xdf"
    source = ReplaySource(
        info_of(predict.spec), samples, speed=float("inf"), chunk=lambda: int(rng.integers(1, 90)), breaks=(1500,)
    )
    plan = [
        (2.0, "a", 0.0),
        (-1.0, "a", 1.5),
        (4.0, "b", 2.9),
        (6.0, "a", 1.0),
        (7.0, "c", 0.5),
        (6.0, "a", 2.0),
        (14.0, "b", 0.1),
    ]
    plan += [(float("nan"), "b", 0.0), (18.0, "b", 0.0), (29.0, "a", 0.0)]
    markers = [PlannedMarkers(plan, source.clock), RepeatedMarkers(1.7, source.clock, "a")]
    decoder = Decoder(predict, source, StreamConfig(late="queue"), schedule=Events(("a", "b"), 0.25), markers=markers)
    recorder = record(decoder, file)
    decisions = list(decoder)
    recorder.close()
    recorded = read_record(file)
    result = replay(predict, recorded)
    assert result.passed
    assert result.n_decisions == len(decisions) > 15
    assert {one.event.description for one in recorded.events} == {"a", "b", "c"}
    found = events_of(read_recording(file))
    came = sorted((one.event.onset, one.event.description) for one in recorded.events if one.event.onset >= 0)
    inside = [(onset, name) for onset, name in zip(found.onset.tolist(), found.description, strict=True) if onset >= 0]
    assert [name for _, name in inside] == [name for _, name in came]
    np.testing.assert_allclose([onset for onset, _ in inside], [onset for onset, _ in came], atol=0.006)


def test_a_replay_of_events_finds_a_decision_that_was_changed(predict, tmp_path):
    source = ReplaySource(info_of(predict.spec), microvolts(predict, 1000), speed=float("inf"), chunk=10)
    markers = [PlannedMarkers([(2.0, "a", 1.0), (5.0, "a", 0.0)], source.clock)]
    decoder = Decoder(predict, source, StreamConfig(late="queue"), schedule=Events(start=0.0), markers=markers)
    recorder = record(decoder, tmp_path / "run.xdf")
    decoder.run()
    recorder.close()
    recorded = read_record(tmp_path / "run.xdf")
    later = [
        dataclasses.replace(one, event=dataclasses.replace(one.event, onset=one.event.onset + 0.01)) for one in recorded.events
    ]
    assert replay(predict, recorded).passed
    assert replay(predict, dataclasses.replace(recorded, events=later)).differ == (0, 1)


def test_what_makes_no_sense_with_events_is_refused(predict):
    source = ScriptedSource(info_of(predict.spec), [])
    markers = [RepeatedMarkers(1.0, source.clock)]
    with pytest.raises(StreamError, match="hold|event"):
        Decoder(predict, source, StreamConfig(late="hold"), schedule=Events(start=0.0), markers=markers)
    with pytest.raises(StreamError, match="window"):
        Decoder(predict, source, StreamConfig(roll=True), schedule=Events(start=0.0), markers=markers)
    with pytest.raises(StreamError, match="after events"):
        Decoder(predict, source, schedule=Events(), markers=markers)
    with pytest.raises(StreamError, match="[Mm]arkers"):
        Decoder(predict, source, schedule=Events(start=0.0))
    with pytest.raises(StreamError, match="history"):
        Decoder(predict, source, schedule=Events(start=0.0, history=float("nan")), markers=markers)


def test_an_event_is_decided_before_the_run_is_stopped_by_its_callback(predict):
    """Events that wait when the caller stops are counted too."""
    source = ReplaySource(info_of(predict.spec), microvolts(predict, 2000), speed=float("inf"), chunk=10)
    markers = PlannedMarkers([(2.0, "x"), (4.0, "x"), (4.1, "x")], source.clock)
    decoder = Decoder(predict, source, StreamConfig(late="queue"), schedule=Events(start=0.0), markers=[markers])
    decoder.stop_after(5.0)
    decisions = list(decoder)
    assert len(decisions) == 1
    assert decoder.counters.events_past_end == 2
    assert_events_accounted(decoder.counters, len(decisions))
    assert dataclasses.asdict(decoder.counters)["events"] == 3


def test_the_annotations_of_a_file_are_its_events(tmp_path, make_bundle, capsys):
    """Through the command: pauses are left out of the stream, and each decision is that of the window that `prepare` cuts."""
    bundle = make_bundle("prelocal")
    spec = bundle.spec
    volts = np.cumsum(np.random.default_rng(1).normal(size=(spec.n_chans, 3000)), axis=1) * 1e-6
    raw = mne.io.RawArray(volts, mne.create_info(list(spec.ch_names), 100.0, "eeg"), verbose="error")
    onsets = [0.5, 3.0, 9.0, 12.004, 20.0, 29.5]
    marks = mne.Annotations([*onsets, 15.0], [0.0] * 7, ["a", "b", "a", "b", "a", "a", "BAD boundary"])
    raw.set_annotations(marks, verbose="error")
    raw.save(tmp_path / "trials_raw.fif", fmt="double", verbose="error")
    out = tmp_path / "lines.jsonl"
    source = f"file:{tmp_path / 'trials_raw.fif'}"
    options = ["--source", source, "--speed", "inf", "--late", "queue", "--no-check-unit", "--quiet", "--out", out]
    assert run_stream(bundle.path, *options, "--events", "a,b", "--tmin", "0.25") == 0, capsys.readouterr().err
    read = [json.loads(line) for line in out.read_text().splitlines()]
    found = {line["onset"]: line for line in read if "prediction" in line}
    left = {line["onset"]: line["reason"] for line in read if line["type"] == "undecided"}
    assert left == {29.5: "past end"}
    shown = capsys.readouterr().out
    assert "at events (a, b)" in shown
    assert "5 of 6 events (1 past the end)" in shown
    assert run_stream(bundle.path, *options, "--force", "--events", "a,lefft", "--tmin", "0.25") == 2
    assert "no events lefft; its events are a (4), b (2)" in " ".join(capsys.readouterr().err.split())
    window = EventWindow(start=0.25, events=("a", "b"))
    prepared = prepare(raw, dataclasses.replace(spec.signal, phase="causal", event_window=window), check_unit=False)
    assert list(found) == [0.5, 3.0, 9.0, 12.0, 20.0]
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        for line, window in zip(found.values(), prepared.eeg, strict=True):
            assert line["prediction"] == predict(window[None])[0].ravel().tolist()
    table = tmp_path / "trials.tsv"
    table.write_text("onset\ttrial_type\n" + "".join(f"{onset}\tx\n" for onset in onsets))
    assert run_stream(bundle.path, *options, "--force", "--events", table, "--tmin", "0.25") == 0, capsys.readouterr().err
    of_table = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["onset"], line["prediction"]) for line in of_table if "prediction" in line] == [
        (line["onset"], line["prediction"]) for line in found.values()
    ]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--source", "synthetic", "--events", "all", "--tmin", "0"], "--markers"),
        (["--source", "synthetic", "--events", "all", "--markers", "every:1"], "after events"),
        (["--source", "synthetic", "--events", "all", "--tmin", "0", "--markers", "every:x"], "every:2"),
        (["--source", "synthetic", "--events", "all", "--tmin", "0", "--markers", "annotations"], "recording"),
        (["--source", "synthetic", "--events", "all", "--tmin", "0", "--markers", "channel:STI"], "STI"),
        (["--source", "synthetic", "--events", "all", "--tmin", "0", "--markers", "cloud:9"], "lsl:NAME"),
        (["--source", "synthetic", "--markers", "every:1"], "--events"),
        (["--source", "synthetic", "--events", "trials.tsv", "--tmin", "0", "--markers", "every:1"], "table"),
        (["--source", "synthetic", "--events", "gone.tsv", "--tmin", "0"], "gone.tsv"),
        (["--source", "synthetic", "--events", "all", "--tmin", "0", "--markers", "every:1", "--late", "hold"], "--late"),
        (["--replay", "old.xdf", "--events", "all"], "--events"),
    ],
)
def test_events_that_cannot_be_are_refused_with_a_way_out(make_bundle, capsys, arguments, word):
    assert run_stream(make_bundle("prelocal").path, *arguments) == 2
    assert word in " ".join(capsys.readouterr().err.split())


def test_planted_events_of_the_synthetic_source(make_bundle, capsys):
    arguments = ["--source", "synthetic", "--events", "all", "--tmin", "-0.5", "--markers", "every:2", "--speed", "inf"]
    assert run_stream(make_bundle("prelocal").path, *arguments, "--duration", "21", "--json") == 0
    counters = json.loads(capsys.readouterr().out)["counters"]
    assert (counters["events"], counters["decisions"], counters["events_past_end"]) == (10, 9, 1)
    arguments[3] = "event,evnet"
    assert run_stream(make_bundle("prelocal").path, *arguments, "--duration", "7", "--json") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["events_came"], summary["events_missing"]) == ({"event": 3}, ["evnet"])
    assert "No event evnet came; the events that came are event (3)." in " ".join(captured.err.split())
