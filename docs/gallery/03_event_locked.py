"""
Decode the events of a recording
================================

A model that learned from windows after events decodes events. This example decodes those of a
recording, and shows the response that the model uses.

The module :download:`tutorial_bundle.py <tutorial_bundle.py>` makes the recordings and the bundle. Save the module
beside this example.
"""

import csv
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tutorial_bundle import tutorial_folder

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import group, run_command
from sjepa_deploy.eeg import prepare
from sjepa_deploy.eeg.recording import read_recording

folder = tutorial_folder()
out = Path(tempfile.mkdtemp()) / "decoded.tsv"

# %%
# One row for each event: onset, description, the outputs and the class.
run_command(
    group, "sjepa", ["run", f"{folder}/bundle", f"{folder}/session2_raw.fif", "--events", "left,right", "--out", str(out), "-q"]
)
rows = list(csv.DictReader(out.open(), delimiter="\t"))
for row in rows[:3]:
    print(row)
right = np.array([row["description"] == row["class"] for row in rows])
print(f"{right.mean():.0%} of {len(rows)} events are decoded right")

# %%
# The mean over windows of each class is the event-related potential.
signal = Bundle.open(folder / "bundle").spec.signal
prepared = prepare(read_recording(folder / "session2_raw.fif"), signal)
kinds, times = np.array(prepared.events.description), np.arange(signal.n_times) / signal.sfreq

figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for kind in ("left", "right"):
    axes[0].plot(times, prepared.eeg[kinds == kind, 0].mean(axis=0), label=kind)
    axes[1].hist([float(r["left"]) - float(r["right"]) for r in rows if r["description"] == kind], bins=20, alpha=0.6, label=kind)
axes[0].set(xlabel="seconds after the event", ylabel="µV", title=f"mean at {signal.ch_names[0]}")
axes[1].set(xlabel="output “left” less output “right”", ylabel="events", title="what the model answers")
axes[0].legend()
axes[1].legend()
plt.show()
