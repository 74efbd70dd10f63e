"""Computes figures of an evaluation from counts: a figure of drawn units is the figure of the sum of their counts.

Each figure takes counts of shape (..., what is counted) and returns values of shape (...). So the values of thousands of
bootstrap samples are one call. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def quotient(a: Any, b: Any) -> Array:
    """Return a / b, NaN where b is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    result: Array = np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan), where=b != 0)
    return result


# ---- of classes: counts are confusion matrices, shape (..., n_classes, n_classes), true classes in rows ------------------------


def confusion(truth: NDArray[Any], decision: NDArray[Any], n_classes: int) -> Array:
    """Return how many windows of each true class (rows) were decided as each class (columns); undecided ones are left out."""
    decided = decision >= 0
    places = truth[decided] * n_classes + decision[decided]
    return np.bincount(places, minlength=n_classes**2).reshape(n_classes, n_classes).astype(np.float64)


def balanced_accuracy(counts: Array) -> Array:
    """Return the mean recall of the classes. It is NaN where a class is missing."""
    recalls = quotient(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1))
    return np.asarray(recalls.mean(axis=-1))


def accuracy(counts: Array) -> Array:
    """Return the share of right decisions."""
    return quotient(np.trace(counts, axis1=-2, axis2=-1), counts.sum(axis=(-2, -1)))


def kappa(counts: Array) -> Array:
    """Return Cohen's kappa (doi 10.1177/001316446002000104): 1 is perfect, 0 is agreement by chance."""
    n = counts.sum(axis=(-2, -1))
    expected = quotient((counts.sum(axis=-1) * counts.sum(axis=-2)).sum(axis=-1), n**2)
    return quotient(accuracy(counts) - expected, 1 - expected)


def normalised_mcc(counts: Array) -> Array:
    """Return (MCC + 1) / 2 of Matthews' correlation coefficient, for several classes Gorodkin's R_K.

    The coefficient is 0, and the figure one half, where all windows are of one class or get one decision. Gorodkin 2004,
    doi 10.1016/j.compbiolchem.2004.09.006.
    """
    n, right = counts.sum(axis=(-2, -1)), np.trace(counts, axis1=-2, axis2=-1)
    true, decided = counts.sum(axis=-1), counts.sum(axis=-2)
    covariance = right * n - (true * decided).sum(axis=-1)
    spread = np.sqrt((n**2 - (decided**2).sum(axis=-1)) * (n**2 - (true**2).sum(axis=-1)))
    mcc = np.where(spread > 0, quotient(covariance, spread), 0.0)
    return np.where(n > 0, (mcc + 1) / 2, np.nan)


def wolpaw_bits(accuracy: float, n_classes: int) -> float:
    """Return the bits of one decision (Wolpaw et al. 2002, doi 10.1016/S1388-2457(02)00057-3).

    The formula assumes that all classes are equally frequent and equally well decided, and that errors are spread evenly over the
    other classes. Below chance it is set to 0, as decisions that are wrong more often than by chance serve nobody.
    """
    if not accuracy > 1 / n_classes:
        return 0.0
    bits = math.log2(n_classes) + accuracy * math.log2(accuracy)
    if accuracy < 1:
        bits += (1 - accuracy) * math.log2((1 - accuracy) / (n_classes - 1))
    return bits


def above(positive: Array, negative: Array) -> float:
    """Return how many pairs of a window of `positive` and one of `negative` rank the first above; ties count one half."""
    ordered = np.sort(negative)
    below, up_to = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + up_to).sum() / 2)


# ---- of numbers: counts are sums, shape (..., 6), see `sums` -----------------------------------------------------------------


def sums(truth: Array, predicted: Array) -> Array:
    """Return the number of windows, the sums of truth, prediction, their squares, and their product."""
    return np.array([len(truth), truth.sum(), predicted.sum(), (truth**2).sum(), (predicted**2).sum(), (truth * predicted).sum()])


def r2(counts: Array) -> Array:
    """Return the coefficient of determination: 1 is perfect, 0 is the mean of the truth."""
    n, t, _, tt, pp, tp = np.moveaxis(counts, -1, 0)
    return 1 - quotient(tt - 2 * tp + pp, tt - quotient(t**2, n))


def pearson(counts: Array) -> Array:
    """Return Pearson's correlation coefficient."""
    n, t, p, tt, pp, tp = np.moveaxis(counts, -1, 0)
    spread = np.sqrt(np.maximum((n * tt - t**2) * (n * pp - p**2), 0))
    return quotient(n * tp - t * p, spread)


OF_CLASSES: dict[str, Callable[[Array], Array]] = {
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "kappa": kappa,
    "normalised_mcc": normalised_mcc,
}
OF_NUMBERS: dict[str, Callable[[Array], Array]] = {"r2": r2, "r": pearson}

NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
    "kappa": "kappa",
    "normalised_mcc": "normalised MCC",
    "accuracy": "accuracy",
    "ece": "calibration error",
    "undecided": "undecided",
    "bits": "bits a decision",
    "r2": "R2",
    "r": "r",
}
"""Names of figures for people."""
