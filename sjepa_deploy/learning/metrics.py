"""Scores regressions and classifications, with bootstrap confidence intervals. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Holds a score and its confidence interval.

    Attributes
    ----------
    value : float
        Of all test windows.
    low, high : float
        Percentiles 2.5 and 97.5 over bootstrap samples of the test windows.
    """

    value: float
    low: float
    high: float


def r2(targets: Array, predictions: Array) -> float:
    """Return the coefficient of determination: 1 is perfect, 0 is the mean of `targets`."""
    residual = float(((targets - predictions) ** 2).sum())
    return 1 - residual / float(((targets - targets.mean()) ** 2).sum())


def nrmse(targets: Array, predictions: Array) -> float:
    """Return the root mean square error over the standard deviation of `targets`, as in the EEG Foundation Challenge."""
    return float(np.sqrt(((targets - predictions) ** 2).mean()) / targets.std())


def mae(targets: Array, predictions: Array) -> float:
    """Return the mean absolute error, in the unit of the target."""
    return float(abs(targets - predictions).mean())


def balanced_accuracy(targets: Array, probabilities: Array) -> float:
    """Return the mean recall of the classes in `targets`. `probabilities` has the shape (n, n_classes)."""
    predicted = probabilities.argmax(axis=1)
    return float(np.mean([(predicted[targets == c] == c).mean() for c in np.unique(targets)]))


def auc(targets: Array, probabilities: Array) -> float:
    """Return the area under the ROC curve, for more than two classes the mean of one against the rest.

    The area is the probability that a window of the class ranks above one of another; ties count one half.
    """
    classes = [1] if probabilities.shape[1] == 2 else [c for c in range(probabilities.shape[1]) if (targets == c).any()]
    areas = []
    for c in classes:
        own, others = probabilities[targets == c, c], np.sort(probabilities[targets != c, c])
        below, up_to = np.searchsorted(others, own, "left"), np.searchsorted(others, own, "right")
        areas.append(((below + up_to) / 2).mean() / len(others))
    return float(np.mean(areas))


def balanced_weights(targets: Array, n_classes: int) -> Array:
    """Return the weight of each class that makes all count alike: n_windows / (n_classes * n_windows of the class).

    They are scikit-learn's ``compute_class_weight("balanced")``. Every class must be there.
    """
    counts = np.bincount(targets, minlength=n_classes)
    assert counts.all(), "a class is missing"
    weights: Array = len(targets) / (n_classes * counts)
    return weights


def best_threshold(targets: Array, probabilities: Array) -> float:
    """Return the probability of the second of two classes from which on choosing it has the best balanced accuracy.

    Candidates lie midway between neighbouring probabilities; of several that are as good, the one nearest to one half is taken.
    """
    scored = probabilities[:, 1]
    levels = np.unique(scored)
    candidates = np.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2])
    positive, negative = np.sort(scored[targets == 1]), np.sort(scored[targets == 0])
    hits = 1 - np.searchsorted(positive, candidates) / len(positive)
    rejections = np.searchsorted(negative, candidates) / len(negative)
    best = np.flatnonzero(np.isclose(hits + rejections, (hits + rejections).max(), rtol=0, atol=1e-12))
    return float(candidates[best[abs(candidates[best] - 0.5).argmin()]])


REGRESSION: dict[str, Callable[[Array, Array], float]] = {"r2": r2, "nrmse": nrmse, "mae": mae}
CLASSIFICATION: dict[str, Callable[[Array, Array], float]] = {"balanced_accuracy": balanced_accuracy, "auc": auc}


def scores(targets: Array, predictions: Array, *, seed: int = 0, n_samples: int = 1000) -> dict[str, Score]:
    """Return all scores of regression (`predictions` of shape (n,)) or classification (shape (n, n_classes)).

    Bootstrap samples of classes are stratified: each has as many windows of a class as there are. Those of numbers that are
    all equal are drawn again.
    """
    regression = predictions.ndim == 1
    assert len(np.unique(targets)) > 1, "there is nothing to tell apart"
    functions = REGRESSION if regression else CLASSIFICATION
    rng = np.random.default_rng(seed)
    strata = [np.arange(len(targets))] if regression else [np.flatnonzero(targets == c) for c in np.unique(targets)]
    values: dict[str, list[float]] = {name: [] for name in functions}
    while len(values[next(iter(functions))]) < n_samples:
        rows = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
        if (targets[rows] == targets[rows[0]]).all():
            continue
        for name, function in functions.items():
            values[name].append(function(targets[rows], predictions[rows]))
    return {
        name: Score(value=function(targets, predictions), low=float(low), high=float(high))
        for name, function in functions.items()
        for low, high in [np.percentile(values[name], [2.5, 97.5])]
    }
