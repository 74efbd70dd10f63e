"""Tells the newest state of a decoder to Prometheus."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)

from sjepa_deploy.runtime.watch.snapshot import STREAM_STATES


class Newest(Protocol):
    """Holds the newest state: a `Feed` of the server."""

    facts: dict[str, Any]
    state: dict[str, Any]

    @property
    def silence(self) -> float:
        """Return the seconds since the last state."""
        ...

    @property
    def streams(self) -> int:
        """Return the number of pages that are open."""
        ...

    def recent(self, n: int) -> dict[str, list[Any]]:
        """Return the newest `n` decisions by column."""
        ...


class Metrics:
    """Turns the newest state into Prometheus metrics when they are collected."""

    def __init__(self, feed: Newest) -> None:
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; none before the first state."""
        facts, state = self._feed.facts, self._feed.state
        if not state:
            return
        info = {name: facts[name] for name in ("bundle", "bundle_hash", "backend", "source")}
        yield InfoMetricFamily("sjepa_stream", "What is decoded, and with what", info)
        states: dict[str, bool] = {name: name == state["state"] for name in STREAM_STATES}
        yield StateSetMetricFamily("sjepa_stream_state", "What the stream is doing", states)
        states_of = CounterMetricFamily("sjepa_decision_states", "Windows in each state of the decision layer", labels=["state"])
        for name, n in state["states"].items():
            states_of.add_metric([name], n)
        yield states_of
        yield CounterMetricFamily("sjepa_windows", "Windows that a decision was due for", state["windows"])
        yield CounterMetricFamily("sjepa_decisions", "Decisions", state["decisions"])
        yield CounterMetricFamily(
            "sjepa_deadline_misses", "Windows without a decision of their own by their deadline", state["misses"]
        )
        skips = CounterMetricFamily("sjepa_windows_skipped", "Windows without a decision", labels=["reason"])
        for reason, n in state["skips"].items():
            skips.add_metric([reason], n)
        yield skips
        for name, n in state["counters"].items():
            yield CounterMetricFamily(f"sjepa_{re.sub(r'[^a-z0-9]+', '_', name.lower())}", name.capitalize(), n)
        yield from self._times(facts, state)
        yield from self._channels(facts, state)
        yield GaugeMetricFamily("sjepa_uptime_seconds", "Time since the start", state["uptime"])
        yield GaugeMetricFamily("sjepa_resident_memory_bytes", "Memory of the decoder's process", state["memory"])
        yield GaugeMetricFamily("sjepa_dashboard_pages", "Pages that are open", self._feed.streams)
        yield GaugeMetricFamily("sjepa_state_age_seconds", "Time since the decoder's process was last heard", self._feed.silence)

    @staticmethod
    def _times(facts: dict[str, Any], state: dict[str, Any]) -> Iterator[Metric]:
        for name, what in (
            ("latency", "From the arrival of a window's newest sample to the decision"),
            ("decision_age", "From the stamp of a window's newest sample to the decision"),
        ):
            times = state[name.removeprefix("decision_")]
            upper = itertools.accumulate(times["counts"])
            buckets = list(zip([*map(str, facts["edges"]), "+Inf"], upper, strict=True))
            yield HistogramMetricFamily(f"sjepa_{name}_seconds", what, buckets, times["sum"])
        yield GaugeMetricFamily("sjepa_latency_max_seconds", "Longest latency since the start", _or_nan(state["latency"]["max"]))
        age = GaugeMetricFamily("sjepa_age_seconds", "Age of the newest decisions", labels=["quantile"])
        for quantile, name in (("0.5", "p50"), ("0.99", "p99")):
            age.add_metric([quantile], _or_nan(state["age"][name]))
        yield age
        yield GaugeMetricFamily("sjepa_age_max_seconds", "Largest age since the start", _or_nan(state["age"]["max"]))
        yield GaugeMetricFamily("sjepa_deadline_seconds", "Age at which a decision misses its deadline", facts["deadline"])
        yield GaugeMetricFamily("sjepa_hop_seconds", "From one window to the next", facts["hop"])
        run = "Longest run of missed deadlines since the start"
        yield GaugeMetricFamily("sjepa_longest_miss_run", run, state["longest_miss_run"])
        yield GaugeMetricFamily("sjepa_silence_seconds", "Time since a sample was received", _or_nan(state["silence"]))

    def _channels(self, facts: dict[str, Any], state: dict[str, Any]) -> Iterator[Metric]:
        channels, names = state["channels"], facts["ch_names"]
        counts = GaugeMetricFamily("sjepa_channels", "Channels by what is wrong with them", labels=["quality"])
        for code, name in enumerate(facts["channel_states"]):
            counts.add_metric([name], channels["state"].count(code))
        yield counts
        yield GaugeMetricFamily("sjepa_channels_repaired", "Channels that are interpolated", sum(channels["repaired"]))
        rms = GaugeMetricFamily("sjepa_channel_rms", f"Root mean square in {facts['unit']}", labels=["channel"])
        for name, value in zip(names, channels["rms"], strict=True):
            rms.add_metric([name], _or_nan(value))
        yield rms
        newest = GaugeMetricFamily("sjepa_prediction", "The newest decision", labels=["output"])
        for rows in self._feed.recent(1).get("prediction", []):
            for name, value in zip(facts["output_names"], rows, strict=True):
                newest.add_metric([name], _or_nan(value))
        yield newest


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
