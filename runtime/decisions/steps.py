"""Lists the steps of a decision layer: the name in the file, and the class."""

from __future__ import annotations

from sjepa_deploy.runtime.decisions.accumulate import Accumulate
from sjepa_deploy.runtime.decisions.interval import Interval
from sjepa_deploy.runtime.decisions.pauses import Dwell, Refractory
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.smoothing import Exponential, MeanOf
from sjepa_deploy.runtime.decisions.step import Step
from sjepa_deploy.runtime.decisions.threshold import Threshold

STEPS: dict[str, type[Step]] = {
    "probabilities": Probabilities,
    "interval": Interval,
    "exponential": Exponential,
    "mean": MeanOf,
    "refractory": Refractory,
    "threshold": Threshold,
    "dwell": Dwell,
    "accumulate": Accumulate,
}
"""A new step costs one file, and one row here."""
