"""Fits a decision layer on events with known classes, and says what the layer does on events that it was not fitted on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sjepa_deploy.errors import DecisionError, listed
from sjepa_deploy.files import now
from sjepa_deploy.runtime.decisions.calibrate import calibration_error, conformal_radius
from sjepa_deploy.runtime.decisions.chain import FEWEST_EVENTS, FitRequest, Floats, Outcome, windows_of
from sjepa_deploy.runtime.decisions.data import CalibrationData
from sjepa_deploy.runtime.decisions.description import Figure, FitSummary, LayerDescription, LayerFacts
from sjepa_deploy.runtime.decisions.interval import Interval
from sjepa_deploy.runtime.decisions.judge import Judge, blocks_of
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.smoothing import Exponential, MeanOf
from sjepa_deploy.runtime.decisions.step import Step
from sjepa_deploy.runtime.intervals import quotient

N_FOLDS = 5
"""Parts for cross-fitting."""

ACCEPT_ATOL = 0.02
"""Difference from the accept rate that was asked for which is told."""


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
    return (_fit_interval if facts.class_names is None else _fit_classes)(data, facts, request)


def _fit_classes(data: CalibrationData, facts: LayerFacts, request: FitRequest) -> Fit:
    assert facts.class_names is not None
    notes = _check_events(data, facts.class_names, request)
    judge = Judge.of(data, facts.class_names, request)
    model = judge.fitted()
    values = judge.values(model)
    threshold = judge.choose(model, values)
    unseen, curve = _cross_fitted(judge, model.grid)
    known = data.labels >= 0
    judged = known & np.isfinite(unseen.best) & (unseen.decided if request.stop is not None else True)
    error = None
    if judged.any():
        right = unseen.likely[judged] == data.labels[judged]
        error = calibration_error(unseen.best[judged], right, weights=judge.weights[judged])
    reached = judge.counts(judge.outcome(model, threshold, values)).rates[request.asked]
    if request.asked == "accept-rate" and abs(reached - request.wanted) > ACCEPT_ATOL:
        notes.append(f"No threshold accepts {request.wanted:.1%} of these events: the nearest accepts {reached:.1%}.")
    n_events = len(np.unique(data.events[known]))
    summary = _summary(data, request, n_events, calibration_error=error, **_figures(judge, unseen))
    layer = _described(facts, request, (*model.front, *model.back(threshold)), summary)
    points = [
        CurvePoint(threshold=float(each), **_figures(judge, outcome)) for each, outcome in zip(model.grid, curve, strict=True)
    ]
    return Fit(layer=layer, curve=tuple(points), threshold=threshold, notes=tuple(notes))


def _check_events(data: CalibrationData, class_names: tuple[str, ...], request: FitRequest) -> list[str]:
    """Refuse data that nothing can be fitted on, and return sentences on what is missing."""
    known = data.labels >= 0
    n_events = len(np.unique(data.events[known]))
    there = np.unique(data.labels[known])
    if n_events < FEWEST_EVENTS:
        raise DecisionError(f"There are {n_events} events to fit on.", f"Use {FEWEST_EVENTS} or more.")
    if len(there) < 2:
        only = class_names[there[0]]
        raise DecisionError(f"All events are of the class {only}.", "Use events of every class that is to be told apart.")
    missing = [name for i, name in enumerate(class_names) if i not in there]
    if missing and request.prevalence is not None:
        raise DecisionError(f"There are no events of {listed(missing)}.", "Leave --prevalence out, or add events of them.")
    return [f"There are no events of {listed(missing)}."] if missing else []


def _cross_fitted(judge: Judge, grid: Floats) -> tuple[Outcome, list[Outcome]]:
    """Return what is decided of windows that were not fitted on: with the threshold of the others, and with each of `grid`."""
    n = len(judge.data)
    chosen, curve = Outcome.empty(n), [Outcome.empty(n) for _ in grid]
    folds = judge.blocks * N_FOLDS // (judge.blocks.max() + 1)
    for fold in np.unique(folds):
        test = folds == fold
        mine, others = judge.picked(test), judge.picked(~test)
        if len(np.unique(others.data.labels[others.data.labels >= 0])) < 2:
            raise DecisionError("The events of each class follow each other.", "Mix the classes over the recording.")
        model = others.fitted()
        threshold = others.choose(model, others.values(model))
        values = mine.values(model)
        chosen.put(test, mine.outcome(model, threshold, values))
        for each, outcome in zip(grid, curve, strict=True):
            outcome.put(test, mine.outcome(model, float(each), values))
    return chosen, curve


def _figures(judge: Judge, outcome: Outcome) -> dict[str, Figure]:
    accept_rate, accuracy, false_per_minute = judge.counts(outcome).figures
    return {"accept_rate": accept_rate, "accuracy": accuracy, "false_per_minute": false_per_minute}


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


def _fit_interval(data: CalibrationData, facts: LayerFacts, request: FitRequest) -> Fit:
    assert data.targets is not None
    blocks = blocks_of(data)
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
