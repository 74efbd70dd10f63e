"""Judges whether the machine was quiet while it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sjepa_deploy.runtime.bench import estimates
from sjepa_deploy.runtime.bench.cells import Cell
from sjepa_deploy.runtime.bench.results import Disturbance, Noise
from sjepa_deploy.runtime.keep_warm import Clock

CANARY_LOOPS, CANARY_REPEATS = 5_000, 5

CANARY_LEAD_IN_S = 0.01
"""Seconds of work before the canary that are not timed: a core that slept is slow for some milliseconds, which no block meets."""

MAX_CANARY_SPREAD = 0.05
MAX_OTHERS_CPU = 0.1
MAX_STOLEN_CPU = 0.02
"""A machine on which the canary's medians spread by more, or on which others take more cores than this, is called noisy."""

MAX_STOLEN_FROM_CELL = 0.05
"""A machine whose hypervisor took more cores than this during a cell is called noisy too.

Some hypervisors throttle a guest that keeps all its cores busy, in stalls of many milliseconds. Cells with several threads
suffer, and the average over the run hides the stalls.
"""


class Canary:
    """Times a fixed piece of work, the canary, before every block: the time tells how fast the machine is at that moment."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.us: list[float] = []

    def sing(self) -> None:
        """Wake the core, time the work, and keep the median."""
        awake = self._clock.now() + CANARY_LEAD_IN_S
        while self._clock.now() < awake:
            self._work()
        self.us.append(float(np.median([self._work() for _ in range(CANARY_REPEATS)])) * 1e6)

    def _work(self) -> float:
        start = self._clock.now()
        total = 0
        for i in range(CANARY_LOOPS):
            total += i
        return self._clock.now() - start


def judge(canary_us: Sequence[float], others: float | None, stolen: float | None, cells: Sequence[Cell]) -> Noise:
    """Return the disturbances of a run.

    Parameters
    ----------
    canary_us : sequence of float
        Times of the canary before each block.
    others, stolen : float or None
        Cores that other processes and the hypervisor took, on average over the run.
    cells : sequence of Cell
        What was measured.
    """
    canary = np.array(canary_us)
    spread, drift = canary_spread(canary), _drift(canary)
    reasons = []
    if spread > MAX_CANARY_SPREAD:
        reasons.append(Disturbance(kind="work varied", value=spread))
    if others is not None and others > MAX_OTHERS_CPU:
        reasons.append(Disturbance(kind="others busy", value=others))
    if stolen is not None and stolen > MAX_STOLEN_CPU:
        reasons.append(Disturbance(kind="cores stolen", value=stolen))
    known = [(cell.stolen_cpu, cell.key.label) for cell in cells if cell.stolen_cpu is not None]
    if robbed := [found for found in known if found[0] > MAX_STOLEN_FROM_CELL]:
        most, label = max(robbed)
        reasons.append(Disturbance(kind="cells robbed", value=most, cell=label, n_cells=len(robbed), n_known=len(known)))
    if estimates.has_trend(canary) and abs(drift) > MAX_CANARY_SPREAD:
        reasons.append(Disturbance(kind="work drifted", value=drift))
    return Noise(
        noisy=bool(reasons),
        reasons=tuple(reasons),
        canary_us=estimates.of_blocks(canary),
        canary_spread=spread,
        others_cpu=others,
        stolen_cpu=stolen,
    )


def canary_spread(canary_us: np.ndarray[Any, Any]) -> float:
    """Return the interquartile range over the median."""
    low, middle, high = np.quantile(canary_us, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def _drift(series: np.ndarray[Any, Any]) -> float:
    quarter = max(1, len(series) // 4)
    return float(np.median(series[-quarter:]) / np.median(series[:quarter]) - 1)
