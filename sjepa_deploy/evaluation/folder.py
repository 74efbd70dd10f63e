"""Keeps the folder of an evaluation: models of the folds, predictions, results, and the page."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sjepa_deploy.errors import OutputError
from sjepa_deploy.evaluation.predictions import PREDICTIONS_FILE, Predictions, table_of
from sjepa_deploy.evaluation.report import Examples, report_page
from sjepa_deploy.evaluation.results import (
    RESULTS_FILE,
    Agreement,
    Continuous,
    EvaluationReport,
    judge,
    read_others,
    write_results,
)
from sjepa_deploy.evaluation.verdict import notes, verdict
from sjepa_deploy.files import now, write_atomically
from sjepa_deploy.spec import Task

MODELS_FOLDER = "models"
"""Folder of an evaluation that holds the model of each fold and seed."""

SCRATCH = "scratch"
"""Name by which the model without a base model is compared, and folder of its folds."""

PLAN_FILE = "plan.json"
"""What an evaluation was asked for. A folder with this file may be replaced."""

REPORT_FILE = "report.html"

PACKAGES = ("sjepa-deploy", "torch", "numpy", "mne", "scikit-learn", "pyriemann")


def open_folder(folder: Path, *, resume: bool, force: bool) -> None:
    """Make the folder of an evaluation, or refuse one that holds something.

    Raises
    ------
    OutputError
        If an evaluation is there that is neither gone on with nor replaced, or something else.
    """
    if resume and force:
        raise OutputError("An evaluation is either gone on with or replaced.", "Give --resume or --force.")
    there = folder.is_dir() and any(folder.iterdir())
    ours = (folder / PLAN_FILE).is_file()
    if there and not ours:
        raise OutputError(f"{folder} holds something that is no evaluation.", "Choose another --out.")
    if there and not (resume or force):
        raise OutputError(
            f"{folder} holds an evaluation already.", "Go on with --resume, replace it with --force, or choose another --out."
        )
    if force and ours:
        for name in (MODELS_FOLDER, SCRATCH):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (PLAN_FILE, PREDICTIONS_FILE, RESULTS_FILE, REPORT_FILE):
            (folder / name).unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder} cannot be written ({e.strerror}).", "Choose another --out.") from e


def others_of(path: Path, mine: Predictions) -> tuple[Predictions, ...]:
    """Return the model of an earlier evaluation, under a name that the folder tells where both are called the same."""
    return read_others(path, mine, lambda name: f"{name} of {path.name}" if name == mine.model else name)


def finished(
    folder: Path,
    every: Sequence[Predictions],
    others: Sequence[Predictions],
    *,
    protocol: str,
    folds: tuple[str, ...],
    seeds: tuple[int, ...],
    baselines: Sequence[str],
    command: str,
    told: tuple[str, ...],
    examples: Examples,
    agreements: tuple[Agreement, ...] = (),
    continuous: tuple[Continuous, ...] = (),
) -> EvaluationReport:
    """Judge predictions, write the three files of an evaluation, and return the report.

    Parameters
    ----------
    folder : Path
        Where to.
    every, others : sequence of Predictions
        See `sjepa_deploy.evaluation.results.judge`.
    protocol, folds, seeds, command
        See `EvaluationReport`.
    baselines : sequence of str
        Names of models that are baselines.
    told : tuple of str
        Sentences that a reader must know.
    examples : Examples
        Samples of the windows.
    agreements : tuple of Agreement
        Decisions of other backends.
    continuous : tuple of Continuous
        Behaviour on a stream.
    """
    first = every[0]
    found = judge(every, others)
    task: Task = "regression" if first.class_names is None else "classification"
    report = EvaluationReport(
        created=now(),
        command=command,
        task=task,
        class_names=first.class_names,
        protocol=protocol,
        folds=folds,
        seeds=seeds,
        averaged_over=found.averaged_over,
        primary=found.primary,
        units=found.units,
        n_units=found.n_units,
        judged=found.judged,
        differences=found.differences,
        agreements=found.agreements + agreements,
        continuous=continuous,
        verdict=verdict(found, baselines),
        notes=notes(found, len(np.unique(first.subject))) + told,
        versions=versions(),
    )
    write_atomically(folder / PREDICTIONS_FILE, table_of(every))
    write_results(folder, report)
    write_atomically(folder / REPORT_FILE, report_page(report, first, examples).encode())
    return report


def versions() -> dict[str, str]:
    """Return the versions of the packages that an evaluation depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
