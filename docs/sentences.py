"""Counts the words of sentences in the pages: ``python docs/sentences.py`` or ``python docs/sentences.py --worst 20``.

A sentence ends at a full stop, a question mark or a colon before a new line. Code counts as one word. Headings, tables and code
blocks are left out.
"""

import argparse
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 25


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text):
        if paragraph.lstrip().startswith(("#", "|", "!", "<", ":")):
            continue
        plain = re.sub(r"`[^`]*`", "code", paragraph)
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", plain)
        plain = re.sub(r"^(- |\d+\. )", "", " ".join(plain.split()).replace("**", ""))
        for sentence in re.split(r"(?<=[.?!:;])\s+(?=[A-Z\"“c`(])", plain):
            if len(sentence.split()) > 2:
                yield sentence


def pages() -> list[Path]:
    """Return the pages for readers."""
    return sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"])


def main() -> None:
    """Print a line for each page, one for all, and the longest sentences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="pages to count; default: all")
    parser.add_argument("--worst", type=int, default=0, help="print so many of the longest sentences")
    args = parser.parse_args()
    found = [(len(s.split()), page.name, s) for page in args.pages or pages() for s in sentences(page.read_text())]
    print(f"{'page':24}{'sentences':>10}{'mean':>6}{'median':>8}{'longest':>9}{f'over {LIMIT}':>9}")
    for name in [*dict.fromkeys(name for _, name, _ in found), None]:
        counts = [n for n, page, _ in found if name in (None, page)]
        over = sum(n > LIMIT for n in counts)
        mean, median = statistics.mean(counts), statistics.median(counts)
        print(f"{name or 'all':24}{len(counts):>10}{mean:>6.1f}{median:>8.0f}{max(counts):>9}{over:>9}")
    for n, name, sentence in sorted(found, reverse=True)[: args.worst]:
        print(f"\n{n} words, {name}: {sentence}")


if __name__ == "__main__":
    main()
