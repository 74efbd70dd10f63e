"""Refuses values that no step can have, and channels that a step was not made for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sjepa_deploy.errors import SpecError, listed


def check_positive(value: float, what: str) -> None:
    """Refuse a value that is not a finite number above zero.

    Raises
    ------
    SpecError
        If it is not; the sentence begins with `what`, such as "The limit of the clipping".
    """
    if not (math.isfinite(value) and value > 0):
        raise SpecError(f"{what} is {value:g}.", "Use a finite number above zero.")


def check_same_channels(ch_names: Sequence[str], there: Sequence[str], what: str) -> None:
    """Refuse channels that differ from those that a step was made for, in name or order. Case does not matter.

    Parameters
    ----------
    ch_names : sequence of str
        Channels that the step was made for.
    there : sequence of str
        Channels at the step's place.
    what : str
        The step, for the message, such as "The alignment".

    Raises
    ------
    SpecError
        If they differ.
    """
    mine, theirs = [name.casefold() for name in ch_names], [name.casefold() for name in there]
    if mine == theirs:
        return
    lacking = [name for name in ch_names if name.casefold() not in theirs]
    if lacking:
        told = f"{listed(lacking)} are not at its place"
    elif extra := [name for name in there if name.casefold() not in mine]:
        told = f"it has nothing for {listed(extra)}"
    else:
        told = "their order differs"
    raise SpecError(
        f"{what} was made for other channels: {told}.",
        "Make the step for the channels of the model, in their order, and put the step after the step that picks them.",
    )
