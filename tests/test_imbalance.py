"""Rare classes: weights in the loss, the loop beside a plain one with braindecode's network, and the threshold."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import yaml
from oracle import braindecode_model
from rich.console import Console
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import DistributedSampler

from sjepa_deploy.bundle import TRAINING_KEY
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.finetune import finetune as command
from sjepa_deploy.cli.training import print_data
from sjepa_deploy.learning.data import DataConfig, Target, split_windows
from sjepa_deploy.learning.finetune import FinetuneConfig, finetune
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.loop import Engine
from sjepa_deploy.learning.metrics import balanced_weights, best_threshold
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import Preprocessing

EPOCHS, BATCH = 4, 16


@pytest.fixture(scope="module")
def oddball(tmp_path_factory):
    """300 windows of 6 people, a sixth of them with a bump."""
    rng = np.random.default_rng(0)
    eeg = rng.normal(0, 10, (300, 4, 160)).astype(np.float32)
    label = np.array(["standard", "target"])[(rng.random(300) < 1 / 6).astype(int)]
    eeg[label == "target", :2, 50:90] += 9
    path = tmp_path_factory.mktemp("oddball") / "w.npz"
    places = np.array([[-0.08, 0, 0], [-0.03, 0.08, 0.02], [0.03, 0.08, 0.02], [0.08, 0, 0]])
    np.savez(
        path,
        eeg=eeg,
        ch_names=np.array(["TP9", "AF7", "AF8", "TP10"]),
        sfreq=100.0,
        subject=np.repeat([f"s{i}" for i in range(6)], 50),
        targets=label,
        positions=places,
    )
    data = DataConfig(
        source=(str(path),), n_times=160, preprocessing=Preprocessing(), target=Target(kind="column", task="classification")
    )
    engine = Engine(max_epochs=EPOCHS, patience=EPOCHS, batch_size=BATCH, accelerator="cpu", seed=4)
    return FinetuneConfig(variant="prelocal", warmup_epochs=0, data=data, engine=engine)


def test_weights_are_scikit_learns():
    targets = np.random.default_rng(0).integers(0, 4, 100)
    theirs = compute_class_weight("balanced", classes=np.arange(4), y=targets)
    np.testing.assert_allclose(balanced_weights(targets, 4), theirs)


@pytest.mark.parametrize("weighted", ["none", "balanced"])
def test_the_loss_of_every_epoch_is_that_of_a_plain_loop_with_braindecodes_network(oddball, weighted, tmp_path):
    config = dataclasses.replace(oddball, class_weights=weighted)
    result = finetune(config, tmp_path)
    with (tmp_path / "training/logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = {name: [float(row[name]) for row in rows if row.get(name)] for name in ("train_loss", "val_loss")}

    windows = load_windows(config.data)
    split = split_windows(windows, config.data)
    eeg, targets = torch.from_numpy(windows.eeg), torch.from_numpy(windows.targets)
    model = braindecode_model(result.spec)
    model.load_state_dict(build_model(result.spec, seed=4).state_dict())
    weight = None
    if weighted == "balanced":
        weight = torch.tensor(compute_class_weight("balanced", classes=np.arange(2), y=windows.targets[split.train])).float()
    criterion = torch.nn.CrossEntropyLoss(weight)
    each = torch.nn.CrossEntropyLoss(weight, reduction="none")
    optimizer = torch.optim.Adam(model.parameters(), lr=config.engine.lr)
    sampler = DistributedSampler(split.train, 1, 0, shuffle=True, seed=4, drop_last=True)
    theirs = {"train_loss": [], "val_loss": []}
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        order = torch.from_numpy(split.train)[list(sampler)]
        losses = []
        model.train()
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = criterion(model(eeg[batch]), targets[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        theirs["train_loss"].append(np.mean(losses))
        model.eval()
        with torch.no_grad():
            theirs["val_loss"].append(each(model(eeg[split.val]), targets[split.val]).mean().item())
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-7, atol=1e-7)


def test_weights_find_the_rare_class_and_are_kept_for_the_decision_layer(oddball, tmp_path):
    longer = dataclasses.replace(oddball.engine, max_epochs=30, patience=30, lr=3e-3)
    plain = finetune(dataclasses.replace(oddball, engine=longer), tmp_path / "plain")
    told = []
    config = dataclasses.replace(oddball, engine=longer, class_weights="balanced")
    weighted = finetune(config, tmp_path / "weighted", tell=told.append)
    assert weighted.test["balanced_accuracy"].value > plain.test["balanced_accuracy"].value + 0.05
    windows = load_windows(config.data)
    known = windows.targets[split_windows(windows, config.data).train]
    np.testing.assert_allclose(weighted.classes.prevalence, [np.mean(known == 0), np.mean(known == 1)])
    np.testing.assert_allclose(np.multiply(weighted.classes.prevalence, weighted.classes.weights), 0.5)
    assert plain.classes.weights == (1.0, 1.0)
    assert plain.classes.threshold < weighted.classes.threshold  # the shares of the classes move it
    (report,) = told
    assert report.parts["train"].classes == {"standard": int(sum(known == 0)), "target": int(sum(known == 1))}
    assert report.n_unused == len(known) % BATCH > 0
    screen = Console(file=io.StringIO(), width=200)
    print_data(screen, report)
    assert f"leaves out {report.n_unused} training windows" in screen.file.getvalue()
    assert "all are used over the epochs" in screen.file.getvalue()
    stored = json.loads((tmp_path / "weighted/config.json").read_text())[TRAINING_KEY]
    assert stored["result"]["classes"] == encode(weighted.classes)
    assert stored["data"] == encode(report)


def test_the_threshold_has_the_best_balanced_accuracy_of_all():
    rng = np.random.default_rng(0)
    for seed in range(20):
        targets = np.r_[0, 1, rng.random(60) < 0.2].astype(int)
        scored = np.clip(np.round(0.2 + 0.15 * targets + rng.normal(0, 0.15, 62), seed % 3 + 1), 0, 1)
        threshold = best_threshold(targets, np.stack([1 - scored, scored], axis=1))
        best = max(balanced_accuracy_score(targets, scored >= t) for t in np.r_[np.unique(scored), np.unique(scored) + 1e-9])
        assert balanced_accuracy_score(targets, scored >= threshold) == pytest.approx(best)


@pytest.mark.parametrize(
    ("form", "weights"), [("flags", "balanced"), ("file", "none"), ("shipped", "balanced"), ("both", "balanced")]
)
def test_new_configurations_are_balanced_and_files_without_the_key_are_not(oddball, form, weights, tmp_path, capsys):
    content = encode(dataclasses.replace(oddball, engine=dataclasses.replace(oddball.engine, max_epochs=1)))
    del content["class_weights"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(content))
    given = {
        "flags": ["--variant", "prelocal"],
        "file": ["--config", tmp_path / "old.yaml"],
        "shipped": ["--config", "finetune_prelocal.yaml"],
        "both": ["--config", tmp_path / "old.yaml", "--class-weights", "balanced"],
    }[form]
    if form in ("flags", "shipped"):
        given += ["--max-epochs", 1, "--batch-size", 32]
    status = run_command(command, "sjepa-finetune", [str(a) for a in (*given, "--out", tmp_path / "model")])
    assert status == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "model/training/run.json").read_text())["class_weights"] == weights
