"""Defines the options that commands share: each has one name, one type, one default and one help text.

`fills` collects options into one dataclass, so that a command takes a few arguments. `command` gives every command ``--help``,
``--version``, ``--verbose``, ``--quiet`` and ``--config``. `check_file` and `check_files` hold the rule of ``--out``.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import completion, help_page
from sjepa_deploy.cli.help_page import Function, Option
from sjepa_deploy.cli.help_page import added as added
from sjepa_deploy.cli.help_page import rare as rare
from sjepa_deploy.cli.help_page import section as section
from sjepa_deploy.eeg.interpolation import INTERPOLATED_SHARE
from sjepa_deploy.errors import OutputError, listed
from sjepa_deploy.runtime.backend import DEFAULT_BACKEND, BackendOptions
from sjepa_deploy.runtime.predictor import Predictor, load
from sjepa_deploy.spec import RUN_PRECISIONS, UNITS_IN_VOLTS, RunPrecision, Unit

STDOUT = Path("-")
"""Path by which ``--out`` names standard output."""


class Names(click.ParamType[tuple[str, ...]]):
    """Parses names separated by commas; a configuration file may give a list. With `choices`, other names are refused."""

    name = "names"

    def __init__(self, choices: Sequence[str] = ()) -> None:
        self.choices = tuple(choices)

    def convert(self, value: str | Sequence[str], param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names as a tuple."""
        parts = value.split(",") if isinstance(value, str) else value
        names = tuple(str(part).strip() for part in parts) if value else ()
        if "" in names:
            self.fail(f"{value!r} has an empty name. Separate names by one comma.", param, ctx)
        if self.choices and (unknown := [name for name in names if name not in self.choices]):
            self.fail(f"{unknown[0]!r} is not one of {', '.join(map(repr, self.choices))}.", param, ctx)
        return names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the choices that complete the last name."""
        return completion.after_commas(incomplete, self.choices)


class Share(click.ParamType[float]):
    """A share from 0 to 1; in a configuration file also true, which is `INTERPOLATED_SHARE`, and false."""

    name = "share"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share."""
        if isinstance(value, bool):
            return INTERPOLATED_SHARE if value else 0.0
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"{value!r} is no share from 0 to 1. Put the option behind the arguments, or give its share.", param, ctx)
        return share


def several(*spellings: str, choices: Sequence[str] = (), default: Sequence[str] = (), help: str, **more: Any) -> Option:
    """Return an option that takes names separated by commas, and that may be repeated. The command gets them as one tuple."""

    def joined(ctx: click.Context, param: click.Parameter, values: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(itertools.chain.from_iterable(values)))

    metavar = f"[{'|'.join(choices)}],..." if choices else "A,B,..."
    kind = Names(choices)
    return click.option(
        *spellings, type=kind, multiple=True, default=default, metavar=metavar, callback=joined, help=help, **more
    )


def out_folder(default: str | None) -> Option:
    """Return ``--out`` of a command that writes a folder. Without a `default` the user must give the folder."""
    if default is None:
        return section(OUTPUT, click.option("-o", "--out", type=path, required=True, help="Folder to write."))
    return section(OUTPUT, click.option("-o", "--out", type=path, help=f"Folder to write.  [default: {default}]"))


def command(function: Function) -> click.Command:
    """Return `function` as a command with ``--config`` and the options of every command."""
    return recipe_command(config(function))


def recipe_command(function: Function) -> click.Command:
    """Return `function`, which has a ``--config`` of its own, as a command with the options of every command."""
    settings = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": help_page.WIDTH}
    return click.command(cls=help_page.Command, context_settings=settings)(help_page.general(function))


def fills(name: str, make: Callable[..., object], *options: Option, title: str | None = None) -> Option:
    """Return a decorator that adds `options` to a command and collects their values.

    Parameters
    ----------
    name : str
        Argument of the command that gets what `make` returns.
    make : callable
        A dataclass, or a function, that takes the options by their names.
    *options : decorator
        Options in the order of the help page.
    title : str or None
        Heading above the options on the help page. None leaves them to whoever takes the result.
    """
    names = [parameter.name for parameter in help_page.parameters(*options)]

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def collected(*args: Any, **values: Any) -> Any:
            own = {each: values.pop(each) for each in names}
            return function(*args, **{name: make(**own)}, **values)

        return (added(*options) if title is None else section(title, *options))(collected)

    return decorate


# ---- options of one value -----------------------------------------------------------------------------------------------------

OUTPUT, BACKEND, SIGNAL = "Output", "Backend", "Signal"
"""Headings that several commands share."""

path = click.Path(path_type=Path)
bundle = click.argument("bundle", type=path, shell_complete=completion.bundles)
bundles = click.argument("bundles", type=path, nargs=-1, shell_complete=completion.bundles)
backend = click.option(
    "-b",
    "--backend",
    default=DEFAULT_BACKEND,
    shell_complete=completion.backends,
    help="Backend that runs the model; sjepa-doctor lists them.",
)
precision = click.option(
    "-p", "--precision", type=click.Choice(RUN_PRECISIONS), help="Precision to compute in.  [default: the bundle's first]"
)
backends = several(
    "-b",
    "--backend",
    "backends",
    shell_complete=completion.backends,
    help="Backends, separated by commas or repeated.  [default: all that run here]",
)
precisions = several(
    "-p", "--precision", "precisions", choices=RUN_PRECISIONS, help="Precisions, separated by commas or repeated.  [default: all]"
)
threads = click.option(
    "-t", "--threads", "n_threads", type=click.IntRange(min=1), help="CPU threads of a call.  [default: the backend's]"
)
device = click.option("--device", type=click.IntRange(min=0), default=0, help="Number of the GPU.")
interpolate = click.option(
    "--interpolate",
    type=Share(),
    is_flag=False,
    flag_value=str(INTERPOLATED_SHARE),
    metavar="[SHARE]",
    help="Largest share of the model's channels to interpolate from the others by their positions; a quarter without SHARE.",
)
rename = click.option(
    "--rename", type=Names(), metavar="THEIRS=MINE,...", help="Names to give to channels of the recording or stream."
)
unit = click.option(
    "-u", "--unit", type=click.Choice(list(UNITS_IN_VOLTS)), help="Unit of a recording or stream, whatever it states."
)
check_unit = rare(
    click.option(
        "--check-unit/--no-check-unit", default=True, help="Whether amplitudes that no EEG has in the stated unit are refused."
    )
)
tmin = click.option("--tmin", type=float, help="Start of a window in seconds after its event; may be negative.")
montage = click.option(
    "-m", "--montage", help="Channels with positions: a montage of MNE, or a file with name, x, y, z in metres."
)
model_sfreq = click.option("--sfreq", type=float, help="Sampling rate of the model in Hz.")
n_times = click.option("--n-times", type=int, help="Samples of a window.")
spatial_filters = rare(click.option("--spatial-filters", type=int, help="Spatial filters of the model."))
seed = rare(click.option("--seed", type=click.IntRange(0, 2**62 - 1), default=0, help="Seed of everything random."))


def decisions(default: str) -> Option:
    """Return ``--decisions``; `default` says which layer is taken without it."""
    return click.option("--decisions", metavar="NAME", help=f"Decision layer of the bundle.  [default: {default}]")


out_file = section(OUTPUT, click.option("-o", "--out", type=path, help="File to write; - is standard output."))
force = section(OUTPUT, click.option("-f", "--force", is_flag=True, help="Replace files that are there."))
append = click.option("-a", "--append", is_flag=True, help="Add to the end of the file of --out.")
json_output = section(
    help_page.GENERAL, click.option("-j", "--json", "json_output", is_flag=True, help="Print the result as JSON.")
)


# ---- options that fill a dataclass ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """Says what runs the model.

    Attributes
    ----------
    backend : str
        Name of the backend.
    precision : RunPrecision or None
        What to compute in. None is the first of the bundle.
    options : BackendOptions
        What the backend is asked for.
    """

    backend: str
    precision: RunPrecision | None
    options: BackendOptions

    def load(self, bundle: Bundle, *, precision: RunPrecision | None = None, check_unit: bool = True) -> Predictor:
        """Open `bundle` for decoding; `precision` stands in where none was asked for."""
        precision = self.precision or precision
        return load(bundle, backend=self.backend, precision=precision, options=self.options, check_unit=check_unit)


def backend_choice(*more: Option) -> Option:
    """Return the options that choose the backend, and `more` fields of `BackendOptions`. The command gets a `BackendChoice`."""

    def make(backend: str, precision: RunPrecision | None, **options: Any) -> BackendChoice:
        return BackendChoice(backend=backend, precision=precision, options=BackendOptions(**options))

    return fills("choice", make, backend, precision, threads, rare(device), *map(rare, more), title=BACKEND)


@dataclass(frozen=True, kw_only=True)
class SignalFacts:
    """Holds what the user says of a signal that does not state it itself.

    Attributes
    ----------
    unit : {"nV", "uV", "mV", "V"} or None
        Unit of the samples.
    ch_names : tuple of str or None
        Names of the channels in order.
    rename : tuple of str
        "THEIRS=MINE": channels that get other names.
    sfreq : float or None
        Sampling rate in Hz.
    """

    unit: Unit | None
    ch_names: tuple[str, ...] | None
    rename: tuple[str, ...]
    sfreq: float | None


def _facts(rename: tuple[str, ...] | None, **facts: Any) -> SignalFacts:
    return SignalFacts(rename=rename or (), **facts)


signal_facts = fills(
    "facts",
    _facts,
    unit,
    click.option(
        "--channels",
        "ch_names",
        type=Names(),
        metavar="A,B,...",
        help="Channels, in order, of a recording or stream that does not name them.",
    ),
    rename,
    click.option("--sfreq", type=float, help="Rate in Hz of a recording that does not state it, or of the synthetic stream."),
    title=SIGNAL,
)
"""Hands `SignalFacts` to the command as ``facts``."""


# ---- what no shape of weights tells -----------------------------------------------------------------------------------------


def _strides(ctx: click.Context, param: click.Parameter, values: tuple[str, ...] | None) -> tuple[int, ...] | None:
    if values is None:
        return None
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise click.BadParameter(f"{','.join(values)!r} are no strides. Use positive whole numbers, as in 8,2,2,2,2.")
    return tuple(map(int, values))


allow_left_out = several(
    "--allow-left-out", "allow_left_out", help="Weights or modules in the checkpoint that are of no SignalJEPA model."
)
untold = rare(
    click.option("--n-heads", type=click.IntRange(min=1), help="Attention heads of the transformer."),
    click.option(
        "--strides",
        type=Names(),
        callback=_strides,
        metavar="A,B,...",
        help="Strides of the convolutions of the feature encoder.",
    ),
    click.option("--sfreq-features", type=float, help="Rate in Hz that scales the encoding of the time tokens."),
    click.option(
        "--max-norm",
        type=click.FloatRange(min=0, min_open=True),
        help="Largest norm of a row of the position table, as torch.nn.Embedding takes it.",
    ),
)
"""Adds what neither shapes of weights nor, often, a configuration tell of a model."""


# ---- --config ----------------------------------------------------------------------------------------------------------------


NO_KEYS = ("config", "version", "help_all")
"""Options that a file of options cannot hold."""


def _read_config(ctx: click.Context, param: click.Parameter, file: Path | None) -> None:
    """Take the values of `file` where the command line gives none."""
    if file is None:
        return
    options = {
        spelling.lstrip("-"): option
        for option in ctx.command.params
        if isinstance(option, click.Option) and option.name not in NO_KEYS
        for spelling in option.opts
        if spelling.startswith("--")
    }
    values = {}
    for key, value in _read_yaml(file).items():
        option = options.get(str(key).replace("_", "-"))
        if option is None:
            raise click.BadParameter(f"{file} has the unknown key {key!r}. The keys are {', '.join(sorted(options))}.")
        if value is None:
            continue
        try:
            values[str(option.name)] = _checked(ctx, option, value)
        except click.BadParameter as e:
            raise click.BadParameter(f"{file}: {key}: {e.message}") from e
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _read_yaml(file: Path) -> dict[object, object]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise click.BadParameter(f"{file} cannot be read ({e.strerror}).") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise click.BadParameter(f"{file} is not YAML ({e}).") from e
    except RecursionError as e:
        raise click.BadParameter(f"{file} is nested too deeply.") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise click.BadParameter(f"{file} holds no options. Write one on each line, as in hop: 0.1.")
    return content


def _checked(ctx: click.Context, option: click.Option, value: object) -> object:
    """Return `value` as a default of `option`, once it is known to fit."""
    if isinstance(value, bool) != option.is_flag and not isinstance(option.type, Share):
        raise click.BadParameter("true or false is needed." if option.is_flag else "true or false is no value of this option.")
    several = option.multiple or option.nargs != 1
    if isinstance(value, list):
        if not several and not isinstance(option.type, Names):
            raise click.BadParameter("one value is needed, not a list.")
    elif not isinstance(value, (bool, str, int, float)):
        raise click.BadParameter(f"{value!r} is no value of an option. Put text in quotes.")
    elif option.multiple:
        value = [value]
    option.type_cast_value(ctx, value)
    return value


config = section(
    help_page.GENERAL,
    click.option(
        "-c",
        "--config",
        type=path,
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        metavar="FILE",
        help="YAML file of options, as in hop: 0.1; the command line wins.",
    ),
)


# ---- --out -------------------------------------------------------------------------------------------------------------------


def check_file(file: Path | None, flag: str = "--out", *, force: bool, append: bool | None = None) -> None:
    """Check, before the work starts, that a command may write `file`.

    A file that is there is refused without `force` or `append`. Standard output, devices and pipes are always written.

    Parameters
    ----------
    file : Path or None
        What to write. None and ``-`` are standard output.
    flag : str
        Option that named the file.
    force : bool
        Whether the user lets the command replace the file.
    append : bool or None
        Whether the user lets the command add to the file. None: the command cannot.

    Raises
    ------
    OutputError
        If the file is there, or cannot be written.
    """
    if file is None or file == STDOUT:
        return
    parent = file.resolve().parent
    if file.is_dir():
        reason = errno.EISDIR
    elif not parent.is_dir():
        reason = errno.ENOTDIR if parent.exists() else errno.ENOENT
    elif not os.access(file if file.exists() else parent, os.W_OK):
        reason = errno.EACCES
    else:
        if file.is_file() and not (force or append):
            raise _is_there(file, flag, can_append=append is not None)
        return
    raise OutputError(f"{file} cannot be written ({os.strerror(reason)}).", f"Choose another {flag}.")


def check_files(files: Iterable[Path], flag: str = "--out", *, force: bool) -> None:
    """Check, before the work starts, that none of `files` would be replaced without `force`.

    Raises
    ------
    OutputError
        If one is there.
    """
    if not force and (there := [file for file in files if file.exists()]):
        raise _is_there(there[0], flag, can_append=False)


def make_way(file: Path, *, force: bool) -> None:
    """Remove a file that the user lets the command replace. Devices and pipes stay."""
    if force and file.is_file():
        file.unlink()


def _is_there(file: Path, flag: str, *, can_append: bool) -> OutputError:
    ways = ["--force to replace it", *(["--append to add to it"] if can_append else [])]
    return OutputError(f"{file} is there already.", f"Use {listed(ways)}, or choose another {flag}.")
