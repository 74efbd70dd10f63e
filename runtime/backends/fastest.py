"""Runs each batch size on the backend that was measured to be the fastest on this machine, and reads the record of that.

A record is made from the throughput of a benchmark report. It lies in the bundle as ``engines/fastest/*.json``, one for each
precision and machine. The files that the manifest lists never change. A record is refused, as an engine is, where something
differs that it depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, SjepaError
from sjepa_deploy.files import bytes_hash, load_json
from sjepa_deploy.runtime.backend import BACKENDS, FASTEST_BACKEND, Backend, BackendOptions, FloatArray, Split, open_backend
from sjepa_deploy.runtime.backends.engines import EngineStore
from sjepa_deploy.runtime.machine import gpu, n_cores, processor, versions
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import RunPrecision


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend for one batch size.

    Attributes
    ----------
    batch : int
        Windows of a call.
    backend : str
        What runs them.
    medians_us : dict of str to float
        Medians of a call in microseconds, of all backends that were measured and right.
    """

    batch: int
    backend: str
    medians_us: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FastestRecord:
    """Which backend is the fastest at each batch size, for one bundle in one precision on one machine.

    Attributes
    ----------
    precision : {"fp32", "tf32", "fp16", "bf16"}
        What all of them compute in.
    bundle : str
        Digest of the bundle's manifest.
    machine : dict of str to str
        What the chosen ones depend on, see `sjepa_deploy.runtime.backend.BackendEntry`. What is not there has no entry.
    choices : tuple of Choice
        At the sizes that were measured, in rising order.
    created : str
        When it was kept, ISO 8601, UTC.
    digest : str
        sha256 of this description without this field.
    """

    precision: RunPrecision
    bundle: str
    machine: dict[str, str]
    choices: tuple[Choice, ...]
    created: str
    digest: str = ""

    @property
    def backends(self) -> tuple[str, ...]:
        """Every chosen one, once."""
        return tuple(dict.fromkeys(choice.backend for choice in self.choices))

    def backend_at(self, batch: int) -> str:
        """Return what runs `batch` windows: what is the fastest at the next larger size that was measured, or at the largest.

        A call takes no longer with fewer windows, so that the time measured there is a bound for those in between. The fastest
        at the next smaller size gives none.
        """
        return next((choice.backend for choice in self.choices if choice.batch >= batch), self.choices[-1].backend)

    def sealed(self) -> FastestRecord:
        """Return a copy with the digest filled in."""
        return dataclasses.replace(self, digest=_seal(encode(self)))

    def __str__(self) -> str:
        spans: list[tuple[str, int, int]] = []
        for choice in self.choices:
            if spans and spans[-1][0] == choice.backend:
                spans[-1] = (choice.backend, spans[-1][1], choice.batch)
            else:
                spans.append((choice.backend, spans[-1][2] + 1 if spans else 1, choice.batch))
        return ", ".join(
            [f"{name} at batch {low}{f' to {high}' if high > low else ''}" for name, low, high in spans[:-1]]
            + [f"{spans[-1][0]} from batch {spans[-1][1]} on"]
        )


def machine_of(backends: Iterable[str], device: int) -> dict[str, str | None]:
    """Return what the speed of `backends` depends on, as it is here."""
    names = dict.fromkeys(name for backend in backends for name in BACKENDS[backend].depends_on)
    for backend in backends:
        # TensorRT's version may be known of the imported module alone. What does not import is told by opening it.
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            importlib.import_module(BACKENDS[backend].installed or BACKENDS[backend].package)
    found: dict[str, str | None] = {"processor": processor(), "cores": str(n_cores())}
    if "gpu" in names:
        graphics = gpu(device)
        found |= {"gpu": graphics["GPU"], "driver": graphics["driver"]}
    found |= versions(tuple(name for name in names if name not in found))
    return {name: found[name] for name in names}


def clause(name: str, there: str | None, here: str | None, what: str) -> str:
    """Say how `name` differs between what was measured there and this machine."""
    return f"{name} is {there or 'missing'} in the {what} and {here or 'missing'} here"


def record_folder(bundle: Bundle) -> Path:
    """Return where the records of `bundle` lie."""
    return EngineStore(bundle=bundle).folder / "fastest"


def _seal(data: dict[str, Any]) -> str:
    """Return the digest of a record, as `sjepa_deploy.files.seal` does but with the spaces of the first records."""
    return bytes_hash(json.dumps(data | {"digest": ""}, sort_keys=True).encode())


def _read(file: Path, mend: str) -> FastestRecord:
    try:
        data = load_json(file.read_bytes(), finite=False)
        record = decode(FastestRecord, data)
    except (OSError, ValueError) as e:
        reason = str(e) if isinstance(e, DecodeError) else f"it is not readable as JSON ({e})"
        raise BackendError(f"The record {file} is damaged: {reason}.", f"Delete it. {mend}") from e
    if record.digest != _seal(data):
        raise BackendError(f"The record {file} was changed after it was kept (its digest differs).", f"Delete it. {mend}")
    return record


def find(bundle: Bundle, precision: RunPrecision, device: int = 0) -> FastestRecord:
    """Return the newest record in `bundle` for `precision` that was kept on such a machine.

    Raises
    ------
    BackendError
        If there is none, or one is damaged. The message names what differs, and the command that measures.
    """
    mend = f"Measure here with: sjepa-bench {bundle.path} --keep-fastest --precision {precision}"
    records = [record for file in record_folder(bundle).glob("*.json") if (record := _read(file, mend)).precision == precision]
    if not records:
        raise BackendError(f"The bundle {bundle.path} has no record of the fastest backends in {precision}.", mend)
    nearest: list[str] = []
    for record in sorted(records, key=lambda r: r.created, reverse=True):
        differs = _differences(record, bundle, device)
        if not differs:
            return record
        nearest = differs if not nearest or len(differs) < len(nearest) else nearest
    raise BackendError(f"The record of the fastest backends in {precision} is stale: {'; '.join(nearest)}.", mend)


def _differences(record: FastestRecord, bundle: Bundle, device: int) -> list[str]:
    """Return one clause for everything that is not as it was when `record` was kept."""
    found = []
    if record.bundle != bundle.manifest.digest:
        found.append(clause("the bundle's digest", record.bundle[:12], bundle.manifest.digest[:12], "record"))
    if unknown := [name for name in record.backends if name not in BACKENDS]:
        return [*found, f"{unknown[0]} is no backend of this release"]
    here = machine_of(record.backends, device)
    return found + [clause(n, record.machine.get(n), v, "record") for n, v in here.items() if record.machine.get(n) != v]


class FastestBackend(Backend):
    """Each batch size on the backend that was measured to be the fastest on this machine, see `FastestRecord.backend_at`.

    All that were chosen are opened at once, with the same options. Outputs of different backends differ within the tolerance of
    the precision.

    What a call offers, e.g. `input_buffer`, is what the backend for its batch size offers.

    Attributes
    ----------
    record : FastestRecord
        What was measured and chosen.

    Raises
    ------
    BackendError
        If the bundle has no record of this machine, or a backend that it names cannot be opened.
    """

    name = FASTEST_BACKEND

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions) -> None:
        graph = bundle.graph(precision)
        self.precision = precision
        self.record = find(bundle, precision, options.device)
        backends: dict[str, Backend] = {}
        with contextlib.ExitStack() as opened:
            for name in self.record.backends:
                try:
                    backends[name] = opened.enter_context(closing(open_backend(bundle, name, precision, options)))
                except SjepaError as e:
                    raise BackendError(f"{name}, the fastest for some batches, cannot be opened: {e.problem}", e.mend) from e
            self._closing = opened.pop_all()
        sizes = range(graph.static_batch or 1, graph.max_batch + 1)
        self._at = {batch: backends[self.record.backend_at(batch)] for batch in sizes}
        self._largest = self._at[graph.max_batch]

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times). The result may be overwritten by the next call."""
        return self._for(len(eeg)).run(eeg)

    def _for(self, batch: int) -> Backend:
        """Return what runs `batch` windows. The backend for the largest batch refuses larger ones."""
        return self._at.get(batch, self._largest)

    def run_on_gpu(self, eeg: Any) -> FloatArray:
        """Run the model on an array on the GPU, if the backend for its batch size reads one."""
        shape = eeg.shape if hasattr(eeg, "shape") else eeg.__cuda_array_interface__["shape"]
        return self._for(shape[0]).run_on_gpu(eeg)

    def input_buffer(self, batch: int) -> FloatArray | None:
        """Return the buffer that `run` reads at this batch size, or None if there is none."""
        return self._for(batch).input_buffer(batch)

    def warmup(self, batches: tuple[int, ...] = (1,), n_runs: int = 10) -> None:
        """Prepare each of `batches` on its backend."""
        for batch in batches:
            self._for(batch).warmup((batch,), n_runs)

    def activate(self) -> None:
        """Set what the backends need for the whole process."""
        for backend in dict.fromkeys(self._at.values()):
            backend.activate()

    def split(self, eeg: FloatArray, n: int) -> Split | None:
        """Return where the time of `n` calls goes, if the backend for this batch size can tell."""
        return self._for(len(eeg)).split(eeg, n)

    def close(self) -> None:
        """Release all of them."""
        self._closing.close()
