"""Fits the last layer of a model in closed form, on what enters that layer. NumPy alone.

Trials are few and features many: matrices have the size of the smaller number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DataError

Array = NDArray[np.float64]

MIN_TRIALS = 2
"""Fewest trials of each class: one trial has no spread."""

ALPHAS = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 13))
"""Ridge penalties to choose from, in units of the features' number: the features are standardised."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LastLayer:
    """Holds the last layer of a model, which is linear.

    Attributes
    ----------
    weight : ndarray of float64, shape (n_outputs, n_features)
        Weights.
    bias : ndarray of float64, shape (n_outputs,)
        Bias.
    """

    weight: Array
    bias: Array

    def __call__(self, features: NDArray[Any]) -> Array:
        """Return the outputs, shape (n, n_outputs), of `features`, shape (n, n_features)."""
        outputs: Array = np.asarray(features, np.float64) @ self.weight.T + self.bias
        return outputs


def fit_classes(
    features: NDArray[Any], labels: NDArray[np.integer], n_classes: int, *, n_outputs: int | None = None
) -> LastLayer:
    """Fit a linear discriminant analysis whose covariance is shrunk by Ledoit and Wolf's rule.

    The fit is that of scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")`` with equal priors: the
    covariance of each class is shrunk after its features were standardised, and the classes count alike.

    Parameters
    ----------
    features : ndarray, shape (n, n_features)
        What enters the last layer.
    labels : ndarray of int, shape (n,)
        Number of the class of each trial, 0 to `n_classes` - 1.
    n_classes : int
        Number of classes.
    n_outputs : int or None
        1 for the single logit of the second of two classes. None: one output a class.

    Raises
    ------
    DataError
        If a class has fewer than `MIN_TRIALS` trials, the features hold no spread, or values that are not finite.

    References
    ----------
    O. Ledoit and M. Wolf, A well-conditioned estimator for large-dimensional covariance matrices, Journal of Multivariate
    Analysis 88(2), 2004.
    """
    features = _checked(features, len(labels))
    counts = np.bincount(labels, minlength=n_classes)
    if len(counts) > n_classes or (counts < MIN_TRIALS).any():
        raise DataError(
            f"The trials of the classes are {', '.join(map(str, counts))}.", f"Give {MIN_TRIALS} trials or more of each class."
        )
    prior = 1 / n_classes
    means = np.stack([features[labels == c].mean(axis=0) for c in range(n_classes)])
    rows, diagonal = [], np.zeros(features.shape[1])
    for c in range(n_classes):
        centred = features[labels == c] - means[c]
        scale = centred.std(axis=0)
        scale[scale <= _ROUNDING * np.abs(means[c]).clip(1e-300)] = 1.0
        shrinkage, mean_variance = _ledoit_wolf(centred / scale)
        rows.append(centred * np.sqrt(prior * (1 - shrinkage) / len(centred)))
        diagonal += prior * shrinkage * mean_variance * scale**2
    root = np.concatenate(rows)
    if not (root.any() or diagonal.any()):
        raise DataError("The trials of a class do not differ.", "Look at the signal of this recording.")
    weight = _solve(root, diagonal, means.T).T
    bias = -0.5 * np.einsum("cf,cf->c", means, weight) + np.log(prior)
    if n_outputs == 1:
        return LastLayer(weight=weight[1:] - weight[:1], bias=bias[1:] - bias[:1])
    return LastLayer(weight=weight, bias=bias)


def fit_numbers(features: NDArray[Any], targets: NDArray[Any], before: LastLayer | None = None) -> LastLayer:
    """Fit a ridge regression, whose penalty pulls towards the layer before it or towards nothing.

    Features are standardised. Of the penalties of `ALPHAS`, towards the layer `before` and towards zero, the one with the
    smallest error of leave-one-out is taken: with few trials the fit stays near the layer before, where that layer is of use.

    Parameters
    ----------
    features : ndarray, shape (n, n_features)
        What enters the last layer.
    targets : ndarray, shape (n,) or (n, n_outputs)
        True numbers.
    before : LastLayer or None
        Layer so far.

    Raises
    ------
    DataError
        If there are fewer than three trials, or values that are not finite.
    """
    features = _checked(features, len(targets))
    if len(features) < 3:
        raise DataError(f"There are {len(features)} trials.", "Give three trials or more.")
    wanted = np.asarray(targets, np.float64).reshape(len(features), -1)
    if not np.isfinite(wanted).all():
        raise DataError("Some targets are NaN or infinite.", "Leave these trials out.")
    nothing = LastLayer(weight=np.zeros((wanted.shape[1], features.shape[1])), bias=np.zeros(wanted.shape[1]))
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale <= _ROUNDING * np.abs(mean).clip(1e-300)] = 1.0
    standard = (features - mean) / scale
    values, vectors = np.linalg.eigh(standard @ standard.T)
    values = values.clip(0)
    kept = {a * features.shape[1]: values / (values + a * features.shape[1]) for a in ALPHAS}
    leverage = {alpha: 1 / len(features) + (vectors**2 * share).sum(axis=1) for alpha, share in kept.items()}
    found = []
    for start in (nothing,) if before is None else (before, nothing):
        left = wanted - start(features)
        centred = left - left.mean(axis=0)
        projected = vectors.T @ centred
        for alpha, share in kept.items():
            errors = (centred - vectors @ (share[:, None] * projected)) / (1 - leverage[alpha])[:, None]
            found.append((float((errors**2).sum()), alpha, start, left.mean(axis=0), projected))
    _, alpha, start, offset, projected = min(found, key=lambda each: each[0])
    weight = (standard.T @ (vectors @ (projected / (values + alpha)[:, None]))).T / scale
    return LastLayer(weight=start.weight + weight, bias=start.bias + offset - weight @ mean)


_ROUNDING = 1e-12
"""Spread of a feature, as a share of its mean, below which the feature is constant."""


def _checked(features: NDArray[Any], n: int) -> Array:
    features = np.asarray(features, np.float64)
    assert features.ndim == 2, "features are a table"
    assert len(features) == n, "each trial has a label"
    if not np.isfinite(features).all():
        raise DataError("Some features are NaN or infinite.", "Leave these trials out.")
    return features


def _ledoit_wolf(centred: Array) -> tuple[float, float]:
    """Return the shrinkage of the covariance of centred rows, and the mean variance that it shrinks to."""
    n, n_features = centred.shape
    energy = (centred**2).sum(axis=1)
    mean_variance = float(energy.sum()) / n / n_features
    squares = float(((centred @ centred.T) ** 2).sum()) / n**2  # of the covariance's values, by the smaller matrix
    spread = (squares - n_features * mean_variance**2) / n_features
    noise = min((float((energy**2).sum()) / n - squares) / (n * n_features), spread)
    return (noise / spread if noise > 0 else 0.0), mean_variance


def _solve(root: Array, diagonal: Array, wanted: Array) -> Array:
    """Return the solution x of (rootᵀ root + diag(diagonal)) x = wanted, by the smaller of both matrices (Woodbury)."""
    n, n_features = root.shape
    if n >= n_features or not (diagonal > 0).all():
        covariance = root.T @ root + np.diag(diagonal)
        return np.asarray(np.linalg.lstsq(covariance, wanted, rcond=None)[0], np.float64)
    scaled = root / diagonal
    start = wanted / diagonal[:, None]
    solution: Array = start - scaled.T @ np.linalg.solve(np.eye(n) + scaled @ root.T, root @ start)
    return solution
