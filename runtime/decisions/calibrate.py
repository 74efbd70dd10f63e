"""Fits the numbers of a decision layer from calibration data: temperature, conformal radius, stopping thresholds."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DecisionError

Array = NDArray[np.float64]
Labels = NDArray[np.intp]

TEMPERATURES = (1e-2, 1e2)
"""Range of a temperature. Outputs that are right for all events would ask for zero, outputs that tell nothing for infinity."""

N_BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017, arXiv 1706.04599; here of equally many windows (Nixon et al. 2019)."""


def as_logits(outputs: Array) -> Array:
    """Return one logit a class, shape (n, n_classes). A single output is the logit of the second of two classes."""
    return np.concatenate([np.zeros_like(outputs), outputs], axis=1) if outputs.shape[1] == 1 else outputs


def fit_temperature(logits: Array, labels: Labels) -> float:
    """Return the temperature of the smallest negative log-likelihood, within `TEMPERATURES`.

    The likelihood is convex in the inverse temperature, so that the sign of its slope brackets the minimum.

    Parameters
    ----------
    logits : ndarray, shape (n, n_classes)
        One logit a class.
    labels : ndarray of int, shape (n,)
        True classes.
    """
    logits = logits - logits.max(axis=1, keepdims=True)
    own = logits[np.arange(len(labels)), labels].mean()

    def slope(log_inverse: float) -> float:
        powers = np.exp(math.exp(log_inverse) * logits)
        return float(((powers * logits).sum(axis=1) / powers.sum(axis=1)).mean() - own)

    low, high = -math.log(TEMPERATURES[1]), -math.log(TEMPERATURES[0])
    if slope(low) >= 0:
        return TEMPERATURES[1]
    if slope(high) <= 0:
        return TEMPERATURES[0]
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def calibration_error(
    probability: Array, right: NDArray[np.bool_], n_bins: int = N_BINS, *, weights: Array | None = None
) -> float:
    """Return the expected calibration error in bins of equally many windows.

    Parameters
    ----------
    probability : ndarray, shape (n,)
        Probability of the most probable class.
    right : ndarray of bool, shape (n,)
        Whether this class is the true one.
    n_bins : int
        Number of bins; not more than there are windows.
    weights : ndarray, shape (n,), or None
        What each window counts. None: all the same.
    """
    weights = np.ones(len(probability)) if weights is None else weights
    order = np.argsort(probability, kind="stable")
    excess = weights * (probability - right)
    return float(sum(abs(excess[rows].sum()) for rows in np.array_split(order, min(n_bins, len(order)))) / weights.sum())


def conformal_radius(residuals: Array, coverage: float) -> float:
    """Return half of the interval that holds a new target with at least the probability `coverage`.

    Split conformal prediction: the ceil((n + 1) coverage)-th smallest absolute residual (Lei et al. 2018, "Distribution-Free
    Predictive Inference for Regression", doi 10.1080/01621459.2017.1307116, algorithm 2).

    Raises
    ------
    DecisionError
        If there are too few residuals for this coverage.
    """
    n = len(residuals)
    rank = math.ceil(round((n + 1) * coverage, 9))
    if rank > n:
        needed = math.ceil(round(coverage / (1 - coverage), 9)) if coverage < 1 else math.inf
        raise DecisionError(
            f"{n} targets are too few for intervals that hold {coverage:.1%} of them.",
            f"Use {needed:g} or more, or a lower --coverage." if math.isfinite(needed) else "Use a --coverage below 1.",
        )
    return float(np.sort(np.abs(residuals))[rank - 1])


def accuracy_thresholds(values: Array, right: NDArray[np.bool_], accuracy: float, grid: Array) -> tuple[float | None, ...]:
    """Return the smallest value of `grid` from which on decisions reach an accuracy, after each number of windows.

    As `pyntbci.stopping.MarginStopping` (Thielen et al. 2015, doi 10.1371/journal.pone.0133797) of margins, and `ValueStopping`
    of the evidence of the best class, but for a number of windows at which no value reaches the accuracy: nothing is decided
    then.

    Parameters
    ----------
    values : ndarray, shape (n_trials, n_windows)
        What is compared, after 1, 2, ... windows.
    right : ndarray of bool, shape (n_trials, n_windows)
        Whether the best class is the true one.
    accuracy : float
        Share of right decisions among those with a larger value.
    grid : ndarray, shape (n_values,)
        Values in rising order.
    """
    found: list[float | None] = []
    for value, good in zip(values.T, right.T, strict=True):
        above = value[:, None] >= grid
        n = above.sum(axis=0)
        reached = np.flatnonzero((n > 0) & ((above & good[:, None]).sum(axis=0) / np.maximum(n, 1) >= accuracy))
        found.append(float(grid[reached[0]]) if len(reached) else None)
    return tuple(found)


def bayes_thresholds(
    sums: Array, labels: Labels, cost_ratio: float = 1.0
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Return the thresholds of Bayesian stopping after each number of windows, and what they cost.

    The sums of the true class and of the others are taken as Gaussian. A decision is due where the evidence of the true class
    outweighs that of the others times `cost_ratio` (Ahmadi, Desain & Thielen 2024, doi 10.3389/fnhum.2024.1437965; the
    approach from scores of `pyntbci.stopping.BayesStopping`, method "bds0").

    Parameters
    ----------
    sums : ndarray, shape (n_trials, n_windows, n_classes)
        Evidence after 1, 2, ... windows. The mean over the classes is taken off: what is left of logits is nearer to a Gaussian.
    labels : ndarray of int, shape (n_trials,)
        True classes.
    cost_ratio : float
        How much more a false decision costs than a missed one.

    Returns
    -------
    thresholds, p_false, p_miss : tuple of float
        Largest sum that does not decide yet; probabilities of a false decision and of a missed one, for all classes together.
    """
    n_classes = sums.shape[2]
    sums = sums - sums.mean(axis=2, keepdims=True)
    own = np.zeros((len(labels), n_classes), np.bool_)
    own[np.arange(len(labels)), labels] = True
    thresholds, p_false, p_miss = [], [], []
    for scores in sums.swapaxes(0, 1):
        target, other = scores[own], scores[~own]
        b0, b1, s0, s1 = other.mean(), target.mean(), max(other.std(), 1e-12), max(target.std(), 1e-12)
        a = s1**2 - s0**2
        b = -2 * (s1**2 * b0 - s0**2 * b1)
        c = -(s1**2 * b0**2 + s0**2 * b1**2) + 2 * s0**2 * s1**2 * math.log(s0 / (s1 * (n_classes - 1) * cost_ratio))
        root = math.sqrt(max(0.0, b**2 - 4 * a * c))
        # Of equal variances the equation is linear. The form without a difference of near numbers holds for both.
        eta = -2 * c / (b + root) if b > 0 else (-b + root) / (2 * a) if a else math.inf
        thresholds.append(float(eta))
        false = (n_classes - 1) / n_classes * (1 - NormalDist(b0, s0).cdf(eta))
        miss = NormalDist(b1, s1).cdf(eta) / n_classes
        p_false.append(1 - (1 - false) ** n_classes)
        p_miss.append(1 - (1 - miss) ** n_classes)
    return tuple(thresholds), tuple(p_false), tuple(p_miss)


def bayes_thresholds_for(
    method: Literal["bds1", "bds2"], sums: Array, labels: Labels, cost_ratio: float, *, target_pf: float, target_pd: float
) -> tuple[float | None, ...]:
    """Return thresholds of Bayesian stopping that keep to probabilities of a false decision and of a right one.

    As the methods "bds1" and "bds2" of `pyntbci.stopping.BayesStopping` (Ahmadi, Desain & Thielen 2024, doi
    10.3389/fnhum.2024.1437965). "bds1" takes the thresholds of `bayes_thresholds` after those numbers of windows alone at which
    both probabilities are kept. "bds2" takes the first of these thresholds for all numbers of windows; the last one where no
    number of windows keeps both.

    Parameters
    ----------
    method : {"bds1", "bds2"}
        The method.
    sums, labels, cost_ratio
        See `bayes_thresholds`.
    target_pf : float
        Largest probability of a false decision. Where no number of windows reaches it, the smallest that is reached.
    target_pd : float
        Smallest probability of a decision for the true class. Where no number of windows reaches it, the largest that is reached.

    Returns
    -------
    tuple of (float or None)
        A threshold after 1, 2, ... windows; None where nothing is decided.
    """
    thresholds, p_false, p_miss = bayes_thresholds(sums, labels, cost_ratio)
    most_false, most_missed = max(target_pf, min(p_false)), max(1 - target_pd, min(p_miss))
    if method == "bds1":
        return tuple(
            eta if false < most_false and miss < most_missed else None
            for eta, false, miss in zip(thresholds, p_false, p_miss, strict=True)
        )
    kept = (
        eta for eta, false, miss in zip(thresholds, p_false, p_miss, strict=True) if false <= most_false and miss <= most_missed
    )
    return (next(kept, thresholds[-1]),) * len(thresholds)
