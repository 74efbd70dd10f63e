"""How fast is every backend of a GPU machine? `sjepa-bench` where there is neither click nor an installed package.

    python benchmarks/gpu_latency.py BUNDLES OUT/latency_H100_DATE --report --deadline 570 \
        --python "COMMAND" --tensorrt-python "COMMAND"
    python benchmarks/gpu_latency.py BUNDLES OUT/others --backend ort-cuda --backend torch-cuda-graph ... [--scenario paced]
    python benchmarks/gpu_latency.py BUNDLES OUT/latency_H100_DATE --merge OUT/tensorrt.json OUT/others.json
    python benchmarks/gpu_latency.py BUNDLES OUT/fastest --backend cuda --backend tensorrt --scenario throughput --keep-fastest

BUNDLES holds one bundle a folder (`benchmarks/pack_bundles.py` makes them on any machine). OUT is a name without suffix: .json
and .npz are written, and `sjepa-bench --render OUT.json BUNDLES/*` makes the pages of them.

--report measures everything in parts, what matters most first, each in a process of its own with a limit of its own: TensorRT 8.6
needs another Python than PyTorch, and a backend that hangs or breaks the GPU's context takes its own part only. COMMAND is what a
shell runs in front of this script's name. After each part the report of all so far is written; what does not fit before the
deadline is not begun, and a part that is there from an earlier call is not measured again.

--keep-fastest keeps in each bundle which backend is the fastest at each batch, as in `sjepa-bench`: of a run or, with --merge, of
reports of this machine. The Python that keeps is the one that decodes: it must have what was chosen.

Engines that are missing are built where TensorRT is asked for, unless --no-build. A run ends at its deadline with what it has,
all cells with as many blocks; opening takes at most half of it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import SjepaError
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.backends.engines import EngineStore
from sjepa_deploy.runtime.bench.cells import SCENARIOS, Samples
from sjepa_deploy.runtime.bench.files import load_report, load_samples, write_report
from sjepa_deploy.runtime.bench.keep_fastest import keep
from sjepa_deploy.runtime.bench.merge import merge, renamed
from sjepa_deploy.runtime.bench.results import BenchReport, Ending, LeftOut
from sjepa_deploy.runtime.bench.run import BenchConfig, run_bench
from sjepa_deploy.runtime.bench.words import why_partial
from sjepa_deploy.serialize import decode

VARIANTS = ("prelocal", "postlocal", "contextual")
PRECISIONS = ("fp32", "tf32", "fp16")
WIDE = "contextual-1024"
"""The bundle that takes batches of 1024; parts of it and of the like are left out where they are not there."""

GRACE_S = 20.0
"""A part that has not ended so long after its limit is interrupted, upon which it writes what it has, and later killed."""


@dataclass(frozen=True)
class Part:
    """What is measured in one process: words as they stand behind the options of this script."""

    name: str
    seconds: float
    backends: str
    precisions: str
    scenarios: str
    duration: str = "0.5"
    more: str = ""

    @property
    def options(self) -> list[str]:
        """The options of this script."""
        named = {
            "backend": self.backends,
            "precision": self.precisions,
            "scenario": self.scenarios,
            "duration": self.duration,
        }
        return [f"--{name}={word}" for name, words in named.items() for word in words.split()] + self.more.split()


ALL = "fp32 tf32 fp16"
GRAPHS = "ort-cuda torch-cuda-graph torch-cuda-graph-no-fast-path"
COMPILED = "torch-compile-cuda torch-compile-cuda-no-fast-path"
LIVE = "back-to-back paced"
MAIN = f"{LIVE} throughput"
PERSISTENT = "--rate=100 --option=persistent=true --suffix=-persistent"  # keeps the GPU, so that each model has its own process
IN_PLACE = "--in-place --suffix=-in-place"
WIDE_BATCHES = f"--variant={WIDE} --batch=64 --batch=1024"
CURVE = " ".join([f"--batch={1 << i}" for i in range(11)] + [IN_PLACE])
LOCAL = "--variant=prelocal-1024 --variant=postlocal-1024"
FOR_EACH_BATCH = "--opt-batch=1 --opt-batch=32 --opt-batch=1024"  # of TensorRT: kernels chosen for small, middle and large ones
EAGER = "torch-eager-cuda torch-eager-cuda-no-fast-path"
NO_GRAPH = "--option=cuda_graph=false --suffix=-no-graph"  # TensorRT 8.6 takes some engines into none
PARTS = (
    Part("cuda", 100, "cuda", ALL, MAIN, "0.5 paced=5", "--rate=100"),
    Part("in-place", 25, f"cuda {GRAPHS}", "fp32 fp16", "back-to-back", "0.5", IN_PLACE),
    Part("in-place-tensorrt", 20, "tensorrt", ALL, "back-to-back", "0.5", IN_PLACE),
    Part("tensorrt", 115, "tensorrt", ALL, MAIN, "0.4 paced=2.5", "--rate=100"),
    Part("graphs", 100, GRAPHS, "fp32 fp16", MAIN, "0.4 paced=1", "--rate=100"),
    *(Part(f"persistent-{v}", 18, "cuda", "fp32", LIVE, "0.5 paced=2.5", f"--variant={v} {PERSISTENT}") for v in VARIANTS),
    Part("persistent-fp16", 18, "cuda", "fp16", LIVE, "0.5 paced=2.5", f"--variant=contextual {PERSISTENT}"),
    Part("eager", 30, "torch-eager-cuda ort-cpu", "fp32 fp16", "back-to-back"),
    Part("compile", 100, COMPILED, "fp32", "back-to-back"),
    Part("curve", 130, f"cuda {GRAPHS}", ALL, "throughput", "0.3", f"--variant={WIDE} {CURVE}"),
    Part("curve-tensorrt", 90, "tensorrt", "fp32 fp16", "throughput", "0.3", f"--variant={WIDE} {CURVE} {FOR_EACH_BATCH}"),
    Part("curve-local", 60, f"cuda {GRAPHS} {EAGER}", "fp32", "throughput", "0.3", f"{LOCAL} {CURVE}"),
    Part("curve-local-tensorrt", 40, "tensorrt", "fp32", "throughput", "0.3", f"{LOCAL} {CURVE} {FOR_EACH_BATCH}"),
    Part("curve-eager", 60, EAGER, "fp32 fp16", "throughput", "0.3", f"--variant={WIDE} {CURVE}"),
    Part("wide", 120, f"cuda {GRAPHS}", "fp32 fp16", "throughput", "1", WIDE_BATCHES),
    Part("wide-tensorrt", 60, "tensorrt", "fp32 fp16", "throughput", "1", f"{WIDE_BATCHES} --opt-batch=1024"),
    Part("wide-no-graph", 60, "tensorrt", "fp16", "throughput", "1", f"{WIDE_BATCHES} --opt-batch=1024 {NO_GRAPH}"),
    Part("wide-compile", 120, COMPILED, "fp32 fp16", "throughput", "1", WIDE_BATCHES),
    Part("tf32", 25, GRAPHS, "tf32", "back-to-back"),
    Part("streams", 40, f"cuda {GRAPHS}", "fp32", "streams", "2"),
    Part("streams-tensorrt", 20, "tensorrt", "fp32", "streams", "2"),
    Part("slow", 60, f"cuda {GRAPHS}", "fp32", "paced", "2.5", "--rate=10"),
    Part("slow-tensorrt", 25, "tensorrt", "fp32", "paced", "2.5", "--rate=10"),
    Part("cold", 70, f"cuda {GRAPHS}", "fp32", "cold-start"),
    Part("cold-tensorrt", 20, "tensorrt", "fp32", "cold-start"),
    Part("compile-more", 90, COMPILED, "fp16 tf32", "back-to-back"),
    Part("eager-more", 40, "torch-eager-cuda", "tf32", "back-to-back"),
)
"""The report, what matters most first."""


def make_report(arguments: argparse.Namespace) -> None:
    """Measure the parts one after the other until the deadline, and write the report of all after each."""
    end = time.monotonic() + arguments.deadline
    parts = arguments.parts or arguments.out.parent / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    done: list[Path] = []
    missing: list[LeftOut] = []

    def lost(part: Part, reason: str) -> None:
        scenarios, backends, precisions = (", ".join(w.split()) for w in (part.scenarios, part.backends, part.precisions))
        missing.append(LeftOut(what=(f"part {part.name} ({scenarios} of {backends} in {precisions})",), reason=reason))

    for part in PARTS:
        if arguments.only and part.name not in arguments.only.split(","):
            continue
        file = parts / f"{part.name}.json"
        left = end - time.monotonic()
        if lacking := [v for v in wanted_by(part) if not (arguments.bundles / v).is_dir()]:
            print(f"{part.name}: there is no {arguments.bundles / lacking[0]}", flush=True)
            lost(part, f"There was no bundle {lacking[0]}.")
            continue
        if not file.is_file():
            if left < part.seconds / 2:
                print(f"{part.name}: left out, {left:.0f} s are left", flush=True)
                lost(part, "There was no time left for it.")
                continue
            limit = min(part.seconds, left)
            python = arguments.tensorrt_python if part.backends == "tensorrt" else arguments.python
            options = [*part.options, f"--deadline={limit:.0f}", "--blocks=5", "--quiet"]
            options += ["--no-build"] if arguments.no_build else []
            began = time.monotonic()
            run_part(f"{python} {shlex.join([__file__, str(arguments.bundles), str(parts / part.name), *options])}", limit)
            print(f"{part.name}: {time.monotonic() - began:.0f} s, {'written' if file.is_file() else 'NOTHING'}", flush=True)
        if file.is_file():
            done.append(file)
            write_merged(done, arguments.out)
        else:
            lost(part, "It ended without a result.")
    if done:
        command = f"python benchmarks/gpu_latency.py BUNDLES OUT/{arguments.out.name} --report"
        summary(write_merged(done, arguments.out, command=command, missing=missing))


def wanted_by(part: Part) -> list[str]:
    """Return the bundles that a part names."""
    return [word.partition("=")[2] for word in part.more.split() if word.startswith("--variant=")]


def run_part(command: str, limit: float) -> None:
    """Run `command` in a shell; past its limit it is interrupted, and then killed with all that it started."""
    process = subprocess.Popen(["bash", "-c", command], start_new_session=True)
    try:
        for sign in (signal.SIGINT, signal.SIGKILL):
            try:
                process.wait(limit + GRACE_S)
                return
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, sign)
                limit = 0.0
        process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(GRACE_S)
        raise


def write_merged(files: Sequence[Path], out: Path, command: str | None = None, missing: Sequence[LeftOut] = ()) -> BenchReport:
    """Write the report of `files` and of what is missing beside them, and return it."""
    reports = [(path, load_report(path)) for path in files]
    report, samples = merge([(report, load_samples(report, path)) for path, report in reports])
    if missing:
        report = replace(report, partial=(Ending(kind="parts lost", n=len(missing)), *report.partial))
    report = replace(report, command=command or report.command, left_out=(*report.left_out, *missing))
    return write_report(report, samples, out.parent / f"{out.name}.json")


def build(bundles: tuple[Bundle, ...], backends: list[str], precisions: list[str], opt_batches: list[int]) -> None:
    """Build the engines that are asked for and not there; what fails is left out of the run with its reason.

    An engine is built for each of `opt_batches`, the batch that TensorRT chooses kernels for. The backend runs each batch size on
    the engine that suits it.
    """
    from sjepa_deploy.export.to_tensorrt import build_engine, default_settings

    for flavour in ("tensorrt", "tensorrt-rtx"):
        if flavour not in backends:
            continue
        for bundle in bundles:
            records = [r.identity for r in EngineStore(bundle=bundle).records() if r.identity.machine.flavour == flavour]
            there = {(identity.precision, identity.settings.opt_batch) for identity in records}
            for precision, opt in itertools.product(precisions, opt_batches or [1]):
                if (precision, opt) in there:
                    continue
                name = f"{bundle.path.name} {flavour} {precision} for {opt}"
                try:
                    settings = replace(default_settings(bundle, precision), opt_batch=opt)  # type: ignore[arg-type]
                    record = build_engine(bundle, precision, flavour=flavour, settings=settings)  # type: ignore[arg-type]
                    print(f"{name}: {record.build_seconds:.1f} s, {record.evidence}", flush=True)
                except SjepaError as e:
                    print(f"{name}: {e}", flush=True)


def summary(report: BenchReport) -> None:
    """Print one line a cell, for a log that is cut from the front."""
    for entry in report.left_out:
        print(f"not measured: {entry.label}: {entry.reason}")
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
    print("noise:", report.noise, "partial:", why_partial(report) or None)


def duration(text: str) -> tuple[str, float]:
    """Return the scenario, "" for all, and the seconds of "2" or "paced=50"."""
    scenario, _, seconds = text.rpartition("=")
    return scenario, float(seconds)


def option(text: str) -> tuple[str, Any]:
    """Return the name and the value of "memory=copy", "cuda_graph=false" or "device=1"."""
    name, _, value = text.partition("=")
    return name, int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--precision", action="append", default=[], choices=PRECISIONS)
    parser.add_argument("--scenario", action="append", default=[], choices=SCENARIOS)
    parser.add_argument("--variant", action="append", default=[], help="folder in BUNDLES; all three by default")
    parser.add_argument("--batch", action="append", default=[], type=int)
    parser.add_argument("--opt-batch", action="append", default=[], type=int, help="batches that TensorRT chooses kernels for")
    parser.add_argument("--rate", action="append", default=[], type=float)
    parser.add_argument("--duration", action="append", default=[], type=duration, help="seconds in each cell, 2 or paced=50")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of a cell")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds after which no block starts")
    parser.add_argument("--processes", type=int, default=1, help="cold starts of each backend")
    parser.add_argument("--option", action="append", default=[], type=option, help="field of BackendOptions, as memory=copy")
    parser.add_argument("--in-place", action="store_true", help="windows stand in the buffers that backends read before a call")
    parser.add_argument("--suffix", default="", help="of the names of backends in the report, which tells of their options")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-build", action="store_true", help="measure the engines that are there")
    parser.add_argument("--quiet", action="store_true", help="print no line for each cell")
    parser.add_argument("--report", action="store_true", help="measure everything, in parts")
    parser.add_argument("--python", default=shlex.quote(sys.executable), help="with --report: runs parts without TensorRT")
    parser.add_argument("--tensorrt-python", default=shlex.quote(sys.executable), help="with --report: runs parts with TensorRT")
    parser.add_argument("--parts", type=Path, help="with --report: folder of the parts.  [default: parts, beside OUT]")
    parser.add_argument("--only", help="with --report: names of parts, separated by commas")
    parser.add_argument("--keep-fastest", action="store_true", help="keep in the bundles what --backend fastest goes by")
    parser.add_argument("--merge", type=Path, nargs="+", help="reports to make one of, in place of a run")
    arguments = parser.parse_args()
    if arguments.report and arguments.keep_fastest:
        parser.error("--keep-fastest takes a run or --merge: parts of a --report have several Pythons.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        make_report(arguments)
        return
    if arguments.merge:
        report = write_merged(arguments.merge, arguments.out)
    else:
        measured, samples = measure(arguments)
        report = write_report(measured, samples, arguments.out.parent / f"{arguments.out.name}.json")
    if not arguments.quiet:
        summary(report)
    if arguments.keep_fastest:
        for variant in arguments.variant or VARIANTS:
            keep_fastest(report, arguments.bundles / variant, arguments)


def keep_fastest(report: BenchReport, path: Path, arguments: argparse.Namespace) -> None:
    """Keep in a bundle which backend is the fastest, and print it, or why there is none."""
    device = dict(arguments.option).get("device", 0)
    try:
        bundle = Bundle.open(path)
        for kept in keep(report, bundle, backends=arguments.backend, precisions=arguments.precision, device=device):
            if isinstance(kept, LeftOut):
                print(f"{kept.label} is not kept: {kept.reason}")
            else:
                print(f"the fastest for {path.name} in {kept.precision} is {kept}")
    except SjepaError as e:
        print(f"{path.name}: {e}")


def measure(arguments: argparse.Namespace) -> tuple[BenchReport, Samples]:
    began = time.monotonic()
    bundles = tuple(Bundle.open(arguments.bundles / variant) for variant in arguments.variant or VARIANTS)
    precisions = arguments.precision or list(PRECISIONS)
    if not arguments.no_build:
        build(bundles, arguments.backend, precisions, arguments.opt_batch)
    seconds_of = dict(arguments.duration)
    seconds = seconds_of.pop("", 2.0)
    config = BenchConfig(
        backends=tuple(arguments.backend),
        precisions=tuple(precisions),
        scenarios=tuple(arguments.scenario) or SCENARIOS,
        batches=tuple(arguments.batch),
        seconds=seconds,
        seconds_of=seconds_of,
        n_blocks=arguments.blocks,
        processes=arguments.processes,
        time_limit=max(1.0, arguments.deadline - (time.monotonic() - began)),
        seed=arguments.seed,
        options=decode(BackendOptions, dict(arguments.option)),
        in_place=arguments.in_place,
        **({"rates": tuple(arguments.rate)} if arguments.rate else {}),
    )
    shown = [0.0]

    def progress(text: str, done: int, total: int) -> None:
        if not arguments.quiet and (not total or time.monotonic() - shown[0] > 20):
            print(f"{time.monotonic() - began:6.0f} s  {done} of {total}  {text}", flush=True)
            shown[0] = time.monotonic()

    command = shlex.join(["python", *sys.argv])
    report, samples = run_bench(bundles, config, command=command, progress=progress)
    return renamed(report, {name: name + arguments.suffix for name in arguments.backend}) if arguments.suffix else report, samples


if __name__ == "__main__":
    main()
