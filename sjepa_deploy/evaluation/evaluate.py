"""Evaluates a recipe: trains all folds and seeds, fits baselines on the same folds, and judges what they predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sjepa_deploy.errors import DataError
from sjepa_deploy.evaluation.baselines import predict_baseline
from sjepa_deploy.evaluation.folder import MODELS_FOLDER, PLAN_FILE, SCRATCH, finished, others_of
from sjepa_deploy.evaluation.folds import Fold, Protocol, chosen, folds_of
from sjepa_deploy.evaluation.predictions import Predictions, joined
from sjepa_deploy.evaluation.report import Examples
from sjepa_deploy.evaluation.results import EvaluationReport
from sjepa_deploy.evaluation.train import Step, base_of, through_live_path, train_folds
from sjepa_deploy.files import json_file, write_atomically
from sjepa_deploy.learning.finetune import FinetuneConfig, check_targets
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.loop import check_enough
from sjepa_deploy.learning.progress import Epoch
from sjepa_deploy.learning.start import settings_of
from sjepa_deploy.models.checkpoint import read_checkpoint
from sjepa_deploy.models.transfer import base_encoder
from sjepa_deploy.serialize import overridden


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Says what an evaluation does beside the recipe.

    Attributes
    ----------
    protocol : {"within", "cross-session", "cross-subject", "loso"}
        See `sjepa_deploy.evaluation.folds.folds_of`.
    folds : tuple of int or None
        Numbers of the folds. None takes all.
    n_seeds : int
        Trainings of each fold; their seeds follow the recipe's.
    baselines : tuple of str
        See `sjepa_deploy.evaluation.baselines.BASELINES`.
    against : tuple of str
        Folders of evaluations of the same windows; "scratch" trains the recipe without its base model.
    live : bool
        Whether recordings are decoded through the live path too.
    name : str or None
        Name of the model in tables. None is the variant.
    """

    protocol: Protocol = "cross-subject"
    folds: tuple[int, ...] | None = None
    n_seeds: int = 1
    baselines: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    live: bool = True
    name: str | None = None


def evaluate(
    config: FinetuneConfig,
    plan: Plan,
    folder: Path,
    *,
    command: str = "",
    tell: Callable[[str | Step], None] = lambda what: None,
    tell_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> EvaluationReport:
    """Train and test all folds and seeds of a recipe, and write ``predictions.tsv``, ``results.json`` and ``report.html``.

    Parameters
    ----------
    config : FinetuneConfig
        The recipe.
    plan : Plan
        What to do with it.
    folder : Path
        Folder of the evaluation, see `open_folder`. Folds that are done are not trained again.
    command : str
        Command that repeats the evaluation.
    tell, tell_epoch : callable
        Called with what comes next, and after each epoch.

    Raises
    ------
    DataError
        If there are too few subjects or sessions, or a fold lacks a class.
    TrainingError
        If the folder holds models of another recipe or of other data.
    """
    tell("reading the data")
    if config.start is not None:
        start = read_checkpoint(config.start, allow_left_out=config.allow_left_out)
        config = overridden(config, settings_of(start, config.data))
    windows = load_windows(config.data)
    folds = chosen(folds_of(windows, config.data, plan.protocol), plan.folds)
    for fold in folds:
        check_enough(fold.split, config.engine)
        check_targets(windows, fold.split, fold.name)
    write_atomically(folder / PLAN_FILE, json_file({"plan": plan, "recipe": config}))
    seeds = range(config.engine.seed, config.engine.seed + plan.n_seeds)
    live = None
    if plan.live:
        tell("decoding the recordings through the live path")
        live = through_live_path(config.data)
    name = plan.name or config.variant

    def trained(recipe: FinetuneConfig, where: str, called: str, ways: bool) -> list[Predictions]:
        found = train_folds(
            recipe,
            folder / where,
            windows,
            folds,
            seeds,
            live=live if ways else None,
            name=called,
            tell=tell,
            tell_epoch=tell_epoch,
        )
        return list(found)

    rows = trained(config, MODELS_FOLDER, name, True)
    if SCRATCH in plan.against:
        rows += trained(_from_scratch(config, folds[0]), SCRATCH, SCRATCH, False)
    for baseline in plan.baselines:
        tell(f"fitting the baseline {baseline}")
        rows += [predict_baseline(baseline, windows, fold, balanced=config.class_weights == "balanced") for fold in folds]
    every = by_model(rows)
    others = [part for path in plan.against if path != SCRATCH for part in others_of(Path(path), every[0])]
    said = []
    if plan.live and live is None:
        said.append("The windows were cut before: there is no live path to decode them through.")
    return finished(
        folder,
        every,
        others,
        protocol=plan.protocol,
        folds=tuple(fold.name for fold in folds),
        seeds=tuple(seeds),
        baselines=plan.baselines,
        command=command,
        told=tuple(said) + windows.skipped,
        examples=Examples(eeg=windows.eeg, ch_names=windows.signal.ch_names or (), sfreq=windows.sfreq),
    )


def by_model(rows: Sequence[Predictions]) -> list[Predictions]:
    """Return the predictions of each model and way as one, in the order in which they come first."""
    keys = list(dict.fromkeys(part.key for part in rows))
    return [joined([part for part in rows if part.key == key]) for key in keys]


def _from_scratch(config: FinetuneConfig, fold: Fold) -> FinetuneConfig:
    """Return the recipe without its base model: an encoder of the same sizes that learns, too."""
    base = base_of(config, fold)
    if base is None:
        raise DataError("There is no base model: the recipe begins from scratch.", "Leave --against scratch out.")
    encoder, _ = base_encoder(read_checkpoint(base, allow_left_out=config.allow_left_out), config.encoder)
    return replace(config, pretrained=None, freeze_encoder=False, encoder=encoder)
