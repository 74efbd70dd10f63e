"""Says which windows are no signal, and after which pause evidence is forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from sjepa_deploy.runtime.decisions.step import check_number


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Says which windows are no signal.

    Outputs that are missing or not finite are never a signal.

    Attributes
    ----------
    refuse : tuple of str
        Flags of windows that are no signal, see `sjepa_deploy.runtime.live.decision.Decision.flags`.
    max_gap : float or None
        Seconds from one window with signal to the next, after which smoothing, dwell and evidence start anew. None: never.
    """

    refuse: tuple[str, ...] = ("held", "bad channels")
    max_gap: float | None = None

    def __post_init__(self) -> None:
        if self.max_gap is not None:
            check_number("max_gap", self.max_gap, 0.0, open_low=True)

    def __str__(self) -> str:
        what = f"Windows that are {' or '.join(self.refuse)} are no signal. " if self.refuse else "Every window is a signal. "
        return what + ("No pause is too long." if self.max_gap is None else f"A pause of over {self.max_gap:g} s starts anew.")
