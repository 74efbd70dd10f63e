"""How fast is every backend of a GPU machine? `sjepa-bench` where there is neither click nor an installed package.

    python benchmarks/gpu_latency.py BUNDLES OUT/tensorrt --backend tensorrt [--deadline 540]
    python benchmarks/gpu_latency.py BUNDLES OUT/others --backend ort-cuda --backend torch-cuda-graph ... [--scenario paced]
    python benchmarks/gpu_latency.py BUNDLES OUT/latency_H200_DATE --merge OUT/tensorrt.json OUT/others.json

BUNDLES holds one bundle a folder (`benchmarks/pack_bundles.py` makes them on any machine). Engines are built first where
TensorRT is asked for. A run ends at its deadline with what it has, all cells with as many blocks; `--merge` makes one report of
runs that needed different Pythons. OUT is a name without suffix: .json and .npz are written.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import SjepaError
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.bench import BenchConfig, run_bench
from sjepa_deploy.runtime.bench_results import SCENARIOS, BenchReport, Samples, load_report, load_samples, write_report
from sjepa_deploy.runtime.merge import merge

VARIANTS = ("prelocal", "postlocal", "contextual")
PRECISIONS = ("fp32", "tf32", "fp16")


def build(bundles: tuple[Bundle, ...], backends: list[str], precisions: list[str]) -> None:
    """Build the engines that are asked for and not there; what fails is left out of the run with its reason."""
    from sjepa_deploy.export.to_tensorrt import build_engine

    for flavour in ("tensorrt", "tensorrt-rtx"):
        if flavour not in backends:
            continue
        for bundle in bundles:
            for precision in precisions:
                try:
                    record = build_engine(bundle, precision, flavour=flavour)  # type: ignore[arg-type]
                    print(
                        f"{bundle.path.name} {flavour} {precision}: {record.build_seconds:.1f} s, {record.evidence}", flush=True
                    )
                except SjepaError as e:
                    print(f"{bundle.path.name} {flavour} {precision}: {e}", flush=True)


def summary(report: BenchReport) -> None:
    """Print one line a cell, for a log that is cut from the front."""
    for entry in report.left_out:
        print(f"not measured: {entry.what}: {entry.reason}")
    for cell in report.cells:
        if cell.latency is None:
            loop = cell.open_loop
            print(f"{cell.key.label}: " + ("cold start" if loop is None else f"not held, {loop.utilization:.0%} busy"))
            continue
        figures = [f"p{p.percent:g} {p.value.value:.1f}" for p in cell.latency.percentiles if p.value is not None]
        wrong = " WRONG" if cell.struck_out else ""
        print(f"{cell.key.label}: {', '.join(figures)}, max {cell.latency.max_us:.0f} us, {cell.latency.n_blocks} blocks{wrong}")
    for found in report.capacity:
        print(f"{found.bundle} on {found.backend} {found.precision}: {found.n_held} streams of {found.rate:g}/s")
    for choice in report.recommendations:
        print(f"{choice.bundle}: {choice.backend} {choice.precision}. {choice.why}")
    print("noise:", report.noise, "partial:", report.partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--precision", action="append", default=[], choices=PRECISIONS)
    parser.add_argument("--scenario", action="append", default=[], choices=SCENARIOS)
    parser.add_argument("--variant", action="append", default=[], choices=VARIANTS)
    parser.add_argument("--duration", type=float, default=2.0, help="seconds in each cell")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds after which no block starts")
    parser.add_argument("--processes", type=int, default=1, help="cold starts of each backend")
    parser.add_argument("--memory", choices=("mapped", "copy"), default="mapped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--merge", type=Path, nargs="+", help="reports to make one of, in place of a run")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    file = arguments.out.parent / f"{arguments.out.name}.json"
    if arguments.merge:
        reports = [(path, load_report(path)) for path in arguments.merge]
        report, samples = merge([(report, load_samples(report, path)) for path, report in reports])
    else:
        report, samples = measure(arguments)
    summary(write_report(report, samples, file))


def measure(arguments: argparse.Namespace) -> tuple[BenchReport, Samples]:
    began = time.monotonic()
    bundles = tuple(Bundle.open(arguments.bundles / variant) for variant in arguments.variant or VARIANTS)
    precisions = arguments.precision or list(PRECISIONS)
    build(bundles, arguments.backend, precisions)
    config = BenchConfig(
        backends=tuple(arguments.backend),
        precisions=tuple(precisions),
        scenarios=tuple(arguments.scenario) or SCENARIOS,
        seconds=arguments.duration,
        processes=arguments.processes,
        time_limit=max(1.0, arguments.deadline - (time.monotonic() - began)),
        seed=arguments.seed,
        options=BackendOptions(memory=arguments.memory),
    )
    shown = [0.0]

    def progress(text: str, done: int, total: int) -> None:
        if not total or time.monotonic() - shown[0] > 20:
            print(f"{time.monotonic() - began:6.0f} s  {done} of {total}  {text}", flush=True)
            shown[0] = time.monotonic()

    command = shlex.join(["python", *sys.argv])
    return run_bench(bundles, config, command=command, progress=progress)


if __name__ == "__main__":
    main()
