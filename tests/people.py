"""Planted people: a wave that is locked to events, of another sign for each of two classes. Places and delays are of a person."""

import mne
import numpy as np
import torch
from bundles import MONTAGE, RANDOM

from sjepa_deploy.eeg.prepared import prepare
from sjepa_deploy.eeg.steps import BandPass, Channels, Reference, Resample
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.spec import EncoderSpec, EventWindow, ModelSpec, SignalSpec

CLASSES = ("left", "right")
SFREQ = 250.0
ENCODER = EncoderSpec(
    conv_layers=((8, 32, 8), (16, 2, 2), (16, 2, 2), (16, 2, 2), (16, 2, 2)), spat_dim=6, time_dim=10, n_layers=1, n_heads=2
)
SHIFT = 0.06
"""Seconds by which the wave of another person comes later: half a period, so that the classes change places."""


def recording(seed: int, n_events: int, delay: float = 0.0, amplitude: float = 3e-6) -> mne.io.RawArray:
    """Return a recording of 8 channels at 250 Hz; the waves of 8 Hz begin 0.2 s + `delay` after the events."""
    rng = np.random.default_rng(seed)
    n = round((n_events * 2.0 + 10) * SFREQ)
    volts = np.cumsum(rng.normal(size=(8, n)), axis=1) * 0.7e-6 + rng.normal(size=(8, n)) * 6e-6
    onsets = 6.0 + 2.0 * np.arange(n_events) + rng.uniform(0, 0.1, n_events)
    kinds = rng.permutation([CLASSES[i % 2] for i in range(n_events)])
    length = round(0.8 * SFREQ)
    wave = amplitude * np.sin(2 * np.pi * 8.0 * np.arange(length) / SFREQ) * np.hanning(length)
    for onset, kind in zip(onsets, kinds, strict=True):
        first = round((onset + 0.2 + delay) * SFREQ)
        volts[:, first : first + length] += np.outer([1, -1] * 4, wave if kind == "left" else -wave)
    raw = mne.io.RawArray(volts, mne.create_info(list(MONTAGE.ch_names), SFREQ, "eeg"), verbose="error")
    return raw.set_annotations(mne.Annotations(onsets, 0.0, kinds), verbose="error")


def spec_of(variant: str = "prelocal", **changes) -> ModelSpec:
    signal = SignalSpec(
        n_chans=8,
        n_times=160,
        sfreq=100.0,
        ch_names=MONTAGE.ch_names,
        positions=MONTAGE.positions,
        steps=changes.pop("steps", (BandPass(l_freq=0.5, h_freq=40.0), Resample(), Channels(), Reference())),
        phase="causal",
        event_window=EventWindow(start=0.0, events=CLASSES),
    )
    fields = {"n_outputs": 2, "class_names": CLASSES, "encoder": ENCODER}
    return ModelSpec(variant=variant, signal=signal, **fields | changes)


def labels(prepared) -> np.ndarray:
    return np.array([CLASSES.index(name) for name in prepared.events.description])


def learned(spec: ModelSpec, eeg: np.ndarray, targets: np.ndarray, epochs: int = 20) -> torch.nn.Module:
    """Return a model that learned from scratch."""
    torch.manual_seed(0)
    model = build_model(spec, seed=0).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    x, y = torch.as_tensor(eeg), torch.as_tensor(targets)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(16):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    return model.eval()


def export(path) -> None:
    """Export a model that learned from 120 events of one person."""
    spec = spec_of()
    prepared = prepare(recording(0, 120), spec.signal)
    to_bundle(learned(spec, prepared.eeg, labels(prepared)), path, weights=RANDOM, precisions=("fp32",), max_batch=8)
