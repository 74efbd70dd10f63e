"""Folds that the seed leaves alone, subjects that a base model has seen, and recordings that are there twice."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from edf_files import eeg, write_edf
from small import DATA, FINETUNE, PRETRAIN

from sjepa_deploy.bundle import TRAINING_KEY
from sjepa_deploy.errors import DataError
from sjepa_deploy.learning.data import DataConfig, Target, split_windows
from sjepa_deploy.learning.finetune import finetune
from sjepa_deploy.learning.loading import load_windows, source_names
from sjepa_deploy.learning.origin import samples_hash
from sjepa_deploy.learning.pretrain import pretrain
from sjepa_deploy.models.checkpoint import read_checkpoint
from sjepa_deploy.serialize import encode, overridden
from sjepa_deploy.spec import Preprocessing

ONE_EPOCH = {"engine.max_epochs": 1}
UNTOUCHED = Preprocessing(reference="none", l_freq=None, h_freq=None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pretrain(overridden(PRETRAIN, ONE_EPOCH), folder)
    return folder


def rows_of(folder):
    with (folder / "split.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_seed_of_training_leaves_the_folds_alone(tmp_path):
    config = overridden(FINETUNE, ONE_EPOCH | {"variant": "postlocal"})
    for seed in (0, 7):
        finetune(overridden(config, {"engine.seed": seed}), tmp_path / str(seed))
    assert rows_of(tmp_path / "0") == rows_of(tmp_path / "7")
    windows = load_windows(DATA)
    tests = {tuple(split_windows(windows, dataclasses.replace(DATA, split_seed=seed)).test) for seed in range(6)}
    assert len(tests) > 1


def test_the_split_and_the_subjects_are_stored(base, tmp_path):
    config = overridden(FINETUNE, ONE_EPOCH | {"pretrained": str(base), "encoder": None})
    config = dataclasses.replace(config, encoder=None)
    finetune(config, tmp_path)
    windows = load_windows(config.data)
    split = split_windows(windows, config.data)
    rows = rows_of(tmp_path)
    assert [row["subject"] for row in rows] == windows.subject.tolist()
    np.testing.assert_allclose([float(row["onset"]) for row in rows], windows.onset, rtol=1e-5)
    np.testing.assert_allclose([float(row["label"]) for row in rows], windows.targets, rtol=1e-5)
    for part in ("train", "val", "test"):
        assert [i for i, row in enumerate(rows) if row["part"] == part] == getattr(split, part).tolist()
    seen = sorted({*windows.subject[split.train], *windows.subject[split.val]})
    stored = json.loads((tmp_path / "config.json").read_text())[TRAINING_KEY]["origin"]
    assert stored["subjects"] == seen
    assert read_checkpoint(tmp_path / "training/best.ckpt").training["origin"] == stored


@pytest.mark.parametrize("form", ["folder", "best.ckpt"])
def test_a_base_that_has_seen_the_test_part_is_refused_unless_that_is_allowed(base, tmp_path, form):
    pretrained = str(base if form == "folder" else base / "training/best.ckpt")
    config = dataclasses.replace(overridden(FINETUNE, ONE_EPOCH), pretrained=pretrained, encoder=None)
    finetune(config, tmp_path / "same")  # the fold that the base did not see
    other = overridden(config, {"data.fold": 1})  # the base was validated on these
    with pytest.raises(DataError, match="has seen 1 of the test part's subjects: synthetic-.*--allow-overlap"):
        finetune(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    result = finetune(overridden(other, {"allow_overlap": True}), tmp_path / "other")
    assert result.transfer is not None
    seen = json.loads((tmp_path / "other/config.json").read_text())[TRAINING_KEY]["origin"]["subjects"]
    assert len(seen) == DATA.synthetic.n_subjects  # the base's, and this run's


def test_a_base_that_does_not_tell_is_taken_with_a_note(base, tmp_path):
    shutil.copytree(base, tmp_path / "old")
    config = json.loads((base / "config.json").read_text())
    del config[TRAINING_KEY]["origin"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    tuned = dataclasses.replace(
        overridden(FINETUNE, ONE_EPOCH | {"data.fold": 1}), pretrained=str(tmp_path / "old"), encoder=None
    )
    result = finetune(tuned, tmp_path / "model")
    assert "the base model does not tell whose EEG it has seen" in result.transfer.notes


def save_npz(path, seed, names=("Fz", "Cz", "Pz"), scale=1.0, subject="a", **changes):
    arrays = {
        "eeg": scale * np.random.default_rng(seed).normal(0, 1e-5, (30, 3, 152)),
        "ch_names": np.array(names),
        "sfreq": 100.0,
        "unit": "V",
        "targets": np.arange(30) % 7,
        "subject": np.repeat([f"{subject}{i}" for i in range(5)], 6),
        "positions": np.array([[0.0, 0.07, 0.05], [0.0, 0.0, 0.1], [0.0, -0.07, 0.05]]),
    }
    np.savez(path, **(arrays | changes))
    return str(path)


def test_a_recording_that_the_base_has_seen_under_another_name_is_found(tmp_path):
    data = DataConfig(source=(save_npz(tmp_path / "one.npz", 0),), n_times=152, preprocessing=UNTOUCHED)
    pretrain(dataclasses.replace(overridden(PRETRAIN, ONE_EPOCH), data=dataclasses.replace(data)), tmp_path / "base")
    renamed = dataclasses.replace(
        data, source=(save_npz(tmp_path / "two.npz", 0, scale=1e6, unit="uV", subject="b"),), target=Target(), split_seed=1
    )
    config = dataclasses.replace(
        overridden(FINETUNE, ONE_EPOCH), data=renamed, pretrained=str(tmp_path / "base"), encoder=None, variant="postlocal"
    )
    config = overridden(config, {"engine.batch_size": 4})
    with pytest.raises(DataError, match=r"has seen 1 of the test part's recordings: two/b\d/b\d \(seen as one/a\d/a\d\)"):
        finetune(config, tmp_path / "model")
    fresh = dataclasses.replace(renamed, source=(save_npz(tmp_path / "three.npz", 1, subject="c"),))
    finetune(dataclasses.replace(config, data=fresh), tmp_path / "model")


def test_the_hash_of_samples_is_that_of_what_was_recorded():
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 20, (4, 1000))
    same = samples_hash([samples])
    assert samples_hash([(1e-6 * samples + 0.02)[[2, 0, 3, 1]]]) == same
    assert samples_hash([np.vstack([samples, np.zeros(1000)])]) == same
    assert samples_hash([samples[:, 1:]]) != same
    assert samples_hash([samples[:3]]) != same
    assert samples_hash([np.zeros((4, 1000))]) == ""


def write_run(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_edf(path, ["Fz", "Cz", "Pz"], eeg(3, 4000, seed=seed), [100] * 3)
    return str(path)


def test_files_of_one_name_in_different_folders_are_different_people(tmp_path):
    sources = tuple(write_run(tmp_path / folder / "run.edf", i) for i, folder in enumerate("abc"))
    windows = load_windows(DataConfig(source=sources))
    assert sorted(set(windows.subject)) == sorted(set(windows.recording)) == ["a/run", "b/run", "c/run"]
    assert split_windows(windows, DataConfig(source=sources)).by == "subject"


def test_one_recording_under_two_names_is_refused(tmp_path):
    one = write_run(tmp_path / "one.edf", 0)
    shutil.copy(one, tmp_path / "two.edf")
    with pytest.raises(DataError, match="one and two hold the same samples"):
        load_windows(DataConfig(source=(one, str(tmp_path / "two.edf"))))
    with pytest.raises(DataError, match=r"one\.edf is named twice"):
        load_windows(DataConfig(source=(one, str(tmp_path / "x/../one.edf"))))


def test_names_of_sources_are_the_shortest_that_differ(tmp_path):
    for folder in ("a/x", "b/x", "c"):
        (tmp_path / folder).mkdir(parents=True)
    names = ["a/x/run.edf", "b/x/run.edf", "c/other.edf", "c/both.edf", "c/both.fif", "c/with.dot.edf"]
    given = [str(tmp_path / name) for name in names]
    assert source_names(given) == ["a/x/run", "b/x/run", "other", "both.edf", "both.fif", "with.dot"]


def test_a_run_that_an_older_release_began_keeps_its_folds_and_its_phase(tmp_path):
    """Its seed dealt the folds, and its windows were zero-phase. The file of the run has neither `split_seed` nor `phase`."""
    config = overridden(FINETUNE, ONE_EPOCH | {"variant": "postlocal", "engine.seed": 3})
    finetune(overridden(config, {"data.split_seed": 3, "data.phase": "zero-phase"}), tmp_path)
    stored = encode(config)
    del stored["data"]["split_seed"], stored["data"]["phase"], stored["allow_overlap"], stored["class_weights"]
    (tmp_path / "training/run.json").write_text(json.dumps(stored))
    before = rows_of(tmp_path), torch.load(tmp_path / "training/best.ckpt", weights_only=True)["epoch"]
    result = finetune(dataclasses.replace(config, class_weights="balanced"), tmp_path, resume=True)
    assert result.spec.signal.phase == "zero-phase"
    assert (rows_of(tmp_path), torch.load(tmp_path / "training/best.ckpt", weights_only=True)["epoch"]) == before
