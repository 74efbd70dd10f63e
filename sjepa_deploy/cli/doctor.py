"""``sjepa-doctor`` shows what this machine has, what keeps a backend from loading, and what was measured for bundles."""

from __future__ import annotations

import platform
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, options, print_json, spec_lines
from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.backend import BACKENDS
from sjepa_deploy.runtime.backends.proofs import EngineState, engine_states
from sjepa_deploy.runtime.fused.batch_program import refuse_batches
from sjepa_deploy.runtime.fused.choice import KernelRecord, records_of
from sjepa_deploy.runtime.machine import gpu, n_cores, processor, versions
from sjepa_deploy.serialize import encode


@options.command
@options.bundles
@options.json_output
def doctor(bundles: tuple[Path, ...], json_output: bool) -> None:
    """Show versions, hardware, which backends run on this machine, and why others do not.

    Of each of BUNDLES: its TensorRT engines and where parity judged them, and which kernels of the backend cuda were measured to
    be the faster ones at each batch size.
    """
    opened = [Bundle.open(bundle) for bundle in bundles]
    packages = versions()
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": str(n_cores()),
        **gpu(),
    }
    backends = {name: missing and str(missing) for name, missing in ((n, e.why_not()) for n, e in BACKENDS.items())}
    engines = {str(bundle.path): engine_states(bundle) for bundle in opened}
    kernels = {str(bundle.path): records_of(bundle.path) for bundle in opened}
    one_family = {str(bundle.path): why_no_batch_kernels(bundle) for bundle in opened}
    if json_output:
        measured = {bundle: [encode(record) for record in records] for bundle, records in kernels.items()}
        judged = {bundle: [encode(s) | {"unproven": s.unproven} for s in states] for bundle, states in engines.items()}
        told = {"engines": judged, "kernels": measured, "one_kernel_family": one_family}
        print_json({"machine": machine, "packages": packages, "backends": backends, **told})
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
    for each in opened:
        for line in spec_lines(each.spec):
            screen.print(f"{escape(str(each.path))}: {escape(line)}", soft_wrap=True)
    for bundle, states in engines.items():
        for state in states:
            screen.print(f"{escape(bundle)}: {escape(engine_line(state))}")
    for bundle, records in kernels.items():
        for record in records:
            for line in kernel_lines(record):
                screen.print(f"{escape(bundle)}: cuda {record.precision} on {escape(record.gpu)}, {escape(line)}")
        if reason := one_family[bundle]:
            screen.print(f"{escape(bundle)}: cuda runs every batch on its kernels of one window. {escape(reason)}")
        elif not records:
            screen.print(f"{escape(bundle)}: cuda has measured no batch yet; the first call of each size does")


def engine_line(state: EngineState) -> str:
    """Return what is known of an engine: which one it is, and where it was judged."""
    identity, machine = state.record.identity, state.record.identity.machine
    what = f"engine {identity.key[:12]}, {identity.precision}, {machine.flavour} {machine.version}"
    if not state.record.for_others:
        proven = [f"{proof.machine.flavour} {proof.machine.version}, driver {proof.machine.driver}" for proof in state.proofs]
        return f"{what}: " + "; proven with ".join([f"built and judged on {machine.gpu}, driver {machine.driver}", *proven])
    what = f"{what}, for compute capability {machine.compute_capability}"
    if state.unproven:
        return f"{what}: unproven, parity judges it at its first load on such a machine"
    places = (f"{proof.machine.gpu}, driver {proof.machine.driver}" for proof in state.proofs)
    return f"{what}: proven on {'; '.join(places)}"


def kernel_lines(record: KernelRecord) -> list[str]:
    """Return a line for each measured size: the batches that it settles, and how long both kinds of kernels took."""
    names = {"window": "one window at a time", "batch": "many windows at a time"}
    lines = []
    for choice in record.choices:
        first = (1 << (choice.batch - 1).bit_length() - 1) + 1 if choice.batch > 1 else 1  # see choice.size_for
        batches = f"batch {choice.batch}" if first == choice.batch else f"batches {first:,} to {choice.batch:,}"
        slower = [f"{names[kind]} {us:,.0f}" for kind, us in choice.medians_us.items() if kind != choice.kernels]
        took = f"{choice.medians_us[choice.kernels]:,.0f} us at {choice.batch:,}"
        lines.append(f"{batches}: {names[choice.kernels]}, {took} ({', '.join(slower)} us)")
    return lines


def why_no_batch_kernels(bundle: Bundle) -> str | None:
    """Return why the backend cuda has no kernels of many windows for the model of `bundle`, or None if it has."""
    try:
        refuse_batches(bundle.spec)
    except BackendError as e:
        return e.problem
    return None


main = entry("doctor")
