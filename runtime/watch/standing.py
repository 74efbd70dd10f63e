"""Says in words how a live decoder stands. Good is a decoder that decides: one that runs and never decides is not."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sjepa_deploy.runtime.decisions.state import STATES
from sjepa_deploy.runtime.watch.snapshot import Snapshot, StreamState

Tone = Literal["good", "wait", "bad", "over"]
"""Decisions come; nothing is decided, and nothing is broken; somebody should look; the end."""

UNDECIDED_S = 60.0
"""Seconds without a class after which a decoder with a decision layer is said to be undecided."""

NO_SIGNAL_S = 5.0
"""Seconds of windows, all without signal, after which the signal is said to be missing."""

NO_EVENTS_S = 60.0
"""Seconds without an event after which a decoder of events is said to wait for them."""

TRIALS_WITHOUT = 5
"""Events in a row without a class after which a decoder of events is said to be undecided."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Says how a decoder stands.

    Attributes
    ----------
    tone : {"good", "wait", "bad", "over"}
        What to think of it.
    title, text : str
        What the decoder does, in a few words, and why, in a sentence or none.
    """

    tone: Tone
    title: str
    text: str = ""


_OF_STREAM: dict[StreamState, Standing] = {
    "waiting": Standing(tone="wait", title="Waiting for a source"),
    "filling": Standing(tone="wait", title="Filling the window"),
    "decoding": Standing(tone="good", title="Decoding"),
    "paused": Standing(tone="wait", title="Paused", text="Nothing is decided until somebody starts it again."),
    "no decisions": Standing(tone="bad", title="No decisions", text="Samples come, and decisions are overdue."),
    "silent": Standing(tone="bad", title="Source is silent", text="No samples come."),
    "reconnecting": Standing(tone="bad", title="Reconnecting", text="The source is lost."),
    "stopped": Standing(tone="over", title="Stopped"),
}


def standing_of(snapshot: Snapshot) -> Standing:
    """Return how the decoder of a snapshot stands."""
    if snapshot.state == "filling" and snapshot.facts.events is not None:
        return _at_events(snapshot) or Standing(tone="wait", title="Waiting for events", text="No event has a decision yet.")
    if snapshot.state == "decoding":
        judged = _at_events(snapshot) if snapshot.facts.events is not None else _every_hop(snapshot)
        if judged is not None:
            return judged
    return _OF_STREAM[snapshot.state]


def _at_events(snapshot: Snapshot) -> Standing | None:
    """Return why a decoder of events is not good; None if it is, or the stream says why."""
    quiet = snapshot.now - _known(snapshot.newest_event, snapshot.started)
    if quiet > NO_EVENTS_S:
        names = ", ".join(snapshot.facts.events or ())
        return Standing(tone="wait", title="Waiting for events", text=f"No event ({names}) for {quiet:.0f} s.")
    last = snapshot.trials[-TRIALS_WITHOUT:]
    if len(last) == TRIALS_WITHOUT and not any(trial.outcome in ("decided", "output") for trial in last):
        without = Counter(f"no decision ({t.reason})" if t.outcome == "no decision" else t.outcome for t in last)
        broken = all(trial.outcome in ("no decision", "no signal") for trial in last)
        text = f"The last {TRIALS_WITHOUT} events have no class: {_listed(without)}."
        return Standing(tone="bad" if broken else "wait", title="No decisions" if broken else "Undecided", text=text)
    return None


def _every_hop(snapshot: Snapshot) -> Standing | None:
    """Return why a decoder with a decision layer is not good; None if it is, or has no layer."""
    if snapshot.facts.layer is None:
        return None
    decisions = snapshot.decisions
    newest = decisions.state[decisions.decided > snapshot.now - NO_SIGNAL_S]
    if len(newest) and (newest == STATES.index("no signal")).all() and snapshot.newest is not None:
        state = snapshot.newest.state
        why = "" if state is None else f": {state.reason}"
        return Standing(tone="bad", title="No signal", text=f"The windows of {NO_SIGNAL_S:g} s say nothing{why}.")
    since = snapshot.started if snapshot.newest_decided is None else snapshot.newest_decided.decided
    if snapshot.now - since <= UNDECIDED_S:
        return None
    codes, n = np.unique(decisions.state[decisions.decided > since], return_counts=True)
    counted = {STATES[code]: int(times) for code, times in zip(codes.tolist(), n.tolist(), strict=True) if code >= 0}
    text = f"No class for {snapshot.now - since:.0f} s; the newest windows: {_listed(counted)}."
    return Standing(tone="wait", title="Undecided", text=text)


def _known(time: float, otherwise: float) -> float:
    return otherwise if math.isnan(time) else time


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items(), key=lambda item: -item[1])) or "none"
