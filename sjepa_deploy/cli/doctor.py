"""``sjepa-doctor`` shows what this machine has, and what keeps a backend from loading."""

from __future__ import annotations

import platform

from rich.markup import escape
from rich.table import Table

from sjepa_deploy.cli import console, entry, options, print_json
from sjepa_deploy.runtime.backend import BACKENDS
from sjepa_deploy.runtime.machine import gpu, n_cores, processor, versions


@options.command
@options.json_output
def doctor(json_output: bool) -> None:
    """Show versions, hardware, which backends run on this machine, and why others do not."""
    packages = versions()
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": str(n_cores()),
        **gpu(),
    }
    backends = {name: missing and str(missing) for name, missing in ((n, e.why_not()) for n, e in BACKENDS.items())}
    if json_output:
        print_json({"machine": machine, "packages": packages, "backends": backends})
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


main = entry("doctor")
