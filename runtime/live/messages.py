"""Tells what happens in a run as JSON objects: the lines of files, and the messages of the feedback socket."""

from __future__ import annotations

import math
from typing import Any

from sjepa_deploy.runtime.live.commands import COMMANDS, Executed
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.places import Undecided
from sjepa_deploy.runtime.live.sources import Incident
from sjepa_deploy.serialize import encode

Told = Decision | Incident | Undecided | Executed
"""What the callbacks of a decoder are given."""


class Messages:
    """Makes messages of what a decoder tells. Each has the key "type", and "run", which names the run.

    Parameters
    ----------
    decoder : Decoder
        The decoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._run = decoder.run_id
        self._classes = () if decoder.layer is None else decoder.layer.class_names

    def head(self) -> dict[str, Any]:
        """Return the message of the type "run", with which a file or a connection begins: what decodes, and the names."""
        decoder = self._decoder
        spec, bundle, layer = decoder.spec, decoder.predict.bundle, decoder.layer
        names = spec.class_names or tuple(f"{spec.output_name}_{i}" for i in range(spec.n_outputs))
        return {
            "type": "run",
            "run": self._run,
            "time": decoder.source.clock(),
            "source": decoder.source.info.name,
            "bundle": bundle.path.name,
            "digest": bundle.manifest.digest,
            "random_weights": bundle.manifest.weights.random,
            "backend": decoder.predict.backend.name,
            "outputs": [] if spec.variant == "base" else list(names),
            "decisions": None if layer is None else layer.description.name,
            "classes": list(self._classes),
            "hop": None if decoder.events is not None else decoder.hop / spec.sfreq,
            "events": None if decoder.events is None else list(decoder.events.names),
            "deadline": decoder.deadline,
        }

    def of(self, what: Told) -> dict[str, Any]:
        """Return the message of a decision, an event without one, an incident or a command. It holds no NaN."""
        if isinstance(what, Decision):
            return {"type": "decision", "run": self._run} | self._decision(what)
        if isinstance(what, Undecided):
            return {"type": "undecided", "run": self._run, "reason": what.reason} | _event(what.event)
        if isinstance(what, Incident):
            incident: dict[str, Any] = {"type": "incident", "run": self._run} | encode(what)
            return incident
        name = next(name for name, kind in COMMANDS.items() if kind is type(what.command))
        return {
            "type": "command",
            "run": self._run,
            "command": name,
            "arguments": {key: encode(value) for key, value in vars(what.command).items()},
            "accepted": what.reply.accepted,
            "reply": what.reply.text,
            "asked": what.asked,
            "time": what.time,
            "sample": what.sample,
        }

    def _decision(self, decision: Decision) -> dict[str, Any]:
        told: dict[str, Any] = {
            "index": decision.index,
            "time": decision.time,
            "due": decision.due,
            "received": decision.received,
            "decided": decision.decided,
            "infer_s": round(decision.infer_s, 6),
            "age": round(decision.age, 6),
            "prediction": [value if math.isfinite(value) else None for value in decision.prediction.ravel().tolist()],
            "flags": list(decision.flags),
            "bad_channels": list(decision.bad_channels),
        }
        if decision.event is not None:
            told |= _event(decision.event)
        if decision.trial is not None:
            told["trial"] = decision.trial
        state = decision.state
        if state is None:
            return told
        told |= {"state": state.name, "reason": state.reason}
        if state.class_name is not None:
            told["class"] = state.class_name
        if state.probability is not None:
            told["probability"] = state.probability
            told["probabilities"] = dict(zip(self._classes, state.probabilities, strict=True))
        if state.value is not None:
            told["value"] = state.value
        if state.interval is not None:
            told["interval"] = list(state.interval)
        return told


def _event(event: Event) -> dict[str, Any]:
    in_pause = math.isnan(event.onset)
    return {
        "event": event.description,
        "onset": None if in_pause else event.onset,
        "marker_delay": None if in_pause else round(event.marker_delay, 6),
    }
