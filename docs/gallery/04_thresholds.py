"""
Calibrated probabilities and a threshold
========================================

A decision layer makes decisions of outputs: a class with a probability, or “not yet”. This example
fits a layer, and shows what other thresholds would give.

The module :download:`tutorial_bundle.py <tutorial_bundle.py>` makes the recordings and the bundle. Save the module
beside this example.
"""

import itertools
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tutorial_bundle import tutorial_folder

import sjepa_deploy
from sjepa_deploy.cli import group, run_command
from sjepa_deploy.eeg import prepare
from sjepa_deploy.eeg.planted import planted_recording

folder = Path(tempfile.mkdtemp())
bundle = shutil.copytree(tutorial_folder() / "bundle", folder / "bundle")

# %%
# Fit on a recording that the model did not learn from. Eight of ten events shall get a decision.
planted_recording(seed=3).save(folder / "session3_raw.fif", verbose="error")
command = f"decide {bundle} --fit {folder}/session3_raw.fif --classes left=left,right=right --accept-rate 0.8 --quiet"
run_command(group, "sjepa", command.split())

# %%
# Judge the layer on a third recording.
layer = sjepa_deploy.DecisionLayer.load(bundle)
with sjepa_deploy.load(bundle) as predict:
    prepared = prepare(planted_recording(seed=2), predict.spec.signal)
    outputs = np.concatenate([predict(part) for part in np.array_split(prepared.eeg, 4)])
states = [layer.step(output, float(time)) for time, output in enumerate(outputs)]
truth = prepared.events.description
decided = [(state.class_name == name) for state, name in zip(states, truth, strict=True) if state.name == "decided"]
print(f"{len(decided)} of {len(states)} events get a decision, {np.mean(decided):.0%} of the decisions are right")

# %%
# A higher threshold gives fewer decisions, and more of them are right.
probability = np.array([state.probability for state in states])
best = np.array([max(zip(state.probabilities, layer.description.class_names, strict=True))[1] for state in states])
right = best == np.array(truth)
thresholds = np.linspace(0.5, 0.99, 50)
kept = [probability >= threshold for threshold in thresholds]
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
axes[0].plot([k.mean() for k in kept], [right[k].mean() if k.any() else np.nan for k in kept])
axes[0].set(xlabel="share of events with a decision", ylabel="share of right decisions", title="other thresholds")
edges = np.linspace(0.5, 1, 6)
groups = [(probability >= low) & (probability <= high) for low, high in itertools.pairwise(edges)]
axes[1].plot([probability[g].mean() for g in groups if g.any()], [right[g].mean() for g in groups if g.any()], "o-")
axes[1].axline((0.5, 0.5), slope=1, color="gray", linewidth=0.8)
axes[1].set(xlabel="probability", ylabel="share of right decisions", title="is the probability true?")
plt.show()
