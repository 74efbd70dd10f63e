"""What `sjepa-stream` shows in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sjepa_deploy.runtime.monitor import ChannelState, Monitor, Snapshot
from sjepa_deploy.runtime.windows import Counters

REFRESH_S = 0.25
"""Seconds from one picture to the next."""

_COLOURS = {
    ChannelState.OK: "green",
    ChannelState.FLAT: "bold red",
    ChannelState.SATURATED: "bold red",
    ChannelState.NOISY: "yellow",
    ChannelState.NAN: "bold magenta",
    ChannelState.MISSING: "dim",
}


class LiveView:
    """Draws a monitor in a thread of its own until the context ends.

    Parameters
    ----------
    monitor : Monitor
        What to draw.
    screen : Console
        Where.
    """

    def __init__(self, monitor: Monitor, screen: Console) -> None:
        self._monitor = monitor
        self._live = Live(console=screen, auto_refresh=False, transient=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="live view", daemon=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._live.stop()

    def _draw(self) -> None:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # not the priority of the decoder's thread
        while not self._stop.wait(REFRESH_S):
            self._live.update(picture(self._monitor.snapshot()), refresh=True)


def picture(shot: Snapshot) -> Group:
    """Return what is shown of one moment: the newest decision, ages and misses, every channel, the newest events."""
    facts = shot.facts
    head = Text(f"{facts.source} on {facts.bundle} ({facts.backend}): {shot.state}", style="bold")
    lines = [head]
    if len(shot.decisions):
        names = facts.output_names
        values = "  ".join(f"{name} {value:+.4g}" for name, value in zip(names, shot.decisions.prediction[-1], strict=True))
        flags = ", ".join(shot.decisions.flags[-1])
        lines.append(Text(f"decision {shot.decisions.index[-1]}: {values}" + (f"  [{flags}]" if flags else "")))
        lines.append(Text(f"age of the newest sample: {_milliseconds(shot)}; deadline {facts.deadline * 1e3:g} ms"))
    skips = ", ".join(f"{n} {reason}" for reason, n in shot.skips.items()) or "none"
    lines.append(
        Text(
            f"{shot.n_decisions} decisions, {shot.n_misses} misses (longest run {shot.longest_miss_run}), skipped: {skips}",
            style="red" if shot.miss_run else "",
        )
    )
    channels = Text()
    for name, state in zip(facts.ch_names, shot.quality.state, strict=True):
        channels.append(f"{name} ", style=_COLOURS[ChannelState(state)])
    return Group(*lines, channels, *(Text(event.text, style="dim") for event in shot.events[-4:]))


def summary_table(counters: Counters, shot: Snapshot) -> Table:
    """Return a table of everything that was counted, and of the ages."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, padding=(0, 1, 0, 0))
    table.add_column("what")
    table.add_column("how many", justify="right")
    always = {"samples", "windows", "decisions", "skipped_late", "skipped_gap", "misses"}
    for field in dataclasses.fields(counters):
        n = getattr(counters, field.name)
        if n or field.name in always:
            table.add_row(field.name.replace("_", " "), str(n))
    if shot.n_decisions:
        table.add_row("age of the newest sample", _milliseconds(shot))
    return table


def _milliseconds(shot: Snapshot) -> str:
    """Return percentiles over the newest decisions, and the largest of all."""
    figures = {"p50": shot.percentile("age", 50), "p99": shot.percentile("age", 99), "max": shot.age_max}
    return ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in figures.items() if not math.isnan(value))
