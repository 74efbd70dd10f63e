"""Reads the steps of a signal from a list of braindecode's preprocessors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sjepa_deploy.eeg.steps import BandPass, Channels, ExponentialStandardise, Notch, Reference, Resample, Step
from sjepa_deploy.errors import DataError
from sjepa_deploy.spec import EventWindow, Position, SignalSpec, Unit

_NOTHING = {"picks": None, "n_jobs": None, "verbose": None, "pad": None, "skip_by_annotation": None, "channel_wise": None}
"""Arguments that change nothing in the result, or only its edges."""

_PICKS = {
    "pick",
    "pick_types",
    "pick_channels",
    "reorder_channels",
    "drop_channels",
    "rename_channels",
    "set_montage",
    "load_data",
}
"""Preprocessors that choose or name channels: the signal's channels say the same."""

_UNITS: dict[float, Unit] = {1.0: "V", 1e3: "mV", 1e6: "uV", 1e9: "nV"}
"""Factors that recordings in volts are multiplied by, and the unit that they make."""


def signal_from_braindecode(
    preprocessors: Sequence[Any],
    *,
    ch_names: Sequence[str],
    sfreq: float,
    n_times: int,
    positions: Sequence[Position] | None = None,
    trial_start_offset_samples: int = 0,
    events: Sequence[str] = (),
    event_locked: bool = True,
) -> SignalSpec:
    """Return the signal that a list of braindecode's preprocessors and its windowing make.

    Parameters
    ----------
    preprocessors : sequence of braindecode.preprocessing.Preprocessor
        What the training recordings went through.
    ch_names : sequence of str
        Channels of the windows, in their order.
    sfreq : float
        Rate of the windows in Hz.
    n_times : int
        Samples of a window.
    positions : sequence of (float, float, float) or None
        Positions of the channels in metres in the head frame.
    trial_start_offset_samples : int
        As in `braindecode.preprocessing.create_windows_from_events`: samples from the event to the window's first one.
    events : sequence of str
        Descriptions of the events (keys of the windower's ``mapping``).
    event_locked : bool
        Whether windows belong to events; false for `create_fixed_length_windows`.

    Returns
    -------
    SignalSpec
        The phase is zero-phase where a filter is, as MNE's filters are by default.

    Raises
    ------
    DataError
        If a preprocessor has no twin here. The message names the preprocessor.

    Warns
    -----
    UserWarning
        If a moving standardisation has an initial block: braindecode standardises that block with samples that come later, which
        cannot run live. Windows after the block are the same.
    """
    steps: list[Step] = []
    unit: Unit = "V"
    zero_phase = False
    for preprocessor in preprocessors:
        name, arguments = _call_of(preprocessor)
        if name in _PICKS:
            if not any(isinstance(step, Channels) for step in steps) and name not in (
                "load_data",
                "rename_channels",
                "set_montage",
            ):
                steps.append(Channels())
        elif name in _FACTORS:
            unit = _unit_of(name, arguments, unit)
        elif name in _TWINS:
            step = _TWINS[name](name, dict(arguments))
            zero_phase |= isinstance(step, (BandPass, Notch))
            steps.append(step)
        else:
            raise DataError(
                f"The preprocessor {name!r} has no twin that runs live.",
                "Leave it out, or prepare the training windows with `sjepa_deploy.eeg.prepare`.",
            )
    if not any(isinstance(step, Resample) for step in steps):
        steps.append(Resample())
    if not any(isinstance(step, Channels) for step in steps):
        steps.insert(0, Channels())
    return SignalSpec(
        n_chans=len(ch_names),
        n_times=n_times,
        sfreq=sfreq,
        unit=unit,
        ch_names=tuple(ch_names),
        positions=None if positions is None else tuple(positions),
        steps=tuple(steps),
        phase="zero-phase" if zero_phase else "causal",
        event_window=EventWindow(start=trial_start_offset_samples / sfreq, events=tuple(events)) if event_locked else None,
    )


def _call_of(preprocessor: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the name of what a preprocessor calls, and the arguments."""
    function = getattr(preprocessor, "fn", None)
    name = function if isinstance(function, str) else getattr(function, "__name__", None)
    if name is None:
        raise DataError(f"{preprocessor!r} is no preprocessor of braindecode.", "Give the list that `preprocess` took.")
    return name, getattr(preprocessor, "kwargs", {})


def _only(name: str, arguments: dict[str, Any], *known: str, **fixed: Any) -> None:
    """Refuse arguments that change the result and have no twin."""
    for argument, value in arguments.items():
        if argument in known or argument in _NOTHING or (argument in fixed and value == fixed[argument]):
            continue
        raise DataError(
            f"The preprocessor {name!r} has {argument}={value!r}, which has no twin that runs live.",
            "Use its default, or prepare the training windows with `sjepa_deploy.eeg.prepare`.",
        )


def _filter(name: str, arguments: dict[str, Any]) -> Step:
    _only(
        name,
        arguments,
        "l_freq",
        "h_freq",
        method="fir",
        phase="zero",
        fir_design="firwin",
        fir_window="hamming",
        filter_length="auto",
        l_trans_bandwidth="auto",
        h_trans_bandwidth="auto",
        iir_params=None,
    )
    return BandPass(l_freq=arguments.get("l_freq"), h_freq=arguments.get("h_freq"))


def _notch(name: str, arguments: dict[str, Any]) -> Step:
    raise DataError(
        "MNE's FIR notch ('notch_filter') has no twin that runs live.",
        "Train through `sjepa_deploy.eeg.prepare` with the step Notch, or leave it out where the band ends below it.",
    )


def _resample(name: str, arguments: dict[str, Any]) -> Step:
    _only(name, arguments, "sfreq", "npad", "window", "method", stim_picks=None, events=None)
    return Resample()


def _reference(name: str, arguments: dict[str, Any]) -> Step:
    _only(name, arguments, "ref_channels", projection=False, ch_type="eeg", forward=None, joint=False)
    channels = arguments.get("ref_channels", "average")
    if channels == "average":
        return Reference()
    return Reference(channels=(channels,) if isinstance(channels, str) else tuple(channels))


def _standardise(name: str, arguments: dict[str, Any]) -> Step:
    _only(name, arguments, "factor_new", "init_block_size", "eps")
    if (block := arguments.get("init_block_size")) is not None:
        warnings.warn(
            f"The first {block} samples of each training recording were standardised with samples that come later. Live "
            "they are not: windows in them differ.",
            UserWarning,
            stacklevel=4,
        )
    return ExponentialStandardise(factor_new=arguments.get("factor_new", 1e-3), eps=arguments.get("eps", 1e-4))


def _unit_of(name: str, arguments: Mapping[str, Any], unit: Unit) -> Unit:
    factors = [value for argument, value in arguments.items() if argument in ("factor", "x2", "scalings")]
    found = _UNITS.get(float(factors[0])) if len(factors) == 1 and isinstance(factors[0], (int, float)) else None
    if found is None or unit != "V":
        raise DataError(
            f"The preprocessor {name!r} does not say by which factor it multiplies ({dict(arguments)!r}).",
            "Give the factor as an argument, `Preprocessor(function, factor=1e6)`, and only once.",
        )
    return found


_FACTORS = ("<lambda>", "multiply", "scale")
"""Functions that multiply recordings in volts. The factor must be an argument, as in braindecode's tutorials."""

_TWINS: dict[str, Callable[[str, dict[str, Any]], Step]] = {
    "filter": _filter,
    "notch_filter": _notch,
    "resample": _resample,
    "set_eeg_reference": _reference,
    "exponential_moving_standardize": _standardise,
}
