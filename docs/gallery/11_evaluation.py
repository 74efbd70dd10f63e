"""
Evaluate a bundle, offline and live
===================================

``sjepa-evaluate`` decodes recordings through the live path, as if they came from an amplifier. This
example evaluates a bundle with its decision layer, and reads the table of all decisions.

The module :download:`tutorial_bundle.py <tutorial_bundle.py>` makes the recordings and the bundle. Save the module
beside this example.
"""

import csv
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tutorial_bundle import tutorial_folder

from sjepa_deploy.cli import group, run_command
from sjepa_deploy.eeg.planted import planted_recording

folder = Path(tempfile.mkdtemp())
bundle = shutil.copytree(tutorial_folder() / "bundle", folder / "bundle")
planted_recording(seed=3).save(folder / "session3_raw.fif", verbose="error")

# %%
# The layer is fitted on one recording, and judged on another one.
fit = f"decide {bundle} --fit {folder}/session3_raw.fif --classes left=left,right=right --accept-rate 0.8"
judge = f"evaluate {bundle} {tutorial_folder()}/session2_raw.fif --classes left=left,right=right --out {folder}/evaluation"
for command in (fit, judge):
    assert run_command(group, "sjepa", [*command.split(), "--quiet"]) == 0

# %%
# The table has one row for each window and way. All figures of the page can be computed from the table.
with (folder / "evaluation" / "predictions.tsv").open() as file:
    rows = list(csv.DictReader(file, delimiter="\t"))
live = [row for row in rows if row["way"] == "live"]
decided = [row for row in live if row["decision"] != "n/a"]
right = np.mean([row["decision"] == row["label"] for row in decided])
print(f"live: {len(decided)} of {len(live)} events are decided, {right:.0%} of the decisions are right")

figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for kind in ("left", "right"):
    axis.hist(
        [float(row["probability"]) for row in live if row["label"] == kind], bins=np.linspace(0, 1, 21), alpha=0.6, label=kind
    )
axis.set(xlabel="probability of “right”, live", ylabel="events")
axis.legend(title="event")
plt.show()
