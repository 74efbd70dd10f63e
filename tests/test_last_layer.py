"""The closed form of the last layer, beside scikit-learn in float64."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from sjepa_deploy.errors import DataError
from sjepa_deploy.last_layer import ALPHAS, LastLayer, fit_classes, fit_numbers


def trials(seed, n, n_features, n_classes=2):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % n_classes)
    mix = rng.normal(size=(n_features, n_features)) * rng.uniform(0.1, 10, n_features)
    return (rng.normal(size=(n, n_features)) + rng.normal(size=(n_classes, n_features))[labels]) @ mix + 5, labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(12, 60), n_features=st.integers(2, 90), n_classes=st.integers(2, 4))
def test_classes_are_those_of_scikit_learn(seed, n, n_features, n_classes):
    features, labels = trials(seed, n, n_features, n_classes)
    layer = fit_classes(features, labels, n_classes)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=np.full(n_classes, 1 / n_classes))
    oracle.fit(features, labels)
    new = np.concatenate([features, trials(seed + 1, 20, n_features, n_classes)[0]])
    exp = np.exp(layer(new) - layer(new).max(axis=1, keepdims=True))
    np.testing.assert_allclose(exp / exp.sum(axis=1, keepdims=True), oracle.predict_proba(new), atol=1e-6)
    if n_classes == 2:
        single = fit_classes(features, labels, 2, n_outputs=1)
        expected = oracle.decision_function(new)
        np.testing.assert_allclose(single(new)[:, 0], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(5, 60), n_features=st.integers(2, 90))
def test_numbers_are_those_of_scikit_learn_from_the_layer_before_or_from_nothing(seed, n, n_features):
    features, _ = trials(seed, n, n_features, 1)
    rng = np.random.default_rng(seed)
    before = LastLayer(weight=rng.normal(size=(1, n_features)), bias=rng.normal(size=1))
    targets = features @ rng.normal(size=n_features) + rng.normal(size=n)
    layer = fit_numbers(features, targets, before)
    standard = StandardScaler().fit(features)
    expected, best = None, -np.inf
    for known in (before(features)[:, 0], np.zeros(n)):
        oracle = RidgeCV(alphas=np.array(ALPHAS) * n_features).fit(standard.transform(features), targets - known)
        if oracle.best_score_ > best:
            expected, best = oracle.predict(standard.transform(features)) + known, oracle.best_score_
    np.testing.assert_allclose(layer(features)[:, 0], expected, rtol=1e-6, atol=1e-6 * np.ptp(expected))


def test_a_constant_feature_changes_nothing():
    features, labels = trials(0, 30, 8)
    wider = np.column_stack([features, np.full(30, 3.0)])
    np.testing.assert_allclose(
        np.diff(fit_classes(wider, labels, 2)(wider)), np.diff(fit_classes(features, labels, 2)(features)), rtol=0.2
    )
    assert np.isfinite(fit_numbers(wider, labels)(wider)).all()


FEATURES, LABELS = trials(0, 30, 8)


@pytest.mark.parametrize(
    ("fit", "why"),
    [
        (lambda: fit_classes(FEATURES[:4], np.array([0, 0, 0, 1]), 2), "3, 1"),
        (lambda: fit_classes(np.where(FEATURES[3, 3] == FEATURES, np.nan, FEATURES), LABELS, 2), "NaN"),
        (lambda: fit_classes(np.ones((30, 8)), LABELS, 2), "do not differ"),
        (lambda: fit_numbers(FEATURES[:2], LABELS[:2]), "2 trials"),
        (lambda: fit_numbers(FEATURES, np.full(30, np.nan)), "NaN"),
    ],
)
def test_trials_that_tell_nothing_are_refused(fit, why):
    with pytest.raises(DataError, match=why):
        fit()


@pytest.mark.alone
def test_an_update_of_40_trials_takes_under_5_ms():
    features, labels = trials(0, 40, 256)  # of a model with 4 spatial filters and one time token
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        fit_classes(features, labels, 2)
        taken.append(time.perf_counter() - start)
    assert np.median(taken) < 5e-3
