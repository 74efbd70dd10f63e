"""How old is a decision, and does a decoder run for hours? Two processes over LSL, and a day of stream at high speed.

    sjepa-export --variant all --out bundles
    python benchmarks/streaming.py live --bundles bundles --variants prelocal,postlocal --sfreqs 500 --hops 0.1 --minutes 30
    python benchmarks/streaming.py fast --bundles bundles --variants prelocal --hours 24

`live` starts an outlet (129 channels, one sample at a time, stamped on push) and `sjepa-stream` for each combination of variant,
rate and hop (0 is every sample of the model), one after the other, with an LSL session of their own. The age of a decision is
counted from the stamp of the window's newest sample. `--priority N` gives both processes a real-time priority.
`fast` decodes a synthetic stream as fast as it can, on a virtual clock, so that decisions have no age there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, write_result

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.runtime.live.sources import synthetic_source
from sjepa_deploy.runtime.machine import CpuTimes

RESULTS = Path(__file__).parent / "results"
LATE_S = 2e-3
"""Seconds by which the sender is late when it says so."""

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'sjepa-stream'; from sjepa_deploy.cli.stream import main; main()"]
LSL_CONFIG = """[ports]
IPv6=disable
[multicast]
ResolveScope=machine
ListenAddress=127.0.0.1
AddressesOverride={{127.0.0.1}}
Interfaces={{127.0.0.1}}
[lab]
KnownPeers={{127.0.0.1}}
SessionID={session}
[log]
level=-3
"""


def send(bundle: Path, sfreq: float, name: str, priority: int | None, late: Path) -> None:
    """Be the amplifier: push one sample at a time when it is due, stamped at that moment, until killed.

    How late it is itself goes into a file: a process that sleeps and has priority is late when the machine stands still.
    """
    import pylsl

    if priority is not None:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    source = synthetic_source(Bundle.open(bundle).spec.signal, sfreq=sfreq, speed=float("inf"), chunk=round(60 * sfreq))
    minute = np.ascontiguousarray(source.read(0.0).samples, np.float32)
    info = pylsl.StreamInfo(name, "EEG", minute.shape[1], sfreq, "float32", f"{name}-{os.getpid()}")
    channels = info.desc().append_child("channels")
    for label in source.info.ch_names:
        channels.append_child("channel").append_child_value("label", label).append_child_value("unit", "microvolts")
    outlet = pylsl.StreamOutlet(info)
    notes = late.open("w", buffering=1)
    started, i = time.perf_counter(), 0
    while True:
        wait = started + i / sfreq - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
            if (behind := time.perf_counter() - started - i / sfreq) > LATE_S:
                notes.write(f"{json.dumps([pylsl.local_clock(), behind])}\n")
        outlet.push_sample(minute[i % len(minute)], pylsl.local_clock())
        i += 1


def watch_memory(pid: int, every: float, into: list[tuple[float, float]], stop: threading.Event) -> None:
    """Note the resident memory in MiB."""
    started = time.monotonic()
    while not stop.wait(every):
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            return
        into.append((round(time.monotonic() - started, 1), round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2)))


def live(bundle: Path, sfreq: float, hop: float, minutes: float, priority: int | None, extra: list[str]) -> dict[str, Any]:
    name = f"benchmark-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "lsl_api.cfg"
        config.write_text(LSL_CONFIG.format(session=name))
        environment = {**os.environ, "LSLAPICFG": str(config)}
        lines, late = Path(folder) / "decisions.jsonl", Path(folder) / "late.jsonl"
        rights = [] if priority is None else ["--priority", str(priority)]
        sending = ["--bundle", bundle, "--sfreq", str(sfreq), "--name", name, "--late", late, *rights]
        sender = subprocess.Popen([sys.executable, __file__, "send", *sending], env=environment)
        arguments = ["--source", f"lsl:{name}", "--hop", str(hop), "--out", lines, "--json", "--quiet", *rights, *extra]
        memory: list[tuple[float, float]] = []
        stop = threading.Event()
        before = CpuTimes.now()
        try:
            time.sleep(4)  # the outlet is there
            decoder = subprocess.Popen(
                [*COMMAND, bundle, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True
            )
            watcher = threading.Thread(target=watch_memory, args=(decoder.pid, 5.0, memory, stop))
            watcher.start()
            time.sleep(minutes * 60 + 6)
            decoder.send_signal(signal.SIGTERM)
            printed, _ = decoder.communicate(timeout=60)
        finally:
            stop.set()
            sender.kill()
            sender.wait()
        after = CpuTimes.now()
        rows, late_at = ([json.loads(line) for line in file.read_text().splitlines()] for file in (lines, late))
    summary = json.loads(printed)
    decisions = [row for row in rows if "index" in row]
    ages = np.array([row["decided"] - row["time"] for row in decisions])
    latencies = np.array([row["decided"] - row["received"] for row in decisions])
    inferences = np.array([row["infer_s"] for row in decisions])
    times = np.array([row["time"] for row in decisions])
    tenth = max(1, len(ages) // 10)
    return {
        "variant": bundle.name,
        "sfreq": sfreq,
        "hop": hop,
        "minutes": minutes,
        "priority": priority,
        "n_decisions": len(ages),
        "age_ms": percentiles(ages),
        "arrival_to_decision_ms": percentiles(latencies),
        "stages_ms": {
            "transport": percentiles(ages - latencies),
            "filters and waiting": percentiles(latencies - inferences),
            "inference": percentiles(inferences),
        },
        "interval_jitter_ms": percentiles(np.abs(np.diff(times) - np.median(np.diff(times)))),
        "age_median_first_tenth_ms": float(np.median(ages[:tenth]) * 1e3),
        "age_median_last_tenth_ms": float(np.median(ages[-tenth:]) * 1e3),
        "ages_over_5_ms": int((ages > 0.005).sum()),
        "counters": summary["counters"],
        "filter_delay": summary["filter_delay"],
        "memory_mib": memory,
        "events": [row for row in rows if row["type"] == "incident"][:200],
        "accounted": accounted(summary["counters"]),
        "others_cores": after.others_since(before),
        "stolen_cores": after.stolen_since(before),
        "sender_late": [[at, behind * 1e3] for at, behind in late_at if decisions and at >= times[0]],
        "oldest": [[times[i], ages[i] * 1e3, latencies[i] * 1e3] for i in np.argsort(ages)[:-11:-1]],
    }


def fast(bundle: Path, hours: float, hop: float, sfreq: float, extra: list[str]) -> dict[str, Any]:
    arguments = ["--source", "synthetic", "--sfreq", sfreq, "--speed", "inf", "--duration", hours * 3600, "--hop", hop, *extra]
    memory: list[tuple[float, float]] = []
    stop = threading.Event()
    started = time.monotonic()
    decoder = subprocess.Popen([*COMMAND, bundle, "--json", *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    watcher = threading.Thread(target=watch_memory, args=(decoder.pid, 2.0, memory, stop))
    watcher.start()
    printed, _ = decoder.communicate()
    stop.set()
    summary = json.loads(printed)
    return {
        "variant": bundle.name,
        "sfreq": sfreq,
        "hop": hop,
        "hours_of_stream": hours,
        "elapsed_s": round(time.monotonic() - started, 1),
        "counters": summary["counters"],
        "memory_mib": memory,
        "accounted": accounted(summary["counters"]),
    }


def accounted(counters: dict[str, int]) -> bool:
    """Whether every window that was due has its decision, or is counted among those left out."""
    reasons = ("held", "skipped_late", "skipped_gap", "skipped_paused", "failed")
    return counters["windows"] == sum(counters[key] for key in ("decisions", *reasons))


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """Return percentiles in milliseconds, those that there are enough samples for."""
    wanted = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "p99.9": 99.9}
    least = {"p99": 500, "p99.9": 5000}
    values = {k: float(np.percentile(seconds, q) * 1e3) for k, q in wanted.items() if len(seconds) >= least.get(k, 20)}
    return {**values, "max": float(seconds.max() * 1e3)} if len(seconds) else {}


def growth(memory: list[tuple[float, float]]) -> str:
    """Return the resident memory after a tenth of the run, and at its end."""
    if len(memory) < 3:
        return "-"
    return f"{memory[len(memory) // 10 + 1][1]:.1f} -> {memory[-1][1]:.1f}"


def cores(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def lateness(run: dict[str, Any]) -> str:
    late = [behind for _, behind in run["sender_late"]]
    return f"{len(late)}, {max(late):.1f} ms" if late else "0"


def table(runs: list[dict[str, Any]]) -> str:
    rows = []
    if any("age_ms" in run for run in runs):
        rows += [
            "Sample to decision in ms, in the first and last tenth of the run its median; memory in MiB after a tenth of the run",
            "and at its end; cores that others kept busy, and that the hypervisor took, on average; how often the sender, which",
            f"only sleeps and sends, woke more than {LATE_S * 1e3:g} ms late itself, and by how much at most.",
            "",
            "| variant | Hz | hop | min | decisions | p50 | p99 | p99.9 | max | first -> last tenth | over 5 ms | misses "
            "| skipped | memory | sum | others | stolen | sender late |",
            "| --- " * 18 + "|",
        ]
    for run in runs:
        counters = run["counters"]
        skipped = counters["skipped_late"] + counters["skipped_gap"]
        if "age_ms" in run:
            age = {name: f"{value:.2f}" for name, value in run["age_ms"].items()}
            figures = " | ".join(age.get(name, "-") for name in ("p50", "p99", "p99.9", "max"))
            rows.append(
                f"| {run['variant']} | {run['sfreq']:g} | {run['hop'] or 'sample'} | {run['minutes']:g} | {run['n_decisions']} | "
                f"{figures} | {run['age_median_first_tenth_ms']:.2f} -> {run['age_median_last_tenth_ms']:.2f} | "
                f"{run['ages_over_5_ms']} | {counters['misses']} | {skipped} | {growth(run['memory_mib'])} | "
                f"{run['accounted']} | {cores(run['others_cores'])} | {cores(run['stolen_cores'])} | {lateness(run)} |"
            )
        else:
            rows.append(
                f"{run['variant']}: {run['hours_of_stream']:g} h of stream at {run['sfreq']:g} Hz in {run['elapsed_s']:.0f} s; "
                f"{counters['windows']} windows = {counters['decisions']} decisions + {skipped} skipped ({run['accounted']}); "
                f"memory {growth(run['memory_mib'])} MiB."
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sending = commands.add_parser("send", help="be the amplifier; `live` starts it")
    sending.add_argument("--bundle", type=Path)
    sending.add_argument("--sfreq", type=float)
    sending.add_argument("--name")
    sending.add_argument("--priority", type=int)
    sending.add_argument("--late", type=Path, help="where to write when it was late, and by how much")
    for name in ("live", "fast"):
        command = commands.add_parser(name)
        command.add_argument("--bundles", type=Path, required=True)
        command.add_argument("--variants", default="prelocal,postlocal,contextual")
        command.add_argument("--sfreqs", default="500")
        command.add_argument("--hops", default="0.1")
        command.add_argument("--out", type=Path, help="name of the result, without suffix")
        command.add_argument("--extra", default="", help="further options of sjepa-stream")
        if name == "live":
            command.add_argument("--minutes", type=float, default=1.0)
            command.add_argument("--priority", type=int)
        else:
            command.add_argument("--hours", type=float, default=24.0)
    args = parser.parse_args()
    if args.command == "send":
        send(args.bundle, args.sfreq, args.name, args.priority, args.late)
        return
    machine = describe_machine()
    runs: list[dict[str, Any]] = []
    result = {"machine": machine, "runs": runs}
    for variant, sfreq, hop in itertools.product(args.variants.split(","), args.sfreqs.split(","), args.hops.split(",")):
        bundle = args.bundles / variant
        if args.command == "live":
            runs.append(live(bundle, float(sfreq), float(hop), args.minutes, args.priority, args.extra.split()))
        else:
            runs.append(fast(bundle, args.hours, float(hop), float(sfreq), args.extra.split()))
        write_result(
            args.out or RESULTS / f"streaming_{args.command}_2-core-cpu_{time.strftime('%Y-%m-%d')}", result, table(runs)
        )


if __name__ == "__main__":
    main()
