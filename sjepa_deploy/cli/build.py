"""``sjepa-build``: engines for this machine's GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, parity_table, print_json
from sjepa_deploy.errors import EngineError
from sjepa_deploy.export.to_tensorrt import build_engine, default_settings
from sjepa_deploy.runtime.backends.engines import EngineRecord
from sjepa_deploy.runtime.backends.tensorrt_api import MODULES
from sjepa_deploy.spec import RUN_PRECISIONS, RunPrecision


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision", help="What to compute in, separated by commas: fp32, tf32, fp16, bf16.  [default: those of the graphs]"
)
@click.option("--flavour", type=click.Choice(list(MODULES)), default="tensorrt", help="Which TensorRT.")
@click.option("--device", type=click.IntRange(min=0), default=0, help="Which GPU.")
@click.option("--min-batch", type=click.IntRange(min=1), help="Smallest batch.  [default: 1]")
@click.option("--opt-batch", type=click.IntRange(min=1), help="Batch that kernels are chosen for.  [default: 1]")
@click.option("--max-batch", type=click.IntRange(min=1), help="Largest batch.  [default: the graph's]")
@click.option("--optimization-level", type=click.IntRange(0, 5), default=3, help="How long the builder searches.")
@click.option("--workspace", type=click.IntRange(min=1), help="Scratch memory in MiB.  [default: what the GPU has]")
@click.option("--refittable", is_flag=True, help="Let weights be replaced later; costs speed.")
@click.option("--version-compatible", is_flag=True, help="Let later versions of TensorRT load the engine; costs speed.")
@click.option("--time-limit", type=float, help="Seconds after which a build is given up (TensorRT 10 and later).")
@click.option("--rebuild", is_flag=True, help="Build again what is there.")
@click.option("--json", "json_output", is_flag=True, help="Print the result as JSON.")
def build(bundle: Path, precision: str | None, json_output: bool, **flags: Any) -> None:
    """Build TensorRT engines of BUNDLE for this machine, and compare them with the PyTorch model.

    Engines are kept in the bundle's folder under the identity of graph, precision, options, TensorRT, GPU and driver. One that
    differs from the model is deleted, and the exit status is 1.
    """
    screen = console(json_output)
    opened = Bundle.open(bundle)
    records = build_engines(opened, parse_precisions(precision) or opened.precisions, screen, **flags)
    if json_output:
        print_json([record_summary(opened, record) for record in records])


def parse_precisions(text: str | None) -> tuple[RunPrecision, ...]:
    """Return the precisions in a comma-separated list."""
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    if unknown := [name for name in names if name not in RUN_PRECISIONS]:
        raise EngineError(f"{unknown[0]!r} is not a precision of an engine.", f"Use a list of {', '.join(RUN_PRECISIONS)}.")
    return names  # type: ignore[return-value]


def build_engines(
    bundle: Bundle,
    precisions: tuple[RunPrecision, ...],
    screen: Console,
    *,
    flavour: str = "tensorrt",
    device: int = 0,
    rebuild: bool = False,
    time_limit: float | None = None,
    min_batch: int | None = None,
    opt_batch: int | None = None,
    max_batch: int | None = None,
    workspace: int | None = None,
    **options: Any,
) -> list[EngineRecord]:
    """Build an engine for each of `precisions` with a progress line, and print what came of it."""
    records = []
    for precision in precisions:
        settings = default_settings(bundle, precision)
        profile: dict[str, Any] = {"min_batch": min_batch, "opt_batch": opt_batch, "max_batch": max_batch}
        profile["workspace_mib"] = workspace
        settings = dataclasses.replace(settings, **{k: v for k, v in profile.items() if v is not None}, **options)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=screen, transient=True) as bar:
            task = bar.add_task(precision)
            record = build_engine(
                bundle,
                precision,
                flavour=flavour,
                settings=settings,
                ordinal=device,
                rebuild=rebuild,
                time_limit=time_limit,
                progress=lambda text, bar=bar, task=task, p=precision: bar.update(task, description=f"{p}: {text}"),  # type: ignore[misc]
            )
        records.append(record)
        machine = record.identity.machine
        screen.print(
            f"{precision}: engines/{record.identity.key}.plan, {record.plan_bytes / 1e6:.1f} MB, {record.build_seconds:g} s, "
            f"{machine.flavour} {machine.version} on {machine.gpu}"
        )
        if record.computes_in != precision:
            screen.print(
                f"[bold yellow]It computes in {record.computes_in}: {record.evidence}. It is not offered as {precision}.[/]"
            )
    if records:
        results = tuple(result for record in records for result in record.parity[-1:])
        screen.print(parity_table(results, f"{bundle.path}: engines, after reading them back"))
    return records


def record_summary(bundle: Bundle, record: EngineRecord) -> dict[str, Any]:
    """Return what ``--json`` prints of an engine."""
    return {"plan": str(bundle.path / "engines" / f"{record.identity.key}.plan"), "engine": record}


main = entry("build")
