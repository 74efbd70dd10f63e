"""Draws the plots of a benchmark report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.pages.figures import (
    BAD,
    INK,
    N_SERIES,
    SERIES,
    Plot,
    finished,
    label_lines,
    label_strip,
    new_figure,
    strips,
    with_room,
)
from sjepa_deploy.pages.tables import duration, number
from sjepa_deploy.runtime.bench.cells import HARNESS, Cell, Samples
from sjepa_deploy.runtime.bench.estimates import percentile
from sjepa_deploy.runtime.bench.results import DecisionAge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

MAX_STRIPS = 12
"""Distributions in one figure; the slower ones are in the table alone."""


# ---- figures --------------------------------------------------------------------------------------------------------------


def age_plot(ages: Sequence[DecisionAge]) -> Plot | None:
    """Draw one stacked bar an age, from the oldest EEG on the left to the decision on the right."""
    youngest = sorted(ages, key=lambda age: age.total_s)
    bars = {
        f"{_who(age.bundle, age.backend, age.precision)}: {age.total_s:.3f} s": {p.name: p.seconds for p in reversed(age.parts)}
        for age in youngest
    }
    title = "Age of the EEG behind a decision, part by part"
    return _stacked(bars, title, "seconds before the decision", pale=("window",), towards_zero=True)


def cold_starts(cells: Sequence[Cell], title: str) -> Plot | None:
    """Draw one stacked bar a cold start, the quickest first."""
    bars = {}
    for cell in cells:
        if (cold := cell.cold_start) is not None and not cell.struck_out:
            phases = {phase.name: phase.seconds.value for phase in cold.phases}
            engine = f", engine {cold.engine}" if cold.engine else ""
            bars[f"{_of(cell)}{engine}: {duration(sum(phases.values()))}"] = phases
    quickest = dict(sorted(bars.items(), key=lambda bar: sum(bar[1].values())))
    return _stacked(quickest, title, "seconds from the start of the process")


def _stacked(
    bars: dict[str, dict[str, float]], title: str, axis: str, *, pale: tuple[str, ...] = (), towards_zero: bool = False
) -> Plot | None:
    """Draw one bar for each label, made of named parts in seconds."""
    bars = dict(list(bars.items())[:MAX_STRIPS])
    if not bars:
        return None
    names = tuple(dict.fromkeys(name for parts in bars.values() for name in parts))
    names = names[::-1] if towards_zero else names
    looks: dict[str, dict[str, Any]] = {
        name: {
            "facecolor": (SERIES[i % N_SERIES], 0.4 if name in pale else 1.0),
            "edgecolor": SERIES[i % N_SERIES],
            "linewidth": 0.5,
        }
        for i, name in enumerate(names)
    }
    with strips(len(bars), 0.5) as (figure, axes):
        for row, (label, parts) in enumerate(bars.items()):
            left = 0.0
            for name, seconds in parts.items():
                axes.barh(row - 0.28, seconds, left=left, height=0.42, **looks[name])
                left += seconds
            label_strip(axes, row - 0.54, label, right=towards_zero)
        if towards_zero:
            axes.invert_xaxis()
        axes.set_xlabel(axis)
        n_rows = -(-len(names) // 3)
        figure.set_figheight(figure.get_figheight() + 0.25 + 0.18 * n_rows)
        handles = [axes.barh(0, 0, label=name, **looks[name]) for name in names]
        figure.legend(handles=handles, loc="outside lower left", ncols=3, handlelength=1, columnspacing=1.2)
        described = "; ".join(
            f"{label} ({', '.join(f'{name} {duration(seconds)}' for name, seconds in parts.items())})"
            for label, parts in bars.items()
        )
        return finished(figure, title, described)


def histograms(cells: Sequence[Cell], samples: Samples, title: str) -> Plot | None:
    """Draw one strip a cell: the distribution of its latencies, times and counts logarithmic so that tails show."""
    shown = _with_samples(cells, samples)[:MAX_STRIPS]
    if not shown:
        return None
    low, high = _limits([values for _, values in shown])
    edges = np.geomspace(low, high, 70)
    all_counts = [np.histogram(values, edges)[0] for _, values in shown]
    tallest = np.log10(2 * max(int(counts.max()) for counts in all_counts))
    with strips(len(shown), 0.52) as (figure, axes):
        for row, (counts, (cell, values)) in enumerate(zip(all_counts, shown, strict=True)):
            heights = 0.62 * np.log10(np.maximum(2 * counts, 1)) / tallest  # one call is seen, none is not
            colour = BAD if cell.struck_out else SERIES[0]
            axes.stairs(row - heights, edges, baseline=row, fill=True, color=colour, linewidth=0)
            median = percentile(values, 50)
            axes.plot([median, median], [row, row - 0.62], color=INK, linewidth=0.9)
            figures = "" if cell.struck_out else f": p50 {duration(median / 1e6)}, max {duration(values.max() / 1e6)}"
            label_strip(axes, row - 0.66, f"{_of(cell)}{figures}")
        axes.set_xlim(low, high)
        _time_axis(axes)
        return finished(figure, title, _describe(shown))


def exceedance(cells: Sequence[Cell], samples: Samples, title: str) -> Plot | None:
    """Draw cumulative curves: the share of calls that took longer than a time, down to one in the number of samples."""
    shown = [pair for pair in _with_samples(cells, samples) if not pair[0].struck_out][:N_SERIES]
    if not shown:
        return None
    low, high = _limits([values for _, values in shown])
    with new_figure(2.7 + 0.17 * len(shown)) as figure:
        axes = figure.subplots()
        for colour, (cell, values) in zip(SERIES, shown, strict=False):
            x, share = _tail(values)
            axes.step(x, share, where="post", color=colour, label=_of(cell))
        axes.set_yscale("log")
        axes.set_ylim(0.5 / max(len(values) for _, values in shown), 1)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.set_ylabel("calls that took longer")
        axes.set_xlim(low, high)
        _time_axis(axes)
        figure.legend(loc="outside lower left", ncols=1, handlelength=1.4)
        return finished(figure, title, _describe(shown))


def time_series(cells: Sequence[Cell], samples: Samples, title: str) -> Plot | None:
    """Draw one strip a paced cell: over the run, from the median to the slowest of each stretch of windows, and the deadline."""
    paced = [cell for cell in cells if cell.open_loop is not None and not cell.struck_out and f"{cell.id}.at_s" in samples]
    shown = _with_samples(paced, samples)[:MAX_STRIPS]
    if not shown:
        return None
    low, high = _limits([values for _, values in shown])
    high = max(high, *(1.3e6 * cell.open_loop.deadline_s for cell, _ in shown if cell.open_loop is not None))

    def height(microseconds: Any) -> Any:
        return 0.66 * np.log(microseconds / low) / np.log(high / low)

    with strips(len(shown), 0.7) as (figure, axes):
        for row, (cell, values) in enumerate(shown):
            assert cell.open_loop is not None
            at = np.asarray(samples[f"{cell.id}.at_s"], dtype=np.float64)
            at = (at - at.min()) / max(float(np.ptp(at)), 1e-9)
            stretches = np.array_split(np.argsort(at, kind="stable"), min(len(at), 150))
            middle = np.array([at[s].mean() for s in stretches])
            median, slowest = (row - height(np.array([f(values[s]) for s in stretches])) for f in (np.median, np.max))
            axes.fill_between(middle, median, slowest, color=SERIES[0], alpha=0.6, linewidth=0.5)
            axes.plot(middle, median, color=INK, linewidth=0.9)
            deadline = row - height(cell.open_loop.deadline_s * 1e6)
            axes.plot([0, 1], [deadline, deadline], color=BAD, linewidth=1, linestyle=(0, (4, 2)))
            missed = f"{number(cell.open_loop.missed)} of {number(cell.open_loop.n_done)} missed"
            label_strip(axes, row - 0.7, f"{_of(cell)}: {missed}")
        decades = 10.0 ** np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
        axes.set_yticks(
            [row - height(decade) for row in range(len(shown)) for decade in decades],
            [duration(decade / 1e6) for _ in shown for decade in decades],
            fontsize=7,
        )
        axes.grid(axis="y", visible=True)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["start of the run", "", "end"])
        return finished(figure, title, f"The dashed line is the deadline. {_describe(shown)}")


def throughput(cells: Sequence[Cell], title: str) -> Plot | None:
    """Draw windows a second over the batch size, one line a backend and precision."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell in cells:
        if cell.windows_per_s is not None and not cell.struck_out and cell.key.backend != HARNESS:
            name = f"{cell.key.backend} {cell.key.precision}"
            lines.setdefault(name, []).append((cell.key.batch, cell.windows_per_s.value))
    best = sorted(lines, key=lambda name: -max(rate for _, rate in lines[name]))[:N_SERIES]
    if not best:
        return None
    with new_figure(2.6 + 0.17 * len(best)) as figure:
        axes = figure.subplots()
        for i, name in enumerate(best):
            batches, rates = zip(*sorted(lines[name]), strict=True)
            axes.plot(batches, rates, color=SERIES[i], marker="o", markersize=3.5, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = sorted({batch for name in best for batch, _ in lines[name]})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.yaxis.set_major_formatter(lambda rate, _: number(rate))
        axes.minorticks_off()
        axes.set_xlabel("windows of a call")
        axes.set_ylabel("windows decoded a second")
        figure.legend(loc="outside lower left", ncols=1, handlelength=1.4)
        described = "; ".join(f"{name}: " + ", ".join(f"{b}: {number(r)}" for b, r in sorted(lines[name])) for name in best)
        return finished(figure, title, described)


def latency_curve(cells: Sequence[Cell], title: str) -> Plot | None:
    """Draw the median latency of a call over the batch size on logarithmic axes: one line a backend, with its name at its end.

    `cells` are of one bundle and precision. Cells of the scenario "throughput" that have the right outputs are drawn.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell in cells:
        median = cell.latency.at(50.0) if cell.latency is not None else None
        if cell.key.scenario == "throughput" and median is not None and not cell.struck_out and cell.key.backend != HARNESS:
            lines.setdefault(cell.key.backend, []).append((cell.key.batch, median.value))
    curves = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    fastest = sorted(curves, key=lambda name: min(us / batch for batch, us in curves[name]))[:N_SERIES]
    shown = dict(zip((name for name in curves if name in fastest), SERIES, strict=False))
    if not shown:
        return None
    sizes = sorted({batch for name in shown for batch, _ in curves[name]})
    medians = [us for name in shown for _, us in curves[name]]
    with new_figure(2.3 + 0.16 * len(shown)) as figure:
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlabel="windows of a call", ylabel="median latency of a call")
        for name, colour in shown.items():
            axes.plot(*zip(*curves[name], strict=True), color=colour, marker="o", markersize=3.5)
        axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
        axes.set_ylim(min(medians) / 1.4, max(medians) * 1.4)
        label_lines(axes, [(*curves[name][-1], name, colour) for name, colour in shown.items()])
        shown_sizes = with_room(sizes, axes)
        axes.set_xticks(shown_sizes, [number(size) for size in shown_sizes])
        axes.yaxis.set_major_locator(_durations(*axes.get_ylim()))
        axes.yaxis.set_major_formatter(lambda us, _: duration(us / 1e6))
        axes.minorticks_off()
        described = "; ".join(f"{name}: " + ", ".join(f"{b}: {duration(us / 1e6)}" for b, us in curves[name]) for name in shown)
        return finished(figure, title, described)


# ---- what they have in common ---------------------------------------------------------------------------------------------


def _who(bundle: str, backend: str, precision: str) -> str:
    return f"{bundle}, {backend} {precision}"


def _of(cell: Cell) -> str:
    """Name a cell within a figure of one bundle and scenario."""
    key = cell.key
    words = [key.backend, key.precision]
    words += [f"{key.rate:g}/s"] if key.rate is not None else []
    words += ["keep-warm"] if key.keep_warm else []
    words += [f"batch {key.batch}"] if key.batch > 1 and key.n_streams is None else []
    words += [f"{key.n_streams} streams"] if key.n_streams is not None else []
    return " ".join(["WRONG:", *words] if cell.struck_out else words)


def _with_samples(cells: Sequence[Cell], samples: Samples) -> list[tuple[Cell, NDArray[np.float64]]]:
    """Return the cells that have samples, with these; the fastest median first, those with wrong outputs last."""
    found = []
    for cell in cells:
        values = np.asarray(samples.get(f"{cell.id}.latency_us", ()), dtype=np.float64)
        values = values[values > 0]
        if len(values) and cell.latency is not None:
            found.append((cell, values))
    found.sort(key=lambda pair: (pair[0].struck_out, percentile(pair[1], 50)))
    return found


def _limits(arrays: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    return 0.9 * min(float(a.min()) for a in arrays), 1.1 * max(float(a.max()) for a in arrays)


def _tail(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps of the share above x, thinned where thousands of samples lie close together."""
    x = np.sort(values)
    share = 1 - np.arange(1, len(x) + 1) / len(x)
    share[-1] = share[-2] / 2 if len(x) > 1 else 0.5  # a logarithm has no zero
    ranks = np.unique(np.concatenate([
        np.linspace(0, len(x) - 1, 120).astype(int),
        len(x) - np.unique(np.geomspace(1, len(x), 160).astype(int)),
    ]))  # fmt: skip
    return x[ranks], share[ranks]


def _time_axis(axes: Axes) -> None:
    """Make the x axis logarithmic within its limits, with microseconds, milliseconds and seconds at its ticks."""
    low, high = axes.get_xlim()
    axes.set(xscale="log", xlabel="latency")
    axes.xaxis.set_major_locator(_durations(low, high))
    axes.xaxis.set_major_formatter(lambda microseconds, _: duration(microseconds / 1e6))
    axes.minorticks_off()
    axes.set_xlim(low, high)


def _durations(low: float, high: float) -> Locator:
    """Return where a logarithmic axis from `low` to `high` has its ticks."""
    from matplotlib.ticker import LogLocator

    between = (1.0, 2.0, 5.0) if high < 60 * low else (1.0, 3.0) if high < 1000 * low else (1.0,)
    return LogLocator(subs=between, numticks=8)


def _describe(shown: Sequence[tuple[Cell, NDArray[np.float64]]]) -> str:
    """Return the figure in words: of each cell the median, p99 and maximum."""

    def facts(values: NDArray[np.float64]) -> str:
        p50, p99 = (duration(percentile(values, q) / 1e6) for q in (50, 99))
        return f"median {p50}, 99 % within {p99}, max {duration(values.max() / 1e6)}, {number(len(values))} samples"

    return "; ".join(f"{_of(cell)}: {facts(values)}" for cell, values in shown)
