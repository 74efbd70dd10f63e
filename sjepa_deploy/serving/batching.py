"""Plans how a server queues and batches requests, so that it answers in time what it accepts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import ServingError
from sjepa_deploy.runtime.backend import BackendOptions, open_backend
from sjepa_deploy.spec import Precision

REQUEST_OVERHEAD = 0.0005
"""Seconds that a window costs Triton's Python backend beyond its run. On slow cores, on which PreLocal runs in 0.12 ms, the
server takes 0.6 to 1.0 ms of processor time more, in part beside the run: benchmarks/results/serving_2-core-cpu_2026-11-25.md."""

LARGEST_WAIT = 0.1
"""Share of the deadline that a request waits at most for others to share a run with."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """A Batching says how a server queues and batches the requests for a model.

    Attributes
    ----------
    max_batch : int
        Most windows of a run.
    queue_delay : float
        Seconds that a request waits at most for others.
    queue_timeout : float
        Seconds in the queue after which a request is refused, since its answer would come too late.
    max_queue_size : int
        Requests in the queue beyond which more are refused.
    """

    max_batch: int
    queue_delay: float
    queue_timeout: float
    max_queue_size: int


def plan_batching(
    compute: Callable[[int], float], max_batch: int, *, deadline: float, instances: int = 1, batched: bool = True
) -> Batching:
    """Return the batching with which a request that is accepted is answered within `deadline`.

    A request may find a run going on, and then takes part in the next one: two runs must fit. The request waits for others only
    as long as that pays: `LARGEST_WAIT` of the deadline times the share of computing that a full batch saves.

    Parameters
    ----------
    compute : callable
        Seconds that a run of so many windows takes, not decreasing.
    max_batch : int
        Most windows that the graph takes.
    deadline : float
        Seconds from the arrival of a request to its answer.
    instances : int
        How many models run at once.
    batched : bool
        Whether requests may share a run.

    Raises
    ------
    ServingError
        If two runs of one window do not fit into the deadline.
    """
    if not 2 * compute(1) <= deadline * (1 - LARGEST_WAIT):
        raise ServingError(
            f"One window takes {compute(1) * 1e3:.3g} ms here, too long for a deadline of {deadline * 1e3:g} ms.",
            "Give it more time, or a faster machine.",
        )
    low, high = 1, max_batch if batched else 1
    while low < high:  # the largest batch of which two runs fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if 2 * compute(middle) <= deadline * (1 - LARGEST_WAIT) else (low, middle - 1)
    run = compute(low)
    saved = max(0.0, 1 - run / (low * compute(1)))
    left = deadline - run
    return Batching(
        max_batch=low,
        queue_delay=LARGEST_WAIT * deadline * saved,
        queue_timeout=left,
        max_queue_size=instances * low * int(left / run),
    )


def measure_compute(
    bundle: Bundle, backend: str, precision: Precision, options: BackendOptions, *, overhead: float = 0.0
) -> Callable[[int], float]:
    """Measure a backend on this machine, and return the seconds of a run as a function of its windows.

    Parameters
    ----------
    bundle, backend, precision, options
        What is measured.
    overhead : float
        Seconds that every window costs beside the run.
    """
    graph = bundle.graph(precision)
    sizes = sorted({graph.static_batch or 1, graph.max_batch})
    opened = open_backend(bundle, backend, precision, options)
    try:
        seconds = [_median_run(opened.run, size, bundle.spec.input_shape) for size in sizes]
    finally:
        opened.close()
    slope = max(0.0, (seconds[-1] - seconds[0]) / max(1, sizes[-1] - sizes[0]))
    return lambda batch: seconds[0] + slope * (batch - sizes[0]) * (len(sizes) > 1) + overhead * batch


def _median_run(run: Callable[[np.ndarray], object], batch: int, window: tuple[int, int], n_runs: int = 10) -> float:
    eeg = np.random.default_rng(0).normal(0, 20, (batch, *window)).astype(np.float32)
    run(eeg)
    runs = []
    for _ in range(n_runs):
        start = time.perf_counter()
        run(eeg)
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)
