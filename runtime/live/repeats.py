"""Counts incidents that happen again and again."""

from __future__ import annotations

from collections.abc import Iterator

from sjepa_deploy.runtime.live.sources import Incident

REPEAT_S = 60.0
"""Seconds during which an incident that happens again is counted instead of told."""


class Repeats:
    """Decides which incidents are told: the first of its kind and text at once, equal ones once a minute with their number.

    A decoder that is late in every other window would otherwise tell thousands of equal incidents, between which nobody finds
    another one.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], tuple[float, int]] = {}  # when it was told, and how many came since; oldest first

    def is_new(self, incident: Incident) -> bool:
        """Return whether to tell `incident` now. Otherwise it is counted."""
        key = incident.kind, incident.text
        if key not in self._told:
            self._told[key] = incident.time, 0
            return True
        told_at, n = self._told[key]
        self._told[key] = told_at, n + 1
        return False

    def due(self, now: float, sample: int, *, ending: bool = False) -> Iterator[Incident]:
        """Yield an incident for each that was counted for a minute, or for any time if the stream is `ending`."""
        while self._told:
            (kind, text), (told_at, n) = next(iter(self._told.items()))
            if not ending and 0 <= now - told_at < REPEAT_S:  # a clock that was set back starts a new minute
                return
            del self._told[kind, text]
            if n:
                if not ending:
                    self._told[kind, text] = now, 0
                again = f"{text} This happened {n} more time{'s' if n > 1 else ''} in {max(0.0, now - told_at):.0f} s."
                yield Incident(kind=kind, time=now, text=again, sample=sample)
