"""Measures the scenarios of a benchmark: each class runs one block of its scenario, and makes the cells of its blocks.

`runtime.bench.run` interleaves the blocks of all scenarios and backends, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sjepa_deploy.runtime.backend import BackendOptions, FloatArray, Split
from sjepa_deploy.runtime.bench import cold_start, estimates, loops
from sjepa_deploy.runtime.bench.baselines import TorchCompile
from sjepa_deploy.runtime.bench.cells import (
    Capacity,
    Cell,
    ColdStart,
    Estimate,
    OpenLoop,
    Phase,
    Samples,
    Scenario,
)
from sjepa_deploy.runtime.bench.contenders import Contender
from sjepa_deploy.runtime.bench.loops import Served
from sjepa_deploy.runtime.bench.measurement import Bench, Measurement
from sjepa_deploy.runtime.keep_warm import KeepWarm

LEAD_IN_S = 0.01
"""Calls before each block that are not counted: what ran before left its own data in the caches."""

KEEP_WARM_S = 0.01
"""Period of the keep-warm policy in paced runs, where a tenth of the gap is not shorter."""

N_SPLIT = 200
"""Calls that are split into their parts, if they take no longer than a block."""

PROBE_WINDOWS = 500
"""Windows of a probe with many streams, where a block or two suffice for so many: what a p99 needs."""

N_SEGMENTS = 10
"""Blocks that a probe is cut into, for the interval of its percentiles."""

ENOUGH = 1.05
"""A search for the most streams ends when the refused number is at most this times the held one."""


class ClosedLoop(Measurement):
    """Measures calls back to back at one batch size: latency and throughput."""

    def __init__(self, bench: Bench, contender: Contender, n_blocks: int, scenario: Scenario, batch: int) -> None:
        super().__init__(bench, contender, n_blocks)
        self.scenario, self.batch = scenario, batch
        self.inputs = contender.inputs(batch)
        self.blocks: list[loops.Array] = []
        self.joules = 0.0
        self.split: Split | None = None

    def warm_up(self) -> bool:
        """Call until latencies stand still."""
        return loops.warm_up(self.contender.backend.run, self.inputs, self.bench.clock)

    def run(self) -> None:
        """Call for the length of a block."""
        run, clock = self.contender.backend.run, self.bench.clock
        loops.closed_loop(run, self.inputs, clock, LEAD_IN_S)
        joules = self._joules()
        self.blocks.append(loops.closed_loop(run, self.inputs, clock, self.bench.seconds))
        self.joules += (self._joules() or 0.0) - (joules or 0.0)
        if self.n_run == 0:
            self.split = self._measure_split()

    def _measure_split(self) -> Split | None:
        most = int(self.bench.seconds / np.median(self.blocks[0]))
        return self.contender.backend.split(self.inputs[0], max(5, min(N_SPLIT, most)))

    def cells(self) -> list[tuple[Cell, Samples]]:
        """Return one cell."""
        if not self.blocks:
            return []
        values = np.concatenate(self.blocks) * 1e6
        blocks = np.repeat(np.arange(len(self.blocks)), [len(block) for block in self.blocks])
        rates = np.array([self.batch * len(block) / block.sum() for block in self.blocks])
        cell = self._cell(self._key(batch=self.batch))
        energy = self.joules / (self.batch * len(values)) if self.joules else None
        cell = replace(
            cell,
            latency=estimates.latency(values, blocks, stable=self.stable),
            windows_per_s=estimates.of_blocks(rates),
            split=self.split,
            resources=replace(cell.resources, joules_per_window=energy),
        )
        return [(cell, {"latency_us": values.astype(np.float32), "block": blocks.astype(np.int32)})]


class Paced(Measurement):
    """Measures one stream in open loop, with or without the keep-warm policy."""

    scenario = "paced"

    def __init__(
        self, bench: Bench, contender: Contender, n_blocks: int, rate: float, deadline: float | None, keep_warm: bool
    ) -> None:
        super().__init__(bench, contender, n_blocks)
        self.rate, self.deadline = rate, deadline or 1 / rate
        self.inputs = contender.inputs(1)
        self.wants_keep_warm = keep_warm
        self.keep_warm: KeepWarm | None = None
        self.blocks: list[tuple[float, Served]] = []
        self.cpu = self.elapsed = self.joules = 0.0

    def warm_up(self) -> bool:
        """Call until latencies stand still, and make the first dummy calls."""
        stable = loops.warm_up(self.contender.backend.run, self.inputs, self.bench.clock)
        if self.wants_keep_warm:
            dummy = self.inputs[-1]
            period = min(KEEP_WARM_S, 0.1 / self.rate)
            self.keep_warm = KeepWarm(lambda: self.contender.backend.run(dummy), period, self.bench.clock)
        return stable

    def run(self) -> None:
        """Serve the windows that are due in a block."""
        run, clock = self.contender.backend.run, self.bench.clock
        loops.closed_loop(run, self.inputs, clock, LEAD_IN_S)
        joules, cpu, start = self._joules(), time.process_time(), clock.now()
        due = loops.even(self.rate, max(2, round(self.bench.seconds * self.rate))).tolist()
        served = loops.open_loop(run, {1: self.inputs}, due, clock, period=1 / self.rate, keep_warm=self.keep_warm)
        self.blocks.append((start - self.bench.began, served))
        self.elapsed += clock.now() - start
        self.cpu += time.process_time() - cpu
        self.joules += (self._joules() or 0.0) - (joules or 0.0)

    def cells(self) -> list[tuple[Cell, Samples]]:
        """Return one cell."""
        if not self.blocks:
            return []
        cell = self._cell(self._key(rate=self.rate, keep_warm=self.wants_keep_warm))
        cell, samples = _open_loop_cell(cell, self.blocks, self.deadline, stable=self.stable)
        assert cell.open_loop is not None
        warm = self.keep_warm
        open_loop = replace(
            cell.open_loop,
            cpu=self.cpu / self.elapsed,
            beats=0 if warm is None else warm.n_beats,
            beats_busy=0.0 if warm is None else warm.busy_s / self.elapsed,
        )
        energy = self.joules / open_loop.n_done if self.joules else None
        return [(replace(cell, open_loop=open_loop, resources=replace(cell.resources, joules_per_window=energy)), samples)]


class Streams(Measurement):
    """Searches for the most independent streams that are held, batched in open loop, with p99 under the deadline.

    Each block is a probe with one number of streams. A number that is nearly held is tried once more before it counts as refused:
    one disturbance in a probe is no lack of capacity.
    """

    scenario = "streams"

    def __init__(self, bench: Bench, contender: Contender, n_blocks: int, rate: float, deadline: float | None) -> None:
        super().__init__(bench, contender, n_blocks)
        self.rate, self.deadline = rate, deadline or 1 / rate
        largest = contender.sizes[-1]
        sizes = [2**i for i in range(12) if 2**i <= largest]
        self.batches: dict[int, Sequence[FloatArray]] = {size: contender.inputs(size) for size in sizes}
        self.n_held, self.n_refused = 0, None  # type: int, int | None
        self._next, self._doubted = 1, False
        self.probes: list[tuple[int, float, Served]] = []

    @property
    def finished(self) -> bool:
        """Return whether the number is known well enough, or there were enough probes."""
        known = self.n_refused is not None and self.n_refused <= max(self.n_held + 1, ENOUGH * self.n_held)
        return known or super().finished

    def warm_up(self) -> bool:
        """Meet every batch size, and guess the capacity from how long a call takes."""
        run, clock = self.contender.backend.run, self.bench.clock
        per_second = 0.0
        for size, inputs in self.batches.items():
            loops.closed_loop(run, inputs, clock, LEAD_IN_S)
            per_second = max(per_second, size / float(np.median(loops.closed_loop(run, inputs, clock, LEAD_IN_S))))
        self._next = max(1, int(0.7 * per_second / self.rate))
        return True

    def run(self) -> None:
        """Probe one number of streams."""
        n = self._next
        rng = np.random.default_rng(self.bench.seed)
        seconds = min(2 * self.bench.seconds, max(self.bench.seconds, PROBE_WINDOWS / (n * self.rate)))
        due = loops.streams(n, self.rate, seconds, rng)
        clock = self.bench.clock
        loops.closed_loop(self.contender.backend.run, self.batches[1], clock, LEAD_IN_S)
        start = clock.now()
        served = loops.open_loop(self.contender.backend.run, self.batches, due.tolist(), clock, period=1 / self.rate)
        self.probes.append((n, start - self.bench.began, served))
        self._decide(n, holds(served, self.deadline), nearly=float(np.median(served.latency)) <= self.deadline)

    def _decide(self, n: int, held: bool, nearly: bool) -> None:
        """Take note of a probe, and choose the next."""
        if not held and nearly and not self._doubted:
            self._doubted = True
            return
        self._doubted = False
        if held:
            self.n_held = max(self.n_held, n)
        else:
            self.n_refused = n if self.n_refused is None else min(n, self.n_refused)
        if self.n_refused is None:
            self._next = max(n + 1, int(1.25 * n))
        else:
            self._next = max(1, (self.n_held + self.n_refused) // 2)

    @property
    def capacity(self) -> Capacity:
        """Return the result of the search."""
        backend = self.contender.backend
        return Capacity(
            bundle=self.contender.bundle,
            backend=backend.name,
            precision=backend.precision,
            rate=self.rate,
            deadline_s=self.deadline,
            n_held=self.n_held,
            n_refused=self.n_refused,
        )

    def cells(self) -> list[tuple[Cell, Samples]]:
        """Return a cell for each number of streams, of its last probe."""
        last = {n: (start, served) for n, start, served in self.probes}
        found = []
        for n, (start, served) in sorted(last.items()):
            key = self._key(batch=max(self.batches), rate=self.rate, n_streams=n)
            segments = [(start, segment) for segment in _segments(served)]
            found.append(_open_loop_cell(self._cell(key), segments, self.deadline, stable=self.stable, whole=[served]))
        return found


class ColdStarts(Measurement):
    """Measures new processes, from their start to a steady state."""

    scenario = "cold-start"

    def __init__(self, bench: Bench, contender: Contender, n_blocks: int, cache: Path, options: BackendOptions) -> None:
        self._compiles = isinstance(contender.backend, TorchCompile)  # in its first process; the others find it
        super().__init__(bench, contender, n_blocks + self._compiles)
        self._cache = cache / f"{contender.bundle}-{contender.backend.name}-{contender.backend.precision}"
        self._options = options
        self.started: list[cold_start.Started] = []

    def run(self) -> None:
        """Start one process."""
        backend, path = self.contender.backend, self.contender.path
        self.started.append(cold_start.measure(path, backend.name, backend.precision, self._options, cache=self._cache))

    def cells(self) -> list[tuple[Cell, Samples]]:
        """Return one cell."""
        found = list(self.started)
        first_compile = found.pop(0).phases["first call"] if self._compiles and len(found) > 1 else None
        if not found:
            return []
        columns = {name: np.array([s.phases[name] for s in found]) for name in found[0].phases}
        phases = [
            Phase(name=name, seconds=Estimate(value=float(np.median(v)), low=float(v.min()), high=float(v.max())))
            for name, v in columns.items()
        ]
        if first_compile is not None:
            phases.insert(0, Phase(name="first call, nothing cached", seconds=Estimate(value=first_compile)))
        peaks = [s.peak_bytes for s in found if s.peak_bytes is not None]
        cell = self._cell(self._key(batch=self.contender.sizes[0]))
        cold = ColdStart(
            n=len(found),
            phases=tuple(phases),
            engine=found[0].engine,
            calls_to_steady=round(float(np.median([s.calls_to_steady for s in found]))),
        )
        resources = replace(cell.resources, host_bytes=int(np.median(peaks)) if peaks else None)
        return [(replace(cell, cold_start=cold, resources=resources), {})]


def holds(served: Served, deadline: float) -> bool:
    """Return whether a probe was held: p99 within the deadline and a backlog that stays bounded."""
    return loops.held([served]) and estimates.percentile(served.latency, 99.0) <= deadline


def _segments(served: Served) -> list[Served]:
    """Cut a run into pieces of equal length in time."""
    edges = np.linspace(served.due[0], served.due[-1], N_SEGMENTS + 1)[1:-1]
    pieces = np.split(np.arange(len(served.due)), np.searchsorted(served.due, edges))
    fields = ("due", "start", "finish", "batch")
    return [replace(served, **{f: getattr(served, f)[piece] for f in fields}) for piece in pieces if len(piece)]


def _open_loop_cell(
    cell: Cell, blocks: list[tuple[float, Served]], deadline: float, *, stable: bool, whole: list[Served] | None = None
) -> tuple[Cell, Samples]:
    """Fill in what open loops give. `whole` are the runs that the blocks were cut from, where they were."""
    runs = whole or [served for _, served in blocks]
    values = np.concatenate([served.latency for _, served in blocks]) * 1e6
    number = np.repeat(np.arange(len(blocks)), [len(served.due) for _, served in blocks])
    held = loops.held(runs)
    missed = [run.latency > deadline for run in runs]
    jitter = loops.jitter(runs) if cell.key.n_streams is None else None
    calls = sum(float((1 / run.batch).sum()) for run in runs)
    open_loop = OpenLoop(
        n_due=sum(run.n_due for run in runs),
        n_done=len(values),
        held=held,
        utilization=loops.utilization(runs),
        deadline_s=deadline,
        missed=sum(int(m.sum()) for m in missed),
        longest_run=max(loops.longest_run(m) for m in missed),
        mean_batch=len(values) / calls,
    )
    jitter_us = None if jitter is None else jitter * 1e6
    distribution = estimates.latency(values, number, stable=stable, jitter_us=jitter_us) if held else None
    samples: Samples = {
        "latency_us": values.astype(np.float32),
        "block": number.astype(np.int32),
        "at_s": np.concatenate([start + served.due for start, served in blocks]),
        "service_us": (np.concatenate([served.service for _, served in blocks]) * 1e6).astype(np.float32),
    }
    return replace(cell, latency=distribution, open_loop=open_loop), samples
