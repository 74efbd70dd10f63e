"""Does the benchmark tell what is there? Runs of `sjepa-bench` on faults that were planted, and on nothing.

    python benchmarks/bench_checks.py BUNDLES agreement slowdown stalls --out benchmarks/results/bench_checks_MACHINE_DATE

- agreement: the same benchmark twice, in processes of their own. How many cells agree within their own intervals?
- slowdown: ONNX Runtime in one run and the same with calls 10 % and 1 % longer in another. What does --compare claim?
- stalls: one call in a thousand takes 20 ms. What do closed loop and open loop show?

Each part adds itself to OUT.json when it is done, and the table is written anew: an interrupt loses the part that runs. BUNDLES
is the folder that `pack_bundles.py` makes. All three take about eight minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import planted
from machine import describe_machine, write_result

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.runtime.bench.cells import HARNESS, CellKey
from sjepa_deploy.runtime.bench.compare import compare
from sjepa_deploy.runtime.bench.files import load_report, load_samples
from sjepa_deploy.runtime.bench.merge import renamed
from sjepa_deploy.runtime.bench.results import BenchReport
from sjepa_deploy.runtime.bench.run import BenchConfig, run_bench

VARIANTS = ("prelocal", "postlocal", "contextual")

CELLS = BenchConfig(
    backends=("ort-cpu", "torch-eager"), precisions=("fp32",), scenarios=("back-to-back", "paced"), rates=(100.0,)
)
"""With three variants eighteen cells: two backends, back to back and paced with and without the keep-warm policy."""


COMMAND = "from sjepa_deploy.cli.bench import main; main()"


def agreement(bundles: tuple[Bundle, ...], seconds: float) -> dict[str, Any]:
    """Two runs in new processes, cell by cell: do the intervals of the medians overlap, and what is claimed?"""
    runs = []
    with tempfile.TemporaryDirectory() as name:
        for i in range(2):
            out = Path(name) / str(i)
            options = [f"--{k}" if v is None else f"--{k}={v}" for k, v in OPTIONS]
            command = [sys.executable, "-c", COMMAND, *map(str, (b.path for b in bundles))]
            subprocess.run(
                [*command, *options, f"--duration={seconds}", f"--seed={i}", f"--out={out}"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            report = load_report(out / "bench.json")
            runs.append((report, load_samples(report, out / "bench.json")))
    rows = []
    for change in compare(*runs).changes:
        if change.change is None:
            continue
        spans = [report.cell(change.key).latency.at(50.0) for report, _ in runs]  # type: ignore[union-attr]
        rows.append(
            {
                "cell": change.key.label,
                "p50_us": [span.value for span in spans],
                "intervals_us": [[span.low, span.high] for span in spans],
                "overlap": spans[0].low <= spans[1].high and spans[1].low <= spans[0].high,
                "change": [change.change.low, change.change.value, change.change.high],
                "verdict": change.verdict,
            }
        )
    return {"cells": rows, "overlap": sum(r["overlap"] for r in rows), "noise": [noise(report) for report, _ in runs]}


OPTIONS = (
    *(("backend", b) for b in CELLS.backends),
    *(("scenario", s) for s in CELLS.scenarios),
    *(("precision", p) for p in CELLS.precisions),
    ("rate", CELLS.rates[0]),
)


def noise(report: BenchReport) -> dict[str, Any]:
    assert report.noise is not None
    return {name: getattr(report.noise, name) for name in ("noisy", "reasons", "canary_spread", "others_cpu", "stolen_cpu")}


def slowdown(bundles: tuple[Bundle, ...], seconds: float) -> dict[str, Any]:
    """A backend in one run, and one that is slower by what was planted under its name in another."""
    planted.plant()
    plan = replace(CELLS, scenarios=("back-to-back",), seconds=4 * seconds, n_blocks=20)
    found = {}
    plain = run_bench(bundles, replace(plan, backends=("slow-0",)))
    for name in ("slow-10", "slow-1"):
        report, samples = run_bench(bundles, replace(plan, backends=(name,), seed=1))
        slow = renamed(report, {name: "slow-0"}), samples
        found[name] = [
            {
                "cell": change.key.label,
                "verdict": change.verdict,
                "change": change.change and [change.change.low, change.change.value, change.change.high],
            }
            for change in compare(plain, slow).changes
        ]
        found[name].append({"noise": noise(slow[0])})
    return found


def stalls(bundles: tuple[Bundle, ...], seconds: float) -> dict[str, Any]:
    """PreLocal at 400 windows a second: 20 ms are eight windows."""
    planted.plant()
    plan = replace(CELLS, backends=("ort-cpu", "stalls"), rates=(400.0,), seconds=10 * seconds)
    report, _ = run_bench(bundles[:1], plan)
    rows = []
    for cell in report.cells:
        latency, loop = cell.latency, cell.open_loop
        if cell.key.backend != HARNESS and latency is not None:
            tail = {f"p{p.percent:g}_us": p.value and p.value.value for p in latency.percentiles}
            more = {} if loop is None else {"due": loop.n_due, "missed": loop.missed, "longest_run": loop.longest_run}
            rows.append({"cell": cell.key.label, "n": latency.n, **tail, "max_us": latency.max_us, **more})
    nothing = report.cell(
        CellKey(scenario="back-to-back", bundle=report.bundles[0].label, backend=HARNESS, precision="fp32", batch=1)
    )
    assert nothing is not None
    assert nothing.latency is not None
    cost = {"empty_call_us": nothing.latency.at(50.0).value, "turn_of_the_loop_us": report.loop_us}  # type: ignore[union-attr]
    return {"cells": rows, "cost_of_measuring": cost, "noise": noise(report)}


PARTS = {"agreement": agreement, "slowdown": slowdown, "stalls": stalls}


def table(result: dict[str, Any]) -> str:
    lines = []
    if found := result.get("agreement"):
        lines += [
            f"Two runs: the intervals of the medians overlap in {found['overlap']} of {len(found['cells'])} cells; "
            f"changes claimed by `--compare`: {sum(r['verdict'] != 'no change shown' for r in found['cells'])}.",
            "",
            "| cell | run 1 p50 us (95 %) | run 2 p50 us (95 %) | change | claimed |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in found["cells"]:
            runs = [f"{p:.1f} ({a:.1f} to {b:.1f})" for p, (a, b) in zip(row["p50_us"], row["intervals_us"], strict=True)]
            low, value, high = row["change"]
            lines.append(f"| {row['cell']} | {' | '.join(runs)} | {value:+.1%} ({low:+.1%} to {high:+.1%}) | {row['verdict']} |")
    if found := result.get("slowdown"):
        lines += ["", "| planted | cell | change (95 %) | claimed |", "| --- | --- | --- | --- |"]
        for name, rows in found.items():
            for row in rows:
                if row.get("change"):
                    low, value, high = row["change"]
                    span = f"{value:+.1%} ({low:+.1%} to {high:+.1%})"
                    lines.append(f"| {name.removeprefix('slow-')} % | {row['cell']} | {span} | {row['verdict']} |")
    if found := result.get("stalls"):
        lines += [
            "",
            "One call in a thousand takes 20 ms:",
            "",
            "| cell | n | p50 us | p99 us | p99.9 us | max us | missed | longest run |",
        ]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for row in found["cells"]:
            figures = [row["p50_us"], row["p99_us"], row["p99.9_us"], row["max_us"]]
            shown = ["" if f is None else f"{f:.0f}" for f in figures]
            missed = [f"{row['missed']} of {row['due']}", str(row["longest_run"])] if "missed" in row else ["", ""]
            lines.append(f"| {row['cell']} | {row['n']} | {' | '.join([*shown, *missed])} |")
        cost = found["cost_of_measuring"]
        lines += ["", f"Measuring costs {cost['turn_of_the_loop_us']:.2f} us a call, of which an empty call shows "]
        lines[-1] += f"{cost['empty_call_us']:.2f} us."
    lines += ["", "Was the machine quiet?", ""]
    for part, found in noises(result):
        lines.append(f"- {part}: {' '.join(found['reasons']) or 'yes'}")
    return "\n".join(lines).strip()


def noises(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every run's name and what disturbed it."""
    if found := result.get("agreement"):
        yield from ((f"agreement, run {i}", noise) for i, noise in enumerate(found["noise"], 1))
    for name, rows in result.get("slowdown", {}).items():
        yield from ((f"slowdown, {name.removeprefix('slow-')} %", row["noise"]) for row in rows if "noise" in row)
    if found := result.get("stalls"):
        yield "stalls", found["noise"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated; all by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="in a cell; four times that for slowdown, ten for stalls")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    args = parser.parse_args()
    file = args.out.with_suffix(".json")
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    result["machine"] = describe_machine()
    bundles = tuple(Bundle.open(args.bundles / variant) for variant in args.variant or VARIANTS)
    for part in args.parts:
        result[part] = PARTS[part](bundles, args.seconds)
        write_result(args.out, result, table(result))


if __name__ == "__main__":
    main()
