"""Is a bundle ever half or mixed? Kills exports at random moments, and loads a bundle while it is replaced.

python benchmarks/killed_exports.py 40 --seconds 60 --out benchmarks/results/killed_exports_2-core-cpu_DATE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from machine import describe_machine, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from killed_exports import kill_exports, load_while_replaced


def main() -> None:
    """Kill exports, load while replacing, and write what was found. A half, wrong or mixed bundle ends the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, help="number of kills")
    parser.add_argument("--seconds", type=float, default=60, help="how long bundles are replaced and loaded")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        kills = kill_exports(arguments.n, Path(folder))
        loads = load_while_replaced(arguments.seconds, Path(folder))
    rows = [f"| {what} | {n} |" for found in (kills, loads) for what, n in sorted(found.items())]
    table = "\n".join(("| what | number |", "| --- | --- |", *rows)) + "\n"
    write_result(arguments.out, {"machine": machine, "kills": kills, "loads": loads}, table)


if __name__ == "__main__":
    main()
