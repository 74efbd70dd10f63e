"""Writes what a fit has found as one HTML page that needs nothing else."""

from __future__ import annotations

from html import escape

from sjepa_deploy.runtime.decisions.description import Figure
from sjepa_deploy.runtime.decisions.fit import CurvePoint, Fit

WIDTH, HEIGHT, MARGIN = 560, 320, 48

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2330; --faint: #5a6575; --line: #d5dae2; --curve: #1f5fbf; --band: #1f5fbf33; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --faint: #a3adbb; --line: #333c49; --curve: #8ab8ff; --band: #8ab8ff33; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { text-align: right; padding: .15rem .8rem; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: normal; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 13px; }
"""


def percent(figure: Figure) -> str:
    """Return a share with its interval in words."""
    return _with_interval(figure, lambda share: f"{share:.1%}")


def number(figure: Figure) -> str:
    """Return a figure with its interval in words."""
    return _with_interval(figure, lambda value: f"{value:.3g}")


def _with_interval(figure: Figure, words: object) -> str:
    assert callable(words)
    if figure.value is None:
        return "-"
    if figure.low is None or figure.high is None:
        return str(words(figure.value))
    return f"{words(figure.value)} ({words(figure.low)} to {words(figure.high)})"


def html_page(fit: Fit) -> str:
    """Return the page of a fit: the layer in words, its figures, and the curve of other thresholds."""
    layer, summary = fit.layer, fit.layer.fit
    assert summary is not None
    facts = [
        ("asked for", f"{summary.asked} {summary.wanted:g}"),
        ("data", f"{', '.join(summary.data)}: {summary.n_events} events, {summary.n_windows} windows, {summary.minutes:.1f} min"),
        ("windows", "at events" if summary.hop is None else f"every {summary.hop:g} s"),
    ]
    if layer.class_names is None:
        facts.append(("targets inside the interval", percent(summary.coverage)))
    else:
        facts += [
            ("events with a decision", percent(summary.accept_rate)),
            ("right among these", percent(summary.accuracy)),
            ("false decisions a minute", number(summary.false_per_minute)),
            ("calibration error", "-" if summary.calibration_error is None else f"{summary.calibration_error:.3f}"),
        ]
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    words = "".join(f"<li>{escape(line)}</li>" for line in str(layer).splitlines()[1:])
    notes = "".join(f"<p><strong>{escape(note)}</strong></p>" for note in fit.notes)
    title = f"Decision layer {escape(layer.name)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1>{notes}<p>Figures are of events that the layer was not fitted on, with 95 % intervals from blocks.</p>"
        f"<table>{rows}</table><h2>Steps</h2><ol>{words}</ol>{_curve(fit) if fit.curve else ''}</body></html>\n"
    )


def _curve(fit: Fit) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("threshold", "accept rate", "accuracy", "false a minute"))
    rows = "".join(
        f"<tr><td>{point.threshold:.4g}</td><td>{percent(point.accept_rate)}</td><td>{percent(point.accuracy)}</td>"
        f"<td>{number(point.false_per_minute)}</td></tr>"
        for point in fit.curve
    )
    return f"<h2>Other thresholds</h2>{_plot(fit)}<table><tr>{head}</tr>{rows}</table>"


def _plot(fit: Fit) -> str:
    """Return accuracy over accept rate as SVG."""
    points = [point for point in fit.curve if point.accept_rate.value is not None and point.accuracy.value is not None]

    def at(share: float, accuracy: float) -> str:
        return f"{MARGIN + share * (WIDTH - 2 * MARGIN):.1f},{HEIGHT - MARGIN - accuracy * (HEIGHT - 2 * MARGIN):.1f}"

    def line(points: list[CurvePoint], end: str) -> list[str]:
        return [
            at(p.accept_rate.value, getattr(p.accuracy, end))
            for p in points
            if p.accept_rate.value is not None and getattr(p.accuracy, end) is not None
        ]

    band = line(points, "high") + line(points, "low")[::-1]
    ticks = "".join(
        f'<text x="{at(share, 0).split(",")[0]}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{share:.0%}</text>'
        f'<text x="{MARGIN - 8}" y="{at(0, share).split(",")[1]}" text-anchor="end">{share:.0%}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    corner = f"{MARGIN},{MARGIN} {MARGIN},{HEIGHT - MARGIN} {WIDTH - MARGIN},{HEIGHT - MARGIN}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="accuracy over accept rate">'
        f'<polyline points="{corner}" fill="none" stroke="var(--line)"/>'
        f'<polygon points="{" ".join(band)}" fill="var(--band)"/>'
        f'<polyline points="{" ".join(line(points, "value"))}" fill="none" stroke="var(--curve)" stroke-width="2"/>'
        f'{ticks}<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">events with a decision</text>'
        f'<text x="{MARGIN}" y="{MARGIN - 14}">right among these</text></svg>'
    )
