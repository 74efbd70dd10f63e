"""``sjepa-finetune`` learns a decoder from labelled EEG and a base model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.cli import console, entry, options, print_json
from sjepa_deploy.cli.training import print_transfer, require_training, shape_of, telling, training_options
from sjepa_deploy.serialize import overridden


def _target(classes: tuple[str, ...], column: str | None, task: str | None, **values: Any) -> dict[str, Any]:
    """Return the flags as changes of the target."""
    kind = "column" if column else "event" if classes else None
    task = "classification" if classes and task is None else task
    return {name: value or None for name, value in values.items() if name not in ("tmin", "tmax")} | {
        "kind": kind,
        "task": task,
        "classes": classes or None,
        "column": column,
        "tmin": values["tmin"],
        "tmax": values["tmax"],
    }


def _with_target(config: Any, target: dict[str, Any], n_times: int | None) -> Any:
    """Return a `FinetuneConfig` with the flags of the target. ``--tmax`` settles the number of samples."""
    from sjepa_deploy.learning.data import Target

    tmax = target.pop("tmax")
    learned = replace(config.data.target or Target(), **{name: value for name, value in target.items() if value is not None})
    changes: dict[str, Any] = {"data.target": learned}
    if tmax is not None:
        changes["data.n_times"] = round((tmax - learned.tmin) * config.data.sfreq)
        if n_times not in (None, changes["data.n_times"]):
            raise click.UsageError(
                f"--tmin {learned.tmin:g} and --tmax {tmax:g} are {changes['data.n_times']} samples, not {n_times}."
            )
    return overridden(config, changes)


def recipe_of(config_file: Path | None, model: dict[str, Any], target: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Return the `FinetuneConfig` of a file with the options of the command line.

    Raises
    ------
    MissingDependencyError
        If a package that training needs is not installed.
    TrainingError
        If the file is missing or wrong.
    """
    require_training()
    from sjepa_deploy.learning.finetune import FinetuneConfig
    from sjepa_deploy.learning.loop import read_config

    if model["start"] is not None:
        said = {"variant": model["variant"], "spatial-filters": model["n_spat_filters"], "tmin": target["tmin"]}
        said |= {name.replace("_", "-"): changes[f"data.{name}"] for name in ("sfreq", "n_times", "phase")}
        if given := [f"--{name}" for name, value in said.items() if value is not None]:
            raise click.UsageError(f"{given[0]} is the model's that --from names. Leave it out.")
    config = read_config(FinetuneConfig, config_file)
    if config_file is None:
        config = replace(config, class_weights="balanced")
    return _with_target(overridden(config, model | changes), target, changes["data.n_times"])


def _model(
    *,
    freeze_encoder: bool,
    transfer_encoder: bool,
    accept_sfreq: bool,
    allow_overlap: bool,
    allow_left_out: tuple[str, ...],
    spatial_filters: int | None,
    **values: Any,
) -> dict[str, Any]:
    """Return the flags as changes of the configuration."""
    return {
        "freeze_encoder": freeze_encoder or None,
        "encoder_to_prelocal": transfer_encoder or None,
        "accept_sfreq": accept_sfreq or None,
        "allow_overlap": allow_overlap or None,
        "allow_left_out": allow_left_out or None,
        "n_spat_filters": spatial_filters,
        **values,
    }


model_options = options.fills(
    "model",
    _model,
    click.option("--variant", type=click.Choice(["prelocal", "postlocal", "contextual"]), help="Model to train."),
    click.option(
        "--pretrained",
        help="Base model: checkpoint, or org/name[@revision] of the Hub. Else from scratch.",
    ),
    click.option("--from", "start", help="Fine-tuned model to start from, in place of a base model: a person's calibration."),
    click.option("--freeze-encoder", is_flag=True, help="Train the spatial filters and the last layer only."),
    options.rare(click.option("--transfer-encoder", is_flag=True, help="Take the feature encoder into PreLocal too.")),
    options.rare(click.option("--accept-sfreq", is_flag=True, help="Take a base model of another sampling rate.")),
    options.rare(
        click.option("--allow-overlap", is_flag=True, help="Take a base model that has seen subjects of the test part.")
    ),
    click.option(
        "--class-weights",
        type=click.Choice(["balanced", "none"]),
        help="Whether rare classes count as much as frequent ones in the loss.  [default: balanced without --config]",
    ),
    options.rare(options.allow_left_out),
    options.spatial_filters,
    options.rare(click.option("--warmup-epochs", type=int, help="Epochs in which only the new layers learn.")),
    title="Model",
)
"""Adds the options of the model and its transfer; the command gets changes of the configuration as ``model``."""

target_options = options.fills(
    "target",
    _target,
    options.several(
        "--classes",
        help="CLASS=EVENT of each class to tell apart, as in LEFT=T1,RIGHT=T2, or EVENT alone.",
    ),
    options.tmin,
    click.option("--tmax", type=float, help="End of a window in seconds after its event, in place of --n-times."),
    click.option(
        "--task", type=click.Choice(["regression", "classification"]), help="Whether the target is a number or a class."
    ),
    options.rare(
        click.option(
            "--stimulus",
            multiple=True,
            help="Event that a reaction time starts at, or trial_type of the rows of --column; may be repeated.",
        )
    ),
    options.rare(click.option("--response", multiple=True, help="Event that a reaction time ends at; may be repeated.")),
    click.option("--column", help="Column of a TSV, of participants.tsv or of Epochs' metadata that holds the target."),
    title="Target",
)
"""Adds the options of what is learned; the command gets changes of the target as ``target``."""


@options.recipe_command
@model_options
@target_options
@training_options
def finetune(
    config_file: Path | None,
    *,
    out: Path,
    force: bool,
    resume: bool,
    changes: dict[str, Any],
    model: dict[str, Any],
    target: dict[str, Any],
    json_output: bool,
) -> None:
    """Fine-tune a variant, by default on synthetic reaction times, and write its checkpoint into --out."""
    config = recipe_of(config_file, model, target, changes)
    from sjepa_deploy.learning.finetune import finetune as run
    from sjepa_deploy.learning.loop import is_first_process

    screen = console(json_output)
    result = run(config, out, resume=resume, replace=force, **telling(screen))
    if not is_first_process():
        return
    if result.transfer is not None:
        print_transfer(screen, result.transfer)
    table = Table(title=f"{result.n_test} test windows of other {result.split}s", title_justify="left")
    for heading in ("score", "model", "95 % interval", "predicting the mean" if "r2" in result.test else "class frequencies"):
        table.add_column(heading)
    for name, score in result.test.items():
        table.add_row(name, f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}", f"{result.baseline[name].value:.3f}")
    screen.print(table)
    fitted = result.fitted
    screen.print(
        f"{result.spec.variant}, {shape_of(result.spec)}, of epoch {fitted.best_epoch + 1} of {fitted.epochs} in "
        f"[bold]{escape(str(out))}[/]"
    )
    if json_output:
        print_json({"out": str(out), "result": result})


main = entry("finetune")
