"""What goes wrong with live streams, one test for each, and in all of them every window is accounted for.

Faults of the network and of processes are in tests/test_lsl.py and tests/test_record.py, slow viewers in tests/test_dashboard.py.
"""

import dataclasses
import os
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import ScriptedSource, Wrapped, assert_accounted, chunks_of, decode, decode_samples, eeg, info_of, kinds, predictions

import sjepa_deploy
from sjepa_deploy.errors import RefusedError, StreamError, UnansweredError
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.sources import Chunk
from sjepa_deploy.runtime.predictor import Predictor

N = 1500
STAMPS = np.arange(N) / 100.0
SAMPLES = eeg(N)


@pytest.fixture(scope="module")
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        yield predict


@pytest.fixture(scope="module")
def clean(predict):
    _, decisions, incidents = decode_samples(predict, SAMPLES, STAMPS)
    assert len(decisions) == 1 + (N - 200) // 10
    assert not incidents
    return decisions


def windows_not_touching(clean, first, last):
    """Return the undisturbed decisions whose windows end before sample `first` or begin after `last`."""
    return [d for d in clean if round(d.time * 100) < first or round(d.time * 100) - 199 > last]


# ---------------------------------------------------------------- lost, repeated and misplaced samples


def test_pause_of_three_seconds(predict, clean):
    keep = np.r_[0:600, 900:N]
    decoder, decisions, incidents = decode_samples(predict, SAMPLES[keep], STAMPS[keep])
    assert kinds(incidents) == ["gap"]
    assert "300 samples (3 s)" in incidents[0].text
    assert decoder.counters.samples_lost == 300
    assert [d.index for d in decisions] == [d.index for d in windows_not_touching(clean, 600, 899)]
    assert decoder.counters.skipped_gap == len(clean) - len(decisions)
    before = [d for d in clean if d.time < 6]
    assert predictions(decisions[: len(before)]) == predictions(before)


def test_after_a_gap_the_stream_starts_as_if_new(predict):
    keep = np.r_[0:600, 900:N]
    _, decisions, _ = decode_samples(predict, SAMPLES[keep], STAMPS[keep])
    _, fresh, _ = decode_samples(predict, SAMPLES[900:], STAMPS[900:])
    assert [d.prediction.tobytes() for d in decisions if d.time > 9] == [d.prediction.tobytes() for d in fresh]


@pytest.mark.parametrize("n_lost", [1, 3, 8])
def test_lost_samples_are_found_by_their_stamps(predict, n_lost):
    keep = np.r_[0:600, 600 + n_lost : N]
    decoder, _, incidents = decode_samples(predict, SAMPLES[keep], STAMPS[keep])
    assert kinds(incidents) == ["gap"]
    assert decoder.counters.samples_lost == n_lost
    assert 600 <= incidents[0].sample <= 640  # a fifth of a second later, when it has proved to last


def test_lost_samples_are_bridged_on_request(predict, clean):
    keep = np.r_[0:600, 603:N]
    decoder, decisions, incidents = decode_samples(predict, SAMPLES[keep], STAMPS[keep], bridge=5)
    assert kinds(incidents) == ["bridged"]
    assert (decoder.counters.samples_lost, decoder.counters.samples_bridged, decoder.counters.gaps) == (3, 3, 0)
    assert [d.index for d in decisions] == [d.index for d in clean]
    assert {d.index for d in decisions if not d.bridged} == {d.index for d in windows_not_touching(clean, 600, 602)}
    by_hand = SAMPLES.copy()
    for channel in range(8):
        by_hand[600:603, channel] = np.interp([600, 601, 602], [599, 603], SAMPLES[[599, 603], channel])
    _, wanted, _ = decode_samples(predict, by_hand, STAMPS)
    np.testing.assert_allclose(
        np.array([d.prediction for d in decisions]), np.array([d.prediction for d in wanted]), rtol=1e-5, atol=1e-6
    )


def test_longer_loss_than_allowed_is_not_bridged(predict):
    keep = np.r_[0:600, 606:N]
    decoder, _, incidents = decode_samples(predict, SAMPLES[keep], STAMPS[keep], bridge=5)
    assert kinds(incidents) == ["gap"]
    assert decoder.counters.samples_bridged == 0


def test_repeated_samples_are_left_out(predict, clean):
    twice = np.sort(np.r_[0:N, 300:310])
    decoder, decisions, _ = decode_samples(predict, SAMPLES[twice], STAMPS[twice], size=7)
    assert decoder.counters.samples_repeated == 10
    assert predictions(decisions) == predictions(clean)


def test_equal_stamps_of_a_coarse_clock_are_no_repetition(predict, clean):
    coarse = np.floor(STAMPS / 0.02) * 0.02
    decoder, decisions, _ = decode_samples(predict, SAMPLES, coarse)
    assert decoder.counters.samples_repeated == decoder.counters.gaps == 0
    assert predictions(decisions) == predictions(clean)


def test_sample_out_of_order_is_left_out_and_its_place_is_a_gap(predict):
    order = np.arange(N)
    order[[600, 650]] = order[[650, 600]]
    decoder, decisions, incidents = decode_samples(predict, SAMPLES[order], STAMPS[order])
    assert decoder.counters.samples_early >= 1
    assert decoder.counters.gaps >= 1
    assert kinds(incidents)[0] == "gap"
    assert all(d.time < 6 or d.time > 8 for d in decisions)


# ---------------------------------------------------------------- clocks


def test_clock_set_back(predict):
    decoder, decisions, incidents = decode(predict, with_clock_set_by(predict, -3600))
    assert kinds(incidents) == ["clock reset"]
    assert decoder.counters.clock_resets == 1
    assert decoder.counters.windows == 131
    assert decoder.counters.skipped_gap == 19
    assert all(abs(d.age) < 0.011 for d in decisions)  # else all windows after it would be late for ever


def test_clock_set_forward_invents_no_windows(predict):
    decoder, decisions, incidents = decode(predict, with_clock_set_by(predict, 3600))
    assert kinds(incidents) == ["clock reset"]
    assert decoder.counters.windows == 131
    assert all(abs(d.age) < 0.011 for d in decisions)


def with_clock_set_by(predict, seconds):
    """Return a source whose stamps jump after 7 s, while its samples arrive as before."""
    chunks = chunks_of(SAMPLES, STAMPS)
    later = [Chunk(chunk.samples, chunk.stamps + seconds, chunk.received) for chunk in chunks[70:]]
    return ScriptedSource(info_of(predict.spec), chunks[:70] + later)


def test_rate_drift_of_half_a_percent_is_followed_and_reported(predict, clean):
    for drift in (1.005, 0.995):
        decoder, decisions, incidents = decode_samples(predict, SAMPLES, STAMPS * drift)
        assert kinds(incidents) == ["rate"]
        assert f"{100 / drift:.4g}" in incidents[0].text
        assert decoder.counters.gaps == 0
        assert predictions(decisions) == predictions(clean)


def test_stream_at_another_rate_than_it_says_is_refused(predict):
    with pytest.raises(StreamError, match="says 100 Hz and sends 90"):
        decode_samples(predict, SAMPLES, STAMPS / 0.9)


@pytest.mark.parametrize("kind", ["uniform", "late", "blocks"])
def test_irregular_stamps_are_no_loss(predict, clean, kind):
    rng = np.random.default_rng(1)
    late = {
        "uniform": rng.uniform(0, 0.003, N),
        "late": rng.exponential(0.004, N),
        "blocks": np.repeat(rng.uniform(0, 0.02, N // 10), 10),
    }[kind]
    decoder, decisions, _ = decode_samples(predict, SAMPLES, STAMPS + late)
    assert decoder.counters.gaps == 0
    assert predictions(decisions) == predictions(clean)


def test_sender_held_up_for_a_moment_is_no_loss(predict, clean):
    stamps = STAMPS.copy()
    stamps[600:605] = np.maximum(stamps[600:605], 6.045 + np.arange(5) * 1e-4)
    _, decisions, incidents = decode_samples(predict, SAMPLES, stamps)
    assert not incidents
    assert predictions(decisions) == predictions(clean)


def test_stamps_must_be_numbers(predict):
    stamps = STAMPS.copy()
    stamps[600] = np.nan
    with pytest.raises(StreamError, match="stamped nan"):
        decode_samples(predict, SAMPLES, stamps)


def test_time_zone_and_wall_clock_do_not_matter(predict, clean, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        monkeypatch.setattr(time, "time", lambda: -1e9)
        _, decisions, incidents = decode_samples(predict, SAMPLES, STAMPS)
    finally:
        monkeypatch.undo()
        os.environ.pop("TZ", None)
        time.tzset()
    assert not incidents
    assert predictions(decisions) == predictions(clean)


# ---------------------------------------------------------------- the source


def test_interruption_starts_anew_even_if_the_stamps_go_on(predict):
    decoder, decisions, incidents = decode_samples(predict, SAMPLES, STAMPS, restarted_at=(700,))
    assert kinds(incidents) == ["interruption"]
    assert decoder.counters.interruptions == 1
    assert all(d.time < 7 or d.time > 8.9 for d in decisions)


def test_silent_source_is_reported_once_and_given_up_when_asked(predict):
    chunks = chunks_of(SAMPLES[:300], STAMPS[:300])
    now = iter(np.arange(1000) * 0.5)
    source = ScriptedSource(info_of(predict.spec), [*chunks, *[None] * 40])
    decoder = Decoder(predict, source, StreamConfig(silence=2.0, give_up=10.0), monotonic=lambda: next(now))
    incidents = []
    decoder.on_incident(incidents.append)
    with pytest.raises(StreamError, match="has sent nothing for 1[01] s"):
        decoder.run()
    assert kinds(incidents) == ["silent"]
    assert decoder.counters.silences == 1


def test_source_that_comes_back_is_no_longer_silent(predict):
    chunks = chunks_of(SAMPLES[:400], STAMPS[:400])
    now = iter(np.arange(1000) * 0.5)
    source = ScriptedSource(info_of(predict.spec), [*chunks[:30], *[None] * 9, *chunks[30:], *[None] * 9])
    decoder = Decoder(predict, source, StreamConfig(silence=2.0), monotonic=lambda: next(now))
    decoder.run()
    assert decoder.counters.silences == 2


def test_source_that_changes_its_channels_is_refused(predict):
    source = ScriptedSource(info_of(predict.spec), [Chunk(SAMPLES[:10, :7], STAMPS[:10], 0.1)])
    with pytest.raises(StreamError, match="sent 7 channels in place of 8"):
        decode(predict, source)


# ---------------------------------------------------------------- channels and units


def test_swapped_channels_are_put_in_order(predict, clean):
    names = predict.spec.ch_names
    order = [3, 0, 7, 1, 2, 6, 5, 4]
    info = info_of(predict.spec, ch_names=tuple(names[i].upper() for i in order))
    _, decisions, _ = decode_samples(predict, SAMPLES[:, order], STAMPS, info=info)
    assert predictions(decisions) == predictions(clean)


def test_extra_channels_are_left_out(predict, clean):
    info = info_of(predict.spec, ch_names=("EOG", *predict.spec.ch_names, "TRIGGER"))
    more = np.column_stack([np.full(N, np.nan), SAMPLES, np.zeros(N)])
    decoder, decisions, incidents = decode_samples(predict, more, STAMPS, info=info)
    assert not incidents
    assert decoder.counters.samples_non_finite == 0
    assert predictions(decisions) == predictions(clean)


def test_missing_channel_is_refused_by_name(predict):
    info = info_of(predict.spec, ch_names=predict.spec.ch_names[1:])
    with pytest.raises(StreamError, match="lacks 1 of the model's 8 channels: F3"):
        decode_samples(predict, SAMPLES[:, 1:], STAMPS, info=info)


def test_no_more_than_a_quarter_is_interpolated_unless_a_share_says_so(predict):
    """In Python as from the command line."""
    info = info_of(predict.spec, ch_names=predict.spec.ch_names[3:])
    with pytest.raises(StreamError, match=r"3 of 8 channels"):
        decode_samples(predict, SAMPLES[:, 3:], STAMPS, info=info, interpolate=True)
    decoder, _, _ = decode_samples(predict, SAMPLES[:, 3:], STAMPS, info=info, interpolate=True, interpolate_share=0.375)
    assert decoder.windows.missing == predict.spec.ch_names[:3]


def test_missing_channel_is_interpolated_on_request(predict):
    info = info_of(predict.spec, ch_names=predict.spec.ch_names[1:])
    decoder, decisions, _ = decode_samples(predict, SAMPLES[:, 1:], STAMPS, info=info, interpolate=True)
    assert decoder.windows.missing == ("F3",)
    assert len(decisions) == 131


def test_channel_known_to_be_bad_counts_as_missing(predict):
    broken = SAMPLES.copy()
    broken[:, 0] = np.nan
    info = info_of(predict.spec, ch_names=predict.spec.ch_names[1:])
    _, wanted, _ = decode_samples(predict, SAMPLES[:, 1:], STAMPS, info=info, interpolate=True)
    _, decisions, incidents = decode_samples(predict, broken, STAMPS, interpolate=True, bads=("f3",))
    assert not incidents
    assert predictions(decisions) == predictions(wanted)


def test_unknown_bad_channel_and_channels_twice_are_refused(predict):
    with pytest.raises(StreamError, match="has no channels nose"):
        decode_samples(predict, SAMPLES, STAMPS, bads=("nose",))
    info = info_of(predict.spec, ch_names=("F3", "f3", *predict.spec.ch_names[2:]))
    with pytest.raises(StreamError, match="has the channels F3, f3 twice"):
        decode_samples(predict, SAMPLES, STAMPS, info=info)


@pytest.mark.parametrize(("wrong", "factor"), [("volts called microvolts", 1e-6), ("microvolts called volts", 1e6)])
def test_wrong_unit_is_refused(predict, wrong, factor):
    with pytest.raises(StreamError, match=r" 0.5 s after the start .* which is no EEG\. State the unit"):
        decode_samples(predict, SAMPLES * factor, STAMPS)
    late = SAMPLES * factor
    late[:370] = late[0]  # flat at first, which says nothing of the unit
    with pytest.raises(StreamError, match=r" 4 s after the start .* which is no EEG\. State the unit"):
        decode_samples(predict, late, STAMPS)


@pytest.mark.parametrize(("unit", "factor"), [("V", 1e-6), ("nV", 1e3)])
def test_unit_of_the_stream_is_converted(predict, clean, unit, factor):
    info = info_of(predict.spec, unit=unit)
    _, decisions, _ = decode_samples(predict, SAMPLES * factor, STAMPS, info=info)
    np.testing.assert_allclose([d.prediction for d in decisions], [d.prediction for d in clean], rtol=1e-4, atol=1e-5)


def test_electrode_offsets_at_the_start_make_no_transient(predict, clean):
    offsets = np.linspace(-20_000, 20_000, 8)
    _, decisions, incidents = decode_samples(predict, SAMPLES + offsets, STAMPS)
    assert not incidents
    wanted = np.array([d.prediction for d in clean])
    np.testing.assert_allclose([d.prediction for d in decisions], wanted, atol=1e-3 * wanted.std())


# ---------------------------------------------------------------- bad channels


def spoilt(kind, first=600, last=900):
    samples = SAMPLES.copy()
    bad = samples[first:last, 2]
    if kind == "flat":
        bad[:] = 17.0
    elif kind == "saturated":
        bad[:] = 400_000.0 * np.sign(np.sin(np.arange(last - first) / 7))
    elif kind == "disconnected, or very noisy":
        bad[:] = 8000 * np.sin(2 * np.pi * 0.31 * np.arange(last - first))
    else:
        bad[:] = np.nan
    return samples


BAD_KINDS = ["flat", "saturated", "disconnected, or very noisy", "not finite"]


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_bad_channel_is_flagged(predict, clean, kind):
    _, decisions, incidents = decode_samples(predict, spoilt(kind), STAMPS)
    assert kinds(incidents) == ["channel", "channel"]
    assert incidents[0].text == f"F4 is {kind}."
    assert incidents[1].text == f"F4 is good again, it was {kind}."
    flagged = [d for d in decisions if d.bad_channels]
    assert all(d.bad_channels == ("F4",) and "bad channels" in d.flags for d in flagged)
    times = [d.time for d in flagged]
    assert 6.0 <= min(times) <= 6.6
    assert 9.0 <= max(times) <= 11.5
    assert len(decisions) == len(clean)
    assert all(np.isfinite(d.prediction).all() for d in decisions)


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_bad_channel_is_repaired_on_request(predict, kind):
    """While it is bad, a channel is the same as one that was never there, from when it was found on."""
    _, decisions, _ = decode_samples(predict, spoilt(kind, 600, N), STAMPS, bad_channels="repair")
    info = info_of(predict.spec, ch_names=tuple(np.delete(predict.spec.ch_names, 2)))
    _, wanted, _ = decode_samples(predict, np.delete(SAMPLES, 2, axis=1), STAMPS, info=info, interpolate=True)
    late = [i for i, d in enumerate(decisions) if d.time > 9.5]
    np.testing.assert_allclose(
        [decisions[i].prediction for i in late], [wanted[i].prediction for i in late], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_bad_channel_stops_on_request(predict, kind):
    with pytest.raises(StreamError, match=f"F4 turned bad .*{kind}"):
        decode_samples(predict, spoilt(kind), STAMPS, bad_channels="stop")


def test_burst_of_nan_spoils_its_window_alone(predict, clean):
    samples = SAMPLES.copy()
    samples[700:705, :] = np.nan
    decoder, decisions, _ = decode_samples(predict, samples, STAMPS)
    assert decoder.counters.samples_non_finite == 40
    flagged = {d.index for d in decisions if d.bad_channels}
    assert flagged == {d.index for d in clean} - {d.index for d in windows_not_touching(clean, 700, 704)}
    before = [d for d in clean if d.time < 7]
    assert predictions(decisions[: len(before)]) == predictions(before)
    assert np.isfinite([d.prediction for d in decisions]).all()


def test_nan_at_the_very_start(predict):
    samples = SAMPLES.copy()
    samples[:50, 3] = np.nan
    _, decisions, _ = decode_samples(predict, samples, STAMPS)
    assert np.isfinite([d.prediction for d in decisions]).all()
    assert decisions[0].bad_channels == ("C3",)
    assert not decisions[-1].bad_channels


def test_a_channel_that_was_not_finite_before_a_gap_is_judged_after_it(predict):
    """What was held before the gap says nothing about the first half second after it."""
    samples = SAMPLES.copy()
    samples[570:575, 2] = np.nan
    samples[900:, 2] = 0.0
    keep = np.r_[0:580, 900:N]
    _, _, incidents = decode_samples(predict, samples[keep], STAMPS[keep])
    (flat,) = [incident for incident in incidents if "flat" in incident.text]
    assert flat.sample == 580 + 50


def test_too_many_bad_channels_are_not_repaired_but_flagged(predict):
    samples = SAMPLES.copy()
    samples[600:, :6] = 0.0
    _, decisions, incidents = decode_samples(predict, samples, STAMPS, bad_channels="repair")
    assert "6 channels are bad, too many to repair." in [incident.text for incident in incidents]
    assert len(decisions[-1].bad_channels) == 6


# ---------------------------------------------------------------- late windows


def slow_decoder(predict, seconds, **config):
    """Return a decoder on a clock that the backend moves: a call of the source returns what is due by then."""
    backend = Wrapped(predict.backend)
    source = ScriptedSource(info_of(predict.spec), chunks_of(SAMPLES, STAMPS))
    decoder = Decoder(Predictor(predict.bundle, backend, check_unit=False), source, StreamConfig(**config))

    def take_time(_):
        source.now += seconds()

    backend.before = take_time
    return decoder


def decode_slowly(predict, seconds, late):
    decoder = slow_decoder(predict, seconds, late=late)
    decisions = list(decoder)
    assert_accounted(decoder.counters, decisions)
    return decoder, decisions


def stall_of_five_seconds():
    calls = iter([0.001] * 20 + [5.0] + [0.001] * 1000)
    return lambda: next(calls)


def test_stalled_consumer_catches_up_without_losing_the_filter_state(predict, clean):
    decoder, decisions = decode_slowly(predict, stall_of_five_seconds(), "skip")
    assert 48 <= decoder.counters.skipped_late <= 50
    assert decoder.counters.misses == decoder.counters.skipped_late + sum(d.missed for d in decisions)
    assert decoder.counters.longest_misses == decoder.counters.misses
    assert decisions[-1].age < 0.01
    wanted = predictions(clean)
    assert all(wanted[d.index] == d.prediction.tobytes() for d in decisions)


def test_late_windows_are_all_decoded_on_request(predict, clean):
    decoder, decisions = decode_slowly(predict, stall_of_five_seconds(), "queue")
    assert predictions(decisions) == predictions(clean)
    assert decoder.counters.misses == sum(d.missed for d in decisions) >= 48
    assert "late" in decisions[30].flags
    assert decisions[-1].age < 0.01


def test_late_windows_hold_the_last_decision_on_request(predict):
    decoder, decisions = decode_slowly(predict, stall_of_five_seconds(), "hold")
    held = [d for d in decisions if d.held]
    assert len(held) == decoder.counters.held >= 48
    assert len(decisions) == 131
    assert all(d.prediction.tobytes() == decisions[20].prediction.tobytes() and "held" in d.flags for d in held)
    assert held[0].time > decisions[20].time


def test_backend_slower_than_the_hop_keeps_its_age_bounded(predict):
    decoder, decisions = decode_slowly(predict, lambda: 0.25, "skip")
    assert decoder.counters.skipped_late > 50
    assert max(d.age for d in decisions) < 0.1 + 0.25 + 1e-9


def test_backend_that_fails_is_counted_and_raised(predict):
    calls = iter(range(1000))

    def fail_later():
        if next(calls) == 5:
            raise RuntimeError("the GPU fell off the bus")
        return 0.0

    decoder = slow_decoder(predict, fail_later)
    with pytest.raises(RuntimeError, match="fell off"):
        decoder.run()
    assert decoder.counters.failed == 1
    assert decoder.counters.windows == decoder.counters.decisions + 1


@pytest.mark.parametrize("error", [RefusedError, UnansweredError])
def test_a_server_that_does_not_answer_costs_only_the_windows_that_it_was_asked(predict, clean, error):
    calls = iter(range(1000))

    def refuse_two():
        if next(calls) in (5, 6):
            raise error("The server is overloaded.", "Send less.")
        return 0.0

    decoder = slow_decoder(predict, refuse_two)
    incidents = []
    decoder.on_incident(incidents.append)
    decisions = list(decoder)
    assert_accounted(decoder.counters, decisions)
    assert predictions(decisions) == predictions(clean[:5] + clean[7:])
    assert decoder.counters.failed == decoder.counters.misses == decoder.counters.longest_misses == 2
    first, again = [incident.text for incident in incidents if incident.kind == "unanswered"]
    assert first == "The server is overloaded. Send less."
    assert again.startswith(first)
    assert "1 more time" in again


# ---------------------------------------------------------------- everything at once


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_nothing_is_silently_dropped(predict, data):
    """Under random faults: windows = decisions + counted skips, and samples in = samples that the stamps explain."""
    n = data.draw(st.integers(150, 700), label="samples")
    samples, index = eeg(n), np.arange(n)
    for _ in range(data.draw(st.integers(0, 3), label="losses")):
        at, length = data.draw(st.integers(1, n - 2)), data.draw(st.integers(1, 120))
        index = index[(index < at) | (index >= at + length)]
    stamps = index / 100.0
    for _ in range(data.draw(st.integers(0, 2), label="jumps")):
        stamps[data.draw(st.integers(0, len(stamps))) :] += data.draw(st.sampled_from([-50.0, -0.3, 0.3, 100.0]))
    samples = samples[index]
    for _ in range(data.draw(st.integers(0, 3), label="bursts")):
        at, length = data.draw(st.integers(0, len(index))), data.draw(st.integers(1, 200))
        value = data.draw(st.sampled_from([np.nan, np.inf, 0.0, 4e5]))
        samples[at : at + length, data.draw(st.integers(0, 7))] = value
    size = data.draw(st.integers(1, 90), label="chunk")
    config = {
        "hop": data.draw(st.sampled_from([0.0, 0.05, 0.1, 1.7, 2.0])),
        "late": data.draw(st.sampled_from(["skip", "queue", "hold"])),
        "bridge": data.draw(st.sampled_from([0, 3, 50])),
        "bad_channels": data.draw(st.sampled_from(["flag", "repair"])),
    }
    restarts = data.draw(st.lists(st.integers(0, len(index)), max_size=2))
    source = ScriptedSource(info_of(predict.spec), chunks_of(samples, stamps, size, restarted_at=restarts))
    decoder = Decoder(predict, source, StreamConfig(**config))
    chunks = []
    decoder.on_chunk(chunks.append)
    decisions = list(decoder)
    counters = decoder.counters
    assert_accounted(counters, decisions)
    assert counters.samples == sum(len(chunk.stamps) for chunk in chunks) == len(index)
    elapsed = counters.samples - counters.samples_repeated - counters.samples_early + counters.samples_lost
    assert counters.windows == max(0, 1 + (elapsed - 200) // decoder.hop) if elapsed >= 200 else counters.windows == 0
    assert all(np.isfinite(d.prediction).all() for d in decisions)


def test_counters_name_every_way_out_of_the_invariant():
    """A counter of windows that is added must be added to the sum above, too."""
    from sjepa_deploy.runtime.live.counters import Counters

    names = {field.name for field in dataclasses.fields(Counters)}
    assert {name for name in names if name.startswith(("skipped", "held", "failed", "decisions"))} == {
        "decisions",
        "held",
        "skipped_late",
        "skipped_gap",
        "skipped_paused",
        "failed",
    }
