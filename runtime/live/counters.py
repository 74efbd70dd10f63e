"""Counts what happens to the samples and windows of a stream."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Counters:
    """Counts what happened to every sample and every window.

    ``windows = decisions + held + skipped_late + skipped_gap + skipped_paused + failed``. A decoder of events makes one
    window for each event that can have one: ``events = windows + events_before_start + events_past_end + events_past_history +
    events_doubled + events_ahead`` once it has ended.

    Attributes
    ----------
    samples, samples_lost, samples_bridged : int
        Samples received; missing by the stamps; and of these, made by interpolation.
    samples_repeated, samples_early, samples_flushed, samples_non_finite : int
        Samples left out because they came twice or out of order; dropped because they were old when the stream was opened; and
        values that were NaN or infinite.
    gaps, clock_resets, interruptions, silences : int
        Losses that were not bridged, jumps of the stamps' clock, reconnections, and times that the source fell silent.
    windows : int
        Windows that were due.
    decisions, held : int
        Windows decoded, and windows answered by the last decision because they were late (`late="hold"`).
    skipped_late, skipped_gap, skipped_paused, failed : int
        Windows left out because they were late (`late="skip"`), because samples are missing in them, because the decoder was
        paused, or because the backend failed, or its server did not answer.
    events, events_before_start, events_past_end, events_past_history, events_doubled, events_ahead : int
        Events that came; and of these, events whose windows begin before the first sample, or end after the last one; whose
        markers came when their samples were kept no more; that came twice; and whose stamps are too far ahead of the samples.
    markers_lost : int
        Markers that were left out, as too many waited for the decoder.
    misses, miss_run, longest_misses : int
        Windows without a decision of their own by their deadline; how many of them in a row just now, and at most.
    """

    samples: int = 0
    samples_lost: int = 0
    samples_bridged: int = 0
    samples_repeated: int = 0
    samples_early: int = 0
    samples_flushed: int = 0
    samples_non_finite: int = 0
    gaps: int = 0
    clock_resets: int = 0
    interruptions: int = 0
    silences: int = 0
    windows: int = 0
    decisions: int = 0
    held: int = 0
    skipped_late: int = 0
    skipped_gap: int = 0
    skipped_paused: int = 0
    failed: int = 0
    events: int = 0
    events_before_start: int = 0
    events_past_end: int = 0
    events_past_history: int = 0
    events_doubled: int = 0
    events_ahead: int = 0
    markers_lost: int = 0
    misses: int = 0
    miss_run: int = 0
    longest_misses: int = 0
