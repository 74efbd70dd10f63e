"""Writes the page of an evaluation: verdict, figures, confusion matrix, reliability curve, subjects, time, examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.evaluation.figures import NAMES
from sjepa_deploy.evaluation.predictions import UNDECIDED, Predictions
from sjepa_deploy.evaluation.results import EvaluationReport, Judged
from sjepa_deploy.evaluation.verdict import with_interval
from sjepa_deploy.pages.figures import BAD, FAINT, SERIES, Plot, finished, label_strip, new_figure, strips
from sjepa_deploy.pages.page import Section, render_page
from sjepa_deploy.pages.tables import NOTHING, Column, Entry, Row, Table, number
from sjepa_deploy.runtime.decisions.calibrate import N_BINS
from sjepa_deploy.runtime.decisions.description import Figure

N_STRIPS = 12
"""Recordings whose decisions over time are drawn."""

N_EXAMPLES = 2
"""Windows of each kind that are drawn."""

MOST_CHANNELS = 8
"""Channels of an example."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Holds the samples of all windows, by their numbers.

    Attributes
    ----------
    eeg : ndarray of float32, shape (n_windows, n_chans, n_times)
        Windows after all steps.
    ch_names : tuple of str
        Names of the channels; empty where they are not known.
    sfreq : float
        Rate in Hz.
    """

    eeg: NDArray[np.float32]
    ch_names: tuple[str, ...]
    sfreq: float


def report_page(report: EvaluationReport, predictions: Predictions, examples: Examples) -> str:
    """Return the page of an evaluation as HTML.

    Parameters
    ----------
    report : EvaluationReport
        The report.
    predictions : Predictions
        The predictions, offline, of the model that the evaluation is about.
    examples : Examples
        Samples of the windows.

    Raises
    ------
    MissingDependencyError
        If Jinja2 or matplotlib is not installed.
    """
    first = report.judged[0]
    parts = ((len(report.folds), "fold"), (len(report.seeds), "seed"))
    facts = [f"{first.n_windows} windows", report.protocol, *(f"{n} {what}" + "s" * (n > 1) for n, what in parts if n)]
    return render_page(
        maker="sjepa-evaluate",
        title=first.model,
        facts=[*facts, report.created],
        warnings=[],
        command=report.command,
        sections=[
            Section(name="verdict", title="Verdict", lead=" ".join(report.verdict), tables=(figure_table(report),)),
            Section(name="differences", title="Beside other models", lead=_PAIRED, tables=(difference_table(report),), draw=()),
            Section(
                name="decisions",
                title="Decisions",
                lead="Of the model offline.",
                tables=(confusion_table(report),),
                draw=((lambda: confusion_plot(report), lambda: reliability_plot(predictions)),),
            ),
            Section(
                name="subjects",
                title="Subjects",
                lead="Each subject alone.",
                tables=(subject_table(first),),
                draw=((lambda: subject_plot(report),),),
            ),
            Section(
                name="stream", title="On a stream", lead=_STREAM, tables=(continuous_table(report),), draw=(_latencies(report),)
            ),
            Section(
                name="time",
                title="Over time",
                lead=f"Each mark is a window at its time; the first {N_STRIPS} recordings, the first seed.",
                draw=((lambda: time_plot(predictions),),),
            ),
            Section(
                name="examples",
                title="Examples",
                lead="Windows of the most certain decisions: right ones, and wrong ones.",
                draw=example_plots(predictions, examples),
            ),
            Section(
                name="parity",
                title="Ways, backends and precisions",
                lead="Share of windows with another decision.",
                tables=(agreement_table(report),),
            ),
            Section(name="notes", title="Notes", lead=" ".join(report.notes), tables=(version_table(report),)),
        ],
    )


_PAIRED = (
    "Both models are judged on the same windows; intervals come from the same bootstrap samples of units, and p from a sign-flip "
    "test over units."
)
_STREAM = (
    "A window every hop through the live path and the decision layer. Latency and time to a decision count from the event. Bits "
    "a minute are Wolpaw's, of the first decision of each event."
)


# ---- tables --------------------------------------------------------------------------------------------------------------------


def entry(figure: Figure | None) -> Entry:
    """Return an entry for a figure with its interval."""
    if figure is None or figure.value is None:
        return NOTHING
    small = "" if figure.low is None or figure.high is None else f"{figure.low:.3f} to {figure.high:.3f}"
    return Entry(text=f"{figure.value:.3f}", small=small, sort=figure.value)


def figure_table(report: EvaluationReport) -> Table:
    """Return the figures of all models and ways."""
    names = [name for name in NAMES if any(name in each.figures for each in report.judged)]
    columns = [Column(name="model"), Column(name="way"), *(Column(name=NAMES[name], numeric=True) for name in names)]
    columns += [
        Column(name="by chance", numeric=True, meaning=f"{NAMES[report.primary]}: mean, and 95 %"),
        Column(name="p", numeric=True),
    ]
    rows = []
    for each in report.judged:
        chance = each.chance.get(report.primary)
        by_chance = (
            NOTHING if chance is None else Entry(text=f"{chance.mean:.3f}", small=f"95 %: {chance.high:.3f}", sort=chance.mean)
        )
        p = NOTHING if chance is None else Entry(text=f"{chance.p:.3g}", sort=chance.p)
        entries = (Entry(text=each.model), Entry(text=each.way), *(entry(each.figures.get(name)) for name in names), by_chance, p)
        rows.append(Row(entries=entries))
    units = f"Figures with 95 % intervals over {report.n_units} {report.units}"
    return Table(caption=units, columns=tuple(columns), rows=tuple(rows))


def difference_table(report: EvaluationReport) -> Table:
    """Return the comparisons with other models."""
    names = ("model", "other", "figure", "model's", "other's", "difference", "p")
    rows = [
        Row(
            entries=(
                Entry(text=each.model),
                Entry(text=each.other),
                Entry(text=NAMES[each.figure]),
                *(Entry(text=f"{value:.3f}", sort=value) for value in each.values),
                Entry(text=with_interval(each.difference, sign=True), sort=each.difference.value),
                NOTHING if each.p is None else Entry(text=f"{each.p:.3g}", sort=each.p),
            )
        )
        for each in report.differences
    ]
    columns = tuple(Column(name=name, numeric=i > 2) for i, name in enumerate(names))
    return Table(caption="Differences on the same windows", columns=columns, rows=tuple(rows))


def confusion_table(report: EvaluationReport) -> Table:
    """Return the confusion matrix of the model that the evaluation is about."""
    matrix, names = report.judged[0].confusion, report.class_names
    if matrix is None or names is None:
        return Table(caption="", columns=(), rows=())
    rows = [
        Row(entries=(Entry(text=name), *(Entry(text=str(n), sort=n) for n in row)))
        for name, row in zip(names, matrix, strict=True)
    ]
    columns = (Column(name="true class"), *(Column(name=f"decided {name}", numeric=True) for name in names))
    return Table(caption="Windows of each true class by their decision, all seeds", columns=columns, rows=tuple(rows))


def subject_table(judged: Judged) -> Table:
    """Return the figures of each subject."""
    names = list(next(iter(judged.subjects.values()), {}))
    rows = [
        Row(entries=(Entry(text=subject), *(entry(Figure(value=found[name])) for name in names)))
        for subject, found in judged.subjects.items()
    ]
    columns = (Column(name="subject"), *(Column(name=NAMES[name], numeric=True) for name in names))
    return Table(caption="Figures of each subject, offline", columns=columns, rows=tuple(rows))


def continuous_table(report: EvaluationReport) -> Table:
    """Return what a bundle does on a stream."""
    rows = [
        Row(entries=(Entry(text=name.replace("_", " ")), entry(figure), Entry(text=f"{each.hop:g} s"), Entry(text=each.layer)))
        for each in report.continuous
        for name, figure in each.figures.items()
    ]
    names = ("figure", "value", "hop", "layer")
    columns = tuple(Column(name=name, numeric=name == "value") for name in names)
    what = ", ".join(f"{each.n_events} events in {each.minutes:.1f} minutes" for each in report.continuous)
    return Table(caption=what, columns=columns, rows=tuple(rows))


def agreement_table(report: EvaluationReport) -> Table:
    """Return how many decisions differ between ways, backends and precisions."""
    rows = [
        Row(
            entries=(
                Entry(text=each.model),
                Entry(text=each.name),
                Entry(text=each.reference),
                Entry(text=f"{each.differ:.2%}", sort=each.differ),
                Entry(text=number(each.n_windows), sort=each.n_windows),
            )
        )
        for each in report.agreements
    ]
    names = ("model", "decides", "compared with", "other decisions", "windows")
    columns = tuple(Column(name=name, numeric=i > 2) for i, name in enumerate(names))
    return Table(caption="Other decisions", columns=columns, rows=tuple(rows))


def version_table(report: EvaluationReport) -> Table:
    """Return the versions of the software."""
    rows = tuple(Row(entries=(Entry(text=name), Entry(text=version))) for name, version in report.versions.items())
    return Table(caption="Software", columns=(Column(name="package"), Column(name="version")), rows=rows)


# ---- plots ---------------------------------------------------------------------------------------------------------------------


def confusion_plot(report: EvaluationReport) -> Plot | None:
    """Draw the share of each decision among the windows of each class."""
    matrix, names = report.judged[0].confusion, report.class_names
    if matrix is None or names is None:
        return None
    counts = np.array(matrix, np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with new_figure(3.2) as figure:
        axes = figure.subplots()
        axes.grid(visible=False)
        places = range(len(names))
        for row in places:
            for column in places:
                share = shares[row, column]
                side = 0.95 * np.sqrt(share)
                colour = SERIES[0] if row == column else BAD
                axes.fill_between(
                    [column - side / 2, column + side / 2], row - side / 2, row + side / 2, color=colour, alpha=0.35
                )
                axes.text(column, row, f"{share:.0%}\n{counts[row, column]:.0f}", ha="center", va="center")
        axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(len(names) - 0.4, -0.6), xlabel="decision", ylabel="true class")
        axes.set_xticks(list(places), names)
        axes.set_yticks(list(places), names)
        told = "; ".join(f"{name}: {shares[i, i]:.0%} right" for i, name in enumerate(names))
        return finished(figure, "Confusion matrix", f"Share of each decision among the windows of a class. {told}.")


def reliability_plot(predictions: Predictions) -> Plot | None:
    """Draw how often the most probable class is the true one, over its probability."""
    if predictions.probabilities is None:
        return None
    best = predictions.probabilities.max(axis=1)
    right = predictions.probabilities.argmax(axis=1) == predictions.truth
    bins = [rows for rows in np.array_split(np.argsort(best, kind="stable"), min(N_BINS, len(best))) if len(rows)]
    said, true = ([float(each[rows].mean()) for rows in bins] for each in (best, right))
    with new_figure(3.2) as figure:
        axes = figure.subplots()
        low = 1 / predictions.probabilities.shape[1]
        axes.plot([low, 1], [low, 1], color=FAINT, linewidth=1)
        axes.plot(said, true, color=SERIES[0], marker="o", markersize=4)
        axes.set(xlabel="probability of the most probable class", ylabel="share that is right", ylim=(0, 1.02))
        what = f"Share of right ones in {len(bins)} bins of equally many windows; on the diagonal probabilities are right."
        return finished(figure, "Reliability", what)


def subject_plot(report: EvaluationReport) -> Plot | None:
    """Draw the figure of each subject."""
    judged, name = report.judged[0], report.primary
    found = {subject: value for subject, each in judged.subjects.items() if (value := each[name]) is not None}
    if len(found) < 2:
        return None
    ordered = sorted(found, key=lambda subject: found[subject])
    with new_figure(0.8 + 0.16 * len(ordered)) as figure:
        axes = figure.subplots()
        axes.plot([found[subject] for subject in ordered], range(len(ordered)), "o", color=SERIES[0], markersize=4)
        if (chance := judged.chance.get(name)) is not None:
            axes.axvline(chance.mean, color=FAINT, linewidth=1)
        axes.set_yticks(range(len(ordered)), ordered)
        axes.set_xlabel(NAMES[name])
        ends = f"{found[ordered[0]]:.3f} ({ordered[0]}) to {found[ordered[-1]]:.3f} ({ordered[-1]})"
        return finished(figure, f"{NAMES[name]} of each subject".capitalize(), f"From {ends}; the line is chance.")


def _latencies(report: EvaluationReport) -> tuple[Callable[[], Plot | None], ...]:
    return tuple(lambda times=each.latencies: latency_plot(times) for each in report.continuous)


def latency_plot(latencies: Sequence[float]) -> Plot | None:
    """Draw the share of detected events that are detected until a time after them."""
    if len(latencies) < 2:
        return None
    times = np.sort(latencies)
    with new_figure(2.6) as figure:
        axes = figure.subplots()
        axes.step(times, np.arange(1, len(times) + 1) / len(times), where="post", color=SERIES[0])
        axes.set(xlabel="seconds after the event", ylabel="share of detected events", ylim=(0, 1.02))
        what = f"Half of them within {np.median(times):.2f} s, nine tenths within {np.quantile(times, 0.9):.2f} s."
        return finished(figure, "Detection latency", what)


def time_plot(predictions: Predictions) -> Plot | None:
    """Draw the windows of recordings over time: right and wrong decisions, or the error of a regression."""
    p = predictions.picked(np.flatnonzero(predictions.seed == predictions.seed.min()))
    names = list(dict.fromkeys(p.recording.tolist()))[:N_STRIPS]
    if np.isnan(p.onset).any():
        return None
    with strips(len(names), 0.5) as (figure, axes):
        for i, name in enumerate(names):
            rows = np.flatnonzero(p.recording == name)
            if p.class_names is None:
                error = abs(p.score[rows] - p.truth[rows])
                height = error / max(float(error.max()), 1e-12)
                axes.vlines(p.onset[rows], i - 0.6 * height, i, color=SERIES[0], linewidth=0.8)
            else:
                right, decided = p.decision[rows] == p.truth[rows], p.decision[rows] != UNDECIDED
                for kind, colour, top in ((right, SERIES[0], 0.6), (~right & decided, BAD, 0.3), (~decided, FAINT, 0.15)):
                    axes.vlines(p.onset[rows[kind]], i - top, i, color=colour, linewidth=0.8)
            label_strip(axes, i - 0.64, str(name))
        axes.set_xlabel("seconds")
        what = "Height is the error." if p.class_names is None else "High marks are right, low ones wrong, the lowest undecided."
        return finished(figure, "Windows over time", what)


def example_plots(predictions: Predictions, examples: Examples) -> tuple[tuple[Callable[[], Plot | None], ...], ...]:
    """Return what draws windows of the most certain decisions, right ones and wrong ones."""
    p = predictions
    if p.probabilities is None:
        error = abs(p.score - p.truth)
        order = np.argsort(error, kind="stable")
        return tuple(
            tuple(lambda row=row: _example(p, examples, row) for row in rows)
            for rows in (order[:N_EXAMPLES], order[::-1][:N_EXAMPLES])
        )
    certain = p.probabilities[np.arange(len(p)), np.maximum(p.decision, 0)]
    groups = []
    for kind in (p.decision == p.truth, (p.decision != p.truth) & (p.decision != UNDECIDED)):
        rows = np.flatnonzero(kind)
        rows = rows[np.argsort(-certain[rows], kind="stable")]
        _, first = np.unique(p.truth[rows], return_index=True)  # of each class the most certain one
        groups.append(tuple(lambda row=row: _example(p, examples, row) for row in rows[np.sort(first)][: 2 * N_EXAMPLES]))
    return tuple(groups)


def _example(p: Predictions, examples: Examples, row: int) -> Plot:
    eeg = np.asarray(examples.eeg[p.window[row]])
    channels = np.linspace(0, len(eeg) - 1, min(MOST_CHANNELS, len(eeg))).round().astype(int)
    step = 4 * max(float(np.median(eeg[channels].std(axis=1))), 1e-9)
    times = np.arange(eeg.shape[1]) / examples.sfreq
    with new_figure(0.9 + 0.22 * len(channels)) as figure:
        axes = figure.subplots()
        for i, channel in enumerate(channels):
            axes.plot(times, eeg[channel] / step - i, color=SERIES[i % len(SERIES)], linewidth=0.8)
        axes.set_yticks(
            [-i for i in range(len(channels))], [examples.ch_names[c] if examples.ch_names else str(c) for c in channels]
        )
        axes.set_xlabel("seconds of the window")
        where = f"{p.recording[row]} at {p.onset[row]:.1f} s"
        if p.class_names is None or p.probabilities is None:
            return finished(figure, f"True {p.truth[row]:.3g}, predicted {p.score[row]:.3g}", where)
        decided = p.class_names[p.decision[row]]
        title = f"{p.class_names[p.truth[row]]}, decided {decided} ({p.probabilities[row, p.decision[row]]:.0%})"
        return finished(figure, title, where)
