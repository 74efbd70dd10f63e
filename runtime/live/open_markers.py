"""Opens sources of markers from their addresses: `annotations`, `channel:NAME`, `every:SECONDS`, `lsl:NAME`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.markers import ChannelMarkers, MarkerSource, PlannedMarkers, RepeatedMarkers
from sjepa_deploy.runtime.live.sources import ReplaySource, Source

ADDRESSES = "lsl:NAME, lsl:type=Markers, channel:NAME, annotations (of file:RECORDING), every:SECONDS (of synthetic)"


def open_markers(addresses: Sequence[str], source: Source) -> tuple[MarkerSource, ...]:
    """Open sources of markers.

    Parameters
    ----------
    addresses : sequence of str
        "lsl:NAME" or "lsl:type=Markers" (see `sjepa_deploy.runtime.live.lsl.find_stream`), a stream of markers; "channel:NAME", a
        trigger channel of `source`; "annotations", those of the recording that `source` plays; "every:SECONDS", planted events
        called "event" for the synthetic source. Empty: the annotations of a recording.
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
    if kind == "channel" and what:
        return ChannelMarkers(source.info, what)
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
