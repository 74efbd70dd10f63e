"""Fine-tuning from a fine-tuned model: its weights are the start and its contract holds."""

import dataclasses

import pytest
import torch
from small import CH_NAMES, DATA, FINETUNE, make_spec

from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.errors import CheckpointError, DataError, TrainingError
from sjepa_deploy.learning.data import Target
from sjepa_deploy.learning.finetune import finetune
from sjepa_deploy.models.checkpoint import read_checkpoint, write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.spec import Preprocessing

CLASSES = ("fast", "slow")
TINY = dataclasses.replace(
    FINETUNE, engine=dataclasses.replace(FINETUNE.engine, max_epochs=1, lr=1e-12), encoder=None, class_weights="balanced"
)
"""The learning rate is so small that the weights stay, but for rounding."""


def model_of(folder, variant="prelocal", **changes):
    fields = {"phase": "causal", "preprocessing": Preprocessing.default(100.0)} | changes
    write_checkpoint(build_model(make_spec(variant, **fields), seed=5), folder)
    return str(folder)


def of_classes(**changes):
    target = Target(kind="column", column="x", task="classification", classes=changes.pop("classes", ()))
    return dataclasses.replace(TINY, data=dataclasses.replace(DATA, target=target), **changes)


@pytest.mark.parametrize("variant", ["prelocal", "contextual"])
def test_all_weights_of_a_regression_are_the_start_in_the_targets_unit(variant, tmp_path):
    start = model_of(tmp_path / "start", variant)
    result = finetune(dataclasses.replace(TINY, start=start), tmp_path / "out")
    before, after = read_checkpoint(start), read_checkpoint(tmp_path / "out")
    assert result.spec.variant == variant
    assert result.transfer is None
    assert before.weights.keys() == after.weights.keys()
    for name, weight in before.weights.items():
        torch.testing.assert_close(after.weights[name], weight, rtol=1e-5, atol=1e-6)


def test_the_models_settings_are_the_datas(tmp_path):
    names = CH_NAMES[:9]
    start = model_of(tmp_path / "start", ch_names=names, n_times=200, n_spat_filters=2, n_outputs=2, class_names=CLASSES)
    result = finetune(of_classes(start=start), tmp_path / "out")
    assert (result.spec.ch_names, result.spec.n_times, result.spec.n_spat_filters) == (names, 200, 2)
    assert result.spec.class_names == CLASSES


@pytest.mark.parametrize(
    ("model", "changes", "error", "why"),
    [
        ({"variant": "base"}, {}, CheckpointError, "base model"),
        ({"n_outputs": 3}, {}, CheckpointError, "outputs"),
        ({"n_outputs": 2, "class_names": CLASSES[::-1]}, {}, CheckpointError, "order of the classes"),
        ({"n_outputs": 2, "class_names": ("up", "down")}, {}, CheckpointError, "other classes"),
        ({"n_outputs": 2, "class_names": CLASSES}, {"pretrained": "base"}, TrainingError, "Both"),
    ],
)
def test_another_contract_is_refused(model, changes, error, why, tmp_path):
    start = model_of(tmp_path / "start", model.pop("variant", "prelocal"), **model)
    with pytest.raises(error, match=why):
        finetune(of_classes(start=start, **changes), tmp_path / "out")


def test_people_of_the_model_are_not_tested_on_and_flags_do_not_contradict(tmp_path, capsys):
    finetune(TINY, tmp_path / "first")
    other = dataclasses.replace(TINY, start=str(tmp_path / "first"), data=dataclasses.replace(TINY.data, fold=2))
    with pytest.raises(DataError, match="has seen"):
        finetune(other, tmp_path / "second")
    arguments = ["--from", str(tmp_path / "first"), "--sfreq", "128", "--out", str(tmp_path / "third")]
    assert run_command(_command("finetune"), "sjepa-finetune", arguments) == 2
    assert "--sfreq is the model's" in capsys.readouterr().err
