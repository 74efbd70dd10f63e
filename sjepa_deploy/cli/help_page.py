"""Prints the help page of a command: options in sections, the frequent ones on ``--help``, all of them on ``--help-all``."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import click

Function = Callable[..., Any]
Option = Callable[[Function], Function]
"""Adds an option to the function of a command."""

WIDTH = 100
"""Widest help page in columns; a narrower terminal gets a narrower page."""

NAMES_WIDTH = 32
"""Widest first column. Longer names stand on a line of their own."""

GENERAL = "General"
OTHER = "Options"

NARROW = 72
"""Columns below which texts are wrapped, since a line of them says too little."""

_VERBOSITY, _HELP_ALL = "sjepa_deploy.verbosity", "sjepa_deploy.help_all"
_LEVELS = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}

_sections: WeakKeyDictionary[click.Parameter, str] = WeakKeyDictionary()
_rare: WeakSet[click.Parameter] = WeakSet()


def added(*options: Option) -> Option:
    """Return a decorator that adds `options` in the order of the help page."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def parameters(*options: Option) -> list[click.Parameter]:
    """Return the parameters that `options` would add to a command."""

    def nothing() -> None:
        pass

    return parameters_of(added(*options)(nothing))[::-1]


def parameters_of(function: Function) -> list[click.Parameter]:
    """Return the parameters that decorators have added to `function`; the last one of the help page comes first."""
    return getattr(function, "__click_params__", [])


def section(title: str, *options: Option) -> Option:
    """Return a decorator that adds `options` under a heading. Options that have a heading keep it."""
    return _marked(lambda option: _sections.setdefault(option, title), *options)


def rare(*options: Option) -> Option:
    """Return a decorator that adds `options`, of which ``--help`` gives the names alone."""
    return _marked(_rare.add, *options)


def title_of(option: click.Parameter) -> str:
    """Return the heading above an option on the help page."""
    return _sections.get(option, OTHER)


def _marked(mark: Callable[[click.Parameter], object], *options: Option) -> Option:
    def decorate(function: Function) -> Function:
        before = len(parameters_of(function))
        function = added(*options)(function)
        for option in parameters_of(function)[before:]:
            mark(option)
        return function

    return decorate


class Command(click.Command):
    """A command whose help page has sections, and that sets up logging before it runs."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the frequent options in a line each, and the names of the others; all options where ``--help-all`` asks."""
        sections: dict[str, list[tuple[str, str]]] = {}
        left_out = []
        complete = ctx.meta.get(_HELP_ALL, False)
        help_option = self.get_help_option(ctx)
        for option in self.get_params(ctx):
            row = option.get_help_record(ctx)
            if row is None or not isinstance(option, click.Option):
                continue
            if option in _rare and not complete:
                left_out.append(max(option.opts, key=len))
                continue
            title = GENERAL if option is help_option else title_of(option)
            sections.setdefault(title, []).append(row)
        sections[GENERAL] = sections.pop(GENERAL)  # the last one
        if complete or formatter.width < NARROW:
            for title, rows in sections.items():
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=NAMES_WIDTH)
        else:
            formatter.write_paragraph()
            for title, rows in sections.items():
                if title == GENERAL:
                    formatter.write(f"{title}, which every command has:\n")
                    _write_names(formatter, [names for names, _ in rows])
                else:
                    _write_lines(formatter, title, rows)
        if left_out:
            formatter.write("More options, which --help-all explains:\n")
            _write_names(formatter, left_out)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with its log on standard error."""
        with _logged(ctx.meta.get(_VERBOSITY, 0)):
            return super().invoke(ctx)


def _write_lines(formatter: click.HelpFormatter, title: str, rows: list[tuple[str, str]]) -> None:
    """Write one line an option; a text that is too long loses its last clauses."""
    formatter.write(f"{title}:\n")
    widest = max(len(names) for names, _ in rows)
    for names, text in rows:
        names = names.ljust(min(widest, NAMES_WIDTH))
        formatter.write(f"  {names}  {shortened(text, formatter.width - len(names) - 4)}\n")


def _write_names(formatter: click.HelpFormatter, names: list[str]) -> None:
    """Write names with commas between, as many in a line as fit."""
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) + 3 > formatter.width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else '  '}{name},"
    formatter.write("\n".join(lines).removesuffix(",") + "\n")


def shortened(text: str, width: int) -> str:
    """Return as many of the clauses of a text as fit into `width` columns, and its defaults if they fit beside the first."""
    text, defaults, rest = text.partition("  [default")
    defaults += rest
    clauses = re.split(r"(?<=[.;]) ", text)
    for n in range(len(clauses), 0, -1):
        kept = " ".join(clauses[:n])
        if n < len(clauses):
            kept = kept.rstrip(".;") + "."
        for line in (kept + defaults, kept):
            if len(line) <= width:
                return line
    return clauses[0][: width - 3].rpartition(" ")[0] + "..."


@contextlib.contextmanager
def _logged(verbosity: int) -> Iterator[None]:
    """Write what sjepa_deploy logs on standard error while the context lasts."""
    logger, handler = logging.getLogger("sjepa_deploy"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if verbosity > 0 else "%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(_LEVELS[verbosity])
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def is_quiet() -> bool:
    """Return whether the command that runs was told to show its results alone."""
    return _verbosity() < 0


def is_verbose() -> bool:
    """Return whether the command that runs was told to show more."""
    return _verbosity() > 0


def _verbosity() -> int:
    ctx = click.get_current_context(silent=True)
    return 0 if ctx is None else int(ctx.meta.get(_VERBOSITY, 0))


def _verbose(ctx: click.Context, param: click.Parameter, times: int) -> None:
    if times:
        _set_verbosity(ctx, min(times, max(_LEVELS)))


def _quiet(ctx: click.Context, param: click.Parameter, quiet: bool) -> None:
    if quiet:
        _set_verbosity(ctx, -1)


def _set_verbosity(ctx: click.Context, verbosity: int) -> None:
    if _VERBOSITY in ctx.meta:
        raise click.UsageError("--verbose and --quiet contradict each other: give one of them.")
    ctx.meta[_VERBOSITY] = verbosity


def _print_all(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        ctx.meta[_HELP_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


def general(function: Function) -> Function:
    """Add what every command has beside ``--config`` and ``--json``."""
    return section(
        GENERAL,
        click.option(
            "-v",
            "--verbose",
            count=True,
            expose_value=False,
            callback=_verbose,
            help="Log what is done; given twice, every detail.",
        ),
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            expose_value=False,
            callback=_quiet,
            help="Show results and errors alone: no progress, no live view, no warnings in the log.",
        ),
        click.version_option(None, "-V", "--version", package_name="sjepa-deploy", help="Show the version and exit."),
        click.option(
            "--help-all",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_all,
            help="Show this message with every option, and exit.",
        ),
    )(function)
