"""Defines what a monitor knows of a live decoder at one moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from sjepa_deploy.runtime.decisions.state import STATES, StateName
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.sources import Incident
from sjepa_deploy.spec import Position, Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

StreamState = Literal["waiting", "filling", "decoding", "paused", "no decisions", "silent", "reconnecting", "stopped"]
STREAM_STATES: tuple[StreamState, ...] = get_args(StreamState)
"""States of a decoder, in the order of `StreamState`.

No source yet; the window is not whole yet; decisions come; a command paused them; samples come and decisions are overdue; no
samples come; the source is lost; the end.
"""

_RENARD = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)  # ISO 3's R10: equal steps on a log axis, in round numbers
TIME_EDGES: tuple[float, ...] = (*(round(step * 10.0**decade, 9) for decade in range(-5, 1) for step in _RENARD), 10.0)
"""Upper edges of the bins of ages and latencies in seconds, 10 us to 10 s, ten a decade. One more bin holds later values."""

SAMPLES_FOR_P99 = 100
"""A 99th percentile of fewer values than this would be their largest, and is not given."""

SKIPS = {
    "skipped_late": "late",
    "skipped_gap": "gap",
    "skipped_paused": "paused",
    "held": "held",
    "failed": "backend failed",
}
"""Reasons why a window has no decision of its own: the counter, and the reason in words."""

MOST_OUTPUTS = 4
"""Outputs of the model that a trial without a decision layer shows."""

Measure = Literal["age", "latency"]


@dataclass(frozen=True, kw_only=True)
class StreamFacts:
    """Holds the facts that do not change while one bundle decides.

    Attributes
    ----------
    bundle, bundle_hash : str
        Name of the bundle, and the digest of its manifest.
    backend, source : str
        What runs the model, and where the samples come from.
    ch_names : tuple of str
        Channels of the model in its order.
    positions : tuple of (float, float, float) or None
        Where they are, in metres in the head frame (MNE's). None where the bundle does not say.
    sfreq : float
        Sampling rate of the model in Hz.
    unit : {"nV", "uV", "mV", "V"}
        Unit of `ChannelQuality.rms`.
    hop, deadline : float
        Seconds from one window to the next, and the age at which a decision misses its deadline.
    overdue : float or None
        Seconds without a decision, while samples come, after which the state is "no decisions".
    output_names : tuple of str
        One name for each value of a decision; empty for a base model, whose features are not shown.
    random_weights : bool
        Whether the weights are random, so that decisions mean nothing.
    layer : str or None
        Name of the decision layer. None: decisions have no state.
    class_names : tuple of str
        Classes of the decision layer; empty for a regression.
    events : tuple of str or None
        Events that are decided; None where a window is decided every hop.
    source_names : tuple of str
        Channels of the stream that the model uses, as the stream calls them.
    trace_names : tuple of str
        Channels of the stream whose samples are kept for drawing, see `sjepa_deploy.runtime.watch.traces.Traces`.
    trace_unit : str
        Unit of these samples.
    """

    bundle: str
    bundle_hash: str
    backend: str
    source: str
    ch_names: tuple[str, ...]
    positions: tuple[Position, ...] | None
    sfreq: float
    unit: Unit
    hop: float
    deadline: float
    overdue: float | None
    output_names: tuple[str, ...]
    random_weights: bool = False
    layer: str | None = None
    class_names: tuple[str, ...] = ()
    events: tuple[str, ...] | None = None
    source_names: tuple[str, ...] = ()
    trace_names: tuple[str, ...] = ()
    trace_unit: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decisions:
    """Holds the newest decisions by column, oldest first.

    Times are seconds of the decoder's clock; see `Decision` for their meaning.

    Attributes
    ----------
    index : array of int64, shape (n,)
        Number of the window, counted from the start of the stream.
    time, received, decided : array of float64, shape (n,)
        Stamp of the newest sample in the window, when this sample arrived, when the prediction was there.
    prediction : array of float64, shape (n, n_outputs)
        Output of the model.
    flags : tuple of tuple of str, length n
        `Decision.flags`.
    state : array of int64, shape (n,)
        Number of the state in `sjepa_deploy.runtime.decisions.state.STATES`; -1 without a decision layer.
    probabilities : array of float64, shape (n, n_classes)
        Probability of each class of the decision layer; NaN without signal.
    """

    index: NDArray[np.int64]
    time: NDArray[np.float64]
    received: NDArray[np.float64]
    decided: NDArray[np.float64]
    prediction: NDArray[np.float64]
    flags: tuple[tuple[str, ...], ...]
    state: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    @property
    def latency(self) -> NDArray[np.float64]:
        """Return the seconds from the arrival of each window's newest sample to the decision."""
        return self.decided - self.received

    @property
    def age(self) -> NDArray[np.float64]:
        """Return the seconds from the stamp of each window's newest sample to the decision. The deadline counts in them."""
        return self.decided - self.time

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Times:
    """Says how long all decisions since the start took.

    Attributes
    ----------
    counts : array of int64, shape (len(TIME_EDGES) + 1,)
        Decisions in the bins of `TIME_EDGES`.
    total, largest : float
        Sum and maximum in seconds; the maximum is NaN before any decision.
    """

    counts: NDArray[np.int64]
    total: float
    largest: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelQuality:
    """Holds the quality of each channel.

    Attributes
    ----------
    state : array of uint8, shape (n_chans,)
        A `ChannelState` for each channel.
    rms : array of float64, shape (n_chans,)
        Root mean square in the model's unit; NaN where unknown.
    repaired : array of bool, shape (n_chans,)
        Whether the model gets an interpolation in place of the channel.
    """

    state: NDArray[np.uint8]
    rms: NDArray[np.float64]
    repaired: NDArray[np.bool_]


Outcome = StateName | Literal["output", "no decision"]
"""What became of a trial: the state of the decision layer, the model's output without one, or no decision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Says what became of an event. Where a window is decided every hop: tells a change of the state.

    Attributes
    ----------
    number : int
        Number of the trial, from 1 on.
    time : float
        Onset of the event, or stamp of the newest sample of the window, in seconds of the decoder's clock. NaN if the event was
        in a pause of the recording.
    event : str or None
        Description of the event; None where a window is decided every hop.
    outcome : str
        An `Outcome`.
    reason : str
        Why, in words.
    class_name : str or None
        Class that was decided.
    probability, value : float or None
        Probability of the class, or number of a regression.
    outputs : tuple of float
        First `MOST_OUTPUTS` outputs of the model, where there is no decision layer.
    latency : float or None
        Seconds from the newest sample of the window, or the later arrival of the marker, to the decision.
    marker_delay : float or None
        Seconds from the event to the arrival of its marker.
    """

    number: int
    time: float
    event: str | None
    outcome: Outcome
    reason: str
    class_name: str | None = None
    probability: float | None = None
    value: float | None = None
    outputs: tuple[float, ...] = ()
    latency: float | None = None
    marker_delay: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """Holds everything that a monitor knows at one moment.

    Attributes
    ----------
    facts : StreamFacts
        Facts of the bundle that decides.
    state : str
        A `StreamState`.
    now, started, newest_sample : float
        Seconds of the decoder's clock: the moment of the snapshot, the start, the arrival of the newest sample (NaN before any).
    counters : Counters
        A copy of the decoder's own.
    n_noted : int
        Decisions since the monitor began, of which `decisions` holds the newest.
    decisions : Decisions
        The newest ones.
    age, latency : Times
        Ages and latencies of the decisions since the monitor began.
    quality : ChannelQuality
        Quality of the channels.
    incidents : tuple of Incident
        Newest incidents, oldest first.
    memory : int
        Resident memory of the process in bytes; 0 where the system does not say.
    newest : Decision or None
        The newest decision, also one that repeats another.
    trials : tuple of Trial
        Newest trials, oldest first. The number of the last one is how many there were.
    events : tuple of Event
        Newest events whose markers came, wanted or not, in this order.
    states : tuple of int, length len(STATES)
        Windows in each state of the decision layer.
    bads : tuple of str
        Channels of the stream that a command named as bad.
    newest_decided : Decision or None
        The newest decision whose state is "decided".
    newest_event : float
        When the marker of the newest event that is decided came; NaN before any.
    """

    facts: StreamFacts
    state: StreamState
    now: float
    started: float
    newest_sample: float
    counters: Counters
    n_noted: int
    decisions: Decisions
    age: Times
    latency: Times
    quality: ChannelQuality
    incidents: tuple[Incident, ...]
    memory: int
    newest: Decision | None = None
    trials: tuple[Trial, ...] = ()
    events: tuple[Event, ...] = ()
    states: tuple[int, ...] = (0,) * len(STATES)
    bads: tuple[str, ...] = ()
    newest_event: float = math.nan
    newest_decided: Decision | None = None

    @property
    def skips(self) -> dict[str, int]:
        """Return the number of windows without a decision of their own, by reason."""
        return {reason: getattr(self.counters, name) for name, reason in SKIPS.items()}

    @property
    def n_skipped(self) -> int:
        """Return the number of windows without a decision of their own."""
        return sum(self.skips.values())

    def percentile(self, of: Measure, q: float) -> float:
        """Return a percentile in seconds over the newest decisions, raw; NaN where there are too few for it."""
        values: NDArray[np.float64] = getattr(self.decisions, of)
        if not len(values) or (q >= 99 and len(values) < SAMPLES_FOR_P99):
            return float("nan")
        return float(np.percentile(values, q))
