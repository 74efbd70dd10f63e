"""Measures one contender block by block: what all scenarios of a benchmark share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sjepa_deploy.runtime.bench.cells import Cell, CellKey, Resources, Samples, Scenario
from sjepa_deploy.runtime.bench.contenders import Contender
from sjepa_deploy.runtime.keep_warm import Clock
from sjepa_deploy.runtime.machine import CpuTimes, MachineState, Nvml, machine_state


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Holds what all scenarios of a run share.

    Attributes
    ----------
    clock : Clock
        Time and waiting.
    nvml : Nvml or None
        Where energy and clocks of the GPU come from.
    began : float
        When the run began.
    seconds : float
        Length of a block.
    seed : int
        Of phases.
    """

    clock: Clock
    nvml: Nvml | None
    began: float
    seconds: float
    seed: int


class Measurement:
    """Measures one contender in one scenario, block by block.

    Attributes
    ----------
    contender : Contender
        The bundle on a backend that is called.
    n_blocks : int
        Blocks that are wanted.
    """

    scenario: Scenario

    def __init__(self, bench: Bench, contender: Contender, n_blocks: int) -> None:
        self.bench, self.contender, self.n_blocks = bench, contender, n_blocks
        self.before: MachineState | None = None
        self.after = MachineState()
        self.stolen: list[tuple[float, float]] = []
        self.stable = True
        self.n_run = 0

    @property
    def finished(self) -> bool:
        """Return whether no more blocks are of use."""
        return self.n_run >= self.n_blocks

    def block(self) -> None:
        """Run one block."""
        self.contender.activate()
        if self.before is None:
            self.before = machine_state(self.bench.nvml)
            self.stable = self.warm_up()
        cpu = CpuTimes.now()
        self.run()
        if (stolen := CpuTimes.now().stolen_during(cpu)) is not None:
            self.stolen.append(stolen)
        self.n_run += 1
        self.after = machine_state(self.bench.nvml)

    def warm_up(self) -> bool:
        """Warm the backend up once, before the first block. Returns whether latencies stand still."""
        return True

    def run(self) -> None:
        """Measure one block."""
        raise NotImplementedError

    def cells(self) -> list[tuple[Cell, Samples]]:
        """Return the cells of the blocks so far with their arrays, named as in `sjepa_deploy.runtime.bench.files` without ID."""
        raise NotImplementedError

    def _key(self, **more: int | float | bool | None) -> CellKey:
        backend = self.contender.backend
        known = CellKey(scenario=self.scenario, bundle=self.contender.bundle, backend=backend.name, precision=backend.precision)
        return replace(known, **more)  # type: ignore[arg-type]

    def _cell(self, key: CellKey) -> Cell:
        judgement = self.contender.judgement
        return Cell(
            id="",
            key=key,
            parity=None if judgement is None else judgement.passed,
            caution=None if judgement is None else judgement.caution,
            resources=Resources(device_bytes=self.contender.device_bytes),
            before=self.before or MachineState(),
            after=self.after,
            stolen_cpu=self._stolen_cpu(),
        )

    def _stolen_cpu(self) -> float | None:
        if not self.stolen:
            return None
        seconds, elapsed = map(sum, zip(*self.stolen, strict=True))
        return seconds / elapsed

    def _joules(self) -> float | None:
        return None if self.bench.nvml is None else self.bench.nvml.joules()
