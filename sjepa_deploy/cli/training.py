"""What ``sjepa-pretrain`` and ``sjepa-finetune`` share: flags that override the configuration, and reports."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from sjepa_deploy.errors import MissingDependencyError
from sjepa_deploy.spec import ModelSpec

F = TypeVar("F", bound=Callable[..., Any])

DATA_FLAGS = ("montage", "sfreq", "n_times", "split", "fold", "n_folds")
ENGINE_FLAGS = (
    "seed",
    "max_epochs",
    "patience",
    "batch_size",
    "lr",
    "precision",
    "accelerator",
    "devices",
    "num_nodes",
    "num_workers",
)


def training_options(command: F) -> F:
    """Add the flags of every training command. Those that are not given leave the configuration as it is."""
    options = [
        click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML; sjepa_deploy/configs has examples."),
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint."),
        click.option("--data", "sources", multiple=True, help="Recording, *-epo.fif, .npz or BIDS folder; may be repeated."),
        click.option("--montage", help="Names and positions of the channels: a montage of MNE, or a file."),
        click.option("--interpolate", is_flag=True, help="Make the channels that a recording lacks from the others."),
        click.option("--sfreq", type=float, help="Sampling rate in Hz to learn at."),
        click.option("--n-times", type=int, help="Samples of a window."),
        click.option("--split", type=click.Choice(["auto", "subject", "session", "block"]), help="What parts do not share."),
        click.option("--n-folds", type=int, help="Folds that subjects, sessions or blocks are dealt to."),
        click.option("--fold", type=int, help="The fold to test on."),
        click.option("--seed", type=int, help="Seed of everything random."),
        click.option("--max-epochs", type=int, help="Epochs at most."),
        click.option("--patience", type=int, help="Epochs without improvement after which training ends."),
        click.option("--batch-size", type=int, help="Windows of a step on each device."),
        click.option("--lr", type=float, help="Learning rate."),
        click.option("--precision", type=click.Choice(["32-true", "bf16-mixed", "16-mixed"]), help="Arithmetic."),
        click.option("--accelerator", type=click.Choice(["auto", "cpu", "gpu"]), help="Where to train."),
        click.option("--devices", type=int, help="Devices of a host; start that many processes with torchrun."),
        click.option("--num-nodes", type=int, help="Hosts."),
        click.option("--num-workers", type=int, help="Processes that fetch windows."),
        click.option("--compile", "compile_step", is_flag=True, help="Compile the training step with torch.compile."),
        click.option("--resume", is_flag=True, help="Go on with the run in --out."),
        click.option("--json", "json_output", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def changes_of(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags as changes of a configuration."""
    changes = {f"data.{name}": flags[name] for name in DATA_FLAGS} | {f"engine.{name}": flags[name] for name in ENGINE_FLAGS}
    switches = {"data.interpolate": flags["interpolate"] or None, "engine.compile": flags["compile_step"] or None}
    return changes | switches | {"data.source": flags["sources"] or None}


def require_training() -> None:
    """Refuse to start without what training needs.

    Raises
    ------
    MissingDependencyError
        If a package is not installed.
    """
    for package in ("torch", "safetensors", "lightning", "yaml"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "train")


def is_first_process() -> bool:
    """Return whether this process reports, of those that torchrun, or Lightning without it, started."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def shape_of(spec: ModelSpec) -> str:
    """Return what a model sees of the EEG, for people."""
    return f"{spec.n_chans} channels x {spec.n_times} samples at {spec.sfreq:g} Hz"


def print_transfer(screen: Console, report: Any) -> None:
    """Print a `TransferReport`."""
    table = Table(title=f"{report.variant} from {report.source}", show_header=False, title_justify="left")
    table.add_row("taken", _parts(report.taken))
    table.add_row("new", _parts(report.new))
    table.add_row("left", _parts(report.left))
    for skipped in report.skipped:
        table.add_row("skipped", f"{skipped.name}: {skipped.reason}")
    if report.channels_taken or report.channels_new:
        table.add_row("channels", f"{len(report.channels_taken)} taken by name, {len(report.channels_new)} from coordinates")
    for note in report.notes:
        table.add_row("note", note)
    screen.print(table)


def _parts(names: tuple[str, ...]) -> str:
    """Return the parts that weights belong to, with their numbers."""
    counts: dict[str, int] = {}
    for name in names:
        depth = 2 if name.startswith(("transformer", "final_layer")) else 1
        part = ".".join(name.split(".")[:depth])
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" for part, count in counts.items()) or "nothing"
