"""Describes a benchmark report: the cells that were measured, and what was concluded from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sjepa_deploy.parity import NOT_FINITE, ParityResult
from sjepa_deploy.runtime.bench.cells import Capacity, Cell, CellKey, Estimate
from sjepa_deploy.runtime.machine import Environment
from sjepa_deploy.spec import RunPrecision, Variant

SCHEMA_VERSION = 2
"""Schema version of the file of a report. Version 1 had sentences in place of kinds and values."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Holds the parity of one backend, judged in the same run on the same machine.

    Attributes
    ----------
    bundle : str
        `BundleFacts.label`.
    result : ParityResult
        What was found on every window of the reference.
    without_offsets : ParityResult or None
        Where that failed, worst on a window with electrode offsets: what was found on those without. A high-pass removes them,
        and float32 loses digits on them (PyTorch's does; graphs of this toolkit subtract them first).
    """

    bundle: str
    result: ParityResult
    without_offsets: ParityResult | None = None

    @property
    def passed(self) -> bool:
        """Return whether the outputs are right, on windows with electrode offsets or at least on those without."""
        return self.result.passed or (self.without_offsets is not None and self.without_offsets.passed)

    @property
    def caution(self) -> str | None:
        """Return a sentence about a backend that passed only on windows without electrode offsets; None for others."""
        if self.result.passed or not self.passed:
            return None
        where = "on windows with electrode offsets of millivolts"
        if self.result.max_error == NOT_FINITE:
            return f"Outputs are not finite {where}."
        error, allowed = self.result.max_error, self.result.tolerance
        return f"Outputs differ by {error:.0e} of their scale {where} ({allowed:.0e} is allowed)."


@dataclass(frozen=True, kw_only=True)
class AgePart:
    """Holds one part of the age of a decision.

    Attributes
    ----------
    name : str
        "window", "model", "hop", "transport", "inference", and the name of each step that delays ("band-pass", "resample").
    seconds : float
        Seconds that the part adds.
    source : str
        Source of the figure, e.g. "measured: p99, paced 10/s" or "group delay at 10 Hz".
    """

    name: str
    seconds: float
    source: str


@dataclass(frozen=True, kw_only=True)
class DecisionAge:
    """Says how old the EEG is that a decision rests on, part by part.

    Attributes
    ----------
    bundle, backend, precision : str
        What decodes.
    parts : tuple of AgePart
        In the order of the signal.
    """

    bundle: str
    backend: str
    precision: RunPrecision
    parts: tuple[AgePart, ...]

    @property
    def total_s(self) -> float:
        """Return the sum of the parts."""
        return sum(part.seconds for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Names the backend to use for a bundle on this machine.

    Attributes
    ----------
    bundle, backend, precision : str
        The choice.
    why : str
        Reasons, as sentences.
    """

    bundle: str
    backend: str
    precision: RunPrecision
    why: str


LeftOutKind = Literal["not here", "on request", "too late", "batch size", "failed", "ages"]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Names what was not measured, and why.

    Attributes
    ----------
    what : tuple of str
        Backends, or cells: "contextual on tensorrt fp32".
    reason : str
        Why, in a sentence.
    kind : str or None
        "not here": the machine has not what it needs. "on request": it is measured only if it is named. "too late": the time was
        up. "batch size": its graph takes other batches. "failed": it raised an error. "ages": the ages of decisions, which
        SciPy computes. None in reports of schema version 1.
    """

    what: tuple[str, ...]
    reason: str
    kind: LeftOutKind | None = None

    @property
    def label(self) -> str:
        """Return a readable name of all that was left out for this reason."""
        return ", ".join(self.what)


EndingKind = Literal["interrupted", "time limit", "opened late", "parts lost", "told"]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Says why a run ended before everything was measured. `sjepa_deploy.runtime.bench.words` makes the sentence.

    Attributes
    ----------
    kind : str
        "interrupted": somebody ended the run. "time limit": `limit` passed after `n` of `of` blocks. "opened late": half of the
        limit passed before all backends were open. "parts lost": `n` parts of a run in parts gave no result. "told": a sentence
        of a report of schema version 1.
    limit : float or None
        Seconds.
    n, of : int or None
        See `kind`.
    run : int or None
        Number of the run that ended so, of those that were merged.
    told : str
        See `kind`.
    """

    kind: EndingKind
    limit: float | None = None
    n: int | None = None
    of: int | None = None
    run: int | None = None
    told: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Tells the choices of a backend that its speed depends on.

    Attributes
    ----------
    backend, precision : str
        What ran.
    setting : str
        The choices: `sjepa_deploy.runtime.backend.Backend.setting`.
    """

    backend: str
    precision: RunPrecision
    setting: str


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """Describes a bundle that was measured.

    Attributes
    ----------
    label : str
        Its name in this report.
    variant : str
        Architecture.
    n_chans, n_times : int
        Shape of a window.
    sfreq : float
        Sampling rate in Hz.
    digest : str
        sha256 of its manifest, which holds the hash of every file.
    weights : str
        Source of the weights, or "random".
    """

    label: str
    variant: Variant
    n_chans: int
    n_times: int
    sfreq: float
    digest: str
    weights: str


DisturbanceKind = Literal["work varied", "work drifted", "others busy", "cores stolen", "cells robbed", "told"]


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Names what disturbed a machine while the machine was measured. `sjepa_deploy.runtime.bench.words` makes the sentence.

    Attributes
    ----------
    kind : str
        "work varied": the canary's times spread by `value`, their interquartile range over the median. "work drifted": they
        changed by `value`, relative to the start of the run. "others busy", "cores stolen": other processes, the hypervisor took
        `value` cores on average. "cells robbed": the hypervisor took much from `n_cells` cells, `value` cores from the worst of
        them. "told": a sentence of a report of schema version 1.
    value : float
        See `kind`; of merged runs that of the worst.
    cell : str or None
        Label of the worst cell.
    n_cells, n_known : int or None
        How many cells were robbed, and of how many that is known.
    runs : tuple of int
        Numbers of the runs that were disturbed so, of those that were merged.
    worst_run : int or None
        The run that `value` is of.
    told : str
        See `kind`.
    """

    kind: DisturbanceKind
    value: float = 0.0
    cell: str | None = None
    n_cells: int | None = None
    n_known: int | None = None
    runs: tuple[int, ...] = ()
    worst_run: int | None = None
    told: str = ""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Says whether the machine was quiet.

    A fixed piece of work (the canary) is timed before every block. Its medians over the run tell whether the machine itself
    became faster or slower.

    Attributes
    ----------
    noisy : bool
        Whether one of the reasons holds.
    reasons : tuple of Disturbance
        What was wrong.
    canary_us : Estimate
        Median of the canary, with its interval.
    canary_spread : float
        Interquartile range of the canary's medians over blocks, relative to their median.
    others_cpu : float or None
        Cores that other processes kept busy, on average.
    stolen_cpu : float or None
        Cores that the hypervisor took, on average.
    """

    noisy: bool
    reasons: tuple[Disturbance, ...]
    canary_us: Estimate
    canary_spread: float
    others_cpu: float | None = None
    stolen_cpu: float | None = None


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Holds one run of ``sjepa-bench``.

    Attributes
    ----------
    schema_version : int
        Version of this description.
    created : str
        When the run began, ISO 8601, UTC.
    seconds : float
        Seconds that the run took.
    command : str
        Command that repeats the run.
    seed : int
        Of the order of blocks, the windows and the phases of streams.
    partial : tuple of Ending
        Why the run ended before everything was measured; empty for a whole one.
    environment : Environment
        Hardware and software.
    noise : Noise or None
        Whether the machine was quiet; None if the run ended before that could be told.
    bundles : tuple of BundleFacts
        What was measured.
    cells : tuple of Cell
        In a fixed order; the first one is the backend that does nothing.
    loop_us : float or None
        Cost of one pass of the measuring loop beyond the timed call.
    parity : tuple of Judgement
        Whether the backends are right.
    capacity : tuple of Capacity
        Streams that are held.
    decision_age : tuple of DecisionAge
        Of the recommended backends.
    recommendations : tuple of Recommendation
        One for each bundle.
    left_out : tuple of LeftOut
        Combinations that could not be measured here.
    samples_file : str or None
        Name of the ``.npz`` beside this file.
    settings : tuple of Setting
        Choices of the backends that have any; empty in reports from before they were told.
    """

    schema_version: int
    created: str
    seconds: float
    command: str
    seed: int
    partial: tuple[Ending, ...]
    environment: Environment
    noise: Noise | None
    bundles: tuple[BundleFacts, ...]
    cells: tuple[Cell, ...]
    loop_us: float | None = None
    parity: tuple[Judgement, ...] = ()
    capacity: tuple[Capacity, ...] = ()
    decision_age: tuple[DecisionAge, ...] = ()
    recommendations: tuple[Recommendation, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    samples_file: str | None = None
    settings: tuple[Setting, ...] = ()

    @property
    def interrupted(self) -> bool:
        """Return whether somebody ended the run, rather than its time limit."""
        return any(ending.kind == "interrupted" for ending in self.partial)

    def cell(self, key: CellKey) -> Cell | None:
        """Return the cell of `key`, or None."""
        return next((cell for cell in self.cells if cell.key == key), None)
