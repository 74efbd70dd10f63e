"""Gives the plots of a report their figures: empty ones for matplotlib to draw in, and SVG whose colours and font are the page's.

Figures are as wide as a phone, so that their text is readable there; wider pages put two in a row. A plot that stands alone in a
row is drawn a second time, as wide as such a page (`drawn_at`).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from sjepa_deploy.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.3
"""Width of a figure in inches.

At 72 points an inch a figure is 310 units wide, and its text of 9 points is 10 pixels high on a phone.
"""

WHOLE_WIDTH = 2.04 * WIDTH
"""Width of a figure that stands alone in the row of two: its text is as large as theirs."""

_width: ContextVar[float] = ContextVar("width", default=WIDTH)

N_SERIES = 8
"""Colours that can be told apart."""

# Stand for the page's colours while matplotlib draws: no plot uses them otherwise.
SERIES = tuple(f"#f0{i:02x}01" for i in range(N_SERIES))
INK, FAINT, GRID, BAD = "#f1a001", "#f1b001", "#f1c001", "#f1d001"
_CSS = {colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)} | {
    INK: "var(--ink)",
    FAINT: "var(--soft)",
    GRID: "var(--grid)",
    BAD: "var(--bad)",
}

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sjepa-deploy",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Holds one figure of a report.

    Attributes
    ----------
    svg : str
        An ``<svg>`` element for a page that defines the colours.
    title, description : str
        Description of the plot, also for readers who do not see the plot.
    whole_svg : str
        The same plot as wide as a page, for a plot that stands alone in its row; otherwise empty.
    """

    svg: str
    title: str
    description: str
    whole_svg: str = ""


@contextmanager
def drawn_at(width: float) -> Iterator[None]:
    """Let figures be `width` inches wide."""
    token = _width.set(width)
    try:
        yield
    finally:
        _width.reset(token)


@contextmanager
def new_figure(height: float) -> Iterator[Figure]:
    """Give an empty figure; Figure and not pyplot, which would keep it."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingDependencyError("matplotlib", "bench") from e
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(_width.get(), height), layout="constrained", facecolor="none")


@contextmanager
def strips(n: int, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure of `n` strips, strip i from i - 1 to i on the y axis downwards: one set of axes is quick to draw."""
    with new_figure(0.5 + height * n) as figure:
        axes = figure.subplots()
        axes.set_ylim(n - 1 + 0.06, -1.05)
        axes.hlines(range(n), 0, 1, transform=axes.get_yaxis_transform(), color=GRID, linewidth=0.6)
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        yield figure, axes


def label_strip(axes: Axes, y: float, text: str, *, right: bool = False) -> None:
    """Write above a strip. The layout makes no room for it: a long label may go beyond the axes."""
    place, align = (1, "right") if right else (0, "left")
    label = axes.annotate(text, (place, y), xycoords=("axes fraction", "data"), ha=align, va="bottom", fontsize=8.5)
    label.set_in_layout(False)


def label_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name lines at their right ends, in place of a legend: in their order, none upon another.

    Both axes are logarithmic and have their limits. The right limit moves, so that the names have room.

    Parameters
    ----------
    axes : Axes
        Axes that the lines are in.
    ends : sequence of (float, float, str, str)
        Last point of each line, its name and its colour.
    """
    width, height = (72 * inches for inches in axes.figure.get_size_inches())  # type: ignore[union-attr]
    share = min(0.6, (14 + 4.8 * max(len(name) for _, _, name, _ in ends)) / (width - 50))
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** (share / (1 - share)))
    low, high = axes.get_ylim()
    gap = 11 / (height - 50)
    by_height = sorted(ends, key=lambda end: end[1])
    wanted = [math.log(y / low) / math.log(high / low) for _, y, _, _ in by_height]
    for (x, y, name, colour), place in zip(by_height, apart(wanted, gap), strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(1 - share + 10 / (width - 50), place),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3},
        ).set_in_layout(False)


def with_room(sizes: Sequence[int], axes: Axes) -> list[int]:
    """Return those of the rising `sizes` that have room for their numbers on the logarithmic x axis: each, each second, ...

    The smallest and the largest are always among them.
    """
    low, high = axes.get_xlim()
    points = (72 * axes.figure.get_size_inches()[0] - 50) / math.log(high / low)  # type: ignore[union-attr]
    for step in (step for step in range(1, len(sizes)) if (len(sizes) - 1) % step == 0):
        kept = list(sizes[::step])
        if all(points * math.log(b / a) >= 26 for a, b in itertools.pairwise(kept)):
            return kept
    return sorted({sizes[0], sizes[-1]})


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Return places at most 1 and at least `gap` apart, in the order of `wanted` and near to `wanted`.

    `wanted` rises. Below 1 the sum of squared distances is the smallest one (isotonic regression by pooling adjacent violators).
    """
    pools: list[tuple[float, int]] = []  # mean and size; members of a pool stand `gap` apart
    for i, place in enumerate(wanted):
        mean, size = place - i * gap, 1
        while pools and pools[-1][0] > mean:
            before, n = pools.pop()
            mean, size = (before * n + mean * size) / (n + size), n + size
        pools.append((mean, size))
    level = [mean for mean, size in pools for _ in range(size)]
    return [min(mean + i * gap, 1 - (len(level) - 1 - i) * gap) for i, mean in enumerate(level)]


def finished(figure: Figure, title: str, description: str) -> Plot:
    """Return the plot that stands in `figure`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(svg=page_svg(buffer.getvalue(), title, description), title=title, description=description)


# ---- SVG for a page -------------------------------------------------------------------------------------------------------

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def page_svg(svg: bytes, title: str, description: str) -> str:
    """Return matplotlib's `svg` as an element of an HTML page.

    Colours become those of the page, text takes the page's font, and coordinates keep one digit. Identifiers that nothing refers
    to go, and the other identifiers become unique. Screen readers say `title` and `description`.
    """
    root = ElementTree.fromstring(svg)
    text = svg.decode()
    referred = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", text))
    unique = _unique_prefix(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "}title", "}desc")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            name = name.removeprefix(f"{{{_XLINK}}}")
            if name == "id":
                if value in referred:
                    element.set("id", unique + value)
            else:
                element.set(name, _page_value(name, value, unique))
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{unique}title {unique}desc"}
    for place, (tag, content) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": unique + tag})
        element.text = content
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _unique_prefix(text: str) -> str:
    return f"p{hashlib.sha256(text.encode()).hexdigest()[:8]}-"


def _page_value(name: str, value: str, unique: str) -> str:
    if name in ("d", "points", "transform", "x", "y", "width", "height"):
        value = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), value)
        return " ".join(value.split())
    if name == "href":
        return value.replace("#", f"#{unique}", 1)
    for colour, css in _CSS.items():
        value = value.replace(colour, css)
    value = re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", value)
    return value.replace("url(#", f"url(#{unique}")
