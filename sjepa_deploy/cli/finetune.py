"""``sjepa-finetune``: a decoder from labelled EEG and a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.cli import console, entry, print_json
from sjepa_deploy.cli.training import changes_of, is_first_process, print_transfer, require_training, shape_of, training_options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--variant", type=click.Choice(["prelocal", "postlocal", "contextual"]), help="What to train.")
@click.option("--pretrained", help="Checkpoint of the base model. Without one, training starts from scratch.")
@click.option("--freeze-encoder", is_flag=True, help="Train the spatial filters and the last layer only.")
@click.option("--transfer-encoder", is_flag=True, help="Take the feature encoder into PreLocal too.")
@click.option("--accept-sfreq", is_flag=True, help="Take a base model of another sampling rate.")
@click.option("--spatial-filters", type=int, help="Spatial filters.")
@click.option("--warmup-epochs", type=int, help="Epochs in which only the new layers learn.")
@click.option("--task", type=click.Choice(["regression", "classification"]), help="Whether the target is a number or a class.")
@click.option(
    "--stimulus",
    multiple=True,
    help="Event that a reaction time starts at, or trial_type of the rows of --column; may be repeated.",
)
@click.option("--response", multiple=True, help="Event that a reaction time ends at; may be repeated.")
@click.option("--column", help="Column of a TSV, of participants.tsv or of Epochs' metadata that holds the target.")
@training_options
def finetune(
    config_file: Path | None,
    out: Path,
    resume: bool,
    json_output: bool,
    *,
    variant: str | None,
    pretrained: str | None,
    freeze_encoder: bool,
    transfer_encoder: bool,
    accept_sfreq: bool,
    spatial_filters: int | None,
    warmup_epochs: int | None,
    task: str | None,
    stimulus: tuple[str, ...],
    response: tuple[str, ...],
    column: str | None,
    **flags: Any,
) -> None:
    """Fine-tune a variant, by default on synthetic reaction times, and write its checkpoint into --out."""
    require_training()
    from sjepa_deploy.learning.data import Target
    from sjepa_deploy.learning.finetune import FinetuneConfig
    from sjepa_deploy.learning.finetune import finetune as run
    from sjepa_deploy.learning.loop import overridden, read_config

    config = read_config(FinetuneConfig, config_file)
    target = {
        "task": task,
        "stimulus": stimulus or None,
        "response": response or None,
        "column": column,
        "kind": "column" if column else None,
    }
    changes = {
        "variant": variant,
        "pretrained": pretrained,
        "freeze_encoder": freeze_encoder or None,
        "encoder_to_prelocal": transfer_encoder or None,
        "accept_sfreq": accept_sfreq or None,
        "n_spat_filters": spatial_filters,
        "warmup_epochs": warmup_epochs,
        "data.target": overridden(config.data.target or Target(), target),
    }
    config = overridden(config, changes | changes_of(flags))
    screen = console(json_output)
    result = run(config, out, resume=resume, progress=screen.is_terminal and not json_output)
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
