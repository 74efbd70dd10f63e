"""Chooses the kernels for a batch: the kernels of one window, or the kernels of many windows.

The first call of a batch size measures both kinds, and a record keeps the result. The record lies beside the bundle's engines,
as ``engines/cuda/PRECISION-KEY.json``. KEY is a hash of the kernels, the weights, the GPU and the driver, so that a record of
anything else is never read. The bundle's own signed files never change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from sjepa_deploy.files import load_json, now, write_atomically
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import RunPrecision

logger = logging.getLogger(__name__)

Kernels = Literal["window", "batch"]
"""Two kinds of kernels of the backend "cuda". "window" spreads each window over the whole GPU, one window after the other.
"batch" gives each window a multiprocessor."""

FOLDER = "engines/cuda"
LEAST_SECONDS, LEAST_CALLS, MOST_CALLS = 0.02, 3, 50
"""Measuring one kind of kernels at one size takes at least so many seconds and calls, and at most so many calls."""


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """Holds the measurement at one batch size.

    Attributes
    ----------
    batch : int
        Windows of a call.
    kernels : {"window", "batch"}
        The faster kind.
    medians_us : dict of str to float
        Median time of a call in microseconds, for each kind of kernels.
    """

    batch: int
    kernels: Kernels
    medians_us: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """Lists the faster kernels at each measured size, for one bundle in one precision on one machine.

    Attributes
    ----------
    precision : {"fp32", "tf32", "fp16", "bf16"}
        Precision of both kinds.
    gpu, driver : str
        Name of the GPU, and version of its driver.
    choices : tuple of KernelChoice
        In rising order of batch sizes.
    created : str
        Time of the last change, ISO 8601, UTC.
    """

    precision: RunPrecision
    gpu: str
    driver: str
    choices: tuple[KernelChoice, ...]
    created: str

    def __str__(self) -> str:
        return ", ".join(f"{choice.kernels} at batch {choice.batch}" for choice in self.choices)


def key_of(*parts: bytes | str) -> str:
    """Return a hash of everything that the speed depends on."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def size_for(batch: int, max_batch: int) -> int:
    """Return the size at which the choice for `batch` is measured: the next power of two, or the largest batch."""
    return min(1 << (batch - 1).bit_length(), max_batch)


def records_of(bundle: Path) -> list[KernelRecord]:
    """Return all readable records in the folder of a bundle."""
    return [record for file in sorted((bundle / FOLDER).glob("*.json")) if (record := _read(file)) is not None]


def _read(file: Path) -> KernelRecord | None:
    try:
        return decode(KernelRecord, load_json(file.read_bytes(), finite=False))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, DecodeError) as e:
        logger.warning("The record %s is damaged and is measured again: %s", file, e)
        return None


class Choices:
    """Keeps the choices of one backend.

    Parameters
    ----------
    bundle : Path
        Folder of the bundle.
    empty : KernelRecord
        Record of this backend, without choices.
    key : str
        Key of the record, from `key_of`.
    """

    def __init__(self, bundle: Path, empty: KernelRecord, key: str) -> None:
        self._file = bundle / FOLDER / f"{empty.precision}-{key}.json"
        self._empty = empty
        found = _read(self._file)
        self._at: dict[int, KernelChoice] = {choice.batch: choice for choice in found.choices} if found else {}

    def at(self, size: int) -> Kernels | None:
        """Return the faster kernels at `size`, or None if `size` was not measured."""
        choice = self._at.get(size)
        return choice.kernels if choice else None

    def settle(self, size: int, calls: dict[Kernels, Callable[[], object]]) -> Kernels:
        """Measure `calls` of `size` windows, keep the faster kind of kernels, and return that kind."""
        medians: dict[str, float] = {kernels: _median_us(call) for kernels, call in calls.items()}
        faster = min(calls, key=lambda kernels: medians[kernels])
        self._at[size] = KernelChoice(batch=size, kernels=faster, medians_us=medians)
        choices = tuple(self._at[batch] for batch in sorted(self._at))
        record = KernelRecord(
            precision=self._empty.precision, gpu=self._empty.gpu, driver=self._empty.driver, choices=choices, created=now()
        )
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, (json.dumps(encode(record), indent=1) + "\n").encode())
        except OSError as e:
            logger.warning("Which kernels are faster cannot be kept in %s and is measured again next time: %s", self._file, e)
        return faster


def _median_us(call: Callable[[], object]) -> float:
    call()  # what is done once
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < LEAST_CALLS or (len(times) < MOST_CALLS and time.perf_counter() - began < LEAST_SECONDS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return median(times)
