"""Reads, fits and filters EEG: recordings, steps of a signal, montages. Offline and live code stand side by side."""

from importlib import import_module as _import_module
from typing import Any as _Any

_PUBLIC = {"prepare": "sjepa_deploy.eeg.prepared", "signal_from_braindecode": "sjepa_deploy.eeg.from_braindecode"}


def __getattr__(name: str) -> _Any:
    """Return a public function: modules of this package are imported by the specification that these functions need."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(_PUBLIC[name]), name)
