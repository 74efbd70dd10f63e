"""
Your own preprocessing step
===========================

A step is one class with a causal and an offline form. This example writes a step, and checks that a
live stream gives what a recording gives.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
from scipy import signal as scipy_signal

from sjepa_deploy.eeg.chain import Chain
from sjepa_deploy.eeg.steps import STEPS, Channels, Resample
from sjepa_deploy.eeg.steps.filters import Filter
from sjepa_deploy.spec import SignalSpec


@dataclass(frozen=True, kw_only=True)
class DriftRemoval(Filter):
    """Takes slow drifts away by a high-pass of one pole."""

    name: ClassVar[str] = "drift-removal"

    seconds: float = 1.0

    def told(self, flow):
        """Return what the step does in words."""
        return f"without drifts slower than {self.seconds:g} s"

    def sections(self, flow):
        """Return the second-order section."""
        return np.array([[1.0, -1.0, 0.0, 1.0, -math.exp(-1 / (self.seconds * flow.sfreq)), 0.0]])

    def offline(self, data, flow):
        """Return the section run forwards and backwards."""
        return scipy_signal.sosfiltfilt(self.sections(flow), data, axis=1)


STEPS[DriftRemoval.name] = DriftRemoval

# %%
# The signal names the step. Live and offline code know it now.
signal = SignalSpec(n_chans=1, n_times=152, sfreq=100.0, ch_names=("Cz",), steps=(DriftRemoval(), Resample(), Channels()))
rng = np.random.default_rng(0)
eeg = np.cumsum(rng.normal(size=(1000, 1)), axis=0) + 20


def run(n):
    """Return the causal form on chunks of `n` samples."""
    chain = Chain(signal, ("Cz",), 100.0, np.eye(1))
    chain.start(eeg[0])
    return np.concatenate([chain(eeg[i : i + n])[0] for i in range(0, len(eeg), n)])


whole, chunks = run(1000), run(7)
print("chunks of 7 samples give the same bits:", np.array_equal(whole, chunks))

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
time = np.arange(1000) / 100
axis.plot(time, eeg[:, 0], color="gray", label="before")
axis.plot(time, whole[:, 0], label="after, causal")
axis.set(xlabel="seconds", ylabel="µV")
axis.legend()
plt.show()
