"""Keeps a monitor up to date with a decoder."""

from __future__ import annotations

import numpy as np

from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.sources import Chunk, Incident
from sjepa_deploy.runtime.watch.monitor import Monitor, StreamFacts, StreamState

QUALITY_EVERY_S = 0.5
"""Seconds from one look at the channels to the next."""

OVERDUE_S, OVERDUE_HOPS = 5.0, 3
"""Seconds, and hops, that a decision may be late once the window should be whole: then samples come and no decisions do."""

_STATES: dict[str, StreamState] = {"lost": "reconnecting", "silent": "silent"}


def watch(decoder: Decoder) -> Monitor:
    """Return a monitor that follows `decoder` from now on."""
    return _Watcher(decoder).monitor


class _Watcher:
    def __init__(self, decoder: Decoder) -> None:
        spec, manifest = decoder.spec, decoder.predict.bundle.manifest
        names = spec.class_names or tuple(f"{spec.output_name}_{i}" for i in range(spec.n_outputs))
        assert spec.ch_names is not None, "the contract was checked"
        self._decoder = decoder
        self.monitor = Monitor(
            StreamFacts(
                bundle=decoder.predict.bundle.path.name,
                bundle_hash=manifest.digest,
                backend=decoder.predict.backend.name,
                source=decoder.source.info.name,
                ch_names=spec.ch_names,
                positions=spec.positions,
                sfreq=spec.sfreq,
                unit=spec.unit,
                hop=decoder.hop / spec.sfreq,
                deadline=decoder.deadline,
                overdue=None  # nobody knows when the next event is
                if decoder.events is not None
                else (spec.n_times + max(OVERDUE_S * spec.sfreq, OVERDUE_HOPS * decoder.hop)) / spec.sfreq,
                output_names=() if spec.variant == "base" else names,
                random_weights=manifest.weights.random,
            ),
            decoder.counters,
            clock=decoder.source.clock,
        )
        self._quality_at = -np.inf
        column = {name.casefold(): i for i, name in enumerate(decoder.windows.ch_names)}
        self._columns = np.array([column.get(name.casefold(), -1) for name in spec.ch_names])
        self._ch_names = spec.ch_names
        decoder.on_decision(self._decided)
        decoder.on_chunk(self._received)
        decoder.on_incident(self._happened)

    def _decided(self, decision: Decision) -> None:
        if not decision.held:
            self.monitor.decided(decision)

    def _received(self, chunk: Chunk) -> None:
        monitor, windows = self.monitor, self._decoder.windows
        monitor.received(chunk.received)
        if chunk.received - self._quality_at >= QUALITY_EVERY_S:
            self._quality_at = chunk.received
            state = np.append(windows.codes, ChannelState.MISSING)[self._columns]
            repaired = np.isin(self._ch_names, windows.interpolated)
            monitor.set_quality(state, windows.eeg()[0].std(axis=1), repaired)

    def _happened(self, incident: Incident) -> None:
        self.monitor.happened(incident)
        if incident.kind in _STATES:
            self.monitor.set_state(_STATES[incident.kind])
