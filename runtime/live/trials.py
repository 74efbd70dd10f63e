"""Says to which trial of an experiment an event belongs, and steps a decision layer through the events of trials."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.accumulate import NEW_TRIAL, NO_TRIAL
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.state import State
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.schedule import Events

MOST_STARTS = 10_000
"""Beginnings of trials that are kept for late markers."""


class Trials:
    """Knows when trials began. A trial lasts from an event that begins one to the next such event, by their onsets.

    Parameters
    ----------
    starts : sequence of str
        Descriptions of the events that begin a trial.
    """

    def __init__(self, starts: Sequence[str]) -> None:
        self._starts = frozenset(starts)
        self._onsets: list[float] = []

    def came(self, event: Event, now: float) -> None:
        """Take an event. A trial that began in a pause counts from `now`, the time of the newest sample."""
        if event.description in self._starts:
            bisect.insort(self._onsets, now if math.isnan(event.onset) else event.onset)
            if len(self._onsets) > MOST_STARTS:
                del self._onsets[0]

    def of(self, event: Event) -> float | None:
        """Return when the trial of an event began, as far as its marker has come; None if the event is in no trial."""
        at = bisect.bisect_right(self._onsets, event.onset)
        return self._onsets[at - 1] if at else None


class EventSteps:
    """Steps a decision layer through the windows of events in the order of their decisions, also of events with late markers.

    The first window of a trial gets the flag "new trial". A window of an earlier trial, or of none, gets the flag "no trial".

    Parameters
    ----------
    layer : DecisionLayer
        The layer.
    events : Events
        The events. Without `trial_starts` each event is a trial of a layer that waits for trials.

    Raises
    ------
    DecisionError
        If the layer adds up the events of a trial, and nothing says what begins a trial.
    """

    def __init__(self, layer: DecisionLayer, events: Events) -> None:
        most = max(step.trial_windows for step in layer.description.steps)
        if most > 1 and not events.trial_starts:
            raise DecisionError(
                f"The decision layer {layer.description.name} adds up the evidence of up to {most} events of a trial.",
                "Name the events that begin a trial with --trial-starts (`Events.trial_starts`).",
            )
        self._layer, self._alone, self._in_trials = layer, most == 1, bool(events.trial_starts)
        self._newest = self._trial = -math.inf

    def step(self, outputs: NDArray[np.float32] | None, time: float, flags: tuple[str, ...], trial: float | None) -> State:
        """Return the state of the next window.

        Parameters
        ----------
        outputs, time, flags
            See `DecisionLayer.step`. A window that is older than the last one, as of a late marker, counts as of its time.
        trial : float or None
            When the trial of the window began.
        """
        self._newest = max(self._newest, time)
        if self._in_trials:
            if trial is None or trial < self._trial:
                flags = (*flags, NO_TRIAL)
            elif trial > self._trial:
                self._trial = trial
                flags = (*flags, NEW_TRIAL)
        elif self._alone:
            flags = (*flags, NEW_TRIAL)
        return self._layer.step(outputs, self._newest, flags)
