"""Defines what a decision layer says of one window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

StateName = Literal["undecided", "decided", "rejected", "refractory", "no signal"]
STATES: tuple[StateName, ...] = get_args(StateName)
"""States in the order of their codes in records and LSL streams."""


@dataclass(frozen=True, slots=True)
class State:
    """A State says what is decided at one window, and why.

    Attributes
    ----------
    name : {"undecided", "decided", "rejected", "refractory", "no signal"}
        "undecided": more windows may decide. "decided": the class of `class_name`, or the number of `value`. "rejected": this
        window or trial gets no class. "refractory": too soon after the last decision. "no signal": the window says nothing.
    reason : str
        Reason in words.
    class_name : str or None
        Class that is decided. None in every other state, and for a regression.
    probability : float or None
        Probability of the decided class; in other states, of the most probable class. None without signal or classes.
    probabilities : tuple of float
        Probability of each class of the layer, empty without signal or classes.
    value : float or None
        Number that a regression predicts, None without signal.
    interval : (float, float) or None
        Lower and upper end of the interval of `value`.
    """

    name: StateName
    reason: str
    class_name: str | None = None
    probability: float | None = None
    probabilities: tuple[float, ...] = ()
    value: float | None = None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        what: list[str] = [self.name]
        if self.class_name is not None:
            what.append(self.class_name)
        if self.value is not None:
            ends = "" if self.interval is None else " [{:.4g}, {:.4g}]".format(*self.interval)
            what.append(f"{self.value:.4g}{ends}")
        elif self.probability is not None:
            what.append(f"{self.probability:.2f}")
        return f"{' '.join(what)}: {self.reason}"
