"""Writes the states of a decision layer as numbers, for records and LSL streams, and reads them from records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sjepa_deploy.runtime.decisions.state import STATES, State
from sjepa_deploy.runtime.live.decision import Decision, flags_of

STATE_FIELDS = ("doubtful", "settling", "state", "class", "probability")
"""Columns of a record behind the outputs, where there is a decision layer."""


@dataclass(frozen=True, kw_only=True)
class RecordedState:
    """Holds what a decision layer was given for a window, and what it said.

    Attributes
    ----------
    index : int
        Number of the window.
    time : float
        Stamp of the newest sample.
    flags : tuple of str
        See `Decision.flags`.
    numbers : tuple of float
        State, class and probability as `numbers_of` gives them.
    """

    index: int
    time: float
    flags: tuple[str, ...]
    numbers: tuple[float, ...]


def numbers_of(state: State, class_names: Sequence[str]) -> tuple[float, float, float]:
    """Return state, class and probability as numbers.

    The state is its number in `STATES`, the class its number among `class_names` or -1. The probability is NaN where the state
    has none; of a regression it is the value.
    """
    number = state.probability if state.value is None else state.value
    return (
        float(STATES.index(state.name)),
        -1.0 if state.class_name is None else float(class_names.index(state.class_name)),
        math.nan if number is None else number,
    )


def columns_of(decision: Decision, class_names: Sequence[str]) -> tuple[float, ...]:
    """Return the values of `STATE_FIELDS`; nothing without a decision layer."""
    return (
        ()
        if decision.state is None
        else (
            float(decision.doubtful),
            float(decision.settling),
            *numbers_of(decision.state, class_names),
        )
    )


def recorded_state(fields: Mapping[str, float], columns: Sequence[float], stamp: float) -> RecordedState:
    """Return the state of a row of a record.

    Parameters
    ----------
    fields : mapping of str to float
        Values before the outputs, by their names in the record.
    columns : sequence of float
        Values of `STATE_FIELDS`.
    stamp : float
        Stamp of the row.
    """
    doubtful, settling, *numbers = columns
    flags = flags_of(
        late=fields["decided"] > fields["due"],
        held=fields["held"] != 0,
        bridged=fields["bridged"] != 0,
        doubtful=doubtful != 0,
        settling=settling != 0,
        bad_channels=fields["n_bad_channels"] > 0,
    )
    return RecordedState(index=int(fields["index"]), time=stamp, flags=flags, numbers=tuple(numbers))
