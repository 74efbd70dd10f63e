"""Puts an interval around the number that a regression predicts."""

from __future__ import annotations

from dataclasses import dataclass

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.step import Machine, Moment, Step, check_number


@dataclass(frozen=True, kw_only=True)
class Interval(Step):
    """Interval around a prediction that holds a new target with a stated probability (split conformal prediction).

    Attributes
    ----------
    radius : float
        Half of the interval, in the unit of the target, see `sjepa_deploy.runtime.decisions.calibrate.conformal_radius`.
    coverage : float
        Share of targets that lie inside, where new windows are like those of the calibration.
    """

    radius: float
    coverage: float

    def __post_init__(self) -> None:
        check_number("The radius", self.radius, 0.0)
        check_number("The coverage", self.coverage, 0.0, 1.0, open_low=True)

    def machine(self, n_classes: int) -> Machine:
        """Return the machine that adds the interval."""
        if n_classes:
            raise DecisionError("An interval is of a number, and this layer has classes.", "Leave the step out.")
        return _Interval(self.radius, f"{self.coverage:.0%} interval")

    def __str__(self) -> str:
        return f"The interval is the prediction -/+ {self.radius:.4g} and holds {self.coverage:.0%} of the targets."


class _Interval(Machine):
    def __init__(self, radius: float, reason: str) -> None:
        self._radius, self._reason = radius, reason

    def step(self, moment: Moment) -> None:
        if moment.state is None:
            (value,) = moment.values
            moment.interval = value - self._radius, value + self._radius
            moment.settle("decided", self._reason)
