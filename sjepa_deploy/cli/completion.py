"""Completes commands, options, backends and bundles in a shell, by click's own means."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from sjepa_deploy.bundle import MANIFEST_FILE
from sjepa_deploy.runtime.backend import BACKENDS


def script(shell: str, programs: dict[str, click.Command]) -> str:
    """Return what a shell evaluates to complete `programs`, which are named as a user calls them."""
    completion = get_completion_class(shell)
    assert completion is not None, "click knows the three shells"
    return "\n".join(
        completion(command, {}, name, f"_{name.replace('-', '_').upper()}_COMPLETE").source()
        for name, command in programs.items()
    )


def after_commas(incomplete: str, names: tuple[str, ...]) -> list[CompletionItem]:
    """Return the names that complete the last one of names separated by commas."""
    before, comma, begun = incomplete.rpartition(",")
    given = before.split(",")
    return [CompletionItem(before + comma + name) for name in names if name.startswith(begun) and name not in given]


def backends(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the backends that complete a name, or the last one of several."""
    return after_commas(incomplete, tuple(BACKENDS))


def bundles(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the bundles that complete a path; where there is none, the shell completes folders."""
    begun = Path(incomplete)
    folder, start = (begun, "") if incomplete == "" or incomplete.endswith("/") else (begun.parent, begun.name)
    prefix = incomplete.removesuffix(start)
    try:
        found = sorted(each.parent.name for each in folder.glob(f"*/{MANIFEST_FILE}"))
    except OSError:
        found = []
    matching = [CompletionItem(prefix + name) for name in found if name.startswith(start)]
    return matching or [CompletionItem(incomplete, type="dir")]
