"""Describes the cells of a benchmark report, which hold what was measured.

Latencies are in microseconds, instants in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from sjepa_deploy.runtime.backend import Split
from sjepa_deploy.runtime.machine import NOT_READ, MachineState
from sjepa_deploy.spec import RunPrecision

Scenario = Literal["back-to-back", "paced", "streams", "throughput", "cold-start"]
"""Closed loop; open loop of one stream; open loop of many streams, batched; closed loop over batch sizes; a new process."""

SCENARIOS: tuple[Scenario, ...] = ("back-to-back", "paced", "streams", "throughput", "cold-start")

HARNESS = "nothing"
"""Name of the backend that does nothing: what measuring costs."""

PERCENTS = (50.0, 90.0, 95.0, 99.0, 99.9)

Samples = dict[str, NDArray[Any]]
"""Raw samples by the names that `sjepa_deploy.runtime.bench.files` lists."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Holds a figure and its 95 % confidence interval.

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
    """Holds one percentile of the pooled samples of a cell.

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
    """Describes the distribution of the latencies of a cell, in microseconds.

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
    """Says how windows that come at a rate were served.

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
    """Describes one phase of a cold start.

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
    """Says how long new processes take until they decode.

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
    """Holds the memory and energy that a backend takes.

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
    """Names what a cell measured: cells of two reports with equal keys can be compared.

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
        """Return the scenario with its parameters: "paced 100/s keep-warm"."""
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
        """Return a readable name: "paced 100/s keep-warm: contextual ort-cpu fp32"."""
        return f"{self.what}: {self.bundle} {self.backend} {self.precision}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Holds one measurement.

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
        """Return whether the outputs are wrong."""
        return self.parity is False


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Says how many streams a backend holds: p99 stays within the deadline, and the backlog bounded.

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
