"""Defines a decision: the output of the model for one window, its times, and the state that a decision layer gives it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.runtime.decisions.state import State
from sjepa_deploy.runtime.live.markers import Event


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """A decision holds the output of the model for one window.

    Attributes
    ----------
    index : int
        Number of the window among all that were due.
    prediction : ndarray of float32
        Output of the model, shape `ModelSpec.output_shape`.
    time, due, received, decided : float
        On the source's clock in seconds: stamp of the newest sample, deadline, arrival of the newest sample (or of the event's
        marker, if that came later), and when the prediction was there.
    infer_s : float
        Seconds in the backend.
    held : bool
        Whether the decision repeats the last one, as its own window was late.
    bridged : bool
        Whether samples of the window were interpolated in time.
    bad_channels : tuple of str
        Channels that were bad somewhere in the window.
    doubtful : bool
        Whether samples may be missing in the window: its newest ones are later than any jitter so far.
    settling : bool
        Whether the window begins where the steps of the signal still settle, after the start of the stream or after a loss.
    state : State or None
        What the decision layer says: class, probability and reason. None without a layer.
    event : Event or None
        The event that the window belongs to. None where a window is decided every hop.
    trial : float or None
        When the trial of the event began, in seconds of the source's clock. None if the event is in no trial.
    """

    index: int
    prediction: NDArray[np.float32]
    time: float
    due: float
    received: float
    decided: float
    infer_s: float
    held: bool
    bridged: bool
    bad_channels: tuple[str, ...]
    doubtful: bool = False
    settling: bool = False
    state: State | None = None
    event: Event | None = None
    trial: float | None = None

    @property
    def age(self) -> float:
        """Return the seconds from the newest sample to the decision."""
        return self.decided - self.time

    @property
    def latency(self) -> float:
        """Return the seconds from the arrival of the newest sample to the decision."""
        return self.decided - self.received

    @property
    def missed(self) -> bool:
        """Return whether the decision came after its deadline, or repeats another."""
        return self.held or self.decided > self.due

    @property
    def flags(self) -> tuple[str, ...]:
        """Return what to know before relying on the decision: "late", "held", "bridged", "settling", ..."""
        return flags_of(
            late=self.decided > self.due,
            held=self.held,
            bridged=self.bridged,
            doubtful=self.doubtful,
            settling=self.settling,
            bad_channels=bool(self.bad_channels),
        )


def flags_of(*, late: bool, held: bool, bridged: bool, doubtful: bool, settling: bool, bad_channels: bool) -> tuple[str, ...]:
    """Return the names of the flags that are set."""
    if not (late or held or bridged or doubtful or settling or bad_channels):
        return ()
    flags = {
        "late": late,
        "held": held,
        "bridged": bridged,
        "doubtful": doubtful,
        "settling": settling,
        "bad channels": bad_channels,
    }
    return tuple(name for name, holds in flags.items() if holds)
