"""Decision layers: each step against an oracle, and what must hold for every stream."""

import dataclasses
import itertools
import json
import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.signal
import scipy.special
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from pyntbci.stopping import BayesStopping, CriterionStopping, DistributionStopping, MarginStopping, ValueStopping
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import log_loss

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.accumulate import NEW_TRIAL, NO_TRIAL, Accumulate
from sjepa_deploy.runtime.decisions.calibrate import (
    accuracy_thresholds,
    bayes_thresholds,
    bayes_thresholds_for,
    calibration_error,
    conformal_radius,
    fit_temperature,
)
from sjepa_deploy.runtime.decisions.description import LayerDescription
from sjepa_deploy.runtime.decisions.interval import Interval
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.pauses import Dwell, Refractory
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.signal import Signal
from sjepa_deploy.runtime.decisions.smoothing import Exponential, MeanOf
from sjepa_deploy.runtime.decisions.state import STATES
from sjepa_deploy.runtime.decisions.steps import STEPS
from sjepa_deploy.runtime.decisions.threshold import Threshold

CLASSES = ("left", "right", "rest")


def described(*steps, class_names=CLASSES, n_outputs=None, **facts):
    n_outputs = n_outputs or len(class_names or ("number",))
    known = {"name": "default", "bundle": "digest", "output_name": "prediction"}
    return LayerDescription(steps=steps, class_names=class_names, n_outputs=n_outputs, **known | facts)


def layer_of(*steps, **facts):
    return DecisionLayer(described(*steps, **facts))


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, np.float64))


def planted(n, *, sharp=1.0, overconfident=2.0, n_classes=3, seed=0, prevalence=None):
    """Return outputs and labels whose posterior is known: Gaussian scores, of which the true class's are `sharp` larger."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_classes, n, p=prevalence)
    scores = rng.normal(size=(n, n_classes))
    scores[np.arange(n), labels] += sharp
    return overconfident * sharp * scores, labels


# ---------------------------------------------------------------- probabilities


def test_probabilities_are_scipys_softmax_of_the_outputs_over_the_temperature():
    outputs = np.random.default_rng(0).normal(0, 5, (200, 3)).astype(np.float32)
    states = layer_of(Probabilities(temperature=1.7)).run(outputs, np.arange(200))
    assert np.array([state.probabilities for state in states]) == pytest.approx(
        scipy.special.softmax(outputs.astype(np.float64) / 1.7, axis=1), abs=1e-14
    )
    assert {state.name for state in states} == {"undecided"}


def test_one_output_of_two_classes_is_a_logit():
    outputs = np.linspace(-800, 800, 41)[:, None]
    layer = layer_of(Probabilities(temperature=2.0), class_names=("no", "yes"), n_outputs=1)
    found = np.array([state.probabilities for state in layer.run(outputs, np.arange(41))])
    assert found[:, 1] == pytest.approx(scipy.special.expit(outputs[:, 0] / 2), abs=1e-15)
    assert found.sum(axis=1) == pytest.approx(1)


def test_another_prevalence_is_bayes_rule():
    """Two Gaussian classes, drawn with other shares: the corrected posterior is the one of the new shares."""
    fitted, stated = (0.5, 0.5), (0.9, 0.1)
    x = np.linspace(-3, 3, 25)
    density = np.stack([scipy.stats.norm(-1).pdf(x), scipy.stats.norm(1).pdf(x)], axis=1)
    truth = density * stated / (density * stated).sum(axis=1, keepdims=True)
    step = Probabilities(fitted_prevalence=fitted, prevalence=stated)
    found = layer_of(step, class_names=("a", "b")).run(np.log(density * fitted), np.arange(25))
    assert np.array([state.probabilities for state in found]) == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_is_that_of_the_smallest_log_loss(seed):
    outputs, labels = planted(2000, overconfident=[0.3, 2.0, 5.0][seed], seed=seed)
    ours = fit_temperature(outputs, labels)
    theirs = scipy.optimize.minimize_scalar(
        lambda log_t: log_loss(labels, scipy.special.softmax(outputs / np.exp(log_t), axis=1)),
        bounds=(-5, 5),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert math.log(ours) == pytest.approx(theirs.x, abs=1e-6)


@pytest.mark.skipif(
    tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8), reason="scikit-learn calibrates by a temperature from 1.8 on"
)
def test_the_temperature_is_scikit_learns():
    outputs, labels = planted(1500, seed=7)
    calibrated = CalibratedClassifierCV(FrozenEstimator(Scores().fit(outputs, labels)), method="temperature", ensemble=False)
    calibrated.fit(outputs, labels)
    temperature = fit_temperature(outputs, labels)
    assert 1 / temperature == pytest.approx(calibrated.calibrated_classifiers_[0].calibrators[0].beta_, rel=1e-6)
    states = layer_of(Probabilities(temperature=temperature)).run(outputs, np.arange(1500))
    assert np.array([state.probabilities for state in states]) == pytest.approx(calibrated.predict_proba(outputs), abs=1e-7)


class Scores(ClassifierMixin, BaseEstimator):
    """A classifier whose input is its score, for a prefix of windows the sum of centred log-probabilities."""

    def fit(self, X, y):  # noqa: N803
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, X):  # noqa: N803
        if X.ndim == 2:
            return X
        sums = scipy.special.log_softmax(X, axis=1).sum(axis=2)
        return sums - sums.mean(axis=1, keepdims=True)

    def predict(self, X):  # noqa: N803
        return self.decision_function(X).argmax(axis=1)


def test_a_temperature_stays_in_its_range():
    """Outputs that are always right ask for zero, outputs that tell nothing or the opposite for infinity."""
    labels = np.arange(30) % 3
    assert fit_temperature(np.eye(3)[labels], labels) == 0.01
    assert fit_temperature(-np.eye(3)[labels], labels) == 100


def test_the_calibration_error_is_that_of_scikit_learns_quantile_bins():
    rng = np.random.default_rng(1)
    probability = rng.uniform(0.2, 1, 1500)
    right = rng.uniform(size=1500) < probability**2
    true, predicted = calibration_curve(right, probability, n_bins=15, strategy="quantile")
    assert calibration_error(probability, right) == pytest.approx(np.abs(true - predicted).mean(), abs=1e-12)
    assert calibration_error(probability[:10], right[:10]) == pytest.approx(np.abs(probability[:10] - right[:10]).mean())


# ---------------------------------------------------------------- regression


def test_the_conformal_radius_is_the_corrected_quantile():
    residuals = np.random.default_rng(0).normal(size=99)
    assert conformal_radius(residuals, 0.9) == np.quantile(np.abs(residuals), 90 / 99, method="inverted_cdf")
    assert conformal_radius(residuals, 0.99) == np.abs(residuals).max()
    with pytest.raises(DecisionError, match=r"99 targets are too few.*Use 199 or more"):
        conformal_radius(residuals, 0.995)


def test_intervals_hold_new_targets_as_often_as_stated():
    """Of many calibrations with 39 residuals each, the mean coverage is 36/40: without the correction it would be less."""
    rng = np.random.default_rng(0)
    radii = np.array([conformal_radius(rng.standard_t(3, 39), 0.9) for _ in range(4000)])
    coverage = (1 - 2 * scipy.stats.t(3).sf(radii)).mean()
    assert coverage == pytest.approx(36 / 40, abs=0.004)


def test_a_regression_has_a_value_and_an_interval():
    layer = layer_of(MeanOf(n_windows=2), Interval(radius=0.5, coverage=0.9), class_names=None)
    first, second = layer.run(np.array([[1.0], [2.0]]), [0.0, 0.1])
    assert (first.name, first.value, first.interval) == ("undecided", 1.0, None)
    assert (second.name, second.value, second.interval, second.class_name) == ("decided", 1.5, (1.0, 2.0), None)
    assert "1.5 [1, 2]" in str(second)


# ---------------------------------------------------------------- smoothing


def test_exponential_smoothing_is_a_recursive_filter_and_follows_the_times():
    p = np.random.default_rng(0).dirichlet([1, 1, 1], 50)
    found = [
        state.probabilities for state in layer_of(Probabilities(), Exponential(seconds=0.4)).run(logits_of(p), np.arange(50) / 10)
    ]
    keep = math.exp(-0.1 / 0.4)
    truth, _ = scipy.signal.lfilter([1 - keep], [1, -keep], p, axis=0, zi=keep * p[:1])
    assert np.array(found) == pytest.approx(truth, abs=1e-12)
    late = layer_of(Probabilities(), Exponential(seconds=0.4)).run(logits_of(p[:2]), [0.0, 0.8])
    assert late[1].probabilities == pytest.approx(math.exp(-2) * p[0] + (1 - math.exp(-2)) * p[1])


def test_a_mean_of_windows_waits_until_there_are_enough():
    p = np.random.default_rng(0).dirichlet([1, 1, 1], 12)
    states = layer_of(Probabilities(), MeanOf(n_windows=4), Threshold(enter=0.0)).run(logits_of(p), np.arange(12))
    assert [state.name for state in states] == ["undecided"] * 3 + ["decided"] * 9
    assert states[2].reason == "3 of 4 windows"
    assert np.array([state.probabilities for state in states[3:]]) == pytest.approx(
        np.lib.stride_tricks.sliding_window_view(p, 4, axis=0).mean(axis=2)
    )


# ---------------------------------------------------------------- threshold, dwell, refractory


def names_of(layer, probabilities, times=None, flags=None):
    p = np.asarray(probabilities, np.float64)
    p = np.stack([p, 1 - p], axis=1) if p.ndim == 1 else p
    with np.errstate(divide="ignore"):
        states = layer.run(np.maximum(np.log(p), -700), np.arange(len(p)) / 10 if times is None else times, flags)
    return [state.class_name or state.name for state in states]


def two(*steps, **facts):
    return layer_of(Probabilities(), *steps, class_names=("yes", "no"), **facts)


def test_hysteresis_keeps_a_class_until_it_falls_below_the_lower_threshold():
    layer = two(Threshold(enter=0.8, leave=0.6))
    found = names_of(layer, [0.7, 0.85, 0.65, 0.55, 0.7, 0.85, 0.1, 0.35, 0.5, 0.81])
    u = "undecided"
    assert found == [u, "yes", "yes", u, u, "yes", "no", "no", u, "yes"]


def test_a_reject_option_says_so():
    layer = two(Threshold(enter=0.8, below="rejected"))
    state = layer.step(logits_of([0.7, 0.3]), 0.0)
    assert (state.name, state.class_name, state.probability) == ("rejected", None, pytest.approx(0.7))
    assert state.reason == "probability is below the threshold"


def test_a_class_counts_after_its_dwell_time():
    layer = two(Threshold(enter=0.8), Dwell(seconds=0.2))
    assert (
        names_of(layer, [0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1])
        == ["undecided"] * 2
        + ["yes"] * 2
        + [
            "undecided",
            "undecided",
            "no",
        ]
        + ["undecided"] * 3
    )


def test_nothing_is_decided_in_the_refractory_time_and_everything_begins_anew():
    layer = two(Refractory(seconds=0.3), Threshold(enter=0.8, leave=0.5), Dwell(seconds=0.1))
    found = names_of(layer, [0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.9])
    r, u = "refractory", "undecided"
    assert found == [u, "yes", r, r, u, "yes", r, r]


def test_a_window_without_signal_breaks_dwell_and_not_the_refractory_time():
    layer = two(Refractory(seconds=0.5), Threshold(enter=0.8), Dwell(seconds=0.1), signal=Signal(max_gap=0.15))
    held = [(), (), ("held",), (), ("bad channels", "late"), (), (), (), ()]
    found = names_of(layer, [0.9] * 9, flags=held)
    r, n = "refractory", "no signal"
    assert found == ["undecided", "yes", n, r, n, r, "undecided", "yes", r]
    state = layer.step(None, 1.0)
    assert (state.name, state.reason, state.probability, state.probabilities) == (n, "the window was lost", None, ())
    assert layer.step(logits_of([0.9, 0.1]), 1.1, ("held", "bad channels")).reason == "bad channels, held"


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_no_signal(broken):
    layer = two(Exponential(seconds=1.0), Threshold(enter=0.5))
    assert layer.step(np.array([broken, 0.0]), 0.0).reason == "the outputs are not finite"
    clean = two(Exponential(seconds=1.0), Threshold(enter=0.5)).step(np.array([1.0, 0.0]), 0.1)
    assert layer.step(np.array([1.0, 0.0]), 0.1) == clean


def test_a_pause_forgets_evidence_and_a_clock_that_was_set_forgets_everything():
    signal = Signal(max_gap=0.5)
    layer = two(Exponential(seconds=10.0), signal=signal)
    layer.run(logits_of([[0.9, 0.1]] * 5), np.arange(5) / 10)
    assert layer.step(logits_of([0.2, 0.8]), 1.0).probabilities == pytest.approx((0.2, 0.8))
    assert layer.step(logits_of([0.9, 0.1]), 1.1).probabilities[0] < 0.25
    waiting = two(Refractory(seconds=100.0), Threshold(enter=0.8), signal=signal)
    assert names_of(waiting, [0.9, 0.9, 0.9, 0.9], [1000.0, 1000.1, 1001.0, 5.0]) == ["yes", "refractory", "refractory", "yes"]


# ---------------------------------------------------------------- evidence, beside pyntbci


def trials(n, n_windows, *, seed=0, sharp=0.5, n_classes=3):
    """Return outputs of trials, shape (n, n_classes, n_windows), and labels."""
    outputs, labels = planted(n * n_windows, sharp=sharp, overconfident=1.0, n_classes=n_classes, seed=seed)
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    outputs = rng.normal(size=(n, n_classes, n_windows))
    outputs[np.arange(n), labels] += sharp
    return outputs, labels


def sums_of(outputs):
    """Return the evidence of all prefixes, shape (n, n_windows, n_classes)."""
    return np.stack([Scores().decision_function(outputs[:, :, : k + 1]) for k in range(outputs.shape[2])], axis=1)


def stops(stopping, outputs):
    """Return (windows, class) at which pyntbci stops each trial."""
    answers = np.stack([stopping.predict(outputs[:, :, : k + 1]) for k in range(outputs.shape[2])], axis=1)
    first = (answers >= 0).argmax(axis=1)
    return [(int(k) + 1, int(row[k])) for k, row in zip(first, answers, strict=True)]


def our_stops(step, outputs):
    layer = layer_of(Probabilities(), step)
    found = []
    for i, trial in enumerate(outputs):
        flags = [(NEW_TRIAL,)] + [()] * (trial.shape[1] - 1)
        states = layer.run(trial.T, 100 * i + np.arange(trial.shape[1]), flags)
        (decided,) = [k for k, state in enumerate(states) if state.name == "decided"]
        found.append((decided + 1, CLASSES.index(states[decided].class_name)))
        assert all(state.reason == "the trial is over" for state in states[decided + 1 :])
    return found


def test_margin_stopping_is_pyntbcis():
    train, labels = trials(400, 6)
    test, _ = trials(150, 6, seed=1)
    theirs = MarginStopping(Scores(), 1.0, 1, target_p=0.85, margin_min=0.0, margin_max=30.0, margin_step=0.05, max_time=6.0)
    theirs.fit(train, labels)
    sums = sums_of(train)
    margins = np.diff(np.sort(sums, axis=2)[:, :, -2:], axis=2)[:, :, 0]
    right = sums.argmax(axis=2) == labels[:, None]
    thresholds = accuracy_thresholds(margins, right, 0.85, np.arange(0.0, 30.0, 0.05))
    assert thresholds == pytest.approx(theirs.margins_)
    step = Accumulate(rule="margin", most=6, thresholds=thresholds, waits=True)
    found = our_stops(step, test)
    assert found == stops(theirs, test)
    assert len({k for k, _ in found}) > 3


def test_value_stopping_is_pyntbcis():
    train, labels = trials(400, 6)
    test, _ = trials(150, 6, seed=1)
    theirs = ValueStopping(Scores(), 1.0, 1, target_p=0.85, value_min=0.0, value_max=30.0, value_step=0.05, max_time=6.0)
    theirs.fit(train, labels)
    sums = sums_of(train)
    thresholds = accuracy_thresholds(sums.max(axis=2), sums.argmax(axis=2) == labels[:, None], 0.85, np.arange(0.0, 30.0, 0.05))
    assert thresholds == pytest.approx(theirs.values_)
    found = our_stops(Accumulate(rule="value", most=6, thresholds=thresholds, waits=True), test)
    assert found == stops(theirs, test)
    assert len({k for k, _ in found}) > 3


@pytest.mark.parametrize("target", [0.9, 0.999])
def test_distribution_stopping_is_pyntbcis(target):
    test, _ = trials(150, 6, seed=1)
    theirs = DistributionStopping(Scores(), 1.0, 1, distribution="norm", target_p=target, max_time=6.0)
    theirs.fit(*trials(20, 6))
    found = our_stops(Accumulate(rule="distribution", most=6, thresholds=(target,) * 6, waits=True), test)
    assert found == stops(theirs, test)
    assert len({k for k, _ in found}) > 1


@pytest.mark.parametrize(("target_pf", "target_pd"), [(0.05, 0.8), (0.02, 0.95), (0.3, 0.5), (1e-9, 0.8)])
@pytest.mark.parametrize("method", ["bds1", "bds2"])
def test_bayesian_stopping_with_targets_is_pyntbcis(method, target_pf, target_pd):
    """Of targets that are not reachable, pyntbci warns at every prediction."""
    train, labels = trials(400, 6, sharp=1.0)
    test, _ = trials(150, 6, seed=1, sharp=1.0)
    targets = {"target_pf": target_pf, "target_pd": target_pd}
    theirs = BayesStopping(Scores(), 1.0, 1, method=method, cr=1.0, max_time=6.0, approach="score", **targets)
    theirs.fit(train, labels)
    thresholds = bayes_thresholds_for(method, sums_of(train), labels, 1.0, **targets)
    found = our_stops(Accumulate(rule="bayes", most=6, thresholds=thresholds, waits=True), test)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "target_p. is not reachable")
        assert found == stops(theirs, test)


@pytest.mark.parametrize("cost_ratio", [1.0, 3.0, 10.0])
def test_bayesian_stopping_is_pyntbcis(cost_ratio):
    train, labels = trials(400, 6)
    test, _ = trials(150, 6, seed=1)
    theirs = BayesStopping(Scores(), 1.0, 1, method="bds0", cr=cost_ratio, max_time=6.0, min_time=1.0, approach="score")
    theirs.fit(train, labels)
    thresholds, p_false, p_miss = bayes_thresholds(sums_of(train), labels, cost_ratio)
    assert thresholds == pytest.approx(theirs.eta_)
    assert p_false == pytest.approx(theirs.pf_)
    assert p_miss == pytest.approx(theirs.pm_)
    step = Accumulate(rule="bayes", most=6, least=2, thresholds=thresholds, waits=True)  # theirs never stops at min_time
    found = our_stops(step, test)
    assert found == stops(theirs, test)
    assert len({k for k, _ in found}) > 1


def test_fixed_stopping_is_pyntbcis():
    train, labels = trials(200, 6)
    test, _ = trials(100, 6, seed=1)
    theirs = CriterionStopping(Scores(), 1.0, 1, optimization="max").fit(train, labels)
    n = round(theirs.stop_time_)
    assert our_stops(Accumulate(rule="fixed", most=n, waits=True), test) == stops(theirs, test)


def test_the_probability_of_independent_windows_is_bayes_rule():
    """Float64 products of the probabilities, and a stop where their share first exceeds the threshold."""
    outputs, _ = trials(60, 5, seed=3)
    step = Accumulate(rule="probability", most=5, thresholds=(0.8,) * 5, at_most="reject")
    layer = layer_of(Probabilities(), step)
    for trial in outputs:
        layer.restart()
        states = layer.run(trial.T, np.arange(5))
        product = np.cumprod(scipy.special.softmax(trial, axis=0), axis=1)
        posterior = (product / product.sum(axis=0)).T
        over = np.flatnonzero(posterior.max(axis=1) > 0.8)
        n = over[0] + 1 if len(over) else 5
        assert np.array([state.probabilities for state in states[:n]]) == pytest.approx(posterior[:n])
        assert states[n - 1].name == ("decided" if len(over) else "rejected")
        assert {state.name for state in states[: n - 1]} <= {"undecided"}


def test_evidence_begins_anew_after_a_decision_and_is_not_gathered_in_the_refractory_time():
    evidence = Accumulate(rule="probability", most=10, thresholds=(0.9,) * 10)
    layer = layer_of(Probabilities(), Refractory(seconds=0.2), evidence, class_names=("yes", "no"))
    r, u = "refractory", "undecided"
    assert names_of(layer, [0.7] * 8) == [u, u, "yes", r, u, u, "yes", r]


@pytest.mark.parametrize("waits", [True, False])
def test_a_trial_that_is_over_stays_over_whatever_comes_between(waits):
    """A refractory time and a pause both forget evidence; only the next trial brings another decision to a layer that waits."""
    evidence = Accumulate(rule="fixed", most=1, waits=waits)
    layer = two(Refractory(seconds=0.2), evidence, signal=Signal(max_gap=0.5))
    flags = [(NEW_TRIAL,), (), (), (), (), (NEW_TRIAL,), ("no trial",)]
    found = names_of(layer, [0.9] * 7, [0.0, 0.1, 0.2, 0.3, 2.0, 3.0, 4.0], flags)
    u, r = "undecided", "refractory"
    assert found == (["yes", r, u, u, u, "yes", u] if waits else ["yes", r, "yes", r, "yes", "yes", u])


# ---------------------------------------------------------------- what holds for every stream


def chains():
    probability = st.floats(0.3, 0.95)
    smoothing = st.one_of(
        st.none(), st.floats(0.05, 2).map(lambda s: Exponential(seconds=s)), st.integers(1, 4).map(lambda n: MeanOf(n_windows=n))
    )
    decides = st.one_of(
        st.tuples(probability, st.floats(0, 1), st.sampled_from(["undecided", "rejected"])).map(
            lambda each: Threshold(enter=each[0], leave=each[0] * each[1], below=each[2])
        ),
        st.tuples(
            st.integers(1, 5),
            probability,
            st.sampled_from(["decide", "reject"]),
            st.booleans(),
            st.sampled_from(["probability", "margin", "value", "distribution"]),
        ).map(
            lambda each: Accumulate(rule=each[4], most=each[0], thresholds=(each[1],) * each[0], at_most=each[2], waits=each[3])
        ),
    )
    return st.tuples(
        smoothing,
        st.one_of(st.none(), st.floats(0.01, 1.5).map(lambda s: Refractory(seconds=s))),
        decides,
        st.one_of(st.none(), st.floats(0.0, 0.5).map(lambda s: Dwell(seconds=s))),
        st.one_of(st.none(), st.floats(0.1, 1.0)),
    ).map(
        lambda each: described(Probabilities(), *(step for step in each[:4] if step is not None), signal=Signal(max_gap=each[4]))
    )


@st.composite
def streams(draw):
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    outputs = np.repeat(rng.normal(0, draw(st.floats(0.1, 6)), (n, 3)), draw(st.integers(1, 4)), axis=0)[:n]  # lasting classes
    outputs[rng.random(n) < 0.05] = np.nan
    times = 1000 + np.cumsum(rng.choice([0.1, 0.1, 0.1, 0.3, 2.0], n))
    flags = [draw_flags(rng) for _ in range(n)]
    return outputs.astype(np.float32), times, flags


def draw_flags(rng):
    return tuple(flag for flag in ("held", "late", "bad channels", NEW_TRIAL, NO_TRIAL) if rng.random() < 0.08)


@settings(max_examples=200, deadline=None)
@given(chains(), streams(), st.data())
def test_every_stream_has_one_state_a_window_and_none_in_the_refractory_time(description, stream, data):
    outputs, times, flags = stream
    layer = DecisionLayer(description)
    states = layer.run(outputs, times, flags)
    assert len(states) == len(times)
    for state, row, flag in zip(states, outputs, flags, strict=True):
        assert state.name in STATES
        assert state.reason
        assert (state.class_name is not None) == (state.name == "decided")
        signal = np.isfinite(row).all() and not {"held", "bad channels"} & set(flag)
        assert (state.name != "no signal") == signal
        if signal:
            assert sum(state.probabilities) == pytest.approx(1)
            assert 0 <= state.probability <= 1
            assert state.class_name in (None, CLASSES[int(np.argmax(state.probabilities))]) or isinstance(
                description.steps[-1], (Threshold, Dwell)
            )
    trial = "decided before"  # the first windows are of a trial too
    for state, flag in zip(states, flags, strict=True):
        trial = "open" if NEW_TRIAL in flag and NO_TRIAL not in flag else trial
        if state.name == "decided" and any(step.trial_windows for step in description.steps):
            assert NO_TRIAL not in flag
            assert trial != "over"  # one decision a trial
            trial = "over"
    waits = [step.seconds for step in description.steps if isinstance(step, Refractory)]
    decided = [time for time, state in zip(times, states, strict=True) if state.name == "decided"]
    for before, after in itertools.pairwise(decided if waits else []):
        assert after - before >= waits[0] - 1e-6
    # in pieces, one by one, by a copy from the file, and again: the same states
    cuts = sorted(data.draw(st.lists(st.integers(0, len(times)), max_size=4)))
    stored = LayerDescription.decoded(json.loads(json.dumps(description.sealed().encoded())))
    assert stored == description.sealed()
    copy = DecisionLayer(stored)
    pieces = []
    for start, stop in itertools.pairwise([0, *cuts, len(times)]):
        pieces += copy.run(outputs[start:stop], times[start:stop], flags[start:stop])
    assert pieces == states
    layer.restart()
    assert [layer.step(*window) for window in zip(outputs, times.tolist(), flags, strict=True)] == states


@settings(max_examples=100, deadline=None)
@given(streams(), st.floats(0.3, 0.9), st.floats(0.0, 0.6))
def test_dwell_is_what_the_whole_history_says(stream, enter, seconds):
    """An oracle that looks back: a class is decided if it was above the threshold in all windows of the last `seconds`."""
    outputs, times, flags = stream
    layer = layer_of(Probabilities(), Threshold(enter=enter), Dwell(seconds=seconds))
    found = layer.run(outputs, times, flags)
    above = []
    for row, flag in zip(outputs, flags, strict=True):
        bad = not np.isfinite(row).all() or {"held", "bad channels"} & set(flag)
        p = [0.0] if bad else scipy.special.softmax(row.astype(np.float64))
        assert abs(max(p) - enter) > 1e-9
        above.append(-1 if max(p) < enter else int(np.argmax(p)))
    for i, state in enumerate(found):
        j = i
        while j > 0 and above[j - 1] == above[i]:
            j -= 1
        lasted = above[i] >= 0 and times[i] - times[j] >= seconds - 1e-6
        assert (state.name == "decided") == lasted
        assert not lasted or state.class_name == CLASSES[above[i]]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(enter=1.2), r"threshold is 1\.2"),
        (lambda: Threshold(enter=math.nan), "threshold is nan"),
        (lambda: Threshold(enter=0.8, leave=0.9), r"leave a class is 0\.9.*at most 0\.8"),
        (lambda: Threshold(enter=0.8, below="maybe"), "maybe"),
        (lambda: Probabilities(temperature=0.0), "temperature is 0"),
        (lambda: Probabilities(prevalence=(0.5, 0.6)), "add up to 1"),
        (lambda: Exponential(seconds=-1), "time constant"),
        (lambda: MeanOf(n_windows=0), "number of windows"),
        (lambda: Dwell(seconds=-0.1), "dwell"),
        (lambda: Refractory(seconds=math.inf), "refractory"),
        (lambda: Signal(max_gap=0.0), "max_gap"),
        (lambda: Interval(radius=-1, coverage=0.9), "radius"),
        (lambda: Accumulate(rule="never", most=3), "never"),
        (lambda: Accumulate(rule="margin", most=3, thresholds=(1.0,)), "1 thresholds for 3 windows"),
        (lambda: Accumulate(rule="probability", most=1, thresholds=(1.5,)), r"threshold is 1\.5"),
        (
            lambda: described(Accumulate(rule="distribution", most=1, thresholds=(0.9,)), class_names=("a", "b"), n_outputs=1),
            "2 classes leave no distribution",
        ),
        (lambda: Accumulate(rule="fixed", most=2, least=3), "smallest number of windows"),
        (lambda: described(Interval(radius=1, coverage=0.9)), "this layer has classes"),
        (lambda: described(Threshold(enter=0.5), class_names=None), "needs classes"),
        (lambda: described(Probabilities(prevalence=(0.5, 0.5))), "2 shares for 3 classes"),
        (lambda: described(Probabilities(), n_outputs=4), "3 classes do not fit 4 outputs"),
        (lambda: described(Probabilities(), class_names=("a", "a", "b")), "that of another one"),
        (lambda: described(Probabilities(), class_names=None, n_outputs=2), "regression of 2 outputs"),
        (lambda: described(Probabilities(), output_name="features"), "base model"),
        (lambda: described(Probabilities(), name="../up"), "no name"),
        (lambda: described(), "no steps"),
    ],
)
def test_settings_outside_their_range_are_refused(make, message):
    with pytest.raises(DecisionError, match=message):
        make()


def test_outputs_of_another_model_are_refused():
    with pytest.raises(DecisionError, match="4 outputs for a layer of 3"):
        layer_of(Probabilities()).step(np.zeros(4), 0.0)


def test_every_step_says_in_words_what_it_does():
    values = {"interval": {"radius": 1.0, "coverage": 0.9}, "exponential": {"seconds": 1.5}, "mean": {"n_windows": 7}}
    values |= {"refractory": {"seconds": 2.5}, "threshold": {"enter": 0.75}, "dwell": {"seconds": 3.5}}
    values |= {"accumulate": {"rule": "fixed", "most": 4}, "probabilities": {"temperature": 1.25, "prevalence": (0.25, 0.75)}}
    for name, kind in STEPS.items():
        words = str(kind(**values[name]))
        assert words.endswith(".")
        for value in values[name].values():
            numbers = value if isinstance(value, tuple) else (value,)
            assert all(
                str(number) in words or f"{number:.0%}" in words or f"{number:g}" in words
                for number in numbers
                if not isinstance(number, str)
            ), words
        assert dataclasses.is_dataclass(kind)
