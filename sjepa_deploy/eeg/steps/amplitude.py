"""Changes amplitudes sample by sample: clipping and scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sjepa_deploy.eeg.steps.base import FloatArray, Flow, Goal, Running, StreamStep
from sjepa_deploy.eeg.steps.checks import check_positive, check_same_channels
from sjepa_deploy.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Clip(StreamStep):
    """Limits amplitudes: values beyond `limit` on either side become the limit.

    Attributes
    ----------
    limit : float
        Largest absolute value, in the unit at this place: that of the model, or spreads after a standardisation.
    """

    name: ClassVar[str] = "clip"
    memory: ClassVar[bool] = False

    limit: float

    def __post_init__(self) -> None:
        check_positive(self.limit, "The limit of the clipping")

    def told(self, flow: Flow) -> str:
        """Return the limit."""
        return f"clipped to -{self.limit:g} to {self.limit:g}"

    def causal(self, flow: Flow) -> Running:
        """Return the clipping, which has no memory."""
        return _Pointwise(lambda samples: np.clip(samples, -self.limit, self.limit))

    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the same clipping."""
        return np.clip(data, -self.limit, self.limit)


@dataclass(frozen=True, kw_only=True)
class Scale(StreamStep):
    """Multiplies amplitudes by a factor, or each channel by its own.

    Attributes
    ----------
    factors : tuple of float
        One factor for all channels, or one for each of `ch_names`.
    ch_names : tuple of str or None
        Channels that the factors belong to, where there are several. The step then stands where these are the channels.
    """

    name: ClassVar[str] = "scale"
    changes_unit: ClassVar[bool] = True
    memory: ClassVar[bool] = False

    factors: tuple[float, ...]
    ch_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if any(not math.isfinite(factor) or factor == 0 for factor in self.factors):
            raise SpecError("A factor of the scaling is zero or no number.", "Use finite factors other than zero.")
        wanted = 1 if self.ch_names is None else len(self.ch_names)
        if len(self.factors) != wanted:
            raise SpecError(
                f"The scaling has {len(self.factors)} factors for {'all' if self.ch_names is None else wanted} channels.",
                "Give one factor, or name the channels and give one factor for each.",
            )

    def check(self, goal: Goal) -> None:
        """Refuse factors of other channels than the model's."""
        if self.ch_names is not None and goal.ch_names is not None:
            check_same_channels(self.ch_names, goal.ch_names, "The scaling")

    def told(self, flow: Flow) -> str:
        """Return the factor, or that there are several."""
        return "each channel scaled by its factor" if self.ch_names is not None else f"scaled by {self.factors[0]:g}"

    def causal(self, flow: Flow) -> Running:
        """Return the scaling, which has no memory."""
        factors = self._of(flow)
        return _Pointwise(lambda samples: samples * factors)

    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the same scaling."""
        return data * self._of(flow)[:, None]

    def _of(self, flow: Flow) -> FloatArray:
        if self.ch_names is not None:
            check_same_channels(self.ch_names, flow.ch_names, "The scaling")
        return np.array(self.factors)


class _Pointwise(Running):
    """Applies a function of single samples."""

    def __init__(self, function: Callable[[FloatArray], FloatArray]) -> None:
        self._function = function

    def start(self, sample: FloatArray) -> FloatArray:
        changed: FloatArray = self(sample[None])[0]
        return changed

    def __call__(self, samples: FloatArray) -> FloatArray:
        return self._function(samples)
