"""Losses in XDF files are pauses: no window spans one, and times are right after one. The first channel counts the samples."""

import contextlib
import dataclasses

import numpy as np
import pytest
from bundles import small_spec
from lossy import KINDS, lossy, spec_for
from xdf_writer import Stream, write_xdf

from sjepa_deploy.eeg.events import events_of
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.pauses import segments_of, told
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.runtime.live.markers import ChannelMarkers
from sjepa_deploy.runtime.live.sources import Chunk

NAMES = small_spec().ch_names


def written(path, index, stamps, rate, *others):
    """Write a stream whose first channel counts in uV, and other ones; return the path."""
    samples = np.random.default_rng(0).normal(0, 20, (int(index.max()) + 1, 8)).astype(np.float32)
    samples[:, 0] = np.arange(len(samples)) % 4096
    channels = [{"label": name, "unit": "uV", "type": "EEG"} for name in NAMES]
    amp = Stream(name="amp", kind="EEG", samples=samples[index], stamps=stamps, rate=rate, channels=channels)
    return write_xdf(path, amp, *others)


def windows_of(path, rate):
    """Return what stands in the first channel of each window, shape (n_windows, n_times), and the times of their last samples."""
    spec = spec_for(small_spec(), rate)
    fitted = fit_recording(read_recording(path), spec.signal)
    starts = fitted.window_starts(10)
    truth = np.stack([fitted.data[0, start : start + spec.n_times] for start in starts])
    return np.rint(truth).astype(int), fitted.times(starts + spec.n_times - 1)


@pytest.mark.parametrize("rate", [100.0, 250.0, 1024.0])
@pytest.mark.parametrize("n_lost", [1, 4, 50])
@pytest.mark.parametrize("at", [0.1, 7.0])
def test_a_loss_below_a_second_is_a_pause(tmp_path, rate, n_lost, at):
    n, first = round(20 * rate), round(at * rate)
    index = np.r_[0:first, first + n_lost : n]
    path = written(tmp_path / "a.xdf", index, 5.0 + index / rate, rate)
    raw = read_recording(path)
    assert [(segment.start, round(segment.onset * rate)) for segment in segments_of(raw)] == [(0, 0), (first, first + n_lost)]
    assert any(f"{n_lost} samples" in note for note in told(raw).notes)
    truth, times = windows_of(path, rate)
    assert (np.diff(truth, axis=1) % 4096 == 1).all()
    np.testing.assert_array_equal(np.rint(times * rate).astype(int) % 4096, truth[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_no_window_spans_a_loss_that_can_be_told(tmp_path, kind):
    n_read = n_windows = 0
    for seed in range(12):
        stream = lossy(np.random.default_rng([seed, KINDS.index(kind)]), kind)
        path = written(tmp_path / "a.xdf", stream.index, stream.stamps, stream.sfreq)
        share = 1 - len(np.unique(stream.index)) / (stream.index.max() + 1)
        with contextlib.suppress(RecordingError) if share > 0.008 else contextlib.nullcontext():  # no stretch of a window is left
            truth, times = windows_of(path, stream.sfreq)
            n_read += 1
            n_windows += len(truth)
            steps = np.diff(truth, axis=1) % 4096
            assert (steps > 0).all()
            holes = (steps.max(axis=1) - 1) / stream.sfreq
            assert (holes <= (2 * stream.jitter + 0.8 / stream.sfreq if stream.jitter else 0)).all(), (seed, holes.max())
            moved = stream.stamps - 1000 - stream.index / stream.sfreq
            if kind in ("exact", "rounded") and np.ptp(moved) < 0.5:  # its clock was not set
                off = (np.rint(times * stream.sfreq).astype(int) - truth[:, -1]) % 4096
                assert set(off.tolist()) <= {0}
    assert n_read > 6
    assert n_windows > 500


def test_samples_that_were_sent_again_are_read_once(tmp_path):
    order = np.r_[0:600, 560:600, 600:2000]
    path = written(tmp_path / "a.xdf", order, 9.0 + order / 100, 100.0)
    raw = read_recording(path)
    assert raw.n_times == 2000
    assert any("left out 40 samples that came twice" in note for note in told(raw).notes)
    assert len(segments_of(raw)) == 1


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_markers_lie_at_their_samples_after_losses_too(tmp_path, jitter):
    """Of a sender whose clock is 0.1 % slow, so that a line through all stamps would be off by 60 samples at the end."""
    index = np.r_[0:3000, 3013:30_000, 31_000:60_000]
    step = 1.001 / 250
    at = np.array([7, 2999, 3013, 29_000, 30_500, 31_000, 59_990])  # one in a pause
    stamps = 1000 + index * step + np.random.default_rng(0).uniform(0, jitter * step, len(index))
    marks = Stream(name="task", kind="Markers", samples=[f"m{i}" for i in at], stamps=1000 + at * step + jitter * step / 2)
    raw = read_recording(written(tmp_path / "a.xdf", index, stamps, 250.0, marks))
    found = {mark["description"]: mark["onset"] * 250 for mark in raw.annotations if mark["description"].startswith("m")}
    wanted = np.searchsorted(index, at)
    np.testing.assert_allclose([found[f"m{i}"] for i in at], wanted, rtol=0, atol=0.6 if jitter else 0.01)
    events, (_, before, after) = events_of(raw), segments_of(raw)
    in_pause = events.onset[events.description.index("m30500")]
    assert before.onset + (before.stop - before.start - 1) / 250 < in_pause < after.onset - 0.5 / 250  # no window begins there


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_events_of_numbers_have_the_names_that_they_have_live(tmp_path, kind):
    """A code of 24 bits, as BioSemi's, keeps all its digits; a whole number is the same in every type."""
    codes = np.array([7, 1_234_567, 1_234_568], kind)
    marks = Stream(name="task", kind="Markers", samples=codes[:, None], stamps=1001.0 + np.arange(3))
    index = np.arange(2000)
    raw = read_recording(written(tmp_path / "a.xdf", index, 1000 + index / 250, 250.0, marks))
    info = StreamInfo(name="amp", ch_names=("STI",), sfreq=250.0, unit="V")
    live = ChannelMarkers(info, "STI")
    live.hear(Chunk(np.r_[0, codes][:, None], np.arange(4) / 250, 0.0), 0.0, -np.inf)
    assert events_of(raw).description == tuple(event.description for event in live.read()) == ("7", "1234567", "1234568")


@pytest.mark.parametrize("rate", [125.0, 240.0, 300.0])
def test_a_stream_at_another_rate_is_refused(tmp_path, rate):
    index = np.arange(3000)
    with pytest.raises(RecordingError, match=rf"not at its rate.* {1 / rate:.3g} to {1 / rate:.3g} s apart, nominally 0.004 s"):
        read_recording(written(tmp_path / "a.xdf", index, 5.0 + index / rate, 250.0))
    near = written(tmp_path / "b.xdf", index, 5.0 + index / 250.5, 250.0)
    assert dataclasses.astuple(segments_of(read_recording(near))[0]) == (0, 3000, 0.0)


@pytest.mark.parametrize("stamp", [np.nan, np.inf])
def test_stamps_that_are_no_numbers_are_refused(tmp_path, stamp):
    index = np.arange(500)
    stamps = index / 100
    stamps[300] = stamp
    with pytest.raises(RecordingError, match=r"Stream amp: A sample is stamped (nan|inf)"):
        read_recording(written(tmp_path / "a.xdf", index, stamps, 100.0))
