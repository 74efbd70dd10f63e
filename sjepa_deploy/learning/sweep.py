"""Runs a grid of pretrainings and fine-tunings, goes on after a stop, and makes one table of the scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sjepa_deploy.bundle import TRAINING_KEY
from sjepa_deploy.errors import CollapseError, TrainingError
from sjepa_deploy.files import load_json, write_atomically
from sjepa_deploy.learning.finetune import FinetuneConfig, finetune
from sjepa_deploy.learning.pretrain import PretrainConfig, pretrain
from sjepa_deploy.learning.run_folder import LAST_FILE
from sjepa_deploy.models.braindecode_config import CONFIG_FILE
from sjepa_deploy.spec import Variant

TABLE_FILE = "sweep.tsv"
"""File of the folder of a sweep that has a row for each fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Describes a grid of runs.

    Attributes
    ----------
    pretrain : PretrainConfig
        Pretraining. `windows` and `radii` replace the length of its windows and the radius of its masks.
    finetune : FinetuneConfig
        Fine-tuning. The grid replaces the variant, the base model, `freeze_encoder`, the fold and the seed.
    windows : tuple of int
        Lengths of the windows of pretraining in samples.
    radii : tuple of float
        Radii of the masks in head radii.
    variants : tuple of {"prelocal", "postlocal", "contextual"}
        Models.
    frozen : tuple of bool
        Whether the encoder is frozen.
    scratch : bool
        Whether each variant is trained from scratch too.
    folds, seeds : tuple of int
        Folds to test on, and seeds.
    """

    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    windows: tuple[int, ...] = (152, 512, 2048)
    radii: tuple[float, ...] = (0.4, 0.6, 0.8)
    variants: tuple[Variant, ...] = ("contextual", "postlocal", "prelocal")
    frozen: tuple[bool, ...] = (True, False)
    scratch: bool = True
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not (self.variants and self.folds and self.seeds and (self.scratch or (self.windows and self.radii and self.frozen))):
            raise TrainingError("The grid of the sweep is empty.", "Name variants, folds, seeds, and base models or scratch.")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Names one fine-tuning of a grid.

    Attributes
    ----------
    base : str
        Base model, as in "16s-60%"; "scratch" without one.
    variant : Variant
        Model.
    training : {"frozen", "full"}
        Whether the encoder was frozen.
    fold, seed : int
        Fold and seed.
    """

    base: str
    variant: Variant
    training: str
    fold: int
    seed: int

    @property
    def folder(self) -> str:
        """Return the folder of the run, below that of the sweep."""
        return f"models/{self.base}/{self.variant}-{self.training}/fold{self.fold}-seed{self.seed}"


def sweep(config: SweepConfig, out: Path, *, tell: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Run what of a grid has not been run, and return a row for each fine-tuning, which ``out/sweep.tsv`` has too.

    A base model is pretrained for each fold where its data are those of the fine-tuning, so that no base model has seen a test
    subject. A base model that collapses is told, and has no rows.

    Parameters
    ----------
    config : SweepConfig
        The grid.
    out : Path
        Folder. Runs that are in it are kept: finished ones are read, and stopped ones go on.
    tell : callable
        Called with a sentence before each run.
    """
    rows: list[dict[str, Any]] = []
    for cell, base in _cells(config):
        start = None
        if base is not None:
            start = _pretrained(base, out / "bases" / _base_folder(config, cell), tell)
            if start is None:
                continue
        tuned = replace(
            config.finetune,
            variant=cell.variant,
            pretrained=None if start is None else str(start),
            freeze_encoder=cell.training == "frozen",
            encoder_to_prelocal=start is not None,
            data=replace(config.finetune.data, fold=cell.fold),
            engine=replace(config.finetune.engine, seed=cell.seed),
        )
        folder = out / cell.folder
        if not (folder / CONFIG_FILE).is_file():
            tell(f"fine-tuning {cell.folder}")
            finetune(tuned, folder, resume=(folder / "training" / LAST_FILE).is_file())
        stored = load_json((folder / CONFIG_FILE).read_bytes())[TRAINING_KEY]["result"]
        scores = {name: score["value"] for name, score in stored["test"].items()}
        rows.append({name: getattr(cell, name) for name in ("base", "variant", "training", "fold", "seed")} | scores)
        write_atomically(out / TABLE_FILE, _tsv(rows))
    return rows


def discard(out: Path) -> None:
    """Remove the runs of a sweep, so that all are made anew."""
    for folder in ("bases", "models"):
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / TABLE_FILE).unlink(missing_ok=True)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean, the lowest and the highest first score of each pipeline over folds and seeds, the best pipeline first.

    A pipeline is a base model, a training and a variant, as "16s-60% x full-prelocal" in the paper.

    Raises
    ------
    TrainingError
        If there are no rows.
    """
    if not rows:
        raise TrainingError("The sweep has no fine-tuning: every base model collapsed.", "Pretrain on more channels or data.")
    metric = list(rows[0])[5]
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(f"{row['base']} x {row['training']}-{row['variant']}", []).append(row[metric])
    table = [
        {"pipeline": name, "metric": metric, "n": len(v), "mean": float(np.mean(v)), "low": min(v), "high": max(v)}
        for name, v in found.items()
    ]
    return sorted(table, key=lambda row: row["mean"], reverse=metric not in ("nrmse", "mae"))


def _cells(config: SweepConfig) -> Iterator[tuple[Cell, PretrainConfig | None]]:
    for fold in config.folds:
        for seed in config.seeds:
            bases: list[tuple[str, PretrainConfig | None]] = [("scratch", None)] if config.scratch else []
            for n_times in config.windows:
                for radius in config.radii:
                    bases.append(_base(config, n_times, radius, fold, seed))
            for base, asked in bases:
                for variant in config.variants:
                    for frozen in config.frozen if asked is not None else (False,):
                        training = "frozen" if frozen else "full"
                        yield Cell(base=base, variant=variant, training=training, fold=fold, seed=seed), asked


def _base(config: SweepConfig, n_times: int, radius: float, fold: int, seed: int) -> tuple[str, PretrainConfig]:
    data = replace(config.pretrain.data, n_times=n_times)
    if _shares_data(config):
        data = replace(data, fold=fold)
    engine = replace(config.pretrain.engine, seed=seed)
    asked = replace(config.pretrain, data=data, masking=replace(config.pretrain.masking, radius=radius), engine=engine)
    return f"{n_times / data.sfreq:.2g}s-{radius:.0%}", asked


def _shares_data(config: SweepConfig) -> bool:
    return bool(set(config.pretrain.data.source) & set(config.finetune.data.source))


def _base_folder(config: SweepConfig, cell: Cell) -> str:
    return f"{cell.base}/" + (f"fold{cell.fold}-" if _shares_data(config) else "") + f"seed{cell.seed}"


def _pretrained(config: PretrainConfig, folder: Path, tell: Callable[[str], None]) -> Path | None:
    """Return the folder of a base model, after training it where that is not done; None if it collapsed."""
    collapsed = folder / "collapsed.txt"
    if not (folder / CONFIG_FILE).is_file() and not collapsed.is_file():
        tell(f"pretraining {folder.parent.name}/{folder.name}")
        try:
            pretrain(config, folder, resume=(folder / "training" / LAST_FILE).is_file())
        except CollapseError as e:
            write_atomically(collapsed, str(e).encode())
    if collapsed.is_file():
        tell(f"{folder.parent.name}/{folder.name} is left out: {collapsed.read_text()}")
        return None
    return folder


def _tsv(rows: list[dict[str, Any]]) -> bytes:
    lines = ["\t".join(rows[0]), *("\t".join(str(value) for value in row.values()) for row in rows)]
    return ("\n".join(lines) + "\n").encode()
