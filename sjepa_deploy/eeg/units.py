"""Names and converts the units of samples: files, streams, windows and models meet here."""

from __future__ import annotations

from sjepa_deploy.errors import RecordingError, SjepaError
from sjepa_deploy.spec import UNITS_IN_VOLTS, Unit

_NAMES: dict[str, Unit] = {
    # EDF keeps 8 letters: "microvol".
    # casefold turns the micro sign into the mu; "-9" to "0" are the powers of ten that mne-lsl's player states
    **dict.fromkeys(("nv", "nanov", "nanovolt", "nanovolts", "nvolt", "nvolts", "-9"), "nV"),
    **dict.fromkeys(
        ("uv", "μv", "microv", "microvol", "microvolt", "microvolts", "uvolt", "uvolts", "μvolt", "μvolts", "-6"), "uV"
    ),
    **dict.fromkeys(("mv", "millivol", "millivolt", "millivolts", "mvolt", "mvolts", "-3"), "mV"),
    **dict.fromkeys(("v", "volt", "volts", "0"), "V"),
}


PLAUSIBLE_RMS = (1e-7, 1e-2)
"""Volts between which the RMS of EEG lies, from far below an amplifier's noise to far above a large artefact."""


def unit_named(text: str) -> Unit | None:
    """Return the unit that a file or stream calls `text`, or None for another quantity or an unknown word."""
    return _NAMES.get(text.strip().casefold())


def check_unit(unit: str, error: type[SjepaError] = RecordingError, where: str = "") -> None:
    """Refuse a unit that is not known.

    Raises
    ------
    SjepaError
        `error`, which names the units.
    """
    if unit not in UNITS_IN_VOLTS:
        raise error(f"{unit!r}{where} is not a unit.", f"Use one of {', '.join(UNITS_IN_VOLTS)} with `--unit`.")


def volts_in(unit: Unit) -> float:
    """Return how many volts one `unit` is."""
    return UNITS_IN_VOLTS[unit]


def conversion(source: Unit, target: Unit) -> float:
    """Return the factor that brings samples in `source` to `target`."""
    return UNITS_IN_VOLTS[source] / UNITS_IN_VOLTS[target]
