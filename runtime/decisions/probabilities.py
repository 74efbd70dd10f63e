"""Makes probabilities of the classes from the outputs of a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.step import Machine, Moment, Step, check_number, needs_classes


@dataclass(frozen=True, kw_only=True)
class Probabilities(Step):
    """Softmax of the outputs over a temperature; the sigmoid where one output tells two classes.

    The temperature is that of Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599. Other class
    frequencies than those of the calibration data multiply each class by their ratio (Saerens et al. 2002, "Adjusting the
    Outputs of a Classifier to New a Priori Probabilities", doi 10.1162/089976602753284446, equation 2.4).

    Attributes
    ----------
    temperature : float
        Number that the outputs are divided by.
    fitted_prevalence, prevalence : tuple of float or None
        Share of each class in the calibration data and where the layer decides. None leaves the shares as they are.
    """

    temperature: float = 1.0
    fitted_prevalence: tuple[float, ...] | None = None
    prevalence: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_number("The temperature", self.temperature, 0.0, open_low=True)
        prior_offsets(self.fitted_prevalence, self.prevalence)

    def machine(self, n_classes: int) -> Machine:
        """Return the machine that makes `n_classes` probabilities."""
        needs_classes(self, n_classes)
        return _Softmax(1 / self.temperature, prior_offsets(self.fitted_prevalence, self.prevalence, n_classes))

    def __str__(self) -> str:
        text = f"Outputs become probabilities at temperature {self.temperature:.4g}."
        if self.prevalence is None:
            return text
        return f"{text} They are corrected to the prevalence {', '.join(f'{share:.3g}' for share in self.prevalence)}."


def prior_offsets(
    fitted: Sequence[float] | None, stated: Sequence[float] | None, n_classes: int | None = None
) -> list[float] | None:
    """Return what is added to the logarithm of each class for other shares of the classes; None for nothing.

    Raises
    ------
    DecisionError
        If shares are not positive, do not add up to 1, or are not `n_classes`.
    """
    for shares in (fitted, stated):
        if shares is None:
            continue
        if not all(math.isfinite(share) and 0 < share < 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
            raise DecisionError(
                f"The prevalence {', '.join(map(str, shares))} is none.", "Give positive shares that add up to 1."
            )
        if n_classes not in (None, len(shares)):
            raise DecisionError(f"There are {len(shares)} shares for {n_classes} classes.", "Give one share a class.")
    if fitted is None or stated is None:
        return None
    return [math.log(new / old) for old, new in zip(fitted, stated, strict=True)]


def softmax(logits: list[float]) -> list[float]:
    """Return the softmax of a few numbers. Lists are faster than arrays up to some forty classes."""
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


class _Softmax(Machine):
    def __init__(self, scale: float, offsets: list[float] | None) -> None:
        self._scale, self._offsets = scale, offsets

    def step(self, moment: Moment) -> None:
        if moment.state is not None:
            return
        scale = self._scale
        logits = [value * scale for value in moment.values]
        if len(logits) == 1:
            logits.insert(0, 0.0)  # sigmoid(z) is the second share of softmax(0, z)
        if self._offsets is not None:
            logits = [logit + offset for logit, offset in zip(logits, self._offsets, strict=True)]
        moment.values = softmax(logits)
