"""Notices names of events that never come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from sjepa_deploy.eeg.events import ALL
from sjepa_deploy.errors import listed
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.schedule import Events

LACKING_AFTER_S = 60.0
"""Seconds after which a name is told that no event had."""


class EventNames:
    """Knows which events came, and tells once which of those that are asked for did not.

    Parameters
    ----------
    events : Events or None
        The events that are asked for; None asks for none.
    """

    def __init__(self, events: Events | None) -> None:
        self._names = () if events is None else (*events.names, *events.trial_starts)
        self._came: Counter[str] = Counter()
        self._at = math.inf if events is None else math.nan

    def came(self, events: Iterable[Event]) -> None:
        """Take note of events, wanted or not."""
        self._came.update(event.description for event in events)

    def lacking(self, now: float) -> str | None:
        """Return a sentence on the names that have not come, once, `LACKING_AFTER_S` seconds after the first call."""
        if math.isnan(self._at):
            self._at = now + LACKING_AFTER_S
        if now < self._at:
            return None
        self._at = math.inf
        missing = [name for name in self._names if name not in self._came and name != ALL]
        if not missing and self._came:
            return None
        what = listed([f"{name} ({n})" for name, n in sorted(self._came.items())], 20) or "none at all"
        which = f"no event {listed(missing)}" if missing else "no event"
        return f"There was {which} in {LACKING_AFTER_S:g} s; the events that came are {what}."
