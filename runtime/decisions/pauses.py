"""Delays decisions: a class must last before it counts (dwell), and after a decision comes a pause (refractory)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sjepa_deploy.runtime.decisions.step import TIME_ATOL, Machine, Moment, Step, check_number


@dataclass(frozen=True, kw_only=True)
class Dwell(Step):
    """A class counts once it was decided for some time without a break.

    Attributes
    ----------
    seconds : float
        The time.
    """

    seconds: float

    def __post_init__(self) -> None:
        check_number("The dwell time", self.seconds, 0.0)

    def machine(self, n_classes: int) -> Machine:
        """Return the machine that waits."""
        return _Dwell(self.seconds)

    def __str__(self) -> str:
        return f"The class must last for {self.seconds:g} s."


class _Dwell(Machine):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds - TIME_ATOL
        self.restart()

    def restart(self) -> None:
        self._candidate, self._since = -1, 0.0

    def step(self, moment: Moment) -> None:
        if moment.state != "decided":
            self._candidate = -1
            return
        if moment.chosen != self._candidate:
            self._candidate, self._since = moment.chosen, moment.time
        if moment.time - self._since < self._seconds:
            moment.settle("undecided", "the class has not lasted long enough")


@dataclass(frozen=True, kw_only=True)
class Refractory(Step):
    """Nothing is decided for some time after a decision.

    The step stands before those that decide: thresholds, dwell times and evidence begin anew after the pause.

    Attributes
    ----------
    seconds : float
        The time, from the window of the decision on.
    """

    seconds: float

    def __post_init__(self) -> None:
        check_number("The refractory time", self.seconds, 0.0)

    def machine(self, n_classes: int) -> Machine:
        """Return the machine that waits."""
        return _Refractory(self.seconds)

    def __str__(self) -> str:
        return f"After a decision nothing is decided for {self.seconds:g} s."


class _Refractory(Machine):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds - TIME_ATOL
        self.restart()

    def restart(self) -> None:
        self._until = -math.inf

    def interrupt(self) -> None:
        """Keep the pause: a loss of signal does not end it."""

    def step(self, moment: Moment) -> None:
        if moment.state != "no signal" and moment.time < self._until:
            moment.settle("refractory", "too soon after the last decision")

    def settled(self, moment: Moment) -> None:
        if moment.state == "decided":
            self._until = moment.time + self._seconds
