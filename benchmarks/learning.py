"""What pretraining and fine-tuning give: three studies, raw figures and a summary under ``benchmarks/results``.

    python benchmarks/learning.py planted --seeds 5 --out benchmarks/results/learning_planted_HARDWARE_DATE
    SJEPA_EEG=FOLDER python benchmarks/learning.py eeglab --out benchmarks/results/learning_eeglab_HARDWARE_DATE
    SJEPA_EEG=FOLDER python benchmarks/learning.py p300 --tune-epochs 60 --out benchmarks/results/learning_p300_HARDWARE_DATE

planted: on synthetic EEG, the L1 of pretraining against the mean embedding; a linear probe on the frozen base against one on a
random base; optimiser steps until fine-tuning reaches a score, with and without the base.
eeglab: reaction time of one real recording, three variants, frozen and full, folds of contiguous blocks.
p300: targets of a real visual oddball with 4 electrodes (15.6 %), person 1, PreLocal from scratch, folds over runs, with and
without class weights, windows of one second after the event.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning
import numpy as np
import sklearn
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.learning.data import DataConfig, Synthetic, Target, split_windows
from sjepa_deploy.learning.finetune import FinetuneConfig, finetune
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.loop import Engine
from sjepa_deploy.learning.masking import Masking
from sjepa_deploy.learning.pretrain import PretrainConfig, pretrain
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint
from sjepa_deploy.models.networks import build_model, reference_mode
from sjepa_deploy.models.resolve import resolve_spec
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import EncoderSpec

ROOT = Path(__file__).parents[1]
SMALL = EncoderSpec(
    conv_layers=((8, 32, 8), (16, 2, 2), (16, 2, 2), (16, 2, 2), (16, 2, 2)),
    spat_dim=6, time_dim=10, n_layers=2, n_decoder_layers=1, n_heads=2,
)  # fmt: skip
VAL_MSE = 0.4  # of standardised targets: an R2 of about 0.6


def features(model, eeg: np.ndarray) -> np.ndarray:
    """Return the flattened embeddings of windows."""
    with reference_mode(model):
        return model(torch.from_numpy(eeg)).flatten(1).numpy()


def steps_to_score(folder: Path) -> int | None:
    """Return the optimiser steps until the validation loss was at most `VAL_MSE`, from the CSV log."""
    for row in csv.DictReader((folder / "training/logs/version_0/metrics.csv").open()):
        if row.get("val_loss") and float(row["val_loss"]) <= VAL_MSE:
            return int(row["step"]) + 1
    return None


def planted(args: argparse.Namespace, folder: Path) -> dict:
    """Study synthetic EEG."""
    ch_names = read_montage("sjepa-62").ch_names[::4]
    rows = []
    for seed in range(args.seeds):
        data = DataConfig(
            montage="sjepa-62", ch_names=ch_names, n_times=152, synthetic=Synthetic(n_subjects=16, n_windows=64, seed=seed)
        )
        engine = Engine(max_epochs=args.epochs, patience=args.epochs, weight_decay=0.01, seed=seed, accelerator="cpu")
        config = PretrainConfig(
            data=data, encoder=SMALL, masking=Masking(radius=0.8), ema_start=0.996, ema_end=0.996, engine=engine
        )
        start = time.perf_counter()
        base = folder / f"base-{seed}"
        result = pretrain(config, base)
        row = {"seed": seed, "seconds": time.perf_counter() - start, "pretraining": encode(result.fitted)}
        row |= {"val_l1": result.val_l1, "val_l1_mean": result.val_l1_mean, "spread": result.spread}
        last = torch.load(base / "training/last.ckpt", weights_only=True)["state_dict"]
        labelled = dataclasses.replace(data, target=Target())
        windows = load_windows(labelled)
        split = split_windows(windows, labelled)
        checkpoint = read_checkpoint(base)
        spec, _ = resolve_spec({}, checkpoint)
        models = {"pretrained": load_model(checkpoint, spec), "random": build_model(spec, seed=seed)}
        models["pretrained, last epoch"] = build_model(spec, seed=seed)
        models["pretrained, last epoch"].load_state_dict(
            {k.removeprefix("jepa.base."): v for k, v in last.items() if k.startswith("jepa.base.")}
        )
        row["probe_r2"] = {}
        for n_labels in (64, 256):
            train = np.random.default_rng(seed).permutation(split.train)[:n_labels]
            for name, model in models.items():
                probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 5, 15)))
                probe.fit(features(model, windows.eeg[train]), windows.targets[train])
                score = probe.score(features(model, windows.eeg[split.test]), windows.targets[split.test])
                row["probe_r2"][f"{name}, {n_labels} labels"] = score
        row["steps"] = {}
        for variant in ("postlocal", "contextual"):
            for kind in ("pretrained", "scratch"):
                tuned = Engine(max_epochs=args.tune_epochs, patience=args.tune_epochs, seed=seed, accelerator="cpu")
                out = folder / f"{variant}-{kind}-{seed}"
                given = (
                    {"pretrained": str(base), "warmup_epochs": 0}
                    if kind == "pretrained"
                    else {"encoder": SMALL, "warmup_epochs": 0}
                )
                outcome = finetune(FinetuneConfig(variant=variant, data=labelled, engine=tuned, **given), out)
                row["steps"][f"{variant}, {kind}"] = steps_to_score(out)
                row.setdefault("test_r2", {})[f"{variant}, {kind}"] = outcome.test["r2"].value
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"val_mse": VAL_MSE, "rows": rows}


def eeglab(args: argparse.Namespace, folder: Path) -> dict:
    """Study a real recording."""
    source = Path(os.environ.get("SJEPA_EEG", ROOT / "../shared/eeg")) / "eeglab_data.set"
    encoder = EncoderSpec(n_layers=args.layers, n_decoder_layers=1)
    unlabelled = DataConfig(source=(str(source),), hop=0.5)
    target = Target(stimulus=("square",), response=("rt",))
    rows = []
    for fold in range(args.folds):
        data = dataclasses.replace(unlabelled, fold=fold)
        engine = Engine(max_epochs=args.epochs, patience=10, weight_decay=0.01, accelerator="cpu")
        base = folder / f"base-{fold}"
        result = pretrain(PretrainConfig(data=data, encoder=encoder, ema_start=0.996, ema_end=0.996, engine=engine), base)
        print(fold, result.fitted, result.val_l1_mean, result.spread, flush=True)
        for variant in ("prelocal", "postlocal", "contextual"):
            for freeze in (True, False):
                tuned = Engine(max_epochs=args.tune_epochs, patience=20, accelerator="cpu")
                config = FinetuneConfig(
                    variant=variant, pretrained=str(base), freeze_encoder=freeze, encoder_to_prelocal=True,
                    data=dataclasses.replace(data, target=target), engine=tuned,
                )  # fmt: skip
                r = finetune(config, folder / f"{variant}-{freeze}-{fold}")
                row = {"fold": fold, "variant": variant, "frozen": freeze, "n_test": r.n_test, "n_train": r.n_train}
                row |= {"epochs": r.fitted.epochs, "test": encode(r.test), "baseline": encode(r.baseline)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return {"rows": rows}


def p300(args: argparse.Namespace, folder: Path) -> dict:
    """Study the rare class of a real oddball."""
    root = Path(os.environ.get("SJEPA_EEG", ROOT / "../shared/eeg")) / "p300"
    target = Target(kind="event", task="classification", classes=("nontarget", "target"), tmin=0.0)
    rows = []
    for weights in ("none", "balanced"):
        targets, probabilities = [], []
        for fold in range(args.folds):
            data = DataConfig(
                source=tuple(map(str, sorted(root.glob("sub-1_*.edf")))), target=target, sfreq=256.0, n_times=256, fold=fold
            )
            engine = Engine(max_epochs=args.tune_epochs, patience=20, accelerator="cpu")
            config = FinetuneConfig(variant="prelocal", data=data, engine=engine, class_weights=weights)
            out = folder / f"{weights}-{fold}"
            result = finetune(config, out)
            windows = load_windows(data)
            test = split_windows(windows, data).test
            model = load_model(read_checkpoint(out), result.spec)
            with reference_mode(model):
                probabilities.append(model(torch.from_numpy(windows.eeg[test])).softmax(dim=1)[:, 1].numpy())
            targets.append(windows.targets[test])
            row = {"weights": weights, "fold": fold, "epochs": result.fitted.epochs, "classes": encode(result.classes)}
            row |= {"n_test": result.n_test, "test": encode(result.test)}
            row["at_threshold"] = balanced_accuracy_score(targets[-1], probabilities[-1] >= result.classes.threshold)
            rows.append(row)
            print(json.dumps(row), flush=True)
        known, scored = np.concatenate(targets), np.concatenate(probabilities)
        found = int(((scored > 0.5) & (known == 1)).sum())
        rows.append({
            "weights": weights, "fold": "all", "found": found, "n_targets": int(known.sum()), "n_test": len(known),
            "balanced_accuracy": balanced_accuracy_score(known, scored > 0.5), "auc": roc_auc_score(known, scored),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def summary_of_p300(result: dict) -> list[str]:
    """Return Markdown."""
    lines = ["| weights | fold | balanced accuracy (95 % of windows) | with the threshold of validation | AUC | targets found |"]
    lines.append("| --- " * 6 + "|")
    for row in result["rows"]:
        if row["fold"] == "all":
            folds = [each for each in result["rows"] if each["weights"] == row["weights"] and each["fold"] != "all"]
            mean = {name: np.mean([each["test"][name]["value"] for each in folds]) for name in ("balanced_accuracy", "auc")}
            at = np.mean([each["at_threshold"] for each in folds])
            found = f"{row['found']} of {row['n_targets']}"
            lines.append(f"| {row['weights']} | mean | {mean['balanced_accuracy']:.3f} | {at:.3f} | {mean['auc']:.3f} | |")
            lines.append(f"| {row['weights']} | pooled | {row['balanced_accuracy']:.3f} | | {row['auc']:.3f} | {found} |")
        else:
            score = "{value:.3f} ({low:.3f} to {high:.3f})".format(**row["test"]["balanced_accuracy"])
            at, area = row["at_threshold"], row["test"]["auc"]["value"]
            lines.append(f"| {row['weights']} | {row['fold']} | {score} | {at:.3f} | {area:.3f} | |")
    return lines


def summary_of_planted(result: dict) -> list[str]:
    """Return Markdown."""
    rows = result["rows"]
    ratios = [row["val_l1"] / row["val_l1_mean"] for row in rows]
    lines = [f"L1 / L1 of the mean embedding at the best epoch, by seed: {', '.join(f'{x:.2f}' for x in ratios)}."]
    lines += [f"Spread at the best epoch: {', '.join(format(row['spread'], '.2f') for row in rows)}.", ""]
    lines += ["| linear probe, R2 of the test subjects | mean | by seed |", "| --- | --- | --- |"]
    for name in rows[0]["probe_r2"]:
        values = [row["probe_r2"][name] for row in rows]
        lines.append(f"| {name} | {np.mean(values):.3f} | {', '.join(f'{v:.3f}' for v in values)} |")
    lines += [
        "",
        f"| steps to a validation MSE of {VAL_MSE} (standardised) | by seed | R2 on the test subjects |",
        "| --- | --- | --- |",
    ]
    for name in rows[0]["steps"]:
        steps = ", ".join(str(row["steps"][name] or "never") for row in rows)
        lines.append(f"| {name} | {steps} | {', '.join(format(row['test_r2'][name], '.2f') for row in rows)} |")
    return lines


def summary_of_eeglab(result: dict) -> list[str]:
    """Return Markdown."""
    lines = ["| variant | fold | epochs | R2 (95 %) | NRMSE (95 %) | MAE in s (95 %) | mean: NRMSE, MAE |", "| --- " * 7 + "|"]
    for row in result["rows"]:
        scores = ["{value:.3f} ({low:.3f} to {high:.3f})".format(**row["test"][name]) for name in ("r2", "nrmse", "mae")]
        mean = ", ".join(f"{row['baseline'][name]['value']:.3f}" for name in ("nrmse", "mae"))
        kind = f"{row['variant']}, {'frozen' if row['frozen'] else 'full'}"
        lines.append(f"| {kind} | {row['fold']} | {row['epochs']} | {' | '.join(scores)} | {mean} |")
    return lines


def main() -> None:
    """Run a study and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["planted", "eeglab", "p300"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=18, help="of pretraining")
    parser.add_argument("--tune-epochs", type=int, default=12)
    parser.add_argument("--layers", type=int, default=2, help="encoder layers of the eeglab study")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = {"planted": planted, "eeglab": eeglab, "p300": p300}[args.study](args, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
    versions |= {"scikit-learn": sklearn.__version__, "commit": commit.stdout.strip(), "threads": str(args.threads)}
    command = " ".join(["python", "benchmarks/learning.py", *sys.argv[1:]])
    result = {"versions": versions, "command": command} | result
    head = [f"# {args.study}", "", ", ".join(f"{k} {v}" for k, v in versions.items()), "", f"`{command}`", ""]
    lines = {"planted": summary_of_planted, "eeglab": summary_of_eeglab, "p300": summary_of_p300}[args.study](result)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
