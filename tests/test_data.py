import dataclasses
import itertools
import shutil
import warnings

import mne
import numpy as np
import pandas as pd
import pytest
from edf_files import eeg, write_edf
from small import CH_NAMES, DATA
from xdf_writer import Stream, write_xdf

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.errors import DataError, RecordingError
from sjepa_deploy.learning.data import DataConfig, Synthetic, Target, encode_targets, split_windows
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.store import is_mapped
from sjepa_deploy.learning.targets import reaction_times
from sjepa_deploy.spec import Preprocessing, SignalSpec

UNTOUCHED = Preprocessing(reference="none", l_freq=None, h_freq=None)
REACTION = Target(stimulus=("square",), response=("rt",))


@pytest.fixture(scope="module")
def eeglab(written):
    return DataConfig(source=(str(written("eeglab_data.set").path),), phase="zero-phase", target=REACTION)


def make_raw(n_samples, ch_names=("Fz", "Cz", "Pz", "Oz"), sfreq=100.0, seed=0):
    data = np.random.default_rng(seed).normal(0, 1e-5, (len(ch_names), n_samples))
    raw = mne.io.RawArray(data, mne.create_info(list(ch_names), sfreq, "eeg"), verbose="error")
    montage = read_montage("sjepa-62").pick(ch_names)
    places = dict(zip(ch_names, map(np.array, montage.positions), strict=True))
    return raw.set_montage(mne.channels.make_dig_montage(places, coord_frame="head"))


def save_raw(raw, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of files
        raw.save(path, verbose="error", overwrite=True)
    return str(path)


# ---------------------------------------------------------------- windows and targets


def test_reaction_times_equal_those_that_were_written(written):
    events = written("eeglab_data.set").events
    pairs = [(stimulus, press) for stimulus, press in itertools.pairwise(events) if (stimulus[1], press[1]) == ("square", "rt")]
    assert 60 < len(pairs) < sum(text == "square" for _, text in events)
    expected = [(stimulus[0], press[0] - stimulus[0]) for stimulus, press in pairs]
    found = reaction_times(read_recording(written("eeglab_data.set").path), REACTION)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_reaction_times_equal_a_search_by_hand_through_the_events(recorded):
    eeglab = DataConfig(source=(str(recorded("eeglab_data.set")),), phase="zero-phase", target=REACTION)
    raw = read_recording(eeglab.source[0])
    events, ids = mne.events_from_annotations(raw, verbose="error")
    expected = []
    for i, (sample, _, kind) in enumerate(events):
        if kind != ids["square"]:
            continue
        for later, _, what in events[i + 1 :]:
            if what == ids["square"]:
                break
            if what == ids["rt"]:
                expected.append((sample / 128, (later - sample) / 128))
                break
    expected = [(onset, rt) for onset, rt in expected if rt <= 2.5]
    np.testing.assert_allclose(reaction_times(raw, REACTION), expected, atol=1.5 / 128)
    fast = reaction_times(raw, dataclasses.replace(REACTION, max_reaction_time=0.4))
    assert fast == [(onset, seconds) for onset, seconds in reaction_times(raw, REACTION) if seconds <= 0.4]
    assert 0 < len(fast) < len(expected)
    windows = load_windows(eeglab)
    assert windows.signal.ch_names == tuple(
        name for name in raw.ch_names if name not in ("EOG1", "EOG2")
    )  # typed as EEG, named otherwise
    steps = Preprocessing().steps
    signal = SignalSpec(n_chans=30, n_times=200, sfreq=100.0, ch_names=windows.signal.ch_names, steps=steps, phase="zero-phase")
    fitted = fit_recording(raw, signal)
    assert windows.eeg.shape[1:] == (30, 200)
    assert "left out 2 channels: EOG1, EOG2" in windows.steps
    assert (windows.signal.steps, windows.signal.phase) == (steps, "zero-phase")
    for i in (0, 10, len(windows) - 1):
        start = round((reaction_times(raw, REACTION)[i][0] + 0.5) * 100)
        np.testing.assert_array_equal(windows.eeg[i], fitted.data[:, start : start + 200])


@pytest.mark.parametrize("meas_date", [None, 1e9])
def test_events_of_a_recording_that_was_cut_out_of_a_longer_one_stay_in_place(meas_date):
    """The oracle: the samples that MNE puts the events at. Anonymised recordings have no date."""
    raw = make_raw(6000)
    raw.set_meas_date(meas_date)
    raw.set_annotations(mne.Annotations([10.0, 10.5, 30.0, 30.4], 0.1, ["square", "rt"] * 2, raw.info["meas_date"]))
    raw.crop(25.0)
    events, _ = mne.events_from_annotations(raw, verbose="error")
    assert len(events) == 2
    onset = (events[0, 0] - raw.first_samp) / 100
    np.testing.assert_allclose(reaction_times(raw, REACTION), [(onset, 0.4)], atol=1e-6)
    assert onset == 5.0


def test_windows_in_stretches_marked_bad_are_left_out(tmp_path):
    raw = make_raw(2000)
    raw.set_annotations(mne.Annotations([3.0, 8.5, 15.0], [2.0, 0.0, 1.0], ["BAD_movement", "EDGE boundary", "blink"]))
    raw.crop(1.0)  # the marks lie at 2 to 4 s and at 7.5 s now
    windows = load_windows(
        DataConfig(source=(save_raw(raw, tmp_path / "one_raw.fif"),), hop=1.0, preprocessing=UNTOUCHED, phase="zero-phase")
    )
    assert windows.onset.tolist() == [0.0, 4.0, 5.0, *np.arange(7.5, 17)]  # "EDGE boundary" is a pause: windows start anew
    assert "left out 3 windows in stretches marked bad" in windows.steps
    raw.set_annotations(mne.Annotations([0.0], [19.0], ["bad"]))
    with pytest.raises(DataError, match="two_raw has no whole window that is not marked bad"):
        load_windows(DataConfig(source=(save_raw(raw, tmp_path / "two_raw.fif"),), preprocessing=UNTOUCHED, phase="zero-phase"))


def test_all_recordings_get_the_channels_of_the_first(tmp_path):
    names = ("Fz", "T7", "Cz", "T8", "Oz")
    first, second = make_raw(1000, names), make_raw(1000, ("Oz", "POz", "T8", "T7", "Cz", "Fz"), seed=1)
    sources = (save_raw(first, tmp_path / "one_raw.fif"), save_raw(second, tmp_path / "two_raw.fif"))
    windows = load_windows(DataConfig(source=sources, preprocessing=UNTOUCHED, phase="zero-phase"))
    assert windows.signal.ch_names == names
    expected = second.get_data(picks=list(names))[:, :200] * 1e6
    np.testing.assert_allclose(windows.eeg[windows.recording == "two_raw"][0], expected, rtol=1e-6)
    second.info["bads"] = ["Cz"]
    save_raw(second, tmp_path / "two_raw.fif")
    with pytest.raises(RecordingError, match="^two_raw: The recording lacks, or marks as bad, 1 of the model's 5 channels: Cz"):
        load_windows(DataConfig(source=sources, preprocessing=UNTOUCHED, phase="zero-phase"))
    windows = load_windows(DataConfig(source=sources, preprocessing=UNTOUCHED, phase="zero-phase", interpolate=True))
    np.testing.assert_allclose(windows.eeg[windows.recording == "two_raw"][0][[0, 1, 3, 4]], expected[[0, 1, 3, 4]], rtol=1e-6)


def test_a_column_of_a_tsv_gives_targets(tmp_path):
    raw = make_raw(2000)
    source = save_raw(raw, tmp_path / "one_raw.fif")
    (tmp_path / "one_raw.tsv").write_text("onset\tspeed\n1.0\t3.5\n4.0\t2.5\n19.5\t1.0\n")
    target = Target(kind="column", column="speed", tmin=0.0)
    windows = load_windows(DataConfig(source=(source,), target=target, preprocessing=UNTOUCHED, phase="zero-phase"))
    assert windows.targets.tolist() == [3.5, 2.5]  # the last event has no whole window
    np.testing.assert_allclose(windows.eeg[1], raw.get_data()[:, 400:600] * 1e6, rtol=1e-6)
    np.testing.assert_allclose(windows.signal.positions, [ch["loc"][:3] for ch in raw.info["chs"]])
    (tmp_path / "one_raw.tsv").write_text("onset\tspeed\ttrial_type\n1.0\t3.5\tgo\n2.0\tn/a\trest\n4.0\t2.5\tgo\n")
    with pytest.raises(DataError, match="1 of 3 labels are missing"):
        load_windows(DataConfig(source=(source,), target=target, preprocessing=UNTOUCHED, phase="zero-phase"))
    picked = dataclasses.replace(target, stimulus=("go",))
    assert load_windows(
        DataConfig(source=(source,), target=picked, preprocessing=UNTOUCHED, phase="zero-phase")
    ).targets.tolist() == [3.5, 2.5]
    (tmp_path / "one_raw.tsv").write_text("onset\tspeed\nn/a\t3.5\n")
    with pytest.raises(DataError, match="An onset in one_raw.tsv is no number"):
        load_windows(DataConfig(source=(source,), target=target, preprocessing=UNTOUCHED, phase="zero-phase"))
    with pytest.raises(DataError, match="has no columns onset and pace"):
        load_windows(
            DataConfig(
                source=(source,), target=dataclasses.replace(target, column="pace"), preprocessing=UNTOUCHED, phase="zero-phase"
            )
        )


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.set_index")  # MNE's own use of pandas
def test_epochs_keep_their_band_and_give_the_channels_in_order(tmp_path):
    raw = make_raw(4000)
    events = np.array([[s, 0, 1 + i % 2] for i, s in enumerate(range(200, 3600, 300))])
    metadata = pd.DataFrame({"reaction_time": np.linspace(0.3, 0.9, len(events))})
    epochs = mne.Epochs(
        raw, events, {"left": 1, "right": 2}, tmin=-0.2, tmax=2.6, baseline=None, preload=True, metadata=metadata, verbose="error"
    )
    with epochs.info._unlock():
        epochs.info["highpass"], epochs.info["lowpass"] = 1.0, 30.0
    path = tmp_path / "some-epo.fif"
    epochs.save(path, verbose="error")
    names = ("Pz", "cz")
    windows = load_windows(DataConfig(source=(str(path),), ch_names=names, target=Target(tmin=0.5)))
    data = epochs.get_data(picks=["Pz", "Cz"], copy=True)[:, :, 70:270] * 1e6
    np.testing.assert_allclose(windows.eeg, data - data.mean(axis=1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(windows.targets, metadata["reaction_time"], rtol=1e-6)
    assert windows.signal.steps == Preprocessing(reference="average", l_freq=1.0, h_freq=30.0).steps
    target = Target(kind="column", column="event", task="classification", tmin=0.0)
    windows = load_windows(DataConfig(source=(str(path),), target=target))
    assert windows.class_names == ("left", "right")
    assert windows.targets.tolist() == [i % 2 for i in range(len(events))]


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.set_index")
def test_resampled_epochs_that_overlap_never_end_up_in_two_parts(tmp_path):
    raw = make_raw(60_000, sfreq=500.0)
    events = np.array([[sample, 0, 1] for sample in range(500, 58_000, 250)])
    metadata = pd.DataFrame({"reaction_time": np.linspace(0.3, 0.9, len(events))})
    epochs = mne.Epochs(raw, events, tmin=0, tmax=2.1, baseline=None, preload=True, metadata=metadata, verbose="error")
    epochs.save(tmp_path / "some-epo.fif", verbose="error")
    config = DataConfig(source=(str(tmp_path / "some-epo.fif"),), target=Target(tmin=0.0))
    split = split_windows(load_windows(config), config)
    start = events[:, 0] / 500
    for one, other in ((split.train, split.val), (split.train, split.test), (split.val, split.test)):
        assert abs(start[one][:, None] - start[other]).min() >= 4.0 - 1e-6  # a window of 2 s and a gap of 2 s


def test_a_bids_folder_gives_subjects_sessions_and_columns(tmp_path):
    import mne_bids

    for subject in ("01", "02", "03"):
        raw = make_raw(2000, seed=int(subject))
        raw.set_annotations(mne.Annotations([1.0, 1.4, 5.0, 5.7], 0.1, ["stim", "press", "stim", "press"]))
        path = mne_bids.BIDSPath(subject=subject, session="a", task="rt", root=tmp_path, datatype="eeg")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mne_bids.write_raw_bids(raw, path, format="BrainVision", allow_preload=True, verbose="error")
    config = DataConfig(
        source=(str(tmp_path),),
        target=Target(stimulus=("stim",), response=("press",)),
        preprocessing=UNTOUCHED,
        phase="zero-phase",
        n_folds=3,
    )
    windows = load_windows(config)
    np.testing.assert_allclose(windows.targets, [0.4, 0.7] * 3, atol=0.011)
    assert windows.subject.tolist() == ["01", "01", "02", "02", "03", "03"]
    assert set(windows.session) == {"a"}
    shutil.copytree(tmp_path, tmp_path / "derivatives/cleaned", ignore=shutil.ignore_patterns("derivatives"))
    assert len(load_windows(config)) == 6  # the same data again, made from the raw ones
    (header,) = tmp_path.glob("sub-03/**/*.vhdr")
    shutil.copy(header, tmp_path / "header")
    header.write_text("no header")
    with pytest.raises(RecordingError, match="sub-03_ses-a_task-rt_eeg.vhdr cannot be read as a recording"):
        load_windows(config)
    shutil.move(tmp_path / "header", header)
    np.testing.assert_allclose(windows.eeg[2], make_raw(2000, seed=2).get_data()[:, 150:350] * 1e6, atol=0.2)
    split = split_windows(windows, config)
    assert split.by == "subject"
    table = pd.read_csv(tmp_path / "participants.tsv", sep="\t")
    table["group"] = ["x", "y", "y"]
    table.to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    by_person = Target(kind="column", column="group", task="classification")
    windows = load_windows(dataclasses.replace(config, target=by_person))
    assert windows.class_names == ("x", "y")
    assert windows.targets.tolist() == [0] * 10 + [1] * 20


def save_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "eeg": rng.normal(0, 1e-5, (12, 3, 200)),
        "ch_names": np.array(["Fz", "Cz", "Pz"]),
        "sfreq": 100.0,
        "unit": "V",
        "targets": np.arange(12.0),
        "subject": np.repeat(["a", "b", "c"], 4),
    }
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return DataConfig(source=(str(path),), preprocessing=UNTOUCHED, phase="zero-phase", target=Target())


def test_an_npz_file_gives_what_was_saved(tmp_path):
    windows = load_windows(save_npz(tmp_path / "w.npz"))
    assert windows.eeg.std() == pytest.approx(10, rel=0.05)
    assert windows.targets.tolist() == list(range(12))
    assert windows.signal.positions is None
    assert windows.signal.steps == UNTOUCHED.steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": np.r_[np.arange(11.0), np.nan]}, "1 of 12 labels are missing or NaN, the first of window 11"),
        ({"targets": np.ones(12)}, "all the same"),
        ({"targets": None}, "has no targets"),
        ({"targets": np.ones(5)}, r"targets of shape \(5,\), not \(12,\)"),
        ({"subject": np.array(["a", "b"])}, r"subject of shape \(2,\)"),
        ({"onset": np.array(["early"] * 12)}, "onset of w.npz is no number"),
        ({"positions": np.ones((3, 2))}, r"positions of shape \(3, 2\), not \(3, 3\)"),
        ({"sfreq": np.array([100.0, 100.0])}, "sfreq of shape"),
        ({"subject": None}, "which windows belong together"),
        ({"eeg": np.full((12, 3, 200), np.nan)}, "not finite"),
        ({"eeg": np.zeros((12, 4, 200))}, "for 3 names"),
        ({"sfreq": 250.0}, "--sfreq 250"),
        ({"ch_names": None}, "lacks ch_names"),
    ],
)
def test_npz_files_that_cannot_be_learned_from_are_refused(changes, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_windows(save_npz(tmp_path / "w.npz", **changes))


def test_volts_for_microvolts_are_noticed_in_windows_that_others_have_cut(tmp_path):
    with pytest.raises(RecordingError, match="another unit's.*`unit` of an .npz; volts passed as microvolts"):
        load_windows(save_npz(tmp_path / "w.npz", unit=None))


def test_channels_of_an_npz_file_are_picked_and_placed_by_name(tmp_path):
    places = np.array([[0.0, 0.07, 0.05], [0.0, 0.0, 0.1], [0.0, -0.07, 0.05]])
    config = dataclasses.replace(save_npz(tmp_path / "w.npz", positions=places), ch_names=("Pz", "fz"))
    windows = load_windows(config)
    assert windows.signal.ch_names == ("Pz", "Fz")
    assert windows.signal.positions == (tuple(places[2]), tuple(places[0]))
    np.testing.assert_allclose(windows.eeg, np.load(tmp_path / "w.npz")["eeg"][:, [2, 0]] * 1e6, rtol=1e-6)


def test_windows_whose_time_is_not_known_are_not_cut_into_blocks(tmp_path):
    """They may overlap: neighbours of one subject would end up on both sides."""
    config = save_npz(tmp_path / "w.npz", subject=np.repeat("a", 12))
    with pytest.raises(DataError, match="does not tell when each window starts"):
        split_windows(load_windows(config), config)
    config = save_npz(tmp_path / "w.npz", subject=np.repeat("a", 12), onset=4.0 * np.arange(12))
    assert split_windows(load_windows(config), config).by == "block"


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    with (tmp_path / "w.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match="w.npz cannot be read"):
        load_windows(DataConfig(source=(str(tmp_path / "w.npz"),)))


def test_npz_windows_must_say_how_they_were_prepared(tmp_path):
    config = save_npz(tmp_path / "w.npz")
    with pytest.raises(DataError, match=r"data\.preprocessing"):
        load_windows(dataclasses.replace(config, preprocessing=None))


def test_labels_of_one_class_and_words_for_numbers_are_refused():
    with pytest.raises(DataError, match="two classes"):
        encode_targets(["a", "a"], "classification")
    with pytest.raises(DataError, match="no number"):
        encode_targets(["1", "fast"], "regression")
    with pytest.raises(DataError, match="1 of 2 labels are missing"):
        encode_targets(["left", ""], "classification")


def test_recordings_without_the_events_or_too_short_are_refused(eeglab, tmp_path):
    with pytest.raises(DataError, match="^eeglab_data: The recording has no events tone; its events are rt .*, square"):
        load_windows(dataclasses.replace(eeglab, target=Target(stimulus=("tone",), response=("rt",))))
    with pytest.raises(DataError, match="Reaction times are numbers, not classes"):
        load_windows(dataclasses.replace(eeglab, target=dataclasses.replace(REACTION, task="classification")))
    source = save_raw(make_raw(150), tmp_path / "short_raw.fif")
    with pytest.raises(RecordingError, match=r"lasts 1.5 s, one window of the model 2 s"):
        load_windows(DataConfig(source=(source,)))
    with pytest.raises(DataError, match="There is no data"):
        load_windows(DataConfig(source=("nowhere",)))


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("fold", range(5))
@pytest.mark.parametrize("hop", [0.5, 2.0])
def test_windows_of_one_recording_never_overlap_across_parts(fold, hop, eeglab):
    config = dataclasses.replace(eeglab, target=None, hop=hop, fold=fold)
    windows = load_windows(config)
    split = split_windows(windows, config)
    assert split.by == "block"
    onsets = {name: windows.onset[getattr(split, name)] for name in ("train", "val", "test")}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        distance = abs(onsets[one][:, None] - onsets[other]).min()
        assert distance >= 4.0 - 1e-6  # a window of 2 s and a gap of 2 s
    assert min(map(len, onsets.values())) > 10


def test_subjects_stay_together_and_every_one_is_tested_once():
    config = dataclasses.replace(DATA, synthetic=Synthetic(n_subjects=7, n_windows=3))
    windows = load_windows(config)
    tested = []
    for fold in range(5):
        split = split_windows(windows, dataclasses.replace(config, fold=fold, split_seed=1))
        people = [set(windows.subject[part]) for part in (split.train, split.val, split.test)]
        assert len(people[0] | people[1] | people[2]) == sum(map(len, people))
        assert len(split.train) + len(split.val) + len(split.test) == 21
        tested += sorted(people[2])
    assert sorted(tested) == sorted(set(windows.subject))


def test_sessions_of_two_subjects_stay_together(tmp_path):
    subject, session = np.repeat(["a", "b"], 6), np.tile(np.repeat(["1", "2"], 3), 2)
    config = save_npz(tmp_path / "w.npz", subject=subject, session=session)
    windows = load_windows(config)
    split = split_windows(windows, config)
    assert split.by == "session"
    parts = [{(subject[i], session[i]) for i in part} for part in (split.train, split.val, split.test)]
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts)) == 4


def test_too_few_subjects_are_refused():
    config = dataclasses.replace(DATA, synthetic=Synthetic(n_subjects=2, n_windows=8), split="subject")
    with pytest.raises(DataError, match="There are 2 of subject"):
        split_windows(load_windows(config), config)
    short = dataclasses.replace(config, split="block", synthetic=Synthetic(n_subjects=2, n_windows=3))
    with pytest.raises(DataError, match="No window is left for"):
        split_windows(load_windows(short), short)


# ---------------------------------------------------------------- synthetic EEG


def test_the_planted_effect_can_be_found_with_a_matched_filter_where_it_was_planted():
    config = dataclasses.replace(DATA, n_times=200, target=Target(), synthetic=Synthetic(n_subjects=3, n_windows=100))
    windows = load_windows(config)
    time = np.arange(200) / 100
    wave = np.cos(2 * np.pi * 2 * (time - 0.7)) * np.exp(-((time - 0.7) ** 2) / (2 * 0.5**2))
    amplitude = (windows.eeg - windows.eeg.mean(axis=-1, keepdims=True)) @ wave
    of_channel = [np.corrcoef(amplitude[:, c], windows.targets)[0, 1] for c in range(len(CH_NAMES))]
    posterior = np.argmin([p[1] for p in read_montage("sjepa-62").pick(CH_NAMES).positions])
    assert int(np.argmax(of_channel)) == posterior
    assert of_channel[posterior] > 0.8
    assert 3 < windows.eeg.std() < 50


# ---------------------------------------------------------------- classes of events


CLASSES = Target(kind="event", task="classification", classes=("LEFT=T1", "RIGHT=T2", "RIGHT=T3"), tmin=0.0)


def marked(n, names, step=3.0, seed=0, **kwargs):
    raw = make_raw(int(100 * step * (n + 1)), seed=seed, **kwargs)
    return raw.set_annotations(mne.Annotations(step * (1 + np.arange(n)), 0.0, [names[i % len(names)] for i in range(n)]))


def test_classes_are_named_by_the_events_of_a_recording(tmp_path):
    source = save_raw(marked(8, ["T1", "T0", "T2", "T3"]), tmp_path / "one_raw.fif")
    config = DataConfig(source=(source,), target=CLASSES, preprocessing=UNTOUCHED)
    windows = load_windows(config)
    assert windows.class_names == ("LEFT", "RIGHT")
    assert windows.targets.tolist() == [0, 1, 1, 0, 1, 1]
    np.testing.assert_allclose(windows.onset, [3, 9, 12, 15, 21, 24])
    other = dataclasses.replace(CLASSES, classes=("T3", "T1"))
    assert load_windows(dataclasses.replace(config, target=other)).class_names == ("T3", "T1")  # the user's order
    absent = dataclasses.replace(CLASSES, classes=("LEFT=T1", "RIGHT=T7"))
    with pytest.raises(DataError, match=r"of RIGHT; the others are of LEFT\..* T0 \(\d\), T1 \(2\), T2 \(\d\), T3 \(\d\)\."):
        load_windows(dataclasses.replace(config, target=absent))
    unchosen = dataclasses.replace(config, target=Target(kind="reaction_time"))
    with pytest.raises(DataError, match=r"No events were chosen; the recording has T0 .*--classes.*--stimulus and --response"):
        load_windows(unchosen)


def test_a_run_without_the_events_is_skipped_and_told_with_those_that_it_has(tmp_path):
    with_events = save_raw(marked(8, ["T1", "T2"]), tmp_path / "one_raw.fif")
    without = save_raw(marked(6, ["rest", "T0", "T0"], seed=1), tmp_path / "two_raw.fif")
    config = DataConfig(source=(without, with_events), target=CLASSES, preprocessing=UNTOUCHED)
    windows = load_windows(config)
    assert set(windows.recording) == {"one_raw"}
    (told,) = windows.skipped
    assert told.startswith("two_raw: The recording has no events T1, T2, T3; its events are T0 (4), rest (2)")
    with pytest.raises(DataError, match=r"^two_raw: The recording has no events T1"):
        load_windows(dataclasses.replace(config, source=(without,)))
    other = save_raw(marked(3, ["rest"], seed=3, ch_names=("C3", "C4")), tmp_path / "other_raw.fif")  # other channels too
    assert len(load_windows(dataclasses.replace(config, source=(with_events, other))).skipped) == 1
    third = save_raw(make_raw(1000, seed=2), tmp_path / "three_raw.fif")
    with pytest.raises(DataError, match=r"None of 2 recordings gives a window. two_raw: .*T0 \(4\)"):
        load_windows(dataclasses.replace(config, source=(without, third)))


def test_values_of_a_trigger_channel_are_events(tmp_path):
    raw = make_raw(3000)
    codes = np.zeros((1, 3000))
    codes[0, 500:510], codes[0, 1000:1010], codes[0, 2000:2010] = 1, 2, 1
    stim = mne.io.RawArray(codes, mne.create_info(["STI 014"], 100.0, "stim"), verbose="error")
    raw.add_channels([stim], force_update_info=True).set_meas_date(1e9)
    raw.crop(1.0)
    target = dataclasses.replace(CLASSES, classes=("go=1", "stop=2"))
    windows = load_windows(DataConfig(source=(save_raw(raw, tmp_path / "one_raw.fif"),), target=target, preprocessing=UNTOUCHED))
    np.testing.assert_allclose(windows.onset, [4.0, 9.0, 19.0])
    assert [windows.label(i) for i in range(3)] == ["go", "stop", "go"]
    events = mne.find_events(raw, verbose="error")
    np.testing.assert_allclose(windows.onset, (events[:, 0] - raw.first_samp) / 100)


def test_markers_of_an_xdf_file_are_events(tmp_path):
    rng = np.random.default_rng(0)
    channels = [{"label": name, "unit": "microvolts", "type": "EEG"} for name in ("Fz", "Cz", "Pz")]
    stamps = 1000 + np.arange(3000) / 100
    eeg = Stream(
        name="amp", kind="EEG", samples=rng.normal(0, 20, (3000, 3)).astype("<f4"), stamps=stamps, rate=100.0, channels=channels
    )
    marks = Stream(name="task", kind="Markers", samples=["T1", "T2", "T0", "T1"], stamps=np.array([1003.0, 1008.5, 1012, 999.0]))
    path = write_xdf(tmp_path / "one.xdf", eeg, marks)
    target = dataclasses.replace(CLASSES, classes=("T1", "T2"))
    windows = load_windows(DataConfig(source=(str(path),), target=target, preprocessing=UNTOUCHED))
    np.testing.assert_allclose(windows.onset, [3.0, 8.5], atol=1e-6)  # what came before the EEG has no window
    np.testing.assert_allclose(windows.eeg[0], eeg.samples[300:500].T, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.set_index")
def test_classes_of_epochs_and_of_saved_windows_are_picked(tmp_path):
    raw = marked(8, ["T1", "T0", "T2", "T3"])
    events, ids = mne.events_from_annotations(raw, verbose="error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        epochs = mne.Epochs(raw, events, ids, tmin=0.0, tmax=1.99, baseline=None, preload=True, verbose="error")
        epochs.save(tmp_path / "one-epo.fif", verbose="error")
    windows = load_windows(
        DataConfig(source=(str(tmp_path / "one-epo.fif"),), target=CLASSES, preprocessing=Preprocessing(reference="none"))
    )
    assert windows.targets.tolist() == [0, 1, 1, 0, 1, 1]
    np.testing.assert_allclose(windows.eeg, epochs[["T1", "T2", "T3"]].get_data() * 1e6, rtol=1e-5, atol=1e-4)
    config = save_npz(tmp_path / "w.npz", targets=np.array(["T1", "T0", "T2", "T3"] * 3))
    windows = load_windows(dataclasses.replace(config, target=CLASSES))
    assert windows.targets.tolist() == [0, 1, 1] * 3
    assert windows.subject.tolist() == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "regression"}, "the task a regression"),
        ({"kind": "reaction_time"}, "the target is a reaction_time"),
        ({"classes": ("=T1", "B=T2")}, "'=T1' is no CLASS=EVENT"),
        ({"classes": ("A=T1", "B=T1")}, "An event is of two classes"),
        ({"classes": ()}, "No class is named"),
    ],
)
def test_classes_that_contradict_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(CLASSES, **changes)


def test_an_edf_file_of_a_bids_folder_gives_the_windows_of_the_file_itself(tmp_path):
    """The file has a date; its events stand in events.tsv."""
    place = tmp_path / "bids/sub-01/eeg"
    place.mkdir(parents=True)
    events = [(2.0 + 2.5 * i, ("T1", "T2")[i % 2]) for i in range(10)]
    alone = write_edf(tmp_path / "a.edf", ["Fz", "Pz"], eeg(2, 3000), [100, 100], events=events)
    write_edf(place / "sub-01_task-x_eeg.edf", ["Fz", "Pz"], eeg(2, 3000), [100, 100])
    rows = ["onset\tduration\ttrial_type", *(f"{onset}\t0\t{name}" for onset, name in events)]
    (place / "sub-01_task-x_events.tsv").write_text("\n".join(rows) + "\n")
    (place / "sub-01_task-x_channels.tsv").write_text("name\ttype\tunits\nFz\tEEG\tuV\nPz\tEEG\tuV\n")
    (tmp_path / "bids/dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    target = dataclasses.replace(CLASSES, classes=("T1", "T2"))
    one, other = (
        load_windows(DataConfig(source=(str(path),), target=target, preprocessing=UNTOUCHED))
        for path in (alone, tmp_path / "bids")
    )
    assert len(one) == 10
    for name in ("eeg", "onset", "targets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_subjects_sessions_tasks_and_runs_of_a_bids_folder_are_picked(tmp_path):
    import mne_bids

    for seed, (subject, task, run) in enumerate(itertools.product(("01", "02"), ("rest", "hand"), ("1", "2"))):
        path = mne_bids.BIDSPath(subject=subject, session="a", task=task, run=run, root=tmp_path, datatype="eeg")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mne_bids.write_raw_bids(make_raw(500, seed=seed), path, format="BrainVision", allow_preload=True, verbose="error")
    config = DataConfig(source=(str(tmp_path),), preprocessing=UNTOUCHED)
    assert len(set(load_windows(config).recording)) == 8
    picked = load_windows(dataclasses.replace(config, subjects=("02",), sessions=("a",), tasks=("hand",), runs=("2",)))
    assert set(picked.recording) == {"sub-02_ses-a_task-hand_run-2_eeg.vhdr"}
    with pytest.raises(DataError, match="has no tasks foot; it has hand, rest. Mend --tasks"):
        load_windows(dataclasses.replace(config, tasks=("foot", "hand")))


# ---------------------------------------------------------------- windows that do not fit into memory


def test_windows_that_do_not_fit_are_the_same_windows_from_a_mapped_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources = tuple(save_raw(make_raw(2000, seed=i), tmp_path / f"{i}_raw.fif") for i in range(3))
    config = DataConfig(source=sources, preprocessing=UNTOUCHED)
    held = load_windows(config)
    mapped = load_windows(dataclasses.replace(config, memory=1e-6))
    assert is_mapped(mapped.eeg)
    assert not is_mapped(held.eeg)
    assert mapped.steps[-1] == "kept in a mapped file"
    for name in ("eeg", "subject", "recording", "onset"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(held, name))
    assert mapped.hashes == held.hashes
    assert not list((tmp_path / "cache").rglob("*.*"))  # the file has no name


def test_saved_windows_that_need_no_change_stay_where_they_are(tmp_path):
    eeg = np.random.default_rng(0).normal(0, 10, (12, 3, 200)).astype(np.float32)
    windows = load_windows(save_npz(tmp_path / "w.npz", eeg=eeg, unit="uV"))
    assert is_mapped(windows.eeg)
    np.testing.assert_array_equal(windows.eeg, eeg)
    np.savez_compressed(tmp_path / "c.npz", **np.load(tmp_path / "w.npz"))
    packed = load_windows(dataclasses.replace(save_npz(tmp_path / "w.npz"), source=(str(tmp_path / "c.npz"),)))
    np.testing.assert_array_equal(packed.eeg, eeg)
    swapped = load_windows(save_npz(tmp_path / "v.npz", eeg=np.asfortranarray(eeg), unit="uV"))
    np.testing.assert_array_equal(swapped.eeg, eeg)
    two = save_npz(tmp_path / "two.npz", eeg=np.random.default_rng(1).normal(0, 10, (12, 3, 200)), unit="uV")
    assert len(load_windows(dataclasses.replace(two, source=(str(tmp_path / "c.npz"), *two.source)))) == 24
