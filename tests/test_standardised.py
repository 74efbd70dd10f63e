"""Bundles whose steps leave the unit: parity is judged on what the model gets, and so are windows that are handed over."""

import numpy as np
import pytest
from bundles import MONTAGE, export_small, small_spec
from scipy.stats import zscore

import sjepa_deploy
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.steps import (
    BandPass,
    Channels,
    ExponentialStandardise,
    Reference,
    Resample,
    RunningAlignment,
    Scale,
    ZScore,
)
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import InputError
from sjepa_deploy.export.to_bundle import through_steps

BEFORE = (BandPass(), Resample(), Channels(), Reference())
STEPS = {
    "z-score": (*BEFORE, ZScore()),
    "exponential": (*BEFORE, ExponentialStandardise()),
    "alignment": (*BEFORE, RunningAlignment()),
    "mastoids, then z-score": (BandPass(), Resample(), Reference(channels=("M1", "M2")), Channels(), ZScore()),
}
MICROVOLTS = eeg_windows(4, 8, 200, 100.0, np.random.default_rng(3))


@pytest.fixture(scope="module", params=STEPS)
def bundle(request, tmp_path_factory):
    spec = small_spec(steps=STEPS[request.param], phase="causal")
    return export_small(tmp_path_factory.mktemp("standardised") / "bundle", spec)


def test_parity_is_judged_on_windows_as_the_model_gets_them(bundle):
    reference = bundle.reference()
    eeg = reference.inputs[[kind.startswith("eeg") for kind in reference.kinds]]
    rms = np.sqrt((eeg.astype(float) ** 2).mean(axis=(1, 2)))
    assert ((rms > 0.2) & (rms < 3)).all(), rms
    nan = np.isnan(reference.inputs).any(axis=(1, 2))
    assert [kind for kind, is_nan in zip(reference.kinds, nan, strict=True) if is_nan] == ["one NaN"]


def test_standardised_windows_pass_and_microvolts_are_refused(bundle):
    standardised = zscore(MICROVOLTS, axis=-1).astype(np.float32)
    with sjepa_deploy.load(bundle) as predict:
        assert np.isfinite(predict.predict(standardised)).all()
        assert np.isfinite(predict(np.zeros_like(standardised[:1]))).all()  # flat, whatever the unit
        for wrong in (MICROVOLTS, MICROVOLTS * 1e-6):
            with pytest.raises(InputError, match="after the steps of this model.*prepare"):
                predict.predict(wrong)
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        assert np.isfinite(predict.predict(MICROVOLTS)).all()


def test_without_such_steps_it_is_the_other_way_round(tmp_path):
    in_unit = export_small(tmp_path / "bundle", small_spec(unit="V"))
    volts = MICROVOLTS * np.float32(1e-6)
    with sjepa_deploy.load(in_unit) as predict:
        assert np.isfinite(predict.predict(volts)).all()
        with pytest.raises(InputError, match="no EEG has"):
            predict.predict(MICROVOLTS * 1e6)


def test_windows_go_through_the_steps_as_scipy_says():
    signal = small_spec(steps=(Resample(), Channels(), Scale(factors=(0.5,)), ZScore())).signal
    np.testing.assert_allclose(through_steps(signal, MICROVOLTS), zscore(MICROVOLTS.astype(float), axis=-1), atol=1e-4)
    scaled = signal.replace(steps=(Resample(), Channels(), Scale(factors=(0.5,))))
    np.testing.assert_allclose(through_steps(scaled, MICROVOLTS), MICROVOLTS / 2, rtol=1e-5, atol=1e-5)


def test_parity_data_are_judged_after_the_steps(tmp_path, capsys):
    (tmp_path / "signal.yaml").write_text("steps: [{step: resample}, {step: channels}, {step: z-score}]\n")
    names = ",".join(MONTAGE.ch_names)
    flags = ["--variant", "prelocal", "--channels", names, "--signal", tmp_path / "signal.yaml", "--precision", "fp32"]
    flags += ["--max-batch", 2, "--out", tmp_path / "bundle", "--parity-data", tmp_path / "windows.npy"]
    for windows, want in ((MICROVOLTS, 2), (zscore(MICROVOLTS, axis=-1), 0)):
        np.save(tmp_path / "windows.npy", windows)
        assert run_command(_command("export"), "sjepa-export", list(map(str, flags))) == want
    assert "after the steps" in capsys.readouterr().err


def test_cut_windows_are_judged_before_the_steps(tmp_path, capsys):
    """sjepa-run takes windows in their unit through the steps: their amplitude is judged as it comes in."""
    bundle = export_small(tmp_path / "bundle", small_spec(steps=STEPS["z-score"], phase="causal"))
    np.save(tmp_path / "windows.npy", MICROVOLTS)
    for unit, want in (("uV", 0), ("V", 2)):
        flags = [bundle.path, tmp_path / "windows.npy", "--unit", unit]
        assert run_command(_command("run"), "sjepa-run", list(map(str, flags))) == want
    assert "is no EEG" in capsys.readouterr().err
