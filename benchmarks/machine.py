"""What every result file says of where and how it was made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("sjepa-deploy", "torch", "onnx", "onnxruntime", "numpy", "braindecode")


def describe_machine() -> dict[str, Any]:
    """Return hardware, load, versions, commit and command."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout.strip()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit + (" with changes" if changed else ""),
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write_result(path: Path, result: dict[str, Any], table: str) -> None:
    """Write `result` to `path`.json and `table` with the machine's description to `path`.md."""
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    head = (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load_before']:.2f} before the run; "
        f"Python {machine['python']}, {versions}; commit {machine['commit']}.\n\n    {machine['command']}\n\n"
    )
    path.with_suffix(".md").write_text(head + table + "\n")
    print(table)
