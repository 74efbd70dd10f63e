"""Judges predictions: figures with intervals over subjects or recordings, chance by permutation, differences of two models.

Windows of one person are alike. Intervals therefore come from a bootstrap that draws whole units: subjects where there are
enough, else recordings, else blocks of successive windows. An interval over recordings says nothing of other people.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.evaluation import figures
from sjepa_deploy.evaluation.predictions import Predictions
from sjepa_deploy.runtime.decisions.calibrate import calibration_error
from sjepa_deploy.runtime.decisions.description import Figure
from sjepa_deploy.runtime.intervals import MIN_BLOCKS, N_RESAMPLES, interval

Array = NDArray[np.float64]
UnitKind = Literal["subjects", "recordings", "blocks"]

N_BLOCKS = 20
"""Blocks of successive windows, where there are too few subjects and recordings."""

N_PERMUTATIONS = 1000

PERMUTED_AT_ONCE = 1 << 22
"""Labels that are permuted at once: 32 MiB."""

MOST_ENUMERATED = 12
"""Units whose changes of sign are all tried; of more units, `N_PERMUTATIONS` random ones are."""

ALPHA = 0.05
"""Probability of finding something where there is nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Holds what is drawn as a whole.

    Attributes
    ----------
    kind : {"subjects", "recordings", "blocks"}
        What a unit is.
    of : ndarray of int
        Unit of each window, by the number of the window.
    n : int
        Number of units.
    """

    kind: UnitKind
    of: NDArray[np.intp]
    n: int


def units_of(predictions: Predictions) -> Units:
    """Return the units of windows: subjects or recordings, of which there must be `MIN_BLOCKS`, else blocks."""
    windows, first = np.unique(predictions.window, return_index=True)
    of = np.full(windows[-1] + 1, -1)
    pairs: tuple[tuple[UnitKind, NDArray[np.str_]], ...] = (
        ("subjects", predictions.subject[first]),
        ("recordings", predictions.recording[first]),
    )
    for kind, names in pairs:
        there, number = np.unique(names, return_inverse=True)
        if len(there) >= MIN_BLOCKS:
            of[windows] = number
            return Units(kind=kind, of=of, n=len(there))
    recording = predictions.recording[first]
    n = 0
    for name in np.unique(recording):
        rows = np.flatnonzero(recording == name)
        rows = rows[np.argsort(predictions.onset[first][rows], kind="stable")]
        pieces = max(1, min(round(N_BLOCKS * len(rows) / len(windows)), len(rows) // 2))
        for piece in np.array_split(rows, pieces):
            of[windows[piece]] = n
            n += 1
    return Units(kind="blocks", of=of, n=n)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """Holds what was counted in the rows that one model was tested on: a figure is computed in each cell, then averaged.

    Attributes
    ----------
    rows : ndarray of int
        Rows of the predictions.
    units : ndarray of int, shape (n_units,)
        Units with windows in the cell.
    counts : ndarray, shape (n_units, ...)
        Confusion matrix, or sums, of each unit.
    undecided : ndarray, shape (n_units, 2)
        Windows without a decision, and all windows, of each unit.
    pairs : ndarray, shape (n_classes, n_units, n_units)
        Pairs of a window of the class in one unit and one of another class in another unit that are ranked in this order.
    sizes : ndarray, shape (n_classes, 2, n_units)
        Windows of the class and of other classes. Of two classes, only the second one has `pairs` and `sizes`.
    """

    rows: NDArray[np.intp]
    units: NDArray[np.intp]
    counts: Array
    undecided: Array
    pairs: Array
    sizes: Array


class Tally:
    """Counts the predictions of one model by cells and units, and gives the figures of any units.

    Cells are the windows of a subject in a fold and seed, if each has windows of all classes, else all windows of a fold and
    seed. Of a regression they are the latter.

    Parameters
    ----------
    predictions : Predictions
        What to count.
    units : Units
        Units of the windows.
    """

    def __init__(self, predictions: Predictions, units: Units) -> None:
        self.predictions, self.units = predictions, units
        self.n_classes = 0 if predictions.class_names is None else len(predictions.class_names)
        self.shift = float(predictions.truth.mean()) if not self.n_classes else 0.0  # sums of squares keep their digits
        self.by_subject, groups = self._groups()
        self.cells = [self._cell(rows) for rows in groups]

    def _groups(self) -> tuple[bool, list[NDArray[np.intp]]]:
        p = self.predictions
        _, subject = np.unique(p.subject, return_inverse=True)
        runs = [np.stack([p.fold, p.seed]), np.stack([subject, p.fold, p.seed])]
        found = []
        for keys in runs if self.n_classes else runs[:1]:
            _, number = np.unique(keys, axis=1, return_inverse=True)
            found.append([np.flatnonzero(number == i) for i in range(number.max() + 1)])
        whole = len(found) > 1 and all(len(np.unique(p.truth[rows])) == self.n_classes for rows in found[1])
        return whole, found[int(whole)]

    def _cell(self, rows: NDArray[np.intp]) -> Cell:
        p = self.predictions
        units, own = np.unique(self.units.of[p.window[rows]], return_inverse=True)
        parts = [rows[own == i] for i in range(len(units))]
        undecided = np.array([[(p.decision[part] < 0).sum(), len(part)] for part in parts], np.float64)
        if not self.n_classes:
            counts = np.stack([figures.sums(p.truth[part] - self.shift, p.score[part] - self.shift) for part in parts])
            nothing = np.empty((0, 0, 0))
            return Cell(rows=rows, units=units, counts=counts, undecided=undecided, pairs=nothing, sizes=nothing)
        counts = np.stack([figures.confusion(p.truth[part], p.decision[part], self.n_classes) for part in parts])
        ranked = [1] if self.n_classes == 2 else range(self.n_classes)
        score = self._ranked_score
        own_scores = [[score(c)[part][p.truth[part] == c] for part in parts] for c in ranked]
        others = [[score(c)[part][p.truth[part] != c] for part in parts] for c in ranked]
        pairs = np.array(
            [[[figures.above(a, b) for b in theirs] for a in mine] for mine, theirs in zip(own_scores, others, strict=True)]
        )
        sizes = np.array(
            [[[len(a) for a in mine], [len(b) for b in theirs]] for mine, theirs in zip(own_scores, others, strict=True)],
            np.float64,
        )
        return Cell(rows=rows, units=units, counts=counts, undecided=undecided, pairs=pairs, sizes=sizes)

    def _ranked_score(self, c: int) -> Array:
        """Return what windows are ranked by: the score of two classes, else the probability of the class."""
        p = self.predictions
        assert p.probabilities is not None
        return p.score if self.n_classes == 2 else p.probabilities[:, c]

    @cached_property
    def functions(self) -> dict[str, Callable[[Array], Array]]:
        """Return the figures that are computed from counts."""
        return figures.OF_CLASSES if self.n_classes else figures.OF_NUMBERS

    @property
    def primary(self) -> str:
        """Return the figure that verdicts are about."""
        return "balanced_accuracy" if self.n_classes else "r2"

    def values(self, drawn: Array | None = None) -> dict[str, Array]:
        """Return the figures of units that are drawn so many times, shape (n_draws, n_units); None draws each once.

        A figure is the mean over cells, each with the share of its units that are drawn. A cell in which a figure is not defined
        is left out of the mean.
        """
        drawn = np.ones((1, self.units.n)) if drawn is None else drawn
        names = [*self.functions, *(["auc", "undecided"] if self.n_classes else [])]
        total = {name: np.zeros(len(drawn)) for name in names}
        weight = {name: np.zeros(len(drawn)) for name in names}
        for cell in self.cells:
            times = drawn[:, cell.units]
            counts = np.tensordot(times, cell.counts, axes=(1, 0))
            found = {name: function(counts) for name, function in self.functions.items()}
            if self.n_classes:
                found |= {"auc": _auc(cell, times), "undecided": _share(times @ cell.undecided)}
            share = times.mean(axis=1)
            for name, value in found.items():
                there = np.isfinite(value)
                total[name] += np.where(there, value, 0) * share
                weight[name] += there * share
        return {name: figures.quotient(total[name], weight[name]) for name in names}

    def calibration_error(self) -> float | None:
        """Return the expected calibration error of the most probable class, the mean over cells; None of a regression."""
        p = self.predictions
        if p.probabilities is None:
            return None
        likely = p.probabilities.argmax(axis=1)
        best, right = p.probabilities.max(axis=1), likely == p.truth
        return float(np.mean([calibration_error(best[cell.rows], right[cell.rows]) for cell in self.cells]))


def _auc(cell: Cell, times: Array) -> Array:
    """Return the area under the ROC curve, of more than two classes the mean of one against the rest."""
    areas = []
    for pairs, (own, others) in zip(cell.pairs, cell.sizes, strict=True):
        ranked = ((times @ pairs) * times).sum(axis=1)
        areas.append(figures.quotient(ranked, (times @ own) * (times @ others)))
    return np.asarray(np.mean(areas, axis=0))


def _share(counts: Array) -> Array:
    return figures.quotient(counts[:, 0], counts[:, 1])


def draws(n_units: int, seed: int = 0) -> Array:
    """Return how often each unit is drawn in each bootstrap sample, shape (N_RESAMPLES, n_units)."""
    which = np.random.default_rng(seed).integers(n_units, size=(N_RESAMPLES, n_units))
    counts = np.zeros((N_RESAMPLES, n_units))
    np.add.at(counts, (np.arange(N_RESAMPLES)[:, None], which), 1.0)
    return counts


def with_intervals(tally: Tally) -> dict[str, Figure]:
    """Return all figures of a model with their intervals, which are missing with fewer than `MIN_BLOCKS` units.

    The calibration error has none: that of a bootstrap sample is larger than that of the data.
    """
    n = tally.units.n
    resampled = tally.values(draws(n)) if n >= MIN_BLOCKS else {}
    found = {name: _figure(float(value[0]), resampled.get(name), n) for name, value in tally.values().items()}
    error = tally.calibration_error()
    return found | ({} if error is None else {"ece": Figure(value=error)})


def _figure(value: float, resampled: Array | None, n_units: int) -> Figure:
    if not np.isfinite(value):
        return Figure()
    kept = np.empty(0) if resampled is None else resampled[np.isfinite(resampled)]
    if not len(kept):
        return Figure(value=value)
    low, high = interval(kept, n_units)
    return Figure(value=value, low=low, high=high)


# ---- chance --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Says what a figure is where labels say nothing of the EEG.

    Attributes
    ----------
    mean : float
        Mean over permutations of the labels.
    high : float
        What 5 % of the permutations reach, see `chance`.
    p : float
        Probability of reaching the figure of the model by chance: (1 + permutations that do) / (1 + permutations).
    """

    mean: float
    high: float
    p: float


def chance(tally: Tally, *, n_permutations: int = N_PERMUTATIONS, seed: int = 0) -> dict[str, Chance]:
    """Return what the figures are by chance: labels are permuted within units and folds, the predictions stay.

    Labels that are the same in all windows of a unit are permuted between units. All seeds get the same permutation.

    Models of several folds learned from each other's test windows, so that by chance their figures spread more than permutations
    of the labels alone do (Noirhomme et al. 2014, doi 10.1016/j.nicl.2014.04.004). What permutations reach is moved away from
    its mean by the factor of Nadeau and Bengio 2003, doi 10.1023/A:1024068626366: the root of 1 + k / (k - 1) for k folds.
    """
    p, rng = tally.predictions, np.random.default_rng(seed)
    windows, first = np.unique(p.window, return_index=True)
    truth, unit, fold = p.truth[first], tally.units.of[windows], p.fold[first]
    _, group = np.unique(np.stack([unit, fold]), axis=1, return_inverse=True)
    place, at_once = np.searchsorted(windows, p.window), max(1, PERMUTED_AT_ONCE // len(windows))
    reached: dict[str, list[Array]] = {}
    for begin in range(0, n_permutations, at_once):
        labels = _permuted(truth, group.ravel(), unit, rng, min(at_once, n_permutations - begin))
        by_cell = [_of_labels(tally, cell, labels[:, place[cell.rows]]) for cell in tally.cells]
        for name in by_cell[0]:
            values = np.array([each[name] for each in by_cell])
            there = np.isfinite(values)
            mean = figures.quotient(np.where(there, values, 0).sum(axis=0), there.sum(axis=0))
            reached.setdefault(name, []).append(mean)
    true = tally.values()
    k = len(np.unique(p.fold))
    widened = np.sqrt(1 + k / (k - 1)) if k > 1 else 1.0
    found = {}
    for name, parts in reached.items():
        own, values = float(true[name][0]), np.concatenate(parts)
        values = values[np.isfinite(values)]
        if not np.isfinite(own) or not len(values):
            continue
        values = values.mean() + widened * (values - values.mean())
        better = int((values >= own - 1e-12).sum())
        high = float(np.quantile(values, 1 - ALPHA))
        found[name] = Chance(mean=float(values.mean()), high=high, p=(1 + better) / (1 + len(values)))
    return found


def _permuted(
    truth: NDArray[Any], group: NDArray[np.intp], unit: NDArray[np.intp], rng: np.random.Generator, n: int
) -> NDArray[Any]:
    """Return permuted labels, shape (n, n_windows)."""
    order = np.argsort(group, kind="stable")
    if all(len(np.unique(truth[group == g])) == 1 for g in np.unique(group)):
        units, number = np.unique(unit, return_inverse=True)
        labels = np.array([truth[number == i][0] for i in range(len(units))])
        return np.stack([rng.permutation(labels)[number] for _ in range(n)])
    labels = np.empty((n, len(truth)), truth.dtype)
    for row in labels:
        row[order] = truth[np.lexsort((rng.random(len(truth)), group))]
    return labels


def _of_labels(tally: Tally, cell: Cell, labels: NDArray[Any]) -> dict[str, Array]:
    """Return the figures of one cell for other labels, shape (n_permutations, n_rows)."""
    p = tally.predictions
    if not tally.n_classes:
        score, labels = p.score[cell.rows] - tally.shift, labels - tally.shift
        ones = np.ones(len(labels))
        columns = (len(score) * ones, labels.sum(axis=1), score.sum() * ones)
        counts = np.stack([*columns, (labels**2).sum(axis=1), (score**2).sum() * ones, labels @ score], axis=1)
        return {name: function(counts) for name, function in tally.functions.items()}
    decided = np.eye(tally.n_classes + 1)[p.decision[cell.rows]][:, : tally.n_classes]  # -1 is the last row, which is dropped
    own = [(labels == c).astype(np.float64) for c in range(tally.n_classes)]
    counts = np.stack([mine @ decided for mine in own], axis=1)
    found = {name: function(counts) for name, function in tally.functions.items()}
    areas = []
    for c in [1] if tally.n_classes == 2 else range(tally.n_classes):
        ranks = _ranks(tally._ranked_score(c)[cell.rows])
        n = own[c].sum(axis=1)
        areas.append(figures.quotient(own[c] @ ranks - n * (n + 1) / 2, n * (labels.shape[1] - n)))
    return found | {"auc": np.mean(areas, axis=0)}


def _ranks(values: Array) -> Array:
    """Return the ranks of values from 1 on; those that tie share the mean of theirs."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2


# ---- two models --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Compares two models on the same windows.

    Attributes
    ----------
    model, other : str
        Names of the models.
    figure : str
        What is compared.
    values : tuple of float
        The figure of `model`, and of `other`.
    difference : Figure
        The first less the second, with the interval of paired bootstrap samples.
    p : float or None
        Probability of a difference as large where there is none; None with too few units.
    """

    model: str
    other: str
    figure: str
    values: tuple[float, float]
    difference: Figure
    p: float | None

    @property
    def better(self) -> bool:
        """Return whether the interval lies above 0."""
        return self.difference.low is not None and self.difference.low > 0

    @property
    def worse(self) -> bool:
        """Return whether the interval lies below 0."""
        return self.difference.high is not None and self.difference.high < 0


def compare(one: Tally, other: Tally, figure: str) -> Difference:
    """Compare two models on the same windows: both get the same bootstrap samples of units.

    The probability is that of a sign-flip test of the jackknife's pseudo-values of the units (of a mean over units, their
    differences).
    """
    assert one.units is other.units, "both models are judged on the same windows"
    n = one.units.n
    values = [float(tally.values()[figure][0]) for tally in (one, other)]
    value, resampled, p = values[0] - values[1], None, None
    if n >= MIN_BLOCKS:
        drawn = draws(n)
        resampled = one.values(drawn)[figure] - other.values(drawn)[figure]
        without = 1 - np.eye(n)
        left_out = one.values(without)[figure] - other.values(without)[figure]
        p = sign_flip(n * value - (n - 1) * left_out)
    names = [tally.predictions.model for tally in (one, other)]
    if names[0] == names[1]:
        names = [f"{tally.predictions.model}, {tally.predictions.way}" for tally in (one, other)]
    return Difference(
        model=names[0],
        other=names[1],
        figure=figure,
        values=(values[0], values[1]),
        difference=_figure(value, resampled, n),
        p=p,
    )


def sign_flip(values: Array, seed: int = 0) -> float | None:
    """Return the two-sided probability of a mean as far from 0, where each value is as probable with the other sign."""
    if not np.isfinite(values).all():
        return None
    n = len(values)
    if n <= MOST_ENUMERATED:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
        return float((abs(signs @ values) >= abs(values.sum()) - 1e-12).mean())
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(N_PERMUTATIONS, n))
    return float((1 + (abs(signs @ values) >= abs(values.sum()) - 1e-12).sum()) / (1 + N_PERMUTATIONS))
