"""
A latency report, read aloud
============================

``sjepa-bench`` measures how long a call takes on your machine. This example measures for a short
time, and reads the report to you.

The module :download:`tutorial_bundle.py <tutorial_bundle.py>` makes the recordings and the bundle. Save the module
beside this example.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tutorial_bundle import tutorial_folder

from sjepa_deploy.cli import group, run_command

out = Path(tempfile.mkdtemp())
command = (
    f"bench {tutorial_folder()}/bundle --backend ort-cpu --scenario back-to-back --scenario paced --rate 50 --duration 0.5 "
    f"--out {out} -q"
)
with contextlib.redirect_stdout(io.StringIO()):
    run_command(group, "sjepa", [*command.split(), "--force", "--processes", "1"])
report = json.loads((out / "bench.json").read_text())
samples = np.load(out / "bench.npz")

# %%
# A report has one cell for each backend and load. The backend “nothing” tells what measuring costs.
names = {}
for cell in report["cells"]:
    key, latency = cell["key"], cell["latency"]
    if key["backend"] != "ort-cpu":
        continue
    names[cell["id"]] = key["scenario"] + (", keep-warm" if key["keep_warm"] else "")
    told = [
        f"{each['percent']:g} % of the calls take at most {each['value']['value']:.0f} µs"
        for each in latency["percentiles"]
        if each["value"]
    ]
    print(f"{names[cell['id']]}, {latency['n']} calls: {'; '.join(told)}.")

# %%
# Back to back, the caches are warm. Paced calls wait for their window, and the first call after a
# pause is slower. Look at the whole distribution, and not at the mean: the slow calls decide
# whether a deadline holds.
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for cell, name in names.items():
    values = np.sort(samples[f"{cell}.latency_us"])
    axis.plot(values, 1 - np.arange(len(values)) / len(values), label=name)
axis.set(xscale="log", yscale="log", xlabel="µs", ylabel="share of calls that take longer")
axis.legend()
plt.show()
