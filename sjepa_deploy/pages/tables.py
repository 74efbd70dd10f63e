"""Describes tables, which are written as Markdown or as HTML, and writes numbers in readable form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Holds the content of one place of a table.

    Attributes
    ----------
    text : str
        For people.
    small : str
        Less important text beside it, such as a confidence interval.
    sort : float or None
        Value to order by in place of the text.
    absent : bool
        Whether the text says why there is no figure.
    """

    text: str
    small: str = ""
    sort: float | None = None
    absent: bool = False


@dataclass(frozen=True, kw_only=True)
class Column:
    """Describes a column: its name, its meaning, and whether the column holds numbers."""

    name: str
    numeric: bool = False
    meaning: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Holds one row of a table.

    A row is `struck` out where the outputs behind the row are wrong: the row stands last, and none of its figures is to be used.
    """

    entries: tuple[Entry, ...]
    struck: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Holds rows under the heads of columns.

    Attributes
    ----------
    caption : str
        Text that holds for all rows.
    columns : tuple of Column
        Heads.
    rows : tuple of Row
        In the order of the column `sorted_by` where that is given, those struck out last.
    sorted_by : int or None
        Column.
    direction : {"ascending", "descending"}
        Of that order.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    sorted_by: int | None = None
    direction: Literal["ascending", "descending"] = "ascending"


def led_by_order(table: Table) -> Table:
    """Return `table` with the column that its rows are ordered by behind the first one: what a narrow page shows."""
    if not table.sorted_by:
        return table
    places = [0, table.sorted_by, *(i for i in range(1, len(table.columns)) if i != table.sorted_by)]
    rows = tuple(replace(row, entries=tuple(row.entries[i] for i in places)) for row in table.rows)
    return replace(table, columns=tuple(table.columns[i] for i in places), rows=rows, sorted_by=1)


NOTHING = Entry(text="", absent=True)


def without_empty_columns(table: Table) -> Table:
    """Return `table` without its empty columns."""
    kept = [i for i in range(len(table.columns)) if any(row.entries[i].text for row in table.rows)]
    rows = tuple(Row(entries=tuple(row.entries[i] for i in kept), struck=row.struck) for row in table.rows)
    return Table(caption=table.caption, columns=tuple(table.columns[i] for i in kept), rows=rows)


# ---- numbers for people ---------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return `value` with three digits or more; whole numbers whole."""
    if math.isclose(value, round(value)) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Return a time with its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= scale:
            return f"{number(seconds / scale)} {unit}"
    return "0 s" if seconds == 0 else f"{number(seconds / 1e-9)} ns"


def plain(value: float | None, unit: str = "") -> Entry:
    """Return an entry for a number that may be missing."""
    return NOTHING if value is None else Entry(text=f"{number(value)}{unit}", sort=value)


# ---- Markdown -------------------------------------------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """Return `table` as Markdown, its caption in front. Rows that are struck out are struck through."""
    head = [" | ".join(markdown_text(column.name) for column in table.columns)]
    head.append(" | ".join("---:" if column.numeric else "---" for column in table.columns))
    body = [" | ".join(_markdown_entry(entry, row.struck) for entry in row.entries) for row in table.rows]
    lines = [f"| {line} |" for line in (*head, *body)]
    return "\n".join([f"**{markdown_text(table.caption)}**", "", *lines])


def _markdown_entry(entry: Entry, struck: bool) -> str:
    text = markdown_text(entry.text + (f" ({entry.small})" if entry.small else ""))
    return f"~~{text}~~" if struck and text else text


def markdown_text(text: str) -> str:
    """Return `text` such that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&])", r"\\\1", " ".join(text.split()))


def markdown_code(text: str) -> str:
    """Return `text` as an indented block of code."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def all_markdown(tables: Iterable[Table]) -> str:
    """Return those of `tables` that have rows, one after the other."""
    return "\n\n".join(to_markdown(table) for table in tables if table.rows)
