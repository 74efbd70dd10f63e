"""Defines commands to a live decoder, and keeps them until the decoder takes them between two chunks.

The decoder alone owns its state. Other threads `submit` commands; the decoder's thread executes at most one command after each
chunk, so that no number of commands makes windows late.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sjepa_deploy.errors import CommandError, SjepaError
from sjepa_deploy.serialize import tagged

MOST_WAITING = 256
"""Commands that wait for the decoder at once. A further one is refused."""

MOST_CHARACTERS = 1000
"""Characters of the text of a mark."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """Asks a decoder for something. Each kind of command is a class of its own."""


@dataclass(frozen=True, kw_only=True)
class Status(Command):
    """Asks what the decoder does: whether it decides, with which bundle, and its counters."""


@dataclass(frozen=True, kw_only=True)
class Start(Command):
    """Lets a paused decoder decide again, from the next window on."""


@dataclass(frozen=True, kw_only=True)
class Pause(Command):
    """Lets the decoder decide nothing until `Start`. Filters go on, so that the first window after `Start` is a whole one."""


@dataclass(frozen=True, kw_only=True)
class Stop(Command):
    """Ends the run, with everything written."""


@dataclass(frozen=True, kw_only=True)
class Mark(Command):
    """Notes a text at the time at which the command was submitted: an incident of the kind "mark".

    Attributes
    ----------
    text : str
        1 to `MOST_CHARACTERS` characters.

    Raises
    ------
    CommandError
        If the text is empty, too long, or holds half a character (a lone surrogate), which no file takes.
    """

    text: str

    def __post_init__(self) -> None:
        if not 0 < len(self.text) <= MOST_CHARACTERS or any("\ud800" <= character <= "\udfff" for character in self.text):
            raise CommandError("A mark has no text that can be stored.", f"Give 1 to {MOST_CHARACTERS} Unicode characters.")


@dataclass(frozen=True, kw_only=True)
class Load(Command):
    """Asks for another bundle in place of the one that decides.

    Attributes
    ----------
    bundle : str
        Its name among the bundles that the handler knows.
    """

    bundle: str


@dataclass(frozen=True, kw_only=True)
class BadChannels(Command):
    """Names all channels of the stream that are bad from now on. What happens to these channels `StreamConfig.bad_channels` says.

    Attributes
    ----------
    names : tuple of str
        Channels. A channel that an earlier command named and this one does not counts as what its signal shows.
    """

    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Label(Command):
    """Tells the true class of a window that was decided.

    Attributes
    ----------
    event : int
        Number of the decision (`Decision.index`).
    class_name : str
        The class.
    """

    event: int
    class_name: str


COMMANDS: dict[str, type[Command]] = {
    "status": Status,
    "start": Start,
    "pause": Pause,
    "stop": Stop,
    "mark": Mark,
    "load": Load,
    "bad channels": BadChannels,
    "label": Label,
}
"""Names of the commands, by which `sjepa_deploy.serialize` stores them (key "command")."""

tagged(Command, "command", COMMANDS)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Answers a command.

    Attributes
    ----------
    accepted : bool
        Whether the command was executed.
    text : str
        What was done, or why nothing was.
    data : dict of str to object
        What was asked for, as JSON types.
    """

    accepted: bool
    text: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Executed:
    """Tells of a command that the decoder has answered.

    Attributes
    ----------
    command : Command
        The command.
    reply : Reply
        The answer.
    asked, time : float
        When the command was submitted, and when it was executed, in seconds of the source's clock.
    sample : int
        Samples of the stream that the decoder had been given by then. The command holds from the next one on.
    """

    command: Command
    reply: Reply
    asked: float
    time: float
    sample: int


C = TypeVar("C", bound=Command)

Later = Callable[[], "Reply | None"]
"""Is called after every chunk, in the decoder's thread, until it returns the reply."""


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    command: Command
    time: float
    future: Future[Reply]


_ENDED = "The run has ended."


class Commands:
    """Takes commands from any thread, and executes them in the decoder's thread.

    Parameters
    ----------
    clock : callable
        The time now in seconds of the source's clock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: deque[_Asked] = deque()
        self._lock = threading.Lock()  # of those who submit: the decoder never waits for it
        self._handlers: dict[type[Command], Callable[[Any, float], Reply | Later]] = {}
        self._unanswered: list[tuple[_Asked, Later]] = []
        self._on_executed: list[Callable[[Executed], object]] = []
        self._closed = False

    def handle(self, kind: type[C], handler: Callable[[C, float], Reply | Later]) -> None:
        """Execute commands of a kind with `handler`, in place of the last handler of this kind.

        Parameters
        ----------
        kind : type
            Class of the command.
        handler : callable
            Called in the decoder's thread with the command and the time at which it was submitted. A `SjepaError` refuses the
            command. The windows of the stream wait for the handler: one that needs time returns a function that is asked again
            (`Later`), and leaves the work to another thread.
        """
        self._handlers[kind] = handler

    def on_executed(self, callback: Callable[[Executed], object]) -> None:
        """Call `callback` with every command that was answered, accepted or not, in the decoder's thread."""
        self._on_executed.append(callback)

    def submit(self, command: Command) -> Future[Reply]:
        """Ask the decoder to execute a command soon, from any thread.

        Returns
        -------
        Future of Reply
            The answer. It comes at once if too many commands wait already, or the run has ended. Callbacks of the future run in
            the decoder's thread, and must not wait.
        """
        future: Future[Reply] = Future()
        future.set_running_or_notify_cancel()  # a command that waits cannot be taken back
        with self._lock:
            why_not = _ENDED if self._closed else "Too many commands wait." if len(self._waiting) >= MOST_WAITING else None
            if why_not is None:
                self._waiting.append(_Asked(command, self._clock(), future))
        if why_not is not None:
            future.set_result(Reply(accepted=False, text=why_not))
        return future

    def execute_next(self, sample: int) -> None:
        """Execute the oldest command that waits, if there is one. `sample` is the number of samples received."""
        if self._unanswered:
            for asked, later in self._unanswered[:]:
                self._finish(asked, later, sample)
        if self._waiting:
            asked = self._waiting.popleft()
            self._finish(asked, lambda: self._execute(asked), sample)

    def close(self, sample: int) -> None:
        """Refuse what waits, and what comes."""
        with self._lock:
            self._closed = True
        for asked in [asked for asked, _ in self._unanswered] + list(self._waiting):
            self._answer(asked, Reply(accepted=False, text=_ENDED), sample)
        self._unanswered.clear()
        self._waiting.clear()

    def _execute(self, asked: _Asked) -> Reply | Later:
        command = asked.command
        handler = self._handlers.get(type(command))
        if handler is None:
            name = next(name for name, kind in COMMANDS.items() if kind is type(command))
            return Reply(accepted=False, text=f"Nothing in this run takes the command {name!r}.")
        return handler(command, asked.time)

    def _finish(self, asked: _Asked, work: Callable[[], Reply | Later | None], sample: int) -> None:
        """Do the work of a command, and answer the command, or ask again after the next chunk."""
        try:
            result = work()
        except SjepaError as e:
            result = Reply(accepted=False, text=str(e))
        self._unanswered = [waiting for waiting in self._unanswered if waiting[0] is not asked or result is None]
        if isinstance(result, Reply):
            self._answer(asked, result, sample)
        elif result is not None:
            self._unanswered.append((asked, result))

    def _answer(self, asked: _Asked, reply: Reply, sample: int) -> None:
        executed = Executed(command=asked.command, reply=reply, asked=asked.time, time=self._clock(), sample=sample)
        for tell in self._on_executed:
            tell(executed)
        asked.future.set_result(reply)
