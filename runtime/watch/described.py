"""Describes what a monitor knows as JSON types, for the server of the page."""

from __future__ import annotations

import dataclasses
import math
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from sjepa_deploy.eeg.montage import scalp_map
from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.runtime.decisions.state import STATES
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.recorder import Recorder
from sjepa_deploy.runtime.watch.snapshot import SKIPS, TIME_EDGES, Measure, Snapshot, StreamFacts, Times, Trial
from sjepa_deploy.runtime.watch.standing import standing_of
from sjepa_deploy.runtime.watch.traces import BIN_S, Traces

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MOST_TRIALS, MOST_MARKS = 32, 128
"""Trials and events that every state repeats."""

_COUNTED = {"samples": "samples received"} | {
    field.name: field.name.replace("_", " ")
    for field in dataclasses.fields(Counters)
    if field.name not in ("samples", "windows", "decisions", "misses", "miss_run", "longest_misses", *SKIPS)
}
"""Counters that the page and Prometheus show as they are: the field, and its name in words."""


def describe(facts: StreamFacts) -> dict[str, Any]:
    """Return the facts that the page needs once, as JSON types."""
    places = None if facts.positions is None else _plain(scalp_map(facts.positions), 4)
    described = dataclasses.asdict(facts) | {"places": places, "edges": TIME_EDGES, "states": STATES, "bin": BIN_S}
    del described["positions"]
    return described | {"channel_states": [state.name.lower() for state in ChannelState]}


def describe_state(snapshot: Snapshot, after: int = 0) -> dict[str, Any]:
    """Return a snapshot as JSON types, with the decisions after the first `after` ones.

    Times are in seconds of the decoder's clock, which says "now". The times of incidents are in seconds before now.
    """
    counters, decisions, quality, now = snapshot.counters, snapshot.decisions, snapshot.quality, snapshot.now
    new = slice(max(0, len(decisions) - (snapshot.n_noted - max(after, 0))), None)
    return {
        "state": snapshot.state,
        "facts": {
            name: getattr(snapshot.facts, name) for name in ("bundle", "bundle_hash", "backend", "layer", "random_weights")
        },
        "standing": dataclasses.asdict(standing_of(snapshot)),
        "now": now,
        "uptime": now - snapshot.started,
        "silence": _number(now - snapshot.newest_sample),
        "windows": counters.decisions + snapshot.n_skipped,  # not the one that is being decoded
        "decisions": counters.decisions,
        "misses": counters.misses,
        "miss_run": counters.miss_run,
        "longest_miss_run": counters.longest_misses,
        "skips": snapshot.skips,
        "counters": {words: getattr(counters, name) for name, words in _COUNTED.items()},
        "age": _spread(snapshot, "age", snapshot.age),
        "latency": _spread(snapshot, "latency", snapshot.latency),
        "channels": {
            "state": quality.state.tolist(),
            "repaired": quality.repaired.astype(int).tolist(),
            "rms": _plain(quality.rms, 3),
        },
        "incidents": [[round(now - i.time, 1), i.kind, i.text] for i in snapshot.incidents],
        "marks": [
            [round(event.onset, 4), event.description] for event in snapshot.events[-MOST_MARKS:] if math.isfinite(event.onset)
        ],
        "bads": snapshot.bads,
        "decision": _describe_decision(snapshot.newest),
        "decided": _describe_decision(snapshot.newest_decided),
        "trials": [_describe_trial(trial) for trial in snapshot.trials[-MOST_TRIALS:]],
        "states": dict(zip(STATES, snapshot.states, strict=True)),
        "memory": snapshot.memory,
        "new": {
            "index": decisions.index[new].tolist(),
            "time": _plain(decisions.time[new], 4),
            "latency": _plain(decisions.latency[new], 6),
            "age": _plain(decisions.age[new], 6),
            "prediction": _plain(decisions.prediction[new], 5),
            "flags": decisions.flags[new],
            "state": decisions.state[new].tolist(),
            "probabilities": _plain(decisions.probabilities[new], 4),
        },
    }


def describe_traces(traces: Traces) -> dict[str, Any]:
    """Return the extremes of the bins that are new, as JSON types: a row a bin."""
    times, low, high = traces.thinned()
    return {"time": _plain(times, 3), "low": _plain(low, 2), "high": _plain(high, 2)}


def describe_recording(recorder: Recorder) -> dict[str, Any]:
    """Return what becomes of a record, as JSON types: bytes, and the disk that is left, None where the system does not say."""
    try:
        free = shutil.disk_usage(recorder.path.absolute().parent).free
    except OSError:
        free = None
    lost = {what: n for what, n in recorder.n_lost.items() if n}
    return {"name": recorder.path.name, "size": recorder.n_bytes, "free": free, "failed": recorder.failed, "lost": lost}


def _describe_decision(decision: Decision | None) -> dict[str, Any] | None:
    if decision is None:
        return None
    described: dict[str, Any] = {
        "time": decision.time,
        "decided": decision.decided,
        "flags": decision.flags,
        "event": None if decision.event is None else decision.event.description,
    }
    if (state := decision.state) is None:
        return described | {"state": None}
    return described | {
        "state": state.name,
        "reason": state.reason,
        "class": state.class_name,
        "probability": None if state.probability is None else _number(state.probability),
        "value": None if state.value is None else _number(state.value),
        "interval": None if state.interval is None else _plain(state.interval, 5),
    }


def _describe_trial(trial: Trial) -> dict[str, Any]:
    described = dataclasses.asdict(trial) | {"outputs": _plain(trial.outputs, 4)}
    return {key: _number(value) if isinstance(value, float) else value for key, value in described.items()}


def _spread(snapshot: Snapshot, of: Measure, times: Times) -> dict[str, Any]:
    percentiles = {f"p{q}": _number(snapshot.percentile(of, q)) for q in (50, 99)}
    return percentiles | {"max": _number(times.largest), "sum": times.total, "counts": times.counts.tolist()}


def _number(value: float) -> float | None:
    """Return `value`, or None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def _plain(values: ArrayLike, digits: int) -> list[Any]:
    """Return rounded values as lists, with None for NaN and infinities."""
    array = np.asarray(values, np.float64)
    rounded: list[Any] = np.round(array, digits).tolist()
    if np.isfinite(array).all():
        return rounded
    return [_plain(row, digits) if isinstance(row, list) else _number(row) for row in rounded]
