"""Reads and writes benchmark reports and their samples."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sjepa_deploy.errors import BenchmarkError
from sjepa_deploy.runtime.bench.results import SCHEMA_VERSION, BenchReport, Samples
from sjepa_deploy.serialize import DecodeError, decode, encode


def write_report(report: BenchReport, samples: Samples, path: Path) -> BenchReport:
    """Write `report` to `path`, a ``.json``, and its samples beside it. Returns it with the name of their file.

    What is there is replaced whole or not at all.

    Raises
    ------
    BenchmarkError
        If they cannot be written.
    """
    arrays = path.with_suffix(".npz")
    report = dataclasses.replace(report, samples_file=arrays.name)
    try:
        with _whole(arrays) as file:
            np.savez_compressed(file, **dict[str, Any](samples))
        with _whole(path) as file:
            file.write_text(json.dumps(encode(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as e:
        raise BenchmarkError(f"{path} cannot be written ({e.strerror}).", "Choose another --out.") from e
    return report


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a name beside `path`, and move what was written there to `path` when the block ends well."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_report(path: Path) -> BenchReport:
    """Read a report.

    Raises
    ------
    BenchmarkError
        If the file is missing, no report, or of a newer schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise BenchmarkError(f"{path} cannot be read ({e.strerror}).", "Name the .json that sjepa-bench wrote.") from e
    except (ValueError, RecursionError) as e:
        raise BenchmarkError(f"{path} is not JSON ({e}).", "Name the .json that sjepa-bench wrote.") from e
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BenchmarkError(
            f"{path} has schema version {version}; this release reads up to {SCHEMA_VERSION}.", "Upgrade sjepa-deploy."
        )
    try:
        return decode(BenchReport, data)
    except DecodeError as e:
        raise BenchmarkError(f"{path} is no benchmark report: {e}.", "Name the .json that sjepa-bench wrote.") from e


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
