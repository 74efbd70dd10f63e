"""Does any window go out unflagged over lost samples? Judges random streams with losses, jitter, packets and clock steps.

python benchmarks/losses.py 2000 --out benchmarks/results/losses_2-core-cpu_DATE
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from machine import describe_machine, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bundles import small_spec
from lossy import judge, lossy

TWICE = ("a sample twice", "a sample twice, under one stamp")
COLUMNS = (
    "streams",
    "windows",
    "over a hole",
    "unflagged, tellable",
    "unflagged, within the jitter",
    *TWICE,
    "lost",
    "found lost",
    "resets",
)


def main() -> None:
    """Judge streams of random kinds, and write what was found of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, help="number of streams")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    machine = describe_machine()
    total: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(arguments.n):
        rng = np.random.default_rng(seed)
        stream = lossy(rng)
        total[stream.kind].update(judge(small_spec(), stream, rng))
    rows = [(kind, *(str(total[kind][column]) for column in COLUMNS)) for kind in sorted(total)]
    head = ("stamps", *COLUMNS)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)) + "\n"
    write_result(arguments.out, {"machine": machine, "kinds": {kind: dict(total[kind]) for kind in sorted(total)}}, table)


if __name__ == "__main__":
    main()
