"""Holds the commands: thin wrappers, one file each, that print for people or, with ``--json``, for machines.

Results are dataclasses; sentences and tables are made here, where they are printed.

The exit status is 0 when the work is done, 1 when a verification failed or a pretraining collapsed, 2 for wrong input or a wrong
environment (one line on stderr says how to mend it), 130 when the command was interrupted, and 143 when SIGTERM ended a training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import shlex
import sys
from collections.abc import Callable

import click
from click.core import ParameterSource
from rich import box
from rich.console import Console
from rich.table import Table

from sjepa_deploy.cli.help_page import WIDTH
from sjepa_deploy.eeg.steps import Step
from sjepa_deploy.errors import SjepaError, TrainingStoppedError, listed
from sjepa_deploy.parity import ParityResult
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import ModelSpec

COMMANDS = (
    *("pretrain", "finetune", "evaluate", "sweep", "calibrate", "export", "build", "verify"),
    *("run", "stream", "session", "decide", "bench", "serve", "doctor"),
)
"""Each is a module of this package with a click command of the same name."""

SHELLS = ("bash", "zsh", "fish")
"""Shells that complete commands."""


class _Commands(click.Group):
    """Imports the module of a command when the command is called: importing PyTorch takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in COMMANDS else None


def _command(name: str) -> click.Command:
    command: click.Command = getattr(importlib.import_module(f"sjepa_deploy.cli.{name}"), name)
    return command


def _completion(ctx: click.Context, param: click.Parameter, shell: str | None) -> None:
    """Print what a shell evaluates to complete all commands."""
    if shell is None or ctx.resilient_parsing:
        return
    from sjepa_deploy.cli.completion import script

    click.echo(script(shell, {"sjepa": ctx.command} | {f"sjepa-{name}": ctx.command for name in COMMANDS}))
    ctx.exit()


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)
@click.version_option(None, "-V", "--version", package_name="sjepa-deploy")
@click.option(
    "--completion",
    type=click.Choice(SHELLS),
    is_eager=True,
    expose_value=False,
    callback=_completion,
    help="Print what a shell evaluates to complete all commands, and exit.",
)
@click.pass_context
def group(ctx: click.Context) -> None:
    """Turn a SignalJEPA checkpoint into a verified, real-time decoder.

    Each command is a program too: sjepa export is sjepa-export.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def sjepa() -> None:
    """Run ``sjepa NAME``."""
    sys.exit(run_command(group, "sjepa", sys.argv[1:]))


def run_command(command: click.Command, name: str, arguments: list[str]) -> int:
    """Run `command` and return its exit status, with one line on stderr for every error that a user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    try:
        status = command.main(arguments, prog_name=name, standalone_mode=False)
    except TrainingStoppedError as e:
        again = [*(argument for argument in arguments if argument not in ("--force", "--resume")), "--resume"]
        return _fail(name, f"{e.problem} {e.mend.rstrip('.')}: {shlex.join([name, *again])}", e.exit_code)
    except SjepaError as e:
        return _fail(name, str(e), e.exit_code)
    except click.UsageError as e:
        where = e.ctx.command_path if e.ctx else name
        return _fail(where, f"{e.format_message().rstrip('.')}. See {where} --help.", 2)
    except (click.Abort, KeyboardInterrupt):
        return _fail(name, "interrupted", 130)
    except OSError as e:
        if e.errno != errno.EIO or e.filename is not None:
            raise
        return _fail(name, "the terminal is gone, nothing more could be told", 2)
    except Exception as e:
        if not _is_interruption(e):
            raise
        return _fail(name, "interrupted", 130)
    return status if isinstance(status, int) else 0


def _is_interruption(error: BaseException | None) -> bool:
    """Return whether Ctrl-C is behind an error: PyTorch's exporter makes errors of its own of everything that is raised in it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _fail(name: str, message: str, status: int) -> int:
    one_line = " ".join(message.split())
    with contextlib.suppress(OSError):  # of a terminal that is gone: the status is all that can be told
        click.echo(f"{name}: {one_line}", err=True)
    return status


def console(json_output: bool) -> Console:
    """Return the console that people read: stdout, or stderr where stdout is for a machine."""
    return Console(stderr=json_output, highlight=False)


def print_json(value: object) -> None:
    """Print `value` on stdout as JSON."""
    click.echo(json.dumps(encode(value), indent=1))


def command_line(name: str) -> str:
    """Return the command `name` with the options that were given, on the command line or in a file."""
    given = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    context = click.get_current_context()
    words = [name]
    for parameter in context.command.params:
        assert parameter.name is not None
        if context.get_parameter_source(parameter.name) not in given or not parameter.expose_value:
            continue
        value = context.params[parameter.name]
        if isinstance(parameter, click.Option) and isinstance(value, tuple) and not parameter.multiple:
            value = ",".join(map(str, value))
        for each in value if isinstance(value, tuple) else (value,):
            spelling = [] if isinstance(parameter, click.Argument) else [max(parameter.opts, key=len)]
            words += [] if each is False else spelling if each is True else [*spelling, str(each)]
    return shlex.join(words)


def parity_table(results: tuple[ParityResult, ...], title: str) -> Table:
    """Return the results of parity as a table of 80 columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("graph", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("max error", "/ scale", "allowed", "/ spread", "1 - cosine", "flips"):
        table.add_column(name, justify="right")
    table.add_column("")
    for r in results:
        verdict = "[green]passed[/]" if r.passed else "[bold red]FAILED[/]"
        numbers = [f"{x:.1e}" for x in (r.max_abs, r.max_error, r.tolerance, r.max_relative_to_spread, max(0.0, 1 - r.cosine))]
        flips = "" if r.decision_flips is None else str(r.decision_flips)
        backend = r.backend.partition(":")[0]  # of a server, without its address
        table.add_row(r.precision, backend, *numbers, flips, verdict)
    return table


def spec_lines(spec: ModelSpec) -> list[str]:
    """Return sentences on the steps, their phase and the outputs of a model."""
    signal = spec.signal
    place = "belong to no events, or to events that are not told"
    if signal.event_window is not None:
        place = f"start {signal.event_window.start:g} s after their events {listed(signal.event_window.events, 12)}".rstrip()
    steps = ", ".join(_step_words(step) for step in signal.steps)
    return [f"steps, {signal.phase}: {steps}", f"windows {place}", f"outputs: {spec.outputs_told}"]


def _step_words(step: Step) -> str:
    """Return the name of a step, and its fields where they are not the defaults."""
    words = [step.name]
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if isinstance(value, tuple):
            value = listed([str(each) for each in value], 6)
        if value is not None and (value != field.default or field.name in ("l_freq", "h_freq", "freq")):
            words.append(f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}")
    return " ".join(words)


def entry(name: str) -> Callable[[], None]:
    """Return the console script of the command `name`."""

    def main() -> None:
        sys.exit(run_command(_command(name), f"sjepa-{name}", sys.argv[1:]))

    return main
