"""How old the EEG is that a decision rests on: what the model, the filters, the hop and the machine add, part by part.

A budget is an upper bound: the whole hop, and the 99th percentiles of what is measured. Its parts stand in the order of the
signal, from the middle of the EEG that the newest token is made of to the decision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sjepa_deploy.errors import MissingDependencyError, SpecError
from sjepa_deploy.runtime.bench_results import AgePart, BenchReport, DecisionAge, Recommendation
from sjepa_deploy.spec import ModelSpec, Preprocessing, RunPrecision

DELAY_AT_HZ = 10.0
"""Frequency that delays of filters are stated at. They differ between frequencies: a 0.5-40 Hz Butterworth filter of order 2 at
128 Hz delays 2 Hz by 34 ms, 10 Hz by 5 ms."""

DEFAULT_HOP = 0.1
"""Seconds from one window to the next where no rate says so."""

LSL_LOOPBACK = AgePart(name="transport", seconds=0.82e-3, source="p99 of LSL on one machine, one sample a push")
"""Measured with 129 channels at 100 Hz between two processes on two cores. An amplifier that sends blocks adds their length."""


def budgets(report: BenchReport, specs: Mapping[str, ModelSpec]) -> tuple[DecisionAge, ...]:
    """Return the budgets of the recommended backends, as their bundles are and with the shortest window on the same weights.

    Inference takes the p99 of the slowest rate at which the backend was paced, back to back where it was not; the hop is the
    time between two windows at that rate.

    Parameters
    ----------
    report : BenchReport
        With recommendations.
    specs : mapping of str to ModelSpec
        The spec of each bundle by its label.

    Raises
    ------
    MissingDependencyError
        If SciPy is not installed.
    """
    found: list[DecisionAge] = []
    for choice in report.recommendations:
        if (measured := _inference(report, choice)) is None:
            continue
        inference, hop = measured
        spec = specs[choice.bundle]
        age = decision_age(
            spec, bundle=choice.bundle, backend=choice.backend, precision=choice.precision, hop=hop, inference=inference
        )
        shorter = low_latency(age, spec)
        found += [age] if shorter is None else [age, shorter]
    return tuple(found)


def _inference(report: BenchReport, choice: Recommendation) -> tuple[AgePart, float] | None:
    """Return what inference adds and the hop that it was measured at; None where nothing has enough samples for a p99."""
    own = (choice.bundle, choice.backend, choice.precision)
    candidates = []
    for cell in report.cells:
        key = cell.key
        plain = key.scenario == "back-to-back" or (key.scenario == "paced" and not key.keep_warm)
        worst = None if cell.latency is None else cell.latency.at(99.0)
        if plain and worst is not None and (key.bundle, key.backend, key.precision) == own:
            candidates.append((key.rate or math.inf, key.batch, worst.value))
    if not candidates:
        return None
    rate, _, worst_us = min(candidates)
    paced = math.isfinite(rate)
    source = f"measured: p99, {f'paced {rate:g}/s' if paced else 'back to back'}"
    return AgePart(name="inference", seconds=worst_us * 1e-6, source=source), 1 / rate if paced else DEFAULT_HOP


def decision_age(
    spec: ModelSpec,
    *,
    bundle: str,
    backend: str,
    precision: RunPrecision,
    hop: float,
    inference: AgePart,
    filters: Sequence[AgePart] | None = None,
    transport: AgePart = LSL_LOOPBACK,
) -> DecisionAge:
    """Return the budget of one model on one backend.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    bundle, backend, precision : str
        What decodes, for people to read.
    hop : float
        Seconds from one window to the next: an event waits for the end of its window this long at most, half of it on average.
    inference, transport : AgePart
        Measured, on this machine where possible.
    filters : sequence of AgePart or None
        Delays of the live filters and of the decimator; None for the causal band-pass that the spec asks for, at its rate.
    """
    span = spec.encoder.span(1)
    window = AgePart(
        name="window",
        seconds=(span - 1) / 2 / spec.sfreq,
        source=f"half of the {span} samples that the newest token is made of",
    )
    tail = AgePart(
        name="model",
        seconds=spec.tail,
        source=f"the newest {spec.n_times - spec.shortest_n_times} of {spec.n_times} samples enter no token",
    )
    wait = AgePart(name="hop", seconds=hop, source=f"at most; {hop / 2:.3g} s on average")
    parts = (window, tail, *(band_pass_delay(spec) if filters is None else filters), wait, transport, inference)
    return DecisionAge(bundle=bundle, backend=backend, precision=precision, parts=parts)


def low_latency(age: DecisionAge, spec: ModelSpec) -> DecisionAge | None:
    """Return the budget of the same weights with the shortest window that has as many tokens; None where `spec` has it already.

    Inference is taken to be as fast: a shorter window is no slower.
    """
    shortest = spec.shortest_n_times
    if shortest == spec.n_times:
        return None
    tail = AgePart(name="model", seconds=0.0, source=f"all {shortest} samples enter a token")
    parts = tuple(tail if part.name == "model" else part for part in age.parts)
    return dataclasses.replace(age, bundle=f"{age.bundle}, --n-times {shortest}", parts=parts)


def band_pass_delay(spec: ModelSpec) -> tuple[AgePart, ...]:
    """Return the delay of the causal band-pass that `spec` asks for, at the model's rate; nothing where it asks for none.

    Raises
    ------
    MissingDependencyError
        If SciPy is not installed.
    """
    sos = butterworth(spec.preprocessing, spec.sfreq)
    return () if sos is None else (delay_part("filters", sos, spec.sfreq),)


def butterworth(preprocessing: Preprocessing, sfreq: float, order: int = 2) -> NDArray[np.float64] | None:
    """Return the second-order sections of the causal Butterworth filter for a band; None for one that is open on both sides.

    Raises
    ------
    MissingDependencyError
        If SciPy is not installed.
    """
    low, high = preprocessing.l_freq, preprocessing.h_freq
    if low is None and high is None:
        return None
    try:
        from scipy.signal import butter  # type: ignore[import-untyped, unused-ignore]
    except ImportError as e:
        raise MissingDependencyError("SciPy", "bench") from e
    kind = "highpass" if high is None else "lowpass" if low is None else "bandpass"
    edges = [edge for edge in (low, high) if edge is not None]
    sos: NDArray[np.float64] = butter(order, edges if len(edges) == 2 else edges[0], kind, fs=sfreq, output="sos")
    return sos


def delay_part(name: str, sos: ArrayLike, sfreq: float, frequency: float = DELAY_AT_HZ) -> AgePart:
    """Return what a filter of second-order sections adds at `frequency`, or at a tenth of `sfreq` where that is lower."""
    frequency = min(frequency, sfreq / 10)
    return AgePart(name=name, seconds=group_delay(sos, sfreq, frequency), source=f"group delay at {frequency:g} Hz")


def group_delay(sos: ArrayLike, sfreq: float, frequency: float) -> float:
    """Return by how many seconds a filter delays the envelope of a rhythm.

    Parameters
    ----------
    sos : array-like, shape (n_sections, 6)
        Second-order sections as SciPy writes them: b0, b1, b2, a0, a1, a2.
    sfreq, frequency : float
        Sampling rate, and the frequency of the rhythm, in Hz.

    Raises
    ------
    SpecError
        If the frequency is not between 0 and half the rate.

    Notes
    -----
    The delay of a polynomial P(z) = sum c_k z^-k is Re(sum k c_k z^-k / P), that of b / a the difference of the two (Oppenheim,
    Schafer 2010, section 5.1.2), that of sections in a row their sum.
    """
    if not 0 < frequency < sfreq / 2:
        raise SpecError(f"{frequency:g} Hz is not between 0 and half of {sfreq:g} Hz.", "Choose another frequency.")
    powers = np.arange(3)
    z = np.exp(-2j * np.pi * frequency / sfreq * powers)
    coefficients = np.asarray(sos, dtype=np.float64).reshape(-1, 2, 3)
    delays = ((coefficients * powers) @ z / (coefficients @ z)).real
    return float((delays[:, 0] - delays[:, 1]).sum()) / sfreq
