import re
import sys

import mne
import numpy as np
import pytest
import scipy.optimize
import scipy.signal
from eeg_files import eeg_file, mne_template
from hypothesis import given
from hypothesis import strategies as st
from written_eeg import WRITERS
from xdf_writer import Stream, write_xdf

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.pauses import told
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.windows import window_starts, windows
from sjepa_deploy.errors import InputError, MissingDependencyError, RecordingError
from sjepa_deploy.spec import Preprocessing, SignalSpec

UNTOUCHED = Preprocessing(reference="none", l_freq=None, h_freq=None)
XDF_NAMES = tuple(f"X{i}" for i in range(8))


def make_spec(ch_names, *, sfreq=100.0, preprocessing=UNTOUCHED, **changes) -> SignalSpec:
    fields = {"n_times": 200, "phase": "zero-phase"} | changes
    return SignalSpec(n_chans=len(ch_names), ch_names=tuple(ch_names), sfreq=sfreq, steps=preprocessing.steps, **fields)


def make_raw(data, ch_names, sfreq=100.0) -> mne.io.RawArray:
    return mne.io.RawArray(data, mne.create_info(list(ch_names), sfreq, "eeg"), verbose="error")


def noise(n_chans, n_samples, rms=1e-5):
    return np.random.default_rng(0).normal(0, rms, (n_chans, n_samples))


def copy(tmp_path, written, *names, cut=None):
    """Copy recordings and return the first; of the last, keep only a fraction (a float) or up to a byte (an int)."""
    folder = next(written(name).path for name in names if name in WRITERS).parent
    for name in names:
        content = (folder / name).read_bytes()
        if name == names[-1] and cut is not None:
            content = content[: round(len(content) * cut) if isinstance(cut, float) else cut]
        (tmp_path / name).write_bytes(content)
    return tmp_path / names[0]


@pytest.fixture(scope="module")
def eeglab(written):
    return read_recording(written("eeglab_data.set").path)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("name", [*WRITERS, "p300/sub-1_ses-1_run-01.edf"])
def test_what_was_written_is_read(written, name):
    """The oracle is the array that went in: names, volts to the resolution of the format, and events to the sample."""
    wanted = written(name)
    stated = {"unit": "uV", "ch_names": wanted.ch_names} if name.endswith((".xdf", ".npy")) else {}
    raw = read_recording(wanted.path, sfreq=wanted.sfreq, **stated)
    assert (tuple(raw.ch_names), raw.info["sfreq"]) == (wanted.ch_names, wanted.sfreq)
    assert raw.get_channel_types(unique=True) == ["eeg"]
    assert raw.preload
    np.testing.assert_allclose(raw.get_data(), wanted.volts, rtol=0, atol=1.001 * wanted.resolution)
    samples = [(round(onset * wanted.sfreq), text) for onset, text in wanted.events]
    assert [(round(mark["onset"] * wanted.sfreq), mark["description"]) for mark in raw.annotations] == samples


@pytest.mark.parametrize(
    ("name", "n_chans", "sfreq", "n_samples", "first", "median_rms_uv"),
    [
        ("eeglab_data.set", 32, 128, 30504, "FPz", (15, 40)),
        ("test_raw_chanloc_fids.set", 129, 500, 501, "E1", (1, 1000)),
        ("biosig16.edf", 16, 256, 15360, "Fp1", (1, 20)),
        ("biosemi17.bdf", 16, 256, 15360, "A1", (20, 60)),  # the 17th is the status channel
        ("testbva.vhdr", 29, 200, 2112, "Fp1", (1, 20)),  # three are not EEG
    ],
)
def test_real_recordings_are_read_in_volts(name, n_chans, sfreq, n_samples, first, median_rms_uv):
    raw = read_recording(eeg_file(name), sfreq=sfreq)
    assert (len(raw.ch_names), raw.info["sfreq"], raw.n_times, raw.ch_names[0]) == (n_chans, sfreq, n_samples, first)
    assert raw.get_channel_types(unique=True) == ["eeg"]
    assert raw.preload
    assert median_rms_uv[0] < np.median(raw.get_data().std(axis=1)) * 1e6 < median_rms_uv[1]


def test_edf_samples_equal_the_files_integers():
    raw = read_recording(eeg_file("biosig16.edf"))
    content = eeg_file("biosig16.edf").read_bytes()
    records = np.frombuffer(content[4352:], dtype="<i2").reshape(60, 16, 256)
    digital = records.swapaxes(0, 1).reshape(16, -1)
    np.testing.assert_allclose(raw.get_data(), digital * (682e-6 / 2046), rtol=0, atol=1e-15)


def test_xdf_takes_rate_from_the_stream_and_unit_and_names_from_the_caller():
    raw = read_recording(eeg_file("openbci8.xdf"), unit="uV", ch_names=XDF_NAMES)
    assert (tuple(raw.ch_names), raw.info["sfreq"], raw.n_times) == (XDF_NAMES, 1000.0, 9520)
    volts = read_recording(eeg_file("openbci8.xdf"), unit="V", ch_names=XDF_NAMES)
    np.testing.assert_allclose(volts.get_data()[:, 0] / raw.get_data()[:, 0], 1e6)
    assert raw.get_data()[0, 0] == pytest.approx(0.88011974e-6)


def described_xdf(path, *, units=("microvolts", "microvolts", "bpm"), kind="EEG", gap=0.0, rate=250.0, n=1):
    """Write `n` streams as LabRecorder describes them, beside one of markers; return their samples."""
    samples = np.random.default_rng(1).normal(0, 10, (100, 3)).astype(np.float32)
    channels = [
        {"label": label, "unit": unit, "type": type_}
        for label, unit, type_ in zip(("Fz", "Cz", "Pulse"), units, ("EEG", "EEG", "HR"), strict=True)
    ]
    stamps = 7.0 + np.arange(100) / rate + gap * (np.arange(100) >= 50)
    keys = Stream(name="keys", kind="Markers", samples=["a"], stamps=np.array([7.0]))
    amp = Stream(name="amp", kind=kind, samples=samples, stamps=stamps, rate=250.0, channels=channels)
    write_xdf(path, keys, *[amp] * n)
    return samples


def test_xdf_labels_units_and_types_come_from_the_description(tmp_path):
    samples = described_xdf(tmp_path / "a.xdf")
    raw = read_recording(tmp_path / "a.xdf", ch_names=["ignored"])
    assert raw.ch_names == ["Fz", "Cz"]
    np.testing.assert_allclose(raw.get_data(), samples.T[:2].astype(float) * 1e-6)


@pytest.mark.parametrize(
    ("unit_written", "unit"),
    [("µV", 1e-6), ("uV", 1e-6), ("millivolts", 1e-3), ("V", 1.0), ("nV", 1e-9), ("NanoVolts", 1e-9), ("-9", 1e-9)],
)
def test_xdf_units_are_understood(tmp_path, unit_written, unit):
    samples = described_xdf(tmp_path / "a.xdf", units=(unit_written, unit_written, "bpm"))
    np.testing.assert_allclose(read_recording(tmp_path / "a.xdf").get_data(), samples.T[:2].astype(float) * unit)


@pytest.mark.parametrize(
    ("stream", "unit", "message"),
    [
        ({"units": ("ADC", "ADC", "bpm")}, None, "states its unit as ADC, which is none of nV, uV, mV and V.*`--unit`"),
        ({"units": ("", "", "bpm")}, None, "does not state its unit.*`--unit`"),
        ({"rate": 125.0}, None, "not at its rate.* 0.008 to 0.008 s apart, nominally 0.004 s"),
        ({"n": 2}, None, "exactly one EEG stream.*keys .Markers., amp .EEG., amp .EEG."),
        ({"n": 0}, None, "exactly one EEG stream.*keys"),
    ],
)
def test_xdf_streams_that_cannot_be_trusted(tmp_path, stream, unit, message):
    described_xdf(tmp_path / "a.xdf", **stream)
    with pytest.raises(RecordingError, match=message):
        read_recording(tmp_path / "a.xdf", unit=unit)


def test_xdf_channels_are_each_in_their_own_unit_and_those_that_are_in_none_are_left_out(tmp_path):
    samples = described_xdf(tmp_path / "a.xdf", units=("microvolts", "mV", "bpm"))
    scaled = samples.T[:2].astype(float) * [[1e-6], [1e-3]]
    np.testing.assert_allclose(read_recording(tmp_path / "a.xdf").get_data(), scaled)
    samples = described_xdf(tmp_path / "a.xdf", units=("microvolts", "counts", "bpm"))
    raw = read_recording(tmp_path / "a.xdf")
    assert raw.ch_names == ["Fz"]
    assert told(raw).notes == ("left out Cz (counts): no voltage; `--unit` takes all channels in one unit",)
    raw = read_recording(tmp_path / "a.xdf", unit="mV")
    np.testing.assert_allclose(raw.get_data(), samples.T[:2].astype(float) * 1e-3)
    (note,) = told(raw).notes
    assert "taken as mV, by `--unit`, and not as counts, microvolts" in note


def test_unnamed_xdf_channels_are_not_the_models(tmp_path):
    """`row_names` is the model's channels: a bare array may be in their order, an amplifier's stream is in its own."""
    amp = Stream(name="amp", kind="EEG", samples=np.zeros((100, 2), "f4"), stamps=np.arange(100) / 250, rate=250.0)
    write_xdf(tmp_path / "a.xdf", amp)
    with pytest.raises(RecordingError, match=r"does not name its 2 channels.*--channels"):
        read_recording(tmp_path / "a.xdf", unit="uV", row_names=("Fz", "Cz"))
    assert read_recording(tmp_path / "a.xdf", unit="uV", ch_names=("Fz", "Cz")).ch_names == ["Fz", "Cz"]


def test_xdf_without_an_eeg_type_takes_the_only_regular_numeric_stream(tmp_path):
    described_xdf(tmp_path / "a.xdf", kind="Signal")
    assert read_recording(tmp_path / "a.xdf").ch_names == ["Fz", "Cz"]


@pytest.mark.parametrize(("unit", "factor"), [("nV", 1e-9), ("uV", 1e-6), ("mV", 1e-3), ("V", 1.0)])
def test_npy_becomes_volts(tmp_path, unit, factor):
    np.save(tmp_path / "a.npy", np.arange(20, dtype=np.int16).reshape(2, 10))
    raw = read_recording(tmp_path / "a.npy", sfreq=50.0, unit=unit, ch_names=["Cz", "Pz"])
    assert (raw.ch_names, raw.info["sfreq"]) == (["Cz", "Pz"], 50.0)
    np.testing.assert_allclose(raw.get_data(), np.arange(20).reshape(2, 10) * factor)


@pytest.mark.parametrize(
    ("array", "kwargs", "message"),
    [
        (np.zeros((2, 9)), {"sfreq": None, "unit": None}, "Give --sfreq and --unit"),
        (np.zeros((2, 9)), {"unit": None}, "Give --unit"),
        (np.zeros((2, 9)), {"sfreq": None}, "Give --sfreq"),
        (np.zeros((2, 9)), {"sfreq": -1.0}, "positive `--sfreq`"),
        (np.zeros((2, 9)), {"unit": "kV"}, "'kV' is not a unit.*nV, uV, mV, V"),
        (np.zeros((2, 9)), {"ch_names": None}, "2 rows of samples, and there are no channel names"),
        (np.zeros((9, 2)), {}, "9 rows of samples, and there are 2 different channel names"),
        (np.zeros((2, 9)), {"ch_names": ["Cz", "Cz"]}, "1 different channel names"),
        (np.zeros(9), {}, r"shape \(9,\).*Save real numbers"),
        (np.zeros((1, 2, 9)), {}, r"shape \(1, 2, 9\)"),
        (np.zeros((2, 0)), {}, r"shape \(2, 0\)"),
        (np.zeros((2, 9), complex), {}, "complex128"),
        (np.array([[None, 1], [2, 3]]), {}, "cannot be read.*Object arrays"),
    ],
)
def test_bad_npy(tmp_path, array, kwargs, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(RecordingError, match=message):
        read_recording(tmp_path / "a.npy", **{"sfreq": 100.0, "unit": "uV", "ch_names": ["Cz", "Pz"]} | kwargs)


@pytest.mark.parametrize(
    ("names", "cut"),
    [
        (["eeglab_data.set"], 0.5),
        (["eeglab_data.set"], 100),
        (["eeglab_data.set"], 0),
        (["eeglab_data.set", "eeglab_data.fdt"], 0.5),
        (["eeglab_data.set", "eeglab_data.fdt"], -3),
        (["eeglab_data.set", "eeglab_data.fdt"], 0),
        (["biosig16.edf"], 0.5),
        (["biosig16.edf"], -3),
        (["biosig16.edf"], 300),
        (["biosig16.edf"], 0),
        (["biosemi17.bdf"], 300),
        (["biosemi17.bdf"], 0),
        (["testbva.vmrk", "testbva.vhdr"], 0.5),
        (["testbva.vmrk", "testbva.vhdr"], 0),
        (["testbva.vhdr", "testbva.vmrk", "testbva.eeg"], 0.5),
        (["testbva.vhdr", "testbva.vmrk", "testbva.eeg"], -3),
        (["testbva.vhdr", "testbva.vmrk", "testbva.eeg"], 0),
        (["openbci8.xdf"], 0.5),
        (["openbci8.xdf"], -3),
        (["openbci8.xdf"], 100),
        (["openbci8.xdf"], 0),
    ],
)
def test_truncated_recordings_are_refused_in_one_line(tmp_path, written, names, cut):
    path = copy(tmp_path, written, *names, cut=cut)
    if path.suffix == ".vmrk":
        path = path.with_suffix(".vhdr")
    kwargs = {"unit": "uV", "ch_names": XDF_NAMES} if path.suffix == ".xdf" else {}
    with pytest.raises(RecordingError, match=f"{path.name} (cannot be read|is truncated)") as caught:
        read_recording(path, **kwargs)
    assert "\n" not in str(caught.value)


def test_truncated_fif_is_refused(tmp_path):
    path = tmp_path / "a_raw.fif"
    make_raw(noise(2, 10000), ["Cz", "Pz"]).save(path, verbose="error")
    assert read_recording(path).ch_names == ["Cz", "Pz"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RecordingError, match="cannot be read as a recording"):
        read_recording(path)


def test_a_missing_part_is_named(tmp_path, written):
    with pytest.raises(RecordingError, match=re.escape("eeglab_data.fdt")):
        read_recording(copy(tmp_path, written, "eeglab_data.set"))


@pytest.mark.parametrize("name", ["a.edf", "a.bdf", "a.vhdr", "a.set", "a_raw.fif", "a.xdf", "a.npy"])
def test_garbage_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"garbage!" * 500)
    with pytest.raises(RecordingError, match=f"{name} cannot be read as a recording"):
        read_recording(tmp_path / name, **({"sfreq": 1.0, "unit": "uV"} if name.endswith("npy") else {}))


def test_unknown_format_and_missing_file(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(RecordingError, match=r"Unsupported file type \(\.md\).*EDF, BDF"):
        read_recording(tmp_path / "notes.md")
    with pytest.raises(RecordingError, match=r"There is no recording .*nowhere\.edf"):
        read_recording(tmp_path / "nowhere.edf")


def test_rate_and_unit_that_contradict_the_file(written):
    with pytest.raises(RecordingError, match=r"sampled at 128 Hz, not 100 Hz.*`--sfreq`"):
        read_recording(written("eeglab_data.set").path, sfreq=100.0)


def test_a_unit_that_is_given_stands_above_the_files_and_is_told(written):
    path = written("eeglab_data.set").path
    stated, as_millivolts = read_recording(path), read_recording(path, unit="mV")  # EEGLAB's files are in microvolts
    np.testing.assert_allclose(as_millivolts.get_data(), stated.get_data() * 1e3)
    assert told(as_millivolts).notes == ("taken as mV, by `--unit`, against what eeglab_data.set states",)
    assert told(read_recording(path, unit="uV")).notes == ()
    path = written("testbva.vhdr").path
    np.testing.assert_allclose(read_recording(path, unit="V").get_data(), read_recording(path).get_data() * 1e6)


def test_a_recording_without_eeg(tmp_path):
    info = mne.create_info(["Trig"], 100.0, "stim")
    mne.io.RawArray(np.zeros((1, 500)), info, verbose="error").save(tmp_path / "a_raw.fif", verbose="error")
    with pytest.raises(RecordingError, match="no EEG channels, only stim"):
        read_recording(tmp_path / "a_raw.fif")


@pytest.mark.parametrize(("module", "name"), [("mne", "eeglab_data.set"), ("pyxdf", "openbci8.xdf")])
def test_missing_packages_are_named(monkeypatch, written, module, name):
    path = written(name).path
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install .*{module}>=.*\[eeg\]"):
        read_recording(path, unit="uV" if module == "pyxdf" else None)


@pytest.mark.parametrize(
    ("package", "name", "start"),
    [
        ("mffpy", "a.mff", None),
        ("pymatreader", "a.set", b"MATLAB 7.3 MAT-file, Platform: GLNXA64"),
        ("antio", "a.cnt", b"RIFF\0\0\0\0CNT "),
        ("antio", "b.cnt", b"RF64\0\0\0\0CNT "),
    ],
)
def test_packages_that_mne_reads_formats_with_are_named(monkeypatch, tmp_path, package, name, start):
    """Beside them, MNE's errors speak of a damaged file."""
    if start is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(start)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingDependencyError, match=f"needs {package}.*{'mffpy' if package == 'mffpy' else f'pip install {package}'}"
    ):
        read_recording(tmp_path / name)


def test_epochs_of_eeglab_are_told_from_a_recording(tmp_path):
    epochs = mne.EpochsArray(noise(4, 800).reshape(2, 4, 400), mne.create_info(list("ABCD"), 100.0, "eeg"), verbose="error")
    epochs.export(tmp_path / "cut.set", verbose="error")
    with pytest.raises(RecordingError, match=r"cut\.set holds epochs.*-epo\.fif"):
        read_recording(tmp_path / "cut.set")


def test_a_file_of_neuroscan_is_kept_from_the_reader_of_ant(monkeypatch, tmp_path):
    """Both end with .cnt, and antio 0.7.1 ends the process on a file of Neuroscan."""
    monkeypatch.setattr(mne.io, "read_raw_ant", pytest.fail)
    (tmp_path / "a.cnt").write_bytes(b"Version 3.0".ljust(900, b"\0"))
    with pytest.raises(RecordingError, match=r"a\.cnt cannot be read as a recording"):
        read_recording(tmp_path / "a.cnt")


# ---------------------------------------------------------------- fitting: channels


def test_channels_are_picked_by_name_whatever_their_case_in_the_models_order(eeglab):
    before = eeglab.get_data()
    fitted = fit_recording(eeglab, make_spec(["oz", "CZ", "fpZ"], sfreq=128.0))
    rows = [eeglab.ch_names.index(name) for name in ("Oz", "Cz", "FPz")]
    np.testing.assert_array_equal(fitted.data, (before[rows] / 1e-6).astype(np.float32))
    assert fitted.data.dtype == np.float32
    assert fitted.data.flags.c_contiguous
    assert fitted.sfreq == 128.0
    assert fitted.steps[0].startswith("left out 29 channels: EOG1, F3")
    np.testing.assert_array_equal(eeglab.get_data(), before)


def test_missing_channels_are_listed(eeglab):
    with pytest.raises(
        RecordingError, match=r"lacks.* 2 of the model's 3 channels: E1, E2; it has FPz, EOG1, .*O2\..*`--interpolate`"
    ):
        fit_recording(eeglab, make_spec(["Cz", "E1", "E2"]))
    with pytest.raises(RecordingError, match="E1, E2, E3, E4, E5, E6, E7, E8 and 120 more"):
        fit_recording(eeglab, make_spec(read_montage("GSN-HydroCel-129").ch_names))


def test_bad_channels_count_as_missing(eeglab):
    raw = eeglab.copy()
    raw.info["bads"] = ["Oz"]
    with pytest.raises(RecordingError, match=r"marks as bad, 1 of .*: Oz"):
        fit_recording(raw, make_spec(["Cz", "Oz"]))


def test_names_that_differ_in_case_only():
    with pytest.raises(RecordingError, match="differ in case only"):
        fit_recording(make_raw(noise(2, 500), ["Cz", "CZ"]), make_spec(["Cz"]))


def test_a_model_without_channel_names(eeglab):
    spec = SignalSpec(n_chans=32, n_times=200, sfreq=100.0)
    with pytest.raises(RecordingError, match=r"no channel names.*`--montage` or `--channels`"):
        fit_recording(eeglab, spec)


# ---------------------------------------------------------------- fitting: interpolation


@pytest.fixture(scope="module")
def hydrocel():
    montage = read_montage("GSN-HydroCel-129")
    return make_spec(montage.ch_names, sfreq=128.0, positions=montage.positions)


def test_32_channels_become_129(eeglab, hydrocel):
    fitted = fit_recording(eeglab, hydrocel, interpolate=True)
    assert fitted.data.shape == (129, 30504)
    assert any(step.startswith("interpolated 128 of 129 channels") for step in fitted.steps)
    cz = eeglab.get_data(picks="Cz")[0] / 1e-6
    np.testing.assert_array_equal(fitted.data[128], cz.astype(np.float32))  # measured, so kept
    oracle = (
        eeglab.copy()
        .drop_channels(["EOG1", "EOG2"])
        .interpolate_to(
            mne.channels.make_dig_montage(dict(zip(hydrocel.ch_names, hydrocel.positions, strict=True)), coord_frame="head"),
            origin=(0.0, 0.0, 0.0),
            method="spline",
        )
    )  # the centres of both montages are within 1 mm of 0
    microvolts = oracle.get_data()[:128] * 1e6
    assert np.linalg.norm(fitted.data[:128] - microvolts) < 0.02 * np.linalg.norm(microvolts)


def smooth_field(directions):
    """Potential of three smooth sources on the unit sphere."""
    sources = np.array([[0.4, 0.2, 0.5], [-0.3, 0.5, 0.3], [0.1, -0.6, 0.4]])
    return np.array([1 / np.linalg.norm(directions - source, axis=1) for source in sources])


def directions_of(montage):
    ch_pos = np.array(montage.positions)
    solution = scipy.optimize.least_squares(lambda q: np.linalg.norm(ch_pos - q[:3], axis=1) - q[3], [0.0, 0.0, 0.0, 0.1]).x
    return (ch_pos - solution[:3]) / np.linalg.norm(ch_pos - solution[:3], axis=1, keepdims=True)


@pytest.mark.parametrize("frame", ["head", "template"])
def test_a_smooth_field_survives_interpolation_in_any_frame(frame):
    """The 62 sensors sample a known field; at 129 places the splines must find it again."""
    known, wanted = read_montage("sjepa-62"), read_montage("GSN-HydroCel-129")
    time_courses = np.random.default_rng(2).normal(0, 1e-5, (3, 300))
    raw = make_raw(smooth_field(directions_of(known)).T @ time_courses, known.ch_names)
    template = mne_template("colin27_1005")  # knows its fiducials: MNE moves it by 5 cm
    as_is = mne.channels.make_dig_montage(dict(zip(known.ch_names, known.positions, strict=True)), coord_frame="head")
    raw.set_montage(template if frame == "head" else as_is)
    spec = make_spec(wanted.ch_names, positions=wanted.positions)
    fitted = fit_recording(raw, spec, interpolate=True)
    directions = directions_of(wanted)
    truth = (smooth_field(directions).T @ time_courses) / 1e-6
    covered = directions[:, 2] > 0  # below, the 62 have no neighbours
    error = np.linalg.norm(fitted.data - truth, axis=1) / np.linalg.norm(truth, axis=1)
    assert np.max(error[covered]) < 0.15  # 0.12 where the head frame is tilted against the template's
    assert np.corrcoef(fitted.data[covered].ravel(), truth[covered].ravel())[0, 1] > 0.995


def test_measured_channels_are_kept_and_bad_ones_replaced():
    montage = read_montage("sjepa-62")
    field = smooth_field(directions_of(montage)).T @ np.random.default_rng(2).normal(0, 1e-5, (3, 300))
    broken = field.copy()
    broken[13] = 1.0
    raw = make_raw(broken, montage.ch_names)
    raw.set_montage(mne_template("colin27_1005"))
    raw.info["bads"] = ["Cz"]
    fitted = fit_recording(raw, make_spec(montage.ch_names, positions=montage.positions), interpolate=True)
    others = np.arange(62) != 13
    np.testing.assert_array_equal(fitted.data[others], (field[others] / 1e-6).astype(np.float32))
    assert np.linalg.norm(fitted.data[13] - field[13] * 1e6) < 0.05 * np.linalg.norm(field[13] * 1e6)
    assert "interpolated 1 of 62 channels: Cz" in fitted.steps


def test_a_recording_without_positions_is_placed_by_name(written):
    montage = read_montage("sjepa-62")
    raw = read_recording(written("biosig16.edf").path)
    fitted = fit_recording(raw, make_spec(montage.ch_names, positions=montage.positions), interpolate=True)
    assert "placed 16 channels by their names in the 10-05 system" in fitted.steps
    assert "took T3 as T7, T4 as T8, T5 as P7, T6 as P8" in fitted.steps
    ch_pos = mne_template("colin27_1005").get_positions()["ch_pos"]
    placed = raw.copy().set_montage(mne.channels.make_dig_montage(ch_pos, coord_frame="head"))
    again = fit_recording(placed, make_spec(montage.ch_names, positions=montage.positions), interpolate=True)
    np.testing.assert_allclose(again.data, fitted.data, atol=1e-3)


def test_interpolation_that_is_impossible(eeglab, hydrocel, written):
    raw = read_recording(written("biosemi17.bdf").path).rename_channels({f"A{i}": f"B{i}" for i in range(1, 17)})
    with pytest.raises(RecordingError, match="Only 0 good EEG channels of the recording have a position"):
        fit_recording(raw, hydrocel, interpolate=True)
    with pytest.raises(RecordingError, match="no channel positions to interpolate to"):
        fit_recording(eeglab, hydrocel.replace(positions=None), interpolate=True)
    flat = tuple((x / 10, y / 10, z / 10) for x, y, z in hydrocel.positions)
    with pytest.raises(RecordingError, match="sphere of 9 mm, which is no head"):
        fit_recording(eeglab, hydrocel.replace(positions=flat), interpolate=True)


# ---------------------------------------------------------------- fitting: signals


def sinc_sum(x, sfreq_in, sfreq_out, first, last):
    """Return samples `first` to `last` at `sfreq_out` of a signal that is band-limited, by Whittaker's formula in float64."""
    at = np.arange(first, last)[:, None] / sfreq_out * sfreq_in - np.arange(x.shape[1])
    return x @ (np.sinc(at) * np.cos(np.pi * at / (2 * x.shape[1])) ** 2).T


def test_filter_and_reference_equal_mne_and_resampling_a_sum_of_sincs_by_hand(eeglab):
    raw = eeglab.copy().crop(0, 60)
    spec = make_spec(raw.ch_names, preprocessing=Preprocessing(h_freq=34.0))  # nothing is left from 45 Hz on
    fitted = fit_recording(raw, spec)
    data = mne.filter.filter_data(raw.get_data(), 128.0, 0.5, 34.0, phase="zero", verbose="error")
    data = make_raw(sinc_sum(data, 128.0, 100.0, 1000, 5000), raw.ch_names)
    data.set_eeg_reference("average", projection=False, verbose="error")
    np.testing.assert_allclose(fitted.data[:, 1000:5000], data.get_data() * 1e6, rtol=0, atol=0.02)
    assert fitted.data.shape == (32, 6001)
    assert np.abs(fitted.data.mean(axis=0)).max() < 1e-4
    assert fitted.steps == (
        "band-passed 0.5 to 34 Hz, zero-phase FIR",
        "resampled from 128 to 100 Hz",
        "re-referenced to the average of 32 channels",
        "scaled to uV",
    )


def test_without_resampling_filter_and_reference_equal_mne_to_the_last_bit_of_float32(eeglab):
    fitted = fit_recording(eeglab, make_spec(eeglab.ch_names, sfreq=128.0, preprocessing=Preprocessing()))
    raw = eeglab.copy().filter(0.5, 40.0, phase="zero", verbose="error")
    raw.set_eeg_reference("average", projection=False, verbose="error")
    np.testing.assert_allclose(fitted.data, raw.get_data() * 1e6, rtol=2e-7, atol=1e-6)


def test_the_band_pass_passes_the_band_without_delay():
    t = np.arange(3000) / 200
    inside, outside = np.sin(2 * np.pi * 10 * t), np.sin(2 * np.pi * 80 * t)
    raw = make_raw(1e-5 * np.array([inside, inside + outside + 50]), ["Cz", "Pz"], 200.0)
    band = Preprocessing(reference="none", l_freq=0.5, h_freq=40.0)
    data = fit_recording(raw, make_spec(["Cz", "Pz"], preprocessing=band)).data[:, 400:-400]
    np.testing.assert_allclose(data, np.tile(10 * inside[::2][400:-400], (2, 1)), atol=0.05)


def test_resampling_equals_scipys_fourier_resampling_away_from_the_edges(eeglab):
    """Of half the samples exactly, whose band ends below 28.8 Hz: there the Fourier method is exact in time too."""
    band = Preprocessing(reference="none", l_freq=0.5, h_freq=20.0)
    fitted = fit_recording(eeglab, make_spec(["Cz"], sfreq=64.0, preprocessing=band))
    data = mne.filter.filter_data(eeglab.get_data(picks="Cz"), 128.0, 0.5, 20.0, phase="zero", verbose="error")
    oracle = scipy.signal.resample(data[0], 15252) * 1e6
    np.testing.assert_allclose(fitted.data[0, 100:-100], oracle[100:-100], rtol=0, atol=0.02)


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1e6), ("mV", 1e3), ("V", 1.0)])
def test_the_result_is_in_the_models_unit(unit, factor):
    volts = noise(2, 400)
    fitted = fit_recording(make_raw(volts, ["Cz", "Pz"]), make_spec(["Cz", "Pz"], unit=unit))
    np.testing.assert_allclose(fitted.data, volts * factor, rtol=1e-6)


@pytest.mark.parametrize("rms", [10.0, 1e-11])
def test_samples_in_another_unit_are_noticed(rms):
    raw = make_raw(noise(3, 400, rms), ["Cz", "Pz", "Oz"])
    with pytest.raises(RecordingError, match=r"another unit's.*`--unit`"):
        fit_recording(raw, make_spec(raw.ch_names))


def test_one_channel_has_no_average_reference():
    raw = make_raw(noise(1, 400), ["Cz"])
    assert fit_recording(raw, make_spec(["Cz"])).data.std() > 0
    average = make_spec(["Cz"], preprocessing=Preprocessing(reference="average", l_freq=None, h_freq=None))
    with pytest.raises(RecordingError, match="Nothing is left of one channel .*`--reference none`"):
        fit_recording(raw, average)


def test_an_offset_or_one_dead_channel_is_no_other_unit():
    volts = noise(3, 400) + 0.02
    volts[0] = 0
    assert fit_recording(make_raw(volts, ["Cz", "Pz", "Oz"]), make_spec(["Cz", "Pz", "Oz"])).data.shape == (3, 400)


def test_too_short_or_too_slow():
    with pytest.raises(RecordingError, match=r"lasts 1.99 s, one window of the model 2 s"):
        fit_recording(make_raw(noise(1, 199), ["Cz"]), make_spec(["Cz"]))
    with pytest.raises(RecordingError, match=r"sampled at 64 Hz, the model at 100 Hz.*upsampling"):
        fit_recording(make_raw(noise(1, 640), ["Cz"], 64.0), make_spec(["Cz"]))
    raw = make_raw(noise(1, 400), ["Cz"])
    with pytest.raises(RecordingError, match=r"The filter for 0.5 to 40 Hz lasts 6.61 s, the recording 4 s"):
        fit_recording(raw, make_spec(["Cz"], preprocessing=Preprocessing()))
    assert fit_recording(make_raw(noise(1, 200), ["Cz"]), make_spec(["Cz"])).data.shape == (1, 200)


def test_129_channels_of_one_second(recorded):
    raw = read_recording(recorded("test_raw_chanloc_fids.set"))
    spec = make_spec([f"e{i}" for i in range(129, 0, -1)], sfreq=152.0, n_times=152, preprocessing=UNTOUCHED)
    fitted = fit_recording(raw, spec)
    assert fitted.data.shape == (129, 153)  # 0 to 1.000 s: the last of the 501 samples is one of these too
    offsets = raw.get_data().mean(axis=1)[::-1] * 1e6
    np.testing.assert_allclose(fitted.data.mean(axis=1), offsets, atol=0.05 * np.abs(offsets).max())


# ---------------------------------------------------------------- windows


@given(n_chans=st.integers(1, 3), n_samples=st.integers(1, 60), n_times=st.integers(1, 60), hop=st.integers(1, 70))
def test_windows_equal_a_loop(n_chans, n_samples, n_times, hop):
    data = np.arange(n_chans * n_samples, dtype=np.float32).reshape(n_chans, n_samples)
    naive, start = [], 0
    while start + n_times <= n_samples:
        naive.append(data[:, start : start + n_times])
        start += hop
    if not naive:
        with pytest.raises(InputError, match=f"{n_samples} samples hold no window of {n_times}"):
            windows(data, n_times, hop)
        return
    cut = windows(data, n_times, hop)
    np.testing.assert_array_equal(cut, np.stack(naive))
    np.testing.assert_array_equal(window_starts(n_samples, n_times, hop), hop * np.arange(len(naive)))
    assert np.shares_memory(cut, data)
    assert not cut.flags.writeable


@pytest.mark.parametrize(("n_times", "hop"), [(0, 1), (5, 0), (5, -1)])
def test_windows_of_nothing(n_times, hop):
    with pytest.raises(InputError, match="Use 1 sample or more"):
        windows(np.zeros((1, 10)), n_times, hop)
