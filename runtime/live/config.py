"""Defines the configuration of a live decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sjepa_deploy.eeg.conditioning import BadChannels
from sjepa_deploy.eeg.continuity import MAX_JITTER_S
from sjepa_deploy.eeg.interpolation import INTERPOLATED_SHARE
from sjepa_deploy.errors import StreamError
from sjepa_deploy.spec import SignalSpec

Late = Literal["skip", "queue", "hold"]


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """A StreamConfig says how a stream is decoded.

    Attributes
    ----------
    hop : float
        Seconds from one decision to the next, rounded to samples of the model; 0 decides at every sample.
    deadline : float or None
        Seconds after the newest sample's stamp by which its decision is due. None takes the hop.
    late : {"skip", "queue", "hold"}
        What happens to a window whose deadline is over before it is decoded: it is left out, decoded all the same, or answered by
        the last decision again.
    bridge : int
        Largest number of lost samples that is interpolated in time, from stamps that are regular. After a larger loss decisions
        wait for a whole window.
    bad_channels : {"flag", "repair", "stop"}
        What happens to channels that turn flat, saturated, disconnected or not finite: decisions name them; they are also
        interpolated from the others while they are bad; or the decoder stops.
    interpolate : bool
        Whether channels of the model that the stream lacks are interpolated. Otherwise such a stream is refused.
    interpolate_share : float
        Largest share of the model's channels, 0 to 1, that `interpolate` makes.
    check_unit : bool
        Whether amplitudes that no EEG has in the stream's unit end the stream.
    bads : tuple of str
        Channels of the stream known to be bad: they count as lacking.
    max_jitter : float
        Seconds that a stamp may be off before it is always a loss; below it the measured jitter decides.
    silence : float
        Seconds without samples after which the source is reported as silent.
    give_up : float or None
        Seconds without samples after which the decoder stops. None waits for ever.
    keep_warm : float or None
        Seconds without a call after which the backend gets a dummy call, if the call ends before the next window is due. GPUs
        lower their clock when they idle. None makes no dummy calls.
    roll : bool or None
        Whether the backend is given new samples alone where a window follows the last one. The backend must keep the others (see
        `Predictor.rolling`); a kernel that stays on the GPU takes no `keep_warm` beside it. None gives new samples alone where
        the backend can take them. Decisions are the same to the bit.

    Raises
    ------
    StreamError
        If a policy is not one of its choices, or `keep_warm` is not positive.
    """

    hop: float = 0.1
    deadline: float | None = None
    late: Late = "skip"
    bridge: int = 0
    bad_channels: BadChannels = "flag"
    interpolate: bool = False
    interpolate_share: float = INTERPOLATED_SHARE
    check_unit: bool = True
    bads: tuple[str, ...] = ()
    max_jitter: float = MAX_JITTER_S
    silence: float = 2.0
    give_up: float | None = None
    keep_warm: float | None = None
    roll: bool | None = None

    def __post_init__(self) -> None:
        for name, choices in (("late", get_args(Late)), ("bad_channels", get_args(BadChannels))):
            if getattr(self, name) not in choices:
                raise StreamError(f"{getattr(self, name)!r} is not a choice for {name}.", f"Use one of {', '.join(choices)}.")
        if self.keep_warm is not None and not self.keep_warm > 0:
            raise StreamError(f"keep_warm is {self.keep_warm:g} s.", "Use a positive time, such as 0.005.")

    @property
    def share(self) -> float:
        """Return the largest share of the model's channels that is interpolated."""
        return self.interpolate_share if self.interpolate else 0.0

    def deadline_s(self, signal: SignalSpec) -> float:
        """Return the deadline in seconds: the one that is set, or the hop."""
        return self.hop_samples(signal) / signal.sfreq if self.deadline is None else self.deadline

    def hop_samples(self, signal: SignalSpec) -> int:
        """Return the hop in samples of the model.

        Raises
        ------
        StreamError
            If the hop is no positive time, below a sample, or longer than the window.
        """
        window = signal.n_times / signal.sfreq
        hop = 1 if self.hop == 0 else self.hop * signal.sfreq
        if not (math.isfinite(hop) and hop > 0.5):
            raise StreamError(
                f"A hop of {self.hop:g} s is less than a sample of the model ({1 / signal.sfreq:g} s).", "Use 0 for every sample."
            )
        if round(hop) > signal.n_times:
            raise StreamError(
                f"A hop of {self.hop:g} s is longer than the window of {window:g} s: samples in between would be left out.",
                f"Use a hop of at most {window:g} s.",
            )
        return round(hop)
