"""Smooths probabilities, or the numbers of a regression, over windows."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from sjepa_deploy.runtime.decisions.step import Machine, Moment, Step, check_number


@dataclass(frozen=True, kw_only=True)
class Exponential(Step):
    """Exponential mean over time: a window counts 1/e as much after `seconds`.

    The times of the windows decide, not their number: after a lost window the next window counts more.

    Attributes
    ----------
    seconds : float
        Time constant.
    """

    seconds: float

    def __post_init__(self) -> None:
        check_number("The time constant of the smoothing", self.seconds, 0.0, open_low=True)

    def machine(self, n_classes: int) -> Machine:
        """Return the machine that smooths."""
        return _Exponential(self.seconds)

    def __str__(self) -> str:
        return f"They are smoothed over time with a time constant of {self.seconds:g} s."


class _Exponential(Machine):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._mean: list[float] | None = None
        self._time = 0.0

    def step(self, moment: Moment) -> None:
        if moment.state is not None:
            return
        if self._mean is None:
            self._mean = moment.values
        else:
            keep = math.exp((self._time - moment.time) / self._seconds)
            self._mean = [old + (1 - keep) * (new - old) for old, new in zip(self._mean, moment.values, strict=True)]
        self._time = moment.time
        moment.values = self._mean


@dataclass(frozen=True, kw_only=True)
class MeanOf(Step):
    """Mean of the newest windows. Until there are enough of them, the state is undecided.

    Attributes
    ----------
    n_windows : int
        Number of windows.
    """

    n_windows: int

    def __post_init__(self) -> None:
        check_number("The number of windows to average", self.n_windows, 1)

    def machine(self, n_classes: int) -> Machine:
        """Return the machine that averages."""
        return _MeanOf(self.n_windows)

    def __str__(self) -> str:
        return f"The mean of {self.n_windows} windows counts."


class _MeanOf(Machine):
    def __init__(self, n_windows: int) -> None:
        self._n_windows = n_windows
        self._windows: deque[list[float]] = deque(maxlen=n_windows)

    def restart(self) -> None:
        self._windows.clear()

    def step(self, moment: Moment) -> None:
        if moment.state is not None:
            return
        self._windows.append(moment.values)
        n = len(self._windows)
        moment.values = [sum(column) / n for column in zip(*self._windows, strict=True)]
        if n < self._n_windows:
            moment.settle("undecided", f"{n} of {self._n_windows} windows")
