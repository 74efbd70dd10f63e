"""Fits all of a chain but its threshold, and runs chains with a threshold on the data of the fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.accumulate import NEW_TRIAL, SMALLEST_PROBABILITY, Accumulate, Rule, p_largest
from sjepa_deploy.runtime.decisions.calibrate import as_logits, bayes_thresholds, bayes_thresholds_for, fit_temperature
from sjepa_deploy.runtime.decisions.data import NO_EVENT, CalibrationData
from sjepa_deploy.runtime.decisions.description import LayerDescription
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.pauses import Dwell, Refractory
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.signal import Signal
from sjepa_deploy.runtime.decisions.smoothing import Exponential, MeanOf
from sjepa_deploy.runtime.decisions.step import Step, check_number
from sjepa_deploy.runtime.decisions.threshold import Threshold

Asked = Literal["accept-rate", "max-false-per-minute", "target-accuracy", "coverage"]
Stop = Literal["fixed", "margin", "probability", "value", "distribution", "bayes", "bds1", "bds2"]
"""Rules of `Accumulate`, and two more ways to fit the thresholds of the rule "bayes" (`bayes_thresholds_for`)."""

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

FEWEST_EVENTS = 20
"""Fewer events say nothing about a threshold: the accept rate of 20 has an interval of +/- 20 points."""

N_CURVE = 41
"""Thresholds of the curve."""

COST_RATIOS = (1e-4, 1e4)
"""Range of the cost ratio of Bayesian stopping, from decisions at once to hardly any."""


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """Says what to fit.

    Attributes
    ----------
    asked : {"accept-rate", "max-false-per-minute", "target-accuracy", "coverage"}
        What the threshold is chosen by; "coverage" for a regression.
    wanted : float
        Its value.
    prevalence : tuple of float or None
        Share of each class where the layer decides. None takes that of the data.
    smoothing : float or None
        Time constant of an exponential mean in seconds.
    mean_of : int or None
        Number of windows to average.
    hysteresis : float
        How far the probability of a decided class may fall below the threshold.
    dwell, refractory : float
        Seconds, see `sjepa_deploy.runtime.decisions.pauses`.
    stop : {"fixed", "margin", "probability", "value", "distribution", "bayes", "bds1", "bds2"} or None
        Rule by which the evidence of the windows of an event is added up. None decides each window by itself.
    target_pf, target_pd : float
        Of "bds1" and "bds2": probabilities of a false decision and of one for the true class, see `bayes_thresholds_for`. They
        choose the thresholds, so that what is asked for is only checked.
    most : int or None
        Most windows of an event. None takes the median over the events.
    signal : Signal
        Which windows are no signal.

    Raises
    ------
    DecisionError
        If a value is outside its range, or steps do not go together.
    """

    asked: Asked
    wanted: float
    prevalence: tuple[float, ...] | None = None
    smoothing: float | None = None
    mean_of: int | None = None
    hysteresis: float = 0.0
    dwell: float = 0.0
    refractory: float = 0.0
    stop: Stop | None = None
    target_pf: float = 0.05
    target_pd: float = 0.8
    most: int | None = None
    signal: Signal = field(default_factory=Signal)

    def __post_init__(self) -> None:
        if self.asked not in get_args(Asked):
            raise DecisionError(f"{self.asked!r} is nothing to fit.", f"Use one of {', '.join(get_args(Asked))}.")
        rate = self.asked == "max-false-per-minute"
        check_number(f"--{self.asked}", self.wanted, 0.0, math.inf if rate else 1.0, open_low=not rate)
        check_number("The hysteresis", self.hysteresis, 0.0, 1.0)
        check_number("The probability of a false decision", self.target_pf, 0.0, 1.0)
        check_number("The probability of a decision for the true class", self.target_pd, 0.0, 1.0)
        if self.stop is not None and (self.smoothing or self.mean_of or self.hysteresis or self.dwell):
            raise DecisionError("Added evidence is not smoothed, and needs no dwell time.", "Leave one of them out.")
        if self.smoothing is not None and self.mean_of is not None:
            raise DecisionError("Both an exponential mean and a mean of windows are asked for.", "Leave one of them out.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Holds steps that are fitted but for one threshold, and thresholds to try, from the laxest on."""

    front: tuple[Step, ...]
    back: Callable[[float], tuple[Step, ...]]
    grid: Floats


def shares_of(data: CalibrationData, n_classes: int) -> Floats:
    """Return the share of the events of each class."""
    first = np.unique(np.where(data.labels >= 0, data.events, NO_EVENT), return_index=True)[1]
    labels = data.labels[first]
    counts = np.bincount(labels[labels >= 0], minlength=n_classes).astype(np.float64)
    shares: Floats = counts / counts.sum()
    return shares


def fit_model(data: CalibrationData, class_names: tuple[str, ...], request: FitRequest) -> Model:
    """Fit all but the threshold."""
    n_classes = len(class_names)
    good = np.isfinite(data.outputs).all(axis=1)
    good &= np.array([not set(request.signal.refuse).intersection(flags) for flags in data.flags], np.bool_)
    rows = good & (data.labels >= 0)
    if not rows.any():
        raise DecisionError("No window of an event is a signal.", "Look at the flags of the windows, or use --no-signal.")
    temperature = fit_temperature(as_logits(data.outputs[rows]), data.labels[rows])
    shares = None if request.prevalence is None else tuple(shares_of(data, n_classes).tolist())
    prior = {} if shares is None else {"fitted_prevalence": shares, "prevalence": request.prevalence}
    if request.stop is not None:
        return _fit_stopping(data, class_names, request, Probabilities(temperature=temperature), prior)
    front: list[Step] = [Probabilities(temperature=temperature, **prior)]
    if request.smoothing is not None:
        front.append(Exponential(seconds=request.smoothing))
    if request.mean_of is not None:
        front.append(MeanOf(n_windows=request.mean_of))
    before = (Refractory(seconds=request.refractory),) if request.refractory else ()
    after = (Dwell(seconds=request.dwell),) if request.dwell else ()
    below: Literal["undecided", "rejected"] = "rejected" if data.hop is None else "undecided"

    def back(enter: float) -> tuple[Step, ...]:
        leave = max(0.0, enter - request.hysteresis) if request.hysteresis else None
        return (*before, Threshold(enter=enter, leave=leave, below=below), *after)

    values = values_of(tuple(front), data, class_names, request.signal)
    return Model(front=tuple(front), back=back, grid=_grid(values.max(axis=1)))


def _fit_stopping(
    data: CalibrationData,
    class_names: tuple[str, ...],
    request: FitRequest,
    probabilities: Probabilities,
    prior: dict[str, tuple[float, ...] | None],
) -> Model:
    """Fit the evidence of the windows of an event: a temperature for each number of windows, and what is to be exceeded."""
    assert request.stop is not None
    rule = request.stop
    values = values_of((probabilities,), data, class_names, request.signal)
    by_event = [rows for rows in _by_event(data) if np.isfinite(values[rows]).all()]
    most = request.most or int(np.median([len(rows) for rows in by_event] or [0]))
    trials = [rows[:most] for rows in by_event if len(rows) >= most]
    if most < 1 or len(trials) < FEWEST_EVENTS:
        raise DecisionError(
            f"{len(trials)} events have {most} windows to add up.", f"Use {FEWEST_EVENTS} events or more with so many, or --most."
        )
    sums = np.cumsum(np.log(np.maximum(values[np.stack(trials)], SMALLEST_PROBABILITY)), axis=1)
    labels = data.labels[[rows[0] for rows in trials]]
    temperatures = tuple(fit_temperature(sums[:, n], labels) for n in range(most))
    scaled = np.exp((sums - sums.max(axis=2, keepdims=True)) / np.array(temperatures)[:, None])
    posterior = (scaled / scaled.sum(axis=2, keepdims=True)).max(axis=2)
    ordered = np.sort(sums, axis=2)
    margins = ordered[:, :, -1] - ordered[:, :, -2]
    alone = np.ones(1)  # the targets of the rule choose the thresholds, for equal costs
    grids: dict[Stop, Callable[[], Floats]] = {
        "fixed": lambda: _grid(posterior[:, -1]),
        "probability": lambda: _grid(posterior.ravel()),
        "margin": lambda: _grid(margins.ravel()),
        "value": lambda: _grid((ordered[:, :, -1] - sums.mean(axis=2)).ravel()),
        "distribution": lambda: _grid(np.array([p_largest(row) for row in sums.reshape(-1, sums.shape[2]).tolist()])),
        "bayes": lambda: np.geomspace(*COST_RATIOS, N_CURVE),
        "bds1": lambda: alone,
        "bds2": lambda: alone,
    }

    def thresholds(strictness: float) -> tuple[float | None, ...]:
        if rule == "bayes":
            return bayes_thresholds(sums, labels, strictness)[0]
        if rule in ("bds1", "bds2"):
            targets = {"target_pf": request.target_pf, "target_pd": request.target_pd}
            return bayes_thresholds_for(rule, sums, labels, strictness, **targets)
        return (strictness,) * most if rule != "fixed" else (None,) * (most - 1) + (strictness,)

    same: dict[Stop, Rule] = {rule: rule for rule in get_args(Rule)}
    compared = same | {"fixed": "probability", "bds1": "bayes", "bds2": "bayes"}

    def back(strictness: float) -> tuple[Step, ...]:
        evidence = Accumulate(
            rule=compared[rule],
            most=most,
            thresholds=thresholds(strictness),
            temperatures=temperatures,
            at_most="reject",
            waits=data.hop is None,
            **prior,  # type: ignore[arg-type]
        )
        return (Refractory(seconds=request.refractory), evidence) if request.refractory else (evidence,)

    return Model(front=(probabilities,), back=back, grid=grids[rule]())


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """Holds what a chain decides: arrays of shape (n_windows,).

    Attributes
    ----------
    decided : ndarray of bool
        Whether a class is decided.
    chosen : ndarray of int
        Number of this class; -1 for none.
    best, likely : ndarray
        Probability and number of the most probable class; NaN and -1 without signal.
    """

    decided: Mask
    chosen: NDArray[np.intp]
    best: Floats
    likely: NDArray[np.intp]

    @classmethod
    def empty(cls, n: int) -> Outcome:
        """Return the outcome of `n` windows without signal."""
        return cls(decided=np.zeros(n, np.bool_), chosen=np.full(n, -1), best=np.full(n, np.nan), likely=np.full(n, -1))

    def put(self, rows: Mask, other: Outcome) -> None:
        """Take the outcome of some windows."""
        self.decided[rows], self.chosen[rows] = other.decided, other.chosen
        self.best[rows], self.likely[rows] = other.best, other.likely


def _by_event(data: CalibrationData) -> list[NDArray[np.intp]]:
    """Return the windows of each event, in order."""
    rows = np.flatnonzero(data.labels >= 0)
    order = np.argsort(data.events[rows], kind="stable")
    _, first = np.unique(data.events[rows][order], return_index=True)
    return np.split(rows[order], first[1:])


def _grid(confidence: Floats) -> Floats:
    """Return thresholds that accept more and more of what has this confidence, the laxest first."""
    finite = confidence[np.isfinite(confidence)]
    levels = np.concatenate([np.linspace(0, 1, N_CURVE - 3), [0.985, 0.995, 0.999]])
    return np.unique(np.quantile(finite, levels))


def _layer(steps: tuple[Step, ...], class_names: tuple[str, ...], n_outputs: int, signal: Signal) -> DecisionLayer:
    return DecisionLayer(
        LayerDescription(
            name="fit",
            bundle="",
            output_name="prediction",
            n_outputs=n_outputs,
            class_names=class_names,
            steps=steps,
            signal=signal,
        )
    )


def values_of(front: tuple[Step, ...], data: CalibrationData, class_names: tuple[str, ...], signal: Signal) -> Floats:
    """Return the probabilities of each window, shape (n_windows, n_classes); NaN where there is no signal."""
    layer = _layer(front, class_names, data.outputs.shape[1], signal)
    nothing = (math.nan,) * len(class_names)
    values = np.empty((len(data), len(class_names)))
    for i, (row, time, flags, recording) in enumerate(windows_of(data, data.outputs)):
        if i and recording != data.recordings[i - 1]:
            layer.restart()
        values[i] = layer.step(row, time, flags).probabilities or nothing
    return values


def windows_of(data: CalibrationData, values: Floats) -> zip[tuple[Floats, float, tuple[str, ...], int]]:
    """Return `values`, time, flags and recording of each window."""
    return zip(values, data.times.tolist(), data.flags, data.recordings.tolist(), strict=True)


def simulated(
    back: tuple[Step, ...], values: Floats, data: CalibrationData, class_names: tuple[str, ...], request: FitRequest
) -> Outcome:
    """Return what the end of a chain decides, given the `values_of` its front."""
    outcome = Outcome.empty(len(data))
    if len(back) == 1 and isinstance(back[0], Threshold) and back[0].leave is None:  # each window by itself, all at once
        outcome.best[:] = values.max(axis=1)
        outcome.likely[:] = np.where(np.isfinite(outcome.best), values.argmax(axis=1), -1)
        outcome.decided[:] = outcome.best >= back[0].enter
        outcome.chosen[:] = np.where(outcome.decided, outcome.likely, -1)
        return outcome
    layer = _layer(back, class_names, len(class_names), request.signal)
    begins = np.diff(data.events, prepend=-3) != 0
    in_trials = request.stop is not None and data.hop is None
    for i, (row, time, flags, recording) in enumerate(windows_of(data, values)):
        if i and recording != data.recordings[i - 1]:
            layer.restart()
        state = layer.step(row, time, (*flags, NEW_TRIAL) if begins[i] and in_trials else flags)
        if state.class_name is not None:
            outcome.decided[i], outcome.chosen[i] = True, class_names.index(state.class_name)
        if state.probability is not None:
            outcome.best[i], outcome.likely[i] = state.probability, state.probabilities.index(max(state.probabilities))
    return outcome
