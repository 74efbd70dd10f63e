"""Holds the steps of a signal, one file a kind, and the table of their names."""

from __future__ import annotations

from sjepa_deploy.eeg.steps.base import Flow, Goal, Phase, Step, StreamStep, WindowStep
from sjepa_deploy.eeg.steps.channels import Channels
from sjepa_deploy.eeg.steps.filters import BandPass
from sjepa_deploy.eeg.steps.rate import Resample
from sjepa_deploy.eeg.steps.reference import Reference
from sjepa_deploy.serialize import tagged

STEPS: dict[str, type[Step]] = {step.name: step for step in (BandPass, Resample, Channels, Reference)}
"""All steps by the names that files use."""

tagged(Step, "step", STEPS)

__all__ = ["STEPS", "BandPass", "Channels", "Flow", "Goal", "Phase", "Reference", "Resample", "Step", "StreamStep", "WindowStep"]
