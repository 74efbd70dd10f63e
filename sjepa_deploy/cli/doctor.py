"""``sjepa-doctor`` shows what this machine has, what keeps a backend from loading, and what was measured for bundles."""

from __future__ import annotations

import platform
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.cli import console, entry, options, print_json
from sjepa_deploy.runtime.backend import BACKENDS
from sjepa_deploy.runtime.fused.choice import records_of
from sjepa_deploy.runtime.machine import gpu, n_cores, processor, versions
from sjepa_deploy.serialize import encode


@options.command
@click.argument("bundles", nargs=-1, type=options.path)
@options.json_output
def doctor(bundles: tuple[Path, ...], json_output: bool) -> None:
    """Show versions, hardware, which backends run on this machine, and why others do not.

    Of each of BUNDLES: which kernels of the backend cuda were measured to be the faster ones at each batch size.
    """
    packages = versions()
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": str(n_cores()),
        **gpu(),
    }
    backends = {name: missing and str(missing) for name, missing in ((n, e.why_not()) for n, e in BACKENDS.items())}
    kernels = {str(bundle): records_of(bundle) for bundle in bundles}
    if json_output:
        measured = {bundle: [encode(record) for record in records] for bundle, records in kernels.items()}
        print_json({"machine": machine, "packages": packages, "backends": backends, "kernels": measured})
        return
    screen = console(json_output=False)
    table = Table(show_header=False)
    for name, value in (machine | packages).items():
        table.add_row(name, value or "[dim]not installed[/]")
    screen.print(table)
    for name, reason in backends.items():
        screen.print(
            f"backend [bold]{name}[/]: "
            + ("[green]runs here[/]" if reason is None else f"[yellow]does not run here[/]: {escape(str(reason))}")
        )
    for bundle, records in kernels.items():
        for record in records:
            screen.print(f"{escape(bundle)}: cuda {record.precision} on {escape(record.gpu)}: kernels of {escape(str(record))}")
        if not records:
            screen.print(f"{escape(bundle)}: cuda has measured no batch yet")


main = entry("doctor")
