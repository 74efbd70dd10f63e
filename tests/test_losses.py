"""Lost samples are found by their stamps, whatever the stamps are like; the oracle is what stands in every window."""

import collections

import numpy as np
import pytest
from bundles import small_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from lossy import KINDS, judge, lossy, spec_for
from streams import ScriptedSource, decode, decode_samples, eeg, info_of

import sjepa_deploy
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.timeline import BACK, REPEATED, Timeline
from sjepa_deploy.eeg.windows import windows
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.check import causal_preprocessing
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.sources import Chunk, ReplaySource
from sjepa_deploy.runtime.live.windows import WindowStream


def lost_by(sfreq, stamps, **options):
    """Return at which samples how many are lost, and the timeline."""
    timeline, found = Timeline(sfreq, 0.1, **options), {}
    for i, stamp in enumerate(stamps.tolist()):
        verdict = timeline.place(stamp)
        if verdict == REPEATED:
            timeline.follow(stamp)
        if verdict == BACK:
            verdict = timeline.go_back(stamp)
        if verdict > 0:
            found[i] = verdict
    return found, timeline


@pytest.mark.parametrize("sfreq", [100, 250, 512, 1000, 2048])
def test_one_sample_lost_every_second_is_seen_every_time(sfreq):
    keep = np.ones(200 * sfreq, bool)
    keep[np.arange(5, 199) * sfreq + 3] = False
    index = np.flatnonzero(keep)
    found, _ = lost_by(sfreq, 1e5 + index / sfreq)
    assert found == {int(i) + 1: 1 for i in np.flatnonzero(np.diff(index) > 1)}


@given(
    sfreq=st.sampled_from([100.0, 256.0, 600.615, 1000.0]),
    share=st.sampled_from([0.01, 0.05, 0.1]),
    drift=st.floats(-2e-3, 2e-3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_every_loss_in_regular_stamps_is_found_at_once(sfreq, share, drift, seed):
    """With its size, from the first second on; and what is lost does not look like another rate."""
    n = round(15 * sfreq)
    index = np.flatnonzero(np.random.default_rng(seed).random(n) >= share)
    found, timeline = lost_by(sfreq, 1e4 + index * (1 + drift) / sfreq)
    jumps = np.diff(index)
    late = {int(i) + 1: int(jumps[i]) - 1 for i in np.flatnonzero(jumps > 1) if i > 0.8 * sfreq}
    assert {i: k for i, k in found.items() if i > 0.8 * sfreq + 1} == late
    assert sum(found.values()) == index[-1] - index[0] + 1 - len(index)
    assert timeline.sfreq == pytest.approx(sfreq / (1 + drift), rel=1e-4)


@pytest.mark.parametrize("sfreq", [250, 1000])
@pytest.mark.parametrize("kind", ["exponential", "uniform", "normal"])
def test_four_samples_are_found_through_jitter_of_half_a_period(sfreq, kind):
    rng = np.random.default_rng(3)
    n = 120 * sfreq
    jitter = {
        "exponential": rng.exponential(0.5, n),
        "uniform": rng.uniform(0, 1, n),
        "normal": rng.normal(0, 0.5, n),
    }[kind]
    keep = np.ones(n, bool)
    at = np.arange(5, 118, 4) * sfreq
    keep[(at[:, None] + np.arange(4)).ravel()] = False
    index = np.flatnonzero(keep)
    found, _ = lost_by(sfreq, (1e4 + np.arange(n) / sfreq + jitter / sfreq)[index])
    where = np.array([index[i] for i in found])
    assert all(((where >= a) & (where <= a + 0.61 * sfreq)).any() for a in at)
    assert sum(found.values()) == pytest.approx(4 * len(at), rel=0.15)
    assert not [i for i in where if not ((at <= i) & (i <= at + 0.7 * sfreq)).any()]


@pytest.mark.parametrize("kind", KINDS)
def test_no_window_over_a_hole_goes_out_unflagged(kind):
    """Of a hole that the stream's jitter allows to tell. What is shorter is found within 0.6 s, and is no exception."""
    total = collections.Counter()
    for seed in range(12):
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        total.update(judge(small_spec(), lossy(rng, kind), rng))
    assert total["unflagged, tellable"] == 0
    assert total["windows"] > 500
    assert total["a sample twice"] == 0
    if kind in ("exact", "rounded"):
        assert total["over a hole"] == 0
        assert total["found again"] == total["again"]


@pytest.mark.parametrize("n_held", [12, 23, 46])
def test_a_loss_is_found_while_a_sender_is_held_up_for_whole_periods(n_held):
    """Of 500 Hz: the hold looks like a loss until the next stamp, and then the samples come at once, of which three are lost."""
    index = np.r_[0 : 1000 + n_held // 2, 1003 + n_held // 2 : 4000]
    stamps = 50 + index / 500
    at = np.arange(len(index)) - 1000
    stamps = np.where(at >= 0, np.maximum(stamps, 50 + (1000 + n_held) / 500 + at * 1e-5), stamps)
    found, _ = lost_by(500.0, stamps)
    assert found.pop(1000) == n_held
    ((where, n_lost),) = found.items()
    assert 1000 + n_held <= where <= 1000 + n_held + 0.2 * 500
    assert n_lost == 3


def pushed(chunks, sfreq=100.0, **config):
    """Return counters, incidents and the stamps of the windows of a stream in chunks."""
    spec = spec_for(small_spec(), sfreq)
    counters, incidents = Counters(), []
    info = StreamInfo(name="amp", ch_names=spec.ch_names, sfreq=sfreq, unit="uV")
    stream = WindowStream(
        spec.signal, info, StreamConfig(**config), counters=counters, report=lambda *what: incidents.append(what)
    )
    stamps = [window.stamp for chunk in chunks for window in stream.push(chunk)]
    return counters, incidents, stamps


def cut(stamps, received, *, size=10, samples=None):
    if samples is None:
        samples = np.random.default_rng(0).normal(0, 20, (len(stamps), 8))
    return [
        Chunk(samples[a : a + size], stamps[a : a + size], float(received[a : a + size][-1])) for a in range(0, len(stamps), size)
    ]


def test_a_long_loss_in_a_backlog_is_no_clock_reset():
    """The decoder stands still from 4 s to 16 s; of the samples that waited, those of 8 to 9.5 s are missing."""
    index = np.r_[0:800, 950:3000]
    stamps = 1000 + index / 100
    received = stamps + 0.01
    waited = (index >= 400) & (index < 1600)
    received[waited] = 1016.0 + np.arange(waited.sum()) * 1e-5
    counters, incidents, windows = pushed(cut(stamps, received))
    assert [kind for kind, _ in incidents] == ["gap"]
    assert (counters.samples_lost, counters.clock_resets) == (150, 0)
    assert np.isin(np.round(np.array(windows) - 1000, 6), np.round(index / 100, 6)).all()


def test_a_clock_that_is_set_in_a_backlog_is_right_once_the_backlog_is_read():
    index = np.arange(3000)
    received = 1000 + index / 100 + 0.01
    waited = (index >= 400) & (index < 1600)
    received[waited] = 1016.0 + np.arange(waited.sum()) * 1e-5
    stamps = 1000 + index / 100 - np.where(index >= 800, 500.0, 0.0)
    counters, _, windows = pushed(cut(stamps, received))
    assert counters.clock_resets == 1
    assert windows[-1] == pytest.approx(received[-1], abs=0.12)


def test_a_loss_and_a_clock_that_is_set_in_one_chunk_are_told_apart():
    """235 samples are lost, one comes, and the clock is set forward by 30 s: two jumps of one chunk."""
    index = np.r_[0:700, 935:2000]
    received = 1000 + index / 100 + 0.01
    stamps = 1000 + index / 100 + np.where(index >= 936, 30.0, 0.0)
    counters, incidents, windows = pushed(cut(stamps, received, size=20))
    assert [kind for kind, _ in incidents] == ["gap", "clock reset"]
    assert (counters.samples_lost, counters.clock_resets) == (235, 1)
    assert windows[-1] == pytest.approx(received[-1], abs=0.12)
    index = np.r_[0:700, 835:2000]
    received = 1000 + index / 100 + 0.01
    stamps = 1000 + index / 100 - np.where(index >= 690, 100.0, 0.0)
    counters, incidents, _ = pushed(cut(stamps, received, size=40))
    assert [kind for kind, _ in incidents] == ["clock reset", "gap"]
    assert (counters.samples_lost, counters.clock_resets) == (135, 1)


@pytest.mark.parametrize(
    ("shift", "words"),
    [(1.7e9, "since 1970"), (-990.0, "old on arrival"), (3.0, "3 s in the future")],
)
def test_stamps_of_another_clock_are_told_and_count_from_arrival(shift, words):
    received = 1000 + np.arange(600) / 100
    _, incidents, windows = pushed(cut(received + shift, received))
    ((kind, text),) = incidents
    assert kind == "clock"
    assert words in text
    assert windows[-1] == pytest.approx(received[-1], abs=0.11)


@pytest.mark.parametrize(("factor", "unit"), [(1e3, "milliseconds"), (1e6, "microseconds"), (1e9, "nanoseconds")])
def test_stamps_that_are_not_in_seconds_are_refused(factor, unit):
    received = 1000 + np.arange(600) / 100
    with pytest.raises(StreamError, match=unit):
        pushed(cut(received * factor, received, size=1))


def test_packets_under_one_stamp_are_no_milliseconds():
    received = 1000 + (np.arange(600) // 8 + 1) * 0.08
    counters, incidents, _ = pushed(cut(received, received, size=8))
    assert not incidents
    assert counters.samples_repeated == 0


@pytest.mark.parametrize(("sfreq", "size", "step"), [(1000, 20, 1.0), (2000, 40, 1.0), (250, 10, 4.0)])
def test_equal_neighbours_under_one_stamp_are_no_repetition(sfreq, size, step):
    n = 12 * sfreq
    index = np.arange(n)
    wave = 30 * np.sin(2 * np.pi * 3 * index[:, None] / sfreq + np.arange(8) * 0.01)
    samples = np.round(wave / step) * step
    stamps = 100 + (index // size + 1) * size / sfreq
    assert ((np.diff(samples, axis=0) == 0).all(axis=1) & (np.diff(stamps) == 0)).sum() > 50
    counters, incidents, _ = pushed(cut(stamps, stamps, size=size, samples=samples), sfreq)
    assert (counters.samples_repeated, counters.samples_lost) == (0, 0)
    assert not [kind for kind, _ in incidents if kind != "channel"]


@pytest.mark.parametrize("n_again", [1, 10, 40])
def test_a_block_that_is_sent_again_is_decoded_once(n_again):
    order = np.r_[0:600, 600 - n_again : 600, 600:1200]
    samples = np.random.default_rng(0).normal(0, 20, (1200, 8))[order]
    stamps = 1000 + order / 100
    counters, incidents, _ = pushed(cut(stamps, np.maximum.accumulate(stamps), samples=samples))
    assert not incidents
    assert counters.samples_repeated == n_again
    assert counters.skipped_gap == 0


def test_a_late_packet_is_a_gap_and_no_reset():
    order = np.r_[0:600, 610:620, 600:610, 620:1200]
    stamps = 1000 + order / 100
    counters, incidents, _ = pushed(cut(stamps, np.maximum.accumulate(stamps)))
    assert [kind for kind, _ in incidents] == ["gap"]
    assert (counters.samples_lost, counters.samples_early, counters.clock_resets) == (10, 10, 0)


@pytest.mark.parametrize("bridge", [0, 20])
def test_steps_of_the_clock_correction_are_no_loss(bridge):
    """Of 0.5 ms at 2 kHz: the sender's own stamps say what follows what, and the correction goes into the result."""
    stamps = 1000 + np.arange(20_000) / 2000
    samples = np.random.default_rng(0).normal(0, 20, (20_000, 8))
    chunks = []
    for a in range(0, 20_000, 20):
        correction = 5.0 + 0.0005 * (a // 2000 % 3)
        mine = stamps[a : a + 20] + correction
        chunks.append(Chunk(samples[a : a + 20], mine, float(mine[-1]), False, correction))
    counters, incidents, windows = pushed(chunks, 2000.0, bridge=bridge)
    assert not incidents
    assert (counters.samples_lost, counters.samples_bridged, counters.gaps) == (0, 0, 0)
    assert np.isin(np.round(windows, 7), np.round(np.concatenate([chunk.stamps for chunk in chunks]), 7)).all()


@pytest.fixture(scope="module")
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        yield predict


def test_a_stream_whose_windows_are_all_late_is_refused(predict):
    """Ten seconds old on arrival: stamps that cannot be of another clock, and no decision for ever."""
    samples, stamps = eeg(1500), np.arange(1500) / 100
    source = ScriptedSource(info_of(predict.spec), cut(stamps, stamps + 10.0, samples=samples))
    with pytest.raises(StreamError, match=r"All windows of 5 s came too late: .* 10 s old"):
        decode(predict, source)
    source = ScriptedSource(info_of(predict.spec), cut(stamps, stamps + 10.0, samples=samples))
    _, decisions, _ = decode(predict, source, late="queue")
    assert len(decisions) == 131


@pytest.mark.parametrize("jump", [1000.0, -1000.0])
def test_the_duration_is_of_what_was_received(predict, jump):
    stamps = np.arange(2000) / 100
    chunks = cut(stamps + np.where(stamps > 3, jump, 0), stamps, samples=eeg(2000))
    decoder = Decoder(predict, ScriptedSource(info_of(predict.spec), chunks))
    decoder.stop_after(10.0)
    decoder.run()
    assert decoder.counters.samples == 1010


def test_a_decision_on_doubtful_samples_says_so(predict):
    """The sender is held up by five and a half periods, which no regular stamps show."""
    stamps = np.arange(1500) / 100
    stamps[600:605] = np.maximum(stamps[600:605], 6.045 + np.arange(5) * 1e-4)
    _, decisions, incidents = decode_samples(predict, eeg(1500), stamps, hop=0.0, deadline=1.0)
    assert not incidents
    assert [round(d.time, 3) for d in decisions if "doubtful" in d.flags] == [6.045, 6.045, 6.045, 6.045]


@pytest.mark.parametrize("kind", ["flat", "moved", "not finite", "flat until the end", "flat at the start"])
@pytest.mark.parametrize("sfreq", [250.0, 300.0])
def test_check_knows_channels_that_are_bad_for_a_while(predict, tmp_path, kind, sfreq):
    """As in most recordings; they start anew when they are good again, which is no fault of the live path."""
    spec = predict.spec
    samples = eeg(round(20 * sfreq), sfreq=sfreq)
    first, last = (
        round(at * sfreq) for at in {"flat until the end": (15, 20), "flat at the start": (0, 3)}.get(kind, (8.1, 11.3))
    )
    if kind == "moved":
        samples[first:last, 2] += 2500 * np.sign(np.random.default_rng(0).normal(size=last - first))
    else:
        samples[first:last, 2] = np.nan if kind == "not finite" else 0.0
    info = StreamInfo(name="amp", ch_names=spec.ch_names, sfreq=sfreq, unit="uV")
    config = StreamConfig(late="queue")
    decoder = Decoder(predict, ReplaySource(info, samples, speed=float("inf"), chunk=7), config)
    states = []
    decoder.on_incident(lambda incident: states.append(incident.kind))
    live = [decision.prediction.tobytes() for decision in decoder]
    causal = causal_preprocessing(samples, info, spec.signal)
    offline = [predict(np.ascontiguousarray(w)[None])[0].tobytes() for w in windows(causal, spec.n_times, decoder.hop)]
    assert "channel" in states
    assert live == offline
