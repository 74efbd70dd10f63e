"""The chain from unlabelled EEG to decoded EEG, as docs/finetune.md shows it, in small; and what the commands refuse."""

import importlib.resources
import json
import os
import subprocess
import sys
from pathlib import Path

import mne
import numpy as np
import pytest
import torch
import yaml
from edf_files import eeg, write_edf
from small import CH_NAMES, FINETUNE, PRETRAIN

from sjepa_deploy.bundle import TRAINING_KEY
from sjepa_deploy.cli import group, run_command
from sjepa_deploy.errors import TrainingError
from sjepa_deploy.learning.finetune import FinetuneConfig
from sjepa_deploy.learning.loop import read_config
from sjepa_deploy.learning.pretrain import PretrainConfig
from sjepa_deploy.models.checkpoint import read_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.models.resolve import resolve_spec
from sjepa_deploy.serialize import encode, overridden
from sjepa_deploy.spec import EncoderSpec


def call(capsys, *arguments):
    status = run_command(group, "sjepa", [str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def configs(tmp_path):
    """The small runs as YAML files."""
    for name, config in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
        content = encode(config)
        if name == "finetune":
            del content["encoder"]  # the base model's
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_pretrain_finetune_export_verify_run(configs, capsys):
    folder = configs
    train = ["--accelerator", "cpu", "--max-epochs", "2", "--seed", "5"]
    status, out, err = call(
        capsys, "pretrain", "--config", folder / "pretrain.yaml", "--out", folder / "base", *train, "--radius", "0.9", "--json"
    )
    assert status == 0, err
    assert json.loads(out)["result"]["fitted"]["epochs"] == 2
    config = json.loads((folder / "base/config.json").read_text())[TRAINING_KEY]["pretraining"]
    assert (config["masking"]["radius"], config["engine"]["seed"]) == (0.9, 5)
    status, out, err = call(
        capsys,
        "finetune",
        "--config",
        folder / "finetune.yaml",
        "--variant",
        "contextual",
        "--pretrained",
        folder / "base",
        "--freeze-encoder",
        "--out",
        folder / "model",
        *train,
    )
    assert status == 0, err
    assert "taken" in out
    assert "predicting the mean" in " ".join(out.split())
    status, out, err = call(
        capsys, "export", "--checkpoint", folder / "model", "--out", folder / "bundle", "--precision", "fp32", "--max-batch", 8
    )
    assert status == 0, err
    status, out, err = call(capsys, "verify", folder / "bundle")
    assert status == 0, err
    data = np.random.default_rng(0).normal(0, 1e-5, (len(CH_NAMES), 3000))
    raw = mne.io.RawArray(data, mne.create_info(list(CH_NAMES), 250.0, "eeg"), verbose="error")
    raw.save(folder / "some_raw.fif", verbose="error")
    status, out, err = call(
        capsys, "run", folder / "bundle", folder / "some_raw.fif", "--out", folder / "predictions.tsv", "--json"
    )
    assert status == 0, err
    summary = json.loads(out)
    assert summary["random_weights"] is False
    assert summary["signal"]["steps"] == encode(FINETUNE.data.signal_steps)
    rows = (folder / "predictions.tsv").read_text().splitlines()
    predictions = [float(row.split("\t")[1]) for row in rows[1:]]
    assert rows[0] == "time\tprediction"
    assert len(predictions) == summary["n_windows"] == 7
    assert all(0.2 < prediction < 1.0 for prediction in predictions)  # seconds: the reaction times' mean is 0.6


def test_events_of_edf_files_are_learned_as_classes(configs, capsys):
    """One run lacks the events, and one does not belong to the folds."""
    for i, names in enumerate((["T1", "T2"], ["T1", "T2", "T0"], ["T2", "T1"], ["T0"])):
        events = [(2.0 + 2 * k, names[k % len(names)]) for k in range(24)]
        (configs / f"s{i}").mkdir()
        write_edf(configs / f"s{i}/run.edf", ["Fz", "Cz", "Pz"], eeg(3, 5200, seed=i), [100] * 3, events=events)
    arguments = [part for i in range(4) for part in ("--data", configs / f"s{i}/run.edf")]
    arguments += ["--classes", "left=T1,right=T2", "--tmin", "0", "--tmax", "1.6", "--variant", "prelocal", "--batch-size", 4]
    status, out, err = call(capsys, "finetune", *arguments, "--max-epochs", 1, "--out", configs / "model", "--json")
    assert status == 0, err
    result = json.loads(out)["result"]
    spec = result["spec"]
    assert (spec["class_names"], spec["signal"]["n_times"], result["split"]) == (["left", "right"], 160, "subject")
    assert sorted(result[f"n_{part}"] for part in ("train", "val", "test")) == [16, 24, 24]


def in_two_processes(command, *arguments):
    """Run a command as torchrun does on a host of two devices, and return the result that one of the processes printed."""
    program = f"from sjepa_deploy.cli.{command} import main; main()"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*torchrun, sys.executable, "-c", program, *map(str, arguments), "--devices", "2", "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["result"]


@pytest.mark.alone
def test_two_processes_learn_what_one_does_with_batches_twice_as_large(configs, capsys):
    """PostLocal draws nothing at random while it trains, and a step takes the same windows either way."""
    config = ["--config", configs / "finetune.yaml", "--variant", "postlocal", "--seed", "3"]
    two = in_two_processes("finetune", *config, "--out", configs / "two", "--batch-size", "8")
    status, out, err = call(capsys, "finetune", *config, "--out", configs / "one", "--batch-size", "16", "--json")
    assert status == 0, err
    one = json.loads(out)["result"]
    assert (two["fitted"]["steps"], two["n_test"]) == (one["fitted"]["steps"], one["n_test"])
    weights = [read_checkpoint(configs / name).weights for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)
    start = build_model(resolve_spec({}, read_checkpoint(configs / "one"))[0], seed=3).state_dict()
    assert not any(torch.allclose(weights[0][name], start[name]) for name in start if name.endswith("weight"))


@pytest.mark.alone
def test_two_processes_pretrain_one_model_and_report_on_all_validation_windows(configs):
    result = in_two_processes("pretrain", "--config", configs / "pretrain.yaml", "--out", configs / "base", "--max-epochs", "2")
    assert result["fitted"]["steps"] == 2 * (result["n_train"] // 2 // PRETRAIN.engine.batch_size)
    assert result["fitted"]["val_loss"] == pytest.approx(result["val_l1"] / result["val_l1_mean"], rel=1e-5)
    assert read_checkpoint(configs / "base").variant == "base"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--pretrained", "nowhere"], "no checkpoint at nowhere"),
        (["finetune", "--data", "nowhere.edf"], "There is no data at nowhere.edf"),
        (["finetune", "--batch-size", "100000"], "fewer than a batch of 100000"),
        (["finetune", "--fold", "9"], "Fold 9 of 5 is none"),
        (["finetune", "--lr", "-1"], "A learning rate of -1 is none"),
        (["finetune", "--lr", "nan"], "A learning rate of nan is none"),
        (["finetune", "--n-times", "100"], "n_times is 100"),
        (["finetune", "--n-times", "0"], "n_times is 0"),
        (["finetune", "--tmax", "2.5", "--n-times", "152"], "--tmin 0.5 and --tmax 2.5 are 200 samples, not 152"),
        (["finetune", "--tmin", "1", "--tmax", "1"], "n_times is 0"),
        (["finetune", "--classes", "A=T1", "--task", "regression"], "the task a regression"),
        (["finetune", "--memory", "-1"], "memory is -1 GiB"),
        (["finetune", "--split-seed", "-1"], "split_seed is -1"),
        (["pretrain", "--subjects", "01"], "Subjects, sessions, tasks and runs are of BIDS folders"),
        (["finetune", "--sfreq", "0"], "sfreq is 0"),
        (["finetune", "--seed", "-1"], "seed is -1"),
        (["finetune", "--num-workers", "-1"], "num_workers is -1"),
        (["pretrain", "--radius", "3"], "hides all 16 channels"),
        (["pretrain", "--mask", "fixed"], "are more than the montage's 16"),
        (["pretrain", "--montage", "no-such-cap"], "neither a montage nor a file"),
        (["pretrain", "--devices", "0"], "devices is 0"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(arguments, message, configs, capsys):
    command, *flags = arguments
    status, _, err = call(capsys, command, "--config", configs / f"{command}.yaml", "--out", configs / "out", *flags)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (configs / "out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: {max_epoch: 3}", "engine has the unknown key 'max_epoch'"),
        ("engine: {lr: fast}", "engine.lr must be of type number, not str"),
        ("variant: base", "'base' cannot be fine-tuned"),
        ("engine: {weight_decay: -1.0}", "weight_decay is -1"),
        ("engine: {gradient_clip: 0.0}", "gradient_clip is 0"),
        ("data: {hop: 0.0}", "hop is 0"),
        ("data: {gap: -5.0}", "gap is -5 s"),
        ("data: {synthetic: {n_subjects: 0}}", "64 synthetic windows of 0 subjects"),
        ("data: {target: {tmin: .nan}}", "tmin is nan s"),
        ("a: [1", "is not YAML"),
        ("- 1", "the top level must be an object"),
    ],
)
def test_a_configuration_with_mistakes_is_refused(text, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    status, _, err = call(capsys, "finetune", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out")
    assert status == 2
    assert message in err


def test_the_shipped_configurations_are_the_recipes_defaults():
    folder = importlib.resources.files("sjepa_deploy") / "configs"
    with importlib.resources.as_file(folder) as path:
        assert read_config(PretrainConfig, path / "pretrain.yaml") == overridden(PretrainConfig(), {})
        for variant in ("prelocal", "postlocal", "contextual"):
            assert read_config(FinetuneConfig, path / f"finetune_{variant}.yaml") == FinetuneConfig(
                variant=variant, class_weights="balanced"
            )
        demo = read_config(FinetuneConfig, path / "demo.yaml")
        assert len(list(path.glob("*.yaml"))) == 6  # tests/test_sweep.py has the sixth
    encoder = EncoderSpec() if demo.encoder is None else demo.encoder
    n_times = demo.data.n_times
    assert encoder.span(encoder.n_outputs_of_layers(n_times)[-1]) == n_times  # a decision is as old as its newest sample


def test_a_shipped_configuration_is_found_by_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("finetune_prelocal.yaml")
    assert read_config(FinetuneConfig, name).variant == "prelocal"
    name.write_text("variant: postlocal")
    assert read_config(FinetuneConfig, name).variant == "postlocal"


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(TrainingError, match="nothing.yaml cannot be read .*, or use demo.yaml, finetune_contextual.yaml"):
        read_config(PretrainConfig, tmp_path / "nothing.yaml")


def test_a_transfer_is_stored_in_the_checkpoint(configs, capsys):
    call(capsys, "pretrain", "--config", configs / "pretrain.yaml", "--out", configs / "base", "--max-epochs", 1)
    status, out, err = call(
        capsys,
        "finetune",
        "--config",
        configs / "finetune.yaml",
        "--variant",
        "prelocal",
        "--pretrained",
        configs / "base",
        "--out",
        configs / "model",
        "--max-epochs",
        1,
        "--json",
    )
    assert status == 0, err
    stored = json.loads((configs / "model/config.json").read_text())[TRAINING_KEY]["result"]["transfer"]
    assert stored == json.loads(out)["result"]["transfer"]
    assert stored["taken"] == []
    assert len(stored["skipped"]) == 7
    assert read_checkpoint(configs / "model").variant == "prelocal"
