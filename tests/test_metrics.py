import numpy as np
import pytest
import sklearn.metrics

from sjepa_deploy.learning.metrics import scores


def test_regression_scores_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    targets = rng.normal(0.5, 0.1, 80)
    predictions = targets + rng.normal(0, 0.05, 80)
    found = scores(targets, predictions)
    rmse = sklearn.metrics.root_mean_squared_error(targets, predictions)
    assert found["r2"].value == pytest.approx(sklearn.metrics.r2_score(targets, predictions))
    assert found["mae"].value == pytest.approx(sklearn.metrics.mean_absolute_error(targets, predictions))
    assert found["nrmse"].value == pytest.approx(rmse / np.std(targets))
    assert all(score.low < score.value < score.high for score in found.values())


@pytest.mark.parametrize("n_classes", [2, 4])
def test_classification_scores_equal_those_of_scikit_learn_also_with_ties(n_classes):
    rng = np.random.default_rng(1)
    targets = rng.choice(n_classes, 200, p=[0.5] + [0.5 / (n_classes - 1)] * (n_classes - 1))
    logits = rng.normal(0, 1, (200, n_classes)) + np.eye(n_classes)[targets]
    probabilities = np.round(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), 1) + 1e-9
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    if n_classes == 2:
        area = sklearn.metrics.roc_auc_score(targets, probabilities[:, 1])
    else:
        area = sklearn.metrics.roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
    found = scores(targets, probabilities, n_samples=200)
    assert found["auc"].value == pytest.approx(area)
    recall = sklearn.metrics.balanced_accuracy_score(targets, probabilities.argmax(axis=1))
    assert found["balanced_accuracy"].value == pytest.approx(recall)


def test_many_classes_with_one_window_each_have_scores():
    targets = np.arange(30)
    found = scores(targets, np.eye(30), n_samples=50)
    assert (found["auc"].low, found["balanced_accuracy"].high) == (1.0, 1.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        targets = rng.standard_normal(60)
        found = scores(targets, targets + rng.laplace(0, 0.5, 60), n_samples=200)["mae"]
        covered += found.low <= 0.5 <= found.high
    assert 85 <= covered <= 99
