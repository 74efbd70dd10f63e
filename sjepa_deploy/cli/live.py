"""Draws the live view of a decoder in a terminal; elsewhere it prints a line now and then."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.errors import listed
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.watch.monitor import Monitor
from sjepa_deploy.runtime.watch.snapshot import SKIPS, Measure, Snapshot, Times
from sjepa_deploy.runtime.watch.standing import Tone, standing_of

REFRESH_PER_SECOND = 2
LINE_EVERY = 10.0
"""Seconds between lines where standard output is no terminal."""

NAMED_CHANNELS = 40
"""Up to this many channels are shown by name with their root mean square; more as one sign each."""

_STYLES: dict[Tone, str] = {"good": "bold green", "wait": "bold yellow", "bad": "bold red", "over": "bold"}
_SIGNS = {
    ChannelState.OK: ("•", "green"),
    ChannelState.FLAT: ("F", "bold blue"),
    ChannelState.SATURATED: ("S", "bold red"),
    ChannelState.NOISY: ("N", "bold yellow"),
    ChannelState.NAN: ("!", "bold magenta"),
    ChannelState.MISSING: ("?", "bold"),
}


def live_view(monitor: Monitor, screen: Console, *, line_every: float = LINE_EVERY) -> AbstractContextManager[None]:
    """Show `monitor` on `screen` while the context lasts.

    A terminal is drawn over; anything else gets a line every `line_every` seconds, and one at the end. Drawing takes 3 to 5 ms of
    Python, for which a decoder's thread would wait by default (`sys.setswitchinterval`).
    """
    return _drawn(monitor, screen) if screen.is_terminal else _lines(monitor, screen, line_every)


@contextlib.contextmanager
def _drawn(monitor: Monitor, screen: Console) -> Iterator[None]:
    def draw() -> RenderableType:
        return draw_snapshot(monitor.snapshot(), screen)

    with Live(get_renderable=draw, console=screen, refresh_per_second=REFRESH_PER_SECOND):
        yield


@contextlib.contextmanager
def _lines(monitor: Monitor, screen: Console, every: float) -> Iterator[None]:
    stop = threading.Event()

    def say() -> None:
        screen.print(line_of(monitor.snapshot()), soft_wrap=True, markup=False)

    def run() -> None:
        while not stop.wait(every):
            say()

    thread = threading.Thread(target=run, name="live view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        say()


def line_of(snapshot: Snapshot) -> str:
    """Return a snapshot in one line."""
    parts = [
        f"{seconds(snapshot.now - snapshot.started)}: {standing_of(snapshot).title.lower()}",
        f"{snapshot.counters.decisions} decisions",
        f"{snapshot.n_skipped} skipped",
        f"{snapshot.counters.misses} misses",
        f"age {_spread(snapshot, 'age', snapshot.age)}",
        f"last sample {seconds(snapshot.now - snapshot.newest_sample)} ago",
        _bad_channels(snapshot, 4),
    ]
    if len(snapshot.decisions) and snapshot.facts.output_names:
        newest = snapshot.decisions.prediction[-1]
        parts.append(", ".join(f"{n} {value:.4g}" for n, value in zip(snapshot.facts.output_names[:4], newest, strict=False)))
    return ", ".join(parts)


def draw_snapshot(snapshot: Snapshot, screen: Console) -> RenderableType:
    """Return a snapshot as text for `screen`, no larger than it."""
    head = [_header(snapshot), *_times(snapshot), *_counts(snapshot)]
    quality = _quality(snapshot, screen)
    newest = {incident.kind: incident for incident in snapshot.incidents}.values()
    incidents = [
        Text(f"{seconds(snapshot.now - e.time)} ago: {e.kind}: {e.text}", style="dim", no_wrap=True)
        for e in sorted(newest, key=snapshot.incidents.index)[-3:]
    ]
    used = len(head) + sum(_height(part, screen) for part in quality) + len(incidents) + 1
    outputs = _outputs(snapshot, screen, max(1, screen.height - used))
    return Group(*head, *outputs, *quality, *incidents)


def _height(part: RenderableType, screen: Console) -> int:
    return len(screen.render_lines(part, pad=False))


def _header(snapshot: Snapshot) -> Text:
    facts = snapshot.facts
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(facts.bundle, "bold")
    standing = standing_of(snapshot)
    text.append(f"  {standing.title.lower()}", _STYLES[standing.tone])
    if facts.random_weights:
        text.append("  RANDOM WEIGHTS", "bold yellow")
    up = seconds(snapshot.now - snapshot.started)
    text.append(f"  {facts.source}, {facts.backend}, every {seconds(facts.hop)}, up {up}", "dim")
    return text


def _times(snapshot: Snapshot) -> list[Text]:
    facts = snapshot.facts
    silence = snapshot.now - snapshot.newest_sample
    lines = [
        Text(f"age      {_spread(snapshot, 'age', snapshot.age)}  deadline {seconds(facts.deadline)}"),
        Text(f"latency  {_spread(snapshot, 'latency', snapshot.latency)}"),
        Text("newest sample  "),
    ]
    lines[-1].append(f"{seconds(silence)} ago", "bold red" if silence > 1 + facts.hop else "")
    return lines


def _spread(snapshot: Snapshot, of: Measure, times: Times) -> str:
    newest = [f"{name} {seconds(snapshot.percentile(of, q))}" for name, q in (("p50", 50), ("p99", 99))]
    return "  ".join([*newest, f"max {seconds(times.largest)}"])


def _counts(snapshot: Snapshot) -> list[Text]:
    counters, skipped = snapshot.counters, snapshot.n_skipped
    windows = f"{counters.decisions + skipped} = {counters.decisions} decisions + {skipped} skipped"
    reasons = ", ".join(f"{reason} {n}" for reason, n in snapshot.skips.items() if n)
    run = f", at worst {counters.longest_misses} in a row" if counters.misses else ""
    misses = Text(f"misses   {counters.misses}{run}", "bold red" if counters.miss_run else "")
    shown = {"windows", "decisions", "misses", "miss_run", "longest_misses", *SKIPS}
    rest = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in vars(counters).items() if n and name not in shown)
    return [
        Text(f"windows  {windows}{f' ({reasons})' if reasons else ''}", no_wrap=True, overflow="ellipsis"),
        misses,
        Text(f"counted  {rest or 'nothing'}", no_wrap=True, overflow="ellipsis"),
    ]


def _outputs(snapshot: Snapshot, screen: Console, most: int) -> list[RenderableType]:
    names = snapshot.facts.output_names
    if not len(snapshot.decisions) or not names:
        return [Text("no decision yet" if names else "features of a base model", "dim")]
    recent, newest = snapshot.decisions.prediction[-200:], snapshot.decisions.prediction[-1]
    finite = [abs(value) for row in recent for value in row if math.isfinite(value)]
    scale = max(finite, default=0.0) or 1.0
    if len(names) > most:
        most -= 1
    signs = "+-" if _is_plain(screen) else "█░"
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in zip(names[:most], newest[:most], strict=True):
        cells = round(abs(value) / scale * 24) if math.isfinite(value) else 0
        bar = Text(signs[int(value < 0)] * cells, "yellow" if value < 0 else "cyan")
        table.add_row(Text(name, no_wrap=True), Text(f"{value:9.4g}", "bold"), bar)
    flags = ", ".join(snapshot.decisions.flags[-1])
    rest = f" and {len(names) - most} more outputs" if len(names) > most else ""
    return [table, *([Text(rest, "dim")] if rest else []), *([Text(f"flags    {flags}")] if flags else [])]


def _quality(snapshot: Snapshot, screen: Console) -> list[RenderableType]:
    names, quality = snapshot.facts.ch_names, snapshot.quality
    states = [ChannelState(code) for code in quality.state]
    plain = _is_plain(screen)

    def sign(state: ChannelState) -> tuple[str, str]:
        text, style = _SIGNS[state]
        return ("." if plain and state is ChannelState.OK else text), style

    counts = Text("signal   ")
    for state in ChannelState:
        if n := states.count(state):
            text, style = sign(state)
            counts.append(text, style).append(f" {n} {state.name.lower()}  ")
    if len(names) > NAMED_CHANNELS:
        strip = Text()
        for state in states:
            strip.append(*sign(state))
        return [counts, strip, *([] if all(s is ChannelState.OK for s in states) else [Text(_bad_channels(snapshot, 8))])]
    width = max(map(len, names)) + 13
    n_columns = max(1, screen.width // width)
    table = Table.grid()
    for _ in range(n_columns):
        table.add_column(width=width, no_wrap=True)
    cells = []
    for name, state, rms, repaired in zip(names, states, quality.rms, quality.repaired, strict=True):
        text, style = sign(state)
        cells.append(Text(f"{text}{'~' if repaired else ' '}", style).append(f"{name} ", "").append(f"{rms:.3g}", "dim"))
    for start in range(0, len(cells), n_columns):
        table.add_row(*cells[start : start + n_columns])
    if quality.repaired.any():
        counts.append("~ repaired  ")
    return [counts.append(f"rms in {snapshot.facts.unit}", "dim"), table]


def _is_plain(screen: Console) -> bool:
    return not screen.encoding.lower().startswith("utf")


def _bad_channels(snapshot: Snapshot, most: int) -> str:
    quality = snapshot.quality
    bad = [
        f"{name} {ChannelState(state).name.lower()}{' (repaired)' if repaired else ''}"
        for name, state, repaired in zip(snapshot.facts.ch_names, quality.state, quality.repaired, strict=True)
        if state != ChannelState.OK
    ]
    return f"bad: {listed(bad, most)}" if bad else "all channels good"


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
    if len(shot.decisions):
        table.add_row("age of the newest decisions", _spread(shot, "age", shot.age))
    return table


_NO_DECISION = {
    "events_before_start": "before the start",
    "events_past_end": "past the end",
    "events_past_history": "with markers after their samples were gone",
    "events_doubled": "that came twice",
    "events_ahead": "stamped ahead of the samples",
    "skipped_late": "left out as late",
    "held": "answered by the last decision",
    "skipped_gap": "over lost samples",
    "skipped_paused": "while paused",
    "failed": "failed",
}


def verdict_of(counters: Counters, *, at_events: bool) -> str:
    """Return how many windows, or how many events, were decoded, and of events why the others were not."""
    if not at_events:
        return f"{counters.decisions} of {counters.windows} windows, {counters.misses} too late"
    reasons = ", ".join(f"{n} {why}" for name, why in _NO_DECISION.items() if (n := getattr(counters, name)))
    return f"{counters.decisions} of {counters.events} events{f' ({reasons})' if reasons else ''}, {counters.misses} too late"


def seconds(value: float) -> str:
    """Return a time in the unit that suits it: "720 us", "13.0 ms", "4.2 min"; "-" for NaN."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    for least, factor, unit in ((7200, 1 / 3600, "h"), (120, 1 / 60, "min"), (1, 1, "s"), (1e-3, 1e3, "ms")):
        if size >= least:
            return f"{value * factor:.3g} {unit}" if size * factor < 1000 else f"{value * factor:.0f} {unit}"
    return f"{value * 1e6:.0f} us"
