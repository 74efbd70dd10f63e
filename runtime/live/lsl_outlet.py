"""Sends decisions to a stream of the Lab Streaming Layer."""

from __future__ import annotations

import json

import numpy as np

from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.state import STATES
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.lsl import quoted, require_pylsl
from sjepa_deploy.runtime.live.recorder import describe_run
from sjepa_deploy.runtime.live.states import numbers_of
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import ModelSpec

STATE_CHANNELS = ("state", "class", "probability")
"""Channels behind the outputs: numbers of state and class (``codes`` in the metadata names them), and the probability."""


class LslOutlet:
    """Sends decisions to an LSL stream, stamped with the time of the newest sample.

    Parameters
    ----------
    name : str
        Name of the stream, type "Decision".
    spec : ModelSpec
        The model.
    description : dict
        Goes into the stream's metadata as JSON.
    layer : DecisionLayer or None
        Decision layer of the decoder. With one, the channels of `STATE_CHANNELS` follow the outputs.

    Raises
    ------
    StreamError
        If there is a stream of that name already.
    """

    def __init__(self, name: str, spec: ModelSpec, description: dict[str, object], *, layer: DecisionLayer | None = None) -> None:
        pylsl = require_pylsl()
        if pylsl.resolve_bypred(f"name={quoted(name)}", 1, 1.5):
            raise StreamError(f"There is an LSL stream {name} already.", "Choose another --outlet.")
        n_outputs = int(np.prod(spec.output_shape))
        self._class_names = () if layer is None else layer.class_names
        more = () if layer is None else STATE_CHANNELS
        info = pylsl.StreamInfo(name, "Decision", n_outputs + len(more), pylsl.IRREGULAR_RATE, "float32", f"sjepa-stream-{name}")
        channels = info.desc().append_child("channels")
        for i in range(n_outputs):
            label = spec.class_names[i] if spec.class_names is not None else f"{spec.output_name}_{i}"
            channels.append_child("channel").append_child_value("label", label)
        for label in more:
            channels.append_child("channel").append_child_value("label", label)
        if layer is not None:
            codes = {"states": STATES, "classes": layer.class_names}
            info.desc().append_child_value("codes", json.dumps(codes))
        info.desc().append_child_value("sjepa_deploy", json.dumps(encode(description)))
        self._outlet = pylsl.StreamOutlet(info)

    def send(self, decision: Decision) -> None:
        """Send one decision."""
        values = decision.prediction.ravel()
        if decision.state is not None:
            values = np.append(values, np.array(numbers_of(decision.state, self._class_names), np.float32))
        self._outlet.push_sample(values, decision.time)


def send_decisions(decoder: Decoder, name: str) -> LslOutlet:
    """Send the decisions of `decoder` to an LSL stream from now on. The stream says what was decoded, with what, how.

    Parameters
    ----------
    decoder : Decoder
        The decoder.
    name : str
        Name of the stream.
    """
    spec = decoder.spec
    outlet = LslOutlet(name, spec, {"run": describe_run(decoder), "window_s": spec.n_times / spec.sfreq}, layer=decoder.layer)
    decoder.on_decision(outlet.send)
    return outlet
