"""Windows for training elsewhere are those that decoding makes, and lists of braindecode's preprocessors are read."""

import warnings

import mne
import numpy as np
import oracle  # noqa: F401  # imports braindecode without torchaudio's CUDA
import pytest
from braindecode.preprocessing import Filter, Pick, Preprocessor, Resample, SetEEGReference, exponential_moving_standardize

from sjepa_deploy.eeg import prepare, signal_from_braindecode
from sjepa_deploy.eeg.epochs import read_windows
from sjepa_deploy.eeg.events import events_of
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.steps import BandPass, Baseline, Channels, ExponentialStandardise, Reference, ZScore
from sjepa_deploy.eeg.steps import Resample as ResampleStep
from sjepa_deploy.errors import DataError, RecordingError
from sjepa_deploy.spec import EventWindow, SignalSpec


@pytest.fixture(scope="module")
def raw():
    """Return 40 s of four channels at 128 Hz with 15 events of two kinds, some at half samples."""
    rng = np.random.default_rng(0)
    volts = np.cumsum(rng.normal(size=(4, 5120)), axis=1) * 1e-6 + rng.normal(size=(4, 5120)) * 5e-6
    made = mne.io.RawArray(volts, mne.create_info(["Fz", "Cz", "Pz", "Oz"], 128.0, "eeg"), verbose="error")
    onsets = 2.0 + 2.3 * np.arange(15) + 0.5 / 128 * (np.arange(15) % 3)
    made.set_annotations(mne.Annotations(onsets, 0.0, ["left", "right"] * 7 + ["left"]), verbose="error")
    return made


def signal(raw, **changes):
    fields = {
        "n_chans": 4,
        "n_times": 200,
        "sfreq": 128.0,
        "ch_names": tuple(raw.ch_names),
        "steps": (BandPass(l_freq=1.0, h_freq=30.0), ResampleStep(), Channels(), Reference()),
        "event_window": EventWindow(start=-0.25, events=("left", "right")),
    }
    return SignalSpec(**fields | changes)


def test_windows_of_events_are_where_mne_places_them(raw):
    """At the recording's own rate and in zero phase the windows are those of `mne.Epochs` on the filtered recording."""
    prepared = prepare(raw, signal(raw, phase="zero-phase"))
    filtered = raw.copy().filter(1.0, 30.0, verbose="error").set_eeg_reference("average", verbose="error")
    events, ids = mne.events_from_annotations(filtered, verbose="error")
    epochs = mne.Epochs(filtered, events, ids, tmin=-0.25, tmax=-0.25 + 199 / 128, baseline=None, preload=True, verbose="error")
    np.testing.assert_allclose(prepared.eeg, epochs.get_data() * 1e6, rtol=1e-5, atol=1e-4)
    assert prepared.events is not None
    assert list(prepared.events.description) == ["left", "right"] * 7 + ["left"]


@pytest.mark.parametrize("sfreq", [100.0, 64.0, 128.0])
def test_causal_windows_are_pieces_of_the_causal_recording(raw, sfreq):
    """Each window begins at MNE's sample of its event, moved to the model's rate."""
    wanted = signal(raw, sfreq=sfreq)
    prepared = prepare(raw, wanted, events=["right"])
    whole = fit_recording(raw, wanted).data
    samples = mne.events_from_annotations(raw, verbose="error")[0]
    right = samples[samples[:, 2] == 2, 0]
    assert len(prepared.eeg) == 7
    for window, sample in zip(prepared.eeg, right, strict=True):
        start = int(np.rint(sample * sfreq / 128)) + round(-0.25 * sfreq)
        np.testing.assert_array_equal(window, whole[:, start : start + 200])


def test_steps_on_windows_come_last(raw):
    plain = prepare(raw, signal(raw))
    steps = (*signal(raw).steps, Baseline(tmax=0.0), ZScore())
    scored = prepare(raw, signal(raw, steps=steps))
    baseline = plain.eeg[:, :, :33].astype(np.float64).mean(axis=2, keepdims=True)
    want = plain.eeg - baseline
    want = (want - want.mean(axis=2, keepdims=True)) / want.std(axis=2, keepdims=True)
    np.testing.assert_allclose(scored.eeg, want, atol=1e-5)


def test_windows_follow_each_other_where_there_are_no_events(raw):
    prepared = prepare(raw, signal(raw, event_window=None), hop=0.5)
    np.testing.assert_allclose(np.diff(prepared.times), 0.5)
    assert prepared.events is None
    assert prepared.settling[0]
    assert not prepared.settling[-1]


def test_epochs_come_out_again(raw):
    prepared = prepare(raw, signal(raw))
    epochs = prepared.to_epochs()
    np.testing.assert_array_equal(epochs.get_data(copy=False).astype(np.float32), prepared.eeg)
    assert epochs.tmin == -0.25
    assert set(epochs.event_id) == {"left", "right"}


def test_epochs_go_through_the_steps_without_memory(raw, tmp_path):
    events, ids = mne.events_from_annotations(raw, verbose="error")
    epochs = mne.Epochs(raw, events, ids, tmin=-0.5, tmax=2.0, baseline=None, preload=True, verbose="error")
    got = prepare(epochs, signal(raw), events=["right"])
    want = epochs["right"].get_data()[:, :, 32:232] * 1e6
    np.testing.assert_allclose(got.eeg, want - want.mean(axis=1, keepdims=True), rtol=1e-4, atol=1e-3)
    epochs.save(tmp_path / "some-epo.fif", verbose="error")
    read = read_windows(tmp_path / "some-epo.fif", signal(raw), tmin=-0.25)
    np.testing.assert_allclose(read.eeg[[name == "right" for name in read.events.description]], got.eeg, rtol=1e-4, atol=1e-3)


def test_epochs_do_not_go_through_a_step_with_memory(raw):
    events, ids = mne.events_from_annotations(raw, verbose="error")
    epochs = mne.Epochs(raw, events, ids, tmin=-0.5, tmax=2.0, baseline=None, preload=True, verbose="error")
    with pytest.raises(RecordingError, match="exponential-standardise"):
        prepare(epochs, signal(raw, steps=(ResampleStep(), Channels(), ExponentialStandardise())))


def test_other_events_are_refused_with_those_that_are_there(raw):
    with pytest.raises(RecordingError, match=r"rest.*left \(8\), right \(7\)"):
        prepare(raw, signal(raw), events=["left", "rest"])
    with pytest.raises(RecordingError, match="event_window"):
        prepare(raw, signal(raw, event_window=None), events=["left"])
    with pytest.raises(RecordingError, match="whole window"):
        prepare(raw, signal(raw, event_window=EventWindow(start=100.0)))


PLACE = {"ch_names": ("Fz", "Cz"), "sfreq": 100.0, "n_times": 200}


def test_braindecodes_preprocessors_are_read():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Preprocessing choices with lambda")
        list_of_them = [
            Pick(picks="eeg"),
            Preprocessor(lambda data, factor: np.multiply(data, factor), factor=1e6),
            Filter(l_freq=4.0, h_freq=38.0),
            Resample(sfreq=100),
            SetEEGReference(ref_channels="average"),
            Preprocessor(exponential_moving_standardize, factor_new=2e-3),
        ]
    found = signal_from_braindecode(list_of_them, **PLACE, trial_start_offset_samples=-50, events=["left"])
    assert found.steps == (
        Channels(),
        BandPass(l_freq=4.0, h_freq=38.0),
        ResampleStep(),
        Reference(),
        ExponentialStandardise(factor_new=2e-3),
    )
    assert (found.unit, found.phase, found.event_window) == ("uV", "zero-phase", EventWindow(start=-0.5, events=("left",)))


def test_strings_name_preprocessors_too():
    found = signal_from_braindecode(
        [Preprocessor("filter", apply_on_array=False, l_freq=None, h_freq=30.0)], **PLACE, event_locked=False
    )
    assert found.steps == (Channels(), BandPass(l_freq=None, h_freq=30.0), ResampleStep())
    assert (found.unit, found.event_window) == ("V", None)


def test_an_initial_block_is_told():
    with pytest.warns(UserWarning, match="1000 samples"):
        signal_from_braindecode([Preprocessor(exponential_moving_standardize, init_block_size=1000)], **PLACE)


@pytest.mark.parametrize(
    ("preprocessor", "named"),
    [
        (lambda: Filter(l_freq=1.0, h_freq=30.0, method="iir"), "method='iir'"),
        (lambda: Filter(l_freq=1.0, h_freq=30.0, phase="minimum"), "phase='minimum'"),
        (lambda: Preprocessor("crop", apply_on_array=False, tmin=1.0), "'crop'"),
        (lambda: Preprocessor("notch_filter", apply_on_array=False, freqs=[50.0]), "notch"),
        (lambda: Preprocessor(np.tanh), "'tanh'"),
        (lambda: Preprocessor(np.multiply, x2=17.0), "17"),
    ],
)
def test_what_has_no_twin_is_refused_by_name(preprocessor, named):
    with pytest.raises(DataError, match=named):
        signal_from_braindecode([preprocessor()], **PLACE)


def test_windows_of_a_braindecode_pipeline_are_its_own(raw):
    """braindecode's own windows, after its own preprocessing, are those of the signal that was read from it."""
    from braindecode.datasets import BaseConcatDataset, RawDataset
    from braindecode.preprocessing import create_windows_from_events, preprocess

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = [
            Preprocessor(lambda data, factor: np.multiply(data, factor), factor=1e6),
            Filter(l_freq=1.0, h_freq=30.0),
            SetEEGReference(ref_channels="average"),
        ]
        dataset = BaseConcatDataset([RawDataset(raw.copy())])
        preprocess(dataset, steps)
        windows = create_windows_from_events(
            dataset,
            trial_start_offset_samples=-32,
            trial_stop_offset_samples=168,
            window_size_samples=200,
            window_stride_samples=200,
            mapping={"left": 0, "right": 1},
            preload=True,
        )
        theirs = np.stack([window for window, _, _ in windows])
    found = signal_from_braindecode(
        steps,
        ch_names=raw.ch_names,
        sfreq=128.0,
        n_times=200,
        trial_start_offset_samples=-32,
        events=["left", "right"],
    )
    np.testing.assert_allclose(prepare(raw, found).eeg, theirs, rtol=1e-4, atol=1e-3)


def test_events_are_read_as_mne_reads_them(recorded):
    real = read_recording(recorded("eeglab_data.set"))
    found = events_of(real)
    samples, ids = mne.events_from_annotations(real, verbose="error")
    assert len(found) == len(samples)
    np.testing.assert_array_equal(np.rint(found.onset * real.info["sfreq"]), samples[:, 0])
    assert set(found.description) == set(ids)
