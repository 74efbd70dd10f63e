"""Backends with planted faults, for benchmarks that must find them."""

import itertools
import os
import signal
import time

import numpy as np

from sjepa_deploy.runtime.backend import BackendEntry
from sjepa_deploy.runtime.backends.ort import OrtCpuBackend
from sjepa_deploy.runtime.bench.baselines import ALL_BACKENDS


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Slow0(OrtCpuBackend):
    """ONNX Runtime, with calls that are longer by a share of what they take: here by nothing, for comparison."""

    name = "slow-0"
    share = 0.0

    def run(self, eeg):
        start = time.perf_counter()
        out = super().run(eeg)
        spin(self.share * (time.perf_counter() - start))
        return out


class Slow10(Slow0):
    name = "slow-10"
    share = 0.1


class Slow1(Slow0):
    name = "slow-1"
    share = 0.01


class Stalls(OrtCpuBackend):
    """One call in a thousand takes 20 ms."""

    name = "stalls"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._number = itertools.count(1)

    def run(self, eeg):
        out = super().run(eeg)
        if next(self._number) % 1000 == 0:
            spin(0.02)
        return out


class Sleeps(OrtCpuBackend):
    """Right, and 30 ms late."""

    name = "sleeps"

    def run(self, eeg):
        time.sleep(0.03)
        return super().run(eeg)


class Wrong(OrtCpuBackend):
    """Fast, and wrong."""

    name = "wrong"

    def run(self, eeg):
        return super().run(eeg) + 0.1


class Breaks(OrtCpuBackend):
    """Works while it is judged, and fails later as a foreign library does."""

    name = "breaks"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._calls_left = 100

    def run(self, eeg):
        self._calls_left -= 1
        if not self._calls_left:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return super().run(eeg)


class Sticks(Breaks):
    """Cannot be released once it is broken, as after a CUDA error that stays."""

    name = "sticks"

    def close(self):
        if self._calls_left <= 0:
            raise RuntimeError("CUDA error: the context is lost\nmore")
        super().close()


class SticksAtOnce(Sticks):
    """Breaks while it is judged."""

    name = "sticks-at-once"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._calls_left = 1


class Buffers(OrtCpuBackend):
    """Has a buffer for each batch size that a call copies the windows to, slowly, unless they stand there already."""

    name = "buffers"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._buffers = {}

    def input_buffer(self, batch):
        return self._buffers.setdefault(batch, np.full((batch, *self._spec.input_shape), np.nan, np.float32))

    def run(self, eeg):
        buffer = self.input_buffer(len(eeg))
        if eeg is not buffer:
            time.sleep(0.005)
            buffer[...] = eeg
        return super().run(buffer)


class Interrupts(OrtCpuBackend):
    """Somebody presses Ctrl-C during the 3000th call."""

    name = "interrupts"
    calls_left = 3000

    def run(self, eeg):
        self.calls_left -= 1
        if not self.calls_left:
            os.kill(os.getpid(), signal.SIGINT)
        return super().run(eeg)


BACKENDS = {c.name: c for c in (Slow0, Slow10, Slow1, Stalls, Sleeps, Wrong, Breaks, Sticks, SticksAtOnce, Buffers, Interrupts)}


def plant(setitem=dict.__setitem__) -> None:
    """Let benchmarks find these backends by name; `setitem` may be that of monkeypatch."""
    for name, cls in BACKENDS.items():
        setitem(ALL_BACKENDS, name, BackendEntry(target=f"{__name__}:{cls.__name__}", package="onnxruntime", extra=""))
