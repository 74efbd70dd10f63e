"""Notices names of events that never come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sjepa_deploy.eeg.events import ALL
from sjepa_deploy.errors import StreamError, counted, listed
from sjepa_deploy.runtime.live.markers import Event, MarkerSource, PlannedMarkers
from sjepa_deploy.runtime.live.schedule import Events

LACKING_AFTER_S = 60.0
"""Seconds after which a name is told that no event had."""


class EventNames:
    """Knows which events came, and tells which of those that are asked for did not.

    Parameters
    ----------
    events : Events or None
        The events that are asked for; None asks for none.

    Attributes
    ----------
    came : Counter of str
        How often each event came, wanted or not.
    """

    def __init__(self, events: Events | None) -> None:
        self._events = events
        self.came: Counter[str] = Counter()
        self._at = math.inf if events is None else math.nan

    def take(self, events: Iterable[Event]) -> None:
        """Take note of events, wanted or not."""
        self.came.update(event.description for event in events)

    @property
    def missing(self) -> list[str]:
        """Return the names that are asked for and have not come."""
        return [] if self._events is None else _missing(self._events, self.came)

    def told(self, when: str = "") -> str | None:
        """Return a sentence on the names that have not come; None if all have. `when` follows the verb."""
        if self._events is None or (self.came and not self.missing):
            return None
        if not self.came:
            return f"No event came{when}."
        return f"No event {listed(self.missing)} came{when}; the events that came are {counted(self.came)}."

    def lacking(self, now: float) -> str | None:
        """Return a sentence on the names that have not come, once, `LACKING_AFTER_S` seconds after the first call."""
        if math.isnan(self._at):
            self._at = now + LACKING_AFTER_S
        if now < self._at:
            return None
        self._at = math.inf
        return self.told(f" in {LACKING_AFTER_S:g} s")


def check_names(events: Events, markers: Sequence[MarkerSource], name: str) -> None:
    """Check, where all events are known at the start, that the names that are asked for are there.

    Parameters
    ----------
    events : Events
        The events that are asked for.
    markers : sequence of MarkerSource
        Where they come from: a recording or a table knows all its events, a stream does not.
    name : str
        Name of the source of the samples.

    Raises
    ------
    StreamError
        If a name is not there, or no event is; the message lists those that are there.
    """
    there: Counter[str] = Counter()
    for one in markers:
        if not isinstance(one, PlannedMarkers) or one.names is None:
            return
        there += one.names
    if (missing := _missing(events, there)) or not there:
        raise StreamError(
            f"{name} has no events {listed(missing)}; its events are {counted(there)}." if there else f"{name} has no events.",
            "Name events that it has with --events, or give a table of events (--events FILE.tsv).",
        )


def _missing(events: Events, there: Mapping[str, int]) -> list[str]:
    return [name for name in (*events.names, *events.trial_starts) if name not in there and name != ALL]
