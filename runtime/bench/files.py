"""Reads and writes benchmark reports and their samples.

``NAME.json`` holds a `BenchReport` (``sjepa_deploy/assets/benchmark.schema.json`` describes it) and ``NAME.npz`` the raw samples
of every cell, from which each figure can be computed again.

Arrays of a cell in the ``.npz``, one value a call (one a window in open loop), by `Cell.id`:

======================  ==================================================================================================
``ID.latency_us``       what the percentiles are of: the call, or in open loop the time from due to done
``ID.block``            number of the block that the sample belongs to
``ID.at_s``             open loop: when the window was due, from the start of the run
``ID.service_us``       open loop: the call alone, without the wait behind other windows
======================  ==================================================================================================

``canary_us`` holds what the fixed piece of work took before each block, see `Noise`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sjepa_deploy.errors import BenchmarkError
from sjepa_deploy.files import json_file, load_json, write_atomically, written_whole
from sjepa_deploy.runtime.bench.cells import Samples
from sjepa_deploy.runtime.bench.results import SCHEMA_VERSION, BenchReport
from sjepa_deploy.serialize import DecodeError, decode


def write_report(report: BenchReport, samples: Samples, path: Path) -> BenchReport:
    """Write `report` to `path`, a ``.json``, and its samples beside it. Returns it with the name of their file.

    Files that are there are replaced whole or not at all.

    Raises
    ------
    BenchmarkError
        If they cannot be written.
    """
    arrays = path.with_suffix(".npz")
    report = dataclasses.replace(report, samples_file=arrays.name)
    try:
        with written_whole(arrays) as file:
            np.savez_compressed(file, **dict[str, Any](samples))
        write_atomically(path, json_file(report))
    except OSError as e:
        raise BenchmarkError(f"{path} cannot be written ({e.strerror}).", "Choose another --out.") from e
    return report


def load_report(path: Path) -> BenchReport:
    """Read a report.

    Raises
    ------
    BenchmarkError
        If the file is missing, no report, or of a newer schema.
    """
    try:
        data = load_json(path.read_bytes(), finite=False)
    except OSError as e:
        raise BenchmarkError(f"{path} cannot be read ({e.strerror}).", "Name the .json that sjepa-bench wrote.") from e
    except ValueError as e:
        raise BenchmarkError(f"{path} is not JSON ({e}).", "Name the .json that sjepa-bench wrote.") from e
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BenchmarkError(
            f"{path} has schema version {version}; this release reads up to {SCHEMA_VERSION}.", "Upgrade sjepa-deploy."
        )
    try:
        return decode(BenchReport, _from_version_1(data) if version == 1 else data)
    except DecodeError as e:
        raise BenchmarkError(f"{path} is no benchmark report: {e}.", "Name the .json that sjepa-bench wrote.") from e


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """Return a report of schema version 1 in today's form. `decode` refuses what is not of its version's form.

    Its sentences stay as they are; lists that it wrote as text, "1.2 and 1.3", become lists.
    """
    data = data | {"schema_version": SCHEMA_VERSION}
    partial = data.get("partial")
    if partial is None:
        data["partial"] = []
    elif isinstance(partial, str):
        data["partial"] = [{"kind": "interrupted" if "It was interrupted." in partial else "told", "told": partial}]
    if isinstance(noise := data.get("noise"), dict) and isinstance(reasons := noise.get("reasons"), list):
        data["noise"] = noise | {"reasons": [{"kind": "told", "told": reason} for reason in reasons]}
    if isinstance(environment := data.get("environment"), dict):
        packages = environment.get("versions")
        if isinstance(packages, dict):
            packages = {name: _parts(version, " and ") for name, version in packages.items()}
        data["environment"] = environment | {"python": _parts(environment.get("python"), " and "), "versions": packages}
    if isinstance(left_out := data.get("left_out"), list):
        data["left_out"] = [_left_out_of_version_1(entry) if isinstance(entry, dict) else entry for entry in left_out]
    return data


def _left_out_of_version_1(entry: dict[str, Any]) -> dict[str, Any]:
    kind = {"kind": "ages"} if entry.get("what") == "ages of decisions" else {}
    return entry | kind | {"what": _parts(entry.get("what"), ", ")}


def _parts(value: Any, separator: str) -> Any:
    return value.split(separator) if isinstance(value, str) else value


def load_samples(report: BenchReport, path: Path) -> Samples:
    """Read the raw samples of the `report` that was read from `path`.

    Raises
    ------
    BenchmarkError
        If they are not beside it.
    """
    if report.samples_file is None:
        return {}
    file = path.with_name(Path(report.samples_file).name)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError) as e:
        raise BenchmarkError(f"The samples of {path} cannot be read ({e}).", f"Keep {file.name} beside it.") from e
