"""Notices that events come faster than they can be decided."""

from __future__ import annotations

from collections import deque

from sjepa_deploy.runtime.live.markers import Event

N_EVENTS = 16
"""Events in a row whose pace is compared with the backend's."""


class Pace:
    """Compares the pace of events with the time that a decision takes."""

    def __init__(self) -> None:
        self._onsets: deque[float] = deque(maxlen=N_EVENTS)
        self._took: deque[float] = deque(maxlen=N_EVENTS)
        self._told = False

    def decided(self, seconds: float) -> None:
        """Take note of the seconds that the backend took for a window."""
        self._took.append(seconds)

    def due(self, event: Event, *, late: bool) -> str | None:
        """Take note of an event whose window is due. Return a sentence, once, if events that follow each other are late."""
        self._onsets.append(event.onset)
        if self._told or not late or len(self._onsets) < N_EVENTS or not self._took:
            return None
        interval = (max(self._onsets) - min(self._onsets)) / (N_EVENTS - 1)
        took = sum(self._took) / len(self._took)
        if interval >= took:
            return None
        self._told = True
        return (
            f"Events come every {interval * 1e3:.3g} ms, and a decision takes {took * 1e3:.3g} ms: decisions fall behind. Name "
            "fewer --events, or use a faster backend."
        )
