"""Filters by second-order sections: the band-pass, and the causal filter that runs all sections of neighbouring steps at once."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sjepa_deploy.eeg.steps.base import SETTLED, FloatArray, Flow, Goal, Running, StreamStep, mne_filter, scipy_signal
from sjepa_deploy.errors import SpecError

Design = Literal["butterworth", "bessel"]

NO_SECTIONS: FloatArray = np.empty((0, 6))


class CausalFilter(Running):
    """Filters by second-order sections with carried state: the output does not depend on how the input is cut into chunks.

    The filter starts on the steady state of the first sample (`scipy.signal.sosfilt_zi`), so that an electrode offset makes no
    transient.

    Parameters
    ----------
    sos : ndarray, shape (n_sections, 6)
        The filter; none passes its input on.
    n_chans : int
        Number of channels.
    """

    def __init__(self, sos: FloatArray, n_chans: int) -> None:
        self._sos = sos
        self._sosfilt = scipy_signal().sosfilt
        self._zi: FloatArray = np.zeros((0, 2)) if not len(sos) else scipy_signal().sosfilt_zi(sos)
        self._state = np.zeros((len(sos), 2, n_chans))

    def start(self, sample: FloatArray) -> FloatArray:
        """Start as if `sample`, shape (n_chans,), had been there for ever, and return its product with the gain at 0 Hz."""
        self._state[:] = self._zi[:, :, None] * sample
        return self._of_constant(sample)

    def restart_channels(self, channels: Sequence[int], sample: FloatArray) -> FloatArray:
        """Start some channels anew on their values in `sample`, and return what comes out of a constant sample."""
        self._state[:, :, channels] = self._zi[:, :, None] * sample[channels]
        return self._of_constant(sample)

    def __call__(self, samples: FloatArray) -> FloatArray:
        """Filter samples of shape (n_samples, n_chans)."""
        if not len(self._sos) or not len(samples):
            return samples
        filtered: FloatArray
        filtered, self._state = self._sosfilt(self._sos, samples, axis=0, zi=self._state)
        return filtered

    def _of_constant(self, sample: FloatArray) -> FloatArray:
        gain = 1.0
        for b0, b1, b2, a0, a1, a2 in self._sos:
            gain *= (b0 + b1 + b2) / (a0 + a1 + a2)
        return gain * sample


@dataclass(frozen=True, kw_only=True)
class Filter(StreamStep):
    """Describes a step whose causal form is second-order sections. Sections of neighbouring steps run as one filter."""

    @abstractmethod
    def sections(self, flow: Flow) -> FloatArray:
        """Return the second-order sections, shape (n_sections, 6); an empty array means no filter."""

    def causal(self, flow: Flow) -> CausalFilter:
        """Return the sections with their state."""
        return CausalFilter(self.sections(flow), len(flow.ch_names))

    def settling(self, flow: Flow) -> float:
        """Return the time in which the slowest pole decays to `SETTLED`."""
        return settling_of(self.sections(flow), flow.sfreq)

    def delay(self, hertz: float, flow: Flow) -> float:
        """Return the group delay of the sections, -d(phase)/d(omega)."""
        return group_delay(self.sections(flow), flow.sfreq, hertz)


@dataclass(frozen=True, kw_only=True)
class BandPass(Filter):
    """Passes a band.

    The causal form is a high-pass and a low-pass of `order` at the band's edges. The zero-phase form is MNE's FIR filter (firwin,
    its default).

    Attributes
    ----------
    l_freq, h_freq : float or None
        Edges in Hz; None leaves that side open (resampling still limits the upper one).
    order : int
        Order of each of the two causal filters, 1 to 8.
    design : {"butterworth", "bessel"}
        Family of the causal filters. "bessel" has nearly the same delay at all frequencies, and a slower slope.
    """

    name: ClassVar[str] = "band-pass"

    l_freq: float | None = 0.5
    h_freq: float | None = 40.0
    order: int = 2
    design: Design = "butterworth"

    def __post_init__(self) -> None:
        edges = [f for f in (self.l_freq, self.h_freq) if f is not None]
        if any(not (math.isfinite(f) and f > 0) for f in edges) or edges != sorted(set(edges)):
            raise SpecError(
                f"The band {self.l_freq} to {self.h_freq} Hz is not one.",
                "Use positive edges with the lower one below the upper one, or none.",
            )
        if not 1 <= self.order <= 8:
            raise SpecError(f"The band-pass has order {self.order}.", "Use an order from 1 to 8.")

    def check(self, goal: Goal) -> None:
        """Refuse edges that the model's rate cannot hold."""
        for side, edge in (("lower", self.l_freq), ("upper", self.h_freq)):
            if edge is not None and edge >= goal.sfreq / 2:
                raise SpecError(
                    f"The {side} band edge of {edge:g} Hz is not below half the sampling rate of {goal.sfreq:g} Hz.",
                    "Lower it, or leave it open (the resampler sets the upper one).",
                )

    @property
    def open(self) -> bool:
        """Whether both sides are open."""
        return self.l_freq is None and self.h_freq is None

    @property
    def band(self) -> str:
        """Return the band in words."""
        return f"{self.l_freq or 0:g} Hz up" if self.h_freq is None else f"{self.l_freq or 0:g} to {self.h_freq:g} Hz"

    def told(self, flow: Flow) -> str:
        """Return the band."""
        return "" if self.open else f"band-passed {self.band}"

    def sections(self, flow: Flow) -> FloatArray:
        """Return the sections of the high-pass, and then of the low-pass, at the rate of `flow`."""
        return np.concatenate(
            [NO_SECTIONS]
            + [
                self._design(edge, kind, flow.sfreq)
                for edge, kind in ((self.l_freq, "highpass"), (self.h_freq, "lowpass"))
                if edge is not None
            ]
        )

    def _design(self, edge: float, kind: str, sfreq: float) -> FloatArray:
        signal = scipy_signal()
        made: FloatArray
        if self.design == "butterworth":
            made = signal.butter(self.order, edge, kind, fs=sfreq, output="sos")
        else:
            made = signal.bessel(self.order, edge, kind, fs=sfreq, output="sos", norm="mag")
        return made

    def length(self, sfreq: float) -> float:
        """Return the length of the zero-phase form in seconds; a shorter stretch would hold only the filter's edges."""
        if self.open:
            return 0.0
        made = mne_filter().create_filter(None, sfreq, self.l_freq, self.h_freq, phase="zero", verbose="error")
        return len(made) / sfreq

    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the zero-phase form. The upper edge is below the stretch's Nyquist frequency, as it is below the model's."""
        if self.open:
            return data
        filtered: FloatArray = mne_filter().filter_data(data, flow.sfreq, self.l_freq, self.h_freq, phase="zero", verbose="error")
        return filtered

    def reach(self, flow: Flow) -> float:
        """Return the length of the zero-phase form: half of it, and what MNE needs to continue an edge."""
        return round(self.length(flow.sfreq) * flow.sfreq)


def settling_of(sos: FloatArray, sfreq: float) -> float:
    """Return the time in seconds in which the slowest pole of second-order sections decays to `SETTLED`."""
    radius = max((abs(root) for section in sos for root in np.roots(section[3:])), default=0.0)
    return math.log(SETTLED) / math.log(radius) / sfreq if radius > 0 else 0.0


def group_delay(sos: FloatArray, sfreq: float, hertz: float) -> float:
    """Return the group delay of second-order sections at `hertz` in seconds: -d(phase)/d(omega), by a central difference."""
    step = hertz * 1e-3
    turn = np.exp(-2j * np.pi * np.array([hertz - step, hertz + step]) / sfreq)
    response = np.ones(2, complex)
    for b0, b1, b2, a0, a1, a2 in sos:
        response *= (b0 + b1 * turn + b2 * turn**2) / (a0 + a1 * turn + a2 * turn**2)
    return -float(np.angle(response[1] / response[0])) / (2 * np.pi * 2 * step)
