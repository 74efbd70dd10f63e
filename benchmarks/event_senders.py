"""Sends EEG and markers over LSL from processes of their own, as a plan says: the two halves of `events.py`.

A sender is started with a plan as JSON, says "ready" once its stream is there, and is told the time of the first sample.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

COUNT = "COUNT"
"""Channel that numbers the samples, in nanovolts."""

SURE_S = 0.12
"""Seconds of lost samples from which on they cannot be late: `sjepa_deploy.eeg.continuity.MAX_JITTER_S`, and some more."""

BEFORE_S = 1.0
"""Seconds from the command to start to the first sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Says what two senders do.

    Attributes
    ----------
    n_events : int
        Number of events.
    per_second : float
        Events a second, at random intervals.
    sfreq : float
        Rate of the EEG in Hz.
    delay : float
        Longest delay of a marker in seconds.
    jitter : float
        Standard deviation of the stamps of samples in seconds; those of markers lie up to 0.2 samples off.
    lose_every : float
        Seconds from one loss to the next, on average; infinite for none.
    clocks : tuple of (float, float)
        Offset in seconds and drift of the clock of the EEG's machine, and of the markers'.
    tmin : float
        Start of a window after its event in seconds.
    lead, tail : float
        Seconds without events at the start and at the end.
    stamped_when_sent : bool
        Whether a sample is stamped when it is sent. Otherwise when it was due: a busy machine makes no stamp late.
    seed : int
        Seed of all that is random.
    """

    n_events: int
    per_second: float
    sfreq: float
    delay: float = 3.0
    jitter: float = 1e-4
    lose_every: float = 15.0
    clocks: tuple[tuple[float, float], tuple[float, float]] = ((1234.5, 5e-5), (87.25, -3e-5))
    tmin: float = -0.1
    lead: float = 2.0
    tail: float = 6.0
    stamped_when_sent: bool = False
    seed: int = 0

    @property
    def n_samples(self) -> int:
        """Return the number of samples, with those that are lost."""
        return int((self.lead + self.n_events / self.per_second + self.tail) * self.sfreq)

    @property
    def events(self) -> list[tuple[float, int, float]]:
        """Return sample, number and delay of each event in the order of the samples. Two events are at least a sample apart."""
        rng = np.random.default_rng([self.seed, 1])
        steps = 1 + rng.exponential(self.sfreq / self.per_second - 1, self.n_events)
        samples = np.floor(self.lead * self.sfreq + np.cumsum(steps))
        off, delays = rng.uniform(-0.2, 0.2, self.n_events), rng.uniform(0.0, self.delay, self.n_events)
        return list(zip((samples + off).tolist(), range(self.n_events), delays.tolist(), strict=True))

    @property
    def lost(self) -> np.ndarray:
        """Return which samples are lost: so many in a row that they cannot be late, which smaller losses might be with jitter."""
        rng, lost = np.random.default_rng([self.seed, 2]), np.zeros(self.n_samples, bool)
        at = 5.0
        while np.isfinite(self.lose_every) and (at := at + rng.exponential(self.lose_every)) * self.sfreq < self.n_samples:
            first = int(at * self.sfreq)
            lost[first : first + int(rng.uniform(SURE_S, 0.5) * self.sfreq)] = True
        return lost


def eeg_of(plan: Plan, n_chans: int) -> Callable[[int, int], np.ndarray]:
    """Return a function of (start, stop) that returns samples in volts, shape (n, n_chans + 1); the last channel counts."""
    rng = np.random.default_rng([plan.seed, 3])
    loop = (np.cumsum(rng.normal(0, 2e-6, (round(20 * plan.sfreq), n_chans)), axis=0) % 2e-4).astype(np.float32)

    def stretch(start: int, stop: int) -> np.ndarray:
        rows = np.arange(start, stop)
        return np.column_stack([loop[rows % len(loop)], (rows * 1e-9).astype(np.float32)])

    return stretch


def send_eeg(plan: Plan, name: str, ch_names: Sequence[str]) -> None:
    """Be the amplifier: push each sample when it is due, stamped by this process's clock."""
    import pylsl

    info = pylsl.StreamInfo(name, "EEG", len(ch_names) + 1, plan.sfreq, "float32", name)
    channels = info.desc().append_child("channels")
    for label in [*ch_names, COUNT]:
        channels.append_child("channel").append_child_value("label", label).append_child_value("unit", "volts")
    outlet, stretch, lost = pylsl.StreamOutlet(info), eeg_of(plan, len(ch_names)), plan.lost
    began = _began()
    jitter = np.random.default_rng([plan.seed, 4]).normal(0, plan.jitter, plan.n_samples)
    for i in range(plan.n_samples):
        _wait_until(began + i / plan.sfreq)
        if not lost[i]:
            stamp = pylsl.local_clock() if plan.stamped_when_sent else began + i / plan.sfreq + jitter[i] + _own_clock(pylsl)
            outlet.push_sample(stretch(i, i + 1)[0], stamp)
    time.sleep(60)


def send_markers(plan: Plan, name: str) -> None:
    """Be the stimulus program: push each marker late, stamped with when its event was, by this process's clock."""
    import pylsl

    outlet = pylsl.StreamOutlet(pylsl.StreamInfo(name, "Markers", 1, pylsl.IRREGULAR_RATE, "string", name))
    waiting = [(sample / plan.sfreq + delay, sample, number) for sample, number, delay in plan.events]
    heapq.heapify(waiting)
    began = _began()
    while waiting:
        due, sample, number = heapq.heappop(waiting)
        _wait_until(began + due)
        outlet.push_sample([f"{number:06d}"], began + sample / plan.sfreq + _own_clock(pylsl))
    time.sleep(60)


def _began() -> float:
    """Return the time of the first sample, once it is told."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    return float(sys.stdin.readline())


def _wait_until(due: float) -> None:
    if (wait := due - time.time()) > 0:
        time.sleep(wait)


def _own_clock(pylsl: Any) -> float:
    """Return what the clock of LSL in this process shows beyond the time of the machine, which both senders know."""
    return pylsl.local_clock() - time.time()


@contextmanager
def senders(
    plan: Plan, name: str, ch_names: Sequence[str], config: str, priority: int | None = None
) -> Iterator[Callable[[], None]]:
    """Run both senders, each on a clock of its own. Gives a function that lets them begin.

    Parameters
    ----------
    plan : Plan
        What they do.
    name : str
        Name of the stream of EEG; that of the markers is called NAME-markers.
    ch_names : sequence of str
        Channels of the EEG.
    config : str
        Configuration of liblsl.
    priority : int or None
        Real-time priority of both.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "other_clock.so"
        source = Path(__file__).with_name("other_clock.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        told = {
            "plan": dataclasses.asdict(plan),
            "name": name,
            "ch_names": list(ch_names),
            "config": config,
            "priority": priority,
        }
        processes: list[subprocess.Popen[str]] = []

        def begin() -> None:
            began = time.time() + BEFORE_S
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{began!r}\n")
                process.stdin.flush()

        try:
            for what, (offset, drift) in zip(("eeg", "markers"), plan.clocks, strict=True):
                environment = {**os.environ, "LD_PRELOAD": str(library), "OTHER_CLOCK": f"{offset},{drift}"}
                command = [sys.executable, __file__, json.dumps(told | {"what": what})]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            yield begin
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def main(told: dict[str, Any]) -> None:
    import pylsl

    if told["priority"] is not None:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(told["priority"]))
    pylsl.set_config_content(told["config"])
    plan = Plan(**told["plan"])
    if told["what"] == "eeg":
        send_eeg(plan, told["name"], told["ch_names"])
    else:
        send_markers(plan, f"{told['name']}-markers")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
