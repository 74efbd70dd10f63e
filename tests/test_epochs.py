"""Windows that others have cut are decoded as they are."""

import mne
import numpy as np
import pytest
from bundles import small_spec
from edf_files import eeg

from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.epochs import holds_windows, read_windows
from sjepa_deploy.errors import RecordingError

SPEC = small_spec().signal


def epochs_of(sfreq=100.0, n=6, tmin=-0.2, tmax=2.4):
    names = [*SPEC.ch_names[::-1], "EOG1"]
    raw = mne.io.RawArray(eeg(len(names), round(40 * sfreq)) * 1e-6, mne.create_info(names, sfreq, "eeg"), verbose="error")
    raw.filter(None, 30.0, verbose="error")
    events = np.array([[round((2 + 5 * k) * sfreq), 0, 1] for k in range(n)])
    return mne.Epochs(raw, events, tmin=tmin, tmax=tmax, baseline=None, preload=True, verbose="error")


def test_epochs_are_windows_of_the_models_channels_in_their_order(tmp_path):
    epochs = epochs_of()
    path = tmp_path / "a-epo.fif"
    epochs.save(path, verbose="error")
    assert holds_windows(path)
    cut = read_windows(path, SPEC)
    data = epochs.get_data(picks=list(SPEC.ch_names))[:, :, :200] * 1e6
    np.testing.assert_allclose(cut.eeg, data - data.mean(axis=1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(cut.times, 5 * np.arange(6) - 0.2 + 1.99, atol=1e-9)
    late = read_windows(path, SPEC, tmin=0.1)
    shifted = epochs.get_data(picks=list(SPEC.ch_names))[:, :, 30:230] * 1e6
    np.testing.assert_allclose(late.eeg, shifted - shifted.mean(axis=1, keepdims=True), atol=1e-4)
    with pytest.raises(RecordingError, match="last from -0.2 to 2.4 s and hold no window of 200 samples from 0.5 s"):
        read_windows(path, SPEC, tmin=0.5)
    epochs.drop_channels(SPEC.ch_names[:1]).save(path, overwrite=True, verbose="error")
    with pytest.raises(RecordingError, match=f"lacks, or marks as bad, the channels {SPEC.ch_names[0]}; it has .*EOG1"):
        read_windows(path, SPEC)


def test_epochs_at_a_higher_rate_are_resampled_in_place(tmp_path):
    sfreq = 250.0
    t = np.arange(round(40 * sfreq)) / sfreq
    wave = 1e-5 * np.sin(2 * np.pi * 6 * t)
    data = wave * np.linspace(-1, 1, SPEC.n_chans)[:, None]
    raw = mne.io.RawArray(data, mne.create_info(list(SPEC.ch_names), sfreq, "eeg"), verbose="error")
    events = np.array([[round((3 + 5 * k) * sfreq), 0, 1] for k in range(5)])
    epochs = mne.Epochs(raw, events, tmin=-0.5, tmax=2.5, baseline=None, preload=True, verbose="error")
    epochs.save(tmp_path / "a-epo.fif", verbose="error")
    cut = read_windows(tmp_path / "a-epo.fif", SPEC, tmin=0.0)
    at = 3 + 5 * np.arange(5)[:, None] + np.arange(200) / 100
    truth = 10 * np.sin(2 * np.pi * 6 * at)[:, None] * np.linspace(-1, 1, SPEC.n_chans)[:, None]
    np.testing.assert_allclose(cut.eeg[:, :, 20:-20], (truth - truth.mean(axis=1, keepdims=True))[:, :, 20:-20], atol=0.02)


def test_arrays_of_windows(tmp_path, make_bundle, capsys):
    windows = eeg(5 * SPEC.n_chans, 200).reshape(5, SPEC.n_chans, 200)
    np.save(tmp_path / "w.npy", windows * 1e-3)
    assert holds_windows(tmp_path / "w.npy")
    cut = read_windows(tmp_path / "w.npy", SPEC, unit="mV")
    np.testing.assert_allclose(cut.eeg, windows - windows.mean(axis=1, keepdims=True), atol=1e-4)
    bundle = make_bundle("prelocal")
    assert run_command(_command("run"), "sjepa-run", [str(bundle.path), str(tmp_path / "w.npy"), "--unit", "mV"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 5
    hop = [str(bundle.path), str(tmp_path / "w.npy"), "--unit", "mV", "--hop", "1"]
    assert run_command(_command("run"), "sjepa-run", hop) == 2
    with pytest.raises(RecordingError, match="does not state its unit"):
        read_windows(tmp_path / "w.npy", SPEC)
    np.save(tmp_path / "w.npy", windows[:, :, :100])
    with pytest.raises(RecordingError, match=r"shape \(5, 8, 100\).*\(n_windows, 8, 200\)"):
        read_windows(tmp_path / "w.npy", SPEC, unit="uV")
    np.save(tmp_path / "w.npy", np.full((1, 8, 200), np.nan))
    with pytest.raises(RecordingError, match="not finite"):
        read_windows(tmp_path / "w.npy", SPEC, unit="uV")
    np.save(tmp_path / "c.npy", windows[0])
    assert not holds_windows(tmp_path / "c.npy")
