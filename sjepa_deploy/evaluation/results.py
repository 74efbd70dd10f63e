"""Describes the report of an evaluation, and judges predictions into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sjepa_deploy.errors import DataError
from sjepa_deploy.evaluation import figures
from sjepa_deploy.evaluation.predictions import PREDICTIONS_FILE, Predictions, Way, numbered_as, read_table
from sjepa_deploy.evaluation.statistics import Chance, Difference, Tally, UnitKind, chance, compare, units_of, with_intervals
from sjepa_deploy.files import json_file, load_json, write_atomically
from sjepa_deploy.runtime.decisions.description import Figure
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import Task

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Holds the figures of one model.

    Attributes
    ----------
    model : str
        Name of the model: a variant, a baseline or a bundle.
    way : {"offline", "live"}
        Whether windows were cut out of whole recordings, or came out of the live decoder.
    n_windows, n_rows : int
        Windows, and predictions about them: each seed has its own.
    figures : dict of str to Figure
        Figures with their 95 % intervals: "balanced_accuracy", "accuracy", "kappa", "normalised_mcc", "auc", "ece" (calibration
        error), "undecided" (share of windows without a decision), "bits" (of a decision, Wolpaw); of a regression "r2", "r".
    chance : dict of str to Chance
        What the figures are where labels say nothing.
    confusion : tuple of tuple of int or None
        Windows of each true class (rows) by their decision (columns); those without a decision are left out.
    subjects : dict of str to dict
        Figures of each subject alone; None where a figure is not defined.
    """

    model: str
    way: Way
    n_windows: int
    n_rows: int
    figures: dict[str, Figure]
    chance: dict[str, Chance]
    confusion: tuple[tuple[int, ...], ...] | None
    subjects: dict[str, dict[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Compares decisions of a backend or a way with those of the model that is judged.

    Attributes
    ----------
    model : str
        Model that decides.
    name, reference : str
        What decides, and what it is compared with, as in "ort-cpu fp16", "live".
    differ : float
        Share of the windows with another decision; of a regression, with another number by a tenth of their spread.
    n_windows : int
        Windows that were compared.
    """

    model: str
    name: str
    reference: str
    differ: float
    n_windows: int


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """Says what a bundle with its decision layer does on a stream, in which events are rare.

    Attributes
    ----------
    hop : float
        Seconds from one window to the next.
    layer : str
        Name of the decision layer.
    n_events : int
        Events.
    minutes : float
        Minutes of signal.
    figures : dict of str to Figure
        "accept_rate" (share of events with a decision), "accuracy" (share of right ones among the first decisions of events),
        "false_per_minute" (decisions a minute that are wrong or belong to no event), "latency_median" and "latency_p90" (seconds
        from an event to its first right decision), "time_to_decision" (seconds from an event to its first decision, median),
        "undecided" (share of the time without a decision), "bits_per_minute" (Wolpaw, of the first decisions of events).
    latencies : tuple of float
        Seconds from each event to its first right decision, in the order of the events; events without one are left out.
    """

    hop: float
    layer: str
    n_events: int
    minutes: float
    figures: dict[str, Figure]
    latencies: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Describes an evaluation.

    Attributes
    ----------
    schema_version : int
        Version of this description.
    created, command : str
        When, and by what command.
    task : {"classification", "regression", "features"}
        What was learned.
    class_names : tuple of str or None
        Classes.
    protocol : str
        "within", "cross-session", "cross-subject", "loso"; "bundle" where nothing was trained.
    folds : tuple of str
        Names of the folds.
    seeds : tuple of int
        Seeds of the trainings.
    averaged_over : tuple of str
        Columns of the table: a figure is computed in each group of rows that agree in them, then averaged.
    primary : str
        Figure that verdicts are about.
    units : str
        What intervals are over: "subjects", "recordings" or "blocks".
    n_units : int
        Number of the units.
    judged : tuple of Judged
        Figures of each model and way; the model that the evaluation is about comes first.
    differences : tuple of Difference
        Comparisons of this model with others.
    agreements : tuple of Agreement
        Decisions that differ between ways, backends and precisions.
    continuous : tuple of Continuous
        Behaviour on a stream.
    verdict : tuple of str
        Sentences that say what was found.
    notes : tuple of str
        Sentences that say what a reader must know.
    versions : dict of str to str
        Versions of the software.
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    command: str
    task: Task
    class_names: tuple[str, ...] | None
    protocol: str
    folds: tuple[str, ...]
    seeds: tuple[int, ...]
    averaged_over: tuple[str, ...]
    primary: str
    units: UnitKind
    n_units: int
    judged: tuple[Judged, ...]
    differences: tuple[Difference, ...]
    agreements: tuple[Agreement, ...]
    continuous: tuple[Continuous, ...]
    verdict: tuple[str, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Holds what statistics say of predictions, see the fields of `EvaluationReport`."""

    averaged_over: tuple[str, ...]
    primary: str
    units: UnitKind
    n_units: int
    judged: tuple[Judged, ...]
    differences: tuple[Difference, ...]
    agreements: tuple[Agreement, ...]


def judge(every: Sequence[Predictions], others: Sequence[Predictions] = (), *, seed: int = 0) -> Judgement:
    """Judge predictions of models about the same windows.

    Parameters
    ----------
    every : sequence of Predictions
        The model that the evaluation is about, first offline; then its other ways and other models.
    others : sequence of Predictions
        Models of earlier evaluations, which are compared and not judged again.
    seed : int
        Seed of permutations.
    """
    first = every[0]
    units = units_of(first)
    tallies = [Tally(each, units) for each in every]
    # The live path lacks windows at the edges of a recording that the offline way has: models are compared within a way.
    compared = [tally for tally in tallies[1:] if tally.predictions.way == first.way] + [Tally(each, units) for each in others]
    primary = tallies[0].primary
    shown = (primary, "auc") if first.class_names is not None else (primary,)
    return Judgement(
        averaged_over=("subject", "fold", "seed") if tallies[0].by_subject else ("fold", "seed"),
        primary=primary,
        units=units.kind,
        n_units=units.n,
        judged=tuple(_judged(tally, seed) for tally in tallies),
        differences=tuple(compare(tallies[0], other, name) for other in compared for name in shown),
        agreements=tuple(agreement(first, each, each.way, "offline") for each in every if each.model == first.model)[1:],
    )


def _judged(tally: Tally, seed: int) -> Judged:
    p = tally.predictions
    found = with_intervals(tally)
    matrix = None
    if p.class_names is not None:
        counts = figures.confusion(p.truth, p.decision, len(p.class_names))
        matrix = tuple(tuple(int(n) for n in row) for row in counts)
        accuracy = found["accuracy"]
        ends = [None if end is None else figures.wolpaw_bits(end, len(p.class_names)) for end in _ends(accuracy)]
        found["bits"] = Figure(value=ends[0], low=ends[1], high=ends[2])
    subjects = {}
    for name in np.unique(p.subject):
        own = Tally(p.picked(np.flatnonzero(p.subject == name)), tally.units)
        subjects[str(name)] = {key: _known(float(value[0])) for key, value in own.values().items()}
    return Judged(
        model=p.model,
        way=p.way,
        n_windows=len(np.unique(p.window)),
        n_rows=len(p),
        figures=found,
        chance=chance(tally, seed=seed),
        confusion=matrix,
        subjects=subjects,
    )


def _ends(figure: Figure) -> tuple[float | None, float | None, float | None]:
    return figure.value, figure.low, figure.high


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


DIFFERS = 0.1
"""Difference of two numbers of a regression, relative to their spread, from which on they are other decisions."""


def agreement(first: Predictions, other: Predictions, name: str, reference: str) -> Agreement:
    """Return how many decisions differ between two ways of one model. Windows that one way lacks are left out."""
    keys = [list(zip(each.window.tolist(), each.seed.tolist(), strict=True)) for each in (first, other)]
    places = {key: i for i, key in enumerate(keys[0])}
    pairs = np.array([(places[key], i) for i, key in enumerate(keys[1]) if key in places]).reshape(-1, 2)
    if first.class_names is None:
        spread = first.score.std() or 1.0
        other_decision = abs(first.score[pairs[:, 0]] - other.score[pairs[:, 1]]) > DIFFERS * spread
    else:
        other_decision = first.decision[pairs[:, 0]] != other.decision[pairs[:, 1]]
    differ = float(other_decision.mean()) if len(pairs) else 0.0
    return Agreement(model=first.model, name=name, reference=reference, differ=differ, n_windows=len(pairs))


def write_results(folder: Path, report: EvaluationReport) -> None:
    """Write ``results.json``."""
    write_atomically(folder / RESULTS_FILE, json_file(encode(report)))


def read_results(folder: Path) -> EvaluationReport:
    """Read ``results.json`` of a folder.

    Raises
    ------
    DataError
        If it is missing or damaged.
    """
    file = folder / RESULTS_FILE
    try:
        stored = load_json(file.read_bytes())
        if stored["schema_version"] > SCHEMA_VERSION:
            raise ValueError(f"schema version {stored['schema_version']}, and this release reads up to {SCHEMA_VERSION}")
        return decode(EvaluationReport, stored)
    except (OSError, ValueError, KeyError, TypeError, DecodeError) as e:
        raise DataError(f"{file} is missing or damaged ({e}).", "Name a folder that sjepa-evaluate wrote.") from e


def read_others(folder: Path, mine: Predictions, name: Callable[[str], str]) -> tuple[Predictions, ...]:
    """Return the model that an earlier evaluation was about, with predictions of the same way about the same windows.

    Parameters
    ----------
    folder : Path
        Folder of the evaluation.
    mine : Predictions
        The model to compare with.
    name : callable
        Returns the name that a model of that folder gets.

    Raises
    ------
    DataError
        If the folder holds no evaluation, or one of other windows, labels or classes.
    """
    report = read_results(folder)
    if report.class_names != mine.class_names:
        raise DataError(f"{folder} is an evaluation of other classes.", "Compare evaluations of the same data.")
    parts = [each for each in read_table(folder / PREDICTIONS_FILE, mine.class_names) if each.way == mine.way]
    parts = [each for each in parts if each.model == report.judged[0].model]
    found = []
    for part in parts:
        same = numbered_as(part, mine)
        if same is None:
            raise DataError(
                f"{folder} is an evaluation of other windows or labels.", "Compare evaluations of the same recordings and folds."
            )
        found.append(replace(same, model=name(part.model)))
    return tuple(found)
