"""What does a shorter window on the same weights change, and how much earlier does it decide?

Weights are trained on planted EEG with windows of 200 samples at 100 Hz, and run on windows of 152, which make the same token:
on other planted subjects for the score, beside weights trained on 152; on a real recording for the outputs, shifted against each
other to find by how much the shorter window is ahead.

    python benchmarks/window_length.py --recording eeglab_data.set --out benchmarks/results/window_length_HARDWARE_DATE
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, write_result
from sklearn.metrics import r2_score

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.windows import windows
from sjepa_deploy.export.window_length import compare_window_lengths
from sjepa_deploy.learning.data import DataConfig, Synthetic, Target
from sjepa_deploy.learning.finetune import FinetuneConfig, finetune
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.loop import Engine
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint
from sjepa_deploy.models.networks import SignalJEPAModule, build_model, reference_mode
from sjepa_deploy.models.resolve import resolve_spec
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import EncoderSpec

LONG, SHORT = 200, 152
HOP = 4
"""Samples between the windows that are shifted against each other: the resolution of the lead."""

MOST = 25
"""Largest shift, in hops."""


def run(model: SignalJEPAModule, eeg: np.ndarray) -> np.ndarray:
    with reference_mode(model):
        return np.concatenate([model(torch.from_numpy(np.ascontiguousarray(part)))[:, 0].numpy() for part in batches(eeg)])


def batches(eeg: np.ndarray) -> list[np.ndarray]:
    return np.array_split(eeg, -(-len(eeg) // 128))


def with_length(model: SignalJEPAModule, n_times: int) -> SignalJEPAModule:
    other = build_model(model.spec.replace(n_times=n_times), seed=0)
    other.load_state_dict(model.state_dict())
    return other.eval()


def train(variant: str, data: DataConfig, epochs: int, folder: Path) -> SignalJEPAModule:
    config = FinetuneConfig(
        variant=variant,
        warmup_epochs=0,
        encoder=EncoderSpec(n_layers=2, n_decoder_layers=1),
        data=dataclasses.replace(data, target=Target()),
        engine=Engine(max_epochs=epochs, patience=epochs, accelerator="cpu"),
    )
    finetune(config, folder)
    checkpoint = read_checkpoint(folder)
    return load_model(checkpoint, resolve_spec({}, checkpoint)[0])


def lead(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Return by how many seconds `after` runs ahead of `before`, and the correlation at that shift."""
    n = len(before) - MOST
    correlations = [np.corrcoef(before[shift : shift + n], after[:n])[0, 1] for shift in range(MOST)]
    best = int(np.argmax(correlations))
    return best * HOP / 100.0, float(correlations[best])


def measure(variant: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    montage = read_montage("sjepa-62")
    raw = read_recording(args.recording)
    there = {name.casefold() for name in raw.ch_names}
    ch_names = tuple(name for name in montage.ch_names if name.casefold() in there)
    planted = Synthetic(n_subjects=args.subjects, n_windows=64)
    data = DataConfig(montage="sjepa-62", ch_names=ch_names, n_times=LONG, synthetic=planted)
    trained = train(variant, data, args.epochs, folder / f"{variant}-long")
    retrained = train(variant, dataclasses.replace(data, n_times=SHORT), args.epochs, folder / f"{variant}-short")
    shortened = with_length(trained, SHORT)
    held_out = dataclasses.replace(data, synthetic=dataclasses.replace(planted, n_subjects=8, seed=1), target=Target())
    unseen = load_windows(held_out)
    start = unseen.eeg[..., :SHORT]
    scores = {
        "trained and run on 200": r2_score(unseen.targets, run(trained, unseen.eeg)),
        "trained on 200, run on 152": r2_score(unseen.targets, run(shortened, start)),
        "trained and run on 152": r2_score(unseen.targets, run(retrained, start)),
    }
    recording = fit_recording(raw, trained.spec.signal, phase="zero-phase").data
    change = compare_window_lengths(shortened, LONG, windows(recording, LONG, LONG // 4), "the recording")
    live = run(trained, windows(recording, LONG, HOP)), run(shortened, windows(recording[:, LONG - SHORT :], SHORT, HOP))
    ahead, correlation = lead(*live)
    return {
        "variant": variant,
        "n_chans": len(ch_names),
        "r2": scores,
        "on_recording": encode(change),
        "lead_s": ahead,
        "correlation_at_lead": correlation,
        "correlation_live": float(np.corrcoef(*live)[0, 1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recording", type=Path, required=True, help="EEG with channels of the 10-10 system")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    args = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(variant, args, Path(folder)) for variant in ("prelocal", "postlocal", "contextual")]
    names = list(rows[0]["r2"])
    lines = [f"| variant | {' | '.join(f'R2, {name}' for name in names)} | outputs change by | correlation | lead s | live |"]
    lines += ["| --- " * (len(names) + 5) + "|"]
    for row in rows:
        same = row["on_recording"]["same_tokens"]
        scores = " | ".join(f"{row['r2'][name]:.2f}" for name in names)
        lines.append(
            f"| {row['variant']} | {scores} | {100 * same['change']:.0f} % | {same['correlation']:.3f} | {row['lead_s']:.2f} | "
            f"{row['correlation_live']:.2f} |"
        )
    lines += [
        "",
        "R2 on planted subjects that no model saw. The others on a recording of "
        f"{rows[0]['n_chans']} channels: how much the outputs change, relative to their spread, where both windows begin at the "
        "same sample, and their correlation; where both end at the same sample, by how much those of the shorter window run "
        f"ahead (shifts of {HOP / 100:g} s were tried), and their correlation without a shift.",
    ]
    write_result(args.out, {"machine": machine, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
