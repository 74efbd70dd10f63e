"""Keeps a monitor up to date with a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.errors import DashboardError, listed
from sjepa_deploy.runtime.live.commands import BadChannels, Executed
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.sources import Chunk, Incident
from sjepa_deploy.runtime.watch.monitor import Monitor
from sjepa_deploy.runtime.watch.snapshot import StreamFacts, StreamState
from sjepa_deploy.runtime.watch.traces import MOST_CHANNELS, Traces, spread_over

QUALITY_EVERY_S = 0.5
"""Seconds from one look at the channels to the next."""

OVERDUE_S, OVERDUE_HOPS = 5.0, 3
"""Seconds, and hops, that a decision may be late once the window should be whole: then samples come and no decisions do."""

_STATES: dict[str, StreamState] = {"lost": "reconnecting", "silent": "silent"}


def watch(decoder: Decoder, traces: Sequence[str] | None = None) -> Monitor:
    """Return a monitor that follows `decoder` from now on.

    Parameters
    ----------
    decoder : Decoder
        The decoder.
    traces : sequence of str or None
        Channels of the stream whose samples are kept for drawing, at most 32, in any case of letters. None takes 8, spread over
        those that the model uses; an empty one takes none.

    Raises
    ------
    DashboardError
        If the stream has no such channel, or there are too many.
    """
    return _Watcher(decoder, traces).monitor


class _Watcher:
    def __init__(self, decoder: Decoder, traces: Sequence[str] | None) -> None:
        spec, info = decoder.spec, decoder.source.info
        names = spec.class_names or tuple(f"{spec.output_name}_{i}" for i in range(spec.n_outputs))
        assert spec.ch_names is not None, "the contract was checked"
        self._decoder = decoder
        layer, events = decoder.layer, decoder.events
        columns = _columns(info.ch_names, spread_over(decoder.windows.ch_names) if traces is None else traces)
        self.monitor = Monitor(
            StreamFacts(
                **self._of_bundle(),
                source=info.name,
                ch_names=spec.ch_names,
                positions=spec.positions,
                sfreq=spec.sfreq,
                unit=spec.unit,
                hop=decoder.hop / spec.sfreq,
                deadline=decoder.deadline,
                overdue=None  # nobody knows when the next event is
                if events is not None
                else (spec.n_times + max(OVERDUE_S * spec.sfreq, OVERDUE_HOPS * decoder.hop)) / spec.sfreq,
                output_names=() if spec.variant == "base" else names,
                class_names=() if layer is None else layer.class_names,
                events=None if events is None else events.names,
                source_names=decoder.windows.ch_names,
                trace_names=tuple(info.ch_names[column] for column in columns),
                trace_unit=info.unit,
            ),
            decoder.counters,
            clock=decoder.source.clock,
            traces=Traces(columns),
        )
        self._quality_at = -np.inf
        column = {name.casefold(): i for i, name in enumerate(decoder.windows.ch_names)}
        self._columns = np.array([column.get(name.casefold(), -1) for name in spec.ch_names])
        self._ch_names = spec.ch_names
        decoder.on_decision(self.monitor.decided)
        decoder.on_undecided(self.monitor.left)
        decoder.on_chunk(self._received)
        decoder.on_incident(self._happened)
        decoder.on_command(self._executed)
        if events is not None:
            wants = events.wants
            decoder.on_event(lambda event: self.monitor.marked(event, wanted=wants(event.description)))

    def _of_bundle(self) -> dict[str, Any]:
        """Return the facts that another bundle changes."""
        predict, layer = self._decoder.predict, self._decoder.layer
        return {
            "bundle": predict.bundle.path.name,
            "bundle_hash": predict.bundle.manifest.digest,
            "backend": predict.backend.name,
            "random_weights": predict.bundle.manifest.weights.random,
            "layer": None if layer is None else layer.description.name,
        }

    def _received(self, chunk: Chunk) -> None:
        monitor, windows = self.monitor, self._decoder.windows
        monitor.received(chunk.received, paused=self._decoder.paused)
        monitor.traces.take(chunk.stamps, chunk.samples, windows.offset)
        if chunk.received - self._quality_at >= QUALITY_EVERY_S:
            self._quality_at = chunk.received
            state = np.append(windows.codes, ChannelState.MISSING)[self._columns]
            repaired = np.isin(self._ch_names, windows.interpolated)
            monitor.set_quality(state, windows.eeg()[0].std(axis=1), repaired)

    def _executed(self, executed: Executed) -> None:
        if isinstance(executed.command, BadChannels) and executed.reply.accepted:
            self.monitor.named(executed.command.names)

    def _happened(self, incident: Incident) -> None:
        self.monitor.happened(incident)
        if incident.kind == "bundle":
            self.monitor.facts = dataclasses.replace(self.monitor.facts, **self._of_bundle())
        if incident.kind in _STATES:
            self.monitor.set_state(_STATES[incident.kind])


def _columns(ch_names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return the places of channels in a stream."""
    place = {name.casefold(): i for i, name in enumerate(ch_names)}
    if lacking := [name for name in wanted if name.casefold() not in place]:
        raise DashboardError(f"The stream has no channel {lacking[0]}.", f"It has {listed(ch_names, 40)}.")
    if len(wanted) > MOST_CHANNELS:
        raise DashboardError(f"{len(wanted)} channels cannot be drawn.", f"Name at most {MOST_CHANNELS} of them.")
    return [place[name.casefold()] for name in wanted]
