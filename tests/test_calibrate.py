"""A person's calibration: what is lost on planted people comes back, and what is written is a bundle that a decoder takes."""

import json

import numpy as np
import pytest
import torch
from people import CLASSES, SHIFT, labels, recording, spec_of
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.prepared import prepare
from sjepa_deploy.eeg.steps import Alignment, BandPass, Channels, Resample, RunningAlignment
from sjepa_deploy.errors import DataError, SpecError
from sjepa_deploy.learning.calibrate import (
    CalibrationConfig,
    aligned,
    before_alignment,
    calibrate,
    features_of,
    last_layer_of,
    with_last_layer,
)
from sjepa_deploy.learning.metrics import balanced_accuracy
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint
from sjepa_deploy.models.networks import build_model, last_linear
from sjepa_deploy.runtime.predictor import load


@pytest.fixture(scope="module")
def bundle(people_bundle):
    return people_bundle


@pytest.fixture(scope="module")
def model(bundle):
    return load_model(read_checkpoint(bundle.checkpoint), bundle.spec)


def run(*arguments):
    return run_command(_command("calibrate"), "sjepa-calibrate", [str(argument) for argument in arguments])


def judged(model, prepared):
    with torch.inference_mode():
        return balanced_accuracy(labels(prepared), model(torch.from_numpy(prepared.eeg)).numpy())


@pytest.mark.parametrize("method", ["closed-form", "fine-tune"])
def test_40_trials_bring_back_what_another_person_loses(model, method):
    known = judged(model, prepare(recording(1, 100), model.spec.signal))
    trials = prepare(recording(2, 40, SHIFT), model.spec.signal)
    other = prepare(recording(3, 100, SHIFT), model.spec.signal)
    before = judged(model, other)
    assert known > 0.9
    assert known - before > 0.3
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    calibrated, result = calibrate(model, trials.eeg, labels(trials), CalibrationConfig(method=method, lr=2e-3))
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert judged(calibrated, other) - before > (0.9 if method == "closed-form" else 0.5) * (known - before)
    assert result.curve[0].n_trials == 0
    assert result.curve[0].scores["balanced_accuracy"].value == pytest.approx(judged(model, trials))
    assert result.curve[-1].n_trials == 32
    assert result.gain > 0.3
    if method == "closed-form":
        frozen = [name for name in state if not name.startswith("final_layer")]
        assert all(torch.equal(calibrated.state_dict()[name], state[name]) for name in frozen)
        oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
        oracle.fit(features_of(model, trials.eeg).astype(np.float64), labels(trials))
        with torch.inference_mode():
            logits = calibrated(torch.from_numpy(other.eeg)).double().numpy()
        expected = oracle.decision_function(features_of(model, other.eeg).astype(np.float64))
        np.testing.assert_allclose(logits[:, 1] - logits[:, 0], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
def test_features_and_the_last_layer_make_the_outputs(variant):
    model = build_model(spec_of(variant), seed=3).eval()
    eeg = np.random.default_rng(0).normal(0, 10, (70, *model.spec.input_shape)).astype(np.float32)
    with torch.inference_mode():
        outputs = model(torch.from_numpy(eeg)).numpy()
    np.testing.assert_allclose(last_layer_of(model)(features_of(model, eeg)), outputs, atol=1e-4)
    same = with_last_layer(model, last_layer_of(model))
    assert all(torch.equal(weight, same.state_dict()[name]) for name, weight in model.state_dict().items())


def test_numbers_are_calibrated(model):
    """The layer before is random: it is of no use, and must do no harm."""
    numbers = build_model(spec_of(n_outputs=1, class_names=None), seed=0)
    numbers.load_state_dict({k: v for k, v in model.state_dict().items() if "final" not in k}, strict=False)
    trials = prepare(recording(2, 60, SHIFT), model.spec.signal)
    truth = 0.5 + 0.1 * labels(trials) + np.random.default_rng(0).normal(0, 0.01, 60)
    calibrated, result = calibrate(numbers.eval(), trials.eeg, truth)
    assert result.metric == "r2"
    assert result.curve[-1].scores["r2"].value > 0.5
    other = prepare(recording(3, 60, SHIFT), model.spec.signal)
    with torch.inference_mode():
        found = calibrated(torch.from_numpy(other.eeg))[:, 0].numpy()
    assert np.corrcoef(found, labels(other))[0, 1] > 0.7


def test_the_command_writes_a_bundle_of_the_same_contract_that_decodes_better(model, bundle, tmp_path, capsys):
    session, other = tmp_path / "session_raw.fif", recording(3, 60, SHIFT)
    recording(2, 60, SHIFT).save(session, verbose="error")
    assert run(bundle.path, "--data", session, "--trials", 40, "--out", tmp_path / "mine", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["calibration"]["n_trials"] == 40
    mine = Bundle.open(tmp_path / "mine")
    assert mine.spec == bundle.spec
    assert mine.precisions == bundle.precisions
    assert [graph.max_batch for graph in mine.manifest.graphs] == [8]
    assert all(result.passed for result in mine.manifest.parity)
    assert "40 trials of session_raw.fif" in mine.manifest.weights.notes[-1]
    prepared = prepare(other, model.spec.signal)
    scored = []
    for each in (bundle, mine):
        with load(each) as predict:
            scored.append(balanced_accuracy(labels(prepared), predict.predict(prepared.eeg)))
    assert scored[1] - scored[0] > 0.3

    assert run(bundle.path, "--data", session, "--out", tmp_path / "mine") == 2  # it is there already
    swapped = recording(2, 60, SHIFT)
    swapped.annotations.description[:] = np.random.default_rng(0).permutation(swapped.annotations.description)
    swapped.save(session, overwrite=True, verbose="error")
    assert run(tmp_path / "mine", "--data", session, "--out", tmp_path / "worse") == 1
    assert "no better" in capsys.readouterr().err
    assert not (tmp_path / "worse").exists()


def test_alignment_is_that_of_the_person():
    """The oracle is the covariance: aligned windows have the identity, whatever mixes the channels of a person."""
    steps = (BandPass(l_freq=0.5, h_freq=40.0), Resample(), Channels(), RunningAlignment())
    signal = spec_of(steps=steps).signal
    raw = recording(5, 30)
    raw._data = np.random.default_rng(1).normal(size=(8, 8)) @ raw._data
    before = prepare(raw, before_alignment(signal))
    mine = aligned(signal, before.eeg)
    assert isinstance(mine.steps[-1], Alignment)
    after = prepare(raw, mine)
    covariance = np.mean([window @ window.T for window in after.eeg.astype(np.float64)], axis=0) / signal.n_times
    np.testing.assert_allclose(covariance, np.eye(8), atol=1e-3)
    with pytest.raises(SpecError, match="aligned"):
        before_alignment(spec_of().signal)


def another(raw, fault):
    if fault == "other channels":
        return raw.rename_channels({"C3": "X1"})
    if fault == "other classes":
        raw.annotations.description[:] = np.char.replace(raw.annotations.description, "left", "up")
    if fault == "one class":
        raw.annotations.description[:] = "left"
    return raw


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("a base model", "no last layer"),
        ("other channels", "C3"),
        ("other classes", "up"),
        ("one class", "too few trials"),
        ("not aligned", "did not learn from aligned"),
    ],
)
def test_a_bundle_of_another_contract_is_refused(bundle, make_bundle, tmp_path, capsys, fault, why):
    bad = make_bundle("base") if fault == "a base model" else bundle
    another(recording(2, 20), fault).save(tmp_path / "session_raw.fif", verbose="error")
    more = ["--align"] if fault == "not aligned" else ["--events", "all"]
    assert run(bad.path, "--data", tmp_path / "session_raw.fif", "--out", tmp_path / "mine", *more) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("fault", ["nan", "another length", "three trials"])
def test_bad_trials_are_refused(model, fault):
    eeg = np.random.default_rng(0).normal(0, 10, (20, 8, 160)).astype(np.float32)
    targets = np.arange(20) % 2
    if fault == "nan":
        eeg[3, 2, 1] = np.nan
    elif fault == "another length":
        eeg = eeg[:, :, :150]
    else:
        eeg, targets = eeg[:3], targets[:3]
    with pytest.raises(DataError) as error:
        calibrate(model, eeg, targets)
    assert error.value.mend
    assert model.spec.class_names == CLASSES
    assert last_linear(model).out_features == 2
