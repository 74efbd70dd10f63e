"""Describes a stream or a recording: channels, rate, unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sjepa_deploy.errors import StreamError
from sjepa_deploy.spec import UNITS_IN_VOLTS, Unit


@dataclass(frozen=True, kw_only=True)
class StreamInfo:
    """What a source says of its stream.

    Attributes
    ----------
    name : str
        Name for messages and records.
    ch_names : tuple of str
        Channels in the order of the samples.
    sfreq : float
        Nominal rate in Hz.
    unit : {"uV", "mV", "V"}
        Unit of the samples.
    """

    name: str
    ch_names: tuple[str, ...]
    sfreq: float
    unit: Unit

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sfreq) and self.sfreq > 0):
            raise StreamError(f"Stream {self.name} has no nominal rate ({self.sfreq}).", "Only regular streams can be decoded.")
        if self.unit not in UNITS_IN_VOLTS:
            raise StreamError(f"{self.unit!r} is not a unit.", f"Use one of {', '.join(UNITS_IN_VOLTS)}.")
