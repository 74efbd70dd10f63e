"""Computes the age of the EEG behind a decision: the parts that the model, the filters, the hop and the machine add.

An age is an upper bound: the whole hop, and the 99th percentiles of what is measured. Its parts stand in the order of the
signal, from the middle of the EEG that the newest token is made of to the decision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from sjepa_deploy.eeg.chain import DELAYS_AT_HZ, flows_of
from sjepa_deploy.eeg.steps import Flow
from sjepa_deploy.eeg.steps.rate import ratio_of_rates
from sjepa_deploy.errors import MissingDependencyError
from sjepa_deploy.runtime.bench.results import AgePart, BenchReport, DecisionAge, LeftOut, Recommendation
from sjepa_deploy.spec import ModelSpec, RunPrecision

DELAY_AT_HZ = 10.0
"""Frequency that the delays of filters are stated at. Slower rhythms are delayed more, 2 Hz by 30 ms more at 0.5 to 40 Hz."""

DEFAULT_HOP = 0.1
"""Seconds from one window to the next where no rate says so."""

LSL_LOOPBACK = AgePart(
    name="transport", seconds=1.25e-3, source="p99 from sample to decision, LSL on one machine, one sample a push"
)
"""PreLocal, a decision at every sample of 129 channels at 500 Hz, between two processes of real-time priority on two busy cores:
``benchmarks/results/streaming_every_sample_2-core-cpu_2026-11-25.json``. The decoder's own work and an inference are in it, so
it is an upper bound. An amplifier that sends blocks adds their length."""


def with_decision_ages(report: BenchReport, specs: Mapping[str, ModelSpec]) -> BenchReport:
    """Return `report` with its ages of decisions, or where SciPy is missing with the reason why it has none."""
    others = tuple(left for left in report.left_out if left.kind != "ages")
    try:
        return dataclasses.replace(report, decision_age=decision_ages(report, specs), left_out=others)
    except MissingDependencyError as e:
        missing = LeftOut(what=("ages of decisions",), reason=str(e), kind="ages")
        return dataclasses.replace(report, left_out=(*others, missing))


def decision_ages(report: BenchReport, specs: Mapping[str, ModelSpec]) -> tuple[DecisionAge, ...]:
    """Return the ages of decisions of the recommended backends, with the windows of their bundles and the shortest ones.

    Inference takes the p99 of the slowest rate at which the backend was paced, or the p99 back to back where the backend was not
    paced. The hop is the time between two windows at that rate.

    Parameters
    ----------
    report : BenchReport
        With recommendations.
    specs : mapping of str to ModelSpec
        Specs by the labels of the bundles; those without one are left out.

    Raises
    ------
    MissingDependencyError
        If SciPy is not installed.
    """
    found: list[DecisionAge] = []
    for choice in report.recommendations:
        spec, measured = specs.get(choice.bundle), _inference(report, choice)
        if spec is None or measured is None:
            continue
        inference, hop = measured
        age = decision_age(
            spec, bundle=choice.bundle, backend=choice.backend, precision=choice.precision, hop=hop, inference=inference
        )
        shorter = low_latency(age, spec)
        found += [age] if shorter is None else [age, shorter]
    return tuple(found)


def _inference(report: BenchReport, choice: Recommendation) -> tuple[AgePart, float] | None:
    """Return the part of inference and the hop at which it was measured; None where nothing has enough samples for a p99."""
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
    source_sfreq: float | None = None,
    transport: AgePart = LSL_LOOPBACK,
) -> DecisionAge:
    """Return the age of a decision of one model on one backend.

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
    source_sfreq : float or None
        Rate of the source in Hz; None for the model's.

    Raises
    ------
    StreamError
        If the source is slower than the model.
    MissingDependencyError
        If SciPy, which designs the filters, is not installed.
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
    parts = (window, tail, *filter_delays(spec, source_sfreq or spec.sfreq), wait, transport, inference)
    return DecisionAge(bundle=bundle, backend=backend, precision=precision, parts=parts)


def low_latency(age: DecisionAge, spec: ModelSpec) -> DecisionAge | None:
    """Return the age for the same weights with the shortest window that has as many tokens; None where `spec` has it already.

    Inference is taken to be as fast: a shorter window is no slower.
    """
    shortest = spec.shortest_n_times
    if shortest == spec.n_times:
        return None
    tail = AgePart(name="model", seconds=0.0, source=f"all {shortest} samples enter a token")
    parts = tuple(tail if part.name == "model" else part for part in age.parts)
    return dataclasses.replace(age, bundle=f"{age.bundle}, --n-times {shortest}", parts=parts)


def filter_delays(spec: ModelSpec, sfreq: float) -> tuple[AgePart, ...]:
    """Return the group delay at `DELAY_AT_HZ` of each step that delays the signal, from the code that runs live.

    The delay is stated at the highest of `DELAYS_AT_HZ` up to there that the rates hold.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    sfreq : float
        Rate of the source in Hz.

    Raises
    ------
    StreamError
        If the source is slower than the model.
    MissingDependencyError
        If SciPy is not installed.
    """
    ratio_of_rates(sfreq, spec.sfreq)  # refuses a source that is slower
    held = [hertz for hertz in DELAYS_AT_HZ if hertz <= DELAY_AT_HZ and hertz < 0.4 * min(sfreq, spec.sfreq)]
    if not held:
        return ()
    hertz, signal = held[-1], spec.signal
    flows = flows_of(signal, Flow(ch_names=signal.ch_names or (), sfreq=sfreq, goal=signal.goal))
    delays = [(step.name, step.delay(hertz, flow)) for step, flow in zip(signal.steps, flows, strict=True)]
    source = f"group delay at {hertz:g} Hz"
    return tuple(AgePart(name=name, seconds=seconds, source=source) for name, seconds in delays if seconds > 0)
