"""What the software gives on a real visual oddball: variants beside baselines and skorch, offline and live, in one table.

    SJEPA_EEG=FOLDER python benchmarks/p300.py run FOLDER_OF_RUNS --variants prelocal,postlocal
    python benchmarks/p300.py table FOLDER_OF_RUNS --out benchmarks/results/p300_HARDWARE_DATE

`run` writes the recordings (2 people, 24 runs of two minutes, 4 electrodes, 15.6 % targets) as a BIDS folder, pretrains a base
model on the unlabelled EEG of each person, and calls `sjepa-evaluate` for each row of the table: within person 1 (five folds over
16 runs), and across the two people. A base model is always of the person who is not tested. What is there is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import mne
import numpy as np
import torch
import yaml

from sjepa_deploy.eeg.steps import BandPass, Channels, Resample
from sjepa_deploy.evaluation.figures import NAMES
from sjepa_deploy.evaluation.folder import finished
from sjepa_deploy.evaluation.folds import folds_of
from sjepa_deploy.evaluation.predictions import PREDICTIONS_FILE, Predictions, joined, of_outputs, read_table
from sjepa_deploy.evaluation.report import Examples
from sjepa_deploy.evaluation.results import RESULTS_FILE, EvaluationReport, numbered_as, read_results
from sjepa_deploy.evaluation.statistics import Tally, compare, units_of
from sjepa_deploy.evaluation.train import rows_of
from sjepa_deploy.evaluation.verdict import with_interval
from sjepa_deploy.learning.data import DataConfig, Target
from sjepa_deploy.learning.finetune import FinetuneConfig, class_weights
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.loop import Engine
from sjepa_deploy.learning.masking import Masking
from sjepa_deploy.learning.pretrain import PretrainConfig
from sjepa_deploy.runtime.bench.baselines import import_braindecode
from sjepa_deploy.serialize import encode, overridden
from sjepa_deploy.spec import EncoderSpec

ROOT = Path(__file__).parents[1]
NARROW = (BandPass(l_freq=1.0, h_freq=30.0), Resample(), Channels())  # 1 to 30 Hz, and no average of the four electrodes
TARGET = Target(kind="event", task="classification", classes=("nontarget", "target"), tmin=0.0)
CH_NAMES = ("TP9", "AF7", "AF8", "TP10")  # in the order of the recordings
DATA = DataConfig(montage="standard_1005", ch_names=CH_NAMES, sfreq=256.0, n_times=256, target=TARGET)
RECIPE = FinetuneConfig(
    data=DATA,
    class_weights="balanced",
    encoder=EncoderSpec(n_layers=2, n_decoder_layers=1),
    engine=Engine(max_epochs=60, patience=10, accelerator="cpu"),
)
BASE = PretrainConfig(
    data=dataclasses.replace(DATA, target=None),
    encoder=RECIPE.encoder,
    masking=Masking(radius=0.8),
    engine=Engine(max_epochs=30, patience=30, weight_decay=0.01, gradient_clip=1.0, accelerator="cpu"),
)
PROTOCOLS = {"within": ("within", "--subjects", "1"), "across": ("loso",), "narrow": ("within", "--subjects", "1")}
TITLES = {
    "within": "Within person 1, five folds over 16 runs",
    "across": "Across the two people: learned from one, tested on the other",
    "narrow": "Within person 1, 1 to 30 Hz and no average reference",
}
KINDS = ("scratch", "pretrained")


def make_bids(folder: Path) -> None:
    """Write the recordings as a BIDS folder, with their annotations as events."""
    root, source = folder / "bids", Path(os.environ["SJEPA_EEG"]) / "p300"
    for file in sorted(source.glob("*.edf")):
        subject, session, run = file.stem.split("_")
        place = root / subject / session / "eeg"
        name = f"{subject}_{session}_task-oddball_{run}"
        if (place / f"{name}_events.tsv").is_file():
            continue
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place / f"{name}_eeg.edf")
        raw = mne.io.read_raw_edf(file, verbose="error")
        channels = [f"{ch}\tEEG\tuV" for ch in raw.ch_names]
        (place / f"{name}_channels.tsv").write_text("\n".join(["name\ttype\tunits", *channels]) + "\n")
        marks = raw.annotations
        rows = [f"{o}\t{d}\t{t}" for o, d, t in zip(marks.onset, marks.duration, marks.description, strict=True)]
        (place / f"{name}_events.tsv").write_text("\n".join(["onset\tduration\ttrial_type", *rows]) + "\n")
    (root / "dataset_description.json").write_text(json.dumps({"Name": "oddball", "BIDSVersion": "1.8.0"}))


def call(folder: Path, name: str, *arguments: str) -> None:
    """Run a command of the package in `folder`."""
    print(f"sjepa-{name}", *arguments, flush=True)
    code = f"from sjepa_deploy.cli.{name} import main; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, check=True)


def run(folder: Path, variants: list[str]) -> None:
    """Make what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    make_bids(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(encode(RECIPE)))
    narrow = dataclasses.replace(RECIPE, data=dataclasses.replace(DATA, steps=NARROW))
    (folder / "narrow.yaml").write_text(yaml.safe_dump(encode(narrow)))
    (folder / "base.yaml").write_text(yaml.safe_dump(encode(BASE)))
    for protocol in ("within", "across"):
        for variant in variants:
            for kind in KINDS:
                if kind == "pretrained":
                    make_bases(folder)
                evaluate(folder, protocol, variant, kind)
            if variant != "contextual":
                skorch(folder, protocol, variant)
    evaluate(folder, "narrow", "prelocal", "scratch")


def make_bases(folder: Path) -> None:
    """Pretrain a base model for each fold across people: fold 0 tests person 1, so its base model is of person 2."""
    for fold, person in enumerate("21"):
        out = folder / f"base-{fold}"
        if not (out / "config.json").is_file():
            again = ["--resume"] if (out / "training/last.ckpt").is_file() else []
            call(folder, "pretrain", "--config", "base.yaml", "--data", "bids", "--subjects", person, "--out", out.name, *again)


def evaluate(folder: Path, protocol: str, variant: str, kind: str) -> None:
    """Evaluate one row."""
    out = folder / f"{protocol}-{variant}-{kind}"
    if (out / RESULTS_FILE).is_file():
        return
    recipe = "narrow.yaml" if protocol == "narrow" else "recipe.yaml"
    arguments = ["--config", recipe, "--data", "bids", "--protocol", *PROTOCOLS[protocol], "--variant", variant]
    if kind == "pretrained":
        arguments += ["--pretrained", "base-0" if protocol == "within" else "base-{fold}"]
        arguments += ["--transfer-encoder"] if variant == "prelocal" else []
        arguments += ["--against", f"{protocol}-{variant}-scratch"]
    elif variant == "prelocal":
        arguments += ["--baseline", "csp-lda,xdawn-ts"]
    arguments += ["--name", f"{variant}, {kind}", "--out", out.name, *(["--resume"] if out.exists() else [])]
    call(folder, "evaluate", *arguments)


def skorch(folder: Path, protocol: str, variant: str) -> None:
    """Train braindecode's network with skorch on the same windows, folds, weights and settings, from scratch."""
    out = folder / f"{protocol}-{variant}-skorch"
    if (out / RESULTS_FILE).is_file():
        return
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EarlyStopping
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split

    print(out.name, flush=True)
    people = ("1",) if protocol == "within" else ()
    data = overridden(DATA, {"source": (str(folder / "bids"),), "subjects": people})
    windows = load_windows(data)
    chs = [
        {"ch_name": n, "loc": np.r_[p, np.zeros(9)]}
        for n, p in zip(windows.signal.ch_names, windows.signal.positions, strict=True)
    ]
    networks = import_braindecode()
    network = {"prelocal": networks.SignalJEPA_PreLocal, "postlocal": networks.SignalJEPA_PostLocal}[variant]
    parts, folds = [], folds_of(windows, data, PROTOCOLS[protocol][0])
    for fold in folds:
        torch.manual_seed(0)
        split, known = fold.split, windows.targets[fold.split.train]
        weights = torch.from_numpy(class_weights(RECIPE, known, 2)).float()
        sizes = {"n_outputs": 2, "n_chans": len(chs), "n_times": 256, "sfreq": 256.0, "chs_info": chs, "n_spat_filters": 4}
        net = NeuralNetClassifier(
            network(**sizes), criterion=torch.nn.CrossEntropyLoss, criterion__weight=weights, optimizer=torch.optim.Adam,
            lr=1e-3, batch_size=32, max_epochs=60, iterator_train__shuffle=True, iterator_train__drop_last=True, verbose=0,
            train_split=predefined_split(Dataset(windows.eeg[split.val], windows.targets[split.val])),
            callbacks=[EarlyStopping("valid_loss", patience=10, load_best=True)],
        )  # fmt: skip
        net.fit(windows.eeg[split.train], known)
        outputs = net.forward(windows.eeg[split.test]).numpy()
        parts.append(
            Predictions(
                model=f"{variant}, skorch", way="offline", class_names=windows.class_names, seed=np.zeros(len(outputs), np.intp),
                **rows_of(windows, fold), **of_outputs(outputs, windows.class_names),
            )
        )  # fmt: skip
    out.mkdir(exist_ok=True)
    examples = Examples(eeg=windows.eeg, ch_names=windows.signal.ch_names, sfreq=windows.sfreq)
    names = tuple(fold.name for fold in folds)
    finished(
        out, [joined(parts)], [], protocol=PROTOCOLS[protocol][0], folds=names, seeds=(0,), baselines=(), command="", told=(),
        examples=examples,
    )  # fmt: skip


def _over(report: EvaluationReport) -> str:
    return f"{report.judged[0].n_windows} windows, intervals (95 %) over {report.n_units} {report.units}."


def table(folder: Path) -> tuple[dict, list[str]]:
    """Return all rows that are there, and Markdown."""
    found: dict = {"rows": [], "recipe": encode(RECIPE), "base": encode(BASE)}
    lines = []
    for protocol in PROTOCOLS:
        outs = [out for out in sorted(folder.glob(f"{protocol}-*")) if (out / RESULTS_FILE).is_file()]
        if not outs:
            continue
        reports = {out.name: read_results(out) for out in outs}
        first = next(iter(reports.values()))
        lines += [
            f"## {TITLES[protocol]}",
            "",
            f"{first.judged[0].n_windows} windows, intervals (95 %) over {first.n_units} {first.units}.",
            "",
        ]
        lines += [
            "| model | balanced accuracy | AUC | kappa | by chance, at most | p | AUC live | lost live |",
            "| --- " * 8 + "|",
        ]
        tallies: dict[str, Tally] = {}
        units, mine = None, None
        for out, report in zip(outs, reports.values(), strict=True):
            for part in read_table(out / PREDICTIONS_FILE, report.class_names):
                if part.way != "offline":
                    continue
                if mine is None:
                    places = list(zip(part.recording.tolist(), part.onset.tolist(), strict=True))
                    numbers = {place: i for i, place in enumerate(dict.fromkeys(places))}
                    mine = part.picked(np.arange(len(part)))
                    mine.window[:] = [numbers[place] for place in places]
                    units = units_of(mine)
                same = numbered_as(part, mine)
                assert same is not None, f"{out} is of other windows"
                tallies[part.model] = Tally(same, units)
            for judged in report.judged:
                if judged.way != "offline":
                    continue
                live = [each for each in report.judged if each.way == "live" and each.model == judged.model]
                area, chance = judged.figures["auc"], judged.chance["balanced_accuracy"]
                cells = [with_interval(judged.figures["balanced_accuracy"]), with_interval(area)]
                cells += [f"{judged.figures['kappa'].value:.3f}", f"{chance.high:.3f}", f"{chance.p:.3g}"]
                lost = [area.value - each.figures["auc"].value for each in live]
                cells += [with_interval(live[0].figures["auc"]), f"{round(lost[0], 4) + 0.0:.4f}"] if live else ["", ""]
                lines.append(f"| {judged.model} | {' | '.join(cells)} |")
                found["rows"].append({"protocol": protocol, "folder": out.name, "live": encode(live), **encode(judged)})
        lines += ["", "| compared on the same windows | figure | difference (95 %) | p |", "| --- " * 4 + "|"]
        pairs = [("scratch", "skorch"), ("pretrained", "scratch")]
        wanted = [(f"{v}, {a}", f"{v}, {b}") for v in ("prelocal", "postlocal", "contextual") for a, b in pairs]
        wanted += [(name, "xdawn-ts") for name in tallies if "," in name and "skorch" not in name]
        for one, other in wanted:
            if one in tallies and other in tallies:
                for figure in ("balanced_accuracy", "auc"):
                    each = compare(tallies[one], tallies[other], figure)
                    p = "" if each.p is None else f"{each.p:.3g}"
                    lines.append(f"| {one} less {other} | {NAMES[figure]} | {with_interval(each.difference, sign=True)} | {p} |")
                    found.setdefault("differences", []).append({"protocol": protocol, **encode(each)})
        lines.append("")
    return found, lines


def main() -> None:
    """Run, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", default="prelocal,postlocal")
    parser.add_argument("--out", type=Path, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    if args.what == "run":
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        run(args.folder.resolve(), args.variants.split(","))
        return
    found, lines = table(args.folder)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    versions = read_results(next(args.folder.glob(f"*/{RESULTS_FILE}")).parent).versions | {"commit": commit.stdout.strip()}
    command = "SJEPA_EEG=FOLDER python benchmarks/p300.py run RUNS --variants prelocal,postlocal,contextual"
    told = ", ".join(f"{k} {v}" for k, v in versions.items())
    head = ["# A visual oddball, two people, four electrodes", "", told, "", f"`{command}`, then `table RUNS`", ""]
    args.out.with_suffix(".json").write_text(json.dumps({"versions": versions, "command": command} | found, indent=1) + "\n")
    args.out.with_suffix(".md").write_text("\n".join([*head, *lines]).rstrip() + "\n")


if __name__ == "__main__":
    main()
