"""Pauses: no window reaches over one, and times are right after one, in every format that can say so."""

import dataclasses
import itertools
from datetime import datetime, timezone

import mne
import numpy as np
import pybv
import pytest
from edf_files import eeg, write_edf
from hypothesis import given, settings
from hypothesis import strategies as st
from mffpy import Writer
from mffpy.bin_writer import BinWriter

from sjepa_deploy.eeg.pauses import Segment, sample_time, segments_of, time_of, told
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.learning.data import DataConfig, Target
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.targets import reaction_times
from sjepa_deploy.runtime.live.open_source import SourceOptions, open_source
from sjepa_deploy.spec import ModelSpec, Preprocessing, SignalSpec

NAMES = ("Fz", "Cz", "Pz", "Oz")
UNTOUCHED = Preprocessing(reference="none", l_freq=None, h_freq=None)
SIGNAL = SignalSpec(n_chans=4, n_times=200, sfreq=100.0, ch_names=NAMES, steps=UNTOUCHED.steps, phase="zero-phase")
SFREQ = 250


def save(path, raw):
    raw.save(path, verbose="error", overwrite=True)
    return path


def joined(n_seconds=40):
    """Return EEG whose second half lies 3 mV higher, as after a pause, in volts."""
    data = eeg(4, n_seconds * SFREQ) * 1e-6
    data[:, n_seconds * SFREQ // 2 :] += 3e-3 * np.array([1, -1, 0.5, -0.5])[:, None]
    return data


def raw_of(data):
    return mne.io.RawArray(data, mne.create_info(list(NAMES), SFREQ, "eeg"), verbose="error")


def brainvision(folder):
    data = joined()
    pybv.write_brainvision(data=data, sfreq=SFREQ, ch_names=list(NAMES), fname_base="paused", folder_out=folder, unit="µV")
    marks = (folder / "paused.vmrk").read_text().rstrip()
    marks += (
        f"\nMk8=New Segment,,1,1,0,20260101100000000000\nMk9=New Segment,,{data.shape[1] // 2 + 1},1,0,20260101101500000000\n"
    )
    (folder / "paused.vmrk").write_text(marks)
    return folder / "paused.vhdr"


def skipped(folder):
    data = joined()
    raw = raw_of(np.concatenate([data[:, :5000], np.zeros((4, 2500)), data[:, 5000:]], axis=1))
    return save(folder / "skip_raw.fif", raw.set_annotations(mne.Annotations([20], [10], ["BAD_ACQ_SKIP"])))


def eeglab(folder):
    raw = raw_of(joined()).set_annotations(mne.Annotations([20.0, 25.0], [0, 0], ["boundary", "stim"]))
    raw.export(folder / "boundary.set", overwrite=True, verbose="error")
    return folder / "boundary.set"


def concatenated(folder):
    data = joined()
    return save(
        folder / "concat_raw.fif", mne.concatenate_raws([raw_of(data[:, :5000]), raw_of(data[:, 5000:])], verbose="error")
    )


def interrupted(folder):
    starts = [second if second < 20 else 600 + second for second in range(40)]
    return write_edf(folder / "disc.edf", NAMES, joined() * 1e6, [SFREQ] * 4, onsets=starts)


@pytest.mark.parametrize(
    ("make", "after"), [(brainvision, 20.0), (skipped, 30.0), (eeglab, 20.0), (concatenated, 20.0), (interrupted, 620.0)]
)
def test_no_window_reaches_over_a_pause_and_times_are_right_after_it(make, after, tmp_path):
    raw = read_recording(make(tmp_path))
    fitted = fit_recording(raw, SIGNAL)
    assert [segment.onset for segment in fitted.segments] == [0.0, pytest.approx(after)]
    starts = fitted.window_starts(130)
    assert len(starts) == sum(map(len, fitted.windows(130)))
    for window in (w for piece in fitted.windows(130) for w in piece):
        assert np.ptp(window, axis=1).max() < 400  # 3,000 uV where it would reach over the pause
    times = fitted.times(starts)
    np.testing.assert_allclose(times[times < 20], 1.3 * np.arange((times < 20).sum()), atol=1e-9)
    np.testing.assert_allclose(times[times >= 20], after + 1.3 * np.arange((times >= 20).sum()), atol=1e-9)
    assert (times < 20).sum() == (times >= 20).sum() == 14
    assert any("cut at 1 pause" in step for step in fitted.steps)


def test_zeros_at_the_end_of_an_mffs_epoch_are_no_eeg(tmp_path):
    """EGI's recorder writes 112 ms of them in all channels, a step as high as the offset of the amplifier."""
    volts = eeg(129, 2000) * 1e-6 + 2e-3
    volts[:, 972:1000] = volts[:, 1972:] = 0
    halves = BinWriter(sampling_rate=SFREQ, data_type="EEG")
    halves.add_block((volts[:, :1000] * 1e6).astype(np.float32))
    halves.add_block((volts[:, 1000:] * 1e6).astype(np.float32), offset_us=4_000_000)
    writer = Writer(str(tmp_path / "epochs.mff"))
    writer.addxml("fileInfo", recordTime=datetime(2026, 1, 1, tzinfo=timezone.utc))
    writer.add_coordinates_and_sensor_layout(device="HydroCel GSN 128 1.0")
    writer.addbin(halves)
    writer.write()
    raw = read_recording(tmp_path / "epochs.mff")
    assert raw.n_times == 3000
    assert [(segment.start, segment.stop) for segment in segments_of(raw)] == [(0, 972), (2000, 2972)]
    np.testing.assert_allclose(raw.get_data()[:, :972], volts[:, :972], rtol=1e-6)
    np.testing.assert_allclose(raw.get_data()[:, 2000:2972], volts[:, 1000:1972], rtol=1e-6)
    assert any("0.224 s at the ends of epochs" in note for note in told(raw).notes)


@pytest.mark.parametrize(
    ("mark", "segments"),
    [(("Amplifier disconnected", 0.0), [(0, 5000), (5000, 10000)]), (("BAD_disconnection", 2.0), [(0, 5000), (5500, 10000)])],
)
def test_an_amplifier_that_was_away_is_a_pause(mark, segments, tmp_path):
    """So MNE calls it in files of ANT."""
    raw = raw_of(joined()).set_annotations(mne.Annotations([20.0], [mark[1]], [mark[0]]))
    read = read_recording(save(tmp_path / "away_raw.fif", raw))
    assert [(segment.start, segment.stop) for segment in segments_of(read)] == segments


@pytest.mark.parametrize("suffix", [".edf", ".EDF"])
@pytest.mark.parametrize("is_interrupted", [False, True])
def test_events_of_edf_files_are_those_that_were_written(suffix, is_interrupted, tmp_path):
    """Whatever the samples look like, and though a device writes texts in Latin-1."""
    data = eeg(4, 10 * SFREQ)
    data[1, 700:703] = (1361.1, 3074.0, 2.0)  # in bytes: an event called x, 5 s after the start
    starts = [second if second < 5 else 600 + second for second in range(10)] if is_interrupted else None
    events = [(2.5, "Größe"), (starts[8] if starts else 8.0, "plain")]
    path = write_edf(tmp_path / f"events{suffix}", NAMES, data, [SFREQ] * 4, onsets=starts, events=events)
    assert b"+5\x14x\x14\0" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace("Größe\x14\0".encode(), "Größe\x14\0\0\0".encode("latin-1")))
    raw = read_recording(path)
    marks = [(onset, text) for onset, text in zip(raw.annotations.onset, raw.annotations.description, strict=True)]
    assert [mark for mark in marks if mark[1] != "BAD boundary"] == [(2.5, "Größe"), (8.0, "plain")]
    np.testing.assert_allclose(raw.get_data() * 1e6, data, atol=1e-6)


def test_filters_do_not_reach_over_a_pause(tmp_path):
    """Each half is filtered as MNE filters it alone."""
    signal = SIGNAL.replace(steps=Preprocessing(reference="none").steps, sfreq=250.0, n_times=500)
    fitted = fit_recording(read_recording(concatenated(tmp_path)), signal)
    for i, half in enumerate((slice(0, 5000), slice(5000, 10000))):
        alone = mne.filter.filter_data(joined()[:, half], SFREQ, 0.5, 40.0, phase="zero", verbose="error") * 1e6
        np.testing.assert_allclose(fitted.data[:, fitted.segments[i].start : fitted.segments[i].stop], alone, atol=1e-3)


def test_stretches_that_are_too_short_are_left_out_and_told(tmp_path):
    raw = raw_of(joined()).set_annotations(mne.Annotations([1.0, 20.0, 25.0], 0, ["BAD boundary"] * 3))
    path = save(tmp_path / "a_raw.fif", raw)
    fitted = fit_recording(read_recording(path), SIGNAL.replace(steps=Preprocessing().steps))
    assert [round(segment.onset, 6) for segment in fitted.segments] == [1.0, 25.0]  # 5 s do not hold the filter of 6.6 s
    assert any("left out 2 stretches between pauses (6 s)" in step for step in fitted.steps)
    raw.set_annotations(mne.Annotations(np.arange(1.0, 40.0), 0, ["BAD boundary"] * 39))
    with pytest.raises(RecordingError, match="longest of 40 stretches between pauses lasts 1 s, one window of the model 2 s"):
        fit_recording(read_recording(save(path, raw)), SIGNAL)


@pytest.mark.parametrize("gap", [0, 3])
def test_windows_of_events_of_an_interrupted_recording_begin_with_their_event(gap, tmp_path):
    """A step of 300 uV stands at every stimulus, in the samples."""
    data = eeg(4, 120 * SFREQ, scale=5)
    starts = [second if second < 40 else second + gap if second < 80 else second + 2 * gap for second in range(120)]
    events, answers = [], []
    for k, second in enumerate([*range(2, 116, 6), 39]):  # the answer to the last one comes after the pause
        data[0, second * SFREQ + 50 :][:25] += 300
        answers.append(0.5 + 0.003 * k if second != 39 else 0.9)
        events += [(starts[second] + 0.2, "stim"), (starts[second] + 0.2 + answers[-1] + gap * (second == 39), "resp")]
    path = write_edf(tmp_path / "a.edf", NAMES, data, [SFREQ] * 4, onsets=starts, events=sorted(events))
    target = Target(stimulus=("stim",), response=("resp",), tmin=0.0, max_reaction_time=5.0)
    windows = load_windows(DataConfig(source=(str(path),), preprocessing=UNTOUCHED, phase="zero-phase", target=target))
    steps = np.abs(windows.eeg[:, 0, :9] - windows.eeg[:, 0, 15:24]).min(axis=1)
    assert (steps > 200).all()
    expected = [answer for second, answer in zip([*range(2, 116, 6), 39], answers, strict=True) if second not in (38, 39)]
    if gap:  # 38 + 2 s reach over the pause, and so does the answer to the stimulus at 39 s
        np.testing.assert_allclose(windows.targets, expected, atol=1e-4)
        assert max(reaction_times(read_recording(path), target))[0] > 100
    else:
        assert len(windows) == len(answers) - 0
    assert windows.onset.max() == pytest.approx(starts[110] + 0.2)


def test_an_event_before_a_pause_has_no_window_after_it(tmp_path):
    raw = raw_of(joined())
    raw.set_annotations(mne.Annotations([5.0, 19.8, 20.0, 25.0], 0, ["go", "go", "BAD boundary", "go"]))
    path = save(tmp_path / "a_raw.fif", raw)
    (tmp_path / "a_raw.tsv").write_text("onset\tspeed\n5.0\t1\n19.8\t2\n25.0\t3\n")
    target = Target(kind="column", column="speed", tmin=0.5)
    windows = load_windows(DataConfig(source=(str(path),), preprocessing=UNTOUCHED, phase="zero-phase", target=target))
    assert windows.targets.tolist() == [1, 3]
    assert load_windows(
        DataConfig(
            source=(str(path),), preprocessing=UNTOUCHED, phase="zero-phase", target=dataclasses.replace(target, tmin=-2.0)
        )
    ).targets.tolist() == [1, 2, 3]


def test_what_readers_warn_of_reaches_the_user(tmp_path):
    path = write_edf(tmp_path / "twice.edf", ["Fz", "Cz", "Cz"], eeg(3, 10 * SFREQ), [SFREQ] * 3)
    assert any("Channel names are not unique" in note for note in told(read_recording(path)).notes)
    whole = path.read_bytes()
    path.write_bytes(whole[:236] + b"-1      " + whole[244:])  # never closed
    raw = read_recording(path)
    assert any("Inferring from the file size" in note for note in told(raw).notes)
    fitted = fit_recording(raw, SIGNAL.replace(n_chans=1, ch_names=("Fz",)))
    assert fitted.steps[: len(told(raw).notes)] == told(raw).notes
    raw = read_recording(eeglab(tmp_path))
    assert any("'boundary' events" in note for note in told(raw).notes)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    gaps=st.lists(st.floats(0.0, 1000.0), min_size=6, max_size=6),
    place=st.floats(0, 1),
)
def test_own_times_and_sample_times_are_each_others_reverse(lengths, gaps, place):
    edges = np.concatenate([[0], np.cumsum(lengths)])
    late = np.concatenate([[0.0], np.cumsum(gaps)])
    segments = [
        Segment(start=int(a), stop=int(b), onset=a / SFREQ + late[i]) for i, (a, b) in enumerate(itertools.pairwise(edges))
    ]
    seconds = np.array([np.floor(place * (edges[-1] - 1)) / SFREQ])
    own = time_of(seconds, segments, SFREQ)
    np.testing.assert_allclose(sample_time(own, segments, SFREQ), seconds, atol=1e-6)


def test_a_recording_without_a_pause_is_one_segment():
    raw = raw_of(joined()).set_annotations(mne.Annotations([5.0], 1.0, ["BAD_movement"]))
    assert segments_of(raw) == (Segment(start=0, stop=10_000, onset=0.0),)
    assert segments_of(raw.crop(10.0)) == (Segment(start=0, stop=7500, onset=0.0),)


def test_a_file_that_is_streamed_is_interrupted_at_its_pauses(tmp_path):
    """Every chunk lies in one segment, and the first of each but the first says that the stream was interrupted."""
    spec = ModelSpec(variant="prelocal", signal=SIGNAL)
    source = open_source(f"file:{skipped(tmp_path)}", spec.signal, SourceOptions(speed=float("inf"), chunk=300))
    chunks = []
    while not source.ended:
        chunks.append(source.read(0.0))
    samples = np.concatenate([chunk.samples for chunk in chunks])
    np.testing.assert_allclose(samples.T, joined(), atol=1e-9)  # without the 10 s that were not recorded
    starts = np.cumsum([0] + [len(chunk.samples) for chunk in chunks])[:-1]
    assert starts[[chunk.restarted for chunk in chunks]].tolist() == [5000]
