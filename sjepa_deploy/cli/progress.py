"""Tells how far a command is: by a bar on a terminal, elsewhere by a line now and then. Both go to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from sjepa_deploy.cli.help_page import is_quiet

FIRST_LINE_AFTER = 2.0
"""Seconds that a step may take before a line tells what it does."""

LINE_EVERY = 10.0
"""Seconds between the lines after the first."""


@dataclasses.dataclass
class Steps:
    """Holds how far a command is. The command calls `at`; a thread draws.

    Attributes
    ----------
    text : str
        What is done now.
    done, total : int or None
        Finished parts of all parts; None where their number is not known.
    """

    text: str
    done: int = 0
    total: int | None = None
    started: float = dataclasses.field(default_factory=time.monotonic)
    _n_begun: int = 0
    _done_after: float = 0.0

    def at(self, text: str | None = None, done: int | None = None, total: int | None = None) -> None:
        """Tell what is done now, and how many parts are finished. None keeps what was told before."""
        self.text = self.text if text is None else text
        if done is not None and done != self.done:
            self.done, self._done_after = done, self.elapsed
        self.total = self.total if total is None else total

    def begin(self, text: str) -> None:
        """Tell that the next part begins: the part before is finished."""
        self.at(text, done=self._n_begun)
        self._n_begun += 1

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def rest(self) -> float | None:
        """Seconds to the end if the parts that are left take as long as those that are done; None if fewer than two are."""
        if not self.total or self.done < 2:
            return None
        took = self._done_after / self.done * (self.total - self.done)
        return max(0.0, took - (self.elapsed - self._done_after))

    def __str__(self) -> str:
        """Return how far the command is, as a line."""
        at = f"step {self._n_begun}" if self._n_begun else f"{self.done}"  # a named part; else how many are finished
        parts = f" ({at} of {self.total})" if self.total else ""
        rest = "" if self.rest is None else f", about {duration(self.rest)} left"
        return f"{self.text}{parts}, {duration(self.elapsed)}{rest}"


def duration(seconds: float) -> str:
    """Return a duration as a person says it: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole // 60 % 60} min"


class _Rest(ProgressColumn):
    """Shows the estimate of a `Steps`."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    def render(self, task: Task) -> Text:
        return Text("" if self.steps.rest is None else f"about {duration(self.steps.rest)} left", "dim")


@contextlib.contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Steps]:
    """Show how far the work of the context is. With ``--quiet`` nothing is shown."""
    steps = Steps(text, total=total)
    screen = Console(stderr=True, highlight=False)
    if is_quiet():
        yield steps
    elif screen.is_terminal:
        with _drawn(steps, screen):
            yield steps
    else:
        with _lines(steps):
            yield steps


@contextlib.contextmanager
def _drawn(steps: Steps, screen: Console) -> Iterator[None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn(), _Rest(steps))

    bar = Bar(*columns, console=screen, transient=True)
    task = bar.add_task(steps.text, total=steps.total)
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.1):
            bar.update(task, description=steps.text, completed=steps.done, total=steps.total)

    with bar, _in_background(run, stop):
        yield


@contextlib.contextmanager
def _lines(steps: Steps) -> Iterator[None]:
    stop = threading.Event()

    def run() -> None:
        wait = FIRST_LINE_AFTER
        while not stop.wait(wait):
            with contextlib.suppress(OSError, ValueError):  # of a reader that is gone: the work goes on
                click.echo(str(steps), err=True)
            wait = LINE_EVERY

    with _in_background(run, stop):
        yield


@contextlib.contextmanager
def _in_background(run: Callable[[], None], stop: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
