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
        flags = " or ".join(self.refuse)
        what = f"Windows with the flag {flags} are no signal." if self.refuse else "Windows with any flag are a signal."
        pause = "every pause" if self.max_gap is None else f"pauses of up to {self.max_gap:g} s"
        return f"{what} Evidence is kept over {pause}."
