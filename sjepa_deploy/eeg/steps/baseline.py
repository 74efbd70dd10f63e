"""Subtracts from each event window what was there in a stretch of it, such as the time before the event."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sjepa_deploy.eeg.steps.base import FloatArray, Flow, Goal, WindowStep
from sjepa_deploy.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Baseline(WindowStep):
    """Subtracts from each channel of an event window its mean over a stretch, as MNE's ``baseline=(tmin, tmax)`` does.

    Attributes
    ----------
    tmin, tmax : float or None
        The stretch in seconds after the event; samples at both ends belong to it. None is the window's end on that side. The
        defaults are MNE's: from the window's start to the event.
    """

    name: ClassVar[str] = "baseline"

    tmin: float | None = None
    tmax: float | None = 0.0

    def __post_init__(self) -> None:
        if any(edge is not None and not math.isfinite(edge) for edge in (self.tmin, self.tmax)):
            raise SpecError(
                "The baseline has an edge that is no number.", "Use seconds after the event, or None for the window's end."
            )
        if self.tmin is not None and self.tmax is not None and self.tmin > self.tmax:
            raise SpecError(f"The baseline ends at {self.tmax:g} s, before its start at {self.tmin:g} s.", "Swap its ends.")

    def check(self, goal: Goal) -> None:
        """Refuse windows that belong to no events, and a stretch that is not inside the window."""
        if goal.start is None:
            raise SpecError(
                "A baseline is a stretch of an event window, and the windows of this model belong to no events.",
                "State where the window starts after its event, or leave the baseline out.",
            )
        first, last = self._stretch(goal)
        step = 1 / goal.sfreq  # of tolerance, as MNE has it
        start, stop = goal.start, goal.start + (goal.n_times - 1) * step
        outside = (self.tmin is not None and self.tmin < start - step) or (self.tmax is not None and self.tmax > stop + step)
        if outside or last <= first:
            raise SpecError(
                f"The baseline, {self._told()}, is not inside the window, which has samples from {start:g} to {stop:g} s.",
                "Move the baseline into the window, or start the window earlier.",
            )

    def told(self, flow: Flow) -> str:
        """Return the stretch."""
        return f"less the baseline of {self._told()} after the event"

    def on_windows(self, windows: FloatArray, goal: Goal) -> FloatArray:
        """Return the windows less their baseline, shape (..., n_chans, n_times)."""
        first, last = self._stretch(goal)
        windows = np.ascontiguousarray(windows)  # sums run along the times, window by window
        corrected: FloatArray = windows - windows[..., first:last].mean(axis=-1, keepdims=True)
        return corrected

    def _stretch(self, goal: Goal) -> tuple[int, int]:
        """Return the first sample of the stretch, and the one after its last: those whose times lie in it, as in MNE."""
        assert goal.start is not None, "the contract was checked"
        times = np.arange(round(goal.start * goal.sfreq), round(goal.start * goal.sfreq) + goal.n_times) / goal.sfreq
        first = 0 if self.tmin is None else int(np.searchsorted(times, self.tmin, "left"))
        last = goal.n_times if self.tmax is None else int(np.searchsorted(times, self.tmax, "right"))
        return first, last

    def _told(self) -> str:
        start = "the window's start" if self.tmin is None else f"{self.tmin:g} s"
        return f"{start} to {'the end' if self.tmax is None else f'{self.tmax:g} s'}"
