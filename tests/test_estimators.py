"""The estimators pass scikit-learn's own checks, and work in its pipelines and searches; the model is the one that exports."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from people import ENCODER, labels, recording, spec_of
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks
from skorch.helper import SliceDataset

from sjepa_deploy.eeg.prepared import prepare
from sjepa_deploy.learning.estimators import SJEPAClassifier, SJEPARegressor
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint, write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.models.resolve import resolve_spec
from sjepa_deploy.spec import EncoderSpec

TINY = {"encoder": EncoderSpec(conv_layers=((2, 2, 1),), n_layers=1, n_heads=1, spat_dim=0, time_dim=2), "n_spat_filters": 1}


@parametrize_with_checks([SJEPAClassifier(max_epochs=2, **TINY), SJEPARegressor(max_epochs=2, **TINY)])
def test_checks_of_scikit_learn(estimator, check, monkeypatch):
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")  # without it the check of array libraries is skipped
    check(estimator)


@pytest.fixture(scope="module")
def windows():
    prepared = prepare(recording(0, 80), spec_of().signal)
    return prepared.eeg, np.array(["left", "right"])[labels(prepared)]


def small(**changes):
    return SJEPAClassifier(**{"encoder": ENCODER, "max_epochs": 20, "lr": 3e-3, "random_state": 0} | changes)


def test_pipelines_cross_validation_and_searches(windows):
    eeg, classes = windows
    scored = cross_val_score(make_pipeline(FunctionTransformer(np.float32), small()), eeg, classes, cv=2)
    assert scored.mean() > 0.7
    search = GridSearchCV(small(max_epochs=4), {"variant": ["prelocal", "postlocal"], "lr": [1e-6, 3e-3]}, cv=2)
    search.fit(eeg, classes)
    assert search.best_params_["lr"] == 3e-3
    assert search.predict_proba(eeg).shape == (80, 2)


def test_datasets_of_skorch_and_braindecode_are_taken(windows):
    eeg, classes = windows
    pairs = [(window, int(name == "right")) for window, name in zip(eeg, classes, strict=True)]
    taken = small(max_epochs=2).fit(SliceDataset(pairs, idx=0), np.array([pair[1] for pair in pairs]))
    assert taken.predict(SliceDataset(pairs, idx=0)).shape == (80,)


def test_a_fitted_model_is_what_it_writes_and_pickles(windows, tmp_path):
    eeg, classes = windows
    fitted = small(signal=spec_of().signal, max_epochs=3).fit(eeg, classes)
    expected = fitted.predict_proba(eeg)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(eeg), expected)
    fitted.write(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    spec, assumed = resolve_spec({}, checkpoint)
    assert (spec.class_names, spec.signal, assumed) == (("left", "right"), spec_of().signal, ())
    with torch.inference_mode():
        logits = load_model(checkpoint, spec)(torch.from_numpy(eeg))
    np.testing.assert_allclose(logits.softmax(dim=1).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(fitted.decision_function(eeg), (logits[:, 1] - logits[:, 0]).numpy(), atol=1e-4)
    np.testing.assert_array_equal(clone(fitted).fit(eeg, classes).predict_proba(eeg), expected)


def test_a_frozen_encoder_is_that_of_the_base_model(windows, tmp_path):
    eeg, classes = windows
    base = spec_of("base", n_outputs=1, class_names=None)
    write_checkpoint(build_model(base, seed=7), tmp_path)
    settings = {"variant": "contextual", "signal": base.signal, "encoder": None, "pretrained": str(tmp_path), "max_epochs": 2}
    fitted = small(freeze_encoder=True, **settings).fit(eeg, classes)
    known, now = read_checkpoint(tmp_path).weights, fitted.model_.state_dict()
    assert all(torch.equal(now[name], weight) for name, weight in known.items())
    tuned = small(warmup_epochs=1, **settings).fit(eeg, classes).model_.state_dict()
    assert not torch.equal(tuned["feature_encoder.1.0.weight"], known["feature_encoder.1.0.weight"])


def test_a_regression_answers_in_the_unit_of_its_target(windows):
    eeg, classes = windows
    target = 300 + 50 * (classes == "right")
    fitted = SJEPARegressor(encoder=ENCODER, max_epochs=20, lr=3e-3, random_state=0).fit(eeg, target)
    assert fitted.score(eeg, target) > 0.3
    assert 250 < fitted.predict(eeg).mean() < 400


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda eeg, y: (np.where(np.arange(160) == 3, np.nan, eeg), y), "NaN"),
        (lambda eeg, y: (eeg, np.full(80, "left")), "one class"),
        (lambda eeg, y: (eeg[None], y[:1]), "shape"),
        (lambda eeg, y: (eeg[:, :5], y), "the signal says"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(windows, change, why):
    with pytest.raises(ValueError, match=why):
        small(signal=spec_of().signal).fit(*change(*windows))


def test_other_windows_than_those_of_fit_are_refused(windows):
    fitted = small(max_epochs=1).fit(*windows)
    with pytest.raises(ValueError, match="those of fit"):
        fitted.predict(windows[0][:, :, :100])


def test_the_example_of_the_page_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "estimators.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/estimators.md", "exec"), {})
    assert "lr" in capsys.readouterr().out
