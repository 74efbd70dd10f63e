"""Says which windows of a stream are decided: one every hop, or one for each event."""

from __future__ import annotations

from dataclasses import dataclass

from sjepa_deploy.eeg.events import ALL

HISTORY_S = 3.0
"""Seconds of samples that are kept for events whose markers come after their samples."""


@dataclass(frozen=True)
class Hop:
    """Says that one window is decided every so many seconds.

    Attributes
    ----------
    seconds : float
        Seconds from one decision to the next, rounded to samples of the model; 0 decides at every sample.
    """

    seconds: float


@dataclass(frozen=True)
class Events:
    """Says that one window is decided for each event.

    Attributes
    ----------
    names : tuple of str
        Descriptions of the events that are decided; `ALL` alone stands for all.
    start : float or None
        Start of the window in seconds after its event; may be negative. None takes the model's `event_window`.
    history : float
        Seconds of samples that are kept beside a window: the longest delay of a marker behind the end of its window.
    trial_starts : tuple of str
        Descriptions of the events that begin a trial, for a decision layer that adds up the evidence of a trial's events. They
        are decided themselves only if `names` has them by name. Empty: each event is a trial.
    """

    names: tuple[str, ...] = (ALL,)
    start: float | None = None
    history: float = HISTORY_S
    trial_starts: tuple[str, ...] = ()

    def wants(self, description: str) -> bool:
        """Return whether an event of this description is decided."""
        return description in self.names or (self.names == (ALL,) and description not in self.trial_starts)


Schedule = Hop | Events


class HopCounter:
    """Counts the samples of a stream at the model's rate, and says after which of them a window is due.

    The first window is due when `n_times` samples have come, and then one every `hop` samples. Samples that were lost count too,
    so that a loss moves no window: what is due within it is only not whole. Nothing here depends on a clock or on chunks.

    Parameters
    ----------
    n_times : int
        Samples of a window.
    hop : int
        Samples from one window to the next, 1 to `n_times`.

    Attributes
    ----------
    elapsed : int
        Samples so far, with those that were lost.
    due_in : int
        Samples until the next window is due, at least 1.
    unbroken : int
        Samples since the start or the last loss.
    """

    def __init__(self, n_times: int, hop: int) -> None:
        self._n_times, self._hop = n_times, hop
        self.elapsed = 0
        self.due_in = n_times
        self.unbroken = 0

    @property
    def whole(self) -> bool:
        """Return whether a window that ends with the newest sample lacks none."""
        return self.unbroken >= self._n_times

    def count(self, n: int) -> None:
        """Count `n` samples that came, where something else says when windows are due."""
        self.elapsed += n
        self.unbroken += n

    def advance(self, n: int) -> bool:
        """Count `n` samples that came, at most `due_in`, and return whether a window is due after the last of them."""
        self.count(n)
        self.due_in -= n
        if self.due_in:
            return False
        self.due_in = self._hop
        return True

    def skip(self, n: int) -> int:
        """Count `n` samples that were lost, and return how many windows were due in the loss.

        Also a loss of 0 samples, as when a stream starts anew, breaks the windows across it.
        """
        self.elapsed += n
        self.unbroken = 0
        n_windows = max(0, 1 + (n - self.due_in) // self._hop)
        self.due_in += n_windows * self._hop - n
        return n_windows
