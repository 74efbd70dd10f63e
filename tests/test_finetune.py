import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eeg_files import ROOT
from lightning.pytorch.callbacks import Callback
from small import DATA, FINETUNE, PRETRAIN, make_spec
from torch._dynamo.backends.debugging import aot_eager

from sjepa_deploy.errors import DataError, TrainingError
from sjepa_deploy.learning import loop as engine
from sjepa_deploy.learning.data import DataConfig, Synthetic, Target, split_windows
from sjepa_deploy.learning.finetune import FinetuneConfig, FinetuneModule, finetune
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.pretrain import pretrain
from sjepa_deploy.models.checkpoint import TRAINING_KEY, load_model, read_checkpoint, write_checkpoint
from sjepa_deploy.models.networks import build_model, reference_mode
from sjepa_deploy.models.resolve import resolve_spec
from sjepa_deploy.models.transfer import NEW_PARTS
from sjepa_deploy.serialize import encode


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pretrain(dataclasses.replace(PRETRAIN, engine=dataclasses.replace(PRETRAIN.engine, max_epochs=1)), folder)
    return str(folder)


class Watch(Callback):
    """Notes the weights, the modes and the optimiser's state at the end of every epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, module):
        weights = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        training = {name for name, part in module.model.named_children() if part.training}
        optimizer = trainer.optimizers[0]
        groups = {g["name"]: len([p for p in g["params"] if p in optimizer.state]) for g in optimizer.param_groups}
        self.epochs.append((weights, training, groups))


@pytest.fixture
def watch(monkeypatch):
    watch, trainer = Watch(), engine.lightning.Trainer
    monkeypatch.setattr(engine.lightning, "Trainer", lambda **kw: trainer(**(kw | {"callbacks": [*kw["callbacks"], watch]})))
    return watch


def changed(before, after):
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def in_parts(model_names, parts):
    return {name for name in model_names if name.split(".")[0] in parts}


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
def test_frozen_training_leaves_every_frozen_tensor_bit_identical(variant, base, tmp_path, watch):
    config = dataclasses.replace(
        FINETUNE, variant=variant, pretrained=base, encoder=None, freeze_encoder=True, encoder_to_prelocal=True
    )
    finetune(config, tmp_path)
    taken, now = read_checkpoint(base).weights, read_checkpoint(tmp_path).weights
    frozen = [name for name in now if name.split(".")[0] not in NEW_PARTS[variant]]
    assert frozen
    assert all(torch.equal(now[name], taken[name]) for name in frozen)
    assert changed(watch.epochs[0][0], watch.epochs[-1][0]) == set(NEW_PARTS[variant])
    assert all(training == set(NEW_PARTS[variant]) for _, training, _ in watch.epochs)
    assert all(set(groups) == {"new"} for *_, groups in watch.epochs)


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
def test_full_training_unfreezes_after_the_warm_up(variant, base, tmp_path, watch):
    config = dataclasses.replace(FINETUNE, variant=variant, pretrained=base, encoder=None, encoder_to_prelocal=True)
    finetune(config, tmp_path)
    weights = [epoch[0] for epoch in watch.epochs]
    start = read_checkpoint(base).weights
    new, parts = set(NEW_PARTS[variant]), {name.split(".")[0] for name in weights[0]}
    for epoch in (0, 1):
        _, training, groups = watch.epochs[epoch]
        assert not changed({n: w for n, w in start.items() if n in weights[0]}, weights[epoch])
        assert training == new
        assert groups["encoder"] == 0
    for epoch in (2, 3):
        _, training, groups = watch.epochs[epoch]
        assert changed(weights[epoch - 1], weights[epoch]) == parts
        assert training == parts
        learned = [n for n in weights[0] if n.split(".")[0] not in new and not n.startswith("transformer.decoder")]
        assert groups["encoder"] == len(learned)
    decoder = [n for n in weights[0] if n.startswith("transformer.decoder")]
    assert all(torch.equal(weights[-1][n], start[n]) for n in decoder)  # the predictor is not used


def test_the_written_model_gives_the_predictions_that_were_scored_in_the_targets_unit(base, tmp_path):
    config = dataclasses.replace(FINETUNE, pretrained=base, encoder=None)
    result = finetune(config, tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    spec, assumed = resolve_spec({}, checkpoint)
    assert not assumed
    assert spec == result.spec
    windows = load_windows(config.data)
    split = split_windows(windows, config.data, seed=0)
    model = load_model(checkpoint, spec)
    with reference_mode(model):
        predicted = model(torch.from_numpy(windows.eeg[split.test]))[:, 0].numpy()
    targets = windows.targets[split.test]
    assert 1 - ((targets - predicted) ** 2).sum() / ((targets - targets.mean()) ** 2).sum() == pytest.approx(
        result.test["r2"].value, abs=1e-4
    )
    baseline = abs(targets - windows.targets[split.train].mean()).mean()
    assert result.baseline["mae"].value == pytest.approx(baseline, rel=1e-4)
    stored = json.loads((tmp_path / "config.json").read_text())[TRAINING_KEY]
    assert stored["result"]["transfer"]["taken"] == list(result.transfer.taken)
    assert stored["finetuning"]["data"]["n_times"] == 152


def test_a_compiled_model_learns_through_warm_up_and_validation_and_is_written_as_ever(base, tmp_path, monkeypatch, watch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(engine, "COMPILE", {"backend": backend, "dynamic": engine.COMPILE["dynamic"]})
    tuned = dataclasses.replace(FINETUNE.engine, compile=True)
    result = finetune(dataclasses.replace(FINETUNE, pretrained=base, encoder=None, engine=tuned), tmp_path)
    assert len(compiled) == 2  # the frozen and the unfrozen step
    model = load_model(read_checkpoint(tmp_path), result.spec)
    windows = load_windows(FINETUNE.data)
    split = split_windows(windows, FINETUNE.data, seed=0)
    with reference_mode(model):
        predicted = model(torch.from_numpy(windows.eeg[split.test]))[:, 0].numpy()
    targets = windows.targets[split.test]
    assert abs(targets - predicted).mean() == pytest.approx(result.test["mae"].value, rel=1e-4)
    assert changed(watch.epochs[2][0], watch.epochs[3][0]) == {"feature_encoder", "pos_encoder", "transformer", "final_layer"}


def test_classes_are_learned_and_named(tmp_path):
    data = dataclasses.replace(
        FINETUNE.data, n_times=200, target=Target(task="classification"), synthetic=Synthetic(n_subjects=6, n_windows=48)
    )
    tuned = dataclasses.replace(FINETUNE.engine, max_epochs=25, lr=0.01)
    result = finetune(dataclasses.replace(FINETUNE, variant="postlocal", warmup_epochs=0, data=data, engine=tuned), tmp_path)
    assert result.spec.class_names == ("fast", "slow")
    assert result.test["auc"].low > 0.7
    assert result.baseline["auc"].value == 0.5
    assert read_checkpoint(tmp_path).known["class_names"] == ("fast", "slow")


@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_a_run_killed_at_any_epoch_and_resumed_gives_the_uninterrupted_result(kind, base, tmp_path):
    run, config = (
        (finetune, dataclasses.replace(FINETUNE, pretrained=base, encoder=None)) if kind == "finetune" else (pretrain, PRETRAIN)
    )
    whole = run(config, tmp_path / "whole")
    jobs = [
        {"kind": kind, "config": encode(config), "out": str(tmp_path / "killed"), "epoch": epoch, "resume": epoch > 0}
        for epoch in (range(4) if kind == "finetune" else (0, 2))  # 0: nothing was saved yet; 2: the warm-up has ended
    ]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # another number of threads sums in another order
    }
    command = [sys.executable, str(ROOT / "tests/killed_runs.py"), json.dumps(jobs)]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=240)
    assert not (tmp_path / "killed/model.safetensors").exists()
    resumed = run(config, tmp_path / "killed", resume=True)
    assert resumed == whole
    assert _weights(tmp_path / "killed") == _weights(tmp_path / "whole")


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_run_is_neither_overwritten_nor_mixed_with_another(tmp_path):
    config = dataclasses.replace(FINETUNE, variant="postlocal", engine=dataclasses.replace(FINETUNE.engine, max_epochs=1))
    finetune(config, tmp_path)
    with pytest.raises(TrainingError, match="already holds a run"):
        finetune(config, tmp_path)
    write_checkpoint(build_model(make_spec("postlocal"), seed=0), tmp_path / "other")
    with pytest.raises(TrainingError, match="other already holds a model"):
        finetune(config, tmp_path / "other")
    with pytest.raises(TrainingError, match=r"mistyped/training holds no run to go on with\. Leave out --resume"):
        finetune(config, tmp_path / "mistyped", resume=True)
    with pytest.raises(TrainingError, match="has another configuration"):
        finetune(dataclasses.replace(config, n_spat_filters=2), tmp_path, resume=True)
    before = _weights(tmp_path)
    finetune(config, tmp_path, resume=True)
    assert _weights(tmp_path) == before


def test_training_stops_when_nothing_improves_and_keeps_the_best(tmp_path, monkeypatch, watch):
    losses = iter([3.0, 2.0, 2.5, 2.5, 2.5, 2.5])

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.value = torch.tensor(next(losses))
        self.log("val_loss", self.value, batch_size=1)

    monkeypatch.setattr(FinetuneModule, "validation_step", validation_step)
    tuned = dataclasses.replace(FINETUNE.engine, max_epochs=50, patience=3)
    result = finetune(dataclasses.replace(FINETUNE, variant="postlocal", warmup_epochs=0, engine=tuned), tmp_path)
    assert (result.fitted.best_epoch, result.fitted.epochs, result.fitted.val_loss) == (1, 5, 2.0)
    written = read_checkpoint(tmp_path).weights
    encoder = [name for name in written if name.startswith("feature_encoder")]
    assert all(torch.equal(written[name], watch.epochs[1][0][name]) for name in encoder)
    assert not all(torch.equal(written[name], watch.epochs[-1][0][name]) for name in encoder)

    monkeypatch.undo()
    before = _weights(tmp_path)  # killed after its last epoch, say: what was stopped does not go on
    again = finetune(dataclasses.replace(FINETUNE, variant="postlocal", warmup_epochs=0, engine=tuned), tmp_path, resume=True)
    assert again == result
    assert _weights(tmp_path) == before


def test_gradients_are_clipped(tmp_path, watch):
    norms = []
    watch.on_train_batch_end = lambda trainer, module, *_: norms.append(
        torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item()
    )
    clipped = dataclasses.replace(FINETUNE.engine, max_epochs=1, gradient_clip=0.01)
    finetune(dataclasses.replace(FINETUNE, variant="postlocal", warmup_epochs=0, engine=clipped), tmp_path)
    np.testing.assert_allclose(norms, 0.01, rtol=1e-3)  # each was larger


def test_a_loss_that_is_never_finite_is_an_error_and_gives_no_model(tmp_path):
    tuned = dataclasses.replace(FINETUNE.engine, max_epochs=2, lr=1e30)
    with pytest.raises(TrainingError, match="never finite. Use a smaller --lr"):
        finetune(dataclasses.replace(FINETUNE, variant="postlocal", warmup_epochs=0, engine=tuned), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_devices_that_are_not_here_and_folders_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    on_gpu = dataclasses.replace(FINETUNE.engine, accelerator="gpu")
    with pytest.raises(TrainingError, match="cannot train with 1 x gpu here: .*Choose another --accelerator"):
        finetune(dataclasses.replace(FINETUNE, variant="postlocal", engine=on_gpu), tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="file/training cannot be written"):
        finetune(dataclasses.replace(FINETUNE, variant="postlocal"), tmp_path / "file")


@pytest.mark.parametrize("variant", ["prelocal", "postlocal", "contextual"])
@pytest.mark.parametrize("freeze", [True, False])
def test_reaction_time_of_a_recording_runs_to_the_end(variant, freeze, written, tmp_path):
    data = DataConfig(source=(str(written("eeglab_data.set").path),), target=Target(stimulus=("square",), response=("rt",)))
    tuned = dataclasses.replace(FINETUNE.engine, max_epochs=2)
    config = FinetuneConfig(
        variant=variant, encoder=FINETUNE.encoder, data=data, freeze_encoder=freeze, warmup_epochs=1, engine=tuned
    )
    result = finetune(config, tmp_path)
    assert result.spec.n_chans == 32
    assert (result.split, result.n_test) == ("block", 15)
    assert set(result.test) == set(result.baseline) == {"r2", "nrmse", "mae"}
    assert all(np.isfinite([s.value, s.low, s.high]).all() for s in result.test.values())


def test_what_cannot_be_learned_is_refused_before_the_first_step(base, tmp_path):
    with pytest.raises(DataError, match="names no target"):
        dataclasses.replace(FINETUNE, data=DATA)
    other = dataclasses.replace(FINETUNE.encoder, n_layers=1)
    with pytest.raises(TrainingError, match="encoder is not the base model's"):
        finetune(dataclasses.replace(FINETUNE, pretrained=base, encoder=other), tmp_path / "a")
    rare = np.array(["no"] * 28 + ["yes"] * 2)
    np.savez(
        tmp_path / "w.npz",
        eeg=np.random.default_rng(0).normal(0, 10, (30, 3, 152)),
        ch_names=["a", "b", "c"],
        sfreq=100.0,
        subject=np.repeat(["x", "y", "z"], 10),
        targets=rare,
    )
    data = DataConfig(
        source=(str(tmp_path / "w.npz"),), n_times=152, preprocessing=DATA.prepared, target=Target(task="classification")
    )
    small = dataclasses.replace(FINETUNE.engine, batch_size=4)
    with pytest.raises(DataError, match=r"part \(split by subject\) has no window of yes"):
        finetune(dataclasses.replace(FINETUNE, variant="postlocal", data=data, engine=small), tmp_path / "b")
    numbers = dataclasses.replace(data, target=Target())
    np.savez(tmp_path / "w.npz", **dict(np.load(tmp_path / "w.npz")) | {"targets": np.arange(30.0)})
    with pytest.raises(DataError, match=r"no positions.*--montage"):
        finetune(dataclasses.replace(FINETUNE, data=numbers, engine=small), tmp_path / "c")
    assert not list(tmp_path.glob("*/training"))
