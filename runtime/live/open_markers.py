"""Opens sources of markers from addresses: `annotations`, `board`, `channel:NAME`, `every:SECONDS`, `lsl:NAME`, `table:FILE`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sjepa_deploy.eeg.events import read_events
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.markers import ChannelMarkers, MarkerSource, PlannedMarkers, RepeatedMarkers
from sjepa_deploy.runtime.live.sources import ReplaySource, Source

ADDRESSES = (
    "lsl:NAME, lsl:type=Markers, channel:NAME[,mask=255][,debounce=0.005], annotations (of file:RECORDING), table:FILE.tsv (of "
    "a recording or synthetic), board (of brainflow:BOARD), every:SECONDS (of synthetic)"
)


def open_markers(addresses: Sequence[str], source: Source) -> tuple[MarkerSource, ...]:
    """Open sources of markers.

    Parameters
    ----------
    addresses : sequence of str
        "lsl:NAME" or "lsl:type=Markers" (see `sjepa_deploy.runtime.live.lsl.find_stream`), a stream of markers; "channel:NAME", a
        trigger channel of `source`, with ",mask=BITS" and ",debounce=SECONDS" (see `ChannelMarkers`); "annotations", those of the
        recording that `source` plays; "table:FILE.tsv", those of a table (see `sjepa_deploy.eeg.events.read_events`), for a
        recording or the synthetic source; "board", what was inserted beside the samples of a BrainFlow board; "every:SECONDS",
        planted events called "event" for the synthetic source. Empty: the annotations of a recording.
    source : Source
        Source of the samples, just opened.

    Raises
    ------
    StreamError
        If there are no such markers, or the source cannot have them. For a stream that is not there the message lists those
        that are.
    MissingDependencyError
        If pylsl is not installed.
    """
    if not addresses:
        if not (isinstance(source, ReplaySource) and source.plan is not None):
            raise StreamError("Nothing says where the events come from.", f"Name their markers with --markers: {ADDRESSES}.")
        addresses = ("annotations",)
    with contextlib.ExitStack() as opened:
        markers = []
        for address in addresses:
            markers.append(_open(address, source))
            opened.callback(markers[-1].close)
        opened.pop_all()
    return tuple(markers)


def _open(address: str, source: Source) -> MarkerSource:
    kind, _, what = address.partition(":")
    if address == "annotations":
        if not (isinstance(source, ReplaySource) and source.plan is not None):
            raise StreamError(f"{source.info.name} has no annotations: it is no recording.", f"Use {ADDRESSES}.")
        return PlannedMarkers(source.plan, source.clock)
    if kind == "table" and what:
        if not isinstance(source, ReplaySource):
            raise StreamError(f"{source.info.name} is no recording: nobody knows its events beforehand.", f"Use {ADDRESSES}.")
        table = read_events(Path(what))
        return PlannedMarkers(list(zip(source.when(table.onset).tolist(), table.description, strict=True)), source.clock)
    if address == "board":
        from sjepa_deploy.runtime.live.brainflow import BrainFlowSource, InsertedMarkers

        if not isinstance(source, BrainFlowSource):
            raise StreamError(f"{source.info.name} is no board of BrainFlow.", f"Use {ADDRESSES}.")
        return InsertedMarkers(source)
    if kind == "channel" and what:
        return _open_channel(what, source)
    if kind == "every" and what:
        if not (isinstance(source, ReplaySource) and source.plan is None):
            raise StreamError("Only the synthetic source takes planted events.", f"Use {ADDRESSES}.")
        try:
            seconds = float(what)
        except ValueError:
            raise StreamError(f"{what!r} is no number of seconds.", "Write for example every:2.") from None
        return RepeatedMarkers(seconds, source.clock)
    if kind == "lsl" and what:
        from sjepa_deploy.runtime.live.lsl_markers import LslMarkers

        return LslMarkers(what)
    raise StreamError(f"{address!r} is no source of markers.", f"Use one of {ADDRESSES}.")


def _open_channel(text: str, source: Source) -> ChannelMarkers:
    """Open a trigger channel: ``NAME[,mask=BITS][,debounce=SECONDS]``."""
    name, *rest = text.split(",")
    known: dict[str, Callable[[str], Any]] = {"mask": lambda value: int(value, 0), "debounce": float}
    given: dict[str, Any] = {}
    for part in rest:
        key, _, value = part.partition("=")
        try:
            given[key.strip()] = known[key.strip()](value)
        except (KeyError, ValueError):
            raise StreamError(
                f"{part.strip()!r} says nothing of a trigger channel.", "Write for example channel:STI,mask=0xFF,debounce=0.005."
            ) from None
    return ChannelMarkers(source.info, name, **given)
