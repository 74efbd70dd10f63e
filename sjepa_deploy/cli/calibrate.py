"""``sjepa-calibrate`` fits a bundle to one person with a few labelled trials."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.bundle import Bundle, check_writable
from sjepa_deploy.cli import console, entry, options, parity_table, print_json, task
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.cli.task import EventChoice
from sjepa_deploy.errors import MissingDependencyError, NoGainError, SpecError
from sjepa_deploy.runtime.decisions.data import CalibrationData, joined
from sjepa_deploy.runtime.decisions.description import classes_of
from sjepa_deploy.runtime.decisions.stored import layers_of
from sjepa_deploy.spec import ModelSpec

if TYPE_CHECKING:
    from sjepa_deploy.learning.calibrate import Calibration


@options.command
@options.bundle
@options.section(
    "Trials",
    click.option(
        "--data",
        "sources",
        type=options.path,
        multiple=True,
        required=True,
        help="Recording of the person with events (XDF, EDF, ...), or .npz of windows with labels; may be repeated.",
    ),
    click.option("--trials", type=click.IntRange(min=1), help="Number of trials to use, the first ones.  [default: all]"),
)
@options.fills("events", EventChoice, task.which, task.labels, task.tmin, title="Trials")
@options.fills(
    "config",
    dict,
    click.option(
        "--method",
        type=click.Choice(["closed-form", "fine-tune"]),
        default="closed-form",
        help="Fit the last layer alone, in milliseconds, or change all weights for some epochs.",
    ),
    click.option("--epochs", type=int, default=20, help="Epochs of --method fine-tune."),
    click.option("--lr", type=float, default=3e-4, help="Learning rate of --method fine-tune."),
    options.seed,
    title="Calibration",
)
@options.section(
    "Calibration",
    click.option("--align", is_flag=True, help="Align the person: fit the alignment of the signal to these trials."),
    click.option("--allow-worse", is_flag=True, help="Write the bundle even if it is no better than before."),
)
@options.section(options.SIGNAL, options.check_unit)
@options.signal_facts
@options.out_folder(None)
@options.force
@options.json_output
def calibrate(
    bundle: Path,
    *,
    sources: tuple[Path, ...],
    events: EventChoice,
    trials: int | None,
    align: bool,
    config: dict[str, Any],
    allow_worse: bool,
    check_unit: bool,
    facts: options.SignalFacts,
    out: Path,
    force: bool,
    json_output: bool,
) -> None:
    """Fit BUNDLE to one person, with labelled trials of that person, and write the result as a new bundle.

    The learning curve tells what more trials bring: each fifth of the trials, in stretches of time, is judged by models that
    were fitted on others. If the bundle gets no better, nothing is written, and the exit status is 1. The new bundle takes the
    same signal and gives the same outputs, so that a live decoder can swap it in; with --align the signal has another matrix.
    Parity is proven as by sjepa-export.
    """
    for package in ("torch", "onnx", "onnxscript", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "export")
    from sjepa_deploy.bundle import Provenance
    from sjepa_deploy.export.to_bundle import ExportParityError, to_bundle
    from sjepa_deploy.learning.calibrate import CalibrationConfig, aligned, before_alignment
    from sjepa_deploy.learning.calibrate import calibrate as run
    from sjepa_deploy.learning.origin import nameless, samples_hash
    from sjepa_deploy.models.checkpoint import load_model, read_checkpoint

    screen = console(json_output)
    asked = CalibrationConfig(**config)
    if align and any(source.suffix == ".npz" for source in sources):
        raise click.UsageError("--align is fitted to what enters the alignment, which windows of an .npz file have behind them.")
    check_writable(out, force=force)
    opened = Bundle.open(bundle)
    spec, manifest = opened.spec, opened.manifest
    if spec.variant == "base":
        raise SpecError("A base model outputs features and has no last layer to fit.", "Fine-tune it with sjepa-finetune first.")

    def read(spec: ModelSpec) -> CalibrationData:
        classes = None if spec.task == "regression" else classes_of(spec, None)
        parts = [
            task.read_trials(opened, source, spec, classes, _windows_of, events, facts, check_unit=check_unit)
            for source in sources
        ]
        found = joined(parts)
        return found.picked(_chosen(found, trials))

    with progress("reading the trials"):
        if align:
            before = spec.replace(signal=before_alignment(spec.signal))
            spec = spec.replace(signal=aligned(spec.signal, _shaped(read(before), before)))
        found = read(spec)
    checkpoint = read_checkpoint(opened.checkpoint)
    model = load_model(checkpoint, spec)
    recordings = (task.read_source(source, spec, facts) for source in sources if source.suffix != ".npz")
    learned = [samples_hash([raw.get_data()]) for raw in recordings]
    with progress("calibrating"):
        targets = found.labels if found.targets is None else found.targets
        eeg = _shaped(found, spec)
        calibrated, result = run(model, eeg, targets, asked)
    _print_curve(screen, result)
    if result.gain <= 0 and not allow_worse:
        raise NoGainError(
            f"The calibration makes the model no better: {result.metric.replace('_', ' ')} {result.gain:+.3f}.",
            "Give more trials, or try another --method; --allow-worse writes the bundle nevertheless.",
        )
    names = ", ".join(source.name for source in sources)
    note = f"calibrated ({result.method}{', aligned' if align else ''}) on {result.n_trials} trials of {names}"
    weights = manifest.weights
    first = manifest.graphs[0]
    try:
        with progress("exporting", total=2 + 2 * len(opened.precisions)) as steps:
            written = to_bundle(
                calibrated,
                out,
                weights=Provenance(
                    source=bundle.name,
                    format="calibrated bundle",
                    sha256=manifest.files["checkpoint/model.safetensors"],
                    notes=(*weights.notes, note),
                ),
                precisions=opened.precisions,
                opset=first.opset,
                max_batch=first.max_batch,
                static_batch=first.static_batch,
                parity_windows=eeg,
                check_unit=check_unit,
                seed=asked.seed,
                force=force,
                training=nameless(checkpoint.training, learned),
                progress=steps.begin,
            )
    except ExportParityError as e:
        screen.print(parity_table(e.results, "parity with the PyTorch model in float64"))
        raise
    screen.print(parity_table(written.manifest.parity, "parity with the PyTorch model in float64"))
    if layers := layers_of(opened):
        screen.print(
            f"The decision layers of {escape(bundle.name)} ({escape(', '.join(layers))}) were fitted to the model as it was: "
            "fit them anew with sjepa-decide.",
            soft_wrap=True,
        )
    screen.print(f"[bold]{escape(str(out))}[/]: {escape(note)}", soft_wrap=True)
    if json_output:
        print_json({"bundle": str(out), "calibration": result, "parity": written.manifest.parity})


def _windows_of(eeg: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the windows themselves as rows, where a model would give outputs."""
    return eeg.reshape(len(eeg), -1)


def _shaped(found: CalibrationData, spec: ModelSpec) -> np.ndarray[Any, Any]:
    """Return the windows, shape (n_trials, n_chans, n_times), that `_windows_of` made rows of."""
    if found.outputs.shape[1:] != (spec.n_chans * spec.n_times,):
        raise SpecError(
            f"The trials hold {found.outputs.shape[1]} values each, not {spec.n_chans} channels x {spec.n_times} samples.",
            "Give recordings, or windows as eeg in the .npz file.",
        )
    return found.outputs.reshape(-1, *spec.input_shape).astype(np.float32)


def _chosen(found: CalibrationData, trials: int | None) -> np.ndarray[Any, Any]:
    """Return a mask of the first trials with a label."""
    kept = found.labels >= 0
    return kept if trials is None else kept & (np.cumsum(kept) <= trials)


def _print_curve(screen: Console, result: Calibration) -> None:
    table = Table(title=f"trials that were not fitted on, {result.method}", title_justify="left")
    table.add_column("fitted on", justify="right")
    for name in result.curve[0].scores:
        table.add_column(name.replace("_", " "), justify="right")
        table.add_column("95 % interval")
    for point in result.curve:
        cells = [
            cell for score in point.scores.values() for cell in (f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}")
        ]
        table.add_row("as it was" if not point.n_trials else f"{point.n_trials} trials", *cells)
    screen.print(table)


main = entry("calibrate")
