"""Judges chains on the data of a fit: counts decisions by blocks, and chooses the threshold that keeps a promise."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.chain import (
    Asked,
    FitRequest,
    Floats,
    Mask,
    Model,
    Outcome,
    fit_model,
    shares_of,
    simulated,
    values_of,
)
from sjepa_deploy.runtime.decisions.data import NO_EVENT, CalibrationData
from sjepa_deploy.runtime.decisions.description import Figure
from sjepa_deploy.runtime.intervals import quotient

N_BLOCKS = 10
"""Blocks of neighbouring events, for intervals."""

FEWEST_ACCEPTED = 10
"""Fewer decisions keep no promise about their accuracy."""

N_BISECTIONS = 12
"""Steps between two thresholds of the curve, which lie 2.5 % of the windows apart."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Holds what was decided, by blocks: arrays of shape (n_blocks,).

    Attributes
    ----------
    events, accepted, right : ndarray
        Events, events with a decision, and events whose first decision is right.
    false : ndarray
        Decisions that are wrong or belong to no event.
    minutes : ndarray
        Minutes of signal.
    """

    events: Floats
    accepted: Floats
    right: Floats
    false: Floats
    minutes: Floats

    @property
    def rates(self) -> dict[Asked, float]:
        """Return the rates that a threshold is chosen by; NaN where nothing can be said."""
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """Runs chains on data and counts what they decide.

    Attributes
    ----------
    data : CalibrationData
        The data.
    class_names : tuple of str
        Classes of the layer.
    request : FitRequest
        What is asked for.
    weights : ndarray, shape (n_windows,)
        What each window counts: more for a class that is rarer in the data than where the layer decides.
    blocks : ndarray of int, shape (n_windows,)
        Block of each window.
    """

    data: CalibrationData
    class_names: tuple[str, ...]
    request: FitRequest
    weights: Floats
    blocks: NDArray[np.intp]

    @classmethod
    def of(cls, data: CalibrationData, class_names: tuple[str, ...], request: FitRequest) -> Judge:
        """Return a judge of all the data."""
        weights = np.ones(len(data))
        if request.prevalence is not None:
            ratios = np.array(request.prevalence) / shares_of(data, len(class_names))
            weights = np.where(data.labels >= 0, ratios[np.maximum(data.labels, 0)], 1.0)
        return cls(data=data, class_names=class_names, request=request, weights=weights, blocks=blocks_of(data))

    def picked(self, rows: Mask) -> Judge:
        """Return a judge of the windows of a mask."""
        return dataclasses.replace(self, data=self.data.picked(rows), weights=self.weights[rows], blocks=self.blocks[rows])

    def fitted(self) -> Model:
        """Return the chain that is fitted on the data, but for its threshold."""
        return fit_model(self.data, self.class_names, self.request)

    def values(self, model: Model) -> Floats:
        """Return what the front of a chain makes of the data."""
        return values_of(model.front, self.data, self.class_names, self.request.signal)

    def outcome(self, model: Model, threshold: float, values: Floats) -> Outcome:
        """Return what a chain with a threshold decides."""
        return simulated(model.back(threshold), values, self.data, self.class_names, self.request)

    def counts(self, outcome: Outcome) -> Counts:
        """Count events with a decision, right ones, and decisions that are wrong or belong to no event."""
        return counted(self.data, outcome, self.blocks, self.weights)

    def choose(self, model: Model, values: Floats) -> float:
        """Return the threshold that comes nearest to the accept rate, or the laxest that keeps the promise.

        Raises
        ------
        DecisionError
            If no threshold keeps the promise.
        """
        asked, wanted, grid = self.request.asked, self.request.wanted, model.grid
        found: dict[float, float] = {}

        def rate(strictness: float) -> float:
            if strictness not in found:
                found[strictness] = self.counts(self.outcome(model, strictness, values)).rates[asked]
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


def counted(data: CalibrationData, outcome: Outcome, blocks: NDArray[np.intp], weights: Floats) -> Counts:
    """Count events with a decision, right ones, and decisions that are wrong or belong to no event.

    Parameters
    ----------
    data : CalibrationData
        The truth.
    outcome : Outcome
        What is decided.
    blocks : ndarray of int, shape (n_windows,)
        Block of each window.
    weights : ndarray, shape (n_windows,)
        What each window counts.
    """
    decided, chosen = outcome.decided, outcome.chosen
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
    return Counts(
        events=summed(first_of(np.flatnonzero(known))),
        accepted=summed(accepted),
        right=summed(accepted[chosen[accepted] == data.labels[accepted]]),
        false=summed(np.flatnonzero(onset & wrong)),
        minutes=summed(np.arange(len(data)), minutes),
    )


def blocks_of(data: CalibrationData) -> NDArray[np.intp]:
    """Return the block of each window: a recording, or where there are few, a stretch of time. No event lies in two blocks."""
    n_recordings = int(data.recordings.max(initial=0)) + 1
    if n_recordings >= N_BLOCKS:
        return data.recordings
    blocks = np.arange(len(data)) * N_BLOCKS // max(1, len(data))
    _, first, event = np.unique(data.events, return_index=True, return_inverse=True)
    return np.where(data.events >= 0, blocks[first][event], blocks)
