"""Fits a decision layer on events with known classes, and says what the layer does on events that it was not fitted on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DecisionError, listed
from sjepa_deploy.files import now
from sjepa_deploy.runtime.decisions.calibrate import calibration_error, conformal_radius
from sjepa_deploy.runtime.decisions.chain import (
    FEWEST_EVENTS,
    Asked,
    FitRequest,
    Floats,
    Mask,
    Model,
    fit_model,
    shares_of,
    simulated,
    values_of,
    windows_of,
)
from sjepa_deploy.runtime.decisions.data import NO_EVENT, CalibrationData
from sjepa_deploy.runtime.decisions.description import Figure, FitSummary, LayerDescription, LayerFacts
from sjepa_deploy.runtime.decisions.interval import Interval
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.smoothing import Exponential, MeanOf
from sjepa_deploy.runtime.decisions.step import Step
from sjepa_deploy.runtime.intervals import quotient

N_BLOCKS, N_FOLDS = 10, 5
"""Blocks of neighbouring events for intervals, and parts for cross-fitting."""

FEWEST_ACCEPTED = 10
"""Fewer decisions keep no promise about their accuracy."""

N_BISECTIONS = 12
"""Steps between two thresholds of the curve, which lie 2.5 % of the windows apart."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Says what another threshold would do, from cross-fitting.

    Attributes
    ----------
    threshold : float
        The threshold; of Bayesian stopping, the cost ratio.
    accept_rate, accuracy, false_per_minute : Figure
        See `sjepa_deploy.runtime.decisions.description.FitSummary`.
    """

    threshold: float
    accept_rate: Figure
    accuracy: Figure
    false_per_minute: Figure


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Holds a fitted layer and how it was found.

    Attributes
    ----------
    layer : LayerDescription
        The layer.
    curve : tuple of CurvePoint
        What other thresholds would do, from the laxest one on; empty for a regression.
    threshold : float or None
        The chosen threshold; None for a regression.
    notes : tuple of str
        Sentences that say what to know.
    """

    layer: LayerDescription
    curve: tuple[CurvePoint, ...]
    threshold: float | None
    notes: tuple[str, ...]


def fit(data: CalibrationData, facts: LayerFacts, request: FitRequest) -> Fit:
    """Fit a decision layer.

    Parameters
    ----------
    data : CalibrationData
        Outputs of the model and what is true, of windows that the model was not trained on.
    facts : LayerFacts
        Name, bundle, outputs and classes of the layer.
    request : FitRequest
        What is asked for.

    Returns
    -------
    Fit
        The layer, fitted on all the data. Its figures come from cross-fitting: each fifth of the data, in stretches of time, is
        judged by a layer that was fitted on the rest.

    Raises
    ------
    DecisionError
        If there are too few events, or of one class only, or nothing reaches what is asked for.
    """
    if (request.asked == "coverage") != (facts.class_names is None):
        kind = "A regression" if facts.class_names is None else "A classifier"
        mend = "--coverage" if facts.class_names is None else "--accept-rate, --max-false-per-minute or --target-accuracy"
        raise DecisionError(f"{kind} is not fitted by --{request.asked}.", f"Use {mend}.")
    blocks = _blocks(data)
    return (_fit_interval if facts.class_names is None else _fit_classes)(data, facts, request, blocks)


# ---- classes -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Counts:
    """Holds what was decided, by blocks: arrays of shape (n_blocks,)."""

    events: Floats
    accepted: Floats
    right: Floats
    false: Floats
    minutes: Floats

    @property
    def rates(self) -> dict[Asked, float]:
        accepted, minutes = self.accepted.sum(), self.minutes.sum()
        return {
            "accept-rate": float(accepted / self.events.sum()),
            "target-accuracy": float(self.right.sum() / accepted) if accepted >= FEWEST_ACCEPTED else math.nan,
            "max-false-per-minute": float(self.false.sum() / minutes) if minutes else math.nan,
        }

    @property
    def figures(self) -> tuple[Figure, Figure, Figure]:
        """Return accept rate, accuracy and false decisions a minute."""
        pairs = ((self.accepted, self.events), (self.right, self.accepted), (self.false, self.minutes))
        return tuple(Figure(**dict(zip(("value", "low", "high"), quotient(*pair), strict=True))) for pair in pairs)  # type: ignore[return-value]


def _fit_classes(data: CalibrationData, facts: LayerFacts, request: FitRequest, blocks: NDArray[np.intp]) -> Fit:
    assert facts.class_names is not None
    class_names = facts.class_names
    known = data.labels >= 0
    n_events = len(np.unique(data.events[known]))
    there = np.unique(data.labels[known])
    if n_events < FEWEST_EVENTS:
        raise DecisionError(f"There are {n_events} events to fit on.", f"Use {FEWEST_EVENTS} or more.")
    if len(there) < 2:
        only = class_names[there[0]]
        raise DecisionError(f"All events are of the class {only}.", "Use events of every class that is to be told apart.")
    notes = []
    if missing := [name for i, name in enumerate(class_names) if i not in there]:
        if request.prevalence is not None:
            raise DecisionError(f"There are no events of {listed(missing)}.", "Leave --prevalence out, or add events of them.")
        notes.append(f"There are no events of {listed(missing)}.")
    weights = _weights(data, request, len(class_names))
    model = fit_model(data, class_names, request)
    values = values_of(model.front, data, class_names, facts.n_outputs, request.signal)

    def counted(model: Model, strictness: float, values: Floats, rows: Mask | None = None) -> _Counts:
        part = data if rows is None else data.picked(rows)
        mine, block = (weights, blocks) if rows is None else (weights[rows], blocks[rows])
        decided, chosen = simulated(model.back(strictness), values, part, class_names, request)[:2]
        return _counts(part, decided, chosen, mine, block)

    threshold = _choose(lambda strictness: counted(model, strictness, values), model.grid, request)
    # What the layer does is told of events that neither temperature nor threshold has seen.
    n_windows = len(data)
    decided, chosen = np.zeros(n_windows, np.bool_), np.full(n_windows, -1)
    best, likely = np.full(n_windows, np.nan), np.full(n_windows, -1)
    curve_decided, curve_chosen = (np.zeros((len(model.grid), n_windows), kind) for kind in (np.bool_, np.intp))
    folds = blocks * N_FOLDS // (blocks.max() + 1)
    for fold in np.unique(folds):
        test = folds == fold
        if len(np.unique(data.labels[~test & known])) < 2:
            raise DecisionError("The events of each class follow each other.", "Mix the classes over the recording.")
        part, rest = data.picked(test), data.picked(~test)
        other = fit_model(rest, class_names, request)
        fitted_on = values_of(other.front, rest, class_names, facts.n_outputs, request.signal)
        judge = _judge(other, fitted_on, ~test, counted)
        strictness = _choose(judge, other.grid, request)
        unseen = values_of(other.front, part, class_names, facts.n_outputs, request.signal)
        decided[test], chosen[test], best[test], likely[test] = simulated(
            other.back(strictness), unseen, part, class_names, request
        )
        for i, each in enumerate(model.grid):
            curve_decided[i, test], curve_chosen[i, test] = simulated(other.back(each), unseen, part, class_names, request)[:2]
    accept_rate, accuracy, false_per_minute = _counts(data, decided, chosen, weights, blocks).figures
    points = []
    for i, each in enumerate(model.grid):
        figures = _counts(data, curve_decided[i], curve_chosen[i], weights, blocks).figures
        points.append(CurvePoint(threshold=float(each), accept_rate=figures[0], accuracy=figures[1], false_per_minute=figures[2]))
    judged = known & np.isfinite(best) & (decided if request.stop is not None else True)
    error = (
        calibration_error(best[judged], likely[judged] == data.labels[judged], weights=weights[judged]) if judged.any() else None
    )
    reached = counted(model, threshold, values).rates[request.asked]
    if request.asked == "accept-rate" and abs(reached - request.wanted) > 0.02:
        notes.append(f"No threshold accepts {request.wanted:.1%} of these events: the nearest accepts {reached:.1%}.")
    known_figures = {"accept_rate": accept_rate, "accuracy": accuracy, "false_per_minute": false_per_minute}
    summary = _summary(data, request, n_events, calibration_error=error, **known_figures)
    layer = _described(facts, request, (*model.front, *model.back(threshold)), summary)
    return Fit(layer=layer, curve=tuple(points), threshold=threshold, notes=tuple(notes))


def _judge(
    model: Model, values: Floats, rows: Mask, counted: Callable[[Model, float, Floats, Mask], _Counts]
) -> Callable[[float], _Counts]:
    return lambda strictness: counted(model, strictness, values, rows)


def _summary(data: CalibrationData, request: FitRequest, n_events: int, **figures: Any) -> FitSummary:
    return FitSummary(
        asked=request.asked,
        wanted=request.wanted,
        data=data.names,
        hop=data.hop,
        n_events=n_events,
        n_windows=len(data),
        minutes=data.minutes,
        **figures,
    )


def _described(facts: LayerFacts, request: FitRequest, steps: tuple[Step, ...], summary: FitSummary) -> LayerDescription:
    known = vars(facts) | {"signal": request.signal, "fit": summary, "created": now()}
    return LayerDescription(steps=steps, **known).sealed()


def _weights(data: CalibrationData, request: FitRequest, n_classes: int) -> Floats:
    """Return what each window counts: more for a class that is rarer in the data than where the layer decides."""
    if request.prevalence is None:
        return np.ones(len(data))
    ratios = np.array(request.prevalence) / shares_of(data, n_classes)
    return np.where(data.labels >= 0, ratios[np.maximum(data.labels, 0)], 1.0)


def _counts(data: CalibrationData, decided: Mask, chosen: NDArray[np.intp], weights: Floats, blocks: NDArray[np.intp]) -> _Counts:
    """Count events with a decision, right ones, and decisions that are wrong or belong to no event."""
    n_blocks = int(blocks.max()) + 1

    def summed(rows: NDArray[np.intp], of: Floats = weights) -> Floats:
        return np.bincount(blocks[rows], of[rows], n_blocks).astype(np.float64)

    def first_of(rows: NDArray[np.intp]) -> NDArray[np.intp]:
        return rows[np.unique(data.events[rows], return_index=True)[1]]

    known = data.labels >= 0
    accepted = first_of(np.flatnonzero(known & decided))
    stays = decided[1:] & decided[:-1] & (chosen[1:] == chosen[:-1]) & (np.diff(data.recordings) == 0)
    onset = decided.copy()
    if data.hop is not None:
        onset[1:] &= ~stays
    wrong = (data.labels == NO_EVENT) | (known & (chosen != data.labels))
    minutes = np.full(len(data), data.minutes / len(data))
    return _Counts(
        events=summed(first_of(np.flatnonzero(known))),
        accepted=summed(accepted),
        right=summed(accepted[chosen[accepted] == data.labels[accepted]]),
        false=summed(np.flatnonzero(onset & wrong)),
        minutes=summed(np.arange(len(data)), minutes),
    )


def _choose(counts: Callable[[float], _Counts], grid: Floats, request: FitRequest) -> float:
    """Return the threshold that comes nearest to the accept rate, or the laxest that keeps the promise.

    Raises
    ------
    DecisionError
        If no threshold keeps the promise.
    """
    asked, wanted = request.asked, request.wanted
    found: dict[float, float] = {}

    def rate(strictness: float) -> float:
        if strictness not in found:
            found[strictness] = counts(strictness).rates[asked]
        return found[strictness]

    def keeps(strictness: float) -> bool:
        value = rate(strictness)
        return value >= wanted if asked == "target-accuracy" else value <= wanted

    kept = next((i for i, each in enumerate(grid) if keeps(float(each))), None)
    if kept is None and asked == "accept-rate":
        return float(grid[-1])
    if kept is None:
        finite = [value for value in found.values() if math.isfinite(value)]
        if not finite:
            what = f"of fewer than {FEWEST_ACCEPTED} decisions" if asked == "target-accuracy" else "without times"
            raise DecisionError(f"--{asked} cannot be judged {what}.", "Use more events, and give times or minutes.")
        best = max(finite) if asked == "target-accuracy" else min(finite)
        raise DecisionError(
            f"No threshold reaches --{asked} {wanted:g}: the best is {best:.3g}.", "Ask for less, or use more data."
        )
    high = float(grid[kept])
    low = float(grid[kept - 1]) if kept else high
    for _ in range(N_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return low if asked == "accept-rate" and abs(rate(low) - wanted) < abs(rate(high) - wanted) else high


# ---- regression ---------------------------------------------------------------------------------------------------------------


def _fit_interval(data: CalibrationData, facts: LayerFacts, request: FitRequest, blocks: NDArray[np.intp]) -> Fit:
    assert data.targets is not None
    targets = data.targets
    smooth: tuple[Step, ...] = ()
    if request.smoothing is not None:
        smooth = (Exponential(seconds=request.smoothing),)
    if request.mean_of is not None:
        smooth = (MeanOf(n_windows=request.mean_of),)
    found = LayerDescription(
        name="fit",
        bundle="",
        output_name="prediction",
        n_outputs=1,
        class_names=None,
        steps=(*smooth, _ANY),
        signal=request.signal,
    )
    layer, values = DecisionLayer(found), np.full(len(data), np.nan)
    for i, (row, time, flags, recording) in enumerate(windows_of(data, data.outputs)):
        if i and recording != data.recordings[i - 1]:
            layer.restart()
        state = layer.step(row, time, flags)
        if state.name == "decided" and state.value is not None:
            values[i] = state.value
    good = np.isfinite(values)
    residuals = np.where(good, values - targets, 0.0)
    radius = conformal_radius(residuals[good], request.wanted)
    inside = np.zeros(len(data), np.bool_)
    folds = blocks * N_FOLDS // (blocks.max() + 1)
    for fold in np.unique(folds[good]):
        test = folds == fold
        inside[test] = np.abs(residuals[test]) <= conformal_radius(residuals[good & ~test], request.wanted)
    n_blocks = int(blocks.max()) + 1
    held, all_of_them = (np.bincount(blocks[rows], minlength=n_blocks).astype(np.float64) for rows in (good & inside, good))
    coverage = Figure(**dict(zip(("value", "low", "high"), quotient(held, all_of_them), strict=True)))
    summary = _summary(data, request, int(good.sum()), coverage=coverage)
    layer_of = _described(facts, request, (*smooth, Interval(radius=radius, coverage=request.wanted)), summary)
    return Fit(layer=layer_of, curve=(), threshold=None, notes=())


_ANY = Interval(radius=0.0, coverage=1.0)
"""Decides every window: the residuals decide about the interval."""


def _blocks(data: CalibrationData) -> NDArray[np.intp]:
    """Return the block of each window: a recording, or where there are few, a stretch of time. No event lies in two blocks."""
    n_recordings = int(data.recordings.max(initial=0)) + 1
    if n_recordings >= N_BLOCKS:
        return data.recordings
    blocks = np.arange(len(data)) * N_BLOCKS // max(1, len(data))
    _, first, event = np.unique(data.events, return_index=True, return_inverse=True)
    return np.where(data.events >= 0, blocks[first][event], blocks)
