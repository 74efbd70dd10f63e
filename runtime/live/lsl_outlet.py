"""Sends what a decoder decides to a stream of the Lab Streaming Layer."""

from __future__ import annotations

import json
import math

from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.state import STATES, StateName
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.lsl import quoted, require_pylsl
from sjepa_deploy.runtime.live.places import Undecided
from sjepa_deploy.runtime.live.recorder import describe_run
from sjepa_deploy.runtime.live.states import numbers_of
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import ModelSpec

STATE_CHANNELS = ("state", "class", "probability")
"""Channels behind the outputs: numbers of state and class, and the probability, or the value of a regression."""

FLAG_CHANNELS = ("late", "held", "bridged", "doubtful", "settling", "bad channels", "paused")
"""Channels behind these and behind "kind" and "index": 1 where the flag is set, the number of bad channels, 1 in a pause."""

KINDS = ("heartbeat", "decision", "undecided event")
"""Kinds of samples in the order of their numbers."""

HEARTBEAT_S = 1.0
"""Seconds of the source's clock without a sample after which a heartbeat is sent."""


class LslOutlet:
    """Sends decisions, events without one and heartbeats to an LSL stream. Each channel is described in docs/feedback.md.

    Parameters
    ----------
    name : str
        Name of the stream, type "Decision".
    spec : ModelSpec
        The model.
    description : dict
        Goes into the stream's metadata as JSON.
    layer : DecisionLayer or None
        Decision layer of the decoder. Without one, "state" and "class" of a decision are -1.

    Raises
    ------
    StreamError
        If there is a stream of that name already.
    """

    def __init__(self, name: str, spec: ModelSpec, description: dict[str, object], *, layer: DecisionLayer | None = None) -> None:
        pylsl = require_pylsl()
        if pylsl.resolve_bypred(f"name={quoted(name)}", 1, 1.5):
            raise StreamError(f"There is an LSL stream {name} already.", "Choose another --outlet.")
        self._n_outputs = math.prod(spec.output_shape)
        self._class_names = spec.class_names or () if layer is None else layer.class_names
        outputs = spec.class_names or tuple(f"{spec.output_name}_{i}" for i in range(self._n_outputs))
        labels = (*outputs, *STATE_CHANNELS, "kind", "index", *FLAG_CHANNELS)
        info = pylsl.StreamInfo(name, "Decision", len(labels), pylsl.IRREGULAR_RATE, "double64", f"sjepa-stream-{name}")
        channels = info.desc().append_child("channels")
        for label in labels:
            channels.append_child("channel").append_child_value("label", label)
        codes = {"states": STATES, "classes": self._class_names, "kinds": KINDS}
        info.desc().append_child_value("codes", json.dumps(codes))
        info.desc().append_child_value("sjepa_deploy", json.dumps(encode(description)))
        self._outlet = pylsl.StreamOutlet(info)
        self._sent = -math.inf

    def send(self, decision: Decision) -> None:
        """Send one decision, stamped with the time of its newest sample."""
        state = (-1.0, -1.0, math.nan) if decision.state is None else numbers_of(decision.state, self._class_names)
        flags = (
            float(decision.decided > decision.due),
            float(decision.held),
            float(decision.bridged),
            float(decision.doubtful),
            float(decision.settling),
            float(len(decision.bad_channels)),
            0.0,
        )
        self._push([*decision.prediction.ravel().tolist(), *state, 1.0, float(decision.index), *flags], decision.time)
        self._sent = decision.decided

    def send_undecided(self, left: Undecided, now: float) -> None:
        """Send an event without a decision, stamped with the event, or with the time now where nobody knows when it was."""
        onset = left.event.onset
        self._push(self._without_outputs("undecided", 2.0, paused=left.reason == "paused"), now if math.isnan(onset) else onset)
        self._sent = now

    def beat(self, now: float, *, silent: bool, paused: bool) -> None:
        """Send a heartbeat if nothing was sent for `HEARTBEAT_S`."""
        if now - self._sent >= HEARTBEAT_S or now < self._sent:
            self._push(self._without_outputs("no signal" if silent else "undecided", 0.0, paused=paused), now)
            self._sent = now

    def _without_outputs(self, state: StateName, kind: float, *, paused: bool) -> list[float]:
        numbers = (float(STATES.index(state)), -1.0, math.nan)
        flags = (*[0.0] * (len(FLAG_CHANNELS) - 1), float(paused))
        return [*[math.nan] * self._n_outputs, *numbers, kind, -1.0, *flags]

    def _push(self, values: list[float], stamp: float) -> None:
        self._outlet.push_sample(values, stamp)


def send_decisions(decoder: Decoder, name: str) -> LslOutlet:
    """Send the decisions of `decoder` to an LSL stream from now on. The stream says what was decoded, with what, how.

    Parameters
    ----------
    decoder : Decoder
        The decoder.
    name : str
        Name of the stream.
    """
    spec, clock = decoder.spec, decoder.source.clock
    outlet = LslOutlet(name, spec, {"run": describe_run(decoder), "window_s": spec.n_times / spec.sfreq}, layer=decoder.layer)
    decoder.on_decision(outlet.send)
    decoder.on_undecided(lambda left: outlet.send_undecided(left, clock()))
    decoder.on_turn(lambda: outlet.beat(clock(), silent=decoder.silent, paused=decoder.paused))
    return outlet
