"""Describes a stream or a recording: channels, rate, unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sjepa_deploy.eeg.units import check_unit
from sjepa_deploy.errors import StreamError
from sjepa_deploy.spec import Unit


@dataclass(frozen=True, kw_only=True)
class StreamInfo:
    """Holds what a source says of its stream.

    Attributes
    ----------
    name : str
        Name for messages and records.
    ch_names : tuple of str
        Channels in the order of the samples.
    sfreq : float
        Nominal rate in Hz.
    unit : {"nV", "uV", "mV", "V"}
        Unit of the samples.
    other_units : tuple of str
        Channels that are in another unit than this, or in none: they cannot be decoded.
    notes : tuple of str
        What the source has to tell people, such as a unit that was overridden.
    """

    name: str
    ch_names: tuple[str, ...]
    sfreq: float
    unit: Unit
    other_units: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sfreq) and self.sfreq > 0):
            raise StreamError(f"Stream {self.name} has no nominal rate ({self.sfreq}).", "Only regular streams can be decoded.")
        check_unit(self.unit, StreamError)
