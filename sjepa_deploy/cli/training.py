"""Holds what ``sjepa-pretrain`` and ``sjepa-finetune`` share: options that override the recipe, and reports."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.cli import options
from sjepa_deploy.cli.help_page import GENERAL, Option, is_quiet
from sjepa_deploy.errors import MissingDependencyError
from sjepa_deploy.spec import ModelSpec, Unit

DATA_FLAGS = ("montage", "sfreq", "n_times", "phase", "split", "fold", "n_folds", "split_seed", "memory")
BIDS_FLAGS = ("subjects", "sessions", "tasks", "runs")
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


def changes_of(
    *,
    sources: tuple[str, ...],
    interpolate: float | None,
    rename: tuple[str, ...] | None,
    unit: Unit | None,
    check_unit: bool,
    compile_step: bool,
    **flags: Any,
) -> dict[str, Any]:
    """Return the flags as changes of a configuration. A flag that is not given is None and changes nothing."""
    changes = {f"data.{name}": flags.get(name) for name in DATA_FLAGS}
    changes |= {f"engine.{name}": flags.get(name) for name in ENGINE_FLAGS}
    given: dict[str, Any] = {
        "source": sources or None,
        "rename": rename or None,
        "unit": unit,
        "check_unit": None if check_unit else False,
    }
    given |= {"interpolate": bool(interpolate) or None, "interpolate_share": interpolate or None}
    given |= {name: flags[name] or None for name in BIDS_FLAGS}
    return changes | {"engine.compile": compile_step or None} | {f"data.{name}": value for name, value in given.items()}


recipe_file = options.section(
    GENERAL,
    click.option(
        "-c",
        "--config",
        "config_file",
        type=options.path,
        metavar="FILE",
        help="YAML file of the recipe, or the name of one in sjepa_deploy/configs; the command line wins.",
    ),
)

recipe_options = (
    recipe_file,
    options.out_folder(None),
    options.force,
    options.section(options.OUTPUT, click.option("--resume", is_flag=True, help="Go on with the run in --out.")),
)
"""Options of every command that trains: the recipe, and what becomes of the folder of --out."""

data_options: tuple[Option, ...] = (
    click.option("--data", "sources", multiple=True, help="Recording, *-epo.fif, .npz or BIDS folder; may be repeated."),
    options.rare(options.several("--subjects", help="Subjects of BIDS folders to take.")),
    options.rare(options.several("--sessions", help="Sessions of BIDS folders to take.")),
    options.rare(options.several("--tasks", help="Tasks of BIDS folders to take.")),
    options.rare(options.several("--runs", help="Runs of BIDS folders to take.")),
    options.montage,
    options.interpolate,
    options.rename,
    options.unit,
    options.check_unit,
    options.model_sfreq,
    options.n_times,
    click.option(
        "--phase",
        type=click.Choice(["causal", "zero-phase"]),
        help="Form of the filters. Live decoding is causal: learn from causal windows to decode live.",
    ),
    options.rare(click.option("--n-folds", type=int, help="Number of folds that subjects, sessions or blocks are dealt to.")),
    options.rare(click.option("--split-seed", type=int, help="Seed by which subjects or sessions are dealt to folds.")),
    options.rare(
        click.option("--memory", type=float, help="Largest size in GiB of windows in memory; more are kept in a mapped file.")
    ),
)
split_options: tuple[Option, ...] = (
    click.option(
        "--split",
        type=click.Choice(["auto", "subject", "session", "recording", "block"]),
        help="What the training, validation and test parts do not share.",
    ),
    options.rare(click.option("--fold", type=int, help="Number of the fold to test on.")),
)
engine_options: tuple[Option, ...] = (
    options.rare(click.option("--seed", type=int, help="Seed of everything random but the folds.")),
    click.option("--max-epochs", type=int, help="Largest number of epochs."),
    options.rare(click.option("--patience", type=int, help="Epochs without improvement after which training ends.")),
    click.option("--batch-size", type=int, help="Windows of a step on each device."),
    click.option("--lr", type=float, help="Learning rate."),
    click.option("--accelerator", type=click.Choice(["auto", "cpu", "gpu"]), help="Kind of device to train on."),
    options.rare(click.option("--num-workers", type=int, help="Processes that fetch windows.")),
    options.rare(click.option("--compile", "compile_step", is_flag=True, help="Compile the training step with torch.compile.")),
)
devices_options: tuple[Option, ...] = (
    options.rare(
        click.option(
            "--precision",
            type=click.Choice(["32-true", "bf16-mixed", "16-mixed"]),
            help="Arithmetic of the training, as Lightning calls it.",
        )
    ),
    options.rare(
        click.option("--devices", type=int, help="Number of devices of a host; start that many processes with torchrun.")
    ),
    options.rare(click.option("--num-nodes", type=int, help="Number of hosts.")),
)


def changes_from(*, data: tuple[Option, ...] = (), engine: tuple[Option, ...] = (), brief: bool = False) -> Option:
    """Return the options that override a recipe, and more of the data and of the loop. The command gets them as ``changes``.

    With `brief` the help page names them alone, but for --data.
    """
    source, *others = (*data_options, *data)
    loop: tuple[Option, ...] = (*engine_options, *engine)
    if brief:
        others, loop = [options.rare(*others)], (options.rare(*loop),)
    return options.fills("changes", changes_of, options.section("Data", source, *others), *loop, title="Training")


training_options = options.added(*recipe_options, changes_from(data=split_options, engine=devices_options), options.json_output)
"""Adds the options of every training command. An option that is not given leaves the configuration as it is."""


def require_training() -> None:
    """Refuse to start without the packages that training needs.

    Raises
    ------
    MissingDependencyError
        If a package is not installed.
    """
    for package in ("torch", "safetensors", "lightning", "yaml"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "train")


def shape_of(spec: ModelSpec) -> str:
    """Return the shape of a model's windows as text."""
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


def telling(screen: Console) -> dict[str, Any]:
    """Return how a training reports on `screen`: in the first process, with a bar on a terminal, else a line for each epoch."""
    from sjepa_deploy.learning.loop import is_first_process

    if not is_first_process():
        return {}
    bar = screen.is_terminal and not screen.stderr and not is_quiet()  # Lightning's bar writes to stdout
    line = {} if bar or is_quiet() else {"tell_epoch": lambda epoch: screen.print(str(epoch), soft_wrap=True)}
    return {"progress": bar, "tell": functools.partial(print_data, screen), **line}


def print_data(screen: Console, report: Any) -> None:
    """Print a `DataReport`."""
    classes = list(report.parts["train"].classes)
    table = Table(title=f"windows, split by {report.split}", title_justify="left")
    for heading in ("part", "windows", "subjects", "recordings", *map(escape, classes)):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, part in report.parts.items():
        counts = (part.n_windows, part.n_subjects, part.n_recordings, *(part.classes[each] for each in classes))
        table.add_row(name, *map(str, counts))
    if report.class_weights:
        table.add_row("weight in the loss", "", "", "", *(f"{report.class_weights[each]:.3g}" for each in classes))
    screen.print(table)
    if report.n_gap:
        screen.print(f"{report.n_gap} windows lie in the gaps between parts")
    if report.n_unused:
        screen.print(
            f"Each epoch leaves out {report.n_unused} training windows that fill no batch: other ones each time, so that all are "
            "used over the epochs."
        )
    if report.skipped:
        screen.print(f"recordings that give no window, and are left out: {len(report.skipped)}")
        for told in report.skipped:
            screen.print(f"  {escape(told)}")


def _parts(names: tuple[str, ...]) -> str:
    """Return the parts of a model that weights belong to, and how many weights each has."""
    counts: dict[str, int] = {}
    for name in names:
        depth = 2 if name.startswith(("transformer", "final_layer")) else 1
        part = ".".join(name.split(".")[:depth])
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" for part, count in counts.items()) or "nothing"
