"""Does the live decoder decode what the model learned, with causal and with zero-phase training, and what does causality cost?

EEG is planted: on noise with the spectrum of EEG, each event is followed by a wave that is locked to its event and has another
sign for the two classes. A model learns from one recording and is judged on another one: on windows of its own phase, as offline,
and on windows of the live path.

    python benchmarks/task_parity.py --seeds 5 --out benchmarks/results/task_parity_MACHINE_DATE
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import get_args

import mne
import numpy as np
import torch
from machine import describe_machine, write_result

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.prepared import prepare
from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.eeg.steps import BandPass, Channels, Phase, Reference, Resample
from sjepa_deploy.evaluation.task import live_windows
from sjepa_deploy.learning.metrics import balanced_accuracy
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.spec import EncoderSpec, EventWindow, ModelSpec, SignalSpec

VARIANTS = ("prelocal", "postlocal", "contextual")
CLASSES = ("left", "right")
SOURCE_SFREQ, HERTZ, AMPLITUDE = 250.0, 8.0, 1.6e-6
MONTAGE = read_montage("sjepa-62").pick(["F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2"])
ENCODER = EncoderSpec(n_layers=2, n_decoder_layers=1)
EPOCHS, BATCH = 30, 16


def planted(rng: np.random.Generator, n_events: int) -> mne.io.RawArray:
    """Return a recording of 8 channels at 250 Hz with `n_events` events, and a wave of 0.8 s from 0.2 s after each."""
    n = round((n_events * 2.2 + 10) * SOURCE_SFREQ)
    volts = np.cumsum(rng.normal(size=(8, n)), axis=1) * 0.7e-6 + rng.normal(size=(8, n)) * 6e-6
    onsets = 6.0 + 2.2 * np.arange(n_events) + rng.uniform(0, 0.2, n_events)
    kinds = rng.permutation([CLASSES[i % 2] for i in range(n_events)])
    length = round(0.8 * SOURCE_SFREQ)
    wave = AMPLITUDE * np.sin(2 * np.pi * HERTZ * np.arange(length) / SOURCE_SFREQ) * np.hanning(length)
    for onset, kind in zip(onsets, kinds, strict=True):
        first = round((onset + 0.2) * SOURCE_SFREQ)
        volts[:, first : first + length] += np.outer([1, -1] * 4, wave if kind == "left" else -wave)
    raw = mne.io.RawArray(volts, mne.create_info(list(MONTAGE.ch_names), SOURCE_SFREQ, "eeg"), verbose="error")
    return raw.set_annotations(mne.Annotations(onsets, 0.0, kinds), verbose="error")


def signal_of(phase: Phase) -> SignalSpec:
    """Return a signal of 1.6 s after each event at 100 Hz."""
    return SignalSpec(
        n_chans=8,
        n_times=160,
        sfreq=100.0,
        ch_names=MONTAGE.ch_names,
        positions=MONTAGE.positions,
        steps=(BandPass(l_freq=0.5, h_freq=40.0), Resample(), Channels(), Reference()),
        phase=phase,
        event_window=EventWindow(start=0.0, events=CLASSES),
    )


def labels(names: tuple[str, ...]) -> np.ndarray:
    """Return the number of each class."""
    return np.array([CLASSES.index(name) for name in names])


def learned(spec: ModelSpec, eeg: np.ndarray, targets: np.ndarray, seed: int) -> torch.nn.Module:
    """Return a model that learned from scratch."""
    torch.manual_seed(seed)
    model = build_model(spec, seed=seed).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3 if spec.variant != "contextual" else 1e-3, weight_decay=0.01)
    x, y = torch.as_tensor(eeg), torch.as_tensor(targets)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    return model.eval()


def main() -> None:
    """Run all seeds, variants and phases, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--events", type=int, default=200, help="events of each of the two recordings")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, started = [], time.monotonic()
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        train, test = planted(rng, args.events), planted(rng, args.events)
        for phase in get_args(Phase):
            signal = signal_of(phase)
            taught, judged = prepare(train, signal), prepare(test, signal)
            truth = labels(judged.events.description)
            causal = fit_recording(test, signal, phase="causal")
            starts, whole = causal.place_windows(judged.events.onset, 0.0)
            assert whole.all()
            for variant in VARIANTS:
                spec = ModelSpec(variant=variant, signal=signal, n_outputs=2, class_names=CLASSES, encoder=ENCODER)
                model = learned(spec, taught.eeg, labels(taught.events.description), seed)
                live = np.stack(list(live_windows(test, causal, starts, spec.signal, interpolate=0.0, seed=seed)))
                with torch.inference_mode():
                    decided = [model(torch.as_tensor(eeg)).numpy().argmax(axis=1) for eeg in (judged.eeg, live)]
                offline, online = (balanced_accuracy(truth, np.eye(2)[each]) for each in decided)
                rows.append(
                    {
                        "seed": seed,
                        "variant": variant,
                        "phase": phase,
                        "offline": offline,
                        "live": online,
                        "differ": float((decided[0] != decided[1]).mean()),
                    }
                )
                print(rows[-1], flush=True)
    lines = [
        "# Task parity with causal and with zero-phase training",
        "",
        f"Balanced accuracy on {args.events} events of another recording, mean over {args.seeds} seeds (lowest to highest).",
        f"Planted: {HERTZ:g} Hz, locked to the event, {AMPLITUDE * 1e6:g} uV; chance is 0.5. {time.monotonic() - started:.0f} s.",
        "",
        "| variant | trained on | offline, own phase | live | other decisions live |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        for phase in get_args(Phase):
            of = [row for row in rows if (row["variant"], row["phase"]) == (variant, phase)]
            cells = []
            for name in ("offline", "live"):
                values = [row[name] for row in of]
                cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            differ = np.mean([row["differ"] for row in of])
            lines.append(f"| {variant} | {phase} | {cells[0]} | {cells[1]} | {differ:.1%} |")
    write_result(args.out, {"machine": describe_machine(), "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
