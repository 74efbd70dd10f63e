"""Sends decisions to a stream of the Lab Streaming Layer."""

from __future__ import annotations

import json

import numpy as np

from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.lsl import quoted, require_pylsl
from sjepa_deploy.runtime.live.recorder import describe_run
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import ModelSpec


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

    Raises
    ------
    StreamError
        If there is a stream of that name already.
    """

    def __init__(self, name: str, spec: ModelSpec, description: dict[str, object]) -> None:
        pylsl = require_pylsl()
        if pylsl.resolve_bypred(f"name={quoted(name)}", 1, 1.5):
            raise StreamError(f"There is an LSL stream {name} already.", "Choose another --outlet.")
        n_outputs = int(np.prod(spec.output_shape))
        info = pylsl.StreamInfo(name, "Decision", n_outputs, pylsl.IRREGULAR_RATE, "float32", f"sjepa-stream-{name}")
        channels = info.desc().append_child("channels")
        for i in range(n_outputs):
            label = spec.class_names[i] if spec.class_names is not None else f"{spec.output_name}_{i}"
            channels.append_child("channel").append_child_value("label", label)
        info.desc().append_child_value("sjepa_deploy", json.dumps(encode(description)))
        self._outlet = pylsl.StreamOutlet(info)

    def send(self, decision: Decision) -> None:
        """Send one decision."""
        self._outlet.push_sample(decision.prediction.ravel(), decision.time)


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
    outlet = LslOutlet(name, spec, {"run": describe_run(decoder), "window_s": spec.n_times / spec.sfreq})
    decoder.on_decision(outlet.send)
    return outlet
