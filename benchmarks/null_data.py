"""Whether `sjepa-evaluate` finds something where there is nothing: labels that say nothing of the EEG, and planted ones.

    python benchmarks/null_data.py --out benchmarks/results/null_data_HARDWARE_DATE

Each run makes the EEG of one person (10 recordings of 16 windows, 4 channels), trains a small PreLocal in five folds over
recordings in a plain loop, and asks for the verdict of `sjepa-evaluate`. 200 runs have labels that are permuted, 40 have a wave
that tells the class. Counted is also what permutations would find that take the folds for independent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from sjepa_deploy.evaluation.predictions import Predictions, joined, of_outputs
from sjepa_deploy.evaluation.results import judge
from sjepa_deploy.evaluation.statistics import ALPHA, Tally, chance, units_of
from sjepa_deploy.evaluation.verdict import verdict
from sjepa_deploy.learning.metrics import balanced_weights
from sjepa_deploy.models.networks import build_model, reference_mode
from sjepa_deploy.spec import EncoderSpec, ModelSpec

ROOT = Path(__file__).parents[1]
NAMES = ("a", "b")
ENCODER = EncoderSpec(conv_layers=((8, 32, 8), (16, 2, 2), (16, 2, 2)), spat_dim=6, time_dim=10, n_layers=1, n_heads=2)
PLANTED = 0.7
"""Size of the wave of the second class; the noise has a standard deviation of 1."""
N_RECORDINGS, N_WINDOWS, N_TIMES, N_FOLDS = 10, 16, 100, 5


def person(rng: np.random.Generator, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Return windows of noise that drifts, and their labels; `effect` is the size of a wave of the second class."""
    n = N_RECORDINGS * N_WINDOWS
    labels = np.concatenate([rng.permutation(np.arange(N_WINDOWS) % 2) for _ in range(N_RECORDINGS)])
    eeg = rng.normal(0, 1, (n, 4, N_TIMES)) + rng.normal(0, 1, (N_RECORDINGS, 4, 1)).repeat(N_WINDOWS, axis=0)
    wave = effect * np.sin(2 * np.pi * np.arange(N_TIMES) / 12) * np.hanning(N_TIMES)
    return (10 * (eeg + labels[:, None, None] * wave)).astype(np.float32), labels


def learned(eeg: np.ndarray, labels: np.ndarray, tested: np.ndarray, seed: int) -> np.ndarray:
    """Return the outputs of a PreLocal for windows that it was not trained on."""
    spec = ModelSpec.of(
        variant="prelocal", n_chans=4, n_times=N_TIMES, sfreq=100.0, n_outputs=2, class_names=NAMES, encoder=ENCODER
    )
    torch.manual_seed(seed)
    model = build_model(spec, seed=seed)
    known = np.flatnonzero(~tested)
    loss = torch.nn.CrossEntropyLoss(torch.from_numpy(balanced_weights(labels[known], 2)).float())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    windows, targets = torch.from_numpy(eeg), torch.from_numpy(labels)
    for _ in range(8):
        for rows in torch.from_numpy(known)[torch.randperm(len(known))].split(32):
            optimizer.zero_grad()
            loss(model(windows[rows]), targets[rows]).backward()
            optimizer.step()
    with reference_mode(model):
        return model(windows[tested]).numpy()


def run(seed: int, effect: float) -> dict:
    """Return the verdict about one person."""
    rng = np.random.default_rng(seed)
    eeg, labels = person(rng, effect)
    recording = np.repeat(np.arange(N_RECORDINGS), N_WINDOWS)
    folds = rng.permutation(np.arange(N_RECORDINGS) % N_FOLDS)[recording]
    parts = []
    for fold in range(N_FOLDS):
        tested = folds == fold
        rows = np.flatnonzero(tested)
        parts.append(
            Predictions(
                model="prelocal", way="offline", class_names=NAMES, window=rows, subject=np.full(len(rows), "p"),
                session=np.full(len(rows), "1"), recording=recording[rows].astype(str), onset=rows.astype(float),
                fold=folds[rows], seed=np.zeros(len(rows), np.intp), truth=labels[rows],
                **of_outputs(learned(eeg, labels, tested, seed * N_FOLDS + fold), NAMES),
            )
        )  # fmt: skip
    predictions = joined(parts)
    found = judge([predictions], seed=seed)
    figure, by_chance = found.judged[0].figures["balanced_accuracy"], found.judged[0].chance["balanced_accuracy"]
    one_fold = dataclasses.replace(predictions, fold=np.zeros(len(predictions), np.intp))
    p_independent = chance(Tally(one_fold, units_of(one_fold)), seed=seed)["balanced_accuracy"].p
    return {
        "seed": seed, "effect": effect, "balanced_accuracy": figure.value, "low": figure.low, "high": figure.high,
        "p": by_chance.p, "p_folds_independent": p_independent, "verdict": verdict(found, ())[0],
    }  # fmt: skip


def main() -> None:
    """Run all, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--planted", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.monotonic(), []
    for effect, n in ((0.0, args.runs), (PLANTED, args.planted)):
        for seed in range(n):
            rows.append(run(seed, effect))
            print(json.dumps(rows[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    facts = {"commit": commit.stdout.strip(), "torch": torch.__version__, "seconds": round(time.monotonic() - started)}
    command = f"python benchmarks/null_data.py --runs {args.runs} --planted {args.planted}"
    lines = ["# Null data", "", ", ".join(f"{k} {v}" for k, v in facts.items()), "", f"`{command}`", ""]
    heads = ("labels", "runs", "better than chance", "p < 0.05 if folds were independent", "balanced accuracy")
    lines += ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for effect, name in ((0.0, "permuted"), (PLANTED, "planted")):
        own = [row for row in rows if row["effect"] == effect]
        better = sum("is better than chance" in row["verdict"] for row in own)
        plain = sum(row["p_folds_independent"] < ALPHA for row in own)
        values = [row["balanced_accuracy"] for row in own]
        lines.append(f"| {name} | {len(own)} | {better} | {plain} | {np.mean(values):.3f} (sd {np.std(values):.3f}) |")
    args.out.with_suffix(".json").write_text(json.dumps(facts | {"command": command, "rows": rows}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
