"""
A braindecode model becomes a bundle
====================================

You trained a model of braindecode with PyTorch. This example exports the model, and compares the
bundle with the PyTorch model.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from braindecode.models import SignalJEPA_PostLocal

import sjepa_deploy
from sjepa_deploy.cli import group, run_command
from sjepa_deploy.eeg import prepare
from sjepa_deploy.eeg.planted import CH_NAMES, CLASSES, planted_recording
from sjepa_deploy.eeg.signal_file import write_signal
from sjepa_deploy.eeg.steps import BandPass, Channels, Reference, Resample
from sjepa_deploy.spec import EventWindow, SignalSpec

folder = Path(tempfile.mkdtemp())

# %%
# The signal says how a recording becomes windows. :func:`sjepa_deploy.eeg.prepare` makes the
# windows causally: the live decoder will make the same ones.
signal = SignalSpec(
    n_chans=8,
    n_times=152,
    sfreq=100.0,
    ch_names=CH_NAMES,
    steps=(BandPass(l_freq=0.5, h_freq=40.0), Resample(), Channels(), Reference()),
    event_window=EventWindow(start=0.0, events=CLASSES),
)
prepared = prepare(planted_recording(seed=1), signal)
targets = torch.tensor([CLASSES.index(name) for name in prepared.events.description])

# %%
# Train the model as you always do.
torch.manual_seed(1)
model = SignalJEPA_PostLocal(n_outputs=2, n_chans=8, n_times=152, sfreq=100.0, n_spat_filters=4)
optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
windows = torch.as_tensor(prepared.eeg)
losses = []
for _ in range(15):
    for rows in torch.randperm(len(windows)).split(16):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(windows[rows]), targets[rows])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
model.eval()

# %%
# Save the weights and the signal, and export both. The export compares every graph with the model
# in float64.
torch.save(model.state_dict(), folder / "model.pth")
write_signal(folder / "signal.json", signal)
command = f"export --checkpoint {folder}/model.pth --signal {folder}/signal.json --class-names left,right --out {folder}/bundle"
run_command(group, "sjepa", [*command.split(), "--precision", "fp32", "--quiet"])

# %%
# The bundle decodes without PyTorch. Its outputs are those of the model.
with sjepa_deploy.load(folder / "bundle") as predict:
    decoded = np.concatenate([predict(part) for part in np.array_split(prepared.eeg, 4)])
with torch.no_grad():
    wanted = model(windows).numpy()
print(f"largest difference: {np.abs(decoded - wanted).max():.1e}")

figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
axes[0].plot(losses)
axes[0].set(xlabel="step", ylabel="loss", title="training in PyTorch")
axes[1].plot(wanted[:, 0], decoded[:, 0], ".")
axes[1].axline((0, 0), slope=1, color="gray", linewidth=0.8)
axes[1].set(xlabel="PyTorch", ylabel="bundle", title="output for “left”")
plt.show()
