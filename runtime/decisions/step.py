"""Defines a step of a decision layer: a frozen configuration, and the state machine that the configuration describes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.state import StateName

TIME_ATOL = 1e-6
"""Seconds by which two equal times may differ: a hop of 0.1 s has no exact number, and LSL stamps are exact to microseconds."""


class Moment:
    """Carries one window through the steps. A layer has one, and fills it anew for every window.

    Attributes
    ----------
    time : float
        Stamp of the newest sample of the window in seconds.
    flags : sequence of str
        Flags of the window, see `sjepa_deploy.runtime.live.decision.Decision.flags`.
    values : list of float
        Outputs of the model; behind the step that makes them, probabilities of the classes. Empty without signal.
    state : str or None
        State of the window once a step has settled it.
    chosen : int
        Number of the decided class; -1 for none.
    reason : str
        Reason of `state`, in words.
    interval : (float, float) or None
        Interval of a regression.
    """

    __slots__ = ("chosen", "flags", "interval", "reason", "state", "time", "values")

    def __init__(self) -> None:
        self.fill(0.0, (), [])

    def fill(self, time: float, flags: Sequence[str], values: list[float]) -> None:
        """Take the next window."""
        self.time, self.flags, self.values = time, flags, values
        self.state: StateName | None = None
        self.chosen, self.reason = -1, ""
        self.interval: tuple[float, float] | None = None

    def settle(self, state: StateName, reason: str, chosen: int = -1) -> None:
        """Set the state of the window. A later step may set another state."""
        self.state, self.reason, self.chosen = state, reason, chosen


class Machine:
    """A Machine is a step at work: the result depends on the windows since `restart` alone, never on a clock."""

    def step(self, moment: Moment) -> None:
        """Take the next window and change `moment`. Windows whose state an earlier step has settled come too."""
        raise NotImplementedError

    def settled(self, moment: Moment) -> None:
        """Take the state that all steps together gave the window."""

    def interrupt(self) -> None:
        """Forget what belongs to the signal before a pause."""
        self.restart()

    def restart(self) -> None:
        """Forget everything."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Describes one step of a layer. `str` gives the step in words."""

    @property
    def trial_windows(self) -> int:
        """Most windows of a trial that the step adds up before it waits for the flag "new trial"; 0: it waits for no trial."""
        return 0

    def machine(self, n_classes: int) -> Machine:
        """Return the machine of the step for a layer of `n_classes` classes, 0 for a regression.

        Raises
        ------
        DecisionError
            If the step does not fit this number of classes.
        """
        raise NotImplementedError


def check_number(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Refuse a number of a step that lies outside its range.

    Raises
    ------
    DecisionError
        If `value` is not finite, below `low` (with `open_low`, also if it equals `low`) or above `high`.
    """
    if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
        least = f"above {low:g}" if open_low else f"{low:g} or more"
        raise DecisionError(f"{name} is {value:g}.", f"Use {least}." if high == math.inf else f"Use {least}, at most {high:g}.")


def needs_classes(step: Step, n_classes: int) -> None:
    """Refuse a step that chooses classes in the layer of a regression.

    Raises
    ------
    DecisionError
        If `n_classes` is below two.
    """
    if n_classes < 2:
        raise DecisionError(f"The step {type(step).__name__} needs classes, and a regression has none.", "Leave the step out.")
