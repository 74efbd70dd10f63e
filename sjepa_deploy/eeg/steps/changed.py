"""Changes single steps of a signal: band, notch and reference."""

from __future__ import annotations

import dataclasses
from typing import Any

from sjepa_deploy.eeg.steps.base import Step
from sjepa_deploy.eeg.steps.channels import Channels
from sjepa_deploy.eeg.steps.filters import BandPass
from sjepa_deploy.eeg.steps.notch import Notch
from sjepa_deploy.eeg.steps.reference import Reference


def changed_steps(steps: tuple[Step, ...], changes: dict[str, Any], ch_names: tuple[str, ...] | None) -> tuple[Step, ...]:
    """Return `steps` with the single things that a user named.

    Parameters
    ----------
    steps : tuple of Step
        The steps before.
    changes : dict
        ``l_freq`` and ``h_freq``: edges of the band-pass in Hz, None for an open side. ``notch``: mains frequency in Hz, None for
        no notch. ``reference``: "average" of the model's channels, "none", or a tuple of names. A reference that is not there yet
        takes the place behind the step "channels" if the model has these channels, else the place before that step.
    ch_names : tuple of str or None
        Channels of the model.
    """
    changed = list(steps)
    if edges := {name: changes[name] for name in ("l_freq", "h_freq") if name in changes}:
        bands = [step for step in changed if isinstance(step, BandPass)][:1]
        band = dataclasses.replace(bands[0] if bands else BandPass(l_freq=None, h_freq=None), **edges)
        at = changed.index(bands[0]) if bands else 0
        changed[at : at + len(bands)] = [] if band.open else [band]
    if "notch" in changes:
        wanted = [] if changes["notch"] is None else [changes["notch"]]
        if [step.freq for step in changed if isinstance(step, Notch)] != wanted:
            changed = [*(Notch(freq=freq) for freq in wanted), *(step for step in changed if not isinstance(step, Notch))]
    if "reference" in changes:
        named = None if changes["reference"] == "average" else changes["reference"]
        references = [] if named == "none" else [Reference(channels=named)]
        if [step for step in changed if isinstance(step, Reference)] != references:
            changed = [step for step in changed if not isinstance(step, Reference)]
            at = next(i for i, step in enumerate(changed) if isinstance(step, Channels))
            of_model = named is None or {*map(str.casefold, named)} <= {*map(str.casefold, ch_names or ())}
            changed[at + of_model : at + of_model] = references
    return tuple(changed)
