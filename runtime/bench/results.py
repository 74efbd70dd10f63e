"""What `sjepa-bench` found: the dataclasses of a benchmark report, and the two files that it is kept in.

``NAME.json`` holds a `BenchReport` (``sjepa_deploy/assets/benchmark.schema.json`` describes it) and ``NAME.npz`` the raw samples
of every cell, from which each figure can be computed again. Latencies are in microseconds, instants in seconds.

Arrays of a cell in the ``.npz``, one value a call (one a window in open loop), by `Cell.id`:

======================  ==================================================================================================
``ID.latency_us``       what the percentiles are of: the call, or in open loop the time from due to done
``ID.block``            number of the block that the sample belongs to
``ID.at_s``             open loop: when the window was due, from the start of the run
``ID.service_us``       open loop: the call alone, without the wait behind other windows
======================  ==================================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from sjepa_deploy.parity import NOT_FINITE, ParityResult
from sjepa_deploy.runtime.backend import Split
from sjepa_deploy.runtime.machine import NOT_READ, Environment, MachineState
from sjepa_deploy.spec import RunPrecision, Variant

SCHEMA_VERSION = 1

Scenario = Literal["back-to-back", "paced", "streams", "throughput", "cold-start"]
"""Closed loop; open loop of one stream; open loop of many streams, batched; closed loop over batch sizes; a new process."""

SCENARIOS: tuple[Scenario, ...] = ("back-to-back", "paced", "streams", "throughput", "cold-start")

HARNESS = "nothing"
"""Name of the backend that does nothing: what measuring costs."""

INTERRUPTED = "It was interrupted."

PERCENTS = (50.0, 90.0, 95.0, 99.0, 99.9)

Samples = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % confidence interval.

    Attributes
    ----------
    value : float
        The figure.
    low, high : float or None
        Bounds; None where too few blocks were run to tell.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """One percentile of the pooled samples of a cell.

    Attributes
    ----------
    percent : float
        Which, e.g. 99.9.
    value : Estimate or None
        In microseconds; None where there are too few samples to say.
    n_needed : int
        Samples that it needs.
    """

    percent: float
    value: Estimate | None
    n_needed: int


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The distribution of the latencies of a cell, in microseconds.

    Attributes
    ----------
    n, n_blocks : int
        Samples, and blocks that they were taken in.
    percentiles : tuple of Percentile
        p50, p90, p95, p99 and p99.9.
    min_us, mean_us, max_us : float
        Of all samples.
    jitter_us : float or None
        Standard deviation of the interval between the outputs of two windows in a row; open loop only.
    stable : bool
        Whether the warm-up ended with latencies that no longer fell or rose.
    drifting : bool
        Whether the medians of the blocks rise or fall over the run (Mann-Kendall, 1 %).
    """

    n: int
    n_blocks: int
    percentiles: tuple[Percentile, ...]
    min_us: float
    mean_us: float
    max_us: float
    jitter_us: float | None = None
    stable: bool = True
    drifting: bool = False

    def at(self, percent: float) -> Estimate | None:
        """Return the percentile `percent` in microseconds, or None where there are too few samples."""
        return next((p.value for p in self.percentiles if p.percent == percent), None)


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """How windows that come at a rate were served.

    Attributes
    ----------
    n_due, n_done : int
        Windows that were due, and that were served before the run was given up.
    held : bool
        Whether the backlog stays bounded. Where not, latencies grow with the length of the run and mean nothing: there are none.
    utilization : float
        Time in the backend over the time that the windows take to arrive.
    deadline_s : float
        From due to done.
    missed : int
        Windows that were done later than that.
    longest_run : int
        Most windows missed in a row (of one stream after another, by due time).
    beats : int
        Dummy calls of the keep-warm policy.
    beats_busy : float
        Share of the time that they took.
    cpu : float
        Processor seconds of this process for each second of the run: pacing spins, keep-warm works.
    mean_batch : float
        Windows of a call.
    """

    n_due: int
    n_done: int
    held: bool
    utilization: float
    deadline_s: float
    missed: int
    longest_run: int
    beats: int = 0
    beats_busy: float = 0.0
    cpu: float = 0.0
    mean_batch: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a cold start.

    Attributes
    ----------
    name : str
        "engine build" or "first call, nothing cached" where there is one, before the others; then "process", "import",
        "open bundle", "open backend", "first call", "steady call".
    seconds : Estimate
        Median over the processes, with the smallest and the largest of them as bounds.
    """

    name: str
    seconds: Estimate


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """How long it takes from nothing to decoding, in processes of their own.

    Attributes
    ----------
    n : int
        Processes.
    phases : tuple of Phase
        In order.
    engine : str or None
        "built" or "cached", where the backend has an engine; None where it has none.
    calls_to_steady : int
        Calls until one takes at most 1.5 times the steady call (median over the processes).
    """

    n: int
    phases: tuple[Phase, ...]
    engine: str | None
    calls_to_steady: int


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a backend takes.

    Attributes
    ----------
    host_bytes : int or None
        Largest resident memory of a process that decodes with this backend alone; cold starts only.
    device_bytes : int or None
        Device memory that opening it and calling it at every batch size of parity took.
    joules_per_window : float or None
        Energy of the whole GPU (NVML's counter) over the windows decoded.
    """

    host_bytes: int | None = None
    device_bytes: int | None = None
    joules_per_window: float | None = None


@dataclass(frozen=True, kw_only=True)
class CellKey:
    """What was measured: cells of two reports with equal keys can be compared.

    Attributes
    ----------
    scenario : str
        See `Scenario`.
    bundle : str
        `BundleFacts.label`.
    backend, precision : str
        What ran it.
    batch : int
        Windows of a call; for many streams the most that are batched.
    rate : float or None
        Open loop: windows a second, of each stream.
    n_streams : int or None
        Open loop of many streams: how many.
    keep_warm : bool
        Open loop: whether idle gaps were filled by the keep-warm policy.
    """

    scenario: Scenario
    bundle: str
    backend: str
    precision: RunPrecision
    batch: int = 1
    rate: float | None = None
    n_streams: int | None = None
    keep_warm: bool = False

    @property
    def what(self) -> str:
        """The scenario with its parameters: "paced 100/s keep-warm"."""
        words: list[str] = [self.scenario]
        if self.n_streams is not None:
            words.append(f"{self.n_streams} x")
        if self.rate is not None:
            words.append(f"{self.rate:g}/s")
        if self.scenario in ("throughput", "back-to-back"):
            words.append(f"batch {self.batch}")
        if self.keep_warm:
            words.append("keep-warm")
        return " ".join(words)

    @property
    def label(self) -> str:
        """A name for people: "paced 100/s keep-warm: contextual ort-cpu fp32"."""
        return f"{self.what}: {self.bundle} {self.backend} {self.precision}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes
    ----------
    id : str
        Prefix of its arrays in the ``.npz``.
    key : CellKey
        What was measured.
    parity : bool or None
        `Judgement.passed`; None for the backend that does nothing. Where False the cell is struck out: it is fast and wrong.
    caution : str or None
        `Judgement.caution`.
    latency : Latency or None
        None where the rate was not held, and for cold starts.
    windows_per_s : Estimate or None
        Closed loop: windows over the time in the backend.
    open_loop : OpenLoop or None
        Paced and many streams.
    cold_start : ColdStart or None
        Cold start.
    split : Split or None
        Where the backend can be split.
    resources : Resources
        Memory and energy.
    before, after : MachineState
        Clocks and temperatures before its first block and after its last.
    stolen_cpu : float or None
        Cores that the hypervisor took during its blocks, on average; None where the system does not tell.
    """

    id: str
    key: CellKey
    parity: bool | None
    caution: str | None = None
    latency: Latency | None = None
    windows_per_s: Estimate | None = None
    open_loop: OpenLoop | None = None
    cold_start: ColdStart | None = None
    split: Split | None = None
    resources: Resources = Resources()
    before: MachineState = NOT_READ
    after: MachineState = NOT_READ
    stolen_cpu: float | None = None

    @property
    def struck_out(self) -> bool:
        """Whether the outputs are wrong."""
        return self.parity is False


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many streams a backend holds: p99 within the deadline, and a backlog that stays bounded.

    Attributes
    ----------
    bundle, backend, precision : str
        What ran.
    rate : float
        Windows a second of each stream.
    deadline_s : float
        From due to done.
    n_held : int
        Most streams that were held; 0 if not even one was.
    n_refused : int or None
        Fewest streams that were tried and not held; None if all that were tried were.
    """

    bundle: str
    backend: str
    precision: RunPrecision
    rate: float
    deadline_s: float
    n_held: int
    n_refused: int | None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Parity of one backend, judged in the same run on the same machine.

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
        """Whether the outputs are right, on windows with electrode offsets or at least on those without."""
        return self.result.passed or (self.without_offsets is not None and self.without_offsets.passed)

    @property
    def caution(self) -> str | None:
        """What to know of a backend that passed on windows without electrode offsets only."""
        if self.result.passed or not self.passed:
            return None
        where = "on windows with electrode offsets of millivolts"
        if self.result.max_error == NOT_FINITE:
            return f"Outputs are not finite {where}."
        error, allowed = self.result.max_error, self.result.tolerance
        return f"Outputs differ by {error:.0e} of their scale {where} ({allowed:.0e} is allowed)."


@dataclass(frozen=True, kw_only=True)
class AgePart:
    """One part of the age of a decision.

    Attributes
    ----------
    name : str
        "model", "filters", "window", "hop", "transport", "inference", ...
    seconds : float
        How much it adds.
    source : str
        Where the figure comes from, e.g. "measured: p99, paced 10/s" or "group delay at 10 Hz".
    """

    name: str
    seconds: float
    source: str


@dataclass(frozen=True, kw_only=True)
class DecisionAge:
    """How old the EEG is that a decision rests on, part by part.

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
        """The sum of the parts."""
        return sum(part.seconds for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The backend to use for a bundle on this machine.

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


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What was not measured.

    Attributes
    ----------
    what, reason : str
        E.g. "contextual on tensorrt fp32" and why.
    """

    what: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """A bundle that was measured.

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
        Where the weights come from, or "random".
    """

    label: str
    variant: Variant
    n_chans: int
    n_times: int
    sfreq: float
    digest: str
    weights: str


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Whether the machine was quiet.

    A fixed piece of work (the canary) is timed before every block. Its medians over the run tell whether the machine itself
    became faster or slower.

    Attributes
    ----------
    noisy : bool
        Whether one of the reasons holds.
    reasons : tuple of str
        What was wrong, as sentences.
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
    reasons: tuple[str, ...]
    canary_us: Estimate
    canary_spread: float
    others_cpu: float | None = None
    stolen_cpu: float | None = None


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """One run of ``sjepa-bench``.

    Attributes
    ----------
    schema_version : int
        Version of this description.
    created : str
        When the run began, ISO 8601, UTC.
    seconds : float
        How long it took.
    command : str
        What repeats it.
    seed : int
        Of the order of blocks, the windows and the phases of streams.
    partial : str or None
        Why the run ended before everything was measured; None for a whole one.
    environment : Environment
        Hardware and software.
    noise : Noise or None
        Whether the machine was quiet; None if the run ended before that could be told.
    bundles : tuple of BundleFacts
        What was measured.
    cells : tuple of Cell
        In a fixed order; the first one is the backend that does nothing.
    loop_us : float or None
        What a turn of the measuring loop costs beyond the call that it times.
    parity : tuple of Judgement
        Whether the backends are right.
    capacity : tuple of Capacity
        Streams that are held.
    decision_age : tuple of DecisionAge
        Of the recommended backends.
    recommendations : tuple of Recommendation
        One for each bundle.
    left_out : tuple of LeftOut
        What could not be measured here.
    samples_file : str or None
        Name of the ``.npz`` beside this file.
    """

    schema_version: int
    created: str
    seconds: float
    command: str
    seed: int
    partial: str | None
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

    @property
    def interrupted(self) -> bool:
        """Whether somebody ended the run, rather than its time limit."""
        return self.partial == INTERRUPTED

    def cell(self, key: CellKey) -> Cell | None:
        """Return the cell of `key`, or None."""
        return next((cell for cell in self.cells if cell.key == key), None)


def samples_needed(percent: float) -> int:
    """Return how many samples a percentile needs: five beyond it, as fewer say nothing about where the tail ends."""
    return math.ceil(round(5 / (1 - percent / 100), 6))
