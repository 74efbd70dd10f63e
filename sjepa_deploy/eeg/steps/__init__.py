"""Holds the steps of a signal, one file a kind, and the table of their names."""

from __future__ import annotations

from sjepa_deploy.eeg.steps.alignment import Alignment, RunningAlignment
from sjepa_deploy.eeg.steps.amplitude import Clip, Scale
from sjepa_deploy.eeg.steps.base import Flow, Goal, Phase, Step, StreamStep, WindowStep
from sjepa_deploy.eeg.steps.baseline import Baseline
from sjepa_deploy.eeg.steps.channels import Channels
from sjepa_deploy.eeg.steps.filters import BandPass
from sjepa_deploy.eeg.steps.notch import Notch
from sjepa_deploy.eeg.steps.rate import Resample
from sjepa_deploy.eeg.steps.reference import Reference
from sjepa_deploy.eeg.steps.standardise import ExponentialStandardise, ZScore
from sjepa_deploy.serialize import tagged

STEPS: dict[str, type[Step]] = {
    step.name: step
    for step in (
        BandPass,
        Notch,
        Resample,
        Channels,
        Reference,
        Alignment,
        RunningAlignment,
        ExponentialStandardise,
        Scale,
        Clip,
        Baseline,
        ZScore,
    )
}
"""All steps by the names that files use."""

tagged(Step, "step", STEPS)

__all__ = [
    "STEPS",
    "Alignment",
    "BandPass",
    "Baseline",
    "Channels",
    "Clip",
    "ExponentialStandardise",
    "Flow",
    "Goal",
    "Notch",
    "Phase",
    "Reference",
    "Resample",
    "RunningAlignment",
    "Scale",
    "Step",
    "StreamStep",
    "WindowStep",
    "ZScore",
]
