"""Measures the time of each step of a call on a GPU, with CUDA events between the steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from sjepa_deploy.runtime.backend import Split
from sjepa_deploy.runtime.gpu.cuda import Device, Stream, check

Step = Callable[[], object]


def split_calls(device: Device, stream: Stream, fill: Step, steps: dict[str, Step], n: int, how: str) -> Split:
    """Run a call `n` times with events between its steps, and `n` times without events, alternating.

    Parameters
    ----------
    device, stream : Device, Stream
        GPU and stream of the call.
    fill : callable
        Puts the windows where the first step reads them.
    steps : dict of str to callable
        Functions that enqueue "h2d", "compute" and "d2h", in order. A call without copies has "compute" alone.
    n : int
        Calls.
    how : str
        Mode of the calls, as text for people.
    """
    cu = device.cu
    flags = int(cu.CUevent_flags.CU_EVENT_DEFAULT)
    events = [check(cu.cuEventCreate(flags)) for _ in range(len(steps) + 1)]
    record, handle, now = cu.cuEventRecord, stream.stream, time.perf_counter
    gpu_us: dict[str, list[float]] = {name: [] for name in steps}
    enqueue, whole, bare = [], [], []
    stream.unfinished = True
    for _ in range(n):
        start = now()
        fill()
        filled = now()
        check(record(events[0], handle))
        for event, step in zip(events[1:], steps.values(), strict=True):
            step()
            check(record(event, handle))
        enqueued = now()
        stream.synchronize()
        whole.append((now() - start) * 1e6)
        enqueue.append((enqueued - filled) * 1e6)
        for i, name in enumerate(steps):
            gpu_us[name].append(1e3 * float(check(cu.cuEventElapsedTime(events[i], events[i + 1]))))
        start = now()
        fill()
        for step in steps.values():
            step()
        stream.synchronize()
        bare.append((now() - start) * 1e6)
    stream.unfinished = False
    for event in events:
        check(cu.cuEventDestroy(event))
    parts = {name: median(values) for name, values in gpu_us.items()}
    return Split(
        n=n,
        enqueue_us=median(enqueue),
        h2d_us=parts.get("h2d"),
        compute_us=parts["compute"],
        d2h_us=parts.get("d2h"),
        host_us=median(bare) - sum(parts.values()),
        overhead_us=median(whole) - median(bare),
        how=how,
    )
