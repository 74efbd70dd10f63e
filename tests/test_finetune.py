import dataclasses
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from eeg_files import ROOT
from lightning.pytorch.callbacks import Callback
from small import DATA, FINETUNE, PRETRAIN, make_spec
from torch._dynamo.backends.debugging import aot_eager

from sjepa_deploy.bundle import TRAINING_KEY
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.finetune import finetune as finetune_command
from sjepa_deploy.errors import DataError, TrainingError
from sjepa_deploy.files import written_whole
from sjepa_deploy.learning import loop as engine
from sjepa_deploy.learning.data import DataConfig, Synthetic, Target, split_windows
from sjepa_deploy.learning.finetune import FinetuneConfig, FinetuneModule, finetune
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.pretrain import pretrain
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint, write_checkpoint
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
    split = split_windows(windows, config.data)
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


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_a_checkpoint_of_the_training_is_the_model_in_the_targets_unit(base, tmp_path, name):
    """The best one is the model that fine-tuning writes; without the fold both would give standardised targets."""
    config = dataclasses.replace(FINETUNE, pretrained=base, encoder=None)
    result = finetune(config, tmp_path)
    checkpoint = read_checkpoint(tmp_path / "training" / name)
    spec, assumed = resolve_spec({}, checkpoint)
    assert (spec, assumed) == (result.spec, ())
    if name == "best.ckpt":
        written = read_checkpoint(tmp_path).weights
        assert all(torch.equal(checkpoint.weights[key], weight) for key, weight in written.items())
    state = torch.load(tmp_path / "training" / name, weights_only=True)["state_dict"]
    windows = load_windows(config.data)
    standardised = build_model(spec, seed=0)
    standardised.load_state_dict({key.removeprefix("model."): w for key, w in state.items() if key.startswith("model.")})
    outputs = []
    for model in (load_model(checkpoint, spec), standardised):
        with reference_mode(model):
            outputs.append(model.double()(torch.from_numpy(windows.eeg[:8]).double())[:, 0].numpy())
    targets = windows.targets[split_windows(windows, config.data).train]
    np.testing.assert_allclose(outputs[0], outputs[1] * targets.std() + targets.mean(), rtol=1e-5)


def test_a_checkpoint_of_the_pretraining_is_the_base_model(tmp_path):
    result = pretrain(dataclasses.replace(PRETRAIN, engine=dataclasses.replace(PRETRAIN.engine, max_epochs=1)), tmp_path)
    checkpoint = read_checkpoint(tmp_path / "training/best.ckpt")
    assert resolve_spec({}, checkpoint) == (result.spec, ())
    written = read_checkpoint(tmp_path).weights
    assert checkpoint.weights.keys() == written.keys()
    assert all(torch.equal(checkpoint.weights[key], weight) for key, weight in written.items())


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
    split = split_windows(windows, FINETUNE.data)
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


QUICK = dataclasses.replace(FINETUNE, variant="postlocal", warmup_epochs=0)
"""A run of four epochs, each of which takes a fraction of a second."""


def losses(*values):
    """Return a validation step whose loss in each epoch is planted."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(values[self.current_epoch]), batch_size=1)

    return validation_step


class PulledPlugError(Exception):
    pass


def stop_in_epoch(monkeypatch, epoch, do):
    """Call `do` after the first step of `epoch`."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.current_epoch == epoch:
            do()

    monkeypatch.setattr(engine.SeedEpochs, "on_train_batch_end", on_train_batch_end)


def pull_the_plug():
    raise PulledPlugError


def stopped_run(out, monkeypatch, config=QUICK, epoch=2):
    """Leave a run in `out` that ended in the middle of `epoch`."""
    with monkeypatch.context() as patched:
        stop_in_epoch(patched, epoch, pull_the_plug)
        with pytest.raises(PulledPlugError):
            finetune(config, out)


def test_a_run_whose_folder_moved_goes_on_with_its_own_best_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(FinetuneModule, "validation_step", losses(1.0, 2.0, 3.0, 4.0))
    finetune(QUICK, tmp_path / "whole")
    stopped_run(tmp_path / "there", monkeypatch)
    (tmp_path / "there").rename(tmp_path / "here")
    finetune(dataclasses.replace(QUICK, engine=dataclasses.replace(QUICK.engine, seed=1)), tmp_path / "there")  # another run
    result = finetune(QUICK, tmp_path / "here", resume=True)
    assert (result.fitted.best_epoch, result.fitted.val_loss) == (0, 1.0)
    assert _weights(tmp_path / "here") == _weights(tmp_path / "whole") != _weights(tmp_path / "there")


def killed_writing(file):
    """Return what a process leaves that is killed while it writes `file`."""
    child = os.fork()
    if not child:
        with written_whole(file) as path:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = file.parent.glob(".*")
    return left


def test_a_run_killed_between_its_last_and_its_best_checkpoint_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(FinetuneModule, "validation_step", losses(2.0, 1.0, 3.0, 4.0))
    finetune(QUICK, tmp_path / "whole")
    stopped_run(tmp_path / "killed", monkeypatch, epoch=1)
    before = (tmp_path / "killed/training/best.ckpt").read_bytes()
    (tmp_path / "killed").rename(tmp_path / "old")
    stopped_run(tmp_path / "killed", monkeypatch, epoch=2)
    (tmp_path / "killed/training/best.ckpt").write_bytes(before)  # of epoch 0: the last one says that epoch 1 is the best
    left = [killed_writing(tmp_path / "killed" / name) for name in ("training/last.ckpt", "model.safetensors")]
    assert all(file.exists() for file in left)
    finetune(QUICK, tmp_path / "killed", resume=True)
    assert _weights(tmp_path / "killed") == _weights(tmp_path / "whole")
    assert not list(tmp_path.rglob("killed/**/.*"))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("last.ckpt", lambda content: content[: len(content) // 2], "last.ckpt is missing or damaged"),
        ("last.ckpt", lambda content: b"", "last.ckpt is missing or damaged"),
        ("best.ckpt", lambda content: content[:-100], "best.ckpt is missing or damaged"),
        ("best.ckpt", None, "best.ckpt is missing or damaged"),
        ("best.ckpt", "last.ckpt", "best.ckpt is not the best checkpoint of the run"),
        ("run.json", lambda content: b"", "run.json is missing or damaged"),
    ],
)
def test_a_run_whose_files_are_damaged_or_mixed_is_refused_before_the_data_are_read(tmp_path, monkeypatch, name, change, said):
    with monkeypatch.context() as patched:
        patched.setattr(FinetuneModule, "validation_step", losses(1.0, 2.0, 3.0, 4.0))
        stopped_run(tmp_path, monkeypatch)
    file = tmp_path / "training" / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes((file.parent / change).read_bytes() if isinstance(change, str) else change(file.read_bytes()))
    monkeypatch.setattr("sjepa_deploy.learning.finetune.load_windows", None)
    with pytest.raises(TrainingError, match=f"{said}.*--force"):
        finetune(QUICK, tmp_path, resume=True)


@pytest.fixture
def command(tmp_path, capsys):
    """Return a function that runs sjepa-finetune as a user does."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(encode(QUICK)))

    def run(*arguments):
        capsys.readouterr()
        status = run_command(finetune_command, "sjepa-finetune", [str(argument) for argument in arguments])
        return status, capsys.readouterr().err.strip().splitlines()

    run.recipe = recipe
    return run


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_with_a_status_and_the_line_that_goes_on(tmp_path, monkeypatch, command, number, status):
    finetune(QUICK, tmp_path / "whole")
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    arguments = ["--config", command.recipe, "--out", tmp_path / "a model", "--force"]
    with monkeypatch.context() as patched:
        stop_in_epoch(patched, 2, lambda: os.kill(os.getpid(), number))
        ended, lines = command(*arguments)
    assert ended == status
    assert not (tmp_path / "a model/model.safetensors").exists()
    assert "in epoch 3" in lines[-1]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    line = lines[-1].partition("--resume: ")[2]
    assert shlex.split(line)[0] == "sjepa-finetune"
    assert command(*shlex.split(line)[1:]) == (0, [])
    assert _weights(tmp_path / "a model") == _weights(tmp_path / "whole")


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on_when_there_is_space(tmp_path, monkeypatch, command, epoch):
    """The limit of a file's size stands for the disk: the kernel refuses the write in the middle of the checkpoint."""
    finetune(QUICK, tmp_path / "whole")
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ["--config", command.recipe, "--out", tmp_path / "model"]
    try:
        with monkeypatch.context() as patched:
            stop_in_epoch(patched, epoch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, free[1])))
            status, lines = command(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert status == 2
    assert len(lines) == 1
    assert "There is no space left for" in lines[0]
    assert shlex.split(lines[0].partition("--resume: ")[2])[1:] == [*map(str, arguments), "--resume"]
    assert not list(tmp_path.glob("model/training/.*"))
    assert (tmp_path / "model/training/last.ckpt").exists() == (epoch > 0)
    assert command(*arguments, "--resume") == (0, [])
    assert _weights(tmp_path / "model") == _weights(tmp_path / "whole")


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    """A few kills; ``python tests/killed_runs.py --random 40 FOLDER`` makes as many as wanted."""
    elsewhere = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}",
        "TMPDIR": str(elsewhere),  # another file system, where there is one
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, str(ROOT / "tests/killed_runs.py"), "--random", "4", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "4 kills" in ended.stdout


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


def test_a_finished_run_is_extended_to_the_weights_of_a_longer_one(tmp_path):
    longer = dataclasses.replace(QUICK, engine=dataclasses.replace(QUICK.engine, max_epochs=6))
    whole = finetune(longer, tmp_path / "whole")
    finetune(QUICK, tmp_path / "model")
    result = finetune(longer, tmp_path / "model", resume=True)
    assert result == whole
    assert _weights(tmp_path / "model") == _weights(tmp_path / "whole")
    with pytest.raises(TrainingError, match="has another configuration"):
        finetune(QUICK, tmp_path / "model", resume=True)


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(FinetuneModule, "validation_step", losses(1.0, 2.0, 2.0, 2.0, 0.5, 3.0))
    impatient = dataclasses.replace(QUICK, engine=dataclasses.replace(QUICK.engine, max_epochs=6, patience=2))
    assert finetune(impatient, tmp_path).fitted.epochs == 3
    patient = dataclasses.replace(QUICK, engine=dataclasses.replace(QUICK.engine, max_epochs=6, patience=5))
    result = finetune(patient, tmp_path, resume=True)
    assert (result.fitted.epochs, result.fitted.best_epoch) == (6, 4)


def test_a_run_does_not_go_on_with_other_data_or_labels(tmp_path, monkeypatch):
    stopped_run(tmp_path / "run", monkeypatch)
    windows = load_windows(QUICK.data)
    last = windows.targets.copy()
    last[-1] += 0.01
    for changed, said in (
        (dataclasses.replace(windows, targets=last), "The labels are not those"),
        (dataclasses.replace(windows, hashes=windows.hashes | {"synthetic-0": "0"}), "The recordings are not those"),
    ):
        monkeypatch.setattr("sjepa_deploy.learning.finetune.load_windows", lambda config, changed=changed: changed)
        with pytest.raises(TrainingError, match=said):
            finetune(QUICK, tmp_path / "run", resume=True)
    monkeypatch.setattr("sjepa_deploy.learning.finetune.load_windows", lambda config: windows)
    finetune(QUICK, tmp_path / "run", resume=True)


def test_every_epoch_is_told_with_losses_and_score(tmp_path):
    told = []
    result = finetune(QUICK, tmp_path, tell_epoch=told.append)
    assert [epoch.number for epoch in told] == [1, 2, 3, 4]
    assert min(epoch.values["val_loss"] for epoch in told) == told[-1].best == pytest.approx(result.fitted.val_loss)
    assert all(set(epoch.values) == {"train_loss", "val_loss", "val_r2"} for epoch in told)
    # the loss is the mean square error of standardised targets
    windows = load_windows(QUICK.data)
    split = split_windows(windows, QUICK.data)
    spread = windows.targets[split.val].var() / windows.targets[split.train].var()
    assert told[0].values["val_r2"] == pytest.approx(1 - told[0].values["val_loss"] / spread, abs=1e-4)
    assert re.match(r"epoch 1 of 4: .*val_loss .*val_r2 .*best val_loss .*, at most \d:\d\d:\d\d left$", str(told[0]))
    assert told[0].rest_s == pytest.approx(3 * told[0].seconds)


def test_what_was_not_pretrained_is_not_warmed_up(tmp_path, watch):
    finetune(dataclasses.replace(FINETUNE, warmup_epochs=3), tmp_path)
    _, training, groups = watch.epochs[0]
    assert groups["encoder"] > 0
    assert training >= {"feature_encoder", "transformer"}


def test_a_seed_of_any_size_is_taken(command, tmp_path):
    arguments = ["--config", command.recipe, "--max-epochs", 1]
    assert command(*arguments, "--seed", 123456789012, "--out", tmp_path / "a") == (0, [])
    status, lines = command(*arguments, "--seed", 2**70, "--out", tmp_path / "b")
    assert (status, len(lines)) == (2, 1)


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
    assert result.spec.n_chans == 30  # of 32 channels two are electro-oculograms
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
        source=(str(tmp_path / "w.npz"),), n_times=152, steps=DATA.signal_steps, target=Target(task="classification")
    )
    small = dataclasses.replace(FINETUNE.engine, batch_size=4)
    with pytest.raises(DataError, match=r"part \(split by subject\) has no window of yes"):
        finetune(dataclasses.replace(FINETUNE, variant="postlocal", data=data, engine=small), tmp_path / "b")
    numbers = dataclasses.replace(data, target=Target())
    np.savez(tmp_path / "w.npz", **dict(np.load(tmp_path / "w.npz")) | {"targets": np.arange(30.0)})
    with pytest.raises(DataError, match=r"no positions.*--montage"):
        finetune(dataclasses.replace(FINETUNE, data=numbers, engine=small), tmp_path / "c")
    assert not list(tmp_path.glob("*/training"))
