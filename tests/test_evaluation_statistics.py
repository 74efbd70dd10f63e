"""Figures, intervals, chance and differences of an evaluation, against scikit-learn, SciPy, pyntbci, and planted effects."""

import csv
import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyntbci.utilities import itr
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    matthews_corrcoef,
    r2_score,
    roc_auc_score,
)

from sjepa_deploy.evaluation.figures import wolpaw_bits
from sjepa_deploy.evaluation.predictions import Predictions, of_outputs, read_table, table_of
from sjepa_deploy.evaluation.results import agreement, judge
from sjepa_deploy.evaluation.statistics import ALPHA, Tally, chance, compare, draws, sign_flip, units_of, with_intervals
from sjepa_deploy.evaluation.verdict import verdict

NAMES = ("left", "right", "rest", "feet")


def make(
    rng,
    *,
    n_classes=2,
    n_subjects=6,
    n_recordings=2,
    n=20,
    n_seeds=1,
    effect=0.0,
    spread=0.0,
    model="model",
    truth=None,
):
    """Return predictions of planted strength; `spread` is how much subjects differ in it."""
    n_windows = n_subjects * n_recordings * n
    subject = np.repeat(np.arange(n_subjects), n_recordings * n)
    recording = np.repeat(np.arange(n_subjects * n_recordings), n)
    if truth is None:
        truth = np.concatenate([rng.permutation(np.arange(n) % max(2, n_classes)) for _ in range(n_subjects * n_recordings)])
        truth = truth if n_classes else truth + rng.normal(0, 1, n_windows)
    strength = (effect + rng.normal(0, spread, n_subjects))[subject]
    parts = []
    for seed in range(n_seeds):
        if n_classes:
            outputs = rng.normal(0, 1, (n_windows, n_classes)) + strength[:, None] * np.eye(n_classes)[truth]
        else:
            outputs = (strength * truth + rng.normal(0, 1, n_windows))[:, None]
        parts.append(of_outputs(outputs, NAMES[:n_classes] or None) | {"seed": np.full(n_windows, seed)})
    joined = {name: None if parts[0][name] is None else np.concatenate([part[name] for part in parts]) for name in parts[0]}
    known = {
        "window": np.arange(n_windows),
        "subject": np.char.add("s", subject.astype(str)),
        "session": np.full(n_windows, "1"),
        "recording": np.char.add("r", recording.astype(str)),
        "onset": np.tile(np.arange(n) * 2.0, n_subjects * n_recordings),
        "fold": subject % 3,
        "truth": truth,
    }
    known = {name: np.tile(value, n_seeds) for name, value in known.items()}
    return Predictions(model=model, way="offline", class_names=NAMES[:n_classes] or None, **known, **joined)


def oracle(rows, class_names):
    """Return the figures of rows of a table by scikit-learn and SciPy."""
    if class_names is None:
        truth, score = (np.array([float(row[name]) for row in rows]) for name in ("label", "score"))
        return {"r2": r2_score(truth, score), "r": stats.pearsonr(truth, score).statistic}
    truth = [row["label"] for row in rows]
    decided = [row for row in rows if row["decision"] != "n/a"]
    pair = [row["label"] for row in decided], [row["decision"] for row in decided]
    if len(class_names) == 2:
        area = roc_auc_score(np.array(truth) == class_names[1], [float(row["score"]) for row in rows])
    else:
        each = [[float(row[f"probability_{name}"]) for name in class_names] for row in rows]
        area = np.mean([roc_auc_score(np.array(truth) == name, np.array(each)[:, i]) for i, name in enumerate(class_names)])
    return {
        "balanced_accuracy": balanced_accuracy_score(*pair),
        "accuracy": accuracy_score(*pair),
        "kappa": cohen_kappa_score(*pair),
        "normalised_mcc": (matthews_corrcoef(*pair) + 1) / 2,
        "auc": area,
        "undecided": 1 - len(decided) / len(rows),
    }


def averaged(text, over, class_names, key=("model", "offline")):
    """Return figures of a table as `EvaluationReport.averaged_over` says."""
    rows = [row for row in csv.DictReader(io.StringIO(text), delimiter="\t") if (row["model"], row["way"]) == key]
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in over), []).append(row)
    found = [oracle(group, class_names) for group in groups.values()]
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 2, 3, 4]), st.integers(1, 3), st.floats(0, 0.3))
def test_figures_are_those_of_scikit_learn_on_the_table(seed, n_classes, n_seeds, undecided):
    rng = np.random.default_rng(seed)
    predictions = make(rng, n_classes=n_classes, n_seeds=n_seeds, effect=0.7)
    if n_classes:
        predictions.decision[rng.random(len(predictions)) < undecided] = -1
    tally = Tally(predictions, units_of(predictions))
    over = ("subject", "fold", "seed") if tally.by_subject else ("fold", "seed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, where a class gets no decision
        want = averaged(table_of([predictions]).decode(), over, predictions.class_names)
    got = {name: float(value[0]) for name, value in tally.values().items()}
    assert got == pytest.approx(want, abs=1e-12)
    (again,) = read_table_of(predictions)
    for name, values in predictions.arrays.items():
        if name not in ("window", "probabilities"):
            np.testing.assert_array_equal(getattr(again, name), values)
    if n_classes:
        np.testing.assert_allclose(again.probabilities, predictions.probabilities, atol=1e-15)


def read_table_of(predictions, tmp=None):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.tsv"
        file.write_bytes(table_of([predictions]))
        return read_table(file, predictions.class_names)


def test_ties_and_drawn_units_count_as_repeated_rows():
    rng = np.random.default_rng(0)
    predictions = make(rng, n_subjects=1, n_recordings=8, effect=1.0)
    predictions.score[:] = predictions.score.round()  # ties
    units = units_of(predictions)
    assert (units.kind, units.n) == ("recordings", 8)
    for cells in (np.zeros(len(predictions), np.intp), predictions.fold):
        predictions.fold[:] = cells
        tally, drawn = Tally(predictions, units), draws(8)[:5]
        values = tally.values(drawn)
        for i, times in enumerate(drawn):
            rows = np.repeat(np.arange(len(predictions)), times[units.of[predictions.window]].astype(int))
            truth = predictions.truth[rows]
            assert values["auc"][i] == pytest.approx(roc_auc_score(truth, predictions.score[rows]))
            assert values["kappa"][i] == pytest.approx(cohen_kappa_score(truth, predictions.decision[rows]))


def test_the_calibration_error_is_that_of_the_reliability_curve():
    predictions = make(np.random.default_rng(1), n_subjects=1, n_recordings=1, n=300, effect=0.5)
    best = predictions.probabilities.max(axis=1)
    true, said = calibration_curve(predictions.decision == predictions.truth, best, n_bins=15, strategy="quantile")
    assert Tally(predictions, units_of(predictions)).calibration_error() == pytest.approx(abs(true - said).mean())


def test_bits_are_those_of_pyntbci():
    for n in (2, 4, 36):
        for accuracy in (1 / n + 0.01, 0.7, 0.9, 1.0):
            assert wolpaw_bits(accuracy, n) == pytest.approx(float(itr(n, accuracy, 60.0)), abs=1e-9)
        assert wolpaw_bits(1 / n, n) == wolpaw_bits(0.0, n) == 0


def test_chance_is_that_of_permutations_within_recordings():
    rng = np.random.default_rng(2)
    predictions = make(rng, n_subjects=1, n_recordings=1, n=60, effect=0.35)  # one fold
    found = chance(Tally(predictions, units_of(predictions)))  # blocks of three windows
    units = units_of(predictions)

    def permuted():
        truth = predictions.truth.copy()
        for unit in range(units.n):
            rows = np.flatnonzero(units.of == unit)
            truth[rows] = rng.permutation(truth[rows])
        return truth

    for name, function, values in (
        ("balanced_accuracy", balanced_accuracy_score, predictions.decision),
        ("auc", roc_auc_score, predictions.score),
    ):
        reference = np.array([function(permuted(), values) for _ in range(300)])
        assert found[name].mean == pytest.approx(reference.mean(), abs=0.015)
        assert found[name].high == pytest.approx(np.quantile(reference, 0.95), abs=0.035)
        own = (reference >= function(predictions.truth, values) - 1e-12).mean()
        assert found[name].p == pytest.approx(own, abs=0.05)


def test_labels_of_whole_subjects_are_permuted_between_subjects():
    """One label a subject: within a subject there is nothing to permute, and its windows are no independent evidence."""
    rng = np.random.default_rng(3)
    truth = np.repeat(np.arange(6) % 2, 40)
    predictions = make(rng, truth=truth, effect=3.0)
    predictions.fold[:] = 0
    p = chance(Tally(predictions, units_of(predictions)))["balanced_accuracy"].p
    assert p == pytest.approx(1 / 20, abs=0.02)  # three of six subjects: 20 ways


def test_sign_flips_are_those_of_scipy():
    values = np.array([0.3, -0.1, 0.25, 0.4, 0.05, -0.02, 0.31])
    want = stats.permutation_test((values,), np.mean, permutation_type="samples", alternative="two-sided")
    assert sign_flip(values) == pytest.approx(want.pvalue)
    many = np.random.default_rng(0).normal(0.2, 1, 40)
    want = stats.permutation_test((many,), np.mean, permutation_type="samples", n_resamples=20000, rng=0)
    assert sign_flip(many) == pytest.approx(want.pvalue, abs=0.04)


def test_intervals_over_subjects_hold_the_truth_and_those_over_windows_do_not():
    """60 data sets of subjects who differ: the mean of the population lies in 95 % of the intervals over subjects."""
    rng = np.random.default_rng(4)
    many = make(rng, n_subjects=1000, n_recordings=1, effect=1.0, spread=0.6)
    truth = float(Tally(many, units_of(many)).values()["balanced_accuracy"][0])
    held, narrow = [], []
    for _ in range(60):
        predictions = make(rng, n_subjects=10, n_recordings=1, n=60, effect=1.0, spread=0.6)
        figure = with_intervals(Tally(predictions, units_of(predictions)))["balanced_accuracy"]
        held.append(figure.low <= truth <= figure.high)
        right = predictions.decision == predictions.truth
        narrow.append(abs(right.mean() - truth) <= 1.96 * right.std() / np.sqrt(len(right)))
    assert np.mean(held) >= 0.9
    assert np.mean(narrow) <= 0.8


@pytest.mark.parametrize("n_classes", [0, 3])
def test_null_data_are_no_better_than_chance_and_planted_ones_are(n_classes):
    """200 data sets whose labels say nothing, and 40 with an effect."""
    rng = np.random.default_rng(5)
    better = {0.0: 0, 0.8: 0}
    for effect, n in ((0.0, 200), (0.8, 40)):
        for _ in range(n):
            predictions = make(rng, n_classes=n_classes, n_subjects=5, n_recordings=1, effect=effect)
            predictions.fold[:] = 0
            tally = Tally(predictions, units_of(predictions))
            better[effect] += chance(tally, n_permutations=200)[tally.primary].p < ALPHA
    assert better[0.0] <= 16
    assert better[0.8] == 40


def test_null_data_with_a_model_that_learns():
    """200 data sets: a linear discriminant learns noise in five folds.

    Permutations that took the folds for independent would find more: 11 % of 400 such data sets.
    """
    rng = np.random.default_rng(6)
    found = 0
    for _ in range(200):
        template = make(rng, n_subjects=1, n_recordings=10, n=16)
        eeg = rng.normal(0, 1, (160, 4))
        folds = np.repeat(np.arange(5), 32)
        for fold in range(5):
            test = folds == fold
            model = LinearDiscriminantAnalysis().fit(eeg[~test], template.truth[~test])
            template.score[test] = model.decision_function(eeg[test])
            template.decision[test] = model.predict(eeg[test])
        template.fold[:] = folds
        tally = Tally(template, units_of(template))
        found += chance(tally, n_permutations=200)["balanced_accuracy"].p < ALPHA
    assert found <= 16


def test_differences_of_two_models_on_the_same_windows():
    rng = np.random.default_rng(7)
    good, bad = (make(rng, n_subjects=8, effect=effect, model=name) for effect, name in ((2.5, "good"), (0.3, "bad")))
    bad.truth[:] = good.truth
    noise = rng.normal(0, 1, (len(good), 2)) + 0.3 * np.eye(2)[good.truth]
    bad = Predictions(**(vars(bad) | of_outputs(noise, bad.class_names)))
    units = units_of(good)
    one, other = Tally(good, units), Tally(bad, units)
    for name in ("balanced_accuracy", "auc"):
        found = compare(one, other, name)
        assert found.better
        assert not found.worse
        assert found.p <= 0.05
        swapped = compare(other, one, name)
        assert swapped.worse
        assert swapped.difference.value == pytest.approx(-found.difference.value)
        assert (found.values[0] - found.values[1]) == pytest.approx(found.difference.value)
    same = compare(one, one, "auc")
    assert (same.difference.value, same.difference.low, same.difference.high, same.p) == (0, 0, 0, 1)


def test_differences_are_found_by_chance_as_often_as_they_may():
    rng = np.random.default_rng(8)
    found = 0
    for _ in range(60):
        one = make(rng, n_subjects=10, n_recordings=1, effect=0.6, spread=0.3)
        outputs = rng.normal(0, 1, (len(one), 2)) + 0.6 * np.eye(2)[one.truth]
        other = Predictions(**(vars(one) | of_outputs(outputs, one.class_names) | {"model": "other"}))
        units = units_of(one)
        each = compare(Tally(one, units), Tally(other, units), "balanced_accuracy")
        found += each.better or each.worse
    assert found <= 7


def test_units_are_subjects_else_recordings_else_blocks():
    rng = np.random.default_rng(9)
    for shape, kind, n in (((6, 1, 20), "subjects", 6), ((2, 4, 20), "recordings", 8), ((1, 2, 100), "blocks", 20)):
        n_subjects, n_recordings, each = shape
        predictions = make(rng, n_subjects=n_subjects, n_recordings=n_recordings, n=each, n_seeds=2)
        units = units_of(predictions)
        assert (units.kind, units.n) == (kind, n)
        assert (np.bincount(units.of) > 1).all()
        for unit in range(n):  # no unit lies in two recordings, and blocks are stretches of time
            rows = np.unique(predictions.window[units.of[predictions.window] == unit])
            assert len(np.unique(predictions.subject[rows])) == 1
            if kind != "subjects":
                assert len(np.unique(predictions.recording[rows])) == 1
                assert np.ptp(rows) == len(rows) - 1
    few = make(rng, n_subjects=1, n_recordings=1, n=8)
    figure = with_intervals(Tally(few, units_of(few)))["balanced_accuracy"]
    assert (figure.low, figure.high) == (None, None)  # four blocks say nothing of how much blocks differ


def test_verdicts_name_chance_baselines_and_the_live_path():
    rng = np.random.default_rng(10)
    null = make(rng, effect=0.0, model="net")
    strong = Predictions(
        **(vars(null) | {"model": "csp-lda"} | of_outputs(9.0 * np.eye(2)[null.truth] + rng.normal(0, 1, (240, 2)), NAMES[:2]))
    )
    live = Predictions(**(vars(null) | {"way": "live"}))
    said = verdict(judge([null, live, strong]), ("csp-lda",))
    assert len(said) == 3
    assert "net is no better than chance" in said[0]
    assert "below the baseline csp-lda" in said[1]
    assert "against 1.00" in said[1]
    assert "keeps" in said[2]
    said = verdict(judge([strong, null]), ())
    assert "better than chance" in said[0]
    assert "csp-lda is better than net by" in said[1]
    broken = Predictions(**(vars(strong) | {"way": "live", "decision": 1 - strong.decision}))
    assert "loses" in verdict(judge([strong, broken]), ())[1]


def test_other_decisions_are_counted_where_both_decide():
    one = make(np.random.default_rng(11), n_seeds=2)
    other = Predictions(**(vars(one) | {"decision": one.decision.copy()}))
    other.decision[:12] = 1 - other.decision[:12]
    found = agreement(one, other, "b", "a")
    assert (found.differ, found.n_windows) == (12 / 480, 480)
    part = other.picked(np.arange(6, 480))
    found = agreement(one, part, "b", "a")
    assert (found.differ, found.n_windows) == (6 / 474, 474)
