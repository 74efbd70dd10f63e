"""Which channels are which: names, electrodes, units and rates as real files state them."""

import mne
import numpy as np
import pytest
from edf_files import eeg, write_edf
from hypothesis import given
from hypothesis import strategies as st

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.names import canonical, find_channels, parse_rename, renamed, says_other_than_eeg
from sjepa_deploy.eeg.pauses import told
from sjepa_deploy.eeg.places import difference_of_places, places_of
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.learning.data import DataConfig
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.spec import Preprocessing, SignalSpec

NAMES = ["EEG Fz", "EEG Cz", "EEG Pz", "EEG Oz"]
UNTOUCHED = Preprocessing(reference="none", l_freq=None, h_freq=None)


def spec_of(ch_names, positions=None, *, sfreq=100.0):
    return SignalSpec(
        n_chans=len(ch_names),
        n_times=200,
        sfreq=sfreq,
        ch_names=tuple(ch_names),
        positions=positions,
        steps=UNTOUCHED.steps,
        phase="zero-phase",
    )


def raw_of(ch_names, montage=None, sfreq=100.0):
    raw = mne.io.RawArray(eeg(len(ch_names), 500) * 1e-6, mne.create_info(list(ch_names), sfreq, "eeg"), verbose="error")
    return raw if montage is None else raw.set_montage(montage, verbose="error")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        ("T3", "T7"), ("t4", "T8"), ("EEG T5-REF", "P7"), ("T6-LE", "P8"), ("T7", "T3"), ("Fc5.", "FC5"), ("EEG Fp1-REF", "Fp1"),
        ("EEG FP1-LE", "Fp1"), ("POL Fp1", "Fp1"), ("Oz..", "OZ"), (" Cz ", "Cz"), ("EEG A1-Ref", "A1"),
    ],
)  # fmt: skip
def test_other_spellings_are_understood(theirs, mine):
    found = find_channels([mine], ["C3", theirs])
    assert found.columns == (1,)
    assert found.aliases in (((theirs, mine),), ())


@pytest.mark.parametrize(("theirs", "mine"), [("Fp1-F7", "Fp1"), ("EEG Fpz-Cz", "Cz"), ("T9", "T7"), ("EOG", "EEG"), ("C", "C3")])
def test_other_electrodes_are_not(theirs, mine):
    assert find_channels([mine], [theirs]).columns == (None,)


def test_a_name_as_it_is_written_comes_before_its_other_spellings():
    found = find_channels(["T7", "T3"], ["T3", "T7"])
    assert found.columns == (1, 0)
    assert found.aliases == ()


def test_what_two_channels_could_be_is_taken_from_neither():
    raw = raw_of(["Fp1-REF", "Fp1-LE", "Cz"])
    with pytest.raises(RecordingError, match="lacks.*: Fp1; it has Fp1-REF, Fp1-LE, Cz; Fp1 could be each of Fp1-REF, Fp1-LE"):
        fit_recording(raw, spec_of(["Fp1", "Cz"]))


@given(st.lists(st.sampled_from(["T3", "T7", "EEG T7-REF", "Cz", "cz.", "Oz"]), unique=True), st.permutations(["T7", "Cz", "Oz"]))
def test_no_channel_is_found_twice(there, wanted):
    columns = [column for column in find_channels(wanted, there).columns if column is not None]
    assert len(set(columns)) == len(columns)
    for name, column in zip(wanted, find_channels(wanted, there).columns, strict=True):
        assert column is None or canonical(there[column]) == canonical(name)


def test_channels_are_renamed_by_the_user(tmp_path):
    path = write_edf(tmp_path / "a.edf", ["X1", "X2"], eeg(2, 2500), [250, 250])
    raw = read_recording(path, rename=parse_rename(["x1=Fz", "X2 = Cz"], RecordingError))
    assert raw.ch_names == ["Fz", "Cz"]
    with pytest.raises(RecordingError, match="no channels X3 to rename; there are X1, X2"):
        read_recording(path, rename={"X3": "Fz"})
    for pairs in (["X1"], ["X1="], ["=Fz"], ["X1=Fz", "X1=Cz"], ["X1=Fz", "X2=Fz"]):
        with pytest.raises(RecordingError, match="renames no channel"):
            parse_rename(pairs, RecordingError)
    with pytest.raises(RecordingError, match="Two channels would be called Fz, fz"):
        renamed(["X1", "fz"], {"X1": "Fz"}, RecordingError)


@pytest.mark.parametrize("name", ["EOG1", "HEOG", "VEOGb", "ECG", "EKG1", "EMG-leg", "STI 014", "Status", "ACC_X", "AccX", "TRG"])
def test_channels_that_say_that_they_are_no_eeg_are_learned_from_only_if_they_are_named(name, tmp_path):
    assert says_other_than_eeg(name)
    raw = raw_of(["Fz", "Cz", name])
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    config = DataConfig(source=(str(tmp_path / "a_raw.fif"),), preprocessing=UNTOUCHED, phase="zero-phase")
    windows = load_windows(config)
    assert windows.signal.ch_names == ("Fz", "Cz")
    assert f"left out 1 channels: {name}" in windows.steps
    named = DataConfig(source=config.source, preprocessing=UNTOUCHED, ch_names=("Fz", name))
    assert load_windows(named).signal.ch_names == ("Fz", name)


def test_no_electrode_of_a_standard_montage_says_that_it_is_no_eeg():
    for montage in mne.channels.get_builtin_montages():
        for name in mne.channels.make_standard_montage(montage).ch_names:
            assert not says_other_than_eeg(name), (montage, name)


# ---------------------------------------------------------------- electrodes


def test_a_net_of_256_is_not_one_of_129_though_it_has_all_its_names():
    net = read_montage("GSN-HydroCel-129")
    spec = spec_of(net.ch_names[:128], net.positions[:128])
    large = mne.channels.make_standard_montage("GSN-HydroCel-256")
    for raw in (raw_of(large.ch_names, large), raw_of(large.ch_names)):  # with its places, and by its names alone
        with pytest.raises(RecordingError, match=r"other electrodes than the model under the same names.*differ by 3\d degrees"):
            fit_recording(raw, spec)
        with pytest.raises(RecordingError, match="other electrodes than the model under the same names"):
            fit_recording(raw, spec, interpolate=1.0)
    small = mne.channels.make_standard_montage("GSN-HydroCel-129")
    assert fit_recording(raw_of(small.ch_names, small), spec).n_found == 128


def test_a_biosemi_cap_is_not_the_10_10_system_though_both_have_c3():
    ten = read_montage("standard_1005").pick(["C1", "C2", "C3", "C4", "C5", "C6"])
    cap = mne.channels.make_standard_montage("biosemi128")
    with pytest.raises(RecordingError, match="other electrodes.*names, those of biosemi128"):
        fit_recording(raw_of(cap.ch_names), spec_of(ten.ch_names, ten.positions))


def test_names_that_belong_to_no_system_have_no_places():
    """A1 to A32 and B1 to B32 are a box's inputs: which cap was plugged in is not known."""
    names = [f"{letter}{number}" for letter in "AB" for number in range(1, 33)]
    assert places_of(raw_of(names)) == ({}, "")
    ten = read_montage("sjepa-62")
    with pytest.raises(RecordingError, match="Only 0 good EEG channels of the recording have a position.*it has A1, A2"):
        fit_recording(raw_of(names), spec_of(ten.ch_names, ten.positions), interpolate=1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [("standard_1005", "biosemi64"), ("standard_1005", "easycap-M1"), ("GSN-HydroCel-129", "GSN-HydroCel-128")],
)
def test_templates_of_the_same_electrodes_agree_in_any_frame(one, other):
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    a, b = read_montage(one), read_montage(other)
    these = dict(zip(map(str.casefold, a.ch_names), a.positions, strict=True))
    moved = np.array(b.positions) @ turn + [0.0, 0.02, -0.03]
    those = dict(zip(map(str.casefold, b.ch_names), map(tuple, moved.tolist()), strict=True))
    pairs = [(name, name) for name in these if name in those]
    assert difference_of_places(these, those, pairs) < 4
    mixed = [(one, other) for (one, _), (_, other) in zip(pairs, pairs[1:] + pairs[:1], strict=True)]
    assert len(pairs) > 60
    assert difference_of_places(these, those, mixed) > 4


def test_more_than_the_share_is_not_interpolated():
    montage = read_montage("sjepa-62")
    raw = raw_of(montage.ch_names[:40])
    spec = spec_of(montage.ch_names, montage.positions)
    with pytest.raises(RecordingError, match=r"22 of 62 channels of the model would be interpolated, more than 0.25.*"
                                             r"`--interpolate 0.36`"):  # fmt: skip
        fit_recording(raw, spec, interpolate=0.25)
    fitted = fit_recording(raw, spec, interpolate=0.36)
    assert (fitted.n_found, fitted.data.shape[0]) == (40, 62)


# ---------------------------------------------------------------- units and rates of EDF


@pytest.mark.parametrize(
    ("dim", "volts"),
    [("uV", 1e-6), ("µV", 1e-6), ("uv", 1e-6), ("UV", 1e-6), ("uVolts", 1e-6), ("microvol", 1e-6), ("mV", 1e-3), ("MV", 1e-3),
     ("V", 1.0), ("volt", 1.0), ("nV", 1e-9), ("\x83\xcaV", 1e-6)],
)  # fmt: skip
def test_units_of_edf_are_understood(dim, volts, tmp_path):
    data = eeg(4, 2500)
    raw = read_recording(write_edf(tmp_path / "a.edf", NAMES, data, [250] * 4, dims=[dim] * 4))
    np.testing.assert_allclose(raw.get_data(), data * volts, rtol=1e-9)


@pytest.mark.parametrize(("dim", "message"), [("", "does not state its unit"), ("ADC", "states the unit of its channels as ADC")])
def test_edf_without_a_voltage_needs_a_unit(dim, message, tmp_path):
    data = eeg(4, 2500)
    path = write_edf(tmp_path / "a.edf", NAMES, data, [250] * 4, dims=[dim] * 4)
    with pytest.raises(RecordingError, match=f"{message}.*`--unit uV`"):
        read_recording(path)
    raw = read_recording(path, unit="uV")
    np.testing.assert_allclose(raw.get_data(), data * 1e-6, rtol=1e-9)
    assert any(f"taken as uV, by `--unit`, and not as {dim or 'no unit'}" in note for note in told(raw).notes)


def test_units_of_channels_that_are_not_used_do_not_matter(tmp_path):
    data = eeg(5, 2500)
    dims = ["uV", "mV", "uV", "uV", "%"]
    path = write_edf(tmp_path / "a.edf", [*NAMES, "Battery level"], data, [250] * 5, dims=dims)
    raw = read_recording(path)
    np.testing.assert_allclose(raw.get_data(), data[:4] * np.array([[1e-6], [1e-3], [1e-6], [1e-6]]), rtol=1e-9)
    assert any("left out Battery level (%)" in note for note in told(raw).notes)
    with pytest.raises(RecordingError, match="lacks.*: Battery level; it has Fz, Cz, Pz, Oz; left out Battery level"):
        fit_recording(raw, spec_of(["Fz", "Battery level"]))


@pytest.mark.parametrize(("aux", "rate"), [("ECG", 1000), ("Audio", 1000), ("ACC X", 25)])
def test_eeg_keeps_its_rate_beside_channels_of_another(aux, rate, tmp_path):
    data = eeg(4, 2500)
    path = write_edf(tmp_path / "a.edf", [*NAMES, aux], [*data, eeg(1, 10 * rate)[0]], [250] * 4 + [rate])
    raw = read_recording(path)
    assert raw.info["sfreq"] == 250
    np.testing.assert_allclose(raw.get_data(), data * 1e-6, rtol=1e-9)
    assert any(f"left out {aux}, which have not the 250 Hz" in note for note in told(raw).notes)


def test_slow_eeg_beside_a_fast_channel_is_slow(tmp_path):
    path = write_edf(tmp_path / "a.edf", [*NAMES, "ECG"], [*eeg(4, 500), eeg(1, 2000)[0]], [50] * 4 + [200])
    with pytest.raises(RecordingError, match="sampled at 50 Hz, the model at 100 Hz"):
        fit_recording(read_recording(path), spec_of(["Fz", "Cz", "Pz", "Oz"]))


# ---------------------------------------------------------------- amplitudes, other files


def test_the_unit_guard_says_where_and_can_be_switched_off():
    data = eeg(4, 3000) * 1e-6
    data[:, 1200:] *= 1e5  # from the 12th second on
    raw = mne.io.RawArray(data, mne.create_info(["Fz", "Cz", "Pz", "Oz"], 100.0, "eeg"), verbose="error")
    spec = spec_of(["Fz", "Cz", "Pz", "Oz"])
    with pytest.raises(RecordingError, match=r"18 of its 30 seconds, the first of them number 12.*no EEG.*--no-check-unit"):
        fit_recording(raw, spec)
    np.testing.assert_allclose(fit_recording(raw, spec, check_unit=False).data, data * 1e6, rtol=1e-6)


def test_a_flat_recording_is_called_flat_and_no_other_unit():
    names = ["Fz", "Cz", "Pz", "Oz"]
    raw = mne.io.RawArray(np.full((4, 3000), 3e-3), mne.create_info(names, 100.0, "eeg"), verbose="error")
    for spec in (spec_of(names), spec_of(names).replace(steps=Preprocessing().steps)):
        with pytest.raises(RecordingError, match="channels are flat") as caught:
            fit_recording(raw, spec)
        assert "unit" not in str(caught.value)


def test_flat_seconds_are_told():
    names = ["Fz", "Cz", "Pz", "Oz"]
    data = eeg(4, 3050) * 1e-6
    data[:3, 700:1000] = -2e-3
    data[:, :200] = 0.0
    data[1, 2000:2500] = 0.0  # a channel alone is judged live, window by window
    raw = mne.io.RawArray(data, mne.create_info(names, 100.0, "eeg"), verbose="error")
    assert "is flat in 5 of its 30 seconds, the first of them number 0" in fit_recording(raw, spec_of(names)).steps


def test_text_files_of_openbci_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("%OpenBCI Raw EXG Data\n%Number of channels = 4\n")
    with pytest.raises(RecordingError, match=r"a.txt is a text file of OpenBCI's GUI.*\.npy"):
        read_recording(tmp_path / "a.txt")


@pytest.mark.parametrize("sfreq", [500.02, 600.614990234375, 999.4121105232217, 1024 / 7, 511.9987, 100.0003, 99.99999, 99.995])
def test_rates_without_a_ratio_of_integers_are_exact_in_time(sfreq):
    t = np.arange(int(8 * sfreq)) / sfreq
    data = 2e-5 * np.array([np.sin(2 * np.pi * 10 * t), np.cos(2 * np.pi * 7 * t)])
    raw = mne.io.RawArray(data, mne.create_info(["Fz", "Cz"], sfreq, "eeg"), verbose="error")
    fitted = fit_recording(raw, spec_of(["Fz", "Cz"]))
    t = np.arange(fitted.data.shape[1]) / 100
    truth = 20 * np.array([np.sin(2 * np.pi * 10 * t), np.cos(2 * np.pi * 7 * t)])
    np.testing.assert_allclose(fitted.data[:, 100:-100], truth[:, 100:-100], atol=0.005)
