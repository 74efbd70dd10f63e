"""
Your own source and your own backend
====================================

A source gives samples with stamps, and a backend runs the graph. Each is one class or function, and
one row of a table.

The module :download:`tutorial_bundle.py <tutorial_bundle.py>` makes the recordings and the bundle. Save the module
beside this example.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from onnx.reference import ReferenceEvaluator
from tutorial_bundle import tutorial_folder

import sjepa_deploy
from sjepa_deploy.cli import group, run_command
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.runtime.backend import BACKENDS, Backend, BackendEntry
from sjepa_deploy.runtime.live.open_source import SOURCES, SourceEntry
from sjepa_deploy.runtime.live.sources import ReplaySource


def open_array(path, signal, options):
    """Return an array of shape (n_samples, n_chans) in a .npy file as a stream."""
    info = StreamInfo(name=path, ch_names=signal.ch_names, sfreq=options.sfreq or signal.sfreq, unit=signal.unit)
    return ReplaySource(info, np.load(path), speed=options.speed, chunk=options.chunk)


class OnnxReferenceBackend(Backend):
    """Runs the graph with the reference evaluator of the package onnx."""

    name = "onnx-reference"

    def __init__(self, bundle, precision, options):
        self.precision, self._spec = precision, bundle.spec
        self._evaluator = ReferenceEvaluator(str(bundle.graph_path(precision)))

    def run(self, eeg):
        """Run the model on `eeg`, shape (batch, n_chans, n_times)."""
        (outputs,) = self._evaluator.run([self._spec.output_name], {self._spec.input_name: eeg})
        return np.asarray(outputs, np.float32)


# %%
# In a module of your own the target would be ``"my_module:open_array"``.
import sys  # noqa: E402

sys.modules["my_module"] = type(sys)("my_module")
sys.modules["my_module"].__dict__.update(open_array=open_array, OnnxReferenceBackend=OnnxReferenceBackend)
SOURCES["array"] = SourceEntry(
    target="my_module:open_array", address="array:FILE", package="numpy", extra="", takes=("sfreq", "speed", "chunk")
)
BACKENDS["onnx-reference"] = BackendEntry(
    target="my_module:OnnxReferenceBackend", package="onnx", extra="export", depends_on=("onnx",)
)

# %%
# Parity judges the backend. A backend that is wrong never decodes.
bundle = tutorial_folder() / "bundle"
run_command(group, "sjepa", ["verify", str(bundle), "--backend", "onnx-reference,ort-cpu", "-q"])

# %%
# Decode the stream with both backends.
file = Path(tempfile.mkdtemp()) / "eeg.npy"
np.save(file, eeg_windows(1, 8, 1000, 100.0, np.random.default_rng(0))[0].T)
outputs = {}
for backend in ("onnx-reference", "ort-cpu"):
    config = sjepa_deploy.StreamConfig(hop=0.5, late="queue")
    with sjepa_deploy.Decoder.open(bundle, f"array:{file}", config, backend=backend, speed=float("inf")) as decoder:
        outputs[backend] = np.array([decision.prediction[0] for decision in decoder])

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for (name, values), style in zip(outputs.items(), ("-", "o"), strict=True):
    axis.plot(values, style, label=name, markersize=4)
axis.set(xlabel="decision", ylabel="output for “left”")
axis.legend()
plt.show()
del SOURCES["array"], BACKENDS["onnx-reference"]
