"""``sjepa-doctor``: what is here, and what keeps a backend from loading."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.cli import console, entry, print_json
from sjepa_deploy.errors import BackendError, MissingDependencyError
from sjepa_deploy.runtime.backend import BACKENDS
from sjepa_deploy.runtime.cuda import Device, driver_version

PACKAGES = (
    *("sjepa-deploy", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "onnx", "onnxscript", "safetensors", "mne", "pyxdf"),
    *("lightning", "tensorrt", "tensorrt-rtx", "cuda-core", "cuda-bindings", "tritonclient", "nvidia-pytriton"),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_output", is_flag=True, help="Print the findings as JSON.")
def doctor(json_output: bool) -> None:
    """Show versions, hardware, and which backends run here and why others don't."""
    versions = {name: _version(name) for name in PACKAGES}
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        **_gpu(),
    }
    backends = {name: missing and str(missing) for name, missing in ((n, e.why_not()) for n, e in BACKENDS.items())}
    if json_output:
        print_json({"machine": machine, "packages": versions, "backends": backends})
        return
    screen = console(json_output=False)
    table = Table(show_header=False)
    for name, value in (machine | versions).items():
        table.add_row(name, value or "[dim]not installed[/]")
    screen.print(table)
    for name, reason in backends.items():
        screen.print(
            f"backend [bold]{name}[/]: "
            + ("[green]runs here[/]" if reason is None else f"[yellow]does not run here[/]: {escape(str(reason))}")
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, str]:
    """Return what the first GPU is, or why there is none to use."""
    try:
        device = Device()
        gpu = device.gpu
        device.close()
    except (BackendError, MissingDependencyError) as e:
        return {"GPU": f"none to use: {e.problem}", "driver": driver_version() or "none"}
    return {
        "GPU": f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory / 2**30:.0f} GiB",
        "driver": gpu.driver,
        "CUDA": gpu.cuda,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


main = entry("doctor")
