"""Describes in every result file where and how it was made."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from sjepa_deploy.runtime.machine import commit, n_cores, processor, versions

ROOT = Path(__file__).parents[1]
PACKAGES = ("sjepa-deploy", "torch", "onnx", "onnxruntime", "numpy", "braindecode")


def describe_machine() -> dict[str, Any]:
    """Return hardware, load, versions, commit and command."""
    return {
        "processor": processor(),
        "cores": n_cores(),
        "load_before": os.getloadavg()[0],
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version or "not installed" for name, version in versions(PACKAGES).items()},
        "commit": commit(ROOT) or "",
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


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
