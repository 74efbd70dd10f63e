"""Makes the sentences and table entries of a report from kinds and values, where these are printed."""

from __future__ import annotations

from collections.abc import Sequence

from sjepa_deploy.pages.tables import NOTHING, Entry, number
from sjepa_deploy.runtime.bench.cells import Estimate, Percentile
from sjepa_deploy.runtime.bench.noise import MAX_STOLEN_FROM_CELL
from sjepa_deploy.runtime.bench.results import BenchReport, Disturbance, Ending, Noise


def why_partial(report: BenchReport) -> str:
    """Return a sentence for each reason why `report` is partial."""
    return " ".join(map(_ending, report.partial))


def why_noisy(noise: Noise) -> str:
    """Return a sentence for each disturbance of the machine."""
    return " ".join(map(_disturbance, noise.reasons))


def _ending(ending: Ending) -> str:
    if ending.told:
        text = ending.told
    elif ending.kind == "interrupted":
        text = "It was interrupted."
    elif ending.kind == "time limit":
        assert ending.limit is not None
        text = f"The time limit of {number(ending.limit)} s passed after {ending.n} of {ending.of} blocks."
    elif ending.kind == "opened late":
        text = "Half of the time limit passed before all backends were open."
    else:
        assert ending.kind == "parts lost"
        parts = "1 part" if ending.n == 1 else f"{ending.n} parts"
        text = f"{parts} gave no result, see what was not measured."
    return text if ending.run is None else f"Run {ending.run}: {text}"


def _disturbance(found: Disturbance) -> str:
    value = found.value
    text = {
        "work varied": f"The same work took times that spread by {value:.0%} (interquartile range) over the run.",
        "work drifted": f"The machine drifted: the same work changed by {value:+.0%} from start to end.",
        "others busy": f"Other processes kept {value:.2f} cores busy.",
        "cores stolen": f"The hypervisor took {value:.2f} cores.",
        "cells robbed": f"The hypervisor took more than {MAX_STOLEN_FROM_CELL:g} cores during {found.n_cells} of "
        f"{found.n_known} cells, the most ({value:.2f}) from {found.cell}.",
        "told": found.told,
    }[found.kind]
    if len(found.runs) > 1:
        return f"Runs {spans(found.runs)}, the most in run {found.worst_run}: {text}"
    return f"Run {found.runs[0]}: {text}" if found.runs else text


def spans(numbers: Sequence[int]) -> str:
    """Return rising numbers as text, those in a row together: "1 to 3, 5"."""
    found: list[list[int]] = []
    for each in numbers:
        if found and each == found[-1][-1] + 1:
            found[-1].append(each)
        else:
            found.append([each])
    return ", ".join(f"{first}{f' to {rest[-1]}' if rest else ''}" for first, *rest in found)


def estimate(value: Estimate | None, factor: float = 1.0) -> Entry:
    """Return an entry for a figure with its interval."""
    if value is None:
        return NOTHING
    low, high = value.low, value.high
    interval = "" if low is None or high is None else f"{number(low * factor)} to {number(high * factor)}"
    return Entry(text=number(value.value * factor), small=interval, sort=value.value * factor)


def percentile(found: Percentile) -> Entry:
    """Return an entry for a percentile, or for how many samples it would need."""
    if found.value is not None:
        return estimate(found.value)
    return Entry(text=f"needs {number(found.n_needed)}", absent=True)
