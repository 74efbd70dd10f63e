"""The protocol of a backend, and the table of those that exist."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, MissingDependencyError
from sjepa_deploy.spec import Precision

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """What a user may ask of a backend.

    Attributes
    ----------
    n_threads : int or None
        Threads that one call may use on the CPU. None: one for PreLocal and PostLocal, which gain nothing from more, and all
        cores for models with the transformer.
    """

    n_threads: int | None = None


@runtime_checkable
class Backend(Protocol):
    """Something that runs the graph of one bundle.

    `run` takes C-contiguous float32 windows (batch, n_chans, n_times) of an allowed batch size and returns the outputs
    (batch, ...) in float32. It may return the same buffer at every call.
    """

    name: str
    precision: Precision

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`."""
        ...

    def close(self) -> None:
        """Release what the backend holds."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Where a backend is found and what it needs.

    Attributes
    ----------
    target : str
        "module:Class", imported when the backend is asked for.
    package : str
        What must be importable.
    extra : str
        Extra of sjepa-deploy that installs it.
    """

    target: str
    package: str
    extra: str

    def why_not(self) -> MissingDependencyError | None:
        """Return why the backend cannot be imported here, or None if it can."""
        return None if importlib.util.find_spec(self.package) else MissingDependencyError(self.package, self.extra)


BACKENDS: dict[str, BackendEntry] = {
    "ort-cpu": BackendEntry(target="sjepa_deploy.runtime.ort:OrtCpuBackend", package="onnxruntime", extra=""),
    "torch": BackendEntry(target="sjepa_deploy.runtime.reference:TorchBackend", package="torch", extra="export"),
}
"""Every backend by name."""

DEFAULT_BACKEND = "ort-cpu"


def open_backend(bundle: Bundle, name: str, precision: Precision, options: BackendOptions | None = None) -> Backend:
    """Load the backend `name` for the graph of `precision`.

    Raises
    ------
    BackendError
        If there is no such backend, or it cannot run this graph here.
    MissingDependencyError
        If what it needs is not installed.
    """
    if name not in BACKENDS:
        raise BackendError(f"{name!r} is not a backend.", f"Use one of {', '.join(BACKENDS)}.")
    if missing := BACKENDS[name].why_not():
        raise missing
    module, _, cls = BACKENDS[name].target.partition(":")
    backend: Backend = getattr(importlib.import_module(module), cls)(bundle, precision, options or BackendOptions())
    return backend


def why_not(bundle: Bundle, name: str, precision: Precision) -> str | None:
    """Return why the backend `name` cannot run the graph of `precision` here, or None if it can."""
    try:
        open_backend(bundle, name, precision).close()
    except (BackendError, MissingDependencyError) as e:
        return e.problem
    return None
