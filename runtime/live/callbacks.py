"""Calls whoever wants to hear what a live decoder does."""

from __future__ import annotations

from collections.abc import Callable

from sjepa_deploy.runtime.live.commands import Commands, Executed
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.places import Undecided
from sjepa_deploy.runtime.live.repeats import Repeats
from sjepa_deploy.runtime.live.sources import Chunk, Incident


class Callbacks:
    """Keeps the callbacks of a decoder, which is made of this class. They are called in the decoder's thread, in their order.

    Parameters
    ----------
    clock : callable
        The time now in seconds of the source's clock.
    counters : Counters
        Counters of the decoder.

    Attributes
    ----------
    counters : Counters
        The same.
    commands : Commands
        Takes commands from other threads.
    """

    def __init__(self, clock: Callable[[], float], counters: Counters) -> None:
        self._clock, self.counters = clock, counters
        self.commands = Commands(clock)
        self._repeats = Repeats()
        self._on_decision: list[Callable[[Decision], object]] = []
        self._on_chunk: list[Callable[[Chunk], object]] = []
        self._on_incident: list[Callable[[Incident], object]] = []
        self._on_turn: list[Callable[[], object]] = []
        self._on_event: list[Callable[[Event], object]] = []
        self._on_undecided: list[Callable[[Undecided], object]] = []

    def on_decision(self, callback: Callable[[Decision], object]) -> None:
        """Call `callback` with every decision, before the iterator gives it."""
        self._on_decision.append(callback)

    def on_chunk(self, callback: Callable[[Chunk], object]) -> None:
        """Call `callback` with every chunk of samples, after its decisions."""
        self._on_chunk.append(callback)

    def on_incident(self, callback: Callable[[Incident], object]) -> None:
        """Call `callback` with what happens to the stream: equal incidents once a minute, with their number (`Repeats`)."""
        self._on_incident.append(callback)

    def on_turn(self, callback: Callable[[], object]) -> None:
        """Call `callback` after every chunk, and where no samples come about every `POLL_S`: in silence and in pauses too."""
        self._on_turn.append(callback)

    def on_event(self, callback: Callable[[Event], object]) -> None:
        """Call `callback` with every event whose marker came, wanted or not, before its decision."""
        self._on_event.append(callback)

    def on_undecided(self, callback: Callable[[Undecided], object]) -> None:
        """Call `callback` with every event that gets no decision."""
        self._on_undecided.append(callback)

    def on_command(self, callback: Callable[[Executed], object]) -> None:
        """Call `callback` with every command that was answered, see `Commands`."""
        self.commands.on_executed(callback)

    def _report(self, kind: str, text: str) -> None:
        self._tell(Incident(kind=kind, time=self._clock(), text=text, sample=self.counters.samples))

    def _tell(self, incident: Incident) -> None:
        if self._repeats.is_new(incident):
            self._tell_each(incident)

    def _tell_repeated(self, *, ending: bool = False) -> None:
        for incident in self._repeats.due(self._clock(), self.counters.samples, ending=ending):
            self._tell_each(incident)

    def _tell_each(self, incident: Incident) -> None:
        """Tell an incident, also one that equals another."""
        for tell in self._on_incident:
            tell(incident)

    def _tell_undecided(self, left: Undecided) -> None:
        if (cause := left.cause) is not None:
            self._report("events", cause)
        for tell in self._on_undecided:
            tell(left)
