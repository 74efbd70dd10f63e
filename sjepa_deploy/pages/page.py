"""Writes a report as one HTML file that needs no other file. All pages have one look: `style`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources

from sjepa_deploy.errors import MissingDependencyError
from sjepa_deploy.pages.figures import WHOLE_WIDTH, Plot, drawn_at
from sjepa_deploy.pages.tables import Table, led_by_order

Draw = Callable[[], Plot | None]

TEMPLATE, STYLE = "report.html", "page.css"
"""Jinja template of a report, and the style of all pages, in sjepa_deploy/assets."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Describes a part of a report.

    Attributes
    ----------
    name, title : str
        Where links lead to, and the heading.
    lead : str
        Text to read before the figures.
    tables : tuple of Table
        Those without rows are left out. A section without rows and plots is left out as well.
    draw : tuple of tuple of callables
        What stands together, one after the other. Each returns a plot, or None where there is nothing to draw.
    """

    name: str
    title: str
    lead: str
    tables: tuple[Table, ...] = ()
    draw: tuple[tuple[Draw, ...], ...] = ()

    @property
    def has_rows(self) -> bool:
        """Return whether a table has something to show."""
        return any(table.rows for table in self.tables)

    def plots(self) -> list[list[Plot]]:
        """Draw the plots, those of each group in a list; groups with nothing to draw are left out."""
        drawn = ([(draw, plot) for draw in together if (plot := draw()) is not None] for together in self.draw)
        return [_rows_of_two(group) for group in drawn if group]


def _rows_of_two(group: Sequence[tuple[Draw, Plot]]) -> list[Plot]:
    """Return the plots of a group; the last one of an odd number also as wide as a page."""
    plots = [plot for _, plot in group]
    if len(plots) % 2:
        with drawn_at(WHOLE_WIDTH):
            whole = group[-1][0]()
        assert whole is not None, "it was drawn before"
        plots[-1] = replace(plots[-1], whole_svg=whole.svg)
    return plots


@dataclass(frozen=True, kw_only=True)
class Card:
    """Holds one answer at the top of a page: what it is about, the answer, and why."""

    about: str
    answer: str
    why: str


def asset(name: str) -> str:
    """Return the text of a file in sjepa_deploy/assets."""
    return resources.files("sjepa_deploy").joinpath("assets", name).read_text(encoding="utf-8")


def style() -> str:
    """Return the style that all pages share."""
    return asset(STYLE)


def render_page(
    *,
    maker: str,
    title: str,
    sections: Sequence[Section],
    facts: Sequence[str] = (),
    warnings: Sequence[str] = (),
    cards: Sequence[Card] = (),
    command: str = "",
) -> str:
    """Return a page of tables and plots as HTML. Sections that have nothing to show are left out.

    The first section is the summary, which stands open below the cards; the others are folded until a reader opens them.

    Parameters
    ----------
    maker : str
        Command that made the report.
    title : str
        Heading.
    sections : sequence of Section
        Parts of the report in their order.
    facts, warnings : sequence of str
        What stands under the heading, and what a reader must know first.
    cards : sequence of Card
        Answers for a reader with little time.
    command : str
        Command that repeats the report.

    Raises
    ------
    MissingDependencyError
        If Jinja2, or matplotlib for a plot, is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as e:
        raise MissingDependencyError("Jinja2", "bench") from e
    source = asset(TEMPLATE)
    script = source.partition("<script>")[2].partition("</script>")[0]
    drawn = [(section, section.plots()) for section in sections]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=style(),
        maker=maker,
        title=title,
        facts=facts,
        warnings=warnings,
        cards=cards,
        command=command,
        sections=[
            (section, plots, [led_by_order(table) for table in section.tables if table.rows])
            for section, plots in drawn
            if plots or section.has_rows
        ],
    )
