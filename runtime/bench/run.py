"""Runs a benchmark: opens and judges every backend, interleaves the blocks of all scenarios, and makes the report."""

from __future__ import annotations

import contextlib
import datetime
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BenchmarkError, SjepaError, listed
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.bench import loops
from sjepa_deploy.runtime.bench.cells import SCENARIOS, Capacity, Cell, Samples, Scenario
from sjepa_deploy.runtime.bench.compare import recommend
from sjepa_deploy.runtime.bench.contenders import (
    Contender,
    bundle_facts,
    close_contender,
    first_line,
    grouped,
    harness,
    open_contenders,
    settings_of,
)
from sjepa_deploy.runtime.bench.decision_age import with_decision_ages
from sjepa_deploy.runtime.bench.measurement import Bench, Measurement
from sjepa_deploy.runtime.bench.noise import Canary, judge
from sjepa_deploy.runtime.bench.results import SCHEMA_VERSION, BenchReport, Ending, LeftOut, Noise
from sjepa_deploy.runtime.bench.scenarios import ClosedLoop, ColdStarts, Paced, Streams
from sjepa_deploy.runtime.gpu.cuda import Device
from sjepa_deploy.runtime.keep_warm import Clock
from sjepa_deploy.runtime.machine import CpuTimes, Nvml, environment
from sjepa_deploy.spec import RunPrecision

logger = logging.getLogger(__name__)

RATES = (10.0, 100.0)
"""Windows a second of the paced scenario."""

THROUGHPUT_BATCHES = (1, 4, 16, 64)

SETTLE_S = 0.02
"""Pause before each block: thread pools spin for some milliseconds after their last call."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Says what a run measures.

    Attributes
    ----------
    backends : tuple of str
        Names, see `sjepa_deploy.runtime.bench.baselines.ALL_BACKENDS`; empty for all that run here.
    precisions : tuple of str
        Empty for all that the graphs allow.
    scenarios : tuple of str
        See `Scenario`.
    batches : tuple of int
        Batch sizes of the closed loops; empty for 1 back to back and 1, 4, 16, 64 for throughput.
    rates : tuple of float
        Windows a second of the paced scenario. Streams have the first of them each.
    deadline : float or None
        Seconds from due to done; None for the time to the next window.
    seconds : float
        Time in each cell.
    seconds_of : dict of str to float
        The same for some scenarios: at 10 windows a second a p99 takes 50 s, of a closed loop often less than one.
    n_blocks : int
        Blocks that it is cut into.
    processes : int
        Cold starts of each backend.
    time_limit : float or None
        Seconds after which no block starts; the report is then partial.
    seed : int
        Of the order of blocks, the windows and the phases of streams.
    options : BackendOptions
        For every backend.
    in_place : bool
        Whether windows stand in the buffer that a backend reads (pinned, on GPUs), where it has one, before a call. Otherwise a
        call copies them there.
    """

    backends: tuple[str, ...] = ()
    precisions: tuple[RunPrecision, ...] = ()
    scenarios: tuple[Scenario, ...] = SCENARIOS
    batches: tuple[int, ...] = ()
    rates: tuple[float, ...] = RATES
    deadline: float | None = None
    seconds: float = 10.0
    seconds_of: Mapping[Scenario, float] = field(default_factory=dict)
    n_blocks: int = 10
    processes: int = 3
    time_limit: float | None = None
    seed: int = 0
    options: BackendOptions = field(default_factory=BackendOptions)
    in_place: bool = False

    def __post_init__(self) -> None:
        if unknown := [s for s in (*self.scenarios, *self.seconds_of) if s not in SCENARIOS]:
            raise BenchmarkError(f"{unknown[0]!r} is not a scenario.", f"Use some of {', '.join(SCENARIOS)}.")
        if not self.scenarios:
            raise BenchmarkError("There is no scenario to run.", f"Use some of {', '.join(SCENARIOS)}.")
        if not self.rates:
            raise BenchmarkError("There is no rate to pace at.", "Name at least one.")
        positive = {
            "rate": self.rates,
            "deadline": (self.deadline,),
            "batch": self.batches,
            "duration": (self.seconds, *self.seconds_of.values()),
            "time limit": (self.time_limit,),
            "number of blocks": (self.n_blocks,),
            "number of processes": (self.processes,),
        }
        for name, values in positive.items():
            for value in values:
                if value is not None and not 0 < value < 1e6:
                    raise BenchmarkError(f"A {name} of {value:g} cannot be run.", "Use a positive number below a million.")


class Progress(Protocol):
    """Receives every step of a run."""

    def __call__(self, text: str, done: int, total: int) -> None:
        """Show `text` and how far the run is."""
        ...


def _silent(text: str, done: int, total: int) -> None:
    """Show nothing."""


class Run:
    """Holds the state of a run, from which a report can be made at any time."""

    def __init__(self, bundles: tuple[Bundle, ...], config: BenchConfig, command: str, clock: Clock) -> None:
        self.bundles, self.config, self.command, self.clock = bundles, config, command, clock
        self.facts = bundle_facts(bundles)
        self.began, self.created = clock.now(), datetime.datetime.now(datetime.timezone.utc)
        self.contenders: list[Contender] = []
        self.measurements: list[Measurement] = []
        self.left_out: list[LeftOut] = []
        self.canary = Canary(clock)
        self.cpu_before: CpuTimes | None = None
        self.loop_us: float | None = None
        self.endings: list[Ending] = []
        self.rng = np.random.default_rng(config.seed)

    @property
    def elapsed(self) -> float:
        """Return the seconds since the run began."""
        return self.clock.now() - self.began

    def out_of(self, share: float) -> bool:
        """Return whether this share of the time limit has passed."""
        limit = self.config.time_limit
        return limit is not None and self.elapsed > share * limit

    # ---- what to measure ---------------------------------------------------------------------------------------------------

    def open(self, progress: Progress) -> None:
        """Open and judge the contenders."""
        config = self.config
        opened = open_contenders(
            self.bundles,
            self.facts,
            backends=config.backends,
            precisions=config.precisions,
            options=config.options,
            seed=config.seed,
            in_place=config.in_place,
            late=lambda: self.out_of(0.5),
        )
        for found in opened:
            if isinstance(found, LeftOut):
                self.left_out.append(found)
            else:
                self.contenders.append(found)
                progress(f"{found.label} is open and judged", 0, 0)
        if any(entry.kind == "too late" for entry in self.left_out):
            self.endings.append(Ending(kind="opened late"))
        if not self.contenders:
            reasons = "; ".join(f"{entry.label}: {entry.reason}" for entry in grouped(self.left_out))
            raise BenchmarkError(f"No backend can be measured here: {reasons}", "Name another --backend or --precision.")

    def plan(self, bench: Bench, cache: Path) -> None:
        """Make the measurements of every contender; the backend that does nothing comes first."""
        config = self.config
        of = {s: replace(bench, seconds=config.seconds_of.get(s, config.seconds) / config.n_blocks) for s in SCENARIOS}
        nothing = harness(self.bundles[0], self.facts[0].label, seed=config.seed)
        self.measurements.append(ClosedLoop(of["back-to-back"], nothing, config.n_blocks, "back-to-back", nothing.sizes[0]))
        if "paced" in config.scenarios:
            for rate in config.rates:
                self.measurements.append(Paced(of["paced"], nothing, config.n_blocks, rate, config.deadline, keep_warm=False))
        for contender in self.contenders:
            for scenario in config.scenarios:
                self.measurements += self._measurements(of[scenario], contender, scenario, cache)

    def _measurements(self, bench: Bench, contender: Contender, scenario: Scenario, cache: Path) -> Iterator[Measurement]:
        config, n_blocks = self.config, self.config.n_blocks
        if scenario == "cold-start":
            yield ColdStarts(bench, contender, config.processes, cache, config.options)
        elif scenario in ("back-to-back", "throughput"):
            usual = THROUGHPUT_BATCHES if scenario == "throughput" else (1,)
            fitting = [b for b in config.batches or usual if b in contender.sizes] or list(contender.sizes[:1])
            if config.batches and fitting != list(config.batches):
                missing = [b for b in config.batches if b not in contender.sizes]
                what = f"{scenario}, batch {listed(map(str, missing))}: {contender.label}"
                takes = " to ".join(map(str, dict.fromkeys((contender.sizes[0], contender.sizes[-1]))))
                self.left_out.append(LeftOut(what=(what,), reason=f"Its graph takes batches of {takes}.", kind="batch size"))
            for batch in fitting:
                yield ClosedLoop(bench, contender, n_blocks, scenario, batch)
        elif 1 not in contender.sizes:
            reason = f"Its graph takes batches of {contender.sizes[0]} only, and windows come one by one."
            self.left_out.append(LeftOut(what=(f"{scenario}: {contender.label}",), reason=reason, kind="batch size"))
        elif scenario == "streams":
            yield Streams(bench, contender, n_blocks, config.rates[0], config.deadline)
        else:
            for rate in config.rates:
                for keep_warm in (False, True):
                    yield Paced(bench, contender, n_blocks, rate, config.deadline, keep_warm)

    # ---- measuring ---------------------------------------------------------------------------------------------------------

    def measure(self, progress: Progress) -> None:
        """Run the blocks in rounds, in each round every measurement once in random order."""
        self.cpu_before = CpuTimes.now()
        self._measure_loop()
        total, done = sum(m.n_blocks for m in self.measurements), 0
        while waiting := [m for m in self.measurements if not m.finished]:
            for index in self.rng.permutation(len(waiting)):
                if self.out_of(1.0):
                    assert self.config.time_limit is not None
                    self.endings.append(Ending(kind="time limit", limit=self.config.time_limit, n=done, of=total))
                    return
                measurement = waiting[index]
                progress(f"{measurement.scenario}: {measurement.contender.label}", done, total)
                self.clock.wait_until(self.clock.now() + SETTLE_S)
                self.canary.sing()
                self._block(measurement)
                done += 1

    def _block(self, measurement: Measurement) -> None:
        try:
            measurement.block()
        except Exception as e:  # whatever a backend raises in the middle: the others are measured all the same
            if not isinstance(e, SjepaError):
                logger.exception("%s failed", measurement.contender.label)
            self.measurements.remove(measurement)
            what = f"{measurement.scenario}: {measurement.contender.label}"
            self.left_out.append(LeftOut(what=(what,), reason=first_line(e), kind="failed"))

    def _measure_loop(self) -> None:
        """Time the loop around a call that does nothing, a hundred times."""
        inputs, turns = self.contenders[0].inputs(1), []
        for _ in range(100):
            start = self.clock.now()
            n = len(loops.closed_loop(lambda eeg: None, inputs, self.clock, 0.001))
            turns.append((self.clock.now() - start) / n)
        self.loop_us = float(np.median(turns)) * 1e6

    # ---- the report --------------------------------------------------------------------------------------------------------

    def report(self) -> tuple[BenchReport, Samples]:
        """Return the report of the measurements so far, and the raw samples."""
        cells: list[Cell] = []
        samples: Samples = {}
        capacity: list[Capacity] = []
        for measurement in self.measurements:
            for cell, arrays in measurement.cells():
                name = f"c{len(cells):03}"
                cells.append(replace(cell, id=name))
                samples |= {f"{name}.{key}": array for key, array in arrays.items()}
            if isinstance(measurement, Streams) and measurement.probes:
                capacity.append(measurement.capacity)
        samples["canary_us"] = np.array(self.canary.us)
        report = BenchReport(
            schema_version=SCHEMA_VERSION,
            created=self.created.isoformat(timespec="seconds"),
            seconds=self.elapsed,
            command=self.command,
            seed=self.config.seed,
            partial=tuple(self.endings),
            environment=environment(self.config.options.device),
            noise=self._noise(cells),
            bundles=self.facts,
            cells=tuple(cells),
            loop_us=self.loop_us,
            parity=tuple(s.judgement for s in self.contenders if s.judgement is not None),
            capacity=tuple(capacity),
            left_out=grouped(self.left_out),
            settings=settings_of(self.contenders),
        )
        specs = {fact.label: bundle.spec for fact, bundle in zip(self.facts, self.bundles, strict=True)}
        return with_decision_ages(replace(report, recommendations=recommend(report)), specs), samples

    def _noise(self, cells: list[Cell]) -> Noise | None:
        if self.cpu_before is None or not self.canary.us:
            return None
        now = CpuTimes.now()
        return judge(self.canary.us, now.others_since(self.cpu_before), now.stolen_since(self.cpu_before), cells)

    def close(self) -> None:
        """Release every backend. A backend that cannot be released is reported: the run loses no figures."""
        self.left_out += filter(None, map(close_contender, self.contenders))


def run_bench(
    bundles: tuple[Bundle, ...],
    config: BenchConfig,
    *,
    command: str = "",
    progress: Progress = _silent,
    clock: Clock | None = None,
) -> tuple[BenchReport, Samples]:
    """Measure every backend that runs here on `bundles`.

    An interrupt (Ctrl-C) and the time limit end the run early; what was found by then is returned, and says that it is partial.

    Parameters
    ----------
    bundles : tuple of Bundle
        Bundles to run.
    config : BenchConfig
        Configuration of the run.
    command : str
        Command that repeats the run, for the report.
    progress : callable
        Told of every step.
    clock : Clock or None
        Time and waiting; None takes the real one.

    Returns
    -------
    report : BenchReport
        What was found, without the name of a file of samples.
    samples : dict of str to array
        Raw samples.

    Raises
    ------
    BenchmarkError
        If nothing can be measured here.
    BackendError
        If a name is no backend's.
    """
    run = Run(bundles, config, command, clock or Clock())
    with contextlib.ExitStack() as stack:
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sjepa-bench-")))
        nvml = _open_gpu(config.options.device, stack.callback)
        bench = Bench(clock=run.clock, nvml=nvml, began=run.began, seconds=config.seconds / config.n_blocks, seed=config.seed)
        try:
            run.open(progress)
            run.plan(bench, cache)
            run.measure(progress)
        except KeyboardInterrupt:
            run.endings.append(Ending(kind="interrupted"))
        finally:
            run.close()
        return run.report()


def _open_gpu(ordinal: int, when_done: Callable[[Callable[[], None]], Any]) -> Nvml | None:
    """Keep the GPU's context for the run, so that free memory before and after a backend is opened can be compared."""
    try:
        device = Device(ordinal)
    except SjepaError:
        return None
    when_done(lambda: _release(device))
    return Nvml(device.bus_id)


def _release(device: Device) -> None:
    try:
        device.close()
    except SjepaError:  # after a CUDA error that stays: the report tells what it broke
        logger.exception("GPU %d could not be released", device.ordinal)
