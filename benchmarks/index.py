"""Which results are there? Writes the table of `results/` into README.md, from the files' names and contents.

python benchmarks/index.py            # after adding or removing a result; a test compares
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- index: written by index.py -->\n", "<!-- end of index -->\n"
NAME = re.compile(r"(?P<name>.+)_(?P<hardware>[^_]+)_(?P<date>\d{4}-\d\d-\d\d)\.json")


def values_of(data: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """Yield every text that stands under one of `keys`, however deep."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key in keys:
                yield from texts(value)
            yield from values_of(value, keys)
    elif isinstance(data, list):
        for value in data:
            yield from values_of(value, keys)


def texts(value: Any) -> Iterator[str]:
    """Yield the texts in a text, a list or the values of a mapping."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def row(file: Path) -> tuple[str, ...]:
    """Return what the table says of one result."""
    if (match := NAME.fullmatch(file.name)) is None:
        raise SystemExit(f"{file.name} is not named NAME_HARDWARE_DATE.json.")
    data = json.loads(file.read_text(encoding="utf-8"))
    commits = sorted({commit.split()[0] for commit in values_of(data, ("commit", "commits"))})
    tools = sorted(
        {tool for text in values_of(data, ("command", "commands")) for tool in re.findall(r"\w+\.py|sjepa-bench", text)}
    )
    if not commits or not tools:
        raise SystemExit(f"{file.name} does not say from which commit, or with which command, it was made.")
    kinds = [kind for kind in ("md", "html", "json", "npz", "txt") if file.with_suffix(f".{kind}").is_file()]
    files = ", ".join(f"[{kind}](results/{file.with_suffix(f'.{kind}').name})" for kind in kinds)
    return (match["name"], ", ".join(f"`{t}`" for t in tools), match["hardware"], match["date"], ", ".join(commits), files)


def index(results: Path = RESULTS) -> str:
    """Return the table of all results, the newest of each name first."""
    rows = sorted((row(file) for file in results.glob("*.json")), key=lambda r: r[3], reverse=True)
    rows.sort(key=lambda r: (r[0], r[2]))
    head = ("result", "made by", "hardware", "date", "commit", "files")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)) + "\n"


def with_index(readme: str, table: str) -> str:
    """Return `readme` with `table` between its marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"The README has no marks {BEGIN.strip()} and {END.strip()}.")
    return before + begin + table + end + after


if __name__ == "__main__":
    README.write_text(with_index(README.read_text(encoding="utf-8"), index()), encoding="utf-8")
