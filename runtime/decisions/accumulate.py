"""Adds up the evidence of windows or trials, and stops when there is enough of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.probabilities import prior_offsets, softmax
from sjepa_deploy.runtime.decisions.step import Machine, Moment, Step, check_number, needs_classes

Rule = Literal["fixed", "margin", "probability", "bayes", "value", "distribution"]
FEWEST_OF_DISTRIBUTION = 3
"""Classes of the rule "distribution": one other has no spread."""

AtMost = Literal["decide", "reject"]

NEW_TRIAL = "new trial"
"""Flag of the first window of a trial."""

NO_TRIAL = "no trial"
"""Flag of a window that is in no trial, or in one that is over. Its evidence does not count."""

SMALLEST_PROBABILITY = 1e-300
"""A probability of zero would veto a class for good."""


@dataclass(frozen=True, kw_only=True)
class Accumulate(Step):
    """Adds the logarithms of the probabilities of windows (naive Bayes), and decides once a rule says so.

    The rules are those of pyntbci's `stopping`: "margin" (Thielen et al. 2015, doi 10.1371/journal.pone.0133797) compares the
    difference between the largest and the second sum, "bayes" (Ahmadi et al. 2024, doi 10.3389/fnhum.2024.1437965) the largest
    sum less the mean of all, and so does "value", whose thresholds are fitted otherwise. "probability" compares the probability
    that the sums give, "distribution" (Thielen et al. 2021, doi 10.1088/1741-2552/abecef) the probability that none of as many
    draws from a Gaussian through the other sums is as large as the largest. Each must exceed the threshold of this number of
    windows. "fixed" decides after `most` windows.

    Attributes
    ----------
    rule : {"fixed", "margin", "probability", "bayes", "value", "distribution"}
        When to stop.
    most : int
        Windows of a trial: the evidence ends there.
    least : int
        Fewest windows of a decision.
    thresholds : tuple of (float or None)
        Threshold after 1, 2, ... `most` windows; None stops at no evidence. Empty for "fixed".
    temperatures : tuple of float
        Number that the sums of 1, 2, ... `most` windows are divided by for the probability: windows that overlap tell less
        than their sum says. Empty for 1.
    at_most : {"decide", "reject"}
        What happens to evidence that is below the thresholds after `most` windows.
    waits : bool
        Whether the windows after a decision wait for one with the flag "new trial". Otherwise the next window begins anew.
    fitted_prevalence, prevalence : tuple of float or None
        See `sjepa_deploy.runtime.decisions.probabilities.Probabilities`. They act once a trial, not once a window.
    """

    rule: Rule
    most: int
    least: int = 1
    thresholds: tuple[float | None, ...] = ()
    temperatures: tuple[float, ...] = ()
    at_most: AtMost = "decide"
    waits: bool = False
    fitted_prevalence: tuple[float, ...] | None = None
    prevalence: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, choices in (("rule", get_args(Rule)), ("at_most", get_args(AtMost))):
            if getattr(self, name) not in choices:
                raise DecisionError(f"{getattr(self, name)!r} is no {name}.", f"Use one of {', '.join(choices)}.")
        check_number("The largest number of windows", self.most, 1)
        check_number("The smallest number of windows", self.least, 1, self.most)
        n_thresholds = 0 if self.rule == "fixed" else self.most
        if len(self.thresholds) != n_thresholds:
            raise DecisionError(
                f"The rule {self.rule} has {len(self.thresholds)} thresholds for {self.most} windows.",
                f"Give {n_thresholds}.",
            )
        if len(self.temperatures) not in (0, self.most):
            raise DecisionError(f"There are {len(self.temperatures)} temperatures for {self.most} windows.", "Give one each.")
        ranges = {"margin": (0.0, math.inf), "probability": (0.0, 1.0), "distribution": (0.0, 1.0)}
        low, high = ranges.get(self.rule, (-math.inf, math.inf))
        for threshold in self.thresholds:
            if threshold is not None:
                check_number("A threshold", threshold, low, high)
        for temperature in self.temperatures:
            check_number("A temperature", temperature, 0.0, open_low=True)
        prior_offsets(self.fitted_prevalence, self.prevalence)

    @property
    def trial_windows(self) -> int:
        """Most windows of a trial that the step adds up before it waits for the flag "new trial"; 0: it waits for no trial."""
        return self.most if self.waits else 0

    def machine(self, n_classes: int) -> Machine:
        """Return the machine that adds up."""
        needs_classes(self, n_classes)
        if self.rule == "distribution" and n_classes < FEWEST_OF_DISTRIBUTION:
            raise DecisionError(
                f"{n_classes} classes leave no distribution of the other classes.", "Use the rule margin or value for so few."
            )
        return _Accumulate(self, prior_offsets(self.fitted_prevalence, self.prevalence, n_classes))

    def __str__(self) -> str:
        after = (
            f"after {self.most} windows" if self.rule == "fixed" else f"by the rule {self.rule} after {self.least} to {self.most}"
        )
        end = {"decide": "then the best class is decided", "reject": "then the trial is rejected"}[self.at_most]
        wait = " The next trial begins where the flag says so." if self.waits else ""
        return f"The evidence of windows is added up and decided {after}; {end}.{wait}"


class _Accumulate(Machine):
    def __init__(self, settings: Accumulate, offsets: list[float] | None) -> None:
        self._settings, self._offsets = settings, offsets
        self._temperatures = settings.temperatures or (1.0,) * settings.most
        self.restart()

    def restart(self) -> None:
        self._sums: list[float] = []
        self._n = 0
        self._over = False

    def interrupt(self) -> None:
        """Forget the evidence. A trial that is over stays over."""
        over = self._over and self._settings.waits
        self.restart()
        self._over = over

    def step(self, moment: Moment) -> None:
        if NO_TRIAL in moment.flags:
            if moment.state is None:
                moment.settle("undecided", "the window is in no trial that goes on")
            return
        if NEW_TRIAL in moment.flags:
            self.restart()
        if moment.state is not None:
            if moment.state == "refractory":
                self.interrupt()
            return
        if self._over:
            if self._settings.waits:
                moment.settle("undecided", "the trial is over")
                return
            self.restart()
        logs = [math.log(max(value, SMALLEST_PROBABILITY)) for value in moment.values]
        self._sums = [total + log for total, log in zip(self._sums, logs, strict=True)] if self._n else logs
        self._n += 1
        sums, n, settings = self._sums, self._n, self._settings
        moment.values = softmax(self._logits(sums, self._temperatures[n - 1]))
        if n >= settings.least and _stops(settings, sums, moment.values, n):
            self._over = True
            moment.settle("decided", f"enough evidence after {n} windows", moment.values.index(max(moment.values)))
        elif n < settings.most:
            moment.settle("undecided", f"evidence of {n} windows is not enough")
        else:
            self._over = True
            if settings.at_most == "reject":
                moment.settle("rejected", f"evidence of {n} windows is not enough")
            else:
                moment.settle("decided", f"best after {n} windows", moment.values.index(max(moment.values)))

    def _logits(self, sums: Sequence[float], temperature: float) -> list[float]:
        if self._offsets is None:
            return [total / temperature for total in sums]
        return [total / temperature + offset for total, offset in zip(sums, self._offsets, strict=True)]


def _stops(settings: Accumulate, sums: list[float], probabilities: list[float], n: int) -> bool:
    if settings.rule == "fixed":
        return n == settings.most
    threshold = settings.thresholds[n - 1]
    if threshold is None:
        return False
    if settings.rule == "margin":
        second, first = sorted(sums)[-2:]
        return first - second > threshold
    if settings.rule in ("bayes", "value"):
        return max(sums) - sum(sums) / len(sums) > threshold
    if settings.rule == "distribution":
        return p_largest(sums) > threshold
    return max(probabilities) > threshold


def p_largest(sums: Sequence[float]) -> float:
    """Return the probability that as many draws as there are sums, from a Gaussian through all but the largest, are smaller."""
    *others, largest = sorted(sums)
    mean = sum(others) / len(others)
    spread = math.sqrt(sum((each - mean) ** 2 for each in others) / len(others))
    if spread == 0:
        return float(largest > mean)
    return (math.erfc((mean - largest) / (spread * math.sqrt(2))) / 2) ** len(sums)
