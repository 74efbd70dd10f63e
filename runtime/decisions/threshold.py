"""Decides a class by its probability, with a reject option and hysteresis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.step import Machine, Moment, Step, check_number, needs_classes

Below = Literal["undecided", "rejected"]


@dataclass(frozen=True, kw_only=True)
class Threshold(Step):
    """Decides the most probable class from a probability on, and keeps it down to a lower one.

    Attributes
    ----------
    enter : float
        Probability from which on a class is decided.
    leave : float or None
        Probability down to which a decided class stays decided. None takes `enter`: there is no hysteresis.
    below : {"undecided", "rejected"}
        State of other windows: "undecided" where more windows come, "rejected" where each window is a trial of its own.
    """

    enter: float
    leave: float | None = None
    below: Below = "undecided"

    def __post_init__(self) -> None:
        check_number("The threshold", self.enter, 0.0, 1.0)
        if self.leave is not None:
            check_number("The threshold to leave a class", self.leave, 0.0, self.enter)
        if self.below not in get_args(Below):
            raise DecisionError(f"{self.below!r} is no state below a threshold.", f"Use {' or '.join(get_args(Below))}.")

    def machine(self, n_classes: int) -> Machine:
        """Return the machine that decides."""
        needs_classes(self, n_classes)
        return _Threshold(self.enter, self.enter if self.leave is None else self.leave, self.below)

    def __str__(self) -> str:
        kept = "" if self.leave is None else f" and stays down to {self.leave:.4g}"
        return f"A class is decided from a probability of {self.enter:.4g} on{kept}; below, windows are {self.below}."


class _Threshold(Machine):
    def __init__(self, enter: float, leave: float, below: Below) -> None:
        self._enter, self._leave, self._below = enter, leave, below
        self._chosen = -1

    def restart(self) -> None:
        self._chosen = -1

    def step(self, moment: Moment) -> None:
        if moment.state is not None:
            self._chosen = -1
            return
        values = moment.values
        largest = max(values)
        if largest >= self._enter:
            self._chosen = values.index(largest)
            moment.settle("decided", "probability reached the threshold", self._chosen)
        elif self._chosen >= 0 and values[self._chosen] >= self._leave:
            moment.settle("decided", "probability is above the lower threshold", self._chosen)
        else:
            self._chosen = -1
            moment.settle(self._below, "probability is below the threshold")
