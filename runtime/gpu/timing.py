"""Where the time of a call on a GPU goes, measured with CUDA events between its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from sjepa_deploy.runtime.gpu.cuda import Device, Stream, check

Step = Callable[[], object]


def split_calls(device: Device, stream: Stream, fill: Step, steps: dict[str, Step], n: int, how: str) -> Split:
    """Run a call `n` times with events between its steps, and `n` times without them, in turn.

    Parameters
    ----------
    device, stream : Device, Stream
        Where it runs.
    fill : callable
        Puts the windows where the first step finds them.
    steps : dict of str to callable
        What enqueues "h2d", "compute" and "d2h", in order; a call without copies has "compute" alone.
    n : int
        Calls.
    how : str
        In which mode, for people.
    """
    cu = device.cu
    flags = int(cu.CUevent_flags.CU_EVENT_DEFAULT)
    events = [check(cu.cuEventCreate(flags)) for _ in range(len(steps) + 1)]
    record, handle, now = cu.cuEventRecord, stream.stream, time.perf_counter
    gpu_us: dict[str, list[float]] = {name: [] for name in steps}
    enqueue, whole, bare = [], [], []
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


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where the time of a call goes, in microseconds: medians of calls that were split, apart from those of the percentiles.

    GPU backends are split with CUDA events on their stream. With mapped memory there are no copies: h2d and d2h are None.

    Attributes
    ----------
    n : int
        Calls that were split.
    enqueue_us : float
        Until everything was handed to the GPU.
    h2d_us, d2h_us : float or None
        Copies of input and output between the events.
    compute_us : float
        The model.
    host_us : float
        The call less what the GPU took.
    overhead_us : float
        What the events add to a call.
    how : str
        In which mode the call was split, e.g. "stream, copies" where the measured calls replay a graph.
    """

    n: int
    enqueue_us: float
    h2d_us: float | None
    compute_us: float
    d2h_us: float | None
    host_us: float
    overhead_us: float
    how: str
