"""
Train causally
==============

Filters that look ahead cannot run live. This example trains one model on causal windows and one on
zero-phase windows, and judges both live.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

from sjepa_deploy.eeg import prepare
from sjepa_deploy.eeg.planted import CH_NAMES, CLASSES, planted_recording
from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.eeg.steps import BandPass, Channels, Reference, Resample
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.spec import EventWindow, ModelSpec, SignalSpec

train, test = planted_recording(seed=1), planted_recording(seed=2)


def learn(phase):
    """Return a model of windows of one phase, and its signal."""
    signal = SignalSpec(
        n_chans=8,
        n_times=152,
        sfreq=100.0,
        ch_names=CH_NAMES,
        steps=(BandPass(l_freq=0.5, h_freq=40.0), Resample(), Channels(), Reference()),
        phase=phase,
        event_window=EventWindow(start=0.0, events=CLASSES),
    )
    windows = prepare(train, signal)
    eeg, targets = torch.as_tensor(windows.eeg), torch.tensor([CLASSES.index(k) for k in windows.events.description])
    torch.manual_seed(1)
    model = build_model(ModelSpec(variant="prelocal", signal=signal, n_outputs=2, class_names=CLASSES), seed=1).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(15):
        for rows in torch.randperm(len(eeg)).split(16):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(eeg[rows]), targets[rows]).backward()
            optimiser.step()
    return model.eval(), signal


def score(model, signal, phase):
    """Return the share of right decisions on windows of one phase of the other recording."""
    prepared = prepare(test, signal)
    fitted = fit_recording(test, signal, phase=phase)
    starts, whole = fitted.place_windows(prepared.events.onset, 0.0)
    eeg = np.stack([fitted.data[:, start : start + signal.n_times] for start in starts[whole]]).astype(np.float32)
    with torch.no_grad():
        decided = model(torch.as_tensor(eeg)).argmax(dim=1).numpy()
    names = np.array(prepared.events.description)[whole]
    return np.mean([CLASSES[number] == name for number, name in zip(decided, names, strict=True)])


scores = {}
for phase in ("causal", "zero-phase"):
    model, signal = learn(phase)
    scores[phase] = (score(model, signal, phase), score(model, signal, "causal"))
    print(f"trained on {phase} windows: {scores[phase][0]:.0%} right offline, {scores[phase][1]:.0%} right live")

# %%
# A live filter delays. The wave that follows an event then has another phase than in training. The
# model of zero-phase windows has never seen this wave.
figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
for offset, (label, column) in enumerate((("offline", 0), ("live", 1))):
    axis.bar(np.arange(2) + 0.35 * offset, [value[column] for value in scores.values()], width=0.33, label=label)
axis.axhline(0.5, color="gray", linewidth=0.8, label="chance")
axis.set(xticks=np.arange(2) + 0.17, xticklabels=[f"trained {name}" for name in scores], ylabel="share of right decisions")
axis.legend()
plt.show()
