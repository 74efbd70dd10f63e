"""``sjepa-evaluate`` says what a recipe, or a bundle, is worth: figures with intervals, chance, baselines, the live path."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import command_line, console, entry, options, print_json
from sjepa_deploy.cli.finetune import model_options, recipe_of, target_options
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.cli.task import EventChoice, which
from sjepa_deploy.cli.training import changes_from, recipe_options
from sjepa_deploy.eeg.names import parse_rename
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.runtime.backend import DEFAULT_BACKEND
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.stored import layers_of
from sjepa_deploy.runtime.live.open_source import SourceOptions
from sjepa_deploy.runtime.predictor import load
from sjepa_deploy.spec import RunPrecision

if TYPE_CHECKING:
    from sjepa_deploy.evaluation.results import EvaluationReport

PROTOCOLS = ("within", "cross-session", "cross-subject", "loso")
BASELINES = ("csp-lda", "xdawn-ts")


class Folds(click.ParamType["tuple[int, ...] | None"]):
    """Parses ``all``, or numbers of folds separated by commas."""

    name = "folds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...] | None:
        """Return the numbers, or None for all."""
        if value is None or isinstance(value, tuple) or value == "all":
            return value if isinstance(value, tuple) else None
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is neither all nor numbers of folds, as in 0,2.", param, ctx)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Holds the options of an evaluation that trains."""

    protocol: Literal["within", "cross-session", "cross-subject", "loso"]
    folds: tuple[int, ...] | None
    n_seeds: int
    baselines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OfBundle:
    """Holds the options of an evaluation of a bundle."""

    events: tuple[str, ...]
    hop: float | None
    decisions: str | None
    backends: tuple[str, ...]
    precisions: tuple[RunPrecision, ...]


@options.recipe_command
@click.argument("bundle", type=options.path, required=False)
@click.argument("recordings", type=options.path, nargs=-1)
@options.fills(
    "trained",
    Trained,
    click.option(
        "--protocol",
        type=click.Choice(PROTOCOLS),
        default="cross-subject",
        help="What is tested apart: recordings within each subject, sessions of each, groups of subjects, each subject.",
    ),
    click.option("--folds", type=Folds(), metavar="all|N,...", help="Folds to train and test.  [default: all]"),
    click.option("--seeds", "n_seeds", type=click.IntRange(min=1), default=1, help="Trainings of each fold, each with its seed."),
    options.several("--baseline", "baselines", choices=BASELINES, help="Decoders to fit on the same windows and folds."),
    title="Evaluation",
)
@options.fills(
    "of_bundle",
    OfBundle,
    which,
    click.option("--hop", type=float, help="Seconds between windows of a stream that is decoded as well."),
    options.decisions("the only one"),
    options.backends,
    options.rare(options.precisions),
    title="Of a bundle",
)
@options.section(
    "Evaluation",
    options.several("--against", help="Folder of an evaluation to compare with, or scratch: the recipe without its base model."),
    click.option("--live/--no-live", default=True, help="Whether recordings are decoded through the live path too."),
    options.rare(click.option("--name", help="Name of the model in tables.  [default: the variant, or the bundle's folder]")),
)
@model_options
@target_options
@options.added(*recipe_options)
@changes_from(brief=True)
@options.json_output
def evaluate(
    bundle: Path | None,
    recordings: tuple[Path, ...],
    *,
    trained: Trained,
    of_bundle: OfBundle,
    against: tuple[str, ...],
    live: bool,
    name: str | None,
    config_file: Path | None,
    out: Path,
    force: bool,
    resume: bool,
    changes: dict[str, Any],
    model: dict[str, Any],
    target: dict[str, Any],
    json_output: bool,
) -> None:
    """Evaluate a recipe on all its folds, or BUNDLE on RECORDINGS with events, and write a report into --out.

    Without BUNDLE each fold is trained with each seed, and tested on what it has not seen; --resume goes on with what is there.
    Options of training are those of sjepa-finetune. --out gets report.html, results.json and predictions.tsv.
    """
    screen = console(json_output)
    command = command_line("sjepa-evaluate")
    if bundle is None:
        report = _recipe(config_file, out, changes, model, target, trained, against, live, name, command, force, resume)
    else:
        report = _bundle(bundle, recordings, out, changes, target, of_bundle, against, live, name, command, force)
    _print(screen, report, out)
    if json_output:
        print_json({"out": str(out), "report": report})


def _recipe(
    config_file: Path | None,
    out: Path,
    changes: dict[str, Any],
    model: dict[str, Any],
    target: dict[str, Any],
    trained: Trained,
    against: tuple[str, ...],
    live: bool,
    name: str | None,
    command: str,
    force: bool,
    resume: bool,
) -> EvaluationReport:
    config = recipe_of(config_file, model, target, changes)
    from sjepa_deploy.evaluation.evaluate import Plan
    from sjepa_deploy.evaluation.evaluate import evaluate as run
    from sjepa_deploy.evaluation.folder import open_folder
    from sjepa_deploy.evaluation.train import Step

    plan = Plan(against=against, live=live, name=name, **vars(trained))
    open_folder(out, resume=resume, force=force)
    with progress("reading the data") as steps:

        def tell(what: str | Step) -> None:
            if isinstance(what, str):
                steps.at(what)
            else:
                steps.at(str(what), done=what.number - 1, total=what.total)

        return run(config, plan, out, command=command, tell=tell)


def _bundle(
    path: Path,
    recordings: tuple[Path, ...],
    out: Path,
    changes: dict[str, Any],
    target: dict[str, Any],
    of_bundle: OfBundle,
    against: tuple[str, ...],
    live: bool,
    name: str | None,
    command: str,
    force: bool,
) -> EvaluationReport:
    from sjepa_deploy.evaluation.bundles import How, LabelledRecording, classes_of, evaluate_bundle
    from sjepa_deploy.evaluation.folder import open_folder
    from sjepa_deploy.learning.loading import source_names

    if not recordings:
        raise click.UsageError("Name recordings with events behind the bundle.")
    classes = tuple(text if "=" in text else f"{text}={text}" for text in target["classes"] or ())
    choice = EventChoice(events=of_bundle.events, tmin=target["tmin"], classes=classes, column=target["column"])
    opened = Bundle.open(path)
    start = choice.start(opened.spec)
    layer = None
    if of_bundle.decisions is not None or of_bundle.hop is not None or len(layers_of(opened)) == 1:
        layer = DecisionLayer.load(opened, of_bundle.decisions)
    rename = changes["data.rename"] or ()
    how = How(
        name=name or path.name,
        start=start,
        live=live,
        hop=of_bundle.hop,
        interpolate=changes["data.interpolate_share"] or 0.0,
        check_unit=changes["data.check_unit"] is not False,
        source=SourceOptions(unit=changes["data.unit"], rename=rename),
    )
    open_folder(out, resume=False, force=force)
    with contextlib.ExitStack() as stack:
        precisions: tuple[RunPrecision | None, ...] = of_bundle.precisions or (None,)
        pairs = itertools.product(of_bundle.backends or (DEFAULT_BACKEND,), precisions)
        opener = [stack.enter_context(load(opened, backend=b, precision=p, check_unit=False)) for b, p in pairs]
        first, rest = opener[0], opener[1:]

        def read(file: Path, called: str) -> LabelledRecording:
            raw = read_recording(
                file,
                unit=changes["data.unit"],
                row_names=opened.spec.ch_names,
                rename=parse_rename(rename, RecordingError),
            )
            return LabelledRecording(path=file, name=called, raw=raw, events=choice.label(raw, opened.spec, classes_of(first)))

        names = source_names([str(file) for file in recordings])
        steps = stack.enter_context(progress("decoding", total=len(recordings)))
        return evaluate_bundle(
            first,
            (read(file, called) for file, called in zip(recordings, names, strict=True)),
            out,
            how,
            layer=layer,
            backends={f"{other.backend.name} {other.backend.precision}": other for other in rest},
            against=against,
            command=command,
            tell=steps.begin,
        )


def _print(screen: Console, report: EvaluationReport, out: Path) -> None:
    """Print the figures of each model, and the verdict."""
    from sjepa_deploy.evaluation.figures import NAMES
    from sjepa_deploy.evaluation.verdict import with_interval

    shown = [each for each in ("balanced_accuracy", "auc", "kappa", "ece", "undecided", "r2", "r") if each in _figures(report)]
    table = Table(title=f"{report.judged[0].n_windows} windows, 95 % over {report.n_units} {report.units}", title_justify="left")
    for heading in ("model", "way", *(NAMES[each] for each in shown)):
        table.add_column(heading)
    for judged in report.judged:
        found = [with_interval(judged.figures[each]) if each in judged.figures else "" for each in shown]
        table.add_row(escape(judged.model), judged.way, *found)
    screen.print(table)
    for stream in report.continuous:
        for key, figure in stream.figures.items():
            screen.print(f"every {stream.hop:g} s: {key.replace('_', ' ')} {with_interval(figure)}")
    for each in report.agreements:
        screen.print(f"{each.name} decides otherwise than {each.reference} about {each.differ:.2%} of {each.n_windows} windows")
    screen.print(f"written: {escape(str(out))}", soft_wrap=True)
    for sentence in (*report.notes, *report.verdict):
        screen.print(escape(sentence), soft_wrap=True)


def _figures(report: EvaluationReport) -> Mapping[str, Any]:
    return report.judged[0].figures


main = entry("evaluate")
