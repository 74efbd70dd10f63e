"""A sweep runs the whole grid, goes on after a stop without running anything twice, and makes one table."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small import FINETUNE, PRETRAIN

from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.errors import TrainingError
from sjepa_deploy.learning import sweep as sweeps
from sjepa_deploy.learning.loop import read_config
from sjepa_deploy.learning.sweep import SweepConfig, summary, sweep
from sjepa_deploy.serialize import encode

ONCE = {"max_epochs": 1}
GRID = SweepConfig(
    pretrain=dataclasses.replace(PRETRAIN, engine=dataclasses.replace(PRETRAIN.engine, **ONCE)),
    finetune=dataclasses.replace(FINETUNE, encoder=None, engine=dataclasses.replace(FINETUNE.engine, **ONCE)),
    windows=(152,),
    radii=(0.8,),
    variants=("prelocal",),
    folds=(0,),
)


def test_the_grid_runs_once_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    ran = []
    for name in ("pretrain", "finetune"):
        real = getattr(sweeps, name)

        def counted(config, folder, *, resume, real=real, name=name):
            ran.append((name, resume))
            if len(ran) == 3:
                raise KeyboardInterrupt
            return real(config, folder, resume=resume)

        monkeypatch.setattr(sweeps, name, counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(GRID, tmp_path)
    rows = sweep(GRID, tmp_path)
    expected = [("scratch", "full"), ("1.5s-80%", "frozen"), ("1.5s-80%", "full")]
    assert [(row["base"], row["training"]) for row in rows] == expected
    assert [name for name, _ in ran] == ["finetune", "pretrain", "finetune", "finetune", "finetune"]  # one was stopped
    assert sweep(GRID, tmp_path) == rows
    assert len(ran) == 5
    table = [line.split("\t") for line in (tmp_path / "sweep.tsv").read_text().splitlines()]
    assert table[0][:6] == ["base", "variant", "training", "fold", "seed", "r2"]
    assert [float(line[5]) for line in table[1:]] == [row["r2"] for row in rows]
    best = summary(rows)[0]
    assert best["mean"] == max(row["r2"] for row in rows)
    taken = json.loads((tmp_path / "models/1.5s-80%/prelocal-full/fold0-seed0/config.json").read_text())
    assert taken["sjepa_deploy_training"]["result"]["transfer"]["taken"]


def test_the_mean_of_a_pipeline_is_over_folds_and_seeds():
    rows = [
        {"base": "scratch", "variant": "prelocal", "training": "full", "fold": fold, "seed": 0, "balanced_accuracy": value}
        for fold, value in enumerate((0.5, 0.7, 0.9))
    ]
    (found,) = summary(rows)
    assert found["pipeline"] == "scratch x full-prelocal"
    assert (found["n"], found["low"], found["high"]) == (3, 0.5, 0.9)
    assert found["mean"] == pytest.approx(np.mean([0.5, 0.7, 0.9]))


def test_the_command_prints_one_table_and_the_recipe_of_the_paper_is_one(tmp_path, capsys):
    paper = read_config(SweepConfig, None), read_config(SweepConfig, Path("sweep_paper.yaml"))
    assert paper[1].windows == paper[0].windows == (152, 512, 2048)
    tiny = dataclasses.replace(GRID, windows=(), variants=("prelocal",))
    (tmp_path / "tiny.yaml").write_text(json.dumps(encode(tiny)))
    for more in ([], ["--force"]):
        arguments = ["--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--json", *more]
        assert run_command(_command("sweep"), "sjepa-sweep", arguments) == 0
        assert json.loads(capsys.readouterr().out)["summary"][0]["pipeline"] == "scratch x full-prelocal"
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(TrainingError, match="empty"):
        SweepConfig(variants=())
