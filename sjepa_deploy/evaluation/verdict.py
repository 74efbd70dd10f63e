"""Says in plain words what an evaluation found: chance, baselines, other models, the live path."""

from __future__ import annotations

from collections.abc import Collection

from sjepa_deploy.errors import listed
from sjepa_deploy.evaluation.figures import NAMES
from sjepa_deploy.evaluation.results import Judged, Judgement
from sjepa_deploy.evaluation.statistics import ALPHA, Difference
from sjepa_deploy.runtime.decisions.description import Figure

LARGEST_GAP = 0.02
"""Loss of the primary figure from offline to live which is told."""


def verdict(judgement: Judgement, baselines: Collection[str]) -> tuple[str, ...]:
    """Return sentences on the model that the evaluation is about.

    Parameters
    ----------
    judgement : Judgement
        What statistics say.
    baselines : collection of str
        Names of models that are baselines.
    """
    first = judgement.judged[0]
    said = [by_chance(first, judgement.primary)]
    said += [against(each, each.other in baselines) for each in judgement.differences if each.figure == judgement.primary]
    for other in judgement.judged[1:]:
        if other.model == first.model:
            said.append(_live(first, other, judgement.primary))
    return tuple(said)


def by_chance(judged: Judged, primary: str) -> str:
    """Return whether a model is better than chance."""
    figure, chance = judged.figures[primary], judged.chance.get(primary)
    if figure.value is None or chance is None:
        return f"Nothing can be said of {judged.model}: {NAMES[primary]} is not defined."
    reached = f"{NAMES[primary]} {with_interval(figure)}; by chance {chance.mean:.3f}, at most {chance.high:.3f} in 95 %"
    if chance.p < ALPHA:
        return f"{judged.model} is better than chance ({reached}; p = {chance.p:.3g})."
    return f"{judged.model} is no better than chance ({reached}; p = {chance.p:.2g})."


def against(difference: Difference, baseline: bool) -> str:
    """Return whether a model is better than another one."""
    name, (own, other) = NAMES[difference.figure], difference.values
    what = f"the baseline {difference.other}" if baseline else difference.other
    by = with_interval(Figure(value=abs(own - other)))
    figure = difference.difference
    ends = ""
    if figure.low is not None and figure.high is not None:
        low, high = sorted((abs(figure.low), abs(figure.high)))
        ends = f", {low:.3f} to {high:.3f}"
    if difference.better:
        return f"{difference.model} is better than {what} by {by}{ends} ({name} {own:.2f} against {other:.2f})."
    if difference.worse:
        below = f"below {what}" if baseline else f"worse than {what}"
        return f"{difference.model} is {below} by {by}{ends} ({name} {own:.2f} against {other:.2f})."
    told = "" if figure.low is None else f", difference {with_interval(figure, sign=True)}"
    few = " There are too few units for an interval." if figure.low is None else ""
    return f"No difference of {difference.model} from {what} can be told ({name} {own:.2f} against {other:.2f}{told}).{few}"


def _live(offline: Judged, live: Judged, primary: str) -> str:
    there, here = offline.figures[primary].value, live.figures[primary].value
    if there is None or here is None:
        return "Nothing can be said of the live path."
    lost = there - here
    what = "loses" if lost > LARGEST_GAP else "keeps"
    tail = f"{lost:.3f} of it" if lost > LARGEST_GAP else "it"
    return f"The live path has {NAMES[primary]} {here:.3f} for {there:.3f} offline: it {what} {tail}."


def with_interval(figure: Figure, *, sign: bool = False) -> str:
    """Return a figure with its interval as text."""
    form = "+.3f" if sign else ".3f"
    if figure.value is None:
        return "not defined"
    if figure.low is None or figure.high is None:
        return format(figure.value, form)
    return f"{figure.value:{form}} ({figure.low:{form}} to {figure.high:{form}})"


def notes(judgement: Judgement, n_subjects: int) -> tuple[str, ...]:
    """Return sentences on what intervals mean."""
    if judgement.units == "subjects":
        said = [f"Intervals are over {judgement.n_units} subjects."]
    else:
        people = "one person" if n_subjects == 1 else f"{n_subjects} people"
        units = "recordings" if judgement.units == "recordings" else "blocks of successive windows"
        said = [f"Intervals are over {judgement.n_units} {units} of {people}: they say nothing of other people."]
    groups = listed(judgement.averaged_over)
    said.append(f"A figure is computed in each group of rows of the same {groups}, then averaged.")
    said.append(
        "Bits of a decision are Wolpaw's: classes are taken as equally frequent and equally well decided, errors as even."
    )
    return tuple(said)
