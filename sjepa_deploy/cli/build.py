"""``sjepa-build`` builds TensorRT engines for this machine's GPU."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, options, parity_table, print_json
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.export.to_tensorrt import build_engine, default_settings, other_machine
from sjepa_deploy.runtime.backends.engines import EngineRecord
from sjepa_deploy.runtime.backends.tensorrt_api import MODULES
from sjepa_deploy.spec import RunPrecision


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """Says how engines are built.

    Attributes
    ----------
    flavour : {"tensorrt", "tensorrt-rtx"}
        Which TensorRT.
    device : int
        Which GPU.
    targets : tuple of str
        Compute capabilities of other machines to build for, e.g. "8.6". Empty for this machine's GPU.
    rebuild : bool
        Whether an engine that is there is built again.
    time_limit : float or None
        Seconds after which a build is given up.
    changes : dict
        Fields of `EngineSettings` that differ from the defaults for a bundle.
    """

    flavour: str = "tensorrt"
    device: int = 0
    targets: tuple[str, ...] = ()
    rebuild: bool = False
    time_limit: float | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def _request(
    flavour: str, device: int, targets: tuple[str, ...], rebuild: bool, time_limit: float | None, **changes: Any
) -> EngineRequest:
    given = {name: value for name, value in changes.items() if value is not None}
    return EngineRequest(flavour=flavour, device=device, targets=targets, rebuild=rebuild, time_limit=time_limit, changes=given)


@options.command
@options.bundle
@options.section(options.BACKEND, options.precisions)
@options.fills(
    "request",
    _request,
    click.option("--flavour", type=click.Choice(list(MODULES)), default="tensorrt", help="Which TensorRT."),
    options.device,
    options.several(
        "--for",
        "targets",
        help="Compute capabilities of other machines, e.g. 8.6,8.9,12.0 (tensorrt-rtx); needs no GPU.  [default: this GPU]",
    ),
    click.option("--min-batch", type=click.IntRange(min=1), help="Smallest batch.  [default: 1]"),
    click.option("--opt-batch", type=click.IntRange(min=1), help="Batch that kernels are chosen for.  [default: 1]"),
    click.option("--max-batch", type=click.IntRange(min=1), help="Largest batch.  [default: the graph's]"),
    click.option("--optimization-level", type=click.IntRange(0, 5), default=3, help="How long the builder searches."),
    options.rare(
        click.option(
            "--workspace", "workspace_mib", type=click.IntRange(min=1), help="Scratch memory in MiB.  [default: what the GPU has]"
        )
    ),
    options.rare(click.option("--refittable", is_flag=True, help="Let weights be replaced later; costs speed.")),
    options.rare(
        click.option("--version-compatible", is_flag=True, help="Let later versions of TensorRT load the engine; costs speed.")
    ),
    options.rare(
        click.option("--time-limit", type=float, help="Seconds after which a build is given up (TensorRT 10 and later).")
    ),
    click.option("--rebuild", is_flag=True, help="Build engines again that are there."),
    title="Engines",
)
@options.json_output
def build(bundle: Path, precisions: tuple[RunPrecision, ...], request: EngineRequest, json_output: bool) -> None:
    """Build TensorRT engines of BUNDLE for this machine, and compare them with the PyTorch model.

    Engines are kept in the bundle's folder under the identity of graph, precision, options, TensorRT, GPU and driver. An engine
    that differs from the model is deleted, and the exit status is 1. An engine for other machines (--for) is unproven: parity
    judges it at its first load there, before it decodes.
    """
    screen = console(json_output)
    opened = Bundle.open(bundle)
    records = build_engines(opened, precisions or opened.precisions, screen, request)
    if json_output:
        print_json([record_summary(opened, record) for record in records])


def build_engines(
    bundle: Bundle, precisions: tuple[RunPrecision, ...], screen: Console, request: EngineRequest | None = None
) -> list[EngineRecord]:
    """Build an engine for each of `precisions`, and each target, with a progress line, and print the results."""
    request = request or EngineRequest()
    for capability in request.targets:
        other_machine(request.flavour, capability)
    records = []
    for precision, target in itertools.product(precisions, request.targets or (None,)):
        settings = dataclasses.replace(default_settings(bundle, precision), **request.changes)
        with progress(f"{precision}: building an engine") as steps:
            record = build_engine(
                bundle,
                precision,
                flavour=request.flavour,
                settings=settings,
                ordinal=request.device,
                target=target,
                rebuild=request.rebuild,
                time_limit=request.time_limit,
                progress=lambda text, steps=steps, p=precision: steps.at(f"{p}: {text}"),  # type: ignore[misc]
            )
        records.append(record)
        machine = record.identity.machine
        place = f"for compute capability {target}, unproven: its first load there judges it" if target else f"on {machine.gpu}"
        screen.print(
            f"{precision}: engines/{record.identity.key}.plan, {record.plan_bytes / 1e6:.1f} MB, {record.build_seconds:g} s, "
            f"{machine.flavour} {machine.version} {place}"
        )
        if record.computes_in != precision:
            screen.print(
                f"[bold yellow]The engine computes in {record.computes_in}: {record.evidence}. "
                f"It is not offered as {precision}.[/]"
            )
    results = tuple(result for record in records for result in record.parity[-1:])
    if results:
        screen.print(parity_table(results, f"{bundle.path}: engines, after reading them back"))
    return records


def record_summary(bundle: Bundle, record: EngineRecord) -> dict[str, Any]:
    """Return an engine as ``--json`` prints it."""
    return {"plan": str(bundle.path / "engines" / f"{record.identity.key}.plan"), "engine": record}


main = entry("build")
