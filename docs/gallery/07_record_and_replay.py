"""
Record a run, and replay it
===========================

A record holds the samples as they came, the decisions and all incidents. This example records a
run, decodes the record again, and compares every decision.

The module :download:`tutorial_bundle.py <tutorial_bundle.py>` makes the recordings and the bundle. Save the module
beside this example.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyxdf
from tutorial_bundle import tutorial_folder

from sjepa_deploy.cli import group, run_command

folder, record = tutorial_folder(), Path(tempfile.mkdtemp()) / "run.xdf"
command = f"stream {folder}/bundle --source file:{folder}/session2_raw.fif --hop 0.1 --duration 60 --speed inf --late queue -q"
run_command(group, "sjepa", [*command.split(), "--record", str(record)])

# %%
# The replay decodes the samples of the record. It ends with status 1 if one decision differs in one
# bit.
run_command(group, "sjepa", ["stream", f"{folder}/bundle", "--replay", str(record), "-q"])

# %%
# A record is an XDF file, which other programs read too.
streams, _ = pyxdf.load_xdf(str(record))
for stream in streams:
    info = stream["info"]
    print(f"{info['name'][0]}: type {info['type'][0]}, {info['channel_count'][0]} channels, {len(stream['time_stamps'])} samples")
eeg = next(stream for stream in streams if stream["info"]["type"][0] == "EEG")
begin = eeg["time_stamps"][0]
shown = eeg["time_stamps"] < begin + 5
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
axis.plot(eeg["time_stamps"][shown] - begin, eeg["time_series"][shown, 0])
axis.set(xlabel="seconds", ylabel="first channel, as received", title="five seconds of the record")
plt.show()
